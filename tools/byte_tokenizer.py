"""Small or large byte-level tokenizers, as the tokenizer.json of Qwen2 and of Llama 3 have them, for
folders with random weights."""

from collections.abc import Sequence

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
LLAMA_3 = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<image>", "<pad>"),
)
"""The special tokens of either, in the order of their ids; that which ends a turn is the third, or
the fifth."""


def byte_level(kind: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict:
    """tokenizer.json with the special tokens of CHATML or LLAMA_3. Its pieces are the bytes, then
    what the merges make."""
    digits, begin = ("", False) if tuple(kind) == CHATML else ("{1,3}", True)
    vocabulary = [*letters(), *(a + b for a, b in merges)]
    special = {text: len(vocabulary) + i for i, text in enumerate(kind)}
    flags = {
        "special": True,
        **dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False),
    }
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in special.items()],
        "normalizer": None if begin else {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern(digits)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": begin,
            "vocab": {piece: i for i, piece in enumerate(vocabulary)},
            "merges": [list(pair) for pair in merges],
        },
    }
    if begin:
        first, one = kind[0], {"Sequence": {"id": "A", "type_id": 0}}
        before = {"SpecialToken": {"id": first, "type_id": 0}}
        written["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [before, one],
            "pair": [before, one, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {first: {"id": first, "ids": [special[first]], "tokens": [first]}},
        }
    return written


def letters() -> list[str]:
    """The characters that stand for the bytes 0 to 255, sorted by what they are: printable Latin-1
    for itself, those from 256 on for the others."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, own), *(chr(256 + i) for i in range(256 - len(own)))]


def pairs_of(count: int) -> list[tuple[str, str]]:
    """So many merges, each of a piece that there is and of a byte; none makes what another makes."""
    bytes_ = letters()
    before, found = bytes_, []
    while len(found) < count:
        made = [(a, b) for a in before[: 1 + (count - len(found)) // 256] for b in bytes_]
        found += made
        before = ["".join(pair) for pair in made]
    return found[:count]


def pattern(digits: str) -> str:
    """What is a word; `digits`: how many make one."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
