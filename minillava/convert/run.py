"""What `python -m minillava.convert` does: a folder of weights, planned, written, and compared."""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders, find_folders
from minillava.checkpoint.write import Progress, check_written, silent, write_weights
from minillava.cli.messages import Messages
from minillava.convert.plan import Job, copied, renamed
from minillava.files.new_folder import new_folder


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
    progress: Progress = silent,
) -> list[str]:
    """Write `target`, which must not exist or be empty; returns what its owner should know, a line
    each.

    dtype: of all weights, instead of the stored ones. quantize: int8 or int4, the language model's
    linear layers in the form of minillava/fast/quantize.py, which other programs cannot read.
    shard_size: of a file, in bytes. Raises FileNotFoundError or ValueError; what was written is
    then gone.
    """
    folders = find_folders(source, None, vision_tower, model_base, adapter)
    source = folders.weights
    with new_folder(target) as folder:
        if to != "safetensors":
            job = renamed(folders, to, dtype, quantize)
        elif folders != Folders(source) or quantize:
            raise ValueError(
                "--to safetensors keeps the tensors of SRC alone; use --to hf or --to original"
            )
        else:
            job = copied(source, dtype)
        free = shutil.disk_usage(folder).free
        if job.nbytes > free:
            raise ValueError(
                f"{target}: needs {job.nbytes / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
            )
        _write(job, folder, shard_size, progress)
        if read_config(folder) != job.config:
            raise ValueError(
                f"{target}: its config.json does not say what that of {source} says; please report "
                "this"
            )
    return job.notes


def _write(job: Job, folder: Path, shard_size: float, progress: Progress) -> None:
    """Weights, read back and compared, and the other files; config.json goes last."""
    write_weights(job.tensors, folder, shard_size, progress)
    check_written(job.tensors, folder, progress)
    for name, content in sorted(job.files.items(), key=lambda file: file[0] == "config.json"):
        (folder / name).write_bytes(content)
    # safetensors lets only the owner read what it writes
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def run(args: argparse.Namespace) -> int:
    """What `convert` does with its flags; the exit status."""
    messages = Messages(args.verbose, args.quiet)

    def progress(items: Sequence[Any], doing: str, unit: str) -> Iterator[Any]:
        for i, item in enumerate(items, start=1):
            text = f"{doing}: {unit} {i} of {len(items)}"
            messages.progress(text)
            # ten lines for a log, where no line can be overwritten
            if not (messages.quiet or sys.stderr.isatty() or i % max(1, len(items) // 10)):
                print(text, file=sys.stderr)
            yield item
        messages.progress("")

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
        progress=progress,
    )
    for note in notes:
        messages.note(note)
    return 0
