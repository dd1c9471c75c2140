"""What a run says of itself: lines of JSON, a line of progress, and TensorBoard or wandb if asked.

The lines come first and hang on nothing else; all others read the same records.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.cli.messages import Messages
from minillava.files.disk import explain, write_whole

LOG_NAME = "log.jsonl"

LOGGERS = ("tensorboard", "wandb")
"""Functions of this file, each of which writes into a folder of its name."""

Logger = Callable[[dict[str, Any]], None]
"""Takes one record, a line of the log."""


class Log:
    """The records of a run: in memory, in the file, and with the loggers. lines: those of the run
    that is gone on with. writes: not where another process does."""

    def __init__(
        self,
        path: Path,
        lines: list[str],
        loggers: dict[str, Logger],
        messages: Messages,
        writes: bool = True,
    ):
        self.path, self.lines, self.loggers, self.messages = path, lines, loggers, messages
        self.writes = writes
        self.save()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def add(self, record: dict[str, Any]) -> None:
        """Add a record. The failure of a logger, or of the file, is told and does not stop the run:
        the state of the run has the lines, too."""
        self.lines.append(json.dumps(record) + "\n")
        if not self.writes:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.lines[-1])
        except OSError as error:
            self.messages.note(f"{explain(error)}; the run goes on")
        for name, log in list(self.loggers.items()):
            try:
                log(record)
            except Exception as error:  # another's program, whose errors we do not know
                del self.loggers[name]
                self.messages.note(f"{name} failed ({error!s:.200}); the run goes on without it")

    def save(self) -> None:
        """The whole file anew. Raises OSError."""
        if self.writes:
            write_whole(self.path, "".join(self.lines))


def open_loggers(names: list[str], out: Path, about: dict[str, Any]) -> dict[str, Logger]:
    """The loggers by their names. about: the settings of the run. Raises ValueError naming the
    extra that brings a missing package."""
    made = dict(zip(LOGGERS, (tensorboard, wandb), strict=True))
    loggers = {}
    for name in dict.fromkeys(names):
        try:
            loggers[name] = made[name](out, about)
        except ImportError as error:
            raise ValueError(
                f"--log {name} needs a package that is not installed ({error}); pip install "
                f"'minillava[{name}]', or leave it out: {LOG_NAME} is always written"
            ) from None
    return loggers


def tensorboard(out: Path, about: dict[str, Any]) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))
    writer.add_text("settings", json.dumps(about, indent=1))

    def log(record: dict[str, Any]) -> None:
        for name, value in numbers(record).items():
            writer.add_scalar(name, value, record["update"])
        writer.flush()

    return log


def wandb(out: Path, about: dict[str, Any]) -> Logger:
    """Project, entity and mode come from wandb's own variables, such as WANDB_PROJECT."""
    import wandb as package

    run = package.init(dir=str(out), config=about)

    def log(record: dict[str, Any]) -> None:
        run.log(numbers(record), step=record["update"])

    return log


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by name; those of parts as rates/projector."""
    found = {}
    for name, value in record.items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, number in inner.items():
            if isinstance(number, (int, float)) and math.isfinite(number):
                found[f"{name}/{part}" if part else name] = float(number)
    return found


def tell(record: dict[str, Any], updates: int, messages: Messages) -> None:
    """A line of progress on a terminal; each update's with --verbose."""
    done = record["update"]
    text = (
        f"update {done} of {updates}: loss {record['loss']:.4f} over {record['tokens']} tokens, "
        f"norm {record['norm']:.3g}, {record['seconds']:.2f} s"
    )
    messages.progress("" if done == updates else text)
    if messages.verbose:
        messages.note(text)
