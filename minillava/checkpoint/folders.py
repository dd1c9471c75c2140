"""The folders of a model: from what a user typed, the hub's cache, a base, a tower, an adapter."""

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from minillava.checkpoint.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from minillava.checkpoint.names import part_of_model
from minillava.files.disk import nearest_folder, read_json, refused
from minillava.files.hub import (
    CLIP_DOWNLOAD,
    SIZES,
    SMALL_DOWNLOAD,
    SMALL_RELEASE,
    find_snapshot,
    is_repo_id,
)
from minillava.options import WEIGHTS_VARIABLE

Name = str | Path | None
"""A folder as a user names it: a path or a hub id."""


@dataclass(frozen=True)
class Folders:
    """The folders that hold one model.

    weights: a whole model; or a projector or a LoRA, which need `model_base`, the language model
    they were trained on. vision_tower: a CLIP instead of the tower in the weights. adapter: a LoRA
    on top.
    """

    weights: Path
    vision_tower: Path | None = None
    model_base: Path | None = None
    adapter: Path | None = None

    def find(self, name: str) -> Path:
        """The folder of a file that a fine-tune may leave to its base."""
        whole = self.model_base is None or (self.weights / name).exists()
        return self.weights if whole else self.model_base or self.weights

    @property
    def of_tokenizer(self) -> list[Path]:
        """The folders that may have a tokenizer's files, the most specific one first."""
        folders = (self.adapter, self.weights, self.model_base)
        return [folder for folder in folders if folder is not None]

    @property
    def of_pictures(self) -> Path:
        """The folder that may have a file that says how pictures are prepared."""
        return self.vision_tower or self.find("preprocessor_config.json")


def find_folders(
    weights: Name,
    revision: str | None = None,
    vision_tower: Name = None,
    model_base: Name = None,
    adapter: Name = None,
) -> Folders:
    """The folders that names mean (see find_folder). LLaVA's own weights cannot be a tower, base or
    adapter, so no message recommends them for these. A LoRA or a projector without a base gets the
    one that it says it was trained on, if that is here."""
    folder = find_folder(weights, revision)
    tower = None if vision_tower is None else find_folder(vision_tower, command=CLIP_DOWNLOAD)
    base, lora = (
        None if other is None else find_folder(other, command=None)
        for other in (model_base, adapter)
    )
    return Folders(folder, tower, remembered_base(folder) if base is None else base, lora)


def remembered_base(folder: Path) -> Path | None:
    """The folder of the model that a LoRA or a projector names as its base; None for another kind
    of folder, or if the base is not on this machine."""
    if not part_of_model(folder):
        return None
    for file, key in (
        (ADAPTER_CONFIG_NAME, "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
    ):
        named = read_json(folder / file).get(key) if (folder / file).exists() else None
        if not isinstance(named, str) or not named:
            continue
        if os.path.isdir(named) and not os.path.samefile(named, folder):
            return Path(named)
        if is_repo_id(named):
            with suppress(FileNotFoundError):
                return find_snapshot(named)
    return None


def default_weights() -> str:
    """The weights that are opened if none are named: those of $MINILLAVA_WEIGHTS, else the bundled
    demo model. Raises ValueError if there is neither."""
    named = os.environ.get(WEIGHTS_VARIABLE)
    if named:
        if not os.path.isdir(os.path.expanduser(named)) and not is_repo_id(named):
            raise ValueError(
                f"{named}: no such folder; {WEIGHTS_VARIABLE} names it; correct that, or name "
                "weights"
            )
        return named
    bundled = bundled_weights()
    if bundled is None:
        raise ValueError(
            f"no weights are named, and the bundled model was left out; {HOW_TO_GET_WEIGHTS}"
        )
    return str(bundled)


HOW_TO_GET_WEIGHTS = (
    f"get a LLaVA of 0.5B ({SIZES[SMALL_RELEASE]}, for research only) with: {SMALL_DOWNLOAD}; then "
    f"--weights or {WEIGHTS_VARIABLE} names its folder"
)


def bundled_weights() -> Path | None:
    """The folder of the demo model that comes with minillava; None if it was left out."""
    package = Path(__file__).parents[1]
    # as installed from a wheel; in a checkout
    folders = package / "shapes", package.parent / "weights" / "shapes"
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


def find_folder(
    weights: str | Path | None, revision: str | None = None, command: str | None = SMALL_DOWNLOAD
) -> Path:
    """The folder that a path or a hub id ("ORG/NAME", downloaded already) means; None as
    `default_weights`. Raises FileNotFoundError with the command that gets one, if there is one,
    and ValueError for what is no path."""
    weights = default_weights() if weights is None else weights
    if not isinstance(weights, (str, os.PathLike)):
        raise ValueError(
            f"{weights!r} stands for a model, expected the path of a folder or a hub id"
        )
    folder, get = Path(weights).expanduser(), f"get one with: {command}" if command else ""
    if is_repo_id(str(weights)):
        try:
            return find_snapshot(str(weights), revision)
        except FileNotFoundError as error:
            own = "hf download" in str(error)  # the command for this model, not for another
            raise FileNotFoundError(f"{error}{_next_step(folder, '' if own else get)}") from None
    if revision is not None:
        raise ValueError(
            f"revision {revision!r} belongs to a model of the hub, but {folder} is a folder: leave "
            "it out"
        )
    try:
        names = os.listdir(folder)
    except NotADirectoryError:
        raise FileNotFoundError(f"{folder}: is a file, expected the folder it is in") from None
    except (FileNotFoundError, ValueError):  # ValueError: a name with a NUL
        step = _next_step(folder, get or "check the path")
        raise FileNotFoundError(f"{folder}: no such folder of weights{step}") from None
    except OSError as error:
        raise refused(folder, error) from None
    if not names:
        raise FileNotFoundError(f"{folder}: is empty; {get or 'check the path'}")
    if not os.access(folder, os.X_OK):
        raise refused(folder / names[0], PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return folder


def _next_step(folder: Path, get: str) -> str:
    """The advice if a folder does not exist: the folder with the most similar name, or the bundled
    model; else `get`."""
    near, bundled = nearest_folder(folder), bundled_weights()
    if near is None and bundled is not None and get_close_matches(folder.name, [bundled.name]):
        near = bundled
    if near is None:
        return get and f"; {get}"
    return f"; did you mean {near}?" + (f" If not, {get}" if get else "")
