"""What a folder of weights holds and lacks, from the headers of its files: `python -m
minillava.inspect DIR`.

Names, shapes and dtypes stand at the beginning of a file, and no more is read, so that this takes
seconds where opening takes minutes. With --doctor the model is opened and asked, too (doctor.py).
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minillava.attention import fused
from minillava.checkpoint.build import compare, shapes_of
from minillava.checkpoint.config_json import LANGUAGE_MODELS, LLAVAS, read_config
from minillava.checkpoint.folders import Folders, find_folders
from minillava.checkpoint.names import (
    CLIP_PREFIXES,
    CLIP_TEXT_HALF,
    PROJECTOR_NAME,
    REST_NAME,
    part_of_model,
)
from minillava.checkpoint.parts import collect_parts, open_checkpoint, open_tokenizer
from minillava.checkpoint.side_json import read_image_processor
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.towers import settle
from minillava.config import LlavaConfig
from minillava.files.disk import read_json
from minillava.files.hub import CLIP_RELEASE, DOWNLOAD
from minillava.files.tensors import DTYPES, Stored, open_file, weight_files
from minillava.files.tokenizer_files import find_tokenizer
from minillava.inspection.memory import memory_table
from minillava.options import dtype_name
from minillava.prompt import DEFAULT_PROMPT, place_images, render
from minillava.templates import DEFAULT_TEMPLATE, find_template, template_of
from minillava.tiles.model import network
from minillava.tiles.pictures import most_positions

FILES = {  # beside the weights -> what a missing one means
    "config.json": "needed",
    "tokenizer.model": "needed",
    "tokenizer_config.json": "legacy is then true",
    "generation_config.json": "the end and pad tokens are then those of config.json",
    "preprocessor_config.json": "pictures are then normalised by CLIP's own numbers",
}

# dtype in which the weights are stored -> row of the memory table
QUANTISED = {"uint8": "int4", "int8": "int8"}


@dataclass
class Report:
    """What could be found out: the fields of --json. `missing`, `misshapen`, `unexpected` and
    `unneeded` are about tensors, `problems` are sentences about all else."""

    folder: str
    dialect: str
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # our names
    misshapen: list[str] = field(default_factory=list)  # sentences
    unexpected: list[str] = field(default_factory=list)  # stored names
    unneeded: list[str] = field(default_factory=list)  # stored names
    parts: dict[str, dict] = field(default_factory=dict)
    files: dict[str, bool] = field(default_factory=dict)
    dtypes: dict[str, dict] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)  # files of weights
    notes: list[str] = field(default_factory=list)  # about files that lie there and are not read
    adapted: int = 0  # weights that a LoRA changes when the model is opened
    network: dict = field(default_factory=dict)
    picture: dict = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)
    template: dict = field(default_factory=dict)
    memory: dict[str, dict] = field(default_factory=dict)
    tensors: list[dict] = field(default_factory=list)
    doctor: list[dict] = field(default_factory=list)

    @property
    def loadable(self) -> bool:
        return not (self.problems or self.missing or self.misshapen or self.unexpected)

    def attempt(self, call: Callable, *given):
        """What the call returns, or None if it fails: the lines of its message become problems."""
        try:
            return call(*given)
        except (ValueError, OSError) as error:
            self.problems += [line.strip() for line in str(error).splitlines()]
            return None


def inspect_folder(
    weights: str | Path,
    *,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
    template: str | None = None,
    system: str | None = None,
    image_aspect_ratio: str | None = None,
) -> Report:
    """All that can be said of weights without reading them. Arguments as for `minillava.load`,
    which opens them if the report is `loadable`, and else does not. Raises FileNotFoundError or
    ValueError if a folder does not exist."""
    folders = find_folders(weights, revision, vision_tower, model_base, adapter)
    report = Report(str(folders.weights), dialect_of(folders))
    report.template = _template(template or DEFAULT_TEMPLATE, system)
    report.files = _files(folders)
    config = report.attempt(read_config, folders.find("config.json"), folders.vision_tower)
    checkpoint, tensors, config = _open_weights(report, folders, config)
    _describe_tensors(report, tensors, checkpoint)
    if config is not None:
        shapes = weight_shapes(config)
        report.network = _network(config)
        report.memory = memory_table(config, shapes)
        processor = report.attempt(
            read_image_processor, folders.of_pictures, config, image_aspect_ratio
        )
        if processor is not None:
            report.picture = {"side": processor.image_size, "aspect": processor.aspect}
        if checkpoint is not None:
            _compare(report, checkpoint, shapes)
    if checkpoint is not None:
        report.adapted, report.unneeded = len(checkpoint.deltas), checkpoint.unused
        report.notes = checkpoint.notes
        _say_what_to_get(report, checkpoint, None if config is None else config.vision_tower_name)
    _describe_tokenizer(report, folders.of_tokenizer, config)
    known = "" if config is None else config.template
    fitting = template or known or template_of(report.tokenizer.get("added", ()))
    report.template = {**_template(fitting, system), "default": template is None}
    return report


def _files(folders: Folders) -> dict[str, bool]:
    """Which of FILES there are."""
    found = {name: (folders.find(name) / name).exists() for name in FILES}
    model, beside = find_tokenizer(folders.of_tokenizer)
    for path in (model, beside / "tokenizer_config.json"):
        found[path.name] = path.exists()
    # transformers 5 writes processor_config.json instead
    found["preprocessor_config.json"] |= any(folders.of_pictures.glob("p*rocessor_config.json"))
    return found


def _template(name: str, system: str | None) -> dict:
    question = place_images(DEFAULT_PROMPT, 1)
    return {"name": name, "prompt": str(render(find_template(name), [(question, None)], system))}


def dialect_of(folders: Folders) -> str:
    """What kind of model this is, by its files and the words of its config.json."""
    folder, base = folders.weights, folders.model_base
    if part := part_of_model(folder):
        kind = "a projector from pre-training" if part == "a projector" else part
        return (
            f"{kind} alone, without its base" if base is None else f"{kind}, on the base in {base}"
        )
    try:
        raw = read_json(folder / "config.json")
    except (ValueError, OSError):
        return "unknown: it has no config.json that can be read"
    kind = raw.get("model_type")
    if kind in LLAVAS:
        return (
            "LLaVA as on the hub (llava-hf)"
            if "text_config" in raw
            else "the original LLaVA (liuhaotian)"
        )
    if kind in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
        return "a plain CLIP: the --vision-tower of a LLaVA, not a LLaVA by itself"
    if kind in LANGUAGE_MODELS:
        what = "a plain language model: the --model-base of a projector or a LoRA"
        return f"{what}, not a LLaVA by itself"
    return f"unknown: model_type is {kind!r}"


def _open_weights(
    report: Report, folders: Folders, config: LlavaConfig | None
) -> tuple[StoredWeights | None, dict[str, Stored], LlavaConfig | None]:
    """The checkpoint, its tensors by our names, and the config: as `load` opens it, else without
    asking whether it is whole. Where not even that works: None, and what is in those of its files
    that can be opened, by stored names."""
    try:
        if config is not None:
            checkpoint, config = open_checkpoint(folders, config)
            return checkpoint, checkpoint.tensors, config
    except (ValueError, OSError):
        pass  # what is wrong is found again below, part by part
    known = len(report.problems)
    if report.dialect.startswith("a plain CLIP"):
        checkpoint = report.attempt(StoredWeights, folders.weights, CLIP_PREFIXES, CLIP_TEXT_HALF)
    else:
        checkpoint = report.attempt(
            collect_parts, folders, None if config is None else config.text.vocab_size
        )
    if checkpoint is not None:
        settled = None if config is None else report.attempt(settle, config, checkpoint)
        return checkpoint, checkpoint.tensors, settled or config
    tensors, damaged = {}, []
    for path in _weight_files(folders.weights):
        try:
            tensors |= {stored.name: stored for stored in open_file(path)}
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        report.problems[known:] = damaged  # `collect_parts` stops at the first
    return None, tensors, config


def _weight_files(folder: Path) -> list[Path]:
    """The files that are read, where that can be told, or else those that are there."""
    with suppress(OSError, ValueError):
        read, _ = weight_files(folder)
        if read:
            return [path for path in read if path.suffix != ".json"]
    patterns = (
        "model*.safetensors",
        "pytorch_model*.bin",
        "adapter_model.*",
        PROJECTOR_NAME,
        REST_NAME,
    )
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def weight_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every weight of the network, which for this is built without memory."""
    with torch.device("meta"):
        model = network(config, fused)
    return shapes_of(model)


def part_of(name: str) -> str:
    """The part a tensor belongs to: by our name, or by what stored names have in common."""
    if ".lora_" in name:
        return "adapter"
    if "projector" in name:
        return "projector"
    return (
        "vision tower"
        if "vision_tower." in name or name.startswith("vision_model.")
        else "language model"
    )


def _describe_tensors(
    report: Report, tensors: dict[str, Stored], checkpoint: StoredWeights | None
) -> None:
    """Numbers by part and by dtype, the list of --keys, and the files that they are in."""
    report.read = sorted({str(stored.path) for stored in tensors.values()})
    report.parts = {
        part: {"tensors": 0, "parameters": 0}
        for part in ("language model", "projector", "vision tower")
    }
    quantised = {} if checkpoint is None else checkpoint.quantised
    for name, stored in tensors.items():
        if name in quantised:  # one weight in two tensors
            parts = [part.file.read(part.name) for part in quantised[name].values()]
            dtype, numbers = parts[0].dtype, math.prod(checkpoint.shape(name))
            size = sum(part.nbytes for part in parts)
        else:
            dtype, numbers = stored.dtype, math.prod(stored.shape)
            size = numbers * dtype.itemsize
            if checkpoint is not None and dtype not in DTYPES.values():
                report.attempt(stored.read)  # which says what is wrong with it
        part = report.parts.setdefault(part_of(name), {"tensors": 0, "parameters": 0})
        kind = report.dtypes.setdefault(
            dtype_name(dtype), {"tensors": 0, "parameters": 0, "bytes": 0}
        )
        for count in (part, kind):
            count["tensors"] += 1
            count["parameters"] += numbers
        kind["bytes"] += size
        about = {
            "name": name,
            "stored": stored.name,
            "shape": list(stored.shape),
            "dtype": dtype_name(dtype),
        }
        report.tensors.append({**about, "file": str(stored.path)})


def _network(config: LlavaConfig) -> dict:
    text = config.text
    about = {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "key_value_heads": text.num_key_value_heads,
        "vocabulary": text.vocab_size,
        "context": text.context,
        "vision_layers": config.vision_layers_needed,
        "positions_per_picture": config.tokens_per_image,
    }
    if config.grid:
        about["most_positions_per_picture"] = most_positions(config)
    return about


def _compare(report: Report, checkpoint: StoredWeights, shapes: dict[str, tuple[int, ...]]) -> None:
    """What config.json expects against what is stored, as `load` will find it. A part of which
    nothing is there is not listed tensor by tensor."""
    there = {part_of(name) for name in checkpoint.tensors}
    found = compare(checkpoint, shapes)
    report.missing = [name for name in found.missing if part_of(name) in there]
    # Of a model that lacks a part, `open_checkpoint` has not yet sorted out what of its tower is
    # not needed.
    whole = there >= {part_of(name) for name in shapes}
    report.unexpected = [
        checkpoint.tensors[name].name
        for name in found.unexpected
        if whole or part_of(name) != "vision tower"
    ]
    report.misshapen = [found.shapes_told(name, checkpoint) for name in found.misshapen]


def _say_what_to_get(report: Report, checkpoint: StoredWeights, tower: str | None) -> None:
    """One line for each part of which nothing is there. tower: where config.json says that its own
    comes from."""
    there = {part_of(name) for name in checkpoint.tensors}
    absent = [part for part in report.parts if part not in there]
    for part in absent:
        get = DOWNLOAD
        # an original release, which is whole without
        if part == "vision tower" and "language model" not in absent:
            clip = tower if tower and re.fullmatch(r"[\w.-]+/[\w.-]+", tower) else CLIP_RELEASE
            folder = clip.rpartition("/")[2]
            get = f"hf download {clip} --local-dir {folder}; then pass --vision-tower {folder}"
        report.problems.append(f"missing: {part}; get it with: {get}")


def _describe_tokenizer(
    report: Report, folders: Sequence[Path], config: LlavaConfig | None
) -> None:
    tokenizer = report.attempt(open_tokenizer, folders, config)
    if tokenizer is None:  # what does not fit the weights can be described
        with suppress(ValueError, OSError):
            tokenizer = open_tokenizer(folders)
    if tokenizer is not None:
        about = {
            "pieces": tokenizer.vocab_size,
            "legacy": tokenizer.legacy,
            "added": tokenizer.added,
        }
        report.tokenizer = about
