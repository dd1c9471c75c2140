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
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minillava.attention import eager
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import collect_parts, find_folder, find_others, open_checkpoint
from minillava.checkpoint.names import COMPUTED, LAYOUTS, TABLES, stored_name
from minillava.checkpoint.side_json import read_image_processor
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.write import Planned, as_json, cast, check_written, write_weights
from minillava.checkpoint.write_json import (
    generation_config,
    hub_config,
    original_config,
    preprocessor_config,
    processor_config,
    tokenizer_config,
)
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.config import IM_START, LlavaConfig
from minillava.fast.quantize import PARTS, quantize_tensor, stored_shapes
from minillava.files.disk import read_json
from minillava.files.hub import CLIP_RELEASE
from minillava.files.new_folder import new_folder
from minillava.files.tensors import open_folder
from minillava.files.tokenizer_files import PAD_MARKER, SIDE_NAMES, find_tokenizer
from minillava.llama import grow_rows
from minillava.llava import Llava
from minillava.options import KINDS, dtype_name
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


def show(items: Sequence, doing: str, unit: str) -> Iterator:
    """Progress of checkpoint/write.py as a bar, or without tqdm as ten lines."""
    return tqdm(items, desc=doing, unit=unit)


SIDE_FILES = (".json", ".jinja", ".md", ".model", ".txt")


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
    with new_folder(target) as folder:
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
        write_weights(job.tensors, folder, shard_size, show)
        check_written(job.tensors, folder, show)
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


# ------------------------------------------------------------------------------------ what to write


def _copy(source: Path, dtype: torch.dtype | None) -> Job:
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
        files["tokenizer_config.json"] = as_json(tokenizer_config(new, tokenizer, to))
    if to == "hf" and "tokenizer.json" not in files:
        notes.append(
            "from tokenizer.model alone, transformers 5 cuts some texts otherwise than the hub's "
            "tokenizer.json says: "
            "copy that file from a llava-hf release of the same vocabulary"
        )
    if to == "hf":
        files["processor_config.json"] = as_json(processor_config(new))
    if new.added_tokens:
        files["added_tokens.json"] = as_json(tokenizer.added)
    main_dtype = dtype or checkpoint.dtype()
    processor = read_image_processor(vision_tower or home("preprocessor_config.json"), config)
    files |= {
        "config.json": as_json(
            hub_config(new, main_dtype) if to == "hf" else original_config(new, main_dtype)
        ),
        "generation_config.json": as_json(
            generation_config(home("generation_config.json"), new, tokenizer)
        ),
        "preprocessor_config.json": as_json(preprocessor_config(processor)),
        "tokenizer.model": tokenizer.sentencepiece.serialized_model_proto(),
    }
    tensors = {stored_name(name, to, config.projector_layers): p for name, p in planned.items()}
    return Job(tensors, files, new, notes)


def _make(checkpoint: StoredWeights, name: str, dtype: torch.dtype, rows: int) -> Tensor:
    tensor = cast(partial(checkpoint.read, name), checkpoint.tensors[name].name, dtype)
    return grow_rows(tensor, rows) if name in TABLES else tensor


def _make_part(checkpoint: StoredWeights, name: str, rows: int, kind: str, suffix: str) -> Tensor:
    return _quantised(checkpoint, name, rows, kind)[suffix]


@lru_cache(maxsize=1)  # the parts of a weight are wanted one after the other
def _quantised(checkpoint: StoredWeights, name: str, rows: int, kind: str) -> dict[str, Tensor]:
    tensor = checkpoint.read(name, transient=True)
    return quantize_tensor(grow_rows(tensor, rows) if name in TABLES else tensor, kind)


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
