"""Files of named tensors: safetensors, and the pickled .bin in which the first releases came.

Both are memory-mapped: opening a file reads names and shapes, and a tensor's bytes are read when a
layer first uses them.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillava.files.disk import one_line, read_json, refused
from minillava.files.hub import RELEASE

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

BIN_INDEX_NAME, BIN_NAME = "pytorch_model.bin.index.json", "pytorch_model.bin"

DOWNLOAD_AGAIN = "download it again"

# what a clone without Git LFS has in place of a large file
_POINTER = b"version https://git-lfs"

# How torch.load describes a pickle that names anything but tensors.
_FORBIDDEN = re.compile(r"(?:GLOBAL|unrecognized function|unrecognized class) ([\w.]+)")

# The sets of weights that a folder may have; if it has several, the first is read, as in
# transformers.
_SETS = (SINGLE_NAME, INDEX_NAME, BIN_NAME, BIN_INDEX_NAME)

_SHARDS = ("model*.safetensors", "pytorch_model*.bin")

_NUMBERED = re.compile(r"\d+-of-\d+")

# Other forms of weights, which are not read under their own names; and what a training run leaves
# beside weights.
_OWN_LAYOUT = re.compile(r"consolidated\.")

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_NO_MODEL = re.compile("training_args|optimizer|scheduler|rng_state|scaler")

# The names in a safetensors header of the dtypes of weights that are not quantised.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# The keys under which training programs store a state dict, beside their optimizer's.
_NESTS = ("state_dict", "model_state_dict", "model", "module")


class OtherObjects(ValueError):
    """A file of `torch.save` that contains more than tensors by name, as some quantised ones do."""


class SafetensorsFile:
    """One .safetensors file, opened. Raises FileNotFoundError or ValueError."""

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: not found; download this file") from None
        except (SafetensorError, OSError) as error:
            what = one_line(error)
            raise ValueError(
                f"{path}: truncated or not a safetensors file ({what}); {DOWNLOAD_AGAIN}"
            ) from None
        self.path, self.names = path, list(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.notes: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype, from the header if it is one of DTYPES: reading the tensor would load its
        first page."""
        return DTYPES.get(self._file.get_slice(name).get_dtype()) or self.read(name).dtype

    def read(self, name: str, transient: bool = False) -> Tensor:
        """The tensor, memory-mapped. transient: for a tensor that is freed soon. The pages that it
        read then leave memory with it, while the file's own mapping stays until the last of its
        tensors is freed."""
        file = SafetensorsFile(self.path)._file if transient else self._file
        return file.get_tensor(name)


class TorchFile:
    """One file of `torch.save`: a dict of tensors and nothing else. Raises FileNotFoundError or
    ValueError.

    notes: sentences about the content that is not read. A pickle is a program that runs when it is
    opened. `weights_only` runs the few instructions that make tensors and refuses all others, so
    that a file from a stranger can be opened.
    """

    def __init__(self, path: Path):
        self.metadata: dict[str, str] = {}
        self.notes: list[str] = []
        content = self._unnest(path, _open_pickle(path))
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(
                f"{path}: holds a {type(content).__name__}, expected tensors by name; "
                f"{DOWNLOAD_AGAIN}"
            )
        for name, value in content.items():
            if not _is_plain(value):
                kind = (
                    f"{value.layout} on {value.device}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise OtherObjects(
                    f"{path}: {name} is {kind}, expected a plain tensor; is this file a checkpoint?"
                )
        self._tensors = content
        self.names = list(content)

    def _unnest(self, path: Path, content: Any) -> Any:
        """The state dict, also if a training program stored it beside its optimizer's. Other dicts
        of tensors beside it are noted."""
        nests = [
            nest
            for nest in _NESTS
            if isinstance(content, dict) and isinstance(content.get(nest), dict)
        ]
        if len(nests) != 1:
            return content
        taken = content[nests[0]]
        beside = {name: value for name, value in content.items() if value is not taken}
        others = [
            str(name)
            for name, value in beside.items()
            if isinstance(value, dict) and any(map(_is_plain, value.values()))
        ]
        if others:
            self.notes.append(
                f"{path}: weights are read from its {nests[0]}, not from {', '.join(others)!s:.80}"
            )
        return taken

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, transient: bool = False) -> Tensor:
        """The tensor, memory-mapped. transient makes no difference for a pickle: the file stays
        mapped until the last of its tensors is freed."""
        return self._tensors[name].detach()


# The beginning of each refusal by torch.load: advice that nobody should follow.
_PREAMBLE = (
    "Weights only load failed. In PyTorch 2.6, we changed the default value of the `weights_only` "
    "argument in "
    "`torch.load` from `False` to `True`. Re-running `torch.load` with `weights_only` set to "
    "`False` will likely "
    "succeed, but it can result in arbitrary code execution. Do it only if you got the file from a "
    "trusted source."
)


def _open_pickle(path: Path) -> Any:
    """The content of a pickle. Raises FileNotFoundError or ValueError."""
    try:
        return _unpickle(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; download this file") from None
    except pickle.UnpicklingError as error:
        code = _FORBIDDEN.search(str(error))
        if code is None:
            raise _damaged(path, error) from None
        found = f"holds more than tensors, namely {code[1]}, which opening it would run: refused"
        raise OtherObjects(f"{path}: {found}; get these weights as safetensors") from None
    except Exception as error:  # damaged bytes raise nearly anything: EOFError, KeyError, ...
        raise _damaged(path, error) from None


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        # torch.save writes a zip since 1.6; older files cannot be memory-mapped
        zipped = file.read(4) == b"PK\3\4"
    stored = 0
    # torch maps as many bytes as the pickle says, even if the zip's directory says otherwise
    if zipped:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a compressed zip")
        stored = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that torch looks up in a damaged file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    tensors = list(_tensors_in(content)) if zipped else []
    if tensors and all(_is_plain(value) for value in tensors):
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors
        }
        if sum(storages.values()) != stored:
            raise ValueError(f"holds {stored} bytes of data, expected {sum(storages.values())}")
    return content


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(inner)


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _damaged(path: Path, error: Exception) -> ValueError:
    what = one_line(error).removeprefix(_PREAMBLE)[:120].strip() or type(error).__name__
    return ValueError(f"{path}: truncated or not a PyTorch file ({what}); {DOWNLOAD_AGAIN}")


class Stored(NamedTuple):
    """A tensor in a file: where it is, and what its header says."""

    name: str  # its name in the file
    path: Path
    file: SafetensorsFile | TorchFile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.name)

    def read(self, transient: bool = False) -> Tensor:
        """The tensor, memory-mapped. transient: as for its file. Raises ValueError for integers, in
        which other programs store quantised weights."""
        tensor = self.file.read(self.name, transient)
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            found = f"{self.name} is {tensor.dtype}, expected float32, float16, bfloat16 or float64"
            raise ValueError(f"{self.path}: {found}; use a release that is not quantised")
        return tensor


def open_file(path: Path) -> list[Stored]:
    """Every tensor of one file, which is .safetensors or otherwise a pickle. Raises
    FileNotFoundError, OSError or ValueError."""
    # opening a pipe would wait for somebody to write to it
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is a folder, pipe or device, expected a file; {DOWNLOAD_AGAIN}")
    try:
        with path.open("rb") as head:
            begins = head.read(len(_POINTER))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found; download this file") from None
    except OSError as error:
        raise refused(path, error) from None
    if begins == _POINTER:
        raise ValueError(
            f"{path}: is a Git LFS pointer, not the file itself; get that with: git lfs pull"
        )
    file = SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    for name in file.names:
        if not name.isprintable() or len(name) > 300:
            raise ValueError(
                f"{path}: holds a tensor called {name!r:.80}, no name of a weight; {DOWNLOAD_AGAIN}"
            )
    return [Stored(name, path, file) for name in file.names]


def holds_weights(folder: Path) -> bool:
    """Whether the folder has a language model's weights: safetensors or .bin, one file or indexed
    shards."""
    return any((folder / name).exists() for name in _SETS)


def open_folder(folder: Path) -> list[Stored]:
    """Every tensor of a folder's one file or of its shards. An index must agree with the files that
    it names.

    Raises FileNotFoundError or ValueError naming the file, what was found and what to do.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {found}; expected a folder with {SINGLE_NAME}")
    chosen = next((name for name in _SETS if (folder / name).exists()), None)
    if chosen is not None:
        return (
            _open_shards(folder / chosen)
            if chosen.endswith(".json")
            else open_file(folder / chosen)
        )
    for pattern, (single, index) in zip(_SHARDS, (_SETS[:2], _SETS[2:]), strict=True):
        for shard in sorted(folder.glob(pattern)):
            if _NUMBERED.search(shard.name):
                found = f"found {shard.name}, expected {single} or {index}"
                raise FileNotFoundError(f"{folder}: {found}; download the index")
    expected = f"expected {SINGLE_NAME} or {INDEX_NAME}"
    for file in sorted(folder.iterdir()):
        if _OWN_LAYOUT.match(file.name):
            found = f"found {file.name}, the layout of Meta and Mistral"
            raise FileNotFoundError(f"{folder}: {found}, {expected}; get those of {RELEASE}")
        if file.suffix in _SUFFIXES and not _NO_MODEL.match(file.name):
            single = SINGLE_NAME if file.suffix == ".safetensors" else BIN_NAME
            step = f"if it holds the whole model, rename it to {single}"
            raise FileNotFoundError(f"{folder}: found {file.name}, {expected}; {step}")
    raise FileNotFoundError(f"{folder}: holds no weights, {expected}, as in {RELEASE} on the hub")


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of weights that `open_folder` reads, and those that it does not: other sets, and
    shards that the index does not name. Raises ValueError if an index cannot be read."""
    sets = [name for name in _SETS if (folder / name).exists()]
    shards = sorted(
        {path.name for pattern in _SHARDS for path in folder.glob(pattern)}.difference(sets)
    )
    read = sets[:1]
    if read and read[0].endswith(".json"):
        read += sorted(set(_read_index(folder / read[0]).values()))
    others = [name for name in (*sets, *shards) if name not in read]
    with suppress(ValueError, OSError):  # the index of the set that is read is not another set
        if INDEX_NAME in others and set(_read_index(folder / INDEX_NAME).values()) <= set(read):
            others.remove(INDEX_NAME)
    return [folder / name for name in read], [folder / name for name in others]


def several_sets(read: Path, others: Sequence[Path]) -> str:
    """A sentence about files of which one is read and the others are not."""
    names = [path.name for path in others]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{read.parent}: weights are read from {read.name}, not from {', '.join(names[:3])}{more}, "
        "which lie beside it"
    )


def _open_shards(index: Path) -> list[Stored]:
    placed = _read_index(index)
    files: dict[str, list[Stored]] = {}
    for name in sorted(set(placed.values())):
        try:
            files[name] = open_file(index.with_name(name))
        except FileNotFoundError:
            missing = f"not found, although {index.name} names it; download this file"
            raise FileNotFoundError(f"{index.with_name(name)}: {missing}") from None
    held = {name: {stored.name for stored in stored_here} for name, stored_here in files.items()}
    for stored, name in placed.items():
        if stored not in held[name]:
            raise ValueError(
                f"{index}: says {stored} is in {name}, which does not hold it; {DOWNLOAD_AGAIN}"
            )
    for name, all_stored in held.items():
        for stored in all_stored:
            if placed.get(stored) != name:
                where = f"places in {placed[stored]}" if stored in placed else "does not name"
                found = f"holds {stored}, which the index {where}"
                raise ValueError(f"{index.with_name(name)}: {found}; {DOWNLOAD_AGAIN}")
    return [stored for stored_here in files.values() for stored in stored_here]


def _read_index(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if (
        not isinstance(placed, dict)
        or not placed
        or not all(isinstance(v, str) for v in placed.values())
    ):
        raise ValueError(f"{path}: has no `weight_map` of tensor names to files; {DOWNLOAD_AGAIN}")
    for name in (*placed, *placed.values()):
        if not name.isprintable() or len(name) > 300:
            raise ValueError(
                f"{path}: names {name!r:.80}, which no weight or file is called; {DOWNLOAD_AGAIN}"
            )
    for name in placed.values():
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{path}: names the file {name!r}, expected one beside it; {DOWNLOAD_AGAIN}"
            )
    return placed
