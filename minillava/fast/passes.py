"""The cost of a pass over several tokens, in passes over one token; by it guesses pay off or not
(generate/speculate.py).

It is a table, not a measurement: every run guesses the same number of tokens, and the record of an
answer is the same however busy the machine was.
"""

from collections.abc import Callable

from minillava.fast.processor import has_fast_bfloat16
from minillava.fast.quantize import quantised_kinds
from minillava.llama import LanguageModel
from minillava.options import dtype_name

ROWS = (1, 2, 4, 8, 16, 32)

# Each further row reads the keys and values once more.
ATTENTION_COST = 0.03

COSTS: dict[str, dict[str, tuple[float, ...]]] = {
    "gpu": {"bfloat16": (1.0, 1.0, 1.0, 1.0, 1.05, 1.1)},
    "bf16": {
        "float32": (1.0, 1.14, 1.24, 1.49, 1.91, 2.8),
        "bfloat16": (1.0, 1.0, 1.05, 1.3, 1.65, 2.3),
        "packed": (1.0, 1.0, 1.0, 1.08, 1.31, 2.23),
        "int8": (1.0, 1.3, 1.27, 2.1, 3.82, 7.26),
        "int4": (1.0, 1.17, 1.27, 2.23, 3.94, 7.36),
    },
    "cpu": {
        "float32": (1.0, 1.44, 1.52, 1.72, 2.35, 3.22),
        "bfloat16": (1.0, 1.8, 2.8, 3.4, 4.4, 6.2),
        "int8": (1.0, 1.14, 1.7, 3.4, 6.5, 11.5),
        "int4": (1.0, 1.03, 1.3, 2.7, 5.2, 18.7),
    },
}
"""By where and by what the weights are stored in: the time of one product of so many rows of ROWS
over that of one. bf16: on a processor with instructions for it (4096 x 4096 on AVX512-BF16,
bfloat16 on one core, float32 on two; packed: 11008 x 4096 on two; int8 and int4: whole passes at 1b
on two cores of it, as `bench.py drafts` has them in tools/MEASUREMENTS.md, less ATTENTION_COST; 32
rows extrapolated);
cpu: without (4096 x 11008 on AVX2, tools/MEASUREMENTS.md)."""


def pass_cost(model: LanguageModel) -> Callable[[int], float]:
    """The cost of a pass as a function of the number of rows. A model that runs each guess as a
    step of its own gains nothing from guesses."""
    if model.one_by_one:
        return float
    weight = model.embed_tokens.weight
    kinds = quantised_kinds(model)
    stored = kinds[0] if kinds else dtype_name(weight.dtype)
    if weight.device.type != "cpu":
        table = COSTS["gpu"]
    else:
        table = COSTS["bf16" if has_fast_bfloat16() else "cpu"]
    costs = table.get(stored) or table.get("float32") or table["bfloat16"]
    return lambda rows: interpolate(costs, rows) + ATTENTION_COST * (rows - 1)


def interpolate(costs: tuple[float, ...], rows: int) -> float:
    """The cost for a number of rows, interpolated between the two nearest of ROWS; beyond the last,
    extrapolated from the last two."""
    at = next((i for i, each in enumerate(ROWS) if rows <= each), len(ROWS) - 1)
    low, high = max(at - 1, 0), max(at, 1)
    share = (rows - ROWS[low]) / (ROWS[high] - ROWS[low])
    return costs[low] + share * (costs[high] - costs[low])
