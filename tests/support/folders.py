"""Checkpoint folders, made and changed."""

import json
from pathlib import Path


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = {**config["text_config"], **changes.pop("text_config", {})}
    path.write_text(json.dumps({**config, "text_config": text, **changes}), encoding="utf-8")
