"""A GPU begins its next step before the last one's token is known; here is how its numbers
arrive."""

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Whether a step is begun before it is known that the answer goes on: free where the processor
    that knows is not the one that computes, and a whole step too many where it is."""
    return device.type == "cuda"


class Arriving:
    """Numbers on their way from the device. To wait for them is not to wait for what the device was
    given to do since, so that it never stands still."""

    def __init__(self, *tensors: Tensor):
        numbers, self.copied = torch.cat([tensor.flatten().long() for tensor in tensors]), None
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            # By itself it would note the work of the current GPU, which need not be the model's.
            self.copied.record(torch.cuda.current_stream(numbers.device))
        else:
            self.numbers = numbers

    def wait(self) -> list[int]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
