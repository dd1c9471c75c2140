"""What one question asks of a model: positions, weights and cache, counted and not measured."""

from bench_checkpoint import SHAPES

from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig

TEXT = 49  # tokens of the question
PROMPT = 576 + TEXT  # positions of the walk-through's picture question, whatever the picture takes
# bits of a weight
BITS = {
    "float32": 32,
    "bfloat16": 16,
    "packed": 16,
    "int8": 8,
    "int4": 4.5,
    "bf16": 16,
    "q8_0": 8.5,
    "q4_0": 4.5,
}
HEAD_BITS = {"q4_0": 6.5625}  # q6_K, in which llama.cpp leaves the head


def positions(size: str, config: LlavaConfig, pictures: int = 1) -> int:
    """The number of ids of the question; the bundled model's question is as short as those that it
    was trained on."""
    shown = pictures * config.tokens_per_image + TEXT
    return shown if size == SHAPES else max(PROMPT, shown)


def prompt_ids(config: LlavaConfig, positions: int = PROMPT, pictures: int = 1) -> list[int]:
    """Ids of a prompt of so many positions with the pictures in the middle; every vocabulary has
    them."""
    text = [1, *range(5, positions - pictures * config.tokens_per_image + 4)]
    shown = [IMAGE_TOKEN_INDEX] * pictures
    return [*text[: len(text) // 2], *shown, *text[len(text) // 2 :]]


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
    # a head that is the table of words stays as it is stored, in 16 bits
    tied = {"int8": 16, "int4": 16} if config.text.tie_word_embeddings else {}
    of_head = (HEAD_BITS | tied).get(dtype, BITS[dtype])
    bits = (weights_read(config.text) - head) * BITS[dtype] + head * of_head
    return bits / 8 + cache_size(config, positions) * width


def operations(config: LlavaConfig, positions: int) -> int:
    """The floating-point operations of prefilling a prompt. Half of attention is masked, and the
    head computes one row."""
    text = config.text
    head = text.hidden_size * text.vocab_size
    attention = 2 * text.num_hidden_layers * positions**2 * text.num_attention_heads * text.head_dim
    return 2 * (weights_read(text) - head) * positions + 2 * head + attention
