"""compare: every row of the table answers the same question in processes of its own, in turn."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_checkpoint import SHAPES, config_of

from bench_parts.clock import BUSY, TRIES, Neighbours, Timing, say
from bench_parts.journal import Journal
from bench_parts.probe import bandwidth, limits
from bench_parts.rows import PACKAGES, ROWS, Died, Row, row_of, run
from bench_parts.work import positions, prompt_ids
from minillava.config import LlavaConfig
from minillava.fast.packed import KIND as PACKED
from minillava.fast.packed import packs

PICTURE = Path(__file__).resolve().parents[2] / "weights" / "shapes" / "example-1.png"


@dataclass
class Asked:
    """One question to one checkpoint."""

    size: str
    folder: Path
    gguf: Path  # the folder of what llama.cpp reads
    device: str
    tokens: int  # of an answer, the first included
    questions: int  # of a process; the last is timed
    pictures: int = 1  # that a question is about

    @property
    def config(self) -> LlavaConfig:
        return config_of(self.size)

    @property
    def positions(self) -> int:
        return positions(self.size, self.config, self.pictures)

    def job(self, row: Row) -> dict:
        return {
            "peer": row.peer,
            "dtype": row.dtype,
            "compile": row.compiled,
            "folder": str(self.folder),
            "gguf": str(self.gguf),
            "device": self.device,
            "threads": row.count,
            "questions": self.questions + row.compiled,
            "tokens": self.tokens,
            "pictures": [str(PICTURE)] * self.pictures,
            "ids": prompt_ids(self.config, self.positions, self.pictures),
        }


@dataclass
class Measured:
    """What the journal holds of one row."""

    row: Row
    rounds: dict[int, dict] = field(default_factory=dict)  # by number, what bench_run.py reported
    tries: int = 1  # the most that a round took
    failed: str | None = None
    cold: float | None = None  # seconds to open and read every weight with nothing of it in memory

    def timing(self, key: str) -> Timing | None:
        values = [found[key] for found in self.rounds.values() if found.get(key)]
        return Timing(values) if values else None

    @property
    def disturbed(self) -> bool:
        return any(disturbance(found) > BUSY for found in self.rounds.values())


def default_rows(device: str, size: str) -> list[Row]:
    """Ours at every precision, and every peer that is installed; those that are looked at most also
    with one thread."""
    there = {
        "minillava",
        *(peer for peer, packages in PACKAGES.items() if all(map(find_spec, packages))),
    }
    if device != "cpu":
        return [row for row in ROWS.values() if row.peer in there]
    # on a CPU our own compiled step is no faster than what fast/ does without
    compiled = {"transformers"}
    rows = [
        row
        for row in ROWS.values()
        if row.peer in there
        and (not row.compiled or row.peer in compiled)
        and (row.dtype != PACKED or packs())
    ]
    if torch.get_num_threads() == 1:
        return rows
    alone = {"minillava", "transformers"} if size == SHAPES else {"minillava"}
    alike = [row for row in rows if row.peer in alone and not row.compiled]
    return rows + [row_of(f"{row.name}@1") for row in alike]


def compare(
    rows: Sequence[Row], asked: Asked, rounds: int, cold: bool, journal: Journal, seconds: float
) -> None:
    """Measure what the journal does not have yet, and begin nothing more after so many seconds.
    Rows that are compared with each other follow each other."""
    until = time.monotonic() + seconds
    precisions = list(dict.fromkeys(row.precision for row in rows))
    turns = sorted(rows, key=lambda row: (-row.count, precisions.index(row.precision)))
    for number in range(-1 if cold else 0, rounds):
        for row in turns:
            # llama.cpp's weights cannot be touched from here
            if (number < 0 and row.peer == "llama.cpp") or journal.has(row.name, number):
                continue
            if time.monotonic() > until:
                say(f"the {seconds:.0f} s are over")
                return
            record = measure(row, asked, number, until)
            journal.add(record)
            say(told(record))


def measure(row: Row, asked: Asked, number: int, until: float) -> dict:
    """The least disturbed of up to TRIES processes, as a record of the journal. Round -1 opens the
    checkpoint from the disk, with none of it in memory."""
    job, tries = asked.job(row), []
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(row.count))
    while not tries or (
        len(tries) < TRIES and disturbance(tries[-1]) > BUSY and time.monotonic() < until
    ):
        if number < 0:
            forget(asked.folder)
            job |= {"questions": 0, "touch": True}
        most = None if number < 0 else limits(asked.device, row.count)
        neighbours = Neighbours()
        try:
            found = run(job, variables)
        except Died as error:
            return {"row": row.name, "round": number, "failed": str(error)}
        found |= neighbours.taken()
        if most:
            # a host that gives more while it runs makes a fraction above 1
            most.bandwidth = max(most.bandwidth, bandwidth(asked.device, row.count))
            found["limits"] = asdict(most)
        tries.append(found)
    best = min(tries, key=disturbance)
    return {"row": row.name, "round": number, "tries": len(tries), "found": best}


def disturbance(found: dict) -> float:
    """The number of cores that other processes or the host took from it."""
    return found["others"] + found["stolen"]


def forget(folder: Path) -> None:
    """Let the system forget the weights that it has read."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on disk yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def told(record: dict) -> str:
    number = record["round"] + 1
    head = f"round {number}: {record['row']}" if number else f"from disk: {record['row']}"
    if "failed" in record:
        return f"{head}: {record['failed']}"
    found = record["found"]
    if not number:
        return f"{head}: {found['open'] + found['touch']:.1f} s"
    speed = f", {1 / found['decode']:.2f} tokens/s" if found["decode"] else ""
    taken = disturbance(found)
    busy = f" (others took {taken:.2f} cores in the best of {record['tries']} tries)"
    return f"{head}: first token after {found['process']:.1f} s{speed}{busy * (taken > BUSY)}"


def measured(rows: Sequence[Row], journal: Journal) -> list[Measured]:
    """What the journal holds, by row; a row of which it holds nothing is left out."""
    found = {row.name: Measured(row) for row in rows}
    for record in journal.records:
        if (each := found.get(record["row"])) is None:
            continue
        if "failed" in record:
            each.failed = record["failed"]
        elif record["round"] < 0:
            each.cold = record["found"]["open"] + record["found"]["touch"]
        else:
            each.rounds[record["round"]] = record["found"]
            each.tries = max(each.tries, record["tries"])
    return [each for each in found.values() if each.rounds or each.failed]
