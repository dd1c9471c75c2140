"""The language model's linear layers in 8 or 4 bits a weight, for `--quantize`. A reader may skip
this file.

Decoding reads every weight once per token, so fewer bytes take less time. Embeddings, norms, vision
tower and projector are not quantised; activations keep the model's dtype.

r rows, K width before, N width after, G = GROUP.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.fast import processor
from minillava.fast.linear import BLOCK, LARGER, blockwise, convert, linear

INT4_PACKED = "weight_int4_packed"
"""int4 in the order that a processor's kernel wants, which opens without being packed anew. Which
order it is stands in the file's metadata, as ORDER."""

ORDER = "int4_order"

# the names of the stored parts of a weight
PARTS = {"weight_int8": "scale", "weight_int4": "scale_zero", INT4_PACKED: "scale_zero"}

GROUP = 64  # weights of a row that share a scale and a zero in int4: 4.5 bits a weight

# K must be a multiple: the int8 kernel reads so many numbers at once, also beyond a row's end
ALIGNED = 16

LINE = 64  # bytes: what a processor loads of memory at once

# N must be a multiple for int4: every processor packs so many rows, or a divisor, by one pattern
TILE = 64

# of scales, and of activations inside the kernels, which are slow for anything else
NARROW = torch.bfloat16

# up to here compiled code reads the small weights for each row; one of contrast has two
FUSED_ROWS = 2

SMALLEST = torch.finfo(NARROW).tiny  # a scale of zero would divide zero by zero


BLOCKS = {
    "float32 blocks": (torch.float32, BLOCK),
    "float32 blocks x4": (torch.float32, LARGER * BLOCK),
    "bfloat16 blocks": (NARROW, BLOCK),
    "bfloat16 blocks x4": (NARROW, LARGER * BLOCK),
}
"""Ways to a product, by their names in `processor.WAYS`: what the weights are made again, and how
many rows at a time. The one other way is `kernel`."""


class QuantisedLinear(nn.Module):
    """x·weightᵀ + bias. With few rows a kernel reads the quantised weights. Otherwise, and if a
    gradient is needed, the weights are dequantised: on a CPU in blocks that stay in its cache, on a
    GPU as a whole (compiled code dequantises inside the sum). On a GPU it is therefore slower than
    bfloat16 unless it is compiled."""

    kind: str  # one of KINDS

    def __init__(self, weight: Tensor, shape: tuple[int, int]):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None)  # [N], where the layer has one; it is not quantised
        self.out_features, self.in_features = shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        out = self.product(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        """x·weightᵀ, [..., K] -> [..., N]"""
        rows = x.numel() // self.in_features
        graph = x.requires_grad and torch.is_grad_enabled()
        if graph:
            return Widened.apply(x, self)
        kernel = self.has_kernel and x.device.type == "cpu" and rows > 0
        if torch.compiler.is_compiling() and rows <= FUSED_ROWS and not kernel:
            return self.as_sum(x)
        if x.device.type != "cpu" or (torch.compiler.is_compiling() and not kernel):
            return linear(x, self.dequantise(slice(None), x.dtype))
        way = processor.way(self.kind, rows, without="" if kernel else "kernel")
        return self.by(way, x.reshape(rows, self.in_features)).view(
            *x.shape[:-1], self.out_features
        )

    def by(self, way: str, x: Tensor) -> Tensor:
        """The product by one of BLOCKS, or by `kernel`: [r, K] -> [r, N]"""
        if way == "kernel":
            # Contiguous rows of ALIGNED numbers begin where the kernels' aligned loads may read.
            return self.few_rows(x.to(NARROW).contiguous()).to(x.dtype)
        dtype, step = BLOCKS[way]
        # A dtype wider than the way's is kept; float16 is upcast, since it has no instructions of
        # its own.
        wide = x.to(torch.float32 if x.dtype == torch.float16 else x.dtype)
        wide = wide.to(torch.promote_types(wide.dtype, dtype))
        make = lambda some, memory: self.dequantise(some, wide.dtype, memory)  # noqa: E731
        return blockwise(wide, self.out_features, make, step).to(x.dtype)

    def as_sum(self, x: Tensor) -> Tensor:
        """The product written as a sum. A compiler dequantises the weights inside a sum, one by one
        as it adds them. Before a product it would write all of them to memory, and read twice the
        bytes of bfloat16."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.dequantise(slice(None), wide)  # [N, K]
        return (x[..., None, :].to(wide) * weight).sum(-1).to(x.dtype)  # [..., N]


class Widened(torch.autograd.Function):
    """The product of a layer whose weights are made wide for it and, once more, for its gradient:
    nothing is kept in between but the layer."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantise(slice(None), x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """dy [..., N] -> dx = dy·W [..., K]"""
        return gradient @ ctx.layer.dequantise(slice(None), gradient.dtype), None


class Int8Linear(QuantisedLinear):
    """weight int8 [N, K], scale bfloat16 [N]: w = weight · scale."""

    kind = "int8"

    def __init__(self, weight_int8: Tensor, scale: Tensor):
        weight_int8 = aligned(weight_int8)
        super().__init__(weight_int8, tuple(weight_int8.shape))
        self.register_buffer("scale", scale)
        self.has_kernel = self.in_features % ALIGNED == 0

    def few_rows(self, x: Tensor) -> Tensor:
        """[r, K] -> [r, N]"""
        return torch._weight_int8pack_mm(x, self.weight, self.scale)

    def dequantise(self, rows: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Some rows of the weights, written to `out` if given: [n, K]."""
        between = torch.promote_types(dtype, NARROW)  # small scales are too small for float16
        return (
            convert(self.weight[rows], out, between)
            .mul_(self.scale[rows, None].to(between))
            .to(dtype)
        )


class Int4Linear(QuantisedLinear):
    """weight uint8 [N, K/2], two numbers q from 0 to 15 a byte, on a CPU in the order its kernel
    wants; scale_zero bfloat16 [K/G, N, 2]: w = (q - 8) · scale + zero."""

    kind = "int4"

    def __init__(self, weight_int4: Tensor, scale_zero: Tensor, packed: bool = False):
        """packed: for this processor already, on a CPU."""
        rows, half = weight_int4.shape
        if packed:
            weight_int4 = aligned(weight_int4)
        elif weight_int4.device.type == "cpu":
            weight_int4, packed = pack_whole(weight_int4), True
        super().__init__(weight_int4, (rows, 2 * half))
        self.register_buffer("scale_zero", scale_zero.transpose(0, 1).contiguous())
        self.has_kernel = packed  # which stays so, should the layer move to another device

    def few_rows(self, x: Tensor) -> Tensor:
        """[r, K] -> [r, N]"""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scale_zero)

    def dequantise(self, rows: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Some rows of the weights, whole tiles, written to `out` if given: [n, K]."""
        between = torch.promote_types(dtype, NARROW)
        fresh = (unpack if self.has_kernel else split)(self.weight[rows])
        q = fresh.view(torch.int8).sub_(8)  # [n, K]
        # each [n, K/G, 1]
        scale, zero = self.scale_zero[:, rows, :, None].transpose(0, 1).to(between).unbind(2)
        whole = convert(q, out, between).unflatten(1, (-1, GROUP))  # [n, K/G, G]
        return whole.mul_(scale).add_(zero).flatten(1).to(dtype)

    def as_sum(self, x: Tensor) -> Tensor:
        if self.has_kernel:
            return super().as_sum(x)
        # Both columns of a byte are used at once: split into one number a byte, the weights would
        # go through memory.
        wide = torch.promote_types(x.dtype, torch.float32)
        # each [N, K/G, 1]
        scale, zero = self.scale_zero.transpose(0, 1)[..., None].to(wide).unbind(2)
        # [..., 1, K/G, G/2, 2]
        pairs = x.to(wide).unflatten(-1, (-1, GROUP // 2, 2))[..., None, :, :, :]
        weight = self.weight.unflatten(1, (-1, GROUP // 2))  # [N, K/G, G/2]
        even, odd = (((q.to(wide) - 8) * scale + zero) for q in (weight & 15, weight >> 4))
        return (even * pairs[..., 0] + odd * pairs[..., 1]).sum((-2, -1)).to(x.dtype)


def quantize_tensor(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A weight [N, K] in the form to store, the same for every processor, by suffix of its name:
    `weight_int8` and `scale` as in Int8Linear; or `weight_int4` uint8 [N, K/2], even columns in the
    low halves of the bytes, and `scale_zero` [N, K/G, 2]; see `kind_for`."""
    make = {"int8": to_int8, "int4": to_int4}[kind_for(weight.shape, kind)]
    return by_blocks(weight, lambda rows: make(rows.float()))


def by_blocks(weight: Tensor, make: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` has for a weight [N, ...], made from BLOCK of its rows at a time. Unlike
    torch.cat this does not hold everything twice: the blocks, and what they become."""
    made: dict[str, Tensor] = {}
    for first in range(0, len(weight), BLOCK):
        for suffix, part in make(weight[first : first + BLOCK]).items():
            if suffix not in made:
                made[suffix] = part.new_empty((len(weight), *part.shape[1:]))
            made[suffix][first : first + BLOCK] = part
    return made


def kind_for(shape: Sequence[int], kind: str) -> str:
    """What a weight of this shape becomes: int8 in place of int4, which cannot take N that is not a
    multiple of TILE, or K of GROUP."""
    return "int8" if shape[0] % TILE or shape[1] % GROUP else kind


@cache  # a model has hundreds of layers, of a handful of shapes
def stored_shapes(
    shape: tuple[int, int], kind: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype, by suffix, of what `quantize_tensor` makes of a weight of this shape."""
    made = quantize_tensor(torch.empty(shape, device="meta"), kind)
    return {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in made.items()}


def whole_shape(parts: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """[N, K] of a stored weight, from the shapes of its parts. Raises ValueError when they do not
    belong together."""
    (weight, shape), (_, other) = parts.items()
    n, k = (*shape, 0)[:2]
    k, expected = (k, (n,)) if weight == "weight_int8" else (2 * k, (n, 2 * k // GROUP, 2))
    fits = weight == "weight_int8" or (n % TILE == 0 and k % GROUP == 0)
    if len(shape) != 2 or other != expected or not fits:
        raise ValueError(f"has shape {list(shape)} and {PARTS[weight]} {list(other)}")
    return n, k


def to_int8(weight: Tensor) -> dict[str, Tensor]:
    """float32 [n, K], symmetric: a row's largest absolute value is 127."""
    scale = (weight.abs().amax(1) / 127).clamp(min=SMALLEST).to(NARROW)  # [n]
    return {"weight_int8": (weight / scale[:, None]).round_().to(torch.int8), "scale": scale}


def to_int4(weight: Tensor) -> dict[str, Tensor]:
    """float32 [n, K], from a group's smallest number to its largest."""
    groups = weight.unflatten(1, (-1, GROUP))  # [n, K/G, G]
    # With 0 in the range, the zero point is at most 8 scales, so its rounding error is a small part
    # of a scale.
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)  # [n, K/G]
    scale = ((high - low) / 15).clamp(min=SMALLEST).to(NARROW)
    zero = (low + 8 * scale).to(NARROW)
    q = (
        ((groups - zero[..., None]) / scale[..., None])
        .round_()
        .add_(8)
        .clamp_(0, 15)
        .to(torch.uint8)
        .flatten(1)
    )
    return {
        "weight_int4": q[:, ::2] | q[:, 1::2] << 4,
        "scale_zero": torch.stack([scale, zero], dim=-1),
    }


def split(nibbles: Tensor) -> Tensor:
    """As stored [n, K/2] -> one number a byte [n, K]"""
    return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1)


def aligned(weight: Tensor) -> Tensor:
    """A weight that begins at a cache line: some processors' kernels load whole lines, and in a
    file it may begin in the middle of one."""
    return weight.clone() if weight.data_ptr() % LINE else weight


def pack_whole(nibbles: Tensor) -> Tensor:
    """The order stored for every processor [N, K/2] -> the order of this processor's kernel."""
    return by_blocks(nibbles, lambda rows: {INT4_PACKED: pack(split(rows))})[INT4_PACKED]


def unpack_whole(packed: Tensor, order: Tensor) -> Tensor:
    """The inverse of pack_whole, for the processor that has this `packed_order`."""

    def stored(rows: Tensor) -> dict[str, Tensor]:
        q = unpack(rows, order)
        return {"weight_int4": q[:, ::2] | q[:, 1::2] << 4}

    return by_blocks(packed, stored)["weight_int4"]


def pack_here(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result of `quantize_tensor`, with int4 in the order of this processor's kernel."""
    return {
        INT4_PACKED if suffix == "weight_int4" else suffix: (
            pack_whole(part) if suffix == "weight_int4" else part
        )
        for suffix, part in stored.items()
    }


def read_order(text: str | None) -> Tensor:
    """A `packed_order` from a file's metadata. Raises ValueError if the text is not one."""
    words = (text or "").split()
    rows = len(words)
    if sorted(words) != sorted(map(str, range(rows))) or rows % 2 or not rows or TILE % rows:
        raise ValueError(f"is int4 packed in an unknown order ({ORDER} {text!r})")
    return torch.tensor([int(word) for word in words])


def pack(q: Tensor) -> Tensor:
    """uint8 [n, K] -> as this processor's kernel wants it, uint8 [n, K/2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)


def unpack(packed: Tensor, order: Tensor | None = None) -> Tensor:
    """The inverse of `pack`: [n, K/2] -> [n, K]. order: another processor's `packed_order`."""
    order = (packed_order() if order is None else order).to(packed.device)
    # [n/R, R/2, K], R rows a tile
    columns = packed.view(-1, 2 * packed.shape[1], len(order) // 2).transpose(1, 2)
    return torch.cat([columns & 15, columns >> 4], dim=1).index_select(1, order).flatten(0, 1)


@cache
def packed_order() -> Tensor:
    """Where each of a tile's R rows lies in a packed column, low halves of its bytes before high
    ones: [R].

    The layout is not documented and differs between processors. So numbers that tell their own
    position are packed, one bit at a time. Raises NotImplementedError if the layout is not tile
    after tile, and column after column within a tile."""
    index = torch.arange(TILE * TILE).view(TILE, TILE)  # row · TILE + column
    bits = range((TILE * TILE - 1).bit_length())
    origin = sum(split(pack((index >> bit & 1).byte())).flatten().long() << bit for bit in bits)
    rows = int((origin % TILE != 0).nonzero()[0])  # R: so many numbers of column 0 come first
    order = origin[:rows] // TILE
    known = rows % 2 == 0 == TILE % rows
    if not known or not torch.equal(
        index.view(-1, rows, TILE)[:, order].transpose(1, 2).flatten(), origin
    ):
        raise NotImplementedError(
            "this processor packs int4 in an order that minillava does not know; use int8"
        )
    return order.view(-1, 2).T.flatten().argsort()


def quantised_layer(stored: dict[str, Tensor]) -> QuantisedLinear:
    """The layer for a result of `quantize_tensor`."""
    if INT4_PACKED in stored:
        return Int4Linear(stored[INT4_PACKED], stored["scale_zero"], packed=True)
    return (Int4Linear if "weight_int4" in stored else Int8Linear)(**stored)


def quantised_kinds(model: nn.Module) -> list[str]:
    """The KINDS of a model's quantised layers."""
    return sorted({m.kind for m in model.modules() if isinstance(m, QuantisedLinear)})


def count_parameters(model: nn.Module) -> int:
    """How many numbers the weights stand for, quantised or not."""
    small = (
        m.out_features * m.in_features for m in model.modules() if isinstance(m, QuantisedLinear)
    )
    return sum(p.numel() for p in model.parameters()) + sum(small)
