"""Weights to files: safetensors shards, one in memory at a time, read back and compared."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import collect_parts
from minillava.fast.quantize import INT4_PACKED, LINE, ORDER, packed_order
from minillava.files.disk import one_line
from minillava.files.tensors import INDEX_NAME, SINGLE_NAME, open_folder


class Planned(NamedTuple):
    """A tensor to be written. ours: our name for it, None for one that is only carried along."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    ours: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Progress = Callable[[Sequence[Any], str, str], Iterable[Any]]
"""Passes items on and shows how many of them are done, given what is done and the unit's name."""


def silent(items: Sequence[Any], doing: str, unit: str) -> Iterable[Any]:
    """A progress that prints nothing."""
    return items


def write_weights(
    tensors: dict[str, Planned], folder: Path, shard_size: float = 4e9, progress: Progress = silent
) -> None:
    """Files of at most `shard_size` bytes (a larger tensor has its own), and an index if there are
    several. Raises ValueError or OSError."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, planned in tensors.items():
        if shards[-1] and size + planned.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += planned.nbytes
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    files = [SINGLE_NAME] if count == 1 else files
    for file, names in progress(list(zip(files, shards, strict=True)), "write", "file"):
        # Clones, since a .bin may hold two tensors in the same bytes, which safetensors refuses.
        save_tensors(
            {n: tensors[n].make().clone(memory_format=torch.contiguous_format) for n in names},
            folder / file,
        )
    if count > 1:
        placed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(planned.nbytes for planned in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX_NAME).write_bytes(as_json(index))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file. Raises ValueError or OSError if it cannot be written."""
    metadata = {"format": "pt"}
    if any(name.endswith(INT4_PACKED) for name in tensors):
        metadata[ORDER] = " ".join(map(str, packed_order().tolist()))
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # its message has the system's error as words
        found = f"cannot be written ({one_line(error)}); make room there, then repeat the command"
        raise ValueError(f"{path}: {found}") from None
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).rstrip(b" ")
    if any(tensor.dtype in (torch.int8, torch.uint8) for tensor in tensors.values()):
        # The kernels load whole lines of memory: with a header that ends where a line does, so
        # do all tensors of usual shapes, and need not be copied when they are opened.
        padding = -(8 + len(header) + len(',"padding":""')) % LINE
        save_file(tensors, path, metadata={**metadata, "padding": "-" * padding})


def check_written(tensors: dict[str, Planned], folder: Path, progress: Progress = silent) -> None:
    """Raises ValueError unless the folder, opened again, holds these tensors, to the bit and under
    our names."""
    written = {stored.name: stored for stored in open_folder(folder)}
    ours = {stored.name: name for name, stored in collect_parts(Folders(folder)).tensors.items()}
    for name, planned in progress(list(tensors.items()), "compare", "tensor"):
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


def cast(read: Callable[[torch.dtype], Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The tensor that `read` returns for a dtype. Raises ValueError for numbers that overflow
    float16."""
    tensor = read(dtype)
    if dtype == torch.float16 and tensor.isinf().any() and not read(torch.float32).isinf().any():
        raise ValueError(f"{name} has numbers too large for float16; use bfloat16")
    return tensor


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _bits(tensor: Tensor) -> Tensor:
    """A tensor as bytes, in which -0 differs from 0 and a NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)
