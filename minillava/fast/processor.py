"""The kind of this processor, and the way to compute a product that is fastest on it. A reader may
skip this file.

WAYS is what `python tools/bench.py kernels` found for avx2, avx512, avx512-bf16 and amx (the first
two on a newer processor that was held to their instructions); the kinds in GUESSED were not
measured. Nothing is measured while the program runs: the ways add up in different orders, and an
answer must not depend on how busy the machine was.
"""

import math
import os
import platform
from functools import cache

import torch

MANY = math.inf

Ways = tuple[tuple[float, str], ...]

PLAIN: Ways = ((MANY, "plain"),)
# oneDNN reads a weight once for several rows; a batch of parts is faster for one row by a wide
# weight and for few by a short one
FLOAT32: Ways = ((MANY, "onednn"),)
SHORT_FLOAT32: Ways = ((3, "turned parts"), *FLOAT32)
WIDE_FLOAT32: Ways = ((1, "parts"), *FLOAT32)
FEW_WIDE_AVX2: Ways = ((1, "parts"), (2, "turned"), (3, "onednn"))
BLOCKS: Ways = ((64, "float32 blocks"), (MANY, "float32 blocks x4"))

WAYS: dict[str, dict[str, Ways]] = {
    "avx2": {
        "float32": FLOAT32,
        "float32, short": SHORT_FLOAT32,
        "float32, narrow": ((2, "turned parts"), *FLOAT32),
        "float32, wide": (*FEW_WIDE_AVX2, *FLOAT32),
        "float32, small": PLAIN,
        "float32, 4096 × 11008": (*FEW_WIDE_AVX2, (16, "parts"), *FLOAT32),
        "float32, 2048 × 5632": (*FEW_WIDE_AVX2, (8, "halves"), *FLOAT32),
        "float32, 32064 × 2048": ((1, "turned parts"), *FLOAT32),
        "bfloat16": ((1, "mv"), (2, "turned"), (3, "plain"), (4, "turned parts"), *BLOCKS),
        "bfloat16, wide": ((1, "mv"), (8, "plain"), *BLOCKS),
        "bfloat16, narrow": ((1, "mv"), (3, "plain"), (4, "turned parts"), *BLOCKS),
        "bfloat16, 2048 × 5632": ((1, "mv"), (2, "turned"), (4, "plain"), *BLOCKS),
        "int8": ((32, "kernel"), *BLOCKS),
        "int4": ((64, "kernel"), *BLOCKS),
    },
    "avx512": {
        "float32": FLOAT32,
        "float32, short": SHORT_FLOAT32,
        "float32, narrow": ((1, "turned parts"), *FLOAT32),
        "float32, wide": WIDE_FLOAT32,
        "float32, small": PLAIN,
        "bfloat16": ((1, "mv"), (3, "plain"), *BLOCKS),
        "bfloat16, 32064 × 4096": ((1, "turned parts"), (3, "plain"), *BLOCKS),
        "bfloat16, 2048 × 5632": ((1, "mv"), (3, "plain"), (4, "parts"), *BLOCKS),
        "bfloat16, wide": ((1, "mv"), (3, "plain"), (8, "parts"), *BLOCKS),
        "int8": ((64, "kernel"), *BLOCKS),
        "int4": ((128, "kernel"), (MANY, "float32 blocks x4")),
    },
    "avx512-bf16": {
        "float32": FLOAT32,
        "float32, short": SHORT_FLOAT32,
        "float32, wide": WIDE_FLOAT32,
        "float32, small": PLAIN,
        "bfloat16": ((1, "twice"), (MANY, "plain")),
        "bfloat16, wide": ((1, "twice"), (7, "plain"), (32, "turned"), (MANY, "plain")),
        "int8": ((16, "kernel"), (MANY, "bfloat16 blocks x4")),
        "int4": ((96, "kernel"), (MANY, "bfloat16 blocks x4")),
        "packed": ((MANY, "kernel"),),
    },
    "amx": {  # measured before oneDNN's product of float32 was among the ways
        "float32": ((1, "parts"), (2, "plain"), (32, "turned parts"), (MANY, "plain")),
        "float32, wide": ((1, "parts"), (2, "plain"), (32, "turned"), (MANY, "plain")),
        "bfloat16": ((1, "mv"), (32, "turned"), (MANY, "plain")),
        "int8": ((16, "kernel"), (MANY, "bfloat16 blocks x4")),
        "int4": ((32, "kernel"), (MANY, "bfloat16 blocks x4")),
    },
    "arm": {
        "float32": PLAIN,
        "bfloat16": ((3, "plain"), *BLOCKS),
        "int8": ((16, "kernel"), *BLOCKS),
        "int4": ((16, "kernel"), *BLOCKS),
    },
    "arm-bf16": {
        "float32": PLAIN,
        "bfloat16": PLAIN,
        "int8": ((16, "kernel"), (MANY, "bfloat16 blocks x4")),
        "int4": ((16, "kernel"), (MANY, "bfloat16 blocks x4")),
    },
    "unknown": {
        "float32": PLAIN,
        "bfloat16": PLAIN,
        "int8": ((16, "kernel"), (MANY, "float32 blocks")),
        "int4": ((16, "kernel"), (MANY, "float32 blocks")),
    },
}
"""By kind of processor and by what a weight is stored in: up to how many rows of x which way, one
of `linear.PRODUCTS`, or of `quantize.BLOCKS`. One of a weight's `forms` has a line of its own
if that makes a difference, and so has a shape of 1b or 7b that falls out of its form's line."""

SHORT = 1280
"""Up to so many columns a weight is short."""

NARROW = 2048
"""Up to so many columns a weight that is not short is narrow."""

SMALL = 100_000
"""Up to so many numbers a weight is small: it stays in the processor's cache, and whatever is done
beside the product takes longer than it gains."""

SAME_ROWS: dict[str, dict[str, int]] = {
    "avx2": {"bfloat16": 4, "int8": 32, "int4": 32},
    "avx512": {"int8": 32, "int4": 32},
    "avx512-bf16": {"bfloat16": 32, "packed": 32, "int8": 16, "int4": 32},
    "amx": {"bfloat16": 16, "int8": 16, "int4": 16},
}
"""Up to how many rows of a pass each has the bits that it has alone, if more than one: the ways of
one row and of several add up in the same order. From `bench.py kernels --bits`."""

UPCAST_QUERIES = {"avx512-bf16"}
"""Kinds with instructions for bfloat16 on which attention of one query is faster in float32. (All
kinds without do it so.)"""

GUESSED = {"arm", "arm-bf16", "unknown"}
"""Kinds of which no machine was at hand."""

# The limits that a user may set for oneDNN, which computes products of bfloat16 and of float32,
# such that it uses no bfloat16 instructions.
WITHOUT_BFLOAT16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}
WITHOUT_AMX = {*WITHOUT_BFLOAT16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2"}


def way(
    stored: str, rows: int, shape: tuple[int, ...] = (), without: str = "", on: str = ""
) -> str:
    """The way to a product of so many rows with a weight that is stored in this. shape: of the
    weight, [N, C]. without: one that cannot be taken here. on: a kind of processor (default: this
    one)."""
    table = WAYS[on or kind()]
    lines = (f"{stored}, {each}" for each in forms(shape))
    ways = next((table[line] for line in lines if line in table), table[stored])
    return next(name for most, name in ways if rows <= most and name != without)


@cache
def forms(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Of a weight [N, C]: its shape; small if it has at most SMALL numbers; wide if it has more
    columns than rows, else short if it has at most SHORT columns, or narrow if at most NARROW. The
    first that has a line in WAYS counts."""
    if not shape:
        return ()
    rows, columns = shape
    wide = columns > rows
    fits = {
        "small": rows * columns <= SMALL,
        "wide": wide,
        "short": not wide and columns <= SHORT,
        "narrow": not wide and SHORT < columns <= NARROW,
    }
    return f"{rows} × {columns}", *(name for name, true in fits.items() if true)


@cache
def kind() -> str:
    """The kind of this processor, a key of WAYS. Libraries read the variables that limit them once,
    and so does this function."""
    if platform.machine().lower() in ARM:
        return "arm-bf16" if has_fast_bfloat16() else "arm"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and has_fast_bfloat16():
        return "amx" if has_amx() else "avx512-bf16"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "unknown")


ARM = {"aarch64", "arm64"}


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 run on instructions for them (AVX512-BF16, AMX, ARM's BF16);
    without, they are emulated at an eighth of float32's speed."""
    if onednn_cap() in WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() in ARM:
        return arm_has_bfloat16()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def arm_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_amx() -> bool:
    return onednn_cap() not in WITHOUT_AMX and torch.cpu._is_amx_tile_supported()


def onednn_cap() -> str:
    """The newest instructions that oneDNN may use."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    return cap.upper()
