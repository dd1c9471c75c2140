"""Checkpoint folders to models: which files, which names, which tensors; strict about all three.

Weights are memory-mapped: opening a checkpoint at its own dtype reads nothing until a layer first runs.
"""

import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillava.config import CLIP_RELEASE, RELEASE, LlavaConfig, one_line, read_json
from minillava.llava import Llava

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"

# Stored prefix -> ours; where several fit, the longest wins. After the prefix, every dialect of LLaVA
# checkpoints uses the same names (`layers.0.self_attn.q_proj.weight`, ...), and so do we.
PREFIXES = {
    # on the hub (llava-hf), and as transformers 4.37 to 4.57 write it
    "language_model.model.": "language_model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.",
    "multi_modal_projector.": "projector.",
    # transformers 5, saving a model built from a config: as above, but
    "vision_tower.": "vision_tower.",
    # the module names of transformers 4.52 and later (raw state_dict, or save_original_format=False)
    "model.language_model.": "language_model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "projector.",
    # the original LLaVA (and see PROJECTOR)
    "model.": "language_model.",
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.": "projector.linear_1.",
}
# The original's projector of one layer has no number, one of N has 0, 2, 4, ...: between them stand the GELUs.
PROJECTOR = re.compile(r"model\.mm_projector\.(\d*[02468])\.")
CLIP_PREFIXES = {"vision_model.": "vision_tower.", "": "vision_tower."}  # a CLIP folder of its own

# Stored names that are never weights of ours, by the end of the name: tables that are computed from the config.
COMPUTED = (".position_ids", ".inv_freq")
# The other half of a whole CLIP: its text tower and the heads that compare the two.
CLIP_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DOWNLOAD = "download it again"


class Stored(NamedTuple):
    """Where a tensor lies."""

    name: str  # as the file calls it
    path: Path
    file: safe_open


class Checkpoint:
    """The safetensors files of one folder, opened but not read.

    tensors: our name -> where it is stored. unused: stored names that this network does not need.
    Raises FileNotFoundError or ValueError naming the file, what was found and what to do.
    """

    def __init__(self, folder: str | Path, prefixes: dict[str, str] = PREFIXES, dropped: tuple[str, ...] = ()):
        self.folder = Path(folder)
        self.unused: list[str] = []
        self.tensors: dict[str, Stored] = {}
        for stored in self._open_files():
            name = _rename(stored.name, prefixes)
            if stored.name.endswith(COMPUTED) or stored.name.startswith(dropped):
                self.unused.append(stored.name)
            elif name in self.tensors:
                twin = self.tensors[name].name
                raise ValueError(f"{self.folder}: {twin} and {stored.name} are both {name}; remove one")
            else:
                self.tensors[name] = stored

    def _open_files(self) -> list[Stored]:
        """Every tensor of every file. An index, if there is one, must agree with the files it names."""
        if not self.folder.is_dir():
            found = "is a file" if self.folder.exists() else "no such folder"
            raise FileNotFoundError(f"{self.folder}: {found}; expected a folder with {SINGLE_NAME}")
        index = self.folder / INDEX_NAME
        if index.exists():
            placed = _read_index(index)
            files = {name: _open(self.folder / name) for name in sorted(set(placed.values()))}
            held = {name: set(file.keys()) for name, file in files.items()}
            for stored, name in placed.items():
                if stored not in held[name]:
                    raise ValueError(f"{index}: says {stored} is in {name}, which does not hold it; {_DOWNLOAD}")
            for name, all_stored in held.items():
                for stored in all_stored:
                    if placed.get(stored) != name:
                        where = f"places in {placed[stored]}" if stored in placed else "does not name"
                        raise ValueError(f"{self.folder / name}: holds {stored}, which the index {where}; {_DOWNLOAD}")
        else:
            files = {SINGLE_NAME: _open(self._single_file())}
        return [Stored(key, self.folder / name, file) for name, file in files.items() for key in file.keys()]  # noqa: SIM118

    def _single_file(self) -> Path:
        path = self.folder / SINGLE_NAME
        if path.exists():
            return path
        expected = f"expected {SINGLE_NAME} or {INDEX_NAME}"
        shards = sorted(self.folder.glob("*.safetensors"))
        if shards:
            raise FileNotFoundError(f"{self.folder}: found {shards[0].name}, {expected}; download the index")
        found = ".bin files only" if any(self.folder.glob("*.bin")) else "no weights"
        raise FileNotFoundError(f"{self.folder}: holds {found}, {expected}, as in {RELEASE} on the hub")

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.tensors[name]
        return tuple(stored.file.get_slice(stored.name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped. Raises ValueError when it is quantised."""
        stored = self.tensors[name]
        tensor = stored.file.get_tensor(stored.name)
        if tensor.dtype not in _FLOATS:
            found = f"{stored.name} is {tensor.dtype}, expected float32, float16, bfloat16 or float64"
            raise ValueError(f"{stored.path}: {found}; use a release that is not quantised")
        return tensor

    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor, which is what people mean by the checkpoint's."""
        return self.read(max(self.tensors, key=lambda name: math.prod(self.shape(name)))).dtype

    def set_aside(self, unneeded: Callable[[str], bool]) -> None:
        """Move the tensors whose name (ours) is not needed to `unused`."""
        for name in [n for n in self.tensors if unneeded(n)]:
            self.unused.append(self.tensors.pop(name).name)


def open_checkpoint(folder: str | Path, config: LlavaConfig, vision_tower: str | Path | None = None) -> Checkpoint:
    """A LLaVA folder, its vision tower taken from `vision_tower` (a CLIP folder) when given.

    What the selected features do not need (the tower's last block, `post_layernorm`) is set aside as unused.
    Raises FileNotFoundError naming the CLIP to get when there is no vision tower at all.
    """
    checkpoint = Checkpoint(folder)
    if vision_tower is not None:
        checkpoint.set_aside(lambda name: name.startswith("vision_tower."))
        clip = Checkpoint(vision_tower, CLIP_PREFIXES, dropped=CLIP_TEXT_HALF)
        checkpoint.tensors.update(clip.tensors)
        checkpoint.unused += clip.unused
    elif not any(name.startswith("vision_tower.") for name in checkpoint.tensors):
        wanted = config.vision_tower_name or CLIP_RELEASE
        raise FileNotFoundError(
            f"{folder}: holds no vision tower, as the original releases do; "
            f"download {wanted} and pass its folder with --vision-tower"
        )

    def beyond(name: str) -> bool:
        block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        return bool(block) and config.vision_layers_needed <= int(block[1]) < config.vision.num_hidden_layers

    checkpoint.set_aside(lambda name: name.startswith("vision_tower.post_layernorm.") or beyond(name))
    return checkpoint


def build_model(
    config: LlavaConfig, checkpoint: Checkpoint, attend: Callable, *, dtype: torch.dtype, device: torch.device | str
) -> Llava:
    """The network, built without memory of its own (meta device) and filled with the checkpoint's tensors.

    At the checkpoint's own dtype on the CPU these stay memory-mapped; otherwise they are converted one by one.
    Raises ValueError listing every missing, unexpected and wrong-shaped tensor.
    """
    with torch.device("meta"):
        model = Llava(config, attend)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(checkpoint, expected)
    state = {name: checkpoint.read(name).to(device=device, dtype=dtype) for name in expected}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _compare(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    unexpected = [name for name in checkpoint.tensors if name not in expected]
    problems = []
    for name in sorted(set(expected) & set(checkpoint.tensors)):
        shape = checkpoint.shape(name)
        if shape != expected[name]:
            found = f"{checkpoint.tensors[name].name} has shape {list(shape)}"
            problems.append((checkpoint.tensors[name].path, f"{found}, config.json expects {list(expected[name])}"))
    near = _nearest(missing, {name: checkpoint.tensors[name].name for name in unexpected})
    problems += [(checkpoint.folder, f"{name} is missing{near[name]}") for name in missing]
    near = _nearest(unexpected, {name: name for name in expected})
    for name in unexpected:
        stored = checkpoint.tensors[name]
        problems.append((stored.path, f"{stored.name} is not part of this model{near[name]}"))
    if problems:
        path, first = problems[0]
        advice = "check that config.json belongs to these weights, or download the folder again"
        others = [problem if path == checkpoint.folder else f"{path}: {problem}" for path, problem in problems[1:]]
        raise ValueError("\n  ".join([f"{path}: {first}; {len(problems)} tensor(s) do not fit: {advice}", *others]))


def _nearest(names: list[str], known: dict[str, str]) -> dict[str, str]:
    """For each name a hint at what it may have been meant to be. known: candidate -> how to show it.

    Layers have the same names up to their numbers, so names are compared without them: a thousand wrong
    names then cost a few dozen comparisons.
    """
    numbers = re.compile(r"\d+")
    groups: dict[str, dict[tuple, str]] = {}  # name without numbers -> numbers -> how to show it
    for name, shown in known.items():
        groups.setdefault(numbers.sub("#", name), {})[tuple(numbers.findall(name))] = shown
    hints, closest = {}, {}
    for name in names:
        form = numbers.sub("#", name)
        if form not in closest:
            closest[form] = next(iter(get_close_matches(form, groups, n=1)), None)
        group = groups.get(closest[form])
        if group:
            shown = group.get(tuple(numbers.findall(name)), next(iter(group.values())))
        hints[name] = f" (nearest: {shown})" if group else ""
    return hints


def _rename(stored: str, prefixes: dict[str, str]) -> str:
    """Our name for a stored one; a name no prefix fits stays as it is, to be reported as unexpected."""
    if layer := PROJECTOR.match(stored):
        return f"projector.linear_{int(layer[1]) // 2 + 1}.{stored[layer.end() :]}"
    fitting = [p for p in prefixes if stored.startswith(p)]
    longest = max(fitting, key=len, default=None)
    return stored if longest is None else prefixes[longest] + stored.removeprefix(longest)


def _read_index(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise ValueError(f"{path}: has no `weight_map` of tensor names to files; {_DOWNLOAD}")
    for name in placed.values():
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{path}: names the file {name!r}, expected one beside it; {_DOWNLOAD}")
    return placed


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: not found, although {INDEX_NAME} names it; download this file") from None
    except (SafetensorError, OSError) as error:
        what = one_line(error)
        raise ValueError(f"{path}: truncated or not a safetensors file ({what}); {_DOWNLOAD}") from None
