"""What was measured is written as it comes, so that no finished row is lost, whatever ends a run."""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "minillava"


def add_flags(group: argparse._ActionsContainer) -> None:
    """--journal and --seconds, by which one command measures in several sittings."""
    group.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="keep every finished measurement here, and go on from those that are there",
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="begin nothing more after so many; with --journal the same command goes on",
    )


class Journal:
    """Records, one for each measured process, and what they have in common.

    With a path each is written there as it comes, one JSON object a line after a first line of
    settings, and those that are there already count. Raises ValueError if they were made with other
    settings."""

    def __init__(self, path: Path | None, settings: dict):
        self.path, self.records = path, []
        self.settings = {"date": str(date.today()), "code": code()} | settings
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines:
            self._append(self.settings)
            return
        before, *self.records = _read(path, lines)
        for name, value in self.settings.items():
            if name != "date" and before.get(name) != value:
                raise ValueError(
                    f"--journal {path} was begun with another {name}: {before.get(name)}, now "
                    f"{value}; name another file"
                )
        self.settings = before

    def add(self, record: dict) -> None:
        self.records.append(record)
        if self.path is not None:
            self._append(record)

    def has(self, row: str, number: int) -> bool:
        """Whether this round of this row was measured, or the row has failed before."""
        return any(
            record["row"] == row and (record["round"] == number or "failed" in record)
            for record in self.records
        )

    def _append(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path, lines: list[str]) -> list[dict]:
    """Every line. One that was cut short, because the machine or the disk failed, is removed from the
    file."""
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if not found or number + 1 < len(lines):
                raise ValueError(f"{path}, line {number + 1}: not a line of a journal") from None
            path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    if "code" not in found[0]:
        raise ValueError(f"{path} is not a journal of bench.py; name another file")
    return found


def code(paths: Sequence[Path] = ()) -> str:
    """Which minillava was measured, or which of its files: rows of two versions do not belong in one
    table."""
    digest = hashlib.sha256()
    for path in sorted(paths or PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
