"""What a run needs to go on as if it had not been interrupted: what it learnt, AdamW's moments, and
the number of the update. All else is a function of these and of the recipe."""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.checkpoint.adapter import WEIGHTS_NAMES
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import PROJECTOR_NAME, REST_NAME
from minillava.files.disk import one_line, sync_folder, write_whole
from minillava.files.tensors import weight_files
from minillava.finetune import processes
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example

STATE_NAME, BEFORE_NAME, NEXT_NAME = "state.pt", "state-before.pt", "state-next.pt"
"""The last state, the one before it, and one that is being written."""


def describe(
    recipe: Recipe, data: Sequence[Path], folders: Folders, rows: Sequence[Example]
) -> dict[str, Any]:
    """What must be the same when a run goes on: the recipe, the files of rows and what became of
    them, the bytes of the weights, and torch."""
    weights = hashlib.sha256()
    for folder in (folders.weights, folders.model_base, folders.vision_tower):
        if folder is None:
            continue
        parts = [folder / name for name in (PROJECTOR_NAME, REST_NAME, *WEIGHTS_NAMES)]
        for path in [*weight_files(folder)[0], *(path for path in parts if path.exists())]:
            with path.open("rb") as file:
                while some := file.read(1 << 24):
                    weights.update(some)
    content = hashlib.sha256()
    for path in data:
        content.update(path.read_bytes())
    learnt = hashlib.sha256(repr([(e.ids, e.labels, e.row.pictures) for e in rows]).encode())
    return {
        **vars(recipe),
        "data": content.hexdigest()[:16],
        "rows": f"{len(rows)} ({learnt.hexdigest()[:16]})",
        "base": weights.hexdigest()[:16],
        "torch": str(torch.__version__),
    }


def save_state(
    out: Path,
    update: int,
    learning: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    about: dict[str, Any],
    log: list[str],
) -> None:
    """Save the state of a run, whole or not at all. log: its lines. All processes must call this,
    and the first writes. The state before it is kept under another name. Raises OSError."""
    learnt = {name: processes.whole(tensor.detach()) for name, tensor in learning.items()}
    moments = optimiser.state_dict()
    moments["state"] = {
        number: {name: processes.whole(tensor) for name, tensor in found.items()}
        for number, found in moments["state"].items()
    }
    if processes.rank():
        return
    content = {
        "update": update,
        "learnt": learnt,
        "optimiser": moments,
        "about": about,
        "log": log,
    }
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(out / NEXT_NAME, file.getvalue())
    if (out / STATE_NAME).exists():
        os.replace(out / STATE_NAME, out / BEFORE_NAME)
    os.replace(out / NEXT_NAME, out / STATE_NAME)
    sync_folder(out)


def resume(
    out: Path,
    learning: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    about: dict[str, Any],
) -> tuple[int, list[str]]:
    """Load the state of a run into the model and the optimiser; returns the number of updates that
    are done, 0 if there is no state, and their lines of the log. Raises ValueError naming a setting
    that differs, with both values."""
    paths = [out / name for name in (STATE_NAME, BEFORE_NAME) if (out / name).exists()]
    if not paths:
        return 0, []
    path = paths[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        known, learnt = content["about"], content["learnt"]
    except Exception as error:  # damaged bytes raise nearly anything
        step = "start anew in another folder"
        if paths[1:]:
            step = f"remove it to go on from {paths[1].name}, or {step}"
        raise ValueError(f"{path}: cannot be read ({one_line(error):.120}); {step}") from None
    for name, value in about.items():
        if known.get(name) != value:
            raise ValueError(
                f"{path}: {name} was {known.get(name)}, and is {value} now; go on with what it "
                "was, or start anew in another folder"
            )
    with torch.no_grad():
        for name, tensor in learning.items():
            tensor.copy_(processes.like(learnt[name], tensor))
    ordered = [p for group in optimiser.param_groups for p in group["params"]]
    moments = content["optimiser"]
    for number, found in moments["state"].items():
        for name, tensor in found.items():
            found[name] = processes.like(tensor, ordered[number])
    optimiser.load_state_dict(moments)
    return int(content["update"]), content["log"]
