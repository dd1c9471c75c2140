#!/usr/bin/env python3
"""Converts a folder of LLaVA weights to another layout; no bit of a tensor changes unless asked.

    python tools/convert.py llava-v1.5-7b llava-1.5-7b-hf --to hf --vision-tower clip-vit-large-patch14-336

    hf           the names and files of llava-hf on the hub: what Hugging Face transformers loads
    original     LLaVA's own names and flat config.json, the vision tower inside
    safetensors  the names and files of SRC as they are, its .bin weights as safetensors

Weights are written shard by shard, so that memory holds one, and read back and compared. Until then
the folder is called DST.partial.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minillava.attention import eager
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import collect_parts, find_folder, find_others, open_checkpoint
from minillava.checkpoint.names import COMPUTED, PREFIXES, TABLES
from minillava.checkpoint.side_json import read_image_processor
from minillava.checkpoint.stored import StoredWeights
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.config import IGNORE_INDEX, IM_PATCH, IM_START, LlavaConfig, TextConfig
from minillava.fast.quantize import LINE, PARTS, quantize_tensor, stored_shapes
from minillava.files.disk import lock, one_line, read_json, refused
from minillava.files.hub import CLIP_RELEASE
from minillava.files.tensors import INDEX_NAME, SINGLE_NAME, open_folder
from minillava.files.tokenizer_files import PAD_MARKER, SIDE_NAMES, AddedToken, find_tokenizer
from minillava.image import ImageProcessor
from minillava.llama import grow_rows
from minillava.llava import Llava
from minillava.options import KINDS
from minillava.prompt import IMAGE_MARKER
from minillava.tokenizer import Tokenizer, open_tokenizer

try:
    from tqdm import tqdm
except ImportError:

    def tqdm(items: Sequence, desc: str, unit: str) -> Iterator:
        for i, item in enumerate(items, start=1):
            if i % max(1, len(items) // 10) == 0:
                print(f"{desc}: {unit} {i} of {len(items)}", file=sys.stderr)
            yield item


# Of the prefixes that are read, those that are written: each stands for one part of the network.
LAYOUTS = {
    "hf": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    ),
    "original": (
        "model.",
        "lm_head.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
    ),
}
SIDE_FILES = (".json", ".jinja", ".md", ".model", ".txt")
OWNER = "convert.pid"  # in a folder that is not finished: the process that makes it


class Planned(NamedTuple):
    """A tensor to be written. ours: our name for it, None for one that is only carried along."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    ours: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Job(NamedTuple):
    """A folder to be written: its tensors by their new names, its other files, and how its
    config.json must read."""

    tensors: dict[str, Planned]
    files: dict[str, bytes]
    config: LlavaConfig
    notes: list[str]


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    vision_tower: Path | None = None,
    model_base: Path | None = None,
    adapter: Path | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    shard_size: float = 4e9,
) -> list[str]:
    """Write `target`, which must not exist or be empty; returns what its owner should know, a line
    each.

    dtype: of all weights, instead of the stored ones. quantize: int8 or int4, the language model's
    linear layers in the form of minillava/fast/quantize.py, which other programs cannot read.
    shard_size: of a file, in bytes. Raises FileNotFoundError or ValueError in one line; what was
    written is then gone.
    """
    source = find_folder(source)
    found = find_others(vision_tower, model_base, adapter)
    parts = dict(zip(("vision_tower", "model_base", "adapter"), found, strict=True))
    with _unfinished(target) as folder:
        if to == "safetensors":
            if any(parts.values()) or quantize:
                raise ValueError(
                    "--to safetensors keeps the tensors of SRC alone; use --to hf or --to original"
                )
            job = _copy(source, dtype)
        else:
            job = _rename(source, to, parts, dtype, quantize)
        needed = sum(p.nbytes for p in job.tensors.values()) + sum(map(len, job.files.values()))
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"{target}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
            )
        _write_weights(job.tensors, folder, shard_size)
        _verify_weights(job.tensors, folder)
        # which goes last
        for name, content in sorted(job.files.items(), key=lambda file: file[0] == "config.json"):
            (folder / name).write_bytes(content)
        # safetensors lets only the owner read what it writes
        for path in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", path)
        if read_config(folder) != job.config:
            raise ValueError(
                f"{target}: its config.json does not say what that of {source} says; please report "
                "this"
            )
    return job.notes


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the body succeeds, and goes when it
    fails. Raises ValueError, or OSError where the system does not let us write."""
    target = Path(target).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty folder; name a new one")
    folder = target.with_name(f"{target.name}.partial")
    try:
        owner = _claim(folder)
    except OSError as error:
        raise refused(folder, error, writing=True) from None
    try:
        yield folder
        (folder / OWNER).unlink()
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException as error:
        shutil.rmtree(folder)
        if (
            isinstance(error, OSError)
            and error.errno
            and str(error.filename or folder).startswith(str(folder))
        ):
            raise refused(target, error, writing=True) from None
        raise
    finally:
        owner.close()


def _claim(folder: Path) -> TextIO:
    """Make the folder; in it lies a file that is locked while we live, so that the next run can
    tell what a killed one left, which it removes, from what another is writing: ValueError."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        left = f"{folder}: left by an interrupted conversion, or another is at it; remove it"
        try:
            with (folder / OWNER).open(encoding="utf-8") as file:
                if not lock(file):
                    found = f"process {file.read(20)} is converting to it; wait until it ends"
                    raise ValueError(f"{folder}: {found}, or remove it if it has ended") from None
                shutil.rmtree(folder)
        except FileNotFoundError:
            raise ValueError(left) from None
        folder.mkdir(parents=True)
    owner = (folder / f"{OWNER}.new").open("w", encoding="utf-8")
    locked = lock(owner)
    owner.write(str(os.getpid()))
    owner.flush()
    if not locked:  # Windows, which renames nothing that is open
        owner.close()
    (folder / f"{OWNER}.new").rename(folder / OWNER)  # which nobody sees unlocked
    return owner


# ------------------------------------------------------------------------------------ what to write


def _copy(source: Path, dtype: torch.dtype | None) -> Job:
    """Every tensor and side file of a folder as they are; at another dtype, config.json says so."""
    config, tensors = read_config(source), {}
    for stored in open_folder(source):
        found = stored.file.read(stored.name)  # mapped, not read
        as_is = dtype is None or not found.is_floating_point() or stored.name.endswith(COMPUTED)
        kept = found.dtype if as_is else dtype
        tensors[stored.name] = Planned(
            stored.shape, kept, partial(_narrow, found.to, stored.name, kept)
        )
    files = _side_files(source)
    if dtype is not None:
        raw = read_json(source / "config.json")
        for part in (raw, raw.get("text_config", {})):
            part.update(dict.fromkeys({"torch_dtype", "dtype"} & part.keys(), _name(dtype)))
        files["config.json"] = _json(raw)
    return Job(tensors, files, config, [])


def _side_files(folder: Path) -> dict[str, bytes]:
    """What a folder holds besides weights and what made them."""
    side = [p for p in folder.iterdir() if p.suffix in SIDE_FILES or p.name.startswith("LICENSE")]
    side = [p for p in side if not p.name.startswith(("adapter_", "trainer_"))]
    return {
        p.name: p.read_bytes() for p in side if p.is_file() and not p.name.endswith(".index.json")
    }


def _rename(
    source: Path,
    to: str,
    parts: dict[str, Path | None],
    dtype: torch.dtype | None,
    quantize: str | None,
) -> Job:
    """The whole network, under other names and in another dialect. parts: further folders, as
    `collect_parts` takes them."""
    vision_tower, base = parts["vision_tower"], parts["model_base"] or source

    def home(name: str) -> Path:
        return source if (source / name).exists() else base

    config = read_config(home("config.json"), vision_tower)
    checkpoint = collect_parts(source, **parts, vocabulary=config.text.vocab_size)
    if checkpoint.quantised:
        raise ValueError(f"{source}: is quantised; convert the weights that it was made from")
    # `checkpoint`, less what only other layouts need
    needed, config = open_checkpoint(source, config, **parts)
    needed.deltas.clear()  # which change no shape, and take time
    # raises for what does not fit
    model = build_model(config, needed, eager, dtype=needed.dtype(), device="meta")
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    homes = [
        folder for folder in (parts["adapter"], source, parts["model_base"]) if folder is not None
    ]
    tokenizer, (_, beside) = open_tokenizer(homes, config), find_tokenizer(homes)
    config = replace(config, vision_stated=True)  # as the config.json that is written will do
    new, notes = (_for_hub if to == "hf" else _for_original)(config, tokenizer, source)
    planned = {}
    for name in checkpoint.tensors:
        shape, kept = checkpoint.shape(name), dtype or checkpoint.stored_dtype(name)
        if name in TABLES:
            shape = (new.text.vocab_size, *shape[1:])
        if quantize and name in linear and name.startswith("language_model."):
            module, rows = name.removesuffix(".weight"), shape[0]
            for suffix, (size, kind) in stored_shapes(shape, quantize).items():
                make = partial(_make_part, checkpoint, name, rows, quantize, suffix)
                planned[f"{module}.{suffix}"] = Planned(
                    size, kind, make, name if suffix in PARTS else None
                )
            continue
        planned[name] = Planned(shape, kept, partial(_make, checkpoint, name, kept, shape[0]), name)
    if to == "hf":
        made = _unused_tower(config, planned)
        planned |= made
        if made:
            notes.append(
                f"made {len(made)} tensors of the vision tower which transformers wants and LLaVA "
                "does not use: "
                "blocks that pass their input on, and a norm"
            )
    if quantize:
        notes.append(f"{quantize} in a form that only minillava reads")
    notes += checkpoint.notes
    if checkpoint.unused:
        notes.append(
            f"left out {len(checkpoint.unused)} stored tensors (tables that are computed, the text "
            "half of a CLIP, a "
            f"tower that another replaces): {checkpoint.unused[0]} is one"
        )
    same_dialect = ("text_config" in read_json(home("config.json") / "config.json")) == (to == "hf")
    files = _side_files(base) if same_dialect else {}
    tokenizer_files = _side_files(beside) if same_dialect else {}
    files = {name: content for name, content in files.items() if name not in SIDE_NAMES}
    files |= {name: content for name, content in tokenizer_files.items() if name in SIDE_NAMES}
    if "tokenizer_config.json" not in files or new.text.vocab_size > config.text.vocab_size:
        files["tokenizer_config.json"] = _json(_tokenizer_config(new, tokenizer, to))
    if to == "hf" and "tokenizer.json" not in files:
        notes.append(
            "from tokenizer.model alone, transformers 5 cuts some texts otherwise than the hub's "
            "tokenizer.json says: "
            "copy that file from a llava-hf release of the same vocabulary"
        )
    if to == "hf":
        files["processor_config.json"] = _json(processor_config(new))
    if new.added_tokens:
        files["added_tokens.json"] = _json(tokenizer.added)
    main_dtype = dtype or checkpoint.dtype()
    processor = read_image_processor(vision_tower or home("preprocessor_config.json"), config)
    files |= {
        "config.json": _json(
            hub_config(new, main_dtype) if to == "hf" else original_config(new, main_dtype)
        ),
        "generation_config.json": _json(
            _generation(home("generation_config.json"), new, tokenizer)
        ),
        "preprocessor_config.json": _json(preprocessor_config(processor)),
        "tokenizer.model": tokenizer.sentencepiece.serialized_model_proto(),
    }
    tensors = {_stored_name(name, to, config.projector_layers): p for name, p in planned.items()}
    return Job(tensors, files, new, notes)


def _stored_name(name: str, to: str, projector_layers: int) -> str:
    """The stored name for one of ours: checkpoint.PREFIXES and PROJECTOR, read from right to
    left."""
    layer = re.match(r"projector\.linear_(\d+)\.", name)
    if to == "original" and layer and projector_layers > 1:
        return f"model.mm_projector.{2 * int(layer[1]) - 2}.{name[layer.end() :]}"
    stored = {PREFIXES[prefix]: prefix for prefix in LAYOUTS[to]}
    ours = max((prefix for prefix in stored if name.startswith(prefix)), key=len)
    return stored[ours] + name.removeprefix(ours)


def _make(checkpoint: StoredWeights, name: str, dtype: torch.dtype, rows: int) -> Tensor:
    tensor = _narrow(partial(checkpoint.read, name), checkpoint.tensors[name].name, dtype)
    return grow_rows(tensor, rows) if name in TABLES else tensor


def _make_part(checkpoint: StoredWeights, name: str, rows: int, kind: str, suffix: str) -> Tensor:
    return _quantised(checkpoint, name, rows, kind)[suffix]


@lru_cache(maxsize=1)  # the parts of a weight are wanted one after the other
def _quantised(checkpoint: StoredWeights, name: str, rows: int, kind: str) -> dict[str, Tensor]:
    tensor = checkpoint.read(name, transient=True)
    return quantize_tensor(grow_rows(tensor, rows) if name in TABLES else tensor, kind)


def _narrow(read: Callable[[torch.dtype], Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """What is read at a dtype. Raises ValueError for numbers that only a wider one has."""
    tensor = read(dtype)
    if dtype == torch.float16 and tensor.isinf().any() and not read(torch.float32).isinf().any():
        raise ValueError(f"{name} has numbers too large for float16; use bfloat16")
    return tensor


def _unused_tower(config: LlavaConfig, planned: dict[str, Planned]) -> dict[str, Planned]:
    """What is missing of the tower beyond the features that LLaVA uses: blocks of zeros, which add
    nothing to their input, and the norm at the end."""
    with torch.device("meta"):
        whole = Llava(replace(config, feature_layer=-1), eager).vision_tower.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    shapes |= dict.fromkeys(
        ("post_layernorm.weight", "post_layernorm.bias"), (config.vision.hidden_size,)
    )
    dtype, made = planned["vision_tower.embeddings.class_embedding"].dtype, {}
    for name, shape in shapes.items():
        if f"vision_tower.{name}" not in planned:
            value = float("norm" in name and name.endswith("weight"))
            make = partial(torch.full, shape, value, dtype=dtype)
            made[f"vision_tower.{name}"] = Planned(shape, dtype, make, f"vision_tower.{name}")
    return made


# ----------------------------------------------------------------------------------- configurations


def _for_hub(
    config: LlavaConfig, tokenizer: Tokenizer, source: Path
) -> tuple[LlavaConfig, list[str]]:
    """What config.json must say on the hub: Hugging Face looks the ids of <image> and <pad> up in
    the table."""
    if config.projector_layers != 2:
        raise ValueError(
            f"{source}: its projector has {config.projector_layers} layer(s); Hugging Face's has "
            "two"
        )
    if IM_START in config.added_tokens:
        raise ValueError(
            f"{source}: puts {IM_START} before each picture, which Hugging Face's LLaVA does not"
        )
    notes, rows = [], config.text.vocab_size
    if config.image_aspect_ratio != "pad":
        notes.append(
            "the hub's config.json cannot say image_aspect_ratio; now use --image-aspect-ratio crop"
        )
    new = replace(config, image_aspect_ratio="pad", vision_tower_name=None, added_tokens=())
    is_free = tokenizer.written_as(config.image_token_id) is None
    # a row that is no word and no token
    if not (tokenizer.vocab_size <= config.image_token_id < rows and is_free):
        total = -(-(rows + 2) // 64) * 64
        text = replace(config.text, vocab_size=total)
        new = replace(new, text=text, image_token_id=rows, pad_token_id=rows + 1)
        notes.append(
            f"appended {total - rows} rows, each the mean of the {rows} before, to embeddings and "
            f"head: {IMAGE_MARKER} "
            f"is {rows}, {PAD_MARKER} is {rows + 1}"
        )
    return new, notes


def _for_original(
    config: LlavaConfig, tokenizer: Tokenizer, source: Path
) -> tuple[LlavaConfig, list[str]]:
    if not config.projector_bias:
        raise ValueError(f"{source}: its projector has no biases; LLaVA's has")
    return replace(config, vision_tower_name=config.vision_tower_name or CLIP_RELEASE), []


def hub_config(config: LlavaConfig, dtype: torch.dtype) -> dict:
    """config.json of the hub (llava-hf)."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": IGNORE_INDEX,
        "image_seq_length": config.tokens_per_image,
        "image_token_index": config.image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": config.projector_bias,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_llama(config.text, dtype),
        },
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": _name(dtype),
        "vision_config": _clip(config),
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "full" if config.keep_class_token else "default",
        "vocab_size": config.text.vocab_size,
    }


def original_config(config: LlavaConfig, dtype: torch.dtype) -> dict:
    """config.json of the original LLaVA, and what we read besides: `vision_config` and
    `image_token_index`."""
    layers = config.projector_layers
    return {
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
        "vision_config": _clip(config),
        **_llama(config.text, dtype),
    }


def _llama(text: TextConfig, dtype: torch.dtype) -> dict:
    fields = {**asdict(text), "torch_dtype": _name(dtype)}
    factor = fields.pop("rope_factor")
    return (
        fields if factor == 1 else {**fields, "rope_scaling": {"type": "linear", "factor": factor}}
    )


def _clip(config: LlavaConfig) -> dict:
    vision = asdict(config.vision)
    return {"model_type": "clip_vision_model", "projection_dim": vision["hidden_size"], **vision}


def _generation(source: Path, config: LlavaConfig, tokenizer: Tokenizer) -> dict:
    """generation_config.json: the source's, where there is one, with the ids of the new config."""
    path = source / "generation_config.json"
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": _one_or_list(config.eos_token_ids)}
    raw = read_json(path) if path.exists() else {"_from_model_config": True}
    return {**raw, **ids, "pad_token_id": config.pad_token_id}


def preprocessor_config(processor: ImageProcessor) -> dict:
    """preprocessor_config.json of the hub, for the numbers of an image processor."""
    side = processor.image_size
    return {
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


def processor_config(config: LlavaConfig) -> dict:
    """processor_config.json of the hub: how many tokens transformers' processor makes of a
    picture."""
    return {
        "image_token": IMAGE_MARKER,
        "num_additional_image_tokens": 1,  # the class token, which "default" takes away again
        "patch_size": config.vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "full" if config.keep_class_token else "default",
    }


def _tokenizer_config(config: LlavaConfig, tokenizer: Tokenizer, to: str) -> dict:
    """tokenizer_config.json, with every token that has a row; <image> and <pad> where config.json
    puts them."""
    pieces, markers = (
        tokenizer.vocab_size,
        ((config.image_token_id, IMAGE_MARKER), (config.pad_token_id, PAD_MARKER)),
    )
    tokens = {
        i: token
        for i, token in tokenizer.by_id.items()
        if i < config.text.vocab_size and token.text not in (IMAGE_MARKER, PAD_MARKER)
    }
    for i, text in markers:
        if pieces <= i < config.text.vocab_size:
            tokens.setdefault(i, AddedToken(text, i, special=True, listed=True, control=True))
    model = tokenizer.sentencepiece
    unk, bos, eos = (
        model.id_to_piece(i) for i in (model.unk_id(), tokenizer.bos_id, tokenizer.eos_id)
    )
    pad = config.pad_token_id
    pad_text = tokens[pad].text if pad in tokens else tokenizer.piece(pad)
    flags = ("lstrip", "rstrip", "single_word", "special")
    more = [token.text for token in tokens.values() if token.listed and not token.control]
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): {
                "content": token.text,
                "normalized": False,
                **{flag: getattr(token, flag) for flag in flags},
            }
            for i, token in sorted(tokens.items())
        },
        **({"additional_special_tokens": more} if more else {}),
        "bos_token": bos,
        "eos_token": eos,
        "legacy": tokenizer.legacy,
        "model_max_length": config.text.context,
        "pad_token": pad_text if to == "hf" else unk,
        "padding_side": "left" if to == "hf" else "right",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": unk,
    }


def _one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# ----------------------------------------------------------------------------- to and from the disk


def _write_weights(tensors: dict[str, Planned], folder: Path, shard_size: float) -> None:
    """Files of at most `shard_size` bytes (a larger tensor has its own), and an index if there are
    several."""
    shards, size = [[]], 0
    for name, planned in tensors.items():
        if shards[-1] and size + planned.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += planned.nbytes
    count = len(shards)
    files = (
        [SINGLE_NAME]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for file, names in tqdm(list(zip(files, shards, strict=True)), desc="write", unit="file"):
        # Clones, since a .bin may hold two tensors in the same bytes, which safetensors refuses.
        _save(
            {n: tensors[n].make().clone(memory_format=torch.contiguous_format) for n in names},
            folder / file,
        )
    if count > 1:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(planned.nbytes for planned in tensors.values())
        (folder / INDEX_NAME).write_bytes(
            _json({"metadata": {"total_size": total}, "weight_map": placed})
        )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    metadata = {"format": "pt"}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # which says in words what the system said in numbers
        found = f"cannot be written ({one_line(error)}); make room there, then repeat the command"
        raise ValueError(f"{path}: {found}") from None
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).rstrip(b" ")
    if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
        # Its kernel loads whole lines of memory: with a header that ends where a line does, so do
        # all tensors of usual shapes, and need not be copied when they are opened.
        padding = -(8 + len(header) + len(',"padding":""')) % LINE
        save_file(tensors, path, metadata={**metadata, "padding": "-" * padding})


def _verify_weights(tensors: dict[str, Planned], folder: Path) -> None:
    """Raises ValueError unless the folder, opened again, holds these tensors, to the bit and under
    our names."""
    written = {stored.name: stored for stored in open_folder(folder)}
    ours = {stored.name: name for name, stored in collect_parts(folder).tensors.items()}
    for name, planned in tqdm(list(tensors.items()), desc="compare", unit="tensor"):
        found, expected = written[name].file.read(name), planned.make()
        same = (
            (found.dtype, found.shape)
            == (expected.dtype, expected.shape)
            == (planned.dtype, planned.shape)
        )
        if (
            not same
            or not torch.equal(_bits(found), _bits(expected))
            or planned.ours not in (None, ours.get(name))
        ):
            raise ValueError(
                f"{folder}: {name} does not read back as it was written; check the disk"
            )


def _bits(tensor: Tensor) -> Tensor:
    """A tensor as bytes: -0 is then not 0, and a NaN is itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


# ------------------------------------------------------------------------------------- command line


def read_size(text: str) -> float:
    """Bytes of a size such as 4GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size such as 4GB")
    return float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="folder of LLaVA-1.5 weights in any layout"
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="folder to make: one that does not exist, or is empty",
    )
    parser.add_argument(
        "--to", required=True, choices=[*LAYOUTS, "safetensors"], help="the layout of DST"
    )
    parser.add_argument(
        "--vision-tower", metavar="DIR", type=Path, help="folder of a CLIP, if SRC holds no tower"
    )
    parser.add_argument(
        "--model-base", metavar="DIR", type=Path, help="folder of the language model that SRC lacks"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, help="folder of a LoRA adapter to merge"
    )
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument(
        "--dtype", choices=dtypes, help="precision to convert to (default: as stored)"
    )
    parser.add_argument(
        "--quantize",
        choices=KINDS,
        help="the language model's linear layers in 8 or 4 bits a weight",
    )
    parser.add_argument("--shard-size", metavar="SIZE", type=read_size, default="4GB",
                        help="largest weight file (default: %(default)s)")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error happened")
    args = parser.parse_args(argv)

    def body() -> int:
        notes = convert(
            args.source,
            args.target,
            args.to,
            vision_tower=args.vision_tower,
            model_base=args.model_base,
            adapter=args.adapter,
            dtype=args.dtype and getattr(torch, args.dtype),
            quantize=args.quantize,
            shard_size=args.shard_size,
        )
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return 0

    return run(body, args.verbose)


if __name__ == "__main__":
    interrupts.end(main)
