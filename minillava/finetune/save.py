"""What was learnt, as others open it: a LoRA for PEFT or for LLaVA, a projector, a whole model."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from minillava.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAMES
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import PROJECTOR_NAME, REST_NAME, stored_name
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.write import Planned, as_json, cast, check_written, write_weights
from minillava.checkpoint.write_json import original_config
from minillava.files.disk import write_whole
from minillava.files.new_folder import new_folder
from minillava.finetune.lora import lora_layers
from minillava.finetune.medusa import save_heads
from minillava.finetune.recipe import Recipe
from minillava.llava import Llava

LAYOUTS = ("hf", "llava")

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

IN_HF = rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(PRODUCTS)})"
"""The adapted layers of transformers' model; the vision tower has layers of the same ends."""


def save_learnt(model: Llava, recipe: Recipe, layout: str, base: str, out: Path) -> None:
    """The files of what a LoRA, a projector or heads learnt. layout: hf, the names of transformers'
    LLaVA, or llava, those of the original. base: the model that it was learnt on. Raises
    OSError."""
    if recipe.learn == "medusa":
        save_heads(model, out)
        return
    if recipe.learn == "projector" or layout == "llava":
        config = original_config(model.config, torch.float32)
        config["mm_vision_tower"] = config["mm_vision_tower"] or "openai/clip-vit-large-patch14-336"
        write_whole(out / "config.json", as_json(config))
    if recipe.learn == "projector":
        write_whole(out / PROJECTOR_NAME, _pickled(_projector(model, "llava", "")))
        return
    tensors = {
        f"base_model.model.{_name(name, layout)}.{half}.weight": weight.detach().contiguous()
        for name, layer in lora_layers(model).items()
        for half, weight in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }
    projector = _projector(model, layout, "base_model.model.")
    if layout == "hf":
        tensors |= projector
    else:
        write_whole(out / REST_NAME, _pickled(projector))
    write_whole(out / WEIGHTS_NAMES[0], save(tensors, metadata={"format": "pt"}))
    write_whole(out / CONFIG_NAME, as_json(_adapter_config(recipe, layout, base)))


def _name(name: str, layout: str) -> str:
    """A module of ours as transformers 5 or the original LLaVA call it."""
    return f"model.{name}" if layout == "hf" else stored_name(name, "original", 0)


def _projector(model: Llava, layout: str, prefix: str) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.projector.state_dict().items():
        if layout == "hf":
            stored = f"model.multi_modal_projector.{name}"
        else:
            stored = stored_name(f"projector.{name}", "original", model.config.projector_layers)
        found[f"{prefix}{stored}"] = tensor.detach().contiguous()
    return found


def _adapter_config(recipe: Recipe, layout: str, base: str) -> dict[str, object]:
    """adapter_config.json as PEFT writes it."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "modules_to_save": ["multi_modal_projector"] if layout == "hf" else None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "target_modules": IN_HF if layout == "hf" else list(PRODUCTS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _pickled(tensors: dict[str, Tensor]) -> bytes:
    """A .bin, the form in which LLaVA looks for these files."""
    file = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, file)
    return file.getvalue()


def whole_weights(model: Llava) -> dict[str, Callable[[], Tensor]]:
    """Our names of all weights that differ from the base's, and what makes them: a LoRA is added to
    its weight as minillava and PEFT do it when they open one, in float32."""
    layers = lora_layers(model)
    made: dict[str, Callable[[], Tensor]] = {
        f"{name}.weight": lambda layer=layer: (  # type: ignore[misc]
            layer.base.weight.float() + (layer.lora_B @ layer.lora_A) * layer.scale
        ).detach()
        for name, layer in layers.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            made[name] = lambda p=parameter: p.detach()  # type: ignore[misc]
    return made


def check_one_folder(folders: Folders) -> None:
    """Raises ValueError for a base that lies in several folders, or is quantised: a model can only
    be written like one of plain weights."""
    if folders != Folders(folders.weights):
        raise ValueError(
            f"{folders.weights}: the model lies in several folders, so there is none to write it "
            "like; put it into one with: python -m minillava.convert"
        )
    if StoredWeights(folders.weights).quantised:
        raise ValueError(f"{folders.weights}: is quantised; start from the weights it was made of")


def save_whole(model: Llava, folders: Folders, target: Path) -> None:
    """A copy of the base's folder, with the learnt weights in place of the base's. Raises
    ValueError as check_one_folder does."""
    stored, learnt = StoredWeights(folders.weights), whole_weights(model)
    tensors = {}
    for name, found in stored.tensors.items():
        make: Callable[[], Tensor] = found.read
        if name in learnt:
            make = _cast(learnt[name], found.name, found.dtype)
        tensors[found.name] = Planned(found.shape, found.dtype, make, name)
    with new_folder(target) as folder:
        write_weights(tensors, folder)
        check_written(tensors, folder)
        for path in sorted(folders.weights.iterdir(), key=lambda path: path.name == "config.json"):
            if path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())


def _cast(make: Callable[[], Tensor], name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: cast(lambda kind: make().to("cpu", kind), name, dtype)


def count(model: Llava, learning: dict[str, Tensor]) -> dict[str, int]:
    """The number of parameters that learn, by part."""
    parts: dict[str, int] = {}
    for name, parameter in learning.items():
        part = "projector" if name.startswith("projector.") else "language model"
        part = "heads" if name.startswith("medusa.") else part
        part = "LoRA" if ".lora_" in name else part
        parts[part] = parts.get(part, 0) + math.prod(parameter.shape)
    return parts
