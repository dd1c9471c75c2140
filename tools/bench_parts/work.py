"""What one question asks of a model: positions, weights and cache, counted and not measured."""

from bench_checkpoint import SHAPES

from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig

TEXT = 49  # tokens of the question
PROMPT = 576 + TEXT  # positions of the walk-through's picture question, whatever the picture takes
# bits of a weight
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}
HEAD_BITS = {"q4_0": 6.5625}  # q6_K, in which llama.cpp leaves the head


def positions(size: str, config: LlavaConfig) -> int:
    """Of the question that is asked; the bundled model's are as short as those it was made for."""
    return config.tokens_per_image + TEXT if size == SHAPES else PROMPT


def prompt_ids(config: LlavaConfig, positions: int = PROMPT) -> list[int]:
    """So many positions with one picture in their midst, of ids that every vocabulary has."""
    text = [1, *range(5, positions - config.tokens_per_image + 4)]
    return [*text[: len(text) // 2], IMAGE_TOKEN_INDEX, *text[len(text) // 2 :]]


def weights_read(text: TextConfig) -> int:
    """Weights that decoding a token reads: all of the language model but the table, of which it
    reads one row."""
    width, heads = (
        text.hidden_size,
        text.head_dim * (text.num_attention_heads + text.num_key_value_heads),
    )
    layer = 2 * width * heads + 3 * width * text.intermediate_size
    return text.num_hidden_layers * layer + width * text.vocab_size


def cache_size(config: LlavaConfig, positions: int) -> int:
    """How many numbers the cache of so many positions holds."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions


def bytes_read(config: LlavaConfig, dtype: str, width: int, positions: int) -> float:
    """By one token after so many cached positions: every weight once, and the cache, a number of which
    takes `width` bytes."""
    head = config.text.hidden_size * config.text.vocab_size
    bits = (weights_read(config.text) - head) * BITS[dtype] + head * HEAD_BITS.get(
        dtype, BITS[dtype]
    )
    return bits / 8 + cache_size(config, positions) * width


def operations(config: LlavaConfig, positions: int) -> int:
    """Floating-point operations that reading a prompt takes; of attention half is masked, and the
    head reads one row."""
    text = config.text
    head = text.hidden_size * text.vocab_size
    attention = 2 * text.num_hidden_layers * positions**2 * text.num_attention_heads * text.head_dim
    return 2 * (weights_read(text) - head) * positions + 2 * head + attention
