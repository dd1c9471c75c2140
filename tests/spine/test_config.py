"""config.json in both dialects: what is read, what is filled in, and what is refused by file and
field."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import minillava
from minillava.checkpoint.config_json import read_config
from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig, VisionConfig
from minillava.files.disk import read_json
from minillava.llava import Llava

# llava-hf/llava-1.5-7b-hf, config.json as it is on the hub.
HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
# llava-hf/llava-1.5-13b-hf: the same file with these in its text_config.
HUB_13B_TEXT = {
    "_name_or_path": "lmsys/vicuna-13b-v1.5",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
# liuhaotian/llava-v1.5-7b, config.json as LLaVA's own code prints it.
ORIGINAL_7B = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": 32000,
}
CLIP_LARGE = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    num_channels=3,
    layer_norm_eps=1e-5,
)
LLAMA_7B = TextConfig(
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_factor=1.0,
    tie_word_embeddings=False,
)
ABSENT = object()
HUB, ORIGINAL = "hub", "original"
MINIMAL = {
    HUB: {"model_type": "llava", "text_config": {}},
    ORIGINAL: {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
}
FULL = {HUB: HUB_7B, ORIGINAL: ORIGINAL_7B}


def changed(config: dict, changes: dict) -> dict:
    """A copy of a config.json with fields set by dotted name; ABSENT removes."""
    config = json.loads(json.dumps(config))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        if value is ABSENT:
            inner.pop(key, None)
        else:
            inner[key] = value
    return config


@pytest.fixture
def read(tmp_path):
    """`read(config, generation=None, clip=None)`: the three as files, read by read_config."""

    def write_and_read(
        config: dict, generation: dict | None = None, clip: dict | None = None
    ) -> LlavaConfig:
        (tmp_path / "clip").mkdir(exist_ok=True)
        for name, content in (
            ("config.json", config),
            ("generation_config.json", generation),
            ("clip/config.json", clip),
        ):
            if content is not None:
                (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return read_config(tmp_path, None if clip is None else tmp_path / "clip")

    return write_and_read


def count_parameters(config: LlavaConfig) -> int:
    """Of the whole checkpoint: what is built, and the parts of the tower that LLaVA-1.5 does not
    need."""
    with torch.device("meta"):
        model = Llava(config)
    width, inner = config.vision.hidden_size, config.vision.intermediate_size
    block = 4 * (width * width + width) + (2 * width * inner + inner + width) + 4 * width
    unneeded = config.vision.num_hidden_layers - config.vision_layers_needed
    return sum(p.numel() for p in model.parameters()) + unneeded * block + 2 * width


# --- the published files --------------------------------------------------------------------------


def test_the_hubs_7b(read):
    """A number of LLaVA-1.5 7B read wrongly from the hub's config.json would build another
    network."""
    config = read(HUB_7B)
    assert config == LlavaConfig(
        vision=CLIP_LARGE,
        text=LLAMA_7B,
        feature_layer=-2,
        keep_class_token=False,
        projector_layers=2,
        projector_bias=True,
        image_token_id=32000,
        eos_token_ids=(2,),
        pad_token_id=32001,
        image_aspect_ratio="pad",
        vision_tower_name=None,
    )
    assert (config.tokens_per_image, config.vision_layers_needed) == (576, 23)
    assert count_parameters(config) == 7_063_427_072  # as the hub shows it


def test_the_hubs_13b(read):
    """A number that 7B and 13B do not share would be taken from the defaults, which are 7B's."""
    config = read(
        changed(HUB_7B, {f"text_config.{key}": value for key, value in HUB_13B_TEXT.items()})
    )
    text = config.text
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (5120, 13824, 40)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (40, 40, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.rms_norm_eps) == (32064, 4096, 1e-5)
    assert config.vision == CLIP_LARGE
    tower = 303_507_456
    projector = 1024 * 5120 + 5120 + 5120 * 5120 + 5120
    llama = 2 * 32064 * 5120 + 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    assert count_parameters(config) == tower + projector + llama


def test_the_originals_7b(read):
    """The original release, whose fields have other names, would be read with the defaults in their
    place."""
    config = read(ORIGINAL_7B)
    assert config.vision == CLIP_LARGE
    assert config.text == TextConfig(**{**vars(LLAMA_7B), "vocab_size": 32000})
    assert (config.feature_layer, config.keep_class_token) == (-2, False)
    assert (config.projector_layers, config.projector_bias) == (2, True)
    assert (config.eos_token_ids, config.pad_token_id) == ((2,), 0)
    assert config.image_aspect_ratio == "pad"
    assert config.vision_tower_name == "openai/clip-vit-large-patch14-336"
    assert (config.tokens_per_image, config.vision_layers_needed) == (576, 23)


# --- what a config.json leaves out ----------------------------------------------------------------


@pytest.mark.parametrize("dialect", [HUB, ORIGINAL])
def test_an_almost_empty_config_means_the_defaults_of_llama(read, dialect):
    """Config files leave out what is a default: another default here would change the model without
    an error."""
    config = read(MINIMAL[dialect])
    assert config.text == TextConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_factor=1.0,
        tie_word_embeddings=False,
    )
    assert config.vision == CLIP_LARGE  # an absent vision_config means CLIP-L/336
    assert (config.feature_layer, config.keep_class_token, config.projector_bias) == (
        -2,
        False,
        True,
    )
    assert (config.image_token_id, config.eos_token_ids, config.pad_token_id) == (32000, (2,), 2)


@pytest.mark.parametrize("given", [{}, {"hidden_size": 1024, "num_hidden_layers": 24}])
def test_a_partial_vision_config_means_the_defaults_of_clip_base(read, given):
    """Fields left out of a vision_config would be filled from CLIP-L, while transformers fills them
    from CLIP-B."""
    base = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
    }
    given = {**given, "num_attention_heads": 16} if given else {}
    assert read(changed(HUB_7B, {"vision_config": given})).vision == VisionConfig(
        **{**base, **given}
    )


def test_null_means_absent(read):
    """A field that is null would end in a traceback instead of meaning its default."""
    config = read(
        changed(
            HUB_7B,
            {"vision_config": None, "text_config.num_key_value_heads": None, "pad_token_id": None},
        )
    )
    assert (config.vision, config.text.num_key_value_heads, config.pad_token_id) == (
        CLIP_LARGE_336,
        32,
        2,
    )


def test_head_numbers_follow_from_each_other(read):
    """A config without head_dim or key and value heads would get 7B's numbers, whatever its own
    width."""
    text = read(changed(HUB_7B, {"text_config.num_attention_heads": 16})).text
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (16, 16, 256)
    grouped = read(
        changed(HUB_7B, {"text_config.num_key_value_heads": 8, "text_config.head_dim": 64})
    ).text
    assert (grouped.num_attention_heads, grouped.num_key_value_heads, grouped.head_dim) == (
        32,
        8,
        64,
    )


@pytest.mark.parametrize("dialect", [HUB, ORIGINAL])
@pytest.mark.parametrize(
    ("fields", "theta", "factor"),
    [
        ({}, 10000.0, 1.0),
        ({"rope_theta": 500000}, 500000.0, 1.0),  # a whole number is a number
        ({"rope_scaling": None, "rope_theta": 5e5}, 5e5, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 10000.0, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 5e5}, 5e5, 2.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, 1.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, 1.0),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}}, 5e5, 8.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, 1.0),
        # both ways of writing at once: a rope_scaling replaces the whole of rope_parameters, a null
        # one does not
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 8.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
         10000.0, 2.0),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
         5e5, 2.0),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": None, "rope_theta": 5e5}, 1e6, 1.0),
    ],
)  # fmt: skip
def test_rotary_embedding_in_the_words_of_transformers_4_and_5(
    read, dialect, fields, theta, factor
):
    """With the rotary numbers read from the wrong place a model answers well in short prompts and
    worse in long ones."""
    prefix = "text_config." if dialect == HUB else ""
    text = read(changed(FULL[dialect], {prefix + key: value for key, value in fields.items()})).text
    assert (text.rope_theta, text.rope_factor) == (theta, factor)


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        (False, False, False),
        (True, ABSENT, True),
        (ABSENT, True, True),
        (False, True, True),
        (ABSENT, ABSENT, False),
    ],
)
def test_the_head_is_tied_when_either_place_says_so(read, top, text, tied):
    """A tied model would be refused for a head that it does not store."""
    config = read(
        changed(HUB_7B, {"tie_word_embeddings": top, "text_config.tie_word_embeddings": text})
    )
    assert config.text.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("changes", "generation", "ids"),
    [
        ({}, None, (2,)),
        ({}, {}, (2,)),
        ({}, {"eos_token_id": None}, (2,)),
        ({"text_config.eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": 8}, None, (8,)),
        ({"eos_token_id": 8, "text_config.eos_token_id": [7, 9]}, None, (7, 9)),
        ({"eos_token_id": 8, "text_config.eos_token_id": 7}, {"eos_token_id": 5}, (5,)),
        ({"text_config.eos_token_id": 7}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"text_config.eos_token_id": -1}, None, (2,)),  # how Llama's first release said "none"
    ],
)
def test_end_tokens(read, changes, generation, ids):
    """With the wrong end token an answer never stops, or stops in its middle."""
    assert read(changed(HUB_7B, changes), generation).eos_token_ids == ids


@pytest.mark.parametrize(
    ("changes", "generation", "pad"),
    [
        ({}, None, 32001),
        ({}, {"pad_token_id": 0}, 0),
        ({"pad_token_id": ABSENT}, None, 2),  # the end token
        ({"pad_token_id": -1}, {"eos_token_id": [5, 6]}, 5),
    ],
)
def test_pad_token(read, changes, generation, pad):
    """Padding with the wrong id, or with -1, would fail in the embedding table."""
    assert read(changed(HUB_7B, changes), generation).pad_token_id == pad


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_token_index": 7}, 7),
        ({"image_token_index": ABSENT, "image_token_id": 8}, 8),  # transformers 5
        ({"image_token_index": ABSENT}, 32000),
    ],
)
def test_the_hubs_image_token(read, changes, expected):
    """A checkpoint of transformers 5, which renamed the field, would get the default in its
    place."""
    assert read(changed(HUB_7B, changes)).image_token_id == expected


@pytest.mark.parametrize(
    ("kind", "layers"),
    [(ABSENT, 1), ("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)],
)
def test_the_originals_projectors(read, kind, layers):
    """A projector would be built with a layer too many or too few."""
    assert read(changed(ORIGINAL_7B, {"mm_projector_type": kind})).projector_layers == layers


@pytest.mark.parametrize(
    ("dialect", "changes", "tokens"),
    [
        (HUB, {"vision_feature_select_strategy": "default"}, 576),
        (HUB, {"vision_feature_select_strategy": "full"}, 577),
        (HUB, {"vision_feature_select_strategy": ABSENT}, 576),
        (ORIGINAL, {"mm_vision_select_feature": "patch"}, 576),
        (ORIGINAL, {"mm_vision_select_feature": "cls_patch"}, 577),
        (ORIGINAL, {"mm_vision_select_feature": ABSENT}, 576),
    ],
)
def test_the_class_token_is_kept_on_request(read, dialect, changes, tokens):
    """A model trained with the class token would lose it, or one trained without would get it."""
    config = read(changed(FULL[dialect], changes))
    assert (config.tokens_per_image, config.keep_class_token) == (tokens, tokens == 577)


@pytest.mark.parametrize(
    ("dialect", "key"), [(HUB, "vision_feature_layer"), (ORIGINAL, "mm_vision_select_layer")]
)
@pytest.mark.parametrize(
    ("layer", "needed"),
    [(-1, 24), (-2, 23), (-24, 1), (-25, 0), (0, 0), (1, 1), (23, 23), (24, 24), (ABSENT, 23)],
)
def test_how_many_blocks_the_feature_layer_needs(read, dialect, key, layer, needed):
    """Counting from the wrong end, or off by one, gives features of another layer, and answers stay
    fluent."""
    assert read(changed(FULL[dialect], {key: layer})).vision_layers_needed == needed


@pytest.mark.parametrize(("given", "ours"), [("pad", "pad"), ("square", "crop"), (ABSENT, "pad")])
def test_the_originals_image_aspect_ratio(read, given, ours):
    """The original's word for cropping would be unknown, or be taken for padding."""
    assert read(changed(ORIGINAL_7B, {"image_aspect_ratio": given})).image_aspect_ratio == ours


def test_the_projector_can_go_without_bias(read):
    """A projector without bias would be refused for lacking it."""
    assert read(changed(HUB_7B, {"multimodal_projector_bias": False})).projector_bias is False


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_the_original_dialect_is_known_by_its_fields_not_by_its_model_type(read, model_type):
    """Both dialects may say llava: an original would be read as the hub's."""
    assert read(changed(ORIGINAL_7B, {"model_type": model_type})).text.vocab_size == 32000


@pytest.mark.parametrize(
    "clip",
    [
        {
            "model_type": "clip",
            "text_config": {"hidden_size": 16},
            "vision_config": {"hidden_size": 24},
        },
        {"model_type": "clip_vision_model", "hidden_size": 24},
    ],
    ids=["a whole CLIP", "its vision half"],
)
@pytest.mark.parametrize("dialect", [HUB, ORIGINAL])
def test_a_clip_folder_describes_the_tower(read, dialect, clip):
    """The tower of a CLIP folder would be built with the numbers of CLIP-L, or of CLIP's text
    half."""
    assert read(FULL[dialect], clip=clip).vision == VisionConfig(hidden_size=24)


# --- what is refused ------------------------------------------------------------------------------

NOT_NUMBERS = ("12", [12], {}, True)
COUNTS = [*NOT_NUMBERS, 1.5, 0, -4]
SIZES = [*NOT_NUMBERS, 0, -1e-5, float("nan"), float("inf")]
TEXT_COUNTS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
]
VISION_COUNTS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "num_channels",
]
REFUSED = [
    *((HUB, f"text_config.{key}", value) for key in TEXT_COUNTS for value in COUNTS),
    *((ORIGINAL, key, value) for key in TEXT_COUNTS for value in COUNTS),
    *((HUB, f"vision_config.{key}", value) for key in VISION_COUNTS for value in COUNTS),
    *((HUB, f"text_config.{key}", value) for key in ("rms_norm_eps", "rope_theta") for value in SIZES),
    *((ORIGINAL, key, value) for key in ("rms_norm_eps", "rope_theta") for value in SIZES),
    *((HUB, "vision_config.layer_norm_eps", value) for value in SIZES),
    *((HUB, "model_type", value) for value in ("llama", "llava_next_video", "mllama", "clip", 3, None, ["llava"])),
    *((HUB, "text_config", value) for value in ("llama", [], 1, True)),
    *((HUB, "vision_config", value) for value in ("clip", [], 1, True)),
    *((HUB, "text_config.model_type", value) for value in ("gemma", "qwen3", "gpt_neox", 1)),
    *((HUB, "text_config.hidden_act", value) for value in ("gelu", "relu", 1)),
    *((HUB, f"text_config.{key}", value) for key in ("attention_bias", "mlp_bias") for value in (True, "no", 0)),
    *((HUB, key, value) for key in ("tie_word_embeddings", "text_config.tie_word_embeddings") for value in ("no", 0)),
    *((HUB, "text_config.rope_scaling", value) for value in ("linear", [2.0], 2.0)),
    *((HUB, f"text_config.rope_scaling.{key}", value)
      for key in ("type", "rope_type") for value in ("dynamic", "yarn", "longrope", "llama3", 1)),
    *((HUB, f"text_config.rope_parameters.{key}", value)
      for key, values in {"rope_type": ("yarn", 1), "rope_theta": SIZES}.items() for value in values),
    *((HUB, key, value) for key in ("eos_token_id", "text_config.eos_token_id", "pad_token_id")
      for value in ("2", 2.5, True, {}, [2, "3"])),
    *((HUB, key, value) for key in ("image_token_index", "image_token_id") for value in NOT_NUMBERS),
    *((HUB, "projector_hidden_act", value) for value in ("relu", "gelu_new", 1)),
    (HUB, "multimodal_projector_bias", "yes"),
    *((HUB, "vision_feature_layer", value) for value in ([-2, "-5"], "-2", -2.0, True)),
    *((HUB, "vision_feature_select_strategy", value) for value in ("cls", "patch", 1)),
    *((HUB, "vision_config.model_type", value) for value in ("dinov2", "clip", 1)),
    *((HUB, "vision_config.hidden_act", value) for value in ("gelu", "relu", 1)),
    *((ORIGINAL, "mm_projector_type", value)
      for value in ("identity", "mlp", "mlpx_gelu", "mlp0x_gelu", "mlp-1x_gelu", "mlp2x_relu", "2x_gelu", 2)),
    (ORIGINAL, "mm_use_im_start_end", "yes"),
    (ORIGINAL, "mm_use_im_patch_token", 1),
    *((ORIGINAL, "mm_vision_select_feature", value) for value in ("cls", "default", 1)),
    *((ORIGINAL, "mm_vision_select_layer", value) for value in ("-2", [-2], 1.5)),
    *((ORIGINAL, "image_aspect_ratio", value) for value in ("anyres_max_9", "highres", 1)),
    *((HUB, "image_grid_pinpoints", value) for value in ("all", [], [336, 672], [[336, 672.0]], 1, "{[]: 1}")),
    *((ORIGINAL, "mm_vision_tower", value) for value in (5, ["openai/clip-vit-large-patch14-336"])),
]  # fmt: skip


def ways_to_show(value) -> set[str]:
    """How a message may show a value: as Python does, a flag as JSON does, a whole number also as
    12.0."""
    return {repr(value)} | (
        {"true"} if value is True else {f"{value}.0"} if type(value) is int else set()
    )


@pytest.mark.parametrize(("dialect", "field", "value"), REFUSED, ids=lambda part: str(part))
def test_an_unsupported_or_ill_typed_field_is_named(read, tmp_path, dialect, field, value):
    """A setting that we do not support would be ignored, or a wrong type end in a traceback that
    names no field."""
    with pytest.raises(ValueError) as caught:
        read(changed(FULL[dialect], {field: value}))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: {field} is "), message
    assert any(way in message.split(" is ", 1)[1] for way in ways_to_show(value)), message
    assert "\n" not in message


def test_every_number_of_the_dataclasses_is_in_the_table_above():
    """A number added to the config would go without any test of its refusals."""
    assert {f.name for f in fields(TextConfig)} == {
        *TEXT_COUNTS, "rms_norm_eps", "rope_theta", "rope_factor", "tie_word_embeddings",
        "qkv_bias",
    }  # fmt: skip
    assert {f.name for f in fields(VisionConfig)} == {
        *VISION_COUNTS,
        "layer_norm_eps",
        "siglip",
    }


LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize("dialect", [HUB, ORIGINAL])
@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"rope_scaling": LINEAR}, 4 * 2048),  # the default of LlamaConfig, stretched
        ({"rope_scaling": LINEAR, "max_position_embeddings": 4096}, 16384),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "max_position_embeddings": 4096}, 10240),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}, 16384),
        ({"rope_scaling": {}, "rope_parameters": LINEAR, "max_position_embeddings": 4096}, 16384),
        ({"rope_scaling": {"type": "default", "factor": 4.0}, "max_position_embeddings": 4096}, 4096),
        # FastChat's 16k models say the whole length, too; others have stretched
        # max_position_embeddings already
        ({"rope_scaling": LINEAR, "max_position_embeddings": 4096, "max_sequence_length": 16384}, 16384),
        ({"rope_scaling": LINEAR, "max_position_embeddings": 16384, "max_sequence_length": 16384}, 16384),
        ({"rope_scaling": {**LINEAR, "original_max_position_embeddings": 4096}, "max_position_embeddings": 16384},
         16384),
        ({"rope_scaling": LINEAR, "original_max_position_embeddings": 4096, "max_position_embeddings": 16384}, 16384),
    ],
)  # fmt: skip
def test_the_context_is_what_linear_scaling_makes_of_the_trained_positions(
    read, dialect, fields, context
):
    """max_position_embeddings alone was taken, so that a model trained for 16,384 positions refused
    its 4,097th."""
    prefix = "text_config." if dialect == HUB else ""
    fields = {"max_position_embeddings": None} | fields
    assert (
        read(
            changed(FULL[dialect], {prefix + key: value for key, value in fields.items()})
        ).text.context
        == context
    )


def test_the_context_has_one_home():
    """Whoever reads max_position_embeddings instead forgets that scaling multiplies it."""
    package = Path(minillava.__file__).parent
    readers = {
        p.name
        for p in package.rglob("*.py")
        if "max_position_embeddings" in p.read_text(encoding="utf-8")
    }
    assert readers == {"config.py", "config_json.py"}  # its home, and who reads the file


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_a_factor_that_no_training_has_is_refused(read, factor):
    """A factor that no training has would give infinite or vanishing angles, and nonsense without
    an error."""
    with pytest.raises(ValueError, match=r"rope_scaling\.factor is .*, expected"):
        read(changed(HUB_7B, {"text_config.rope_scaling": {"type": "linear", "factor": factor}}))


@pytest.mark.parametrize(
    ("scaling", "shown"),
    [
        ({"type": "linear", "factor": "2"}, "'2'"),
        ({"type": "linear", "factor": True}, "True"),
        ({"type": "linear", "factor": 0}, "0"),
        ({"type": "linear", "factor": -2.0}, "-2.0"),
        ({"type": "linear", "factor": None}, "None"),
        ({"type": "linear"}, "None"),
    ],
)
def test_a_linear_rope_scaling_needs_a_factor_above_zero(read, tmp_path, scaling, shown):
    """Linear scaling without a sensible factor would divide by zero, or not be scaled at all."""
    with pytest.raises(ValueError) as caught:
        read(changed(HUB_7B, {"text_config.rope_scaling": scaling}))
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'config.json'}: text_config.rope_scaling.factor is {shown}"
    ), message


@pytest.mark.parametrize(
    ("dialect", "changes", "numbers"),
    [
        (
            HUB,
            {"text_config.num_key_value_heads": 5},
            ("num_attention_heads is 32", "num_key_value_heads 5"),
        ),
        (HUB, {"text_config.head_dim": 127}, ("head_dim is 127", "even")),
        (
            HUB,
            {"vision_config.num_attention_heads": 15},
            ("hidden_size is 1024", "num_attention_heads 15"),
        ),
        (HUB, {"vision_config.image_size": 10}, ("image_size is 10", "patch_size 14")),
        (HUB, {"vision_feature_layer": 25}, ("layer is 25", "24")),
        (HUB, {"vision_feature_layer": -26}, ("layer is -26", "24")),
        (ORIGINAL, {"mm_vision_select_layer": 25}, ("layer is 25", "24")),
        (
            ORIGINAL,
            {"num_key_value_heads": 5},
            ("num_attention_heads is 32", "num_key_value_heads 5"),
        ),
    ],
)
def test_fields_that_contradict_each_other_are_named_with_both_numbers(
    read, tmp_path, dialect, changes, numbers
):
    """Numbers that cannot belong to one network would fail while it is built, with an error that
    names neither field."""
    with pytest.raises(ValueError) as caught:
        read(changed(FULL[dialect], changes))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert all(number in message for number in numbers), message


def test_a_llama_without_eyes_is_not_taken_for_an_original_llava(read, tmp_path):
    """A language model's folder would be read as LLaVA's, and all of its vision tower be reported
    as missing."""
    blind = {key: value for key, value in ORIGINAL_7B.items() if not key.startswith("mm_")}
    with pytest.raises(
        ValueError, match=r"neither a `text_config`.* nor `mm_vision_tower`.*llava-1.5-7b-hf"
    ) as caught:
        read(blind)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


def test_a_wrong_field_of_a_clip_folder_is_found_in_its_own_file(read, tmp_path):
    """The error would send the user to the config.json of the language model, where the field is
    right."""
    with pytest.raises(ValueError) as caught:
        read(ORIGINAL_7B, clip={"vision_config": {"hidden_size": "24"}})
    assert str(caught.value).startswith(
        f"{tmp_path / 'clip' / 'config.json'}: vision_config.hidden_size is '24'"
    )
    with pytest.raises(ValueError, match="model_type is 'dinov2', supported: clip_vision_model"):
        read(ORIGINAL_7B, clip={"model_type": "dinov2"})
    with pytest.raises(ValueError, match="the vision tower is a SigLIP, which is read beside"):
        read(ORIGINAL_7B, clip={"model_type": "siglip_vision_model"})


LMMS_INTERLEAVE = {
    "architectures": ["LlavaQwenForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 1024, "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]],
    "intermediate_size": 2816, "max_position_embeddings": 32768, "max_window_layers": 21,
    "mm_hidden_size": 1152, "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava_qwen", "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_the_authors_own_interleave_reads_the_last_of_26_blocks(read):
    """Its file says layer -2 and anyres; its code reads the last of 26 blocks whatever the file says,
    and one squeezed square a picture."""
    config = read(LMMS_INTERLEAVE)
    assert config.vision.siglip and config.vision.num_hidden_layers == 26
    assert config.feature_depths == (26,) and config.vision_stated
    assert (config.tokens_per_image, config.image_aspect_ratio, config.grid) == (729, "squash", ())
    assert config.text.qkv_bias and config.text.tie_word_embeddings
    assert (config.text.context, config.eos_token_ids) == (32768, (151645,))
    whole = {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14}
    assert read(LMMS_INTERLEAVE, clip=whole).feature_depths == (26,)
    with pytest.raises(ValueError, match="is read beside a Qwen2"):
        read({**LMMS_INTERLEAVE, "model_type": "llava_llama"})


def test_a_wrong_field_of_generation_config_is_found_there(read, tmp_path):
    """The error would send the user to config.json, where the field is right or absent."""
    with pytest.raises(ValueError) as caught:
        read(HUB_7B, generation={"eos_token_id": "2"})
    assert str(caught.value).startswith(
        f"{tmp_path / 'generation_config.json'}: eos_token_id is '2'"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model_type": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[]", "a JSON list, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
    ],
    ids=["empty", "cut off", "git-lfs pointer", "utf-16", "deep", "endless number", "list", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_not_a_json_object_is_refused_by_name(read, tmp_path, name, content, found):
    """A damaged file would end in a traceback of the JSON parser that does not name it."""
    (tmp_path / "config.json").write_text(json.dumps(HUB_7B), encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert found in message
    assert "download" in message


def test_an_absent_file_is_named(tmp_path):
    """A user would not learn which of a folder's files is missing."""
    with pytest.raises(FileNotFoundError, match="not found") as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


# --- relatives of LLaVA-1.5 -----------------------------------------------------------------------

# llava-hf/bakLlava-v1-hf: a Mistral, whose fields are mostly the defaults of its class.
BAKLLAVA = {
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "sliding_window": 4096,
        "vocab_size": 32064,
    },
    "vision_config": HUB_7B["vision_config"],
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def test_a_mistral_is_a_llama_whose_context_is_its_window(read):
    """Up to the window's length its mask hides nothing, so nothing is computed that Llama does
    not."""
    text = read(BAKLLAVA).text
    assert text == TextConfig(
        vocab_size=32064,
        intermediate_size=14336,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )
    assert (text.context, text.head_dim, text.rope_theta) == (4096, 128, 10000.0)


@pytest.mark.parametrize(
    ("window", "context"), [("absent", 4096), (None, 32768), (2048, 2048), (40000, 32768)]
)
def test_an_absent_window_is_4096_and_null_is_none(read, window, context):
    """Mistral's two ways of saying nothing mean different windows: a long conversation would be cut
    off, or run past what the model can see."""
    text = {**BAKLLAVA["text_config"], "sliding_window": window}
    if window == "absent":
        del text["sliding_window"]
    assert read({**BAKLLAVA, "text_config": text}).text.context == context


def test_a_mistral_that_leaves_everything_out_has_the_sizes_of_its_class(read):
    """Llama's would be another model: 11008 wide, without grouped heads."""
    text = read({**BAKLLAVA, "text_config": {"model_type": "mistral"}}).text
    assert (text.intermediate_size, text.num_key_value_heads, text.context) == (14336, 8, 4096)
    whole = {"model_type": "mistral", "sliding_window": None}
    assert read({**BAKLLAVA, "text_config": whole}).text.context == 131072
    with pytest.raises(ValueError, match=r"text_config\.sliding_window is 0, expected a number"):
        read({**BAKLLAVA, "text_config": {"model_type": "mistral", "sliding_window": 0}})


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("given", [{}, {"num_attention_heads": 64, "hidden_size": 8192}])
def test_our_defaults_of_relatives_are_those_of_transformers(read, kind, given):
    """A field that their config leaves out would get Llama's default, and a null, which Qwen2's may
    say for as many key/value heads as heads, that of a field that is left out."""
    transformers = pytest.importorskip("transformers")
    text = {"model_type": kind.lower(), "sliding_window": None, **given}
    for more in ({}, *[{"num_key_value_heads": None}] * (kind == "Qwen2")):
        theirs = getattr(transformers, f"{kind}Config")(**given, **more)
        check_fields(read({**BAKLLAVA, "text_config": {**text, **more}}).text, theirs)
    assert transformers.MistralConfig().sliding_window == 4096


def check_fields(ours: TextConfig, theirs) -> None:
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocab_size"):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field), field


def test_vip_llava_drops_the_class_token_whatever_it_is_told(read):
    """Its class in transformers has no such field: a picture would take a position more."""
    config = {"model_type": "vipllava", "text_config": {}, "vision_feature_select_strategy": "full"}
    assert not read(config).keep_class_token
    layers = {"vision_feature_layers": [-2, -5]}
    assert read({**config, **layers}).feature_layer == (-2, -5)
    assert read({**MINIMAL[HUB], **layers}).feature_layer == -2  # no field of LLaVA-1.5


@pytest.mark.parametrize("kind", ["share4v", "llava_mistral", "llava_llama"])
def test_originals_that_differ_in_their_weights_alone(read, kind):
    """ShareGPT4V, and Mistrals trained by LLaVA's own code."""
    config = read({**ORIGINAL_7B, "model_type": kind, "sliding_window": None})
    assert config.text == read(ORIGINAL_7B).text
    assert (config.projector_layers, config.image_aspect_ratio) == (2, "pad")
