"""The tensors of a folder by the names of our model, memory-mapped until a layer takes them."""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from minillava.checkpoint.adapter import REPLACED, Adapter, Delta
from minillava.checkpoint.foreign import quantised, refuse_quantised, stated_method
from minillava.checkpoint.names import (
    COMPUTED,
    PREFIXES,
    PROJECTOR_NAME,
    REST_NAME,
    TABLES,
    renamed,
    unwrap,
    unwrapped,
)
from minillava.fast.quantize import PARTS, whole_shape
from minillava.files.rows import grow_rows
from minillava.files.tensors import (
    OtherObjects,
    Stored,
    open_file,
    open_folder,
    several_sets,
    weight_files,
)

# The names that torch.nn.utils puts in place of a weight: parametrize, prune, weight_norm,
# spectral_norm.
_PARAMETRISED = re.compile(r"\.parametrizations\.|\.weight_(orig|mask|g|v)$")


class StoredWeights:
    """The tensors of one model, in the files of one folder or of several; opened but not read.

    tensors: our name -> where it is stored. unused: stored names that this network does not need.
    deltas: our name -> what a LoRA adds. notes: sentences about files and tensors that are not
    read. Raises FileNotFoundError or ValueError naming the file, what was found and what to do.
    """

    def __init__(
        self,
        folder: str | Path,
        prefixes: dict[str, str] = PREFIXES,
        dropped: tuple[str, ...] = (),
        vocabulary: int | None = None,
    ):
        self.folder = Path(folder)  # the folder that messages name
        self.rows: int | None = None  # of the two tables, where an adapter's run changed them
        # rows that the two tables grow to, when they have fewer; None: they stay
        self.vocabulary = vocabulary
        self.unused: list[str] = []
        self.tensors: dict[str, Stored] = {}
        # the last rows of a table: of tokens that the base does not know
        self.new_rows: dict[str, Stored] = {}
        self.deltas: dict[str, Delta] = {}
        self.notes: list[str] = []
        for name, stored in self._named(self._open(), prefixes, dropped):
            if name in self.tensors:
                twin = self.tensors[name].name
                raise ValueError(
                    f"{self.folder}: {twin} and {stored.name} are both {name}; remove one"
                )
            self.tensors[name] = stored
        # our name -> the parts of quantize.py, by their suffixes
        self.quantised: dict[str, dict[str, Stored]] = {}
        for name in [
            n for n in self.tensors if n.endswith(tuple(f".{suffix}" for suffix in PARTS))
        ]:
            self._join_parts(*name.rsplit(".", 1))

    def _open(self) -> list[tuple[str, Stored]]:
        """The tensors of the folder by their names without wrappers. Raises as the class says."""
        try:
            tensors = open_folder(self.folder)
        except OtherObjects as error:
            if not (method := stated_method(self.folder)):
                raise
            raise quantised(
                self.folder, method, str(error).removeprefix(f"{self.folder}/")
            ) from None
        except FileNotFoundError:
            for file in sorted(self.folder.glob("*.gguf"))[:1]:
                raise quantised(self.folder, "llama.cpp", f"holds {file.name}") from None
            raise
        self._refuse(tensors)
        read, others = weight_files(self.folder)
        others += [
            self.folder / name
            for name in (PROJECTOR_NAME, REST_NAME)
            if (self.folder / name).exists()
        ]
        if others:
            self.notes.append(several_sets(read[0], others))
        inner = next((stored for stored in tensors if ".base_layer." in stored.name), None)
        if inner is not None:
            self.notes.append(
                f"{inner.path}: holds {inner.name}, as PEFT names a layer that has a LoRA; if that "
                "was not merged before, this is the model without it"
            )
        for opened in {stored.path: stored.file for stored in tensors}.values():
            self.notes += opened.notes
        return unwrapped(tensors)

    def _refuse(self, tensors: list[Stored]) -> None:
        """Raises ValueError for tensors that are not a model's own weights: of a LoRA, computed
        from others, quantised by another program."""
        for stored in tensors:
            if re.search(r"\.lora_[AB]\.", stored.name):
                found = f"holds a LoRA that was not merged ({stored.name})"
                raise ValueError(
                    f"{stored.path}: {found}; save what PEFT's merge_and_unload() returns"
                )
            if _PARAMETRISED.search(stored.name):
                found = f"holds a weight that is computed from others ({stored.name})"
                raise ValueError(
                    f"{stored.path}: {found}; save the model after remove_parametrizations() or "
                    "prune.remove() of torch.nn.utils"
                )
        refuse_quantised(
            self.folder,
            tensors,
            COMPUTED,
            tuple(f".{suffix}" for pair in PARTS.items() for suffix in pair),
        )

    def _join_parts(self, module: str, suffix: str) -> None:
        """A quantised weight and its scales become one tensor, `<module>.weight`. Raises
        ValueError."""
        stored, name, other = (
            self.tensors.pop(f"{module}.{suffix}"),
            f"{module}.weight",
            PARTS[suffix],
        )
        scales = self.tensors.pop(f"{module}.{other}", None)
        if scales is None or name in self.tensors:
            found = (
                f"{self.tensors[name].name} besides"
                if name in self.tensors
                else f"no {other} for it"
            )
            raise ValueError(f"{stored.path}: holds {stored.name} and {found}; download it again")
        self.tensors[name], self.quantised[name] = stored, {suffix: stored, other: scales}
        dtype = stored.file.read(stored.name).dtype
        try:
            whole_shape({part: found.shape for part, found in self.quantised[name].items()})
            if dtype != (torch.int8 if suffix == "weight_int8" else torch.uint8):
                raise ValueError(f"is {dtype}")
        except ValueError as error:
            raise ValueError(f"{stored.path}: {stored.name} {error}; download it again") from None

    def _named(
        self,
        tensors: Iterable[tuple[str, Stored]],
        prefixes: dict[str, str],
        dropped: tuple[str, ...] = (),
    ) -> Iterable[tuple[str, Stored]]:
        for name, stored in tensors:
            if name.endswith(COMPUTED) or name.startswith(dropped) or REPLACED in name:
                self.unused.append(stored.name)
            else:
                yield renamed(name, prefixes), stored

    def override(self, tensors: Iterable[tuple[str, Stored]]) -> None:
        """Tensors, by a name of any dialect, that replace those of the same name. A table of fewer
        rows holds those of new tokens, all that a training with its base frozen has to save: they
        become the last ones, as in LLaVA."""
        for name, stored in self._named(tensors, PREFIXES):
            before = self.tensors.get(name)
            grows = self.vocabulary is not None and name in TABLES and name not in self.quantised
            if grows and before is not None and stored.shape[0] < before.shape[0]:
                self.new_rows[name] = stored
            else:
                self.tensors[name] = stored
                self.new_rows.pop(name, None)
                self.quantised.pop(name, None)

    def add_lora(self, folder: Path) -> None:
        """A LoRA from its folder: what it adds, and what was trained besides. Raises ValueError
        listing what does not fit this model."""
        adapter = Adapter(folder)
        self.notes += adapter.notes
        if (folder / REST_NAME).exists():
            self.override(unwrapped(open_file(folder / REST_NAME)))
        given = [*adapter.whole, *adapter.deltas]
        plain = dict(zip(given, unwrap(given, adapter.path), strict=True))
        problems = self._replace_whole(
            adapter.path, [(plain[name], stored) for name, stored in adapter.whole.items()]
        )
        for stored_name, delta in adapter.deltas.items():
            name = renamed(plain[stored_name], PREFIXES)
            problems += self._check_delta(adapter.path, name, delta)
            self.deltas[name] = delta
        if adapter.everywhere:
            problems += [f"it holds no lora_A and lora_B for {name}" for name in self._left_out()]
        if problems:
            first = (
                f"{adapter.path}: {problems[0]}; {len(problems)} problem(s) with "
                f"{len(adapter.deltas)} layers"
            )
            raise ValueError(
                "\n  ".join([f"{first}: use the base model it was trained on", *problems[1:]])
            )

    def _replace_whole(self, path: Path, tensors: list[tuple[str, Stored]]) -> list[str]:
        """Weights that an adapter holds whole, in the place of the base's; returns what does not
        fit. Tables of another number of rows resize the vocabulary. Raises ValueError if one of the
        two tables has another size than the other."""
        problems, resized = [], ""
        for name, stored in self._named(tensors, PREFIXES):
            before = self.shape(name) if name in self.tensors else stored.shape
            if name in TABLES and stored.shape[1:] == before[1:] and stored.shape != before:
                resized, self.rows = _resized(before[0], stored.shape[0]), stored.shape[0]
            elif stored.shape != before:
                found, ours = list(stored.shape), list(before)
                problems.append(
                    f"{stored.name} has shape {found}, the base model's {name} has {ours}"
                )
            self.tensors[name] = stored
            self.quantised.pop(name, None)
            self.new_rows.pop(name, None)
        if resized and self.rows is not None and self.vocabulary is not None:
            self.vocabulary = min(self.vocabulary, self.rows)
        for name in TABLES:
            if resized and name in self.tensors and self.shape(name)[0] != self.rows:
                raise ValueError(
                    f"{path}: {resized}, but it does not hold {name} of that size; merge it with "
                    "PEFT first"
                )
        return problems

    def _check_delta(self, path: Path, name: str, delta: Delta) -> list[str]:
        """The reason why a LoRA cannot change our weight of this name, in at most one sentence.
        Raises ValueError for one of a resized vocabulary."""
        found = [delta.b.shape[0], delta.a.shape[1]]
        if name not in self.tensors:
            return [f"{delta.a.name} is for {name}, which this model does not have"]
        if name in self.quantised:
            return [f"{delta.a.name} is for {name}, which is quantised"]
        shape = list(self.shape(name))
        if name in TABLES and found[0] != shape[0]:
            rows = _resized(shape[0], found[0])
            raise ValueError(f"{path}: {rows}; merge it with PEFT first")
        if found != shape:
            return [f"{delta.a.name} and lora_B make {found}, {name} has shape {shape}"]
        if name in self.deltas:
            return [f"{delta.a.name} is a second adapter of {name}"]
        return []

    def _left_out(self) -> list[str]:
        """Weights of the language model that a LoRA leaves alone although it changes their like in
        other layers."""
        layer = re.compile(r"language_model\.layers\.\d+\.")
        kinds = {layer.sub("", name) for name in self.deltas if layer.match(name)}
        return [
            n
            for n in self.tensors
            if layer.match(n) and layer.sub("", n) in kinds and n not in self.deltas
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.quantised:
            return whole_shape(
                {suffix: stored.shape for suffix, stored in self.quantised[name].items()}
            )
        shape = self.tensors[name].shape
        if name not in TABLES or self.vocabulary is None:
            return shape
        new = self.new_rows[name].shape[0] if name in self.new_rows else 0
        return (max(shape[0] + new, self.vocabulary), *shape[1:])

    def read(self, name: str, dtype: torch.dtype | None = None, transient: bool = False) -> Tensor:
        """The tensor at `dtype` (None: as stored), memory-mapped if it is stored so. transient: it
        is freed soon. Raises ValueError if it is quantised."""
        tensor = self.tensors[name].read(transient or dtype not in (None, self.stored_dtype(name)))
        dtype = tensor.dtype if dtype is None else dtype
        if self.shape(name) != tensor.shape:
            new = (
                self.new_rows[name].read().to(tensor.dtype) if name in self.new_rows else tensor[:0]
            )
            tensor = torch.cat([grow_rows(tensor, self.shape(name)[0] - len(new)), new])
        if name in self.deltas:
            return self.deltas[name].add_to(tensor, dtype)
        return tensor.to(dtype)

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].read().dtype

    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantised, which people call the checkpoint's
        dtype."""
        plain = [name for name in self.tensors if name not in self.quantised]
        return self.stored_dtype(max(plain, key=lambda name: math.prod(self.shape(name))))

    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(math.prod(self.shape(name)) for name in self.tensors)

    def set_aside(self, unneeded: Callable[[str], bool]) -> None:
        """Move the tensors whose name (ours) is not needed to `unused`."""
        for name in [n for n in self.tensors if unneeded(n)]:
            self.unused.append(self.tensors.pop(name).name)


def _resized(before: int, rows: int) -> str:
    """The change of the two tables by a run, in words."""
    did = "enlarged" if rows > before else "cut"
    return f"its run {did} the vocabulary from {before} to {rows}"
