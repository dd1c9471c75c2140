"""One run in several processes, as torchrun starts them; alone, everything here does nothing.

The micro-batches of an update are dealt to the processes in turn, and gradients are summed, so that
the number of processes changes the result by rounding alone. A LoRA and a projector are held whole
by every process; a whole language model is cut up among them (FSDP2).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillava.llava import Llava, Spliced

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others before it ends with an error."""


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which process this is: the first, 0, writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """The processes that torchrun started, joined; yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        if began:
            dist.destroy_process_group()


def own(parts: int) -> list[tuple[int, float]]:
    """This process's micro-batches of an update, by number, and their weights. Where weights are
    cut up, all processes must take as many steps: who has no more repeats the last with weight 0,
    and since FSDP means over processes, others count as often as there are processes."""
    mine = list(range(rank(), parts, count()))
    if not is_cut():
        return [(part, 1.0) for part in mine]
    steps = -(-parts // count())
    weighted = [(part, float(count())) for part in mine]
    return weighted + [(parts - 1, 0.0)] * (steps - len(mine))


def sum_gradients(learning: Sequence[nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients over all processes, zeros where no row of an
    update reached it, so that AdamW moves it as if the rows had been on one process."""
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if count() == 1 or is_cut():  # FSDP has summed them
        return
    gradients = [p.grad for p in learning if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def total(number: float) -> float:
    """The sum of a number over all processes."""
    if count() == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64, device=_device())
    dist.all_reduce(found)
    return found.item() / (count() if is_cut() else 1)


def anybody(said: bool) -> bool:
    """Whether it is true of any process."""
    return total(float(said)) > 0


def wait() -> None:
    """Until all processes are here: what the first writes is then on the disk."""
    if count() > 1:
        dist.barrier()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


# ----------------------------------------------------------------------------- weights that are cut

_cut = False


def is_cut() -> bool:
    return _cut


class LossOf(nn.Module):
    """The model as FSDP wants it: one module whose `forward` is the whole pass."""

    def __init__(self, model: Llava):
        super().__init__()
        self.model = model

    def forward(self, loss_of, batch) -> Tensor:
        return loss_of(self.model, batch)


@contextmanager
def cut_up(model: Llava, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A model of which each process holds a part of each weight. dtype: in which products are
    computed. Gradients are summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    global _cut
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.language_model.layers:
        fully_shard(block, mp_policy=policy)
    for part in (model.vision_tower, model.projector):
        fully_shard(part, mp_policy=policy)
    whole_pass = LossOf(model)
    fully_shard(whole_pass, mp_policy=policy)
    _cut = True
    try:
        yield whole_pass
    finally:
        _cut = False


def splice(model: Llava, ids, pixels: Tensor, labels) -> Spliced:
    """Llava.splice. Where weights are cut up, rows without pictures still run the tower and the
    projector, on zeros of which nothing is kept: the others wait for this process there."""
    spliced = model.splice(ids, pixels, labels=labels)
    if not is_cut() or len(pixels):
        return spliced
    vision = model.config.vision
    side, device = vision.image_size, spliced.embeds.device
    zeros = torch.zeros(1, vision.num_channels, side, side, device=device)
    nothing = model.encode_images(zeros).flatten(0, 1)[:0]  # [0, C]
    embeds = torch.cat([spliced.embeds.flatten(0, 1), nothing.to(spliced.embeds.dtype)])
    spliced.embeds = embeds.view_as(spliced.embeds)
    return spliced


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor, if it holds a part of the parameter."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    if tensor.dim() != parameter.dim():  # AdamW's count of steps
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def peak_memory(device: torch.device) -> int:
    """The most bytes that were held at once: by this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
