"""The JSON files beside the weights, written as the hub and the original LLaVA expect them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minillava.config import IGNORE_INDEX, IM_PATCH, IM_START, LlavaConfig, TextConfig
from minillava.files.byte_json import BytePieces
from minillava.files.disk import read_json
from minillava.files.tokenizer_files import PAD_MARKER, AddedToken
from minillava.image import ImageProcessor
from minillava.options import dtype_name
from minillava.prompt import IMAGE_MARKER
from minillava.tiles.pictures import TileProcessor
from minillava.tokenizer import Tokenizer

Json = dict[str, Any]


def hub_config(config: LlavaConfig, dtype: torch.dtype) -> Json:
    """config.json of the hub (llava-hf)."""
    text: Json = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if config.text.qkv_bias:
        text = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    if _is_mistral(config):
        text = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        text["sliding_window"] = None
    written = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": IGNORE_INDEX,
        "image_seq_length": config.tokens_per_image,
        "image_token_index": config.image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": config.projector_bias,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {**text, **_llama(config.text, dtype)},
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype_name(dtype),
        "vision_config": _tower(config),
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": _strategy(config),
        "vocab_size": config.text.vocab_size,
    }
    if config.projector_norm_eps:
        written["architectures"] = ["VipLlavaForConditionalGeneration"]
        written["model_type"] = "vipllava"
        written["projector_layernorm_eps"] = config.projector_norm_eps
    if config.grid:
        written["architectures"] = ["LlavaNextForConditionalGeneration"]
        written["model_type"] = "llava_next"
        written["image_grid_pinpoints"] = list(map(list, config.grid))
    if config.most_tiles:
        written["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
        written["model_type"] = "llava_onevision"
        written["vision_aspect_ratio"] = f"anyres_max_{config.most_tiles}"
    return written


def _is_mistral(config: LlavaConfig) -> bool:
    """LLaVA-1.6 is read with the template of its language model's type."""
    return bool(config.grid) and config.template == "mistral_instruct"


def _strategy(config: LlavaConfig) -> str:
    """What transformers takes of the tower's positions."""
    return "full" if config.keep_class_token or config.vision.siglip else "default"


def check_original(config: LlavaConfig) -> None:
    """Raises ValueError for a model that LLaVA's own layout has no words for."""
    if not config.projector_bias:
        raise ValueError("LLaVA's own layout has no projector without biases; use the hub's (hf)")
    if config.text.qkv_bias or config.vision.siglip or config.projector_norm_eps:
        raise ValueError(
            "Qwen2, SigLIP and ViP-LLaVA are not written in LLaVA's own layout; use the hub's (hf)"
        )


def original_config(config: LlavaConfig, dtype: torch.dtype) -> Json:
    """config.json of the original LLaVA, and what we read besides: `vision_config` and
    `image_token_index`. Raises ValueError as `check_original`."""
    check_original(config)
    layers = config.projector_layers
    written = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "eos_token_id": _one_or_list(config.eos_token_ids),
        "hidden_act": "silu",
        "image_aspect_ratio": "pad" if config.image_aspect_ratio == "pad" else "square",
        "image_token_index": config.image_token_id,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "linear" if layers == 1 else f"mlp{layers}x_gelu",
        "mm_use_im_patch_token": IM_PATCH in config.added_tokens,
        "mm_use_im_start_end": IM_START in config.added_tokens,
        "mm_vision_select_feature": "cls_patch" if config.keep_class_token else "patch",
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_tower": config.vision_tower_name,
        "model_type": "llava_llama",
        "pad_token_id": config.pad_token_id,
        # or LLaVA reads mm_vision_tower instead of the tower inside
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vision_config": _tower(config),
        **_llama(config.text, dtype),
    }
    if config.grid:  # read as (width, height)
        written |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        written["image_grid_pinpoints"] = [[width, height] for height, width in config.grid]
    if _is_mistral(config):
        written |= {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
        written["sliding_window"] = None
    return written


def _llama(text: TextConfig, dtype: torch.dtype) -> Json:
    fields = {**asdict(text), "torch_dtype": dtype_name(dtype)}
    factor, _ = fields.pop("rope_factor"), fields.pop("qkv_bias")
    return (
        fields if factor == 1 else {**fields, "rope_scaling": {"type": "linear", "factor": factor}}
    )


def _tower(config: LlavaConfig) -> Json:
    vision = asdict(config.vision)
    if vision.pop("siglip"):
        kind = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
        return {**kind, "vision_use_head": False, **vision}
    return {"model_type": "clip_vision_model", "projection_dim": vision["hidden_size"], **vision}


def generation_config(source: Path, config: LlavaConfig, tokenizer: Tokenizer) -> Json:
    """generation_config.json: the source's, where there is one, with the ids of the new config."""
    path = source / "generation_config.json"
    begin = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
    ids = {"bos_token_id": begin, "eos_token_id": _one_or_list(config.eos_token_ids)}
    raw = read_json(path) if path.exists() else {"_from_model_config": True}
    return {**raw, **ids, "pad_token_id": config.pad_token_id}


def preprocessor_config(processor: ImageProcessor) -> Json:
    """preprocessor_config.json of the hub, for the numbers of an image processor."""
    side = processor.image_size
    onevision = isinstance(processor, TileProcessor) and processor.padded is not None
    if processor.aspect == "squash" or onevision:
        written = {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(processor.mean),
            "image_processor_type": "SiglipImageProcessor",
            "image_std": list(processor.std),
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": side, "width": side},
        }
        if isinstance(processor, TileProcessor):
            written |= {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True}
            written |= {"processor_class": "LlavaOnevisionProcessor", "do_convert_rgb": True}
            written["image_grid_pinpoints"] = list(map(list, processor.grid))
        return written
    written = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(processor.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(processor.std),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    if isinstance(processor, TileProcessor):
        written |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        written |= {"processor_class": "LlavaNextProcessor", "aspect_ratio_setting": "anyres"}
        written["image_grid_pinpoints"] = list(map(list, processor.grid))
    return written


def processor_config(config: LlavaConfig) -> Json:
    """processor_config.json of the hub: how many tokens transformers' processor makes of a
    picture."""
    if config.most_tiles:
        return {
            "image_token": IMAGE_MARKER,
            "num_image_tokens": config.tokens_per_image,
            "processor_class": "LlavaOnevisionProcessor",
            "vision_aspect_ratio": f"anyres_max_{config.most_tiles}",
            "vision_feature_select_strategy": _strategy(config),
        }
    return {
        "image_token": IMAGE_MARKER,
        # the class token, which "default" takes away again
        "num_additional_image_tokens": config.vision.num_positions - config.vision.num_patches,
        "patch_size": config.vision.patch_size,
        "processor_class": "LlavaNextProcessor" if config.grid else "LlavaProcessor",
        "vision_feature_select_strategy": _strategy(config),
    }


def tokenizer_config(config: LlavaConfig, tokenizer: Tokenizer, to: str) -> Json:
    """tokenizer_config.json for a layout of LAYOUTS, with every token that has a row in the
    embedding table."""
    tokens, model = _tokens_with_rows(config, tokenizer), tokenizer.sentencepiece
    unk, bos, eos = (
        model.id_to_piece(i) for i in (model.unk_id(), tokenizer.bos_id, tokenizer.eos_id)
    )
    pad = config.pad_token_id
    pad_text = tokens[pad].text if pad in tokens else tokenizer.piece(pad)
    more = [token.text for token in tokens.values() if token.listed and not token.control]
    described = {
        str(i): {
            "content": token.text,
            "normalized": False,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for i, token in sorted(tokens.items())
    }
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    named["pad_token"] = pad_text if to == "hf" else unk
    byte_level = isinstance(model, BytePieces)
    return {
        "add_bos_token": tokenizer.bos_id >= 0,
        "add_eos_token": False,
        "added_tokens_decoder": described,
        **({"additional_special_tokens": more} if more else {}),
        # a tokenizer has no token of some of these roles
        **{role: token for role, token in named.items() if token},
        "legacy": tokenizer.legacy,
        "model_max_length": config.text.context,
        "padding_side": "left" if to == "hf" else "right",
        "tokenizer_class": "PreTrainedTokenizerFast" if byte_level else "LlamaTokenizer",
    }


def _tokens_with_rows(config: LlavaConfig, tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """The added tokens by id, <image> and <pad> where config.json puts them."""
    rows = config.text.vocab_size
    tokens = {
        i: token
        for i, token in tokenizer.by_id.items()
        if i < rows and token.text not in (IMAGE_MARKER, PAD_MARKER)
    }
    for i, text in ((config.image_token_id, IMAGE_MARKER), (config.pad_token_id, PAD_MARKER)):
        if tokenizer.vocab_size <= i < rows:
            tokens.setdefault(i, AddedToken(text, i, special=True, listed=True, control=True))
    return tokens


def _one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)
