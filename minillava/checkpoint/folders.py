"""Which folders hold a model: what a user typed, the hub's cache, a base, a tower, an adapter."""

import errno
import os
import re
from difflib import get_close_matches
from pathlib import Path

from minillava.checkpoint.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from minillava.checkpoint.names import (
    CLIP_PREFIXES,
    CLIP_TEXT_HALF,
    PROJECTOR_NAME,
    REST_NAME,
    part_of_model,
    unwrapped,
)
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.towers import settle
from minillava.config import LlavaConfig
from minillava.files.disk import nearest_folder, read_json, refused
from minillava.files.hub import CLIP_DOWNLOAD, CLIP_RELEASE, DOWNLOAD, find_snapshot, is_repo_id
from minillava.files.tensors import holds_weights, open_file
from minillava.options import WEIGHTS_VARIABLE


def collect_parts(
    folder: str | Path,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
    vocabulary: int | None = None,
) -> StoredWeights:
    """The parts of one model from the folders that hold them; which is which is read from their
    files, not their names.

    folder: a whole model; or a projector (mm_projector.bin) or a LoRA (adapter_config.json), which
    need `model_base`, the language model they were trained on, whose tables grow to `vocabulary`
    rows. adapter: a LoRA on top of a whole model. vision_tower: a CLIP instead of the tower in the
    folder. Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    check_base(folder, model_base)
    part = part_of_model(folder)
    if model_base is None:
        checkpoint = StoredWeights(folder)
    else:
        checkpoint = StoredWeights(Path(model_base).expanduser(), vocabulary=vocabulary)
        checkpoint.folder = folder
    if vision_tower is not None:
        checkpoint.set_aside(lambda name: name.startswith("vision_tower."))
        clip = StoredWeights(vision_tower, CLIP_PREFIXES, dropped=CLIP_TEXT_HALF)
        checkpoint.tensors.update(clip.tensors)
        checkpoint.unused += clip.unused
        checkpoint.notes += clip.notes
    if part and (folder / PROJECTOR_NAME).exists():
        checkpoint.override(unwrapped(open_file(folder / PROJECTOR_NAME)))
    if part and (folder / ADAPTER_CONFIG_NAME).exists():
        checkpoint.add_lora(folder)
    elif part and (folder / REST_NAME).exists():
        raise FileNotFoundError(
            f"{folder}: holds {REST_NAME}, but no {ADAPTER_CONFIG_NAME}; download the adapter too"
        )
    if adapter is not None:
        checkpoint.add_lora(Path(adapter).expanduser())
    return checkpoint


def check_base(folder: Path, model_base: str | Path | None) -> None:
    """A part needs a base, and a whole model none. Raises FileNotFoundError naming the base, or
    ValueError."""
    part = part_of_model(folder)
    if holds_weights(folder) and (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder}: holds a language model and a LoRA adapter ({ADAPTER_CONFIG_NAME}); remove "
            "the adapter if it is "
            "merged already, else move it to a folder of its own and pass that with --adapter"
        )
    if part and model_base is None:
        path = folder / ADAPTER_CONFIG_NAME
        base = read_json(path).get("base_model_name_or_path") if path.exists() else None
        named = f" ({base})" if base else ""
        raise FileNotFoundError(
            f"{folder}: holds {part} and no language model; pass the folder of the one it was "
            f"trained on{named} "
            "with --model-base"
        )
    if model_base is not None and not part:
        found = "a language model of its own" if holds_weights(folder) else "no weights"
        raise ValueError(
            f"{folder}: holds {found}, so --model-base has nothing to complete; leave it out"
        )


def open_checkpoint(
    folder: str | Path,
    config: LlavaConfig,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
) -> tuple[StoredWeights, LlavaConfig]:
    """`collect_parts`, and a check that vision tower and projector are there. What the selected
    features do not need (the tower's last block, `post_layernorm`) is set aside as unused. Also
    returns the config as the tensors complete it (`settle`).

    Raises FileNotFoundError naming what to get when a part is missing: without values it would stay
    random.
    """
    checkpoint = collect_parts(folder, vision_tower, model_base, adapter, config.text.vocab_size)
    if not any(name.startswith("vision_tower.") for name in checkpoint.tensors):
        wanted = config.vision_tower_name or CLIP_RELEASE
        raise FileNotFoundError(
            f"{folder}: holds no vision tower, as the original releases do; "
            f"download {wanted} and pass its folder with --vision-tower"
        )
    if not any(name.startswith("projector.") for name in checkpoint.tensors):
        raise FileNotFoundError(
            f"{folder}: holds no projector, without which the model cannot see; expected "
            "multi_modal_projector or "
            f"mm_projector tensors, or {PROJECTOR_NAME} or {REST_NAME} beside them; is this a "
            "language model alone?"
        )
    config = settle(config, checkpoint)

    def beyond(name: str) -> bool:
        block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        return (
            block is not None
            and config.vision_layers_needed <= int(block[1]) < config.vision.num_hidden_layers
        )

    checkpoint.set_aside(
        lambda name: name.startswith("vision_tower.post_layernorm.") or beyond(name)
    )
    return checkpoint, config


def default_weights() -> str:
    """What is opened where no weights are named: those of $MINILLAVA_WEIGHTS, else the bundled demo
    model. Raises ValueError where there is neither."""
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
    f"get LLaVA-1.5 (14 GB) with: {DOWNLOAD}; then --weights or {WEIGHTS_VARIABLE} names its folder"
)


def bundled_weights() -> Path | None:
    """The folder of the demo model that comes with minillava; None where somebody left it out."""
    package = Path(__file__).parents[1]
    # as installed from a wheel; in a checkout
    folders = package / "shapes", package.parent / "weights" / "shapes"
    return next((folder for folder in folders if (folder / "config.json").exists()), None)


def find_folder(
    weights: str | Path | None, revision: str | None = None, command: str | None = DOWNLOAD
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
            own = "hf download" in str(error)  # this model's command, and not another's
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


def find_others(
    vision_tower: str | Path | None, model_base: str | Path | None, adapter: str | Path | None
) -> tuple[Path | None, Path | None, Path | None]:
    """The folders beside the weights, None where none is named; raises as `find_folder`. LLaVA's
    own weights would be none of these, so no message recommends them."""
    tower = None if vision_tower is None else find_folder(vision_tower, command=CLIP_DOWNLOAD)
    base, lora = (
        None if other is None else find_folder(other, command=None)
        for other in (model_base, adapter)
    )
    return tower, base, lora


def _next_step(folder: Path, get: str) -> str:
    """What to do where a folder is not there: take the one that it is most like, or the bundled
    model; else `get`."""
    near, bundled = nearest_folder(folder), bundled_weights()
    if near is None and bundled is not None and get_close_matches(folder.name, [bundled.name]):
        near = bundled
    if near is None:
        return get and f"; {get}"
    return f"; did you mean {near}?" + (f" If not, {get}" if get else "")
