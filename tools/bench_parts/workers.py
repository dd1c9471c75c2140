"""workers: questions of a file, by one process with two threads and by two workers of one thread each,
which Ray starts."""

import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench_parts.clock import Neighbours, Timing, say
from bench_parts.compare import PICTURE
from bench_parts.rows import finished

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
FEW = 20
"""Questions that are not counted at either end: workers are not all there at once, nor all done."""
STEP = 0.005  # seconds between two looks at the journal
WAYS: dict[str, tuple[list[str], int]] = {
    f"1 process, {WORKERS} threads": ([], WORKERS),
    "1 process, 1 thread": ([], 1),
    f"{WORKERS} workers, 1 thread each": (["--on", "ray", "--workers", str(WORKERS)], 1),
}


class Found(NamedTuple):
    """start: to the first answer; each: a question between the first and the last FEW."""

    start: Timing
    each: Timing


def workers(folder: Path, dtype: str, tokens: int, count: int, rounds: int) -> dict[str, Found]:
    """Seconds by way, where `count` questions are counted."""
    found = {name: Found(Timing(), Timing()) for name in WAYS}
    for number in range(rounds):
        for name, (flags, threads) in WAYS.items():
            neighbours = Neighbours()
            began, came = run(folder, dtype, tokens, FEW + count + FEW, flags, threads)
            taken = sum(neighbours.taken().values())
            each = (came[FEW + count - 1] - came[FEW - 1]) / count
            for timing, seconds in zip(found[name], (came[0] - began, each), strict=True):
                timing.seconds.append(seconds)
                timing.others.append(taken)
            say(f"round {number + 1} of {rounds}, {name}: {1 / each:.1f} questions a second")
    return found


def run(
    folder: Path, dtype: str, tokens: int, count: int, flags: list[str], threads: int
) -> tuple[float, list[float]]:
    """When the command began, and when each answer was on disk. Raises Died."""
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(1) as pool:
        questions, answers = Path(home) / "questions.jsonl", Path(home) / "answers.jsonl"
        asked = (
            {"question_id": i, "image": PICTURE.name, "text": f"What is shape {i}?"}
            for i in range(count)
        )
        questions.write_text("".join(json.dumps(each) + "\n" for each in asked))
        command = [
            sys.executable, "-m", "minillava.batch", "-q", "-m", str(folder), "--dtype", dtype,
            "--max-new-tokens", str(tokens), "--questions", str(questions),
            "--images", str(PICTURE.parent), "--answers", str(answers), *flags,
        ]  # fmt: skip
        began = time.perf_counter()
        ended = pool.submit(finished, command, os.environ | {"OMP_NUM_THREADS": str(threads)}, ROOT)
        # the journal has a header, which comes with the first answer
        came = arrivals(answers.with_name(answers.name + ".partial"), ended)[1:]
        ended.result()
        return began, came


def arrivals(path: Path, ended: Future) -> list[float]:
    """When each line of a file came, until whoever writes it, and removes it, has ended."""
    came: list[float] = []
    while not path.exists() and not ended.done():
        time.sleep(STEP)
    with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        over = False
        while not over:
            over = ended.done()  # then this is the rest
            came += [time.perf_counter()] * file.read().count(b"\n")
            time.sleep(STEP)
    return came


def workers_table(found: dict[str, Found]) -> str:
    lines = [
        "| | to the first answer, s | questions/s after that | others |",
        "|---|---:|---:|---:|",
    ]
    for name, (start, each) in found.items():
        lines.append(
            f"| {name} | {start.median:.1f} | {1 / each.median:.1f} (±{each.spread:.0%}) | "
            f"{statistics.median(each.others):.2f} |"
        )
    return "\n".join(lines)
