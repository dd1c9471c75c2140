"""A GPU begins its next step before the last step's token is known; this file reads its numbers
when they arrive."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import LanguageOutput
from minillava.llava import Llava
from minillava.loop import Decoder, decode_in_turn


def overlaps_reading(device: torch.device) -> bool:
    """Whether a step begins before it is known that the answer goes on. On a GPU this is free; on a
    CPU, which both decides and computes, it would cost a whole step too many."""
    return device.type == "cuda"


@contextmanager
def decode_ahead(
    model: Llava, like: Tensor, capacity: int, cache: KVCache | None, wanted: dict[str, bool]
) -> Iterator[Decoder]:
    """`decode_in_turn`, but a step ahead if that is free."""
    with decode_in_turn(model, like, capacity, cache, wanted) as decoder:
        yield choose_decoder(decoder.step, decoder.cache, like.device)


def choose_decoder(
    step: Callable[[Tensor], LanguageOutput], cache: KVCache, device: torch.device
) -> Decoder:
    return (Ahead if overlaps_reading(device) else Decoder)(step, cache)


class Ahead(Decoder):
    """Goes on with the tokens while we learn what they are."""

    tokens = 0  # begun with

    def begin(self, token_ids: Tensor, told: Tensor, last: bool) -> None:
        self.token_ids, self.arriving, self.begun = token_ids, AsyncRead(told), None
        self.tokens += 1
        # Not with the first token: it would be shown only after the second step's many kernels are
        # launched.
        if self.tokens > 1 and not last:
            self.begun = self.step(token_ids)

    def read(self) -> list[int]:
        return self.arriving.wait()

    def next(self) -> LanguageOutput:
        return self.step(self.token_ids) if self.begun is None else self.begun

    def drop(self) -> None:
        if self.begun is not None:
            self.cache.truncate(self.cache.length - 1)


class AsyncRead:
    """Numbers on their way from the device. Waiting for them does not wait for later work of the
    device, so that the device is never idle."""

    def __init__(self, numbers: Tensor):
        self.copied = None
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            # Without a stream it would record on the current GPU, which may not be the model's.
            self.copied.record(torch.cuda.current_stream(numbers.device))
        else:
            self.numbers = numbers

    def wait(self) -> list[int]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()
