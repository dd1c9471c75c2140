"""What to write for a folder of weights: which tensors under which names, and the files beside
them."""

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minillava.attention import eager
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import COMPUTED, TABLES, stored_name
from minillava.checkpoint.parts import (
    collect_parts,
    open_checkpoint,
    open_tokenizer,
    read_model_config,
)
from minillava.checkpoint.side_json import read_image_processor
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.write import Planned, as_json, cast
from minillava.checkpoint.write_json import (
    check_original,
    generation_config,
    hub_config,
    original_config,
    preprocessor_config,
    processor_config,
    tokenizer_config,
)
from minillava.config import IM_START, LlavaConfig
from minillava.fast.quantize import INT4_PACKED, PARTS, pack_here, quantize_tensor, stored_shapes
from minillava.files.disk import read_json
from minillava.files.hub import CLIP_RELEASE
from minillava.files.rows import grow_rows
from minillava.files.tensors import open_folder
from minillava.files.tokenizer_files import MODEL_NAME, PAD_MARKER, SIDE_NAMES, find_tokenizer
from minillava.llava import Llava
from minillava.options import dtype_name
from minillava.prompt import IMAGE_MARKER
from minillava.tokenizer import Tokenizer

SIDE_FILES = (".json", ".jinja", ".md", ".model", ".txt")


class Job(NamedTuple):
    """A folder to be written: its tensors by their new names, its other files, and how its
    config.json must read."""

    tensors: dict[str, Planned]
    files: dict[str, bytes]
    config: LlavaConfig
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.tensors.values()) + sum(map(len, self.files.values()))


def copied(source: Path, dtype: torch.dtype | None) -> Job:
    """Every tensor and side file of a folder as they are; at another dtype, config.json says so."""
    config, tensors = read_config(source), {}
    for stored in open_folder(source):
        found = stored.file.read(stored.name)  # mapped, not read
        as_is = dtype is None or not found.is_floating_point() or stored.name.endswith(COMPUTED)
        kept = found.dtype if as_is else dtype
        tensors[stored.name] = Planned(
            stored.shape, kept, partial(cast, found.to, stored.name, kept)
        )
    files = _side_files(source)
    if dtype is not None:
        raw = read_json(source / "config.json")
        for part in (raw, raw.get("text_config", {})):
            part.update(dict.fromkeys({"torch_dtype", "dtype"} & part.keys(), dtype_name(dtype)))
        files["config.json"] = as_json(raw)
    return Job(tensors, files, config, [])


def _side_files(folder: Path) -> dict[str, bytes]:
    """What a folder has besides weights and what made them."""
    side = [p for p in folder.iterdir() if p.suffix in SIDE_FILES or p.name.startswith("LICENSE")]
    side = [p for p in side if not p.name.startswith(("adapter_", "trainer_"))]
    return {
        p.name: p.read_bytes() for p in side if p.is_file() and not p.name.endswith(".index.json")
    }


def renamed(folders: Folders, to: str, dtype: torch.dtype | None, quantize: str | None) -> Job:
    """The whole model, under other names and in another dialect. Raises ValueError for what is
    quantised, or does not fit."""
    source, homes = folders.weights, folders.of_tokenizer
    config = read_model_config(folders)
    weights = collect_parts(folders, config.text.vocab_size)
    if weights.quantised:
        raise ValueError(f"{source}: is quantised; convert the weights that it was made from")
    config, linear = _check(folders, config)
    tokenizer, (_, beside) = open_tokenizer(homes, config), find_tokenizer(homes)
    config = replace(config, vision_stated=True)  # as the config.json that is written will do
    new, notes = (_for_hub if to == "hf" else _for_original)(config, tokenizer, source)
    planned = _plan(weights, linear if quantize else set(), new.text.vocab_size, dtype, quantize)
    made = _unused_tower(config, planned) if to == "hf" else {}
    files = _kept_files(folders, beside, to)
    # or the one that is kept does not know the new rows
    if "tokenizer_config.json" not in files or new.text.vocab_size > config.text.vocab_size:
        files["tokenizer_config.json"] = as_json(tokenizer_config(new, tokenizer, to))
    notes += _notes(len(made), quantize, weights, to == "hf" and "tokenizer.json" not in files)
    files |= _new_files(folders, new, tokenizer, to, dtype or weights.dtype())
    tensors = {
        stored_name(name, to, config.projector_layers): tensor
        for name, tensor in {**planned, **made}.items()
    }
    return Job(tensors, files, new, notes)


def _check(folders: Folders, config: LlavaConfig) -> tuple[LlavaConfig, set[str]]:
    """The config of the weights as they are opened, and the names of linear layers. Raises
    ValueError for weights that do not fit it."""
    needed, config = open_checkpoint(folders, config)
    needed.deltas.clear()  # which change no shape, and take time
    model = build_model(config, needed, eager, dtype=needed.dtype(), device="meta")
    modules = model.named_modules()
    return config, {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}


def _plan(
    weights: StoredWeights,
    quantised: set[str],
    vocabulary: int,
    dtype: torch.dtype | None,
    kind: str | None,
) -> dict[str, Planned]:
    """The tensors by our names; those of the language model among `quantised` as int8 or int4."""
    planned = {}
    for name in weights.tensors:
        shape, kept = weights.shape(name), dtype or weights.stored_dtype(name)
        if name in TABLES:
            shape = (vocabulary, *shape[1:])
        if kind and name in quantised and name.startswith("language_model."):
            module = name.removesuffix(".weight")
            for suffix, (size, stored) in stored_shapes(shape, kind).items():
                suffix = INT4_PACKED if suffix == "weight_int4" else suffix
                make = partial(_make_part, weights, name, shape[0], kind, suffix)
                ours = name if suffix in PARTS else None
                planned[f"{module}.{suffix}"] = Planned(size, stored, make, ours)
        else:
            make = partial(_make, weights, name, kept, shape[0])
            planned[name] = Planned(shape, kept, make, name)
    return planned


def _make(weights: StoredWeights, name: str, dtype: torch.dtype, rows: int) -> Tensor:
    tensor = cast(partial(weights.read, name), weights.tensors[name].name, dtype)
    return grow_rows(tensor, rows) if name in TABLES else tensor


def _make_part(weights: StoredWeights, name: str, rows: int, kind: str, suffix: str) -> Tensor:
    return _quantised(weights, name, rows, kind)[suffix]


@lru_cache(maxsize=1)  # the parts of a weight are wanted one after the other
def _quantised(weights: StoredWeights, name: str, rows: int, kind: str) -> dict[str, Tensor]:
    tensor = weights.read(name, transient=True)
    grown = grow_rows(tensor, rows) if name in TABLES else tensor
    return pack_here(quantize_tensor(grown, kind))


def _unused_tower(config: LlavaConfig, planned: dict[str, Planned]) -> dict[str, Planned]:
    """What is missing of the tower beyond the features that LLaVA uses: blocks of zeros, which add
    nothing to their input, and the norm at the end."""
    with torch.device("meta"):
        whole = Llava(replace(config, feature_layer=-1), eager).vision_tower.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    shapes |= dict.fromkeys(
        ("post_layernorm.weight", "post_layernorm.bias"), (config.vision.hidden_size,)
    )
    dtype, made = planned["vision_tower.embeddings.patch_embedding.weight"].dtype, {}
    for name, shape in shapes.items():
        if f"vision_tower.{name}" not in planned:
            value = float("norm" in name and name.endswith("weight"))
            make = partial(torch.full, shape, value, dtype=dtype)
            made[f"vision_tower.{name}"] = Planned(shape, dtype, make, f"vision_tower.{name}")
    return made


def _notes(made: int, quantize: str | None, weights: StoredWeights, cuts: bool) -> list[str]:
    """What the owner should know of the tensors. made: how many there were not. cuts: whether
    transformers has tokenizer.model alone."""
    notes = []
    if made:
        notes.append(
            f"made {made} tensors of the vision tower which transformers wants and LLaVA does not "
            "use: blocks that pass their input on, and a norm"
        )
    if quantize:
        notes.append(f"{quantize} in a form that only minillava reads")
    notes += weights.notes
    if weights.unused:
        notes.append(
            f"left out {len(weights.unused)} stored tensors (tables that are computed, the text "
            f"half of a CLIP, a tower that another replaces): {weights.unused[0]} is one"
        )
    if cuts:
        notes.append(
            "from tokenizer.model alone, transformers 5 cuts some texts otherwise than the hub's "
            "tokenizer.json says: copy that file from a llava-hf release of the same vocabulary"
        )
    return notes


# ------------------------------------------------------------------------------------------- files


def _kept_files(folders: Folders, beside: Path, to: str) -> dict[str, bytes]:
    """Side files of the same dialect as they are. beside: the folder of the tokenizer."""
    raw = read_json(folders.find("config.json") / "config.json")
    if ("text_config" in raw) != (to == "hf"):
        return {}
    files, others = _side_files(folders.model_base or folders.weights), _side_files(beside)
    return {
        **{name: content for name, content in files.items() if name not in SIDE_NAMES},
        **{name: content for name, content in others.items() if name in SIDE_NAMES},
    }


def _new_files(
    folders: Folders,
    config: LlavaConfig,
    tokenizer: Tokenizer,
    to: str,
    dtype: torch.dtype,
) -> dict[str, bytes]:
    """Side files that the new config changes."""
    raw = read_json(folders.find("config.json") / "config.json")
    model, _ = find_tokenizer(folders.of_tokenizer)
    generation = folders.find("generation_config.json")
    files = {
        "config.json": as_json((hub_config if to == "hf" else original_config)(config, dtype)),
        "generation_config.json": as_json(generation_config(generation, config, tokenizer)),
        "preprocessor_config.json": as_json(
            preprocessor_config(read_image_processor(folders.of_pictures, config))
        ),
    }
    # a tokenizer.json that is kept as it is needs no other file beside it
    if model.exists() or ("text_config" in raw) != (to == "hf"):
        files[MODEL_NAME] = tokenizer.sentencepiece.serialized_model_proto()
    if to == "hf":
        files["processor_config.json"] = as_json(processor_config(config))
    if config.added_tokens:
        files["added_tokens.json"] = as_json(tokenizer.added)
    return files


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
    if config.image_aspect_ratio == "crop":
        notes.append(
            "the hub's config.json cannot say image_aspect_ratio; now use --image-aspect-ratio crop"
        )
    aspect = "anyres" if config.grid else "squash" if config.vision.siglip else "pad"
    new = replace(config, image_aspect_ratio=aspect, vision_tower_name=None, added_tokens=())
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
    try:
        check_original(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return replace(config, vision_tower_name=config.vision_tower_name or CLIP_RELEASE), []
