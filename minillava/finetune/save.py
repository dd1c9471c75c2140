"""What was learnt, as others open it: a LoRA for PEFT or for LLaVA, a projector, a whole model."""

import io
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from minillava.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAMES
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import PROJECTOR_NAME, REST_NAME, TABLES, stored_name
from minillava.checkpoint.parts import open_parts
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.write import Planned, as_json, cast, check_written, write_weights
from minillava.checkpoint.write_json import (
    generation_config,
    original_config,
    preprocessor_config,
    tokenizer_config,
)
from minillava.config import LlavaConfig
from minillava.files.disk import write_whole
from minillava.files.hub import CLIP_RELEASE
from minillava.files.new_folder import new_folder
from minillava.files.tensors import open_file
from minillava.files.tokenizer_files import MODEL_NAME
from minillava.finetune import processes
from minillava.finetune.learning import part_of
from minillava.finetune.lora import lora_layers
from minillava.finetune.medusa import save_heads
from minillava.finetune.recipe import Recipe
from minillava.finetune.tokens import token_files, whole_config, whole_tables
from minillava.llava import Llava
from minillava.projector import Projector

LAYOUTS = ("hf", "llava")

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

IN_HF = rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(PRODUCTS)})"
"""The adapted layers of transformers' model; the vision tower has layers of the same ends."""


SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt")


def save_learnt(
    model: Llava, recipe: Recipe, layout: str, base: str, folders: Folders, out: Path
) -> None:
    """The files of what a LoRA, a projector or heads learnt. layout: hf, the names of transformers'
    LLaVA, or llava, those of the original. base: what the model that it was learnt on is called.
    Raises OSError, or ValueError if a file does not read back as it was written."""
    if recipe.learn == "medusa":
        save_heads(model, out)
        return
    if recipe.learn == "projector" or layout == "llava":
        config = original_config(model.config, torch.float32)
        config["mm_vision_tower"] = config["mm_vision_tower"] or CLIP_RELEASE
        write_whole(out / "config.json", as_json({**config, "_name_or_path": base}))
    if recipe.learn == "projector":
        tensors = projector_tensors(model.projector, model.config, "llava", "")
        _write(out / PROJECTOR_NAME, tensors, pickled(tensors))
        return
    tensors = {
        f"base_model.model.{_name(name, layout)}.{half}.weight": weight.detach().contiguous()
        for name, layer in lora_layers(model).items()
        for half, weight in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }
    projector = projector_tensors(model.projector, model.config, layout, "base_model.model.")
    whole = projector | {
        f"base_model.model.{_table(name, layout)}": table
        for name, table in whole_tables(model, folders).items()
    }
    if layout == "hf":
        tensors |= whole
    else:
        _write(out / REST_NAME, whole, pickled(whole))
    _write(out / WEIGHTS_NAMES[0], tensors, save(tensors, metadata={"format": "pt"}))
    files = {path.name: path.read_bytes() for path in side_files(folders)}
    for name, content in (files | grown_files(model, recipe, folders)).items():
        if name not in ("config.json", "generation_config.json"):
            write_whole(out / name, content)
    write_whole(out / CONFIG_NAME, as_json(_adapter_config(recipe, layout, base)))


def grown_files(model: Llava, recipe: Recipe, folders: Folders) -> dict[str, bytes]:
    """The files that differ from the base's where a run adds tokens."""
    if not recipe.add_tokens:
        return {}
    config = whole_config(folders, model.config.text.vocab_size)
    return token_files(folders, recipe.add_tokens) | config


def side_files(folders: Folders) -> list[Path]:
    """The files of the tokenizer, and of how pictures are prepared, of the folder begun from; its
    config.json comes last."""
    files = {}
    for folder in (folders.model_base, folders.weights):
        for path in sorted(folder.iterdir()) if folder else []:
            own = not path.name.startswith(("adapter_", "trainer_"))
            if path.suffix in SIDE_SUFFIXES and own and "index" not in path.name:
                files[path.name] = path
    return sorted(files.values(), key=lambda path: path.name == "config.json")


def _write(path: Path, tensors: dict[str, Tensor], content: bytes) -> None:
    """A file of tensors, opened again. Raises OSError, or ValueError if it holds others."""
    write_whole(path, content)
    found = {stored.name: stored.shape for stored in open_file(path)}
    if found != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"{path}: does not read back as it was written; check the disk")


def _name(name: str, layout: str) -> str:
    """A module of ours as transformers 5 or the original LLaVA call it."""
    return f"model.{name}" if layout == "hf" else stored_name(name, "original", 0)


def _table(name: str, layout: str) -> str:
    """A table of ours as PEFT calls it, whole, on either model."""
    return name.removeprefix("language_model.") if "head" in name else _name(name, layout)


def projector_tensors(
    projector: Projector, config: LlavaConfig, layout: str, prefix: str
) -> dict[str, Tensor]:
    """The weights of a projector by the names of a layout."""
    found = {}
    for name, tensor in projector.state_dict().items():
        if layout == "hf":
            stored = f"model.multi_modal_projector.{name}"
        else:
            stored = stored_name(f"projector.{name}", "original", config.projector_layers)
        found[f"{prefix}{stored}"] = tensor.detach().contiguous()
    return found


def _adapter_config(recipe: Recipe, layout: str, base: str) -> dict[str, object]:
    """adapter_config.json as PEFT writes it."""
    kept = ["multi_modal_projector"]
    tables = ["embed_tokens", "lm_head"] if recipe.add_tokens else []
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian" if recipe.init == "gaussian" else True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "modules_to_save": [*kept, *tables] if layout == "hf" else None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "target_modules": IN_HF if layout == "hf" else list(PRODUCTS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": recipe.rslora,
    }


def pickled(tensors: dict[str, Tensor]) -> bytes:
    """A .bin, the form in which LLaVA looks for these files."""
    file = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, file)
    return file.getvalue()


def whole_weights(model: Llava, folders: Folders) -> dict[str, Callable[[], Tensor]]:
    """Our names of all weights that differ from the base's, and what makes them: a LoRA is added to
    its weight as minillava and PEFT do it when they open one, in float32. Where weights are cut up,
    all processes must ask, and each gets them whole."""
    layers = lora_layers(model)
    made: dict[str, Callable[[], Tensor]] = {
        f"{name}.weight": lambda layer=layer: (  # type: ignore[misc]
            layer.base.weight.float() + (layer.lora_B @ layer.lora_A) * layer.scale
        ).detach()
        for name, layer in layers.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name and not name.endswith(".added"):
            whole = processes.whole(parameter.detach())
            made[name] = lambda p=whole: p  # type: ignore[misc]
    for name, table in whole_tables(model, folders).items():
        made[name] = lambda p=table: p  # type: ignore[misc]
    return made


def check_base(folders: Folders) -> None:
    """Raises ValueError for a base like which no model can be written: one that is quantised, or
    that lies in several folders and has no tokenizer.model."""
    language = folders.model_base or folders.weights
    if StoredWeights(language).quantised:
        raise ValueError(f"{language}: is quantised; start from the weights it was made of")
    named = (folder / MODEL_NAME for folder in folders.of_tokenizer)
    if folders != Folders(folders.weights) and not any(path.exists() for path in named):
        raise ValueError(
            f"{folders.weights}: is a model in several folders, none of which has a {MODEL_NAME}, "
            "and it would be written as one; put that file beside it"
        )


def save_whole(
    learnt: dict[str, Callable[[], Tensor]],
    folders: Folders,
    target: Path,
    grown: dict[str, bytes] | None = None,
) -> None:
    """The whole model, with the learnt weights (`whole_weights`) in place of the base's, complete
    under its name or not there: a copy of the base's folder, or in LLaVA's own layout if the base
    lies in several folders. grown: files in place of the base's (`grown_files`). Raises ValueError
    or OSError; what was there before then stays."""
    new, before = (target.with_name(f"{target.name}{end}") for end in (".new", ".before"))
    if before.exists() and not target.exists():  # killed between the two renames below
        before.rename(target)
    for left in (new, before):  # by a run that was killed here
        if left.exists():
            shutil.rmtree(left)
    tensors, files = _like(learnt, folders) if folders == Folders(folders.weights) else _joined(
        learnt, folders
    )  # fmt: skip
    with new_folder(new) as folder:
        write_weights(tensors, folder)
        check_written(tensors, folder)
        for name, content in (files | (grown or {})).items():
            (folder / name).write_bytes(content)
    if target.exists():
        target.rename(before)
    new.rename(target)
    if before.exists():
        shutil.rmtree(before)


Plan = tuple[dict[str, Planned], dict[str, bytes]]
"""The tensors of a folder, and its other files."""


def _like(learnt: dict[str, Callable[[], Tensor]], folders: Folders) -> Plan:
    """A folder with the names and dtypes of the base's one folder."""
    tensors = {}
    for name, found in StoredWeights(folders.weights).tensors.items():
        make, shape = found.read, found.shape
        if name in learnt:
            make = _cast(learnt[name], found.name, found.dtype)
            shape = tuple(learnt[name]().shape) if name in TABLES else shape
        tensors[found.name] = Planned(shape, found.dtype, make, name)
    return tensors, {path.name: path.read_bytes() for path in side_files(folders)}


def _joined(learnt: dict[str, Callable[[], Tensor]], folders: Folders) -> Plan:
    """One folder in LLaVA's own layout for a model that lies in several; a tower that is in it."""
    parts = open_parts(folders)
    config, weights, tensors = parts.config, parts.weights, {}
    for name in weights.tensors:
        dtype = weights.stored_dtype(name)
        stored = stored_name(name, "original", config.projector_layers)
        make: Callable[[], Tensor] = partial(weights.read, name)
        if name in learnt:
            make = _cast(learnt[name], stored, dtype)
        tensors[stored] = Planned(weights.shape(name), dtype, make, name)
    tokenizer, dtype = parts.tokenizer, weights.dtype()
    generation = folders.find("generation_config.json")
    return tensors, {
        "generation_config.json": as_json(generation_config(generation, config, tokenizer)),
        "preprocessor_config.json": as_json(preprocessor_config(parts.image_processor)),
        "tokenizer.model": tokenizer.sentencepiece.serialized_model_proto(),
        "tokenizer_config.json": as_json(tokenizer_config(config, tokenizer, "original")),
        "config.json": as_json(original_config(config, dtype)),
    }


def _cast(make: Callable[[], Tensor], name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: cast(lambda kind: make().to("cpu", kind), name, dtype)


def count(model: Llava, learning: dict[str, Tensor]) -> dict[str, int]:
    """The number of parameters that learn, by part."""
    parts: dict[str, int] = {}
    for name, parameter in learning.items():
        part = part_of(name)
        parts[part] = parts.get(part, 0) + math.prod(parameter.shape)
    return parts
