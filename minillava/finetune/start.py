"""The model that a run begins from: opened to learn, or put together from a language model and a
CLIP, with a projector that knows nothing yet."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from minillava.assistant import Assistant, load
from minillava.attention import ATTENTION
from minillava.checkpoint.config_json import is_language_model, read_config, read_text_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import PROJECTOR_NAME
from minillava.checkpoint.parts import open_parts
from minillava.checkpoint.write import as_json
from minillava.checkpoint.write_json import original_config
from minillava.cli.messages import Messages
from minillava.config import CLIP_LARGE_336, LlavaConfig
from minillava.fast.processor import has_fast_bfloat16
from minillava.files.hub import CLIP_RELEASE, RELEASE
from minillava.finetune.recipe import Recipe
from minillava.finetune.save import pickled, projector_tensors
from minillava.finetune.tokens import tokenizer_with
from minillava.projector import Projector


@contextmanager
def begun(folders: Folders, seed: int) -> Iterator[Folders]:
    """The folders of a whole model. For a language model alone, as Vicuna is, and the CLIP of
    --vision-tower: with a fresh projector of two layers, nn.Linear's own start by the seed, in a
    folder that is gone afterwards. Raises ValueError if there is no CLIP."""
    alone = folders.model_base is None and (folders.weights / "config.json").exists()
    if not alone or not is_language_model(folders.weights):
        yield folders
        return
    if folders.vision_tower is None:
        raise ValueError(
            f"{folders.weights}: is a language model alone; give --vision-tower, the folder of a "
            f"CLIP such as {CLIP_RELEASE}, and a fresh projector is put between them"
        )
    text = read_text_config(folders.weights)
    config = LlavaConfig(CLIP_LARGE_336, text, vision_tower_name=CLIP_RELEASE)
    with tempfile.TemporaryDirectory(prefix="projector-") as name:
        folder = Path(name)
        _write_config(config, folder)
        config = read_config(folder, folders.vision_tower)  # with the sizes of this CLIP
        _write_config(config, folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = Projector(config)
        tensors = projector_tensors(projector, config, "llava", "")
        (folder / PROJECTOR_NAME).write_bytes(pickled(tensors))
        yield Folders(folder, folders.vision_tower, folders.weights)


def _write_config(config: LlavaConfig, folder: Path) -> None:
    (folder / "config.json").write_bytes(as_json(original_config(config, torch.float32)))


def settled(recipe: Recipe, folders: Folders, device: str, messages: Messages) -> Recipe:
    """A recipe without `auto`: eager attention on a CPU, else fused; bfloat16 on a GPU,
    and on a CPU that is fast in it if the weights are stored so; else float32, which changes no
    stored weight."""
    parts = open_parts(folders)
    if parts.config.grid:
        kind = "LLaVA-OneVision" if parts.config.most_tiles else "LLaVA-1.6"
        raise ValueError(
            f"{folders.weights}: is a {kind}, whose tiles are not trained here; train a "
            f"LLaVA-1.5 such as {RELEASE}, or a LoRA elsewhere and pass it with --adapter"
        )
    stored = parts.weights.dtype()
    if recipe.attention == "auto":
        recipe = replace(recipe, attention="eager" if device.startswith("cpu") else "fused")
    if recipe.dtype == "auto":
        fits = has_fast_bfloat16() and stored == torch.bfloat16
        narrow = device.startswith("cuda") or (device == "cpu" and fits)
        recipe = replace(recipe, dtype="bfloat16" if narrow else "float32")
    if recipe.dtype == "bfloat16" and stored == torch.float16:
        messages.note(
            "the weights are stored in float16; frozen ones are rounded to bfloat16, by up to one "
            "part in 512 (--dtype float32 keeps them)"
        )
    return recipe


def open_model(recipe: Recipe, folders: Folders, device: str) -> Assistant:
    """The model with its plain layers, since the layers that are fast at inference do not learn.
    What will learn is read in float32, whatever the dtype of the rest."""
    whole = recipe.learn in ("language", "everything")
    assistant = load(
        folders.weights,
        device=device,
        dtype="float32" if whole and recipe.dtype == "bfloat16" else recipe.dtype,
        attention="eager",
        quantize=recipe.quantize,
        vision_tower=folders.vision_tower,
        model_base=folders.model_base,
        template=recipe.template,
        image_aspect_ratio=recipe.aspect,
    )
    if recipe.add_tokens:
        assistant.tokenizer = tokenizer_with(folders, recipe.add_tokens)
    model = assistant.model
    if recipe.dtype == "bfloat16":
        weights = open_parts(folders).weights
        model.projector.float()
        with torch.no_grad():
            for name, parameter in model.projector.named_parameters():
                parameter.copy_(weights.read(f"projector.{name}", torch.float32))
    if recipe.attention == "fused":
        model.language_model.attend = ATTENTION["fused"]
    return assistant
