"""The matrix product of every layer, by the way that this processor does fastest. A reader may skip this file.

The model says `nn.Linear`, and that is what `attention="eager"` runs, bit for bit as transformers. The default gives
the same layers this `forward`: the same product, added up in another order. r rows, C width before, N width after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16  # up to here `weight @ x.T` is faster in float32 than `x @ weight.T`, by 2 to 4 times at 4 rows
FEW_NARROW_ROWS = 6  # up to here, emulated bfloat16 is faster than converting the weight
BLOCK = 512  # rows of a weight converted at a time: 8 MB at 4096 columns, which stays in the cache


class FastLinear(nn.Linear):
    """nn.Linear whose product is chosen by dtype and number of rows. The limits above were measured on AVX2."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., N]"""
        return linear(x, self.weight, self.bias)


def use_fast_linear(model: nn.Module) -> None:
    """Let every nn.Linear of the model compute as FastLinear; weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias. x [..., C], weight [N, C], bias [N] -> [..., N]."""
    rows, narrow = x.numel() // x.shape[-1], x.dtype == torch.bfloat16
    if x.device.type != "cpu" or rows == 0 or not (narrow or x.dtype == torch.float32):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, -1)
    if narrow and rows == 1:
        out = torch.mv(weight, flat[0])  # reads the weight once, at nearly the speed of memory
    elif narrow and rows > FEW_NARROW_ROWS and not has_fast_bfloat16():
        wide = flat.float()
        out = torch.cat([few_rows(wide, part.float()) for part in weight.split(BLOCK)], dim=1).to(x.dtype)
    elif not narrow and 1 < rows <= FEW_ROWS:
        out = few_rows(flat, weight)
    else:
        return F.linear(x, weight, bias)
    return (out if bias is None else out + bias).view(*x.shape[:-1], len(weight))


def few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x [r, C], weight [N, C] -> [r, N]. The library takes its time over a product with few rows, not one with few
    columns."""
    return (weight @ x.T).T.contiguous() if len(x) <= FEW_ROWS else F.linear(x, weight)


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AVX512-BF16, AMX); without, they are emulated
    at an eighth of float32's speed."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
