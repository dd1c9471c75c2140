"""workers: questions of a file, by one process with two threads and by two workers of one thread each,
which Ray starts."""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench_parts.clock import Neighbours, Timing, say
from bench_parts.compare import PICTURE
from bench_parts.rows import finished

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
FEW = 20  # questions of the short run; the long one has these and as many more as are counted
WAYS: dict[str, tuple[list[str], int]] = {
    f"1 process, {WORKERS} threads": ([], WORKERS),
    "1 process, 1 thread": ([], 1),
    f"{WORKERS} workers, 1 thread each": (["--on", "ray", "--workers", str(WORKERS)], 1),
}


def workers(folder: Path, dtype: str, tokens: int, count: int, rounds: int) -> dict[str, Timing]:
    """Seconds by way: of a run of a few questions with its start, and of each further question,
    which is what `count` questions more take."""
    found: dict[str, Timing] = {}
    for number in range(rounds):
        for name, (flags, threads) in WAYS.items():
            neighbours = Neighbours()
            few, many = (run(folder, dtype, tokens, n, flags, threads) for n in (FEW, FEW + count))
            taken = sum(neighbours.taken().values())
            each = (many - few) / count
            for what, seconds in ((f"{name}: {FEW} questions", few), (f"{name}: each more", each)):
                timing = found.setdefault(what, Timing())
                timing.seconds.append(seconds)
                timing.others.append(taken)
            say(f"round {number + 1} of {rounds}, {name}: {1 / each:.1f} questions a second")
    return found


def run(folder: Path, dtype: str, tokens: int, count: int, flags: list[str], threads: int) -> float:
    """Seconds of the whole command. Raises Died."""
    with tempfile.TemporaryDirectory() as home:
        questions = Path(home) / "questions.jsonl"
        asked = (
            {"question_id": i, "image": PICTURE.name, "text": f"What is shape {i}?"}
            for i in range(count)
        )
        questions.write_text("".join(json.dumps(each) + "\n" for each in asked))
        command = [
            sys.executable, "-m", "minillava.batch", "-q", "-m", str(folder), "--dtype", dtype,
            "--max-new-tokens", str(tokens), "--questions", str(questions),
            "--images", str(PICTURE.parent), "--answers", str(Path(home) / "answers.jsonl"), *flags,
        ]  # fmt: skip
        began = time.perf_counter()
        finished(command, os.environ | {"OMP_NUM_THREADS": str(threads)}, ROOT)
        return time.perf_counter() - began


def workers_table(found: dict[str, Timing]) -> str:
    lines = [
        f"| | {FEW} questions, with the start, s | questions/s after that | others |",
        "|---|---:|---:|---:|",
    ]
    for name in WAYS:
        few, each = found[f"{name}: {FEW} questions"], found[f"{name}: each more"]
        lines.append(
            f"| {name} | {few.median:.1f} | {1 / each.median:.1f} (±{each.spread:.0%}) | "
            f"{statistics.median(each.others):.2f} |"
        )
    return "\n".join(lines)
