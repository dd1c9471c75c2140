"""What one question asks of a model: positions, weights and cache, counted and not measured."""

from bench_checkpoint import SHAPES

from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig

TEXT = 49  # tokens of the question
PROMPT = 576 + TEXT  # positions of the walk-through's picture question, whatever the picture takes
# bits of a weight
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}
HEAD_BITS = {"q4_0": 6.5625}  # q6_K, in which llama.cpp leaves the head


def positions(size: str, config: LlavaConfig) -> int:
    """The number of ids of the question; the bundled model's question is as short as those that it
    was trained on."""
    return config.tokens_per_image + TEXT if size == SHAPES else PROMPT


def prompt_ids(config: LlavaConfig, positions: int = PROMPT) -> list[int]:
    """Ids of a prompt of so many positions with one picture in the middle; every vocabulary has
    them."""
    text = [1, *range(5, positions - config.tokens_per_image + 4)]
    return [*text[: len(text) // 2], IMAGE_TOKEN_INDEX, *text[len(text) // 2 :]]


def weights_read(text: TextConfig) -> int:
    """The number of weights that decoding a token reads: all of the language model except the
    embedding table, of which it reads one row."""
    width, heads = (
        text.hidden_size,
        text.head_dim * (text.num_attention_heads + text.num_key_value_heads),
    )
    layer = 2 * width * heads + 3 * width * text.intermediate_size
    return text.num_hidden_layers * layer + width * text.vocab_size


def cache_size(config: LlavaConfig, positions: int) -> int:
    """The number of numbers in a cache of so many positions."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions


def bytes_read(config: LlavaConfig, dtype: str, width: int, positions: int) -> float:
    """The bytes that one token reads after so many cached positions: every weight once, and the
    cache, in which a number takes `width` bytes."""
    head = config.text.hidden_size * config.text.vocab_size
    bits = (weights_read(config.text) - head) * BITS[dtype] + head * HEAD_BITS.get(
        dtype, BITS[dtype]
    )
    return bits / 8 + cache_size(config, positions) * width


def operations(config: LlavaConfig, positions: int) -> int:
    """The floating-point operations of prefilling a prompt. Half of attention is masked, and the
    head computes one row."""
    text = config.text
    head = text.hidden_size * text.vocab_size
    attention = 2 * text.num_hidden_layers * positions**2 * text.num_attention_heads * text.head_dim
    return 2 * (weights_read(text) - head) * positions + 2 * head + attention
