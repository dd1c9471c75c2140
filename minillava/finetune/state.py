"""What a run needs to go on as if it had not been interrupted: what it learnt, AdamW's moments, and
the number of the update. All else is a function of these and of the recipe."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.checkpoint.folders import Folders
from minillava.files.disk import one_line, write_whole
from minillava.files.tensors import weight_files
from minillava.finetune.recipe import Recipe

STATE_NAME = "state.pt"


def describe(recipe: Recipe, data: Path, folders: Folders) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    base = hashlib.sha256()
    for path in weight_files(folders.weights)[0]:
        base.update(f"{path.name} {path.stat().st_size};".encode())
    return {
        **vars(recipe),
        "data": hashlib.sha256(data.read_bytes()).hexdigest()[:16],
        "base": base.hexdigest()[:16],
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
    """Save the state of a run, whole or not at all. log: its lines. Raises OSError."""
    file = io.BytesIO()
    learnt = {name: tensor.detach() for name, tensor in learning.items()}
    content = {
        "update": update,
        "learnt": learnt,
        "optimiser": optimiser.state_dict(),
        "about": about,
        "log": log,
    }
    torch.save(content, file)
    write_whole(out / STATE_NAME, file.getvalue())


def resume(
    out: Path,
    learning: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    about: dict[str, Any],
) -> tuple[int, list[str]]:
    """Load the state of a run into the model and the optimiser; returns the number of updates that
    are done, 0 if there is no state, and their lines of the log. Raises ValueError naming a setting
    that differs, with both values."""
    path = out / STATE_NAME
    if not path.exists():
        return 0, []
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        known, learnt = content["about"], content["learnt"]
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(
            f"{path}: cannot be read ({one_line(error):.120}); start anew in another folder"
        ) from None
    for name, value in about.items():
        if known.get(name) != value:
            raise ValueError(
                f"{path}: {name} was {known.get(name)}, and is {value} now; go on with what it "
                "was, or start anew in another folder"
            )
    with torch.no_grad():
        for name, tensor in learning.items():
            tensor.copy_(learnt[name])
    optimiser.load_state_dict(content["optimiser"])
    return int(content["update"]), content["log"]
