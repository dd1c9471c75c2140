"""Random small models of every relative of LLaVA-1.5, as whole folders with tokenizer and templates
of their kind."""

from pathlib import Path

import hf
import tiled
import torch
from paths import REFERENCE

KINDS = ("interleave", "vip", "llama3", "mistral", "tiles", "tiles-mistral", "tiles-llama3")
"""llava-interleave-qwen, ViP-LLaVA, LLaVA on Llama 3, BakLLaVA; LLaVA-1.6 on Vicuna, on Mistral and
on Llama 3; as on the hub."""

ORIGINAL = ("interleave", "tiles", "tiles-mistral", "tiles-llama3")
"""Of these, what its authors released in their own layout, the tower inside."""

# Those of Qwen2's ChatML, and of Llama 3's chat; the end of a text and of a turn, and the picture,
# which ends the table.
TOKENS = {
    "interleave": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
    "llama3": [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<image>"),
    ],
}
ENDS = {4: "<|im_end|>", 6: "<|eot_id|>"}  # by their number
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = ["t h", "Ġ th", "Ġth e", "s t", "a r", "st ar"]


def write_kind(kind: str, folder: Path, original: bool = False) -> Path:
    """A folder of that kind, float32; the same weights in either layout."""
    config, with_bytes = config_of(kind), tokens_of(kind)
    state = hf.random_state(config, 11)
    tokenizer = None if with_bytes else REFERENCE / "plain" / "tokenizer.model"
    dialect = "original" if original and not with_bytes else "hub"
    hf.write_checkpoint(folder, config, state, dialect=dialect, tokenizer=tokenizer)
    if original and with_bytes:
        write_original(kind, folder, config, state)
    if with_bytes:
        raw = byte_level(kind)
        hf.write_json(raw, folder / "tokenizer.json")
        ids = {token["content"]: token["id"] for token in raw["added_tokens"]}
        begin, end = with_bytes[0], ENDS[len(with_bytes)]
        path = folder / "generation_config.json"
        changed = {"eos_token_id": ids[end], "pad_token_id": ids[begin], "bos_token_id": None}
        hf.write_json(hf.read_json(path) | changed, path)
        roles = {"eos_token": end, "pad_token": begin}
        roles |= {} if kind == "interleave" else {"bos_token": begin}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
        hf.write_json({**settings, **roles}, folder / "tokenizer_config.json")
    return folder


def write_original(kind: str, folder: Path, config: dict, state: dict) -> None:
    """config.json and weights as lmms-lab released these: the whole table, and for Qwen2 a tower
    that is said by name, a head that is the table, and canvases that it is not shown."""
    flat = hf.original_config(config, config["vocab_size"], tower=True)
    flat["rope_theta"] = config["text_config"].get("rope_theta", 10000.0)
    flat["model_type"] = "llava_llama"
    if kind == "interleave":
        flat |= {"model_type": "llava_qwen", "use_sliding_window": False}
        flat |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        flat |= {"image_grid_pinpoints": tiled.GRID, "tie_word_embeddings": True}
        flat |= {"mm_vision_tower": "google/siglip-so400m-patch14-384", "sliding_window": 32768}
        width = config["text_config"]["hidden_size"]
        state = {**state, hf.NEWLINE: torch.zeros(width)}
        del state["lm_head.weight"]
    hf.write_json(flat, folder / "config.json")
    hf.write_weights(hf.rename(state, "original"), folder)
    (folder / "preprocessor_config.json").unlink()


def tokens_of(kind: str) -> list[str]:
    """The tokens of a byte-level tokenizer; none of a kind with SentencePiece's pieces."""
    return TOKENS.get(kind.removeprefix("tiles-"), [])


def config_of(kind: str) -> dict:
    """config.json as the releases of that kind have it, with the numbers of a toy."""
    pieces = byte_level(kind)["added_tokens"][-1]["id"] if tokens_of(kind) else 440
    if kind.startswith("tiles"):
        return tiled.config_of("mistral" if kind == "tiles-mistral" else "llama", pieces)
    toy, top = hf.SIZES["toy"], {}
    text, vision = {**toy["text"], "num_key_value_heads": 2}, dict(toy["vision"])
    if kind == "interleave":
        text |= {"model_type": "qwen2", "rope_theta": 1e6, "architectures": ["Qwen2ForCausalLM"]}
        vision |= {**hf.SIGLIP, "image_size": 60}  # of which the last four pixels are not read
        top = {"tie_word_embeddings": True, **hf.OF_SIGLIP}
    if kind == "vip":
        vision["num_hidden_layers"] = 4
        top = {"model_type": "vipllava", "vision_feature_layers": [-2, -4, 1, 4]}
    if kind == "llama3":
        text["rope_theta"] = 5e5
    if kind == "mistral":
        text |= {"model_type": "mistral", "sliding_window": 4096}
    config = hf.hub_config(text, vision, pieces=pieces, **top)
    if kind == "vip":
        del config["vision_feature_layer"], config["vision_feature_select_strategy"]
    return config


def byte_level(kind: str) -> dict:
    """tokenizer.json of Qwen2's or Llama 3's form: a piece for each byte, a few words, and the
    tokens of its chat."""
    llama, tokens = kind != "interleave", tokens_of(kind)
    regex = PATTERN % ("{1,3}" if llama else "")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    pieces = [*alphabet(), *(pair.replace(" ", "") for pair in MERGES)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    begin, frame = tokens[0], {**level, "use_regex": True}
    if llama:
        first = {"SpecialToken": {"id": begin, "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        made = {"id": begin, "ids": [len(vocab)], "tokens": [begin]}
        frame = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [],
            "special_tokens": {begin: made},
        }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocab) + i, "content": name, "special": True, **flags}
            for i, name in enumerate(tokens)
        ],
        "normalizer": None if llama else {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "post_processor": frame,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": llama,
            "vocab": vocab,
            "merges": [*MERGES],
        },
    }


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes, by the rule of GPT-2: printable Latin-1 as it is,
    the others from 256 on."""
    found, following = [], 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        found.append(chr(byte if printable else following))
        following += not printable
    return found
