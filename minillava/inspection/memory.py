"""What a model takes in memory, counted from shapes."""

import math

from minillava.config import LlavaConfig
from minillava.fast.quantize import stored_shapes
from minillava.options import KINDS

# row of the table -> bytes of a number in the cache
MEMORY = {"float32": 4, "bfloat16": 2, "int8": 2, "int4": 2}


def weight_bytes(shapes: dict[str, tuple[int, ...]], row: str) -> int:
    """Bytes of the weights: 4 each in float32, 2 in bfloat16. int8 and int4 change the linear
    layers of the language model, as quantize.py stores them, and leave all else (embedding table,
    norms, projector, vision tower) in bfloat16."""
    total = 0
    for name, shape in shapes.items():
        linear = (
            name.startswith("language_model.") and len(shape) == 2 and "embed_tokens" not in name
        )
        if row in KINDS and linear:
            parts = stored_shapes(shape, row).values()
            total += sum(math.prod(part) * dtype.itemsize for part, dtype in parts)
        else:
            total += math.prod(shape) * (4 if row == "float32" else 2)
    return total


def cache_bytes(config: LlavaConfig, positions: int, bytes_each: int = 2) -> int:
    """Bytes of the keys and values of every layer, for that many positions."""
    text = config.text
    return (
        2
        * text.num_hidden_layers
        * text.num_key_value_heads
        * text.head_dim
        * positions
        * bytes_each
    )


def memory_table(config: LlavaConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict]:
    """dtype -> bytes of weights, of the cache per 1,000 positions, and of both at full context. The
    cache has 16 bits, in float32 32, as the loop makes it."""
    context, table = config.text.context, {}
    for row, each in MEMORY.items():
        weights = weight_bytes(shapes, row)
        full = weights + cache_bytes(config, context, each)
        table[row] = {
            "weights": weights,
            "cache_per_1000": cache_bytes(config, 1000, each),
            "full_context": full,
        }
    return table


def gigabytes(count: int) -> str:
    """Bytes for a person: in GB (10⁹) from 100 MB on."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
