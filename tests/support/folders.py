"""Checkpoint folders, made and changed."""

import json
from pathlib import Path


def change_config(folder: Path, **changes) -> None:
    """Fields of its config.json; those of `text_config` one by one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "text_config" in changes:
        changes["text_config"] = {**config["text_config"], **changes["text_config"]}
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
