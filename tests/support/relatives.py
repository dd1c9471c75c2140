"""Small folders of the relatives of LLaVA-1.5, made without transformers: weights are drawn from a
seed, the same on every machine, and the shapes of their tensors lie in tests/reference/.

transformers' own numbers of these networks are stored there, too (tools/make_reference.py).
"""

import json
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import hf
import torch
from paths import REFERENCE, ROOT

sys.path.insert(0, str(ROOT / "tools"))

from byte_tokenizer import CHATML, LLAMA_3, byte_level

FACTS = REFERENCE / "relatives.json"
TOKENIZER = REFERENCE / "plain" / "tokenizer.model"
PIECES = 440  # of that tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
VISION = {
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 7,
}
# Few patches to a tile, so that canvases of several stay small.
TILE = VISION | {"patch_size": 14}
GRID = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
# Words of the questions, and of pieces that they have in common.
MERGES = [
    *(("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġ", "the"), ("i", "n"), ("r", "e"), ("h", "a")),
    *(("a", "g"), ("i", "m"), ("im", "ag"), ("imag", "e"), ("Ġ", "image"), ("Ċ", "Ċ"), ("e", "r")),
    *(("1", "2"), ("12", "3"), ("Ã", "¤"), ("u", "s"), ("us", "er"), ("a", "ss"), ("s", "s")),
]


def kind_of(text: dict | None = None, vision: dict = VISION, special=None, **top) -> dict:
    """What there is to say of a kind: its config.json's parts, and its special tokens if its
    tokenizer is byte-level."""
    return {"text": text or {}, "vision": vision, "special": special, "top": top}


KINDS = {
    # llava-interleave-qwen
    "interleave": kind_of(
        {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "num_key_value_heads": 1},
        VISION | hf.SIGLIP,
        CHATML,
        tie_word_embeddings=True,
        **hf.OF_SIGLIP,
    ),
    "vicuna-tiles": kind_of(
        None, TILE, model_type="llava_next", image_grid_pinpoints=GRID,
        architectures=["LlavaNextForConditionalGeneration"], use_image_newline_parameter=True,
    ),
    "mistral-tiles": kind_of(
        {"model_type": "mistral", "num_key_value_heads": 1, "rope_theta": 1e6, "sliding_window": None},
        TILE, model_type="llava_next", image_grid_pinpoints=GRID,
        architectures=["LlavaNextForConditionalGeneration"], use_image_newline_parameter=True,
    ),
    # LLaVA-OneVision, whose larger maps are made smaller
    "onevision": kind_of(
        {"model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6, "num_key_value_heads": 1},
        TILE | hf.SIGLIP,
        CHATML,
        model_type="llava_onevision",
        architectures=["LlavaOnevisionForConditionalGeneration"],
        image_grid_pinpoints=[[28 * a, 28 * b] for a in range(1, 5) for b in range(1, 5)],
        vision_aspect_ratio="anyres_max_2",
        tie_word_embeddings=True,
        **hf.OF_SIGLIP,
    ),
    "vip": kind_of(
        None, VISION | {"num_hidden_layers": 4}, model_type="vipllava",
        architectures=["VipLlavaForConditionalGeneration"],
        vision_feature_layers=[-2, -4, 1, 4], projector_layernorm_eps=1e-5,
    ),
    # llava-llama-3-8b
    "llama-3": kind_of({"num_key_value_heads": 1, "rope_theta": 5e5}, VISION, LLAMA_3),
    # BakLLaVA
    "mistral": kind_of({"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 512}),
}  # fmt: skip


def config_of(kind: str) -> dict:
    """config.json of a kind, small."""
    parts = KINDS[kind]
    if parts["special"] is None:
        pieces, image = PIECES, PIECES
    else:
        pieces = 256 + len(MERGES)
        image = pieces + parts["special"].index("<image>")
    config = hf.hub_config({**TEXT, **parts["text"]}, parts["vision"], pieces=image, **parts["top"])
    if parts["special"]:
        text, end = config["text_config"], ends_of(kind)
        config["pad_token_id"] = end["pad_token_id"]
        config["eos_token_id"] = text["eos_token_id"] = end["eos_token_id"]
    return config


def ends_of(kind: str) -> dict[str, int]:
    """The ids of a byte-level tokenizer at which an answer ends, and of padding."""
    special = KINDS[kind]["special"]
    named = ("<|im_end|>", "<|endoftext|>") if special is CHATML else ("<|eot_id|>", "<pad>")
    end, pad = (256 + len(MERGES) + special.index(name) for name in named)
    return {"eos_token_id": end, "pad_token_id": pad}


def write(
    folder: Path, kind: str, seed: int, shapes: dict[str, Sequence[int]], dialect: str = "hub"
) -> Path:
    """A folder of a kind with weights of a seed, of the shapes that transformers gives them."""
    config = config_of(kind)
    special = KINDS[kind]["special"]
    state = hf.alive(config, shapes, even(seed))
    hf.write_checkpoint(
        folder, config, state, dialect=dialect, tokenizer=None if special else TOKENIZER
    )
    if special:
        write_byte_level(folder, kind)
    return folder


def write_byte_level(folder: Path, kind: str) -> None:
    special, ends = KINDS[kind]["special"], ends_of(kind)
    written = byte_level(special, MERGES)
    named = {i["id"]: i["content"] for i in written["added_tokens"]}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    roles = {"eos_token": named[ends["eos_token_id"]], "pad_token": named[ends["pad_token_id"]]}
    roles |= {"bos_token": special[0]} if special is LLAMA_3 else {}
    hf.write_json(
        {"tokenizer_class": "PreTrainedTokenizerFast", **roles}, folder / "tokenizer_config.json"
    )
    hf.write_json({"_from_model_config": True, **ends}, folder / "generation_config.json")


def even(seed: int):
    """f(shape): numbers of standard deviation one, evenly spread, of 16 random bits each, which
    every machine draws alike."""
    choose = random.Random(seed)

    def draw(shape: Sequence[int]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        bits = torch.frombuffer(bytearray(choose.randbytes(2 * count)), dtype=torch.int16)
        return (bits.float() / 2**15 * 3**0.5).view(tuple(shape))

    return draw


@cache
def facts() -> dict:
    return hf.read_json(FACTS)


def stored(folder: Path, kind: str, dialect: str = "hub") -> Path:
    """The folder whose numbers are stored."""
    known = facts()[kind]
    return write(folder, kind, known["seed"], known["shapes"], dialect)
