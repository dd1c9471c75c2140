"""config.json in either of its two dialects, as a LlavaConfig.

The hub dialect (llava-hf) nests `text_config` and `vision_config`; the original dialect
(liuhaotian) is one flat Llama config with `mm_*` fields. Both leave most numbers out and rely on
the defaults of the classes that wrote them, which are in config.py.
"""

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from minillava.config import (
    CLIP_LARGE_336,
    IM_END,
    IM_PATCH,
    IM_START,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from minillava.files.disk import read_json
from minillava.files.hub import RELEASE, SMALL_RELEASE

T = TypeVar("T")
D = TypeVar("D")
Config = TypeVar("Config", TextConfig, VisionConfig)

_USE_LLAVA = f"use a LLaVA-1.5 checkpoint such as {RELEASE}"

_ORIGINALS = ("llava", "llava_llama", "llava_mistral", "llava_qwen", "share4v")
LLAVAS = (*_ORIGINALS, "vipllava", "llava_next", "llava_onevision")
"""The model types of LLaVA-1.5, of its nearest relatives, of 1.6 and of OneVision; the first and the
last three on the hub, all but the last three in the original dialect."""

_VIP_LAYERS = (-2, -5, -8, -11, 6)
"""The layers that ViP-LLaVA looks at if a file does not name them."""

_GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The canvases of every LLaVA-1.6, meant where the hub's config.json names none."""

_HUB_ONEVISION = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"

_SIDES = range(384, 2304 + 1, 384)

SO400M = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    layer_norm_eps=1e-6,
    siglip=True,
)
"""google/siglip-so400m-patch14-384 as LLaVA reads it: without the last of its 27 blocks."""

_ONEVISION: dict[str, Any] = {
    "image_token_id": 151646,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
    "text_config": {"model_type": "qwen2"},
    "vision_config": {
        "model_type": "siglip_vision_model",
        **{name: value for name, value in vars(SO400M).items() if name != "siglip"},
    },
}
"""What transformers' LlavaOnevisionConfig means by the fields that a file leaves out."""

_MOST_TILES = 64
"""Of one picture: the releases have at most 36."""

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
"""The model types of the language models, alone or as `text_config`."""

_MISTRALS = ("mistral", "llava_mistral")
_QWENS = ("qwen2", "llava_qwen")

_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
"""Where transformers' MistralConfig has other defaults than LlamaConfig. The computation is
Llama's."""

_QWEN2 = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""The same of Qwen2Config. The computation is Llama's, with biases."""

_SIGLIP: dict[str, Any] = {"patch_size": 16, "layer_norm_eps": 1e-6}
"""Where transformers' SiglipVisionConfig has other defaults than CLIPVisionConfig."""

_WINDOW = 4096
"""Mistral's sliding window if a file does not name it; null is none."""


def read_config(folder: Path, vision_tower: Path | None = None) -> LlavaConfig:
    """The configuration of a checkpoint folder: config.json, and generation_config.json if there is
    one.

    vision_tower: a CLIP folder whose config.json describes the tower instead (original dialect).
    Raises FileNotFoundError, or ValueError naming the file and the field that is wrong or
    unsupported.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    generation = Path(folder) / "generation_config.json"
    reader = _Reader(path, raw)
    tower = None
    if vision_tower is not None:
        tower_path = Path(vision_tower) / "config.json"
        tower = _Reader(tower_path, read_json(tower_path))
        tower = tower.section("vision_config") or tower  # a whole CLIP, or its vision half alone
    return _parse(
        reader,
        _Reader(generation, read_json(generation) if os.path.lexists(generation) else {}),
        tower,
    )


def _parse(raw: "_Reader", generation: "_Reader", tower: "_Reader | None") -> LlavaConfig:
    aspect = raw.raw.get("image_aspect_ratio")
    if str(aspect).startswith("anyres_max") and "text_config" not in raw:
        raise ValueError(
            f"{raw.path}: image_aspect_ratio is {aspect!r:.80}, a LLaVA-OneVision in its authors' "
            f"layout, which is not read; use the hub's, such as {_HUB_ONEVISION}"
        )
    if raw.expect("model_type", LLAVAS, required=True) == "llava_onevision":
        raw = _onevision(raw)
    if "text_config" in raw:
        config = _hub(raw, _shared(raw, generation, tower))
    elif "mm_vision_tower" in raw or "mm_hidden_size" in raw:
        config = _original(raw, _shared(raw, generation, tower))
    else:
        raise ValueError(
            f"{raw.path}: neither a `text_config` (hub dialect) nor `mm_vision_tower` (original "
            f"dialect): not a LLaVA-1.5 config; {_USE_LLAVA}"
        )
    check_config(config, raw.path)
    return config


def _shared(raw: "_Reader", generation: "_Reader", tower: "_Reader | None") -> dict[str, Any]:
    """The fields that both dialects have, as far as they spell them alike."""
    text = raw.section("text_config") or raw
    vision = tower or raw.section("vision_config")
    ends = _QWEN2_END if text.raw.get("model_type") in _QWENS else _LLAMA_END
    sources = (generation, text, raw, ends)
    eos = next(ids for reader in sources if (ids := reader.token_ids("eos_token_id")))
    pad = generation.token_ids("pad_token_id") or raw.token_ids("pad_token_id") or eos
    tied = any(reader.value("tie_word_embeddings", bool, False) for reader in (raw, text))
    text_config = _text(text, tied)
    tower_name = str(raw.raw.get("mm_vision_tower")).lower()
    named = SO400M if tower_name.endswith("siglip-so400m-patch14-384") else None
    image = raw.value("image_token_id", int, LlavaConfig.image_token_id)
    return {
        "vision": (named or CLIP_LARGE_336) if vision is None else _vision(vision),
        "vision_stated": vision is not None or named is not None,
        "text": text_config,
        "eos_token_ids": eos,
        # Some configs name a pad token that their embedding table does not have; any id will do
        # after the end.
        "pad_token_id": pad[0] if pad[0] < text_config.vocab_size else eos[0],
        "image_token_id": raw.value("image_token_index", int, image),
    }


def _hub(raw: "_Reader", shared: dict[str, Any]) -> LlavaConfig:
    raw.expect("projector_hidden_act", ("gelu",))
    strategy = raw.expect("vision_feature_select_strategy", ("default", "full"))
    siglip, vip = shared["vision"].siglip, raw.raw["model_type"] == "vipllava"
    if siglip and strategy != "full":
        raise ValueError(
            f"{raw.path}: vision_feature_select_strategy is {strategy!r}, expected 'full' with a "
            "SigLIP tower: the others drop a class token, and it has none"
        )
    aspect = "squash" if siglip else LlavaConfig.image_aspect_ratio
    if vip:
        shared["template"] = "llava_v0"
    # an early revision of 1.6 calls itself llava
    if raw.raw["model_type"] == "llava_next" or (not siglip and "image_grid_pinpoints" in raw):
        shared["grid"], aspect = _grid(raw), "anyres"
        shared["template"] = _template(raw.raw["text_config"].get("model_type"))
        raw.expect("vision_feature_select_strategy", ("default",))
    if raw.raw["model_type"] == "llava_onevision":
        shared["grid"], aspect = _grid(raw), "anyres"
        shared["most_tiles"] = _most_tiles(raw)
        shared["template"] = "chatml_lines"
    return LlavaConfig(
        **shared,
        feature_layer=_layers(raw, vip),
        keep_class_token=strategy == "full" and not (siglip or vip),
        projector_norm_eps=raw.positive("projector_layernorm_eps", float, 1e-5) if vip else 0.0,
        image_aspect_ratio=aspect,
        projector_bias=raw.value("multimodal_projector_bias", bool, True),
    )


def _onevision(raw: "_Reader") -> "_Reader":
    """A config.json of LLaVA-OneVision with the fields that it leaves out."""
    whole = _ONEVISION | {key: value for key, value in raw.raw.items() if value is not None}
    for part in ("text_config", "vision_config"):
        if isinstance(whole[part], dict):
            whole[part] = {"model_type": _ONEVISION[part]["model_type"], **whole[part]}
            kind = whole[part]["model_type"]
            if kind != _ONEVISION[part]["model_type"]:
                raise ValueError(
                    f"{raw.path}: {part}.model_type is {kind!r:.80}, supported for LLaVA-OneVision:"
                    f" {_ONEVISION[part]['model_type']!r}"
                )
    return _Reader(raw.path, whole)


def _most_tiles(raw: "_Reader") -> int:
    """9 of anyres_max_9."""
    found = raw.value("vision_aspect_ratio", str, "")
    number = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", found)
    if number is None:
        raise ValueError(
            f"{raw.path}: vision_aspect_ratio is {found!r:.80}, expected anyres_max_ and a number, "
            "such as 'anyres_max_9'"
        )
    return int(number[1])


def _layers(raw: "_Reader", vip: bool) -> int | tuple[int, ...]:
    """The index of a hidden state, or a list of them, for which ViP-LLaVA's older key is the
    plural."""
    key = (
        "vision_feature_layers"
        if vip and "vision_feature_layers" in raw
        else "vision_feature_layer"
    )
    found = raw.raw[key] if key in raw else _VIP_LAYERS if vip else LlavaConfig.feature_layer
    several = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    if not several or not all(type(layer) is int and abs(layer) < 2**31 for layer in several):
        raise ValueError(
            f"{raw.path}: {key} is {found!r:.80}, expected a whole number, or a list of them"
        )
    return several[0] if len(several) == 1 else several


def _original(raw: "_Reader", shared: dict[str, Any]) -> LlavaConfig:
    siglip = shared["vision"].siglip
    if siglip and raw.raw["model_type"] not in _QWENS:
        raise ValueError(
            f"{raw.path}: the vision tower is a SigLIP, which is read beside a Qwen2 (llava_qwen) "
            f"alone; use a release such as {SMALL_RELEASE}"
        )
    # LLaVA takes an absent mm_use_im_patch_token as true. The token that it then adds is in no
    # prompt, so it matters only if others come after it.
    around = raw.value("mm_use_im_start_end", bool, False)
    patch = raw.value("mm_use_im_patch_token", bool, around)
    aspect = raw.expect("image_aspect_ratio", ("pad", "square", "anyres")) or "pad"
    layer = raw.value("mm_vision_select_layer", int, LlavaConfig.feature_layer)
    if siglip:
        # LLaVA reads the last of 26 blocks whatever the file says, and, though it says anyres, was
        # released to see one squeezed square a picture.
        layer = min(SO400M.num_hidden_layers, shared["vision"].num_hidden_layers)
        aspect = "pad" if aspect == "pad" else "squash"
    if aspect == "anyres":  # LLaVA-1.6
        raw.expect("mm_patch_merge_type", ("spatial_unpad",), required=True)
        # the original means (width, height)
        shared["grid"] = tuple((height, width) for width, height in _grid(raw))
        shared["template"] = _template(raw.raw["model_type"])
    kinds = ("patch",) if aspect == "anyres" or siglip else ("patch", "cls_patch")
    selected = raw.expect("mm_vision_select_feature", kinds)
    return LlavaConfig(
        **shared,
        feature_layer=layer,
        keep_class_token=selected == "cls_patch",
        projector_layers=_projector_layers(raw),
        image_aspect_ratio="crop" if aspect == "square" else aspect,
        vision_tower_name=raw.value("mm_vision_tower", str, None),
        added_tokens=(IM_PATCH,) * patch + (IM_START, IM_END) * around,
    )


def _template(kind: object) -> str:
    """LLaVA-1.6 was trained with the template of its language model."""
    return "mistral_instruct" if kind in _MISTRALS else ""


def _grid(raw: "_Reader") -> tuple[tuple[int, int], ...]:
    """The canvases that pictures are cut into tiles on, as pairs in the file's order; the original
    may write them as text."""
    found = raw.raw.get("image_grid_pinpoints")
    if found is None:
        return _GRID
    pairs = found
    if isinstance(found, str):
        with suppress(ValueError, RecursionError):
            pairs = json.loads(found.replace("(", "[").replace(")", "]"))
    fits = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(side) is int and 0 < side < 2**16 for side in pair)
        for pair in pairs
    )
    if not fits or not pairs:
        raise ValueError(
            f"{raw.path}: image_grid_pinpoints is {found!r:.80}, expected pairs such as [336, 672]"
        )
    return tuple((a, b) for a, b in pairs)


def is_language_model(folder: Path) -> bool:
    """Whether a folder is a Llama or a relative alone, and not a LLaVA."""
    raw = read_json(Path(folder) / "config.json")
    return raw.get("model_type") in LANGUAGE_MODELS and "mm_vision_tower" not in raw


def read_text_config(folder: Path) -> TextConfig:
    """The configuration of a Llama alone. Raises FileNotFoundError or ValueError as `read_config`
    does."""
    path = Path(folder) / "config.json"
    raw = _Reader(path, read_json(path))
    config = _text(raw, bool(raw.value("tie_word_embeddings", bool, False)))
    check_config(LlavaConfig(CLIP_LARGE_336, config), path)
    return config


def _text(raw: "_Reader", tied: bool) -> TextConfig:
    kind = raw.expect("model_type", (*LANGUAGE_MODELS, *LLAVAS))
    raw.expect("hidden_act", ("silu",))
    for flag in ("attention_bias", "mlp_bias"):
        if raw.value(flag, bool, False):
            raise ValueError(
                f"{raw.path}: {raw.prefix}{flag} is True, supported: False (Llama has no biases)"
            )
    defaults = _MISTRAL if kind in _MISTRALS else _QWEN2 if kind in _QWENS else {}
    known: dict[str, Any] = {name: n for name, n in defaults.items() if name not in raw.raw}
    rope = _rope(raw, int(known.pop("max_position_embeddings", TextConfig.max_position_embeddings)))
    if kind in _MISTRALS and raw.raw.get("sliding_window", _WINDOW) is not None:
        # Up to the window's length its mask hides nothing: longer prompts are refused, not masked.
        window = raw.positive("sliding_window", int, _WINDOW)
        rope["max_position_embeddings"] = min(rope["max_position_embeddings"], window)
    if kind in _QWENS and raw.value("use_sliding_window", bool, False):
        raise ValueError(
            f"{raw.path}: {raw.prefix}use_sliding_window is True, supported: False (attention to "
            "everything before, as every released LLaVA on Qwen2 has it)"
        )
    return raw.fill(TextConfig, tie_word_embeddings=tied, qkv_bias=kind in _QWENS, **rope, **known)


def _rope(raw: "_Reader", length: int) -> dict[str, float]:
    """The fields about positions. transformers 4 writes `rope_theta` and `rope_scaling`,
    transformers 5 one `rope_parameters`; when both are there, a `rope_scaling` that is not null
    wins, as in transformers 5. length: max_position_embeddings if the file has none."""
    rope = raw.section("rope_scaling" if raw.raw.get("rope_scaling") else "rope_parameters")
    theta = raw.positive("rope_theta", float, TextConfig.rope_theta)
    stated = raw.positive("max_position_embeddings", int, length)
    if rope is None:
        return {"rope_theta": theta, "max_position_embeddings": stated}
    kind = rope.expect("rope_type", ("default", "linear")) or rope.expect(
        "type", ("default", "linear")
    )
    theta = rope.positive("rope_theta", float, theta)
    if kind != "linear":
        return {"rope_theta": theta, "max_position_embeddings": stated}
    factor = rope.positive("factor", float)
    if not 1e-6 < factor < 1e6:
        raise ValueError(
            f"{raw.path}: {rope.prefix}factor is {factor}, expected a number such as 4.0"
        )
    # Before or after stretching? max_position_embeddings is the training's (LLaVA, FastChat, vLLM)
    # unless other fields say so: the training's own, or FastChat's, which is the whole length.
    trained: float | None = rope.value("original_max_position_embeddings", int, None)
    trained = trained or raw.value("original_max_position_embeddings", int, None)
    whole = raw.value("max_sequence_length", int, None)
    if trained is None:
        trained = stated if whole is None else int(max(whole, stated) / factor)
    return {"rope_theta": theta, "rope_factor": factor, "max_position_embeddings": trained}


def _vision(raw: "_Reader") -> VisionConfig:
    kind = raw.expect("model_type", ("clip_vision_model", "siglip_vision_model"))
    if kind != "siglip_vision_model":
        raw.expect("hidden_act", ("quick_gelu",))
        return raw.fill(VisionConfig, siglip=False)
    raw.expect("hidden_act", ("gelu_pytorch_tanh",))
    known = {name: n for name, n in _SIGLIP.items() if name not in raw}
    return raw.fill(VisionConfig, siglip=True, **known)


def _projector_layers(raw: "_Reader") -> int:
    # absent means linear (LLaVA, multimodal_projector/builder.py)
    kind = raw.value("mm_projector_type", str, "linear")
    if kind == "linear":
        return 1
    count = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{count}x_gelu" or not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"{raw.path}: mm_projector_type is {kind!r:.80}, expected 'linear' or e.g. 'mlp2x_gelu'"
        )
    return int(count)


def check_config(config: LlavaConfig, path: Path) -> None:
    """Check that the fields agree with one another. Raises ValueError with the numbers that
    disagree."""
    text, vision = config.text, config.vision
    problems = [
        (text.num_attention_heads % text.num_key_value_heads, "num_attention_heads", text.num_attention_heads,
         "a multiple of num_key_value_heads", text.num_key_value_heads),
        (text.head_dim % 2, "head_dim", text.head_dim, "even for rotary embedding, a multiple of", 2),
        (not 0 < text.context < 2**31, "the context, rope_factor times max_position_embeddings,", text.context,
         "above zero and below", 2**31),
        (vision.hidden_size % vision.num_attention_heads, "vision hidden_size", vision.hidden_size,
         "a multiple of its num_attention_heads", vision.num_attention_heads),
        (vision.image_size < vision.patch_size, "image_size", vision.image_size,
         "at least patch_size", vision.patch_size),
        (not all(0 <= at <= vision.num_hidden_layers for at in config.feature_depths), "vision feature layer", config.feature_layer,
         "an index into the hidden states of this many layers:", vision.num_hidden_layers),
    ]  # fmt: skip
    side = vision.image_size
    problems += [
        (tall % side or wide % side or tall // side * (wide // side) > _MOST_TILES,
         f"a pair of image_grid_pinpoints ({tall} times {wide})", tall * wide,
         f"at most {_MOST_TILES} squares of side", side)
        for tall, wide in config.grid
    ]  # fmt: skip
    for wrong, name, found, relation, other in problems:
        if wrong:
            raise ValueError(f"{path}: {name} is {found}, expected {relation} {other}")


class _Reader:
    """A JSON object that knows its file, so that a wrong value is reported by file, field and
    value."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str = ""):
        self.path, self.raw, self.prefix = path, raw, prefix

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def value(self, key: str, kind: type[T], default: D) -> T | D:
        """The value under `key`, or `default` when it is absent or null; Raises ValueError if it
        has another type."""
        found = self.raw.get(key)
        if found is None:
            return default
        if kind is float and type(found) is int and abs(found) < 2**63:
            found = float(found)
        if (type(found) is int and abs(found) >= 2**63) or type(found) is not kind:
            raise ValueError(
                f"{self.path}: {self.prefix}{key} is {found!r:.80}, expected {_EXPECTED[kind]}"
            )
        return found

    def positive(self, key: str, kind: type[float], default: float | None = None) -> float:
        """A finite number above zero under `key`; required when there is no default."""
        number = self.value(key, kind, default)
        if number is None or not 0 < number < (math.inf if kind is float else 2**31):
            raise ValueError(
                f"{self.path}: {self.prefix}{key} is {number}, expected a number above zero"
            )
        return number

    def expect(self, key: str, allowed: tuple[str, ...], required: bool = False) -> str | None:
        """The value under `key` if it is one that minillava computes; None when absent and not
        required."""
        found = self.value(key, str, None)
        if found not in allowed and (found is not None or required):
            known = f"supported: {', '.join(allowed)}"
            raise ValueError(
                f"{self.path}: {self.prefix}{key} is {found!r:.80}, {known}; {_USE_LLAVA}"
            )
        return found

    def section(self, key: str) -> "_Reader | None":
        found = self.value(key, dict, None)
        return None if found is None else _Reader(self.path, found, f"{self.prefix}{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids, as a tuple; empty when absent."""
        found = self.raw.get(key)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int for i in ids):
            raise ValueError(
                f"{self.path}: {self.prefix}{key} is {found!r:.80}, expected a token id or a list "
                "of them"
            )
        return tuple(i for i in ids if i >= 0)

    def fill(self, cls: type[Config], **known: Any) -> Config:
        """An instance of a dataclass from the fields of the same name; numbers must be above
        zero."""
        for field in fields(cls):
            if field.name in known or field.name not in self:
                continue
            known[field.name] = self.positive(field.name, float if field.type is float else int)
        return cls(**known)


# the end tokens of a config that names none
_LLAMA_END = _Reader(Path(), {"eos_token_id": 2})
_QWEN2_END = _Reader(Path(), {"eos_token_id": [151645, 151643]})

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
}
