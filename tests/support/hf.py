"""Drives Hugging Face transformers, the yardstick of the parity tests and of
tools/make_reference.py.

Everything here speaks minillava's language (rows of ids with -200 for a picture) and translates it.
transformers is imported inside the functions, so that the tests that do without it can import this
module.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

IMAGE = -200
IGNORED = -100
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

# Where each part of the network lives in each kind of checkpoint: (language model, head, vision
# tower, projector). The projector's two layers are `linear_1` and `linear_2`, in the original's
# nn.Sequential `0` and `2`.
PREFIXES = {
    "modules": ("model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector."),
    "fresh": (
        "language_model.model.",
        "language_model.",
        "vision_tower.",
        "multi_modal_projector.",
    ),
    "hub": (
        "language_model.model.",
        "language_model.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    ),
    "buffers": (
        "language_model.model.",
        "language_model.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    ),
    "raw": (
        "model.language_model.",
        "",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "original": (
        "model.",
        "",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
    ),
    "original-bare": ("model.", "", None, "model.mm_projector."),
}
NEWLINE = "model.image_newline"  # of LLaVA-1.6, in none of those parts
DIALECTS = {
    "hub": "llava-hf on the hub; what transformers 4.37 to 4.57 write, and 5.x after loading it",
    "fresh": "transformers 5 saving a model that was built from a config",
    "modules": "transformers 5 with save_original_format=False: the names of its modules",
    "raw": "state_dict() of transformers 4.52 to 4.57",
    "buffers": "the hub's, with the buffers that old versions saved along",
    "original": "liuhaotian, trained by oneself: the vision tower inside",
    "original-bare": "liuhaotian, as released: no vision tower; CLIP is a folder of its own (`clip/`)",
}
TOWERLESS = ("original-bare",)
CLIP_FOLDER = "clip"


# Arguments of `hub_config`. Only "toy" is stored; "wide" has the widths of LLaVA-1.5-7B and
# CLIP-L/336.
SIZES = {
    "toy": {
        "text": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        "vision": {
            "hidden_size": 32,
            "image_size": 56,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
    },
    "512": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_attention_heads": 8,
            "num_hidden_layers": 8,
        },
        "vision": {
            "hidden_size": 256,
            "image_size": 336,
            "intermediate_size": 1024,
            "num_attention_heads": 4,
            "num_hidden_layers": 6,
            "patch_size": 14,
        },
    },
    "wide": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 2,
        },
        "vision": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
    },
}


# A SigLIP tower as llava-interleave-qwen has it, and what LLaVA's config.json says of it.
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
OF_SIGLIP = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


# --- configurations -------------------------------------------------------------------------------


def hub_config(text: dict, vision: dict, *, pieces: int, dtype: str = "float32", **top) -> dict:
    """config.json as the llava-hf checkpoints have it: only what differs from the defaults of the
    classes.

    pieces: the tokenizer's vocabulary; the image id and the pad id follow it, and the rows are
    padded to 64.
    """
    rows = -(-(pieces + 2) // 64) * 64
    tied = {"tie_word_embeddings": True} if top.get("tie_word_embeddings") else {}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": IGNORED,
        "image_token_index": pieces,
        "model_type": "llava",
        "pad_token_id": pieces + 1,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": dtype,
            "vocab_size": rows,
            **tied,
            **text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.37.2",
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": 16,
            "vocab_size": pieces,
            **vision,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
        **top,
    }


def original_config(hub: dict, pieces: int, *, tower: bool) -> dict:
    """The flat config.json of liuhaotian/llava-v1.5. Released ones have no vision_config; for a
    tower that is not CLIP-L/336 and travels inside the checkpoint, its sizes have to be
    somewhere."""
    text = hub["text_config"]
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "hidden_size": text["hidden_size"],
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": text["intermediate_size"],
        "max_length": 4096,
        "max_position_embeddings": text["max_position_embeddings"],
        "mm_hidden_size": hub["vision_config"]["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_attention_heads": text["num_attention_heads"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_key_value_heads": text.get("num_key_value_heads", text["num_attention_heads"]),
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text["rms_norm_eps"],
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": hub["torch_dtype"],
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": pieces,
    }
    if "image_grid_pinpoints" in hub:  # LLaVA-1.6, which reads the pairs as (width, height)
        config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        config["image_grid_pinpoints"] = [pair[::-1] for pair in hub["image_grid_pinpoints"]]
        if text["model_type"] == "mistral":
            config |= {"model_type": "llava_mistral", "sliding_window": None}
    return (
        {**config, "unfreeze_mm_vision_tower": True, "vision_config": hub["vision_config"]}
        if tower
        else config
    )


def classes(config: dict):
    """transformers' configuration and model of a hub config.json's type."""
    import transformers

    kinds = {
        "llava_next": "LlavaNext",
        "llava_onevision": "LlavaOnevision",
        "vipllava": "VipLlava",
    }
    kind = kinds.get(config["model_type"], "Llava")
    return getattr(transformers, f"{kind}Config"), getattr(
        transformers, f"{kind}ForConditionalGeneration"
    )


def llava_config(config: dict):
    """transformers' own configuration object from a hub config.json."""
    quiet()
    return classes(config)[0].from_dict(json.loads(json.dumps(config)))


# --- random weights -------------------------------------------------------------------------------


def random_state(config: dict, seed: int, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Weights, under the names of transformers' modules, of a network that is alive: see
    `alive`."""
    generator = torch.Generator().manual_seed(seed)
    state = alive(
        config, shapes_of(config), lambda shape: torch.empty(shape).normal_(generator=generator)
    )
    return {name: w.to(DTYPES[dtype]) for name, w in state.items()}


def shapes_of(config: dict) -> dict[str, torch.Size]:
    """Names of transformers' modules -> the shapes of their tensors."""
    # transformers imports a class when it is asked for, which fails where tensors have no numbers
    make, configured = classes(config)[1], llava_config(config)
    with torch.device("meta"):
        model = make(configured)
    return {name: w.shape for name, w in model.state_dict().items()}


def alive(config: dict, shapes: dict, draw) -> dict[str, torch.Tensor]:
    """Weights of a network that is alive: activations stay near one, attention is neither flat nor
    one-hot, no norm is the identity, and the picture reaches the logits. draw: numbers of standard
    deviation one, of a shape."""
    tied, pieces = config["tie_word_embeddings"], config["image_token_index"]
    state = {}
    for name, shape in sorted(shapes.items()):
        w = draw(shape)
        if "norm" in name or "layrnorm" in name:
            w = 1 + w / 4 if name.endswith("weight") else w / 8
        elif name.endswith("bias"):
            w /= 8
        elif "lm_head" in name or ("embed_tokens" in name and tied):
            w *= 2 * shape[1] ** -0.5  # logits of standard deviation 2
            w[2] *= 1.5  # the end token wins now and then
            w[pieces:] *= 0.05  # rows that are no word never win
        elif "q_proj" in name or "k_proj" in name:
            w *= 1.4 * shape[1] ** -0.5
        elif (w.dim() > 1 and "embed" not in name) or "patch_embedding" in name:
            w *= w[0].numel() ** -0.5
        state[name] = w
    if tied:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    return state


# --- checkpoint folders ---------------------------------------------------------------------------


def rename(state: dict, dialect: str) -> dict[str, torch.Tensor]:
    """A state of transformers' module names under the names of another dialect (hf.PREFIXES)."""
    new_prefixes = PREFIXES[dialect]
    renamed = {}
    for name, tensor in state.items():
        if name == NEWLINE:
            renamed[NEWLINE if dialect.startswith("original") else "image_newline"] = tensor
            continue
        part = next(i for i in (0, 2, 3, 1) if name.startswith(PREFIXES["modules"][i]))
        if new_prefixes[part] is None:
            continue
        name = name.removeprefix(PREFIXES["modules"][part])
        if part == 3 and dialect.startswith("original"):
            name = name.replace("linear_1", "0").replace("linear_2", "2")
        renamed[new_prefixes[part] + name] = tensor
    return renamed


def write_checkpoint(
    folder: Path,
    config: dict,
    state: dict,
    *,
    dialect: str = "hub",
    dtype: str = "float32",
    tokenizer: Path | None = None,
    shards: int = 1,
) -> Path:
    """A whole checkpoint folder: by transformers itself where it can write that dialect, else
    renamed.

    For "original-bare" the tower goes to a CLIP folder inside, `clip/`. shards: number of weight
    files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **config,
        "torch_dtype": dtype,
        "text_config": {**config["text_config"], "torch_dtype": dtype},
    }
    pieces, tied = config["image_token_index"], config["tie_word_embeddings"]
    state = {
        name: w.to(DTYPES[dtype])
        for name, w in state.items()
        if not (tied and name == "lm_head.weight")
    }
    original = dialect.startswith("original")
    if dialect in ("fresh", "modules"):
        model = model_of(config, state, dtype)
        model.save_pretrained(folder, save_original_format=dialect == "fresh")
        if shards > 1:
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            write_weights(tensors, folder, shards)
    else:
        if original:  # its vocabulary is the tokenizer's; the hub's conversion added rows
            for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
                state[name] = state[name][:pieces].clone()
        tensors = rename(state, dialect)
        if dialect == "buffers":
            tensors |= old_buffers(config)
        write_weights(tensors, folder, shards=shards)
        flat = original_config(config, pieces, tower=dialect == "original")
        write_json(flat if original else config, folder / "config.json")
    if dialect in TOWERLESS:
        write_clip(config, state, folder / CLIP_FOLDER)
    _write_side_files(folder, config, pieces, dialect, tokenizer)
    return folder


def old_buffers(config: dict) -> dict[str, torch.Tensor]:
    """What old versions saved along with the weights and every loader has to ignore."""
    text, vision = config["text_config"], config["vision_config"]
    positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    width = text["hidden_size"] // text["num_attention_heads"]
    language, _, tower, _ = PREFIXES["buffers"]
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    layers = range(text["num_hidden_layers"])
    return {f"{tower}embeddings.position_ids": torch.arange(positions)[None]} | {
        f"{language}layers.{i}.self_attn.rotary_emb.inv_freq": inv_freq.clone() for i in layers
    }


def write_clip(config: dict, state: dict, folder: Path) -> None:
    """The whole CLIP that the original checkpoints take their tower from: text half, projections,
    logit scale and position ids included, as in openai/clip-vit-large-patch14-336."""
    from transformers import CLIPConfig, CLIPModel

    prefix = PREFIXES["modules"][2]
    vision = {
        k: v for k, v in config["vision_config"].items() if k not in ("model_type", "vocab_size")
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    tower = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
    clip.to(next(iter(tower.values())).dtype)
    clip.vision_model.load_state_dict(tower)
    clip.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for half in ("text", "vision"):
        positions = len(tensors[f"{half}_model.embeddings.position_embedding.weight"])
        tensors[f"{half}_model.embeddings.position_ids"] = torch.arange(positions)[None]
    write_tensors(tensors, file)


def _write_side_files(
    folder: Path, config: dict, pieces: int, dialect: str, tokenizer: Path | None
) -> None:
    original = dialect.startswith("original")
    size = config["vision_config"]["image_size"]
    end = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0 if original else pieces + 1}
    write_json(
        {"_from_model_config": True, **end, "transformers_version": "4.37.2"},
        folder / "generation_config.json",
    )
    siglip = config["vision_config"]["model_type"] == SIGLIP["model_type"]
    processor = siglip_processor_config(size) if siglip else processor_config(size)
    if dialect in ("fresh", "modules"):  # transformers 5 nests it
        nested = {
            "patch_size": config["vision_config"]["patch_size"],
            "num_additional_image_tokens": 1,
        }
        nested |= {
            "image_processor": processor,
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
        }
        write_json(
            {
                **nested,
                "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            },
            folder / "processor_config.json",
        )
    elif not original:
        write_json(processor, folder / "preprocessor_config.json")
    elif dialect in TOWERLESS:  # the original's processor is its CLIP's
        write_json(processor, folder / CLIP_FOLDER / "preprocessor_config.json")
    if tokenizer is not None:
        write_bytes(Path(tokenizer).read_bytes(), folder / "tokenizer.model")
        write_json(tokenizer_config(pieces, original), folder / "tokenizer_config.json")


def processor_config(size: int) -> dict:
    """preprocessor_config.json of the llava-hf checkpoints for pictures of another size."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }


def siglip_processor_config(size: int) -> dict:
    """preprocessor_config.json of llava-interleave-qwen for pictures of another size."""
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def tokenizer_config(pieces: int, original: bool) -> dict:
    special = {0: "<unk>", 1: "<s>", 2: "</s>"} | (
        {} if original else {pieces: "<image>", pieces + 1: "<pad>"}
    )
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in special.items()},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "<unk>" if original else "<pad>",
        "padding_side": "right" if original else "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def read_json(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_bytes(content: bytes, path: Path) -> None:
    """Write beside the target and rename: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(content: dict, path: Path) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    # one list, one line
    flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_bytes((flat + "\n").encode(), path)


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: w.contiguous() for name, w in tensors.items()}, partial, metadata={"format": "pt"}
    )
    os.replace(partial, path)


def write_weights(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 1) -> None:
    """The weight files of a checkpoint folder, named as transformers names them; several come with
    an index."""
    if shards == 1:
        write_tensors(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    held = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in held.items():
        write_tensors({name: tensors[name] for name in part}, folder / file)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in tensors.values())},
        "weight_map": {name: file for file, part in held.items() for name in part},
    }
    write_json(index, folder / "model.safetensors.index.json")


# --- transformers' model --------------------------------------------------------------------------


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_of(config: dict, state: dict, dtype: str):
    """A transformers model built from a config (not from a checkpoint) that holds the given
    weights."""
    model = classes(config)[1](llava_config(config)).to(DTYPES[dtype])
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.config.dtype = DTYPES[dtype]
    return model


def load(folder: Path, dtype: str = "float32", attention: str = "eager"):
    """transformers' model of a checkpoint folder. Never `.to(dtype)` afterwards: that rounds its
    rotary table too."""
    quiet()
    model, report = classes(read_json(folder / "config.json"))[1].from_pretrained(
        folder, dtype=DTYPES[dtype], attn_implementation=attention, output_loading_info=True
    )
    ignored = re.compile(r"inv_freq$|position_ids$")
    missing, unexpected = (
        report["missing_keys"],
        [k for k in report["unexpected_keys"] if not ignored.search(k)],
    )
    if missing or unexpected or report["mismatched_keys"]:
        raise ValueError(
            f"transformers does not load {folder} whole: missing {missing}, unexpected {unexpected}"
        )
    return model.eval()


@contextlib.contextmanager
def float64():
    """Make a float64 transformers model a float64 network: its RMSNorm and its softmax compute in
    float32 whatever they are given. The rotary tables stay float32 rounded to the model's type:
    they define the network."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norms, softmax = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm), F.softmax
    forwards = [norm.forward for norm in norms]

    def norm64(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def softmax64(x, *arguments, dtype=None, **options):
        return softmax(
            x, *arguments, dtype=x.dtype if x.dtype == torch.float64 else dtype, **options
        )

    for norm in norms:
        norm.forward = norm64
    F.softmax = softmax64
    try:
        yield
    finally:
        for norm, forward in zip(norms, forwards, strict=True):
            norm.forward = forward
        F.softmax = softmax


def patches(model) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def inputs(
    model, rows: list[list[int]], labels: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Rows of our ids -> transformers' inputs: the image id once per patch, padded on the left,
    positions counted over real tokens as generate() does. labels: like rows; those of pictures are
    ignored."""
    config, n = model.config, patches(model)
    wide = [
        [t for i in row for t in ([config.image_token_index] * n if i == IMAGE else [i])]
        for row in rows
    ]
    length = max(map(len, wide))
    pads = [length - len(row) for row in wide]
    mask = torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pads, wide, strict=True)])
    given = {
        "input_ids": torch.tensor(
            [[config.pad_token_id] * p + row for p, row in zip(pads, wide, strict=True)]
        ),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0),
    }
    if labels is not None:
        wanted = [
            [
                t
                for i, y in zip(row, ys, strict=True)
                for t in ([IGNORED] * n if i == IMAGE else [y])
            ]
            for row, ys in zip(rows, labels, strict=True)
        ]
        given["labels"] = torch.tensor(
            [[IGNORED] * p + ys for p, ys in zip(pads, wanted, strict=True)]
        )
    return given


@torch.no_grad()
def vision(model, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The selected features without the class token, and what the projector makes of them."""
    features = model.model.get_image_features(pixel_values=pixels, output_hidden_states=True)
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    # ViP-LLaVA's config names no strategy: it drops the class token
    strategy = getattr(model.config, "vision_feature_select_strategy", "default")
    first = int(strategy == "default")
    return {
        "vision": torch.cat([features.hidden_states[i][:, first:] for i in layers], dim=-1),
        "projected": torch.stack(list(features.pooler_output)),
    }


@torch.no_grad()
def forward(model, rows, pixels=None, labels=None) -> dict[str, torch.Tensor]:
    """Every tensor that is compared, by name, from one pass without a cache. Positions of a padded
    batch are real only where `mask`."""
    given = inputs(model, rows, labels)
    eager = model.config._attn_implementation == "eager"
    tensors = {} if pixels is None else vision(model, pixels)
    out = model(
        **given,
        pixel_values=pixels,
        use_cache=False,
        output_hidden_states=True,
        output_attentions=eager,
    )
    tensors |= {f"hidden_states.{i}": x for i, x in enumerate(out.hidden_states)}
    tensors |= {f"attentions.{i}": x for i, x in enumerate(out.attentions or ())}
    tensors["logits"], tensors["mask"] = out.logits, given["attention_mask"].bool()
    if labels is not None:
        tensors["loss"] = out.loss
        if out.logits.dtype == torch.float64:  # transformers takes the loss in float32
            tensors["loss"] = F.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten()
            )
    return tensors


@torch.no_grad()
def generate(
    model,
    rows,
    pixels=None,
    *,
    seed=None,
    max_new_tokens=16,
    record=True,
    eos=(2,),
    process=None,
    **settings,
):
    """transformers' generate() with our names of the settings: what is not set is off (its own
    top-k default is 50). process: f(scores, ids so far), as a LogitsProcessor.

    Returns its output with one more field, `new`: the new ids [B, n].
    """
    from transformers import GenerationConfig

    given = inputs(model, rows)
    del given["position_ids"]  # generate() makes its own
    sampling = settings.get("temperature", 0) > 0
    eager = model.config._attn_implementation == "eager"
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=settings.get("temperature") if sampling else None,
        top_k=settings.get("top_k") or 0,
        top_p=settings.get("top_p") or 1.0,
        min_p=settings.get("min_p"),
        typical_p=settings.get("typical_p"),
        repetition_penalty=settings.get("repetition_penalty") or 1.0,
        no_repeat_ngram_size=settings.get("no_repeat_ngram_size") or 0,
        min_new_tokens=settings.get("min_new_tokens"),
        num_return_sequences=settings.get("num_return_sequences", 1),
        num_beams=settings.get("num_beams", 1),
        length_penalty=settings.get("length_penalty", 1.0),
        early_stopping=settings.get("early_stopping", False),
        bos_token_id=1,
        eos_token_id=list(eos),
        pad_token_id=model.config.pad_token_id,
        return_dict_in_generate=True,
        output_scores=record,
        output_logits=record,
        output_hidden_states=record,
        output_attentions=record and eager,
    )
    if seed is not None:
        torch.manual_seed(seed)
    own = [] if process is None else [lambda input_ids, scores: process(scores, input_ids)]
    out = model.generate(
        **given, pixel_values=pixels, generation_config=options, logits_processor=own
    )
    out.new = out.sequences[:, given["input_ids"].shape[1] :]
    return out


def pixel_values(pictures: list, size: int, *, pad: bool) -> torch.Tensor:
    """What transformers' Pillow-based CLIP processor makes of Pillow pictures; with `pad`, of each
    put on a square of the mean colour first, as the original LLaVA does
    (mm_utils.expand2square)."""
    from PIL import Image
    from transformers.image_transforms import convert_to_rgb
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    quiet()

    def expand(picture):
        picture = convert_to_rgb(picture)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    processed = [
        processor(expand(p) if pad else p, return_tensors="pt").pixel_values for p in pictures
    ]
    return torch.cat(processed)


def error(x: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far a tensor is from the float64 one: its largest and its Euclidean distance."""
    difference = (x.double() - exact.double()).flatten()
    return {"max": difference.abs().max().item(), "norm": difference.norm().item()}
