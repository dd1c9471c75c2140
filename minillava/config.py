"""The numbers of a LLaVA model, read from config.json in either of its two dialects.

The hub dialect (llava-hf) nests `text_config` and `vision_config`; the original dialect (liuhaotian)
is one flat Llama config with `mm_*` fields. Both leave most numbers out and rely on the defaults of
the classes that wrote them, so those defaults live here, once.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from minillava.disk import refused

IMAGE_TOKEN_INDEX = -200
"""The id that stands for one picture in `input_ids`. Negative, so that it can never be a word: the
splice replaces it with the picture's patches before anything looks it up (LLaVA, constants.py)."""

IGNORE_INDEX = -100
"""The label of a position that the loss leaves out."""


@dataclass(frozen=True)
class VisionConfig:
    """The CLIP vision tower. The defaults are those of transformers' CLIPVisionConfig (ViT-B/32),
    which is what a config.json means by the fields it leaves out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        """Patches per picture: (336 / 14)² = 24 × 24 = 576 for LLaVA-1.5."""
        return (self.image_size // self.patch_size) ** 2


CLIP_LARGE_336 = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
"""The tower of every LLaVA-1.5, meant when `vision_config` is absent."""

CLIP_RELEASE = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class TextConfig:
    """The Llama language model. The defaults are those of transformers' LlamaConfig."""

    vocab_size: int = 32000  # 32064 on the hub: <image>, <pad>, and unused rows up to a multiple of 64
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # "linear" rope scaling: positions are divided by it
    tie_word_embeddings: bool = False  # True: the head is the embedding table

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def context(self) -> int:
        """Positions that prompt and answer may take: as many as divide to positions of the training."""
        return int(self.max_position_embeddings * self.rope_factor)


@dataclass(frozen=True)
class LlavaConfig:
    """Everything that decides the network's shape and what its token ids mean."""

    vision: VisionConfig
    text: TextConfig
    feature_layer: int = -2  # index into the tower's hidden states: -2 is the output of the last block but one
    keep_class_token: bool = False
    projector_layers: int = 2  # 1: `linear`; N: `mlpNx_gelu`
    projector_bias: bool = True
    image_token_id: int = 32000  # the hub dialect's id for <image>; ours is IMAGE_TOKEN_INDEX
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 2
    image_aspect_ratio: str = "pad"
    vision_tower_name: str | None = None  # where the original dialect says its tower comes from
    added_tokens: tuple[str, ...] = ()  # tokens after the tokenizer's own: IM_PATCH, or IM_START and IM_END
    vision_stated: bool = True  # False: nothing describes the tower but its tensors (checkpoint.py), or it is CLIP's

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + self.keep_class_token

    @property
    def vision_layers_needed(self) -> int:
        """How many blocks of the tower the selected features need: 23 of 24 for LLaVA-1.5, whose layer
        is -2. The last block was trained for the class token, which CLIP compares with a caption; what
        it makes of the patches nobody looked at. Nothing reads its output here, so it is not built."""
        depth = self.vision.num_hidden_layers
        return self.feature_layer if self.feature_layer >= 0 else depth + 1 + self.feature_layer


# What early LLaVA put around each picture, and a token that it added and no prompt contains (LLaVA, constants.py).
IM_START, IM_END, IM_PATCH = "<im_start>", "<im_end>", "<im_patch>"

RELEASE = "llava-hf/llava-1.5-7b-hf"
"""The checkpoint that messages recommend, by its name on the Hugging Face hub."""

DOWNLOAD = f"hf download {RELEASE} --local-dir weights/{RELEASE.split('/')[1]}"

_USE_LLAVA = f"use a LLaVA-1.5 checkpoint such as {RELEASE}"


def one_line(error: Exception) -> str:
    """An error's message without line breaks or anything else that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def read_json(path: Path) -> dict:
    """One JSON object from a file. Raises FileNotFoundError, OSError for what the system refuses, or ValueError when it
    is not an object."""
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for somebody to write to it
        raise ValueError(f"{path}: is a folder, pipe or device, expected a file; download it again")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; check that this is the folder of a LLaVA checkpoint") from None
    except OSError as error:
        raise refused(path, error) from None
    except (ValueError, RecursionError) as error:
        # Not only bad JSON: also bad UTF-8, a number of thousands of digits, endless nesting.
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object; download the file again")
    return content


def read_config(folder: Path, vision_tower: Path | None = None) -> LlavaConfig:
    """The configuration of a checkpoint folder: config.json, and generation_config.json if there is one.

    vision_tower: a CLIP folder whose config.json describes the tower instead (original dialect).
    Raises FileNotFoundError, or ValueError naming the file and the field that is wrong or unsupported.
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
    return _parse(reader, _Reader(generation, read_json(generation) if os.path.lexists(generation) else {}), tower)


def _parse(raw: "_Reader", generation: "_Reader", tower: "_Reader | None") -> LlavaConfig:
    raw.expect("model_type", ("llava", "llava_llama"), required=True)
    text, vision = raw.section("text_config"), raw.section("vision_config")
    hub = text is not None
    if not hub and "mm_vision_tower" not in raw and "mm_hidden_size" not in raw:
        raise ValueError(
            f"{raw.path}: neither a `text_config` (hub dialect) nor `mm_vision_tower` (original dialect): "
            f"not a LLaVA-1.5 config; {_USE_LLAVA}"
        )
    text = text if hub else raw
    vision = tower if tower is not None else vision
    eos = next(ids for r in (generation, text, raw, _LLAMA_END) if (ids := r.token_ids("eos_token_id")))
    pad = generation.token_ids("pad_token_id") or raw.token_ids("pad_token_id") or eos
    tied = bool(raw.value("tie_word_embeddings", bool, False) or text.value("tie_word_embeddings", bool, False))
    text_config = _text(text, tied)
    shared = {
        "vision": CLIP_LARGE_336 if vision is None else _vision(vision),
        "vision_stated": vision is not None,
        "text": text_config,
        "eos_token_ids": eos,
        # Some configs name a pad token that their embedding table does not have; any id will do after the end.
        "pad_token_id": pad[0] if pad[0] < text_config.vocab_size else eos[0],
        "image_token_id": raw.value(
            "image_token_index", int, raw.value("image_token_id", int, LlavaConfig.image_token_id)
        ),
    }
    if hub:
        raw.expect("projector_hidden_act", ("gelu",))
        strategy = raw.expect("vision_feature_select_strategy", ("default", "full"))
        config = LlavaConfig(
            **shared,
            feature_layer=raw.value("vision_feature_layer", int, LlavaConfig.feature_layer),
            keep_class_token=strategy == "full",
            projector_bias=raw.value("multimodal_projector_bias", bool, True),
        )
    else:
        # LLaVA takes an absent mm_use_im_patch_token for true. The token it then adds is in no prompt: it matters only
        # where others come after it.
        around = raw.value("mm_use_im_start_end", bool, False)
        added = (IM_PATCH,) * raw.value("mm_use_im_patch_token", bool, around) + (IM_START, IM_END) * around
        aspect = raw.expect("image_aspect_ratio", ("pad", "square"))  # `anyres` is LLaVA-1.6
        config = LlavaConfig(
            **shared,
            feature_layer=raw.value("mm_vision_select_layer", int, LlavaConfig.feature_layer),
            keep_class_token=raw.expect("mm_vision_select_feature", ("patch", "cls_patch")) == "cls_patch",
            projector_layers=_projector_layers(raw),
            image_aspect_ratio="crop" if aspect == "square" else "pad",
            vision_tower_name=raw.value("mm_vision_tower", str, None),
            added_tokens=added,
        )
    check_config(config, raw.path)
    return config


def _text(raw: "_Reader", tied: bool) -> TextConfig:
    raw.expect("model_type", ("llama", "llava", "llava_llama"))
    raw.expect("hidden_act", ("silu",))
    for flag in ("attention_bias", "mlp_bias"):
        if raw.value(flag, bool, False):
            raise ValueError(f"{raw.path}: {raw.prefix}{flag} is True, supported: False (Llama has no biases)")
    return raw.fill(TextConfig, tie_word_embeddings=tied, **_rope(raw))


def _rope(raw: "_Reader") -> dict[str, float]:
    """The fields about positions. transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one
    `rope_parameters`; when both are there a non-null `rope_scaling` wins, as in transformers 5."""
    rope = raw.section("rope_scaling" if raw.raw.get("rope_scaling") else "rope_parameters")
    theta = raw.positive("rope_theta", float, TextConfig.rope_theta)
    stated = raw.positive("max_position_embeddings", int, TextConfig.max_position_embeddings)
    if rope is None:
        return {"rope_theta": theta, "max_position_embeddings": stated}
    kind = rope.expect("rope_type", ("default", "linear")) or rope.expect("type", ("default", "linear"))
    theta = rope.positive("rope_theta", float, theta)
    if kind != "linear":
        return {"rope_theta": theta, "max_position_embeddings": stated}
    factor = rope.positive("factor", float)
    if not 1e-6 < factor < 1e6:
        raise ValueError(f"{raw.path}: {rope.prefix}factor is {factor}, expected a number such as 4.0")
    # Before or after stretching? max_position_embeddings is the training's (LLaVA, FastChat, vLLM) unless other fields
    # say so: the training's own, or FastChat's, which is the whole length.
    trained = rope.value("original_max_position_embeddings", int, None)
    trained = trained or raw.value("original_max_position_embeddings", int, None)
    whole = raw.value("max_sequence_length", int, None)
    if trained is None:
        trained = stated if whole is None else int(max(whole, stated) / factor)
    return {"rope_theta": theta, "rope_factor": factor, "max_position_embeddings": trained}


def _vision(raw: "_Reader") -> VisionConfig:
    raw.expect("model_type", ("clip_vision_model",))
    raw.expect("hidden_act", ("quick_gelu",))
    return raw.fill(VisionConfig)


def _projector_layers(raw: "_Reader") -> int:
    kind = raw.value("mm_projector_type", str, "linear")  # absent means linear (LLaVA, multimodal_projector/builder.py)
    if kind == "linear":
        return 1
    count = kind.removeprefix("mlp").removesuffix("x_gelu")
    if kind != f"mlp{count}x_gelu" or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"{raw.path}: mm_projector_type is {kind!r:.80}, expected 'linear' or e.g. 'mlp2x_gelu'")
    return int(count)


def check_config(config: LlavaConfig, path: Path) -> None:
    """What the fields must say together. Raises ValueError with the numbers that disagree."""
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
        (not 0 <= config.vision_layers_needed <= vision.num_hidden_layers, "vision feature layer", config.feature_layer,
         "an index into the hidden states of this many layers:", vision.num_hidden_layers),
    ]  # fmt: skip
    for wrong, name, found, relation, other in problems:
        if wrong:
            raise ValueError(f"{path}: {name} is {found}, expected {relation} {other}")


class _Reader:
    """A JSON object that knows its file, so that a wrong value is reported by file, field and value."""

    def __init__(self, path: Path, raw: dict, prefix: str = ""):
        self.path, self.raw, self.prefix = path, raw, prefix

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def value(self, key: str, kind: type, default):
        """The value under `key`, or `default` when it is absent or null; ValueError when of another type."""
        found = self.raw.get(key)
        if found is None:
            return default
        if kind is float and type(found) is int and abs(found) < 2**63:
            found = float(found)
        if type(found) is not kind or (kind is int and abs(found) >= 2**63):
            raise ValueError(f"{self.path}: {self.prefix}{key} is {found!r:.80}, expected {_EXPECTED[kind]}")
        return found

    def positive(self, key: str, kind: type, default: float | None = None) -> float:
        """A finite number above zero under `key`; required when there is no default."""
        number = self.value(key, kind, default)
        if number is None or not 0 < number < (math.inf if kind is float else 2**31):
            raise ValueError(f"{self.path}: {self.prefix}{key} is {number}, expected a number above zero")
        return number

    def expect(self, key: str, allowed: tuple[str, ...], required: bool = False) -> str | None:
        """The value under `key` if it is one that minillava computes; None when absent and not required."""
        found = self.value(key, str, None)
        if found not in allowed and (found is not None or required):
            known = f"supported: {', '.join(allowed)}"
            raise ValueError(f"{self.path}: {self.prefix}{key} is {found!r:.80}, {known}; {_USE_LLAVA}")
        return found

    def section(self, key: str) -> "_Reader | None":
        found = self.value(key, dict, None)
        return None if found is None else _Reader(self.path, found, f"{self.prefix}{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids, as a tuple; empty when absent."""
        found = self.raw.get(key)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int for i in ids):
            raise ValueError(f"{self.path}: {self.prefix}{key} is {found!r:.80}, expected a token id or a list of them")
        return tuple(i for i in ids if i >= 0)

    def fill(self, cls: type, **known):
        """An instance of a dataclass from the fields of the same name; numbers must be above zero."""
        for field in fields(cls):
            if field.name in known or field.name not in self:
                continue
            known[field.name] = self.positive(field.name, float if field.type is float else int)
        return cls(**known)


_LLAMA_END = _Reader(Path(), {"eos_token_id": 2})  # what a config means that names no end token
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}
