"""The tokenizer.json of a tokenizer.model of Llama's kind, as transformers 5 saves it alone."""

from sentencepiece import SentencePieceProcessor

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def as_json(model: SentencePieceProcessor) -> dict:
    """The tokenizer.json of a tokenizer.model: a piece is merged of any two that make it, the
    likeliest first, as transformers converts it."""
    ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in ids.items():
        for at in range(1, 0 if model.is_byte(i) or model.is_control(i) else len(piece)):
            left, right = piece[:at], piece[at:]
            if left in ids and right in ids:
                merges.append((-model.get_score(i), ids[left], ids[right], left, right))
    return {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [f"{left} {right}" for *_, left, right in sorted(merges)],
            "byte_fallback": True,
            "unk_token": "<unk>",
            "fuse_unk": True,
        },
    }
