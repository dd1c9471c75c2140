"""The matrix product of every layer, by the way that this processor does fastest. A reader may skip
this file.

The model says `nn.Linear`, and that is what `attention="eager"` runs, bit for bit as transformers.
The default gives the same layers this `forward`: the same product, added up in another order. r
rows, C width before, N width after.
"""

import os
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Measured on AVX2, two cores: N = 11008, C = 4096.
FEW_NARROW_ROWS = 3  # up to here, emulated bfloat16 is faster than converting the weight

# rows of a weight that are made wide at a time, for few rows of x: 8 MB at C = 4096, about a cache
BLOCK = 512

# above, four times as many: the product takes longer than the memory, and likes them large
MANY_ROWS = 64

# Values of ONEDNN_MAX_CPU_ISA that stand for processors without instructions for bfloat16.
WITHOUT_BFLOAT16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}

_kept = threading.local()


class FastLinear(nn.Linear):
    """nn.Linear whose product is chosen by dtype and number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., N]"""
        return linear(x, self.weight, self.bias)


class FastConv2d(nn.Conv2d):
    """nn.Conv2d, in float32 where bfloat16 is emulated, which takes a fiftieth of the time; and on
    a GPU float32 as it says, where cuDNN's default is TF32, factors of 10 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == torch.float32:
            return self.as_product(x)
        if not is_emulated(x):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)

    def as_product(self, x: Tensor) -> Tensor:
        """Where the steps are as large as the kernel, each patch is a row of one product; torch's
        default for products is not TF32. [n, C, H, W] -> [n, N, H', W']"""
        assert self.stride == self.kernel_size, "patches that overlap"
        assert self.padding == (0, 0), "patches beyond the picture"
        rows, columns = (side // step for side, step in zip(x.shape[2:], self.stride, strict=True))
        patches = F.unfold(x, self.kernel_size, stride=self.stride)  # [n, C·k·k, H'·W']
        out = F.linear(patches.transpose(1, 2), self.weight.flatten(1), self.bias)  # [n, H'·W', N]
        return out.transpose(1, 2).unflatten(2, (rows, columns))


FAST = {nn.Linear: FastLinear, nn.Conv2d: FastConv2d}


def use_fast_linear(model: nn.Module) -> None:
    """Let the layers of a model compute as those of FAST; weights and names stay."""
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [N, C], bias [N] -> [..., N]."""
    rows, narrow = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
    fast = x.device.type == "cpu" and rows > 0 and (narrow or x.dtype == torch.float32)
    if not fast or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if not narrow:
        out = product(flat, weight)
    elif rows == 1:
        out = torch.mv(weight, flat[0])
    elif rows > FEW_NARROW_ROWS and is_emulated(x):
        out = blockwise(
            flat.float(), len(weight), lambda some, memory: convert(weight[some], memory)
        ).to(x.dtype)
    else:
        return F.linear(x, weight, bias)
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], len(weight))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [r, C], weight [N, C] -> [r, N].

    float32 as a batch of products with a part of the weight each: then every thread reads its parts
    from end to end, where the library's one product shares work out so finely that it waits for
    memory. One row takes 0.6 of its time, 32 rows half, 625 rows nearly all. For 2 to 4 rows
    `weight·xᵀ` is faster still.
    """
    # four for each thread
    rows, parts = len(x), 1 << (4 * torch.get_num_threads() - 1).bit_length()
    if x.dtype != torch.float32 or rows == 0:
        return F.linear(x, weight)
    if 1 < rows <= 4:
        return (weight @ x.T).T.contiguous()
    if len(weight) % parts or not len(weight):
        return F.linear(x, weight)
    # [parts, r, n]
    out = torch.bmm(
        x.expand(parts, -1, -1), weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
    )
    return out.transpose(0, 1).reshape(rows, -1)


def blockwise(x: Tensor, n: int, make: Callable[[slice, Tensor | None], Tensor]) -> Tensor:
    """x [r, C] times a weight that is made block by block, [r, n], n > 0. make: from which rows,
    and memory for them [m, C] (None: new memory, as gradients want), to these rows in the dtype of
    x."""
    step = BLOCK if len(x) <= MANY_ROWS else 4 * BLOCK
    memory = None if torch.is_grad_enabled() else kept(step * x.shape[1], x.dtype).view(step, -1)
    return torch.cat(
        [product(x, make(slice(i, min(i + step, n)), memory)) for i in range(0, n, step)], dim=1
    )


def convert(source: Tensor, out: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """`source` [m, C] as another dtype: that of `out`, in its first rows, where there is one."""
    return source.to(dtype) if out is None else out[: len(source)].copy_(source)


def kept(size: int, dtype: torch.dtype) -> Tensor:
    """`size` numbers of memory, the same at every call: where each block gets memory of its own,
    the system spends as long on handing it out as the processor on filling it. Each thread has its
    own, and keeps it (7B: 90 MB)."""
    if (
        getattr(_kept, "memory", None) is None
        or _kept.memory.numel() < size
        or _kept.memory.dtype != dtype
    ):
        # memory that began in that mode could not be written to outside of it
        with torch.inference_mode(False):
            _kept.memory = torch.empty(size, dtype=dtype)
    return _kept.memory[:size]


def is_emulated(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU that is faster in float32, and what can be compiled is not for
    us to choose."""
    slow = (
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )
    return slow and not has_fast_bfloat16()


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 run on instructions for them (AVX512-BF16, AMX); without, they
    are emulated at an eighth of float32's speed. oneDNN, which computes them, may have been told to
    leave the instructions alone."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if cap.upper() in WITHOUT_BFLOAT16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
