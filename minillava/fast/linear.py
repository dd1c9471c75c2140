"""The matrix product of every layer, by the way that this processor does fastest. A reader may skip
this file.

The model has `nn.Linear`, which `attention="eager"` runs, bit for bit as transformers does. By
default the same layers get the `forward` of this file: the same product, added up in another order.
r rows, C width before, N width after.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.fast import processor
from minillava.llama import LanguageModel

# rows of a weight that are converted at a time: 8 MB of float32 at C = 4096, about a cache
BLOCK = 512

# with many rows of x the product, not the memory, takes the time, and larger blocks are faster
LARGER = 4

_scratch = threading.local()


class FastLinear(nn.Linear):
    """nn.Linear whose product is chosen by dtype and number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., N]"""
        return linear(x, self.weight, self.bias)


class FastConv2d(nn.Conv2d):
    """nn.Conv2d, computed in float32 if bfloat16 is emulated, which takes a fiftieth of the time.
    On a GPU float32 is true float32, while cuDNN's default is TF32, whose factors have 10 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == torch.float32:
            return self.as_product(x)
        if not is_emulated(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)

    def as_product(self, x: Tensor) -> Tensor:
        """The convolution as one product with a row per patch, possible if the stride is the
        kernel's size. torch's default for products is not TF32. [n, C, H, W] -> [n, N, H', W']"""
        assert self.stride == self.kernel_size, "patches that overlap"
        assert self.padding == (0, 0), "patches beyond the picture"
        rows, columns = (side // step for side, step in zip(x.shape[2:], self.stride, strict=True))
        patches = F.unfold(x, self.kernel_size, stride=self.stride)  # [n, C·k·k, H'·W']
        out = F.linear(patches.transpose(1, 2), self.weight.flatten(1), self.bias)  # [n, H'·W', N]
        return out.transpose(1, 2).unflatten(2, (rows, columns))


class FastLanguageModel(LanguageModel):
    """LanguageModel whose head, where that is the table of words, is such a product as well."""

    def head(self, x: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        return linear(x, self.embed_tokens.weight) if tied else super().head(x)


FAST = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d, LanguageModel: FastLanguageModel}


def use_fast_linear(model: nn.Module) -> None:
    """Let the layers of a model compute as those of FAST; weights and names stay."""
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [N, C], bias [N] -> [..., N]."""
    rows, stored = x.numel() // x.shape[-1], NAMES.get(x.dtype)
    if x.device.type != "cpu" or not rows or not stored or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    way = processor.way(stored, rows, weight.shape)
    # as one matrix: the last positions of a prompt are no plain block of memory, and for each row
    # of those torch would copy the weight
    flat = x.reshape(rows, -1)
    if way == "plain":
        out = F.linear(flat, weight, bias)
    else:
        out = PRODUCTS[way](flat, weight)
        out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], len(weight))


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


# --- the ways: x [r, C], weight [N, C] -> [r, N] --------------------------------------------------


def mv(x: Tensor, weight: Tensor) -> Tensor:
    """For one row, a kernel that reads the weight from end to end."""
    return torch.mv(weight, x[0])[None]


def twice(x: Tensor, weight: Tensor) -> Tensor:
    """One row as two equal ones: a library's kernel for one row may be slower than the one for
    several, and add up in another order."""
    return F.linear(x.expand(2, -1), weight)[:1]


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """The weight as the left factor: a library divides the rows of the left factor among its
    threads, and the weight has many rows."""
    return (weight @ x.T).T.contiguous()


def parts(x: Tensor, weight: Tensor, each: int = 4) -> Tensor:
    """A batch of products with a part of the weight each: every thread reads its parts from end to
    end, while a single product may be divided so finely that it waits for memory. each: parts for
    each thread."""
    count = parts_of(weight, each)
    # [parts, r, n]
    out = torch.bmm(x.expand(count, -1, -1), cut(weight, count).transpose(1, 2))
    return out.transpose(0, 1).reshape(len(x), -1)


def turned_parts(x: Tensor, weight: Tensor, each: int = 4) -> Tensor:
    """`parts`, with the weight as the left factor."""
    count = parts_of(weight, each)
    out = torch.bmm(cut(weight, count), x.T.expand(count, -1, -1))  # [parts, n, r]
    return out.flatten(0, 1).T.contiguous()


def cut(weight: Tensor, count: int) -> Tensor:
    return weight.unflatten(0, (count, -1))  # [count, n, C]


def parts_of(weight: Tensor, each: int) -> int:
    """The number of parts: a power of two, at least `each` per thread; 1 if the weight cannot be
    divided evenly."""
    count = 1 << (each * torch.get_num_threads() - 1).bit_length()
    return count if weight.is_contiguous() and len(weight) % count == 0 else 1


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of float32, which reads a weight once for several rows. torch takes it for
    compiled code alone, while F.linear takes that of the BLAS it was built with, such as MKL."""
    if not has_onednn() or torch.is_autocast_enabled("cpu"):  # which knows torch's products alone
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return WithGradient.apply(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@cache
def has_onednn() -> bool:
    """Whether torch was built with it, and still names its product so."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class WithGradient(torch.autograd.Function):
    """oneDNN's product, which has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return onednn(x, weight)  # no gradient is asked for in here

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """[r, N] -> [r, C], [N, C]"""
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return grad @ weight if of_x else None, grad.T @ x if of_weight else None


def float32_blocks(x: Tensor, weight: Tensor, larger: int = 1) -> Tensor:
    """Blocks of the weight, converted to float32."""
    some = lambda rows, memory: convert(weight[rows], memory)  # noqa: E731
    return blockwise(x.float(), len(weight), some, larger * BLOCK).to(x.dtype)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": F.linear,
    "mv": mv,
    "twice": twice,
    "turned": turned,
    "halves": lambda x, weight: parts(x, weight, 1),
    "parts": parts,
    "turned halves": lambda x, weight: turned_parts(x, weight, 1),
    "turned parts": turned_parts,
    "onednn": onednn,
    "float32 blocks": float32_blocks,
    "float32 blocks x4": lambda x, weight: float32_blocks(x, weight, LARGER),
}
"""Every way by its name in `processor.WAYS`; blocks are for bfloat16, oneDNN for float32."""

OF_ONE_ROW = {"mv", "twice"}


def blockwise(
    x: Tensor, n: int, make: Callable[[slice, Tensor | None], Tensor], step: int
) -> Tensor:
    """x [r, C] times a weight that is made block by block, [r, n], n > 0. make(rows, memory)
    returns these rows in the dtype of x; memory [m, C] is a buffer for them, or None for a fresh
    allocation, which gradients need. step: the rows of a block."""
    memory = None if torch.is_grad_enabled() else scratch(step * x.shape[1], x.dtype).view(step, -1)
    return torch.cat(
        [linear(x, make(slice(i, min(i + step, n)), memory)) for i in range(0, n, step)], dim=1
    )


def convert(source: Tensor, out: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`source` [m, C] as another dtype: that of `out`, in its first rows, if there is one."""
    return source.to(dtype) if out is None else out[: len(source)].copy_(source)


def scratch(size: int, dtype: torch.dtype) -> Tensor:
    """A buffer of `size` numbers, reused by every call of this thread, which keeps it (7B: 90 MB).
    A fresh allocation per block costs as much in page faults as filling it."""
    if (
        getattr(_scratch, "memory", None) is None
        or _scratch.memory.numel() < size
        or _scratch.memory.dtype != dtype
    ):
        # memory that began in that mode could not be written to outside of it
        with torch.inference_mode(False):
            _scratch.memory = torch.empty(size, dtype=dtype)
    return _scratch.memory[:size]


def is_emulated(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that is faster in float32; never while compiling, when the
    compiler chooses."""
    slow = (
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )
    return slow and not processor.has_fast_bfloat16()
