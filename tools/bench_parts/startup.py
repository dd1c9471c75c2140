"""startup: the time from the start of a command to its answer, in this checkout and in others."""

import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench_parts.clock import Timing, take_turns
from bench_parts.rows import THREAD_VARIABLES, Died, finished

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "weights" / "shapes" / "example-2.png"
HERE, NOTHING = "this checkout", "`import torch` alone"


def startup(trees: Sequence[Path], rounds: int) -> dict[str, Timing]:
    """Seconds that the README's first command takes in each checkout, and seconds of importing torch,
    which every one of them waits for. Raises Died if one fails."""
    ask = ("-m", "minillava.generate", "--image", str(PICTURE))
    variants = {NOTHING: partial(one_process, ROOT, ("-c", "import torch"))}
    variants |= {named(tree): partial(one_process, tree, ask) for tree in trees}
    variants[HERE] = partial(one_process, ROOT, ask)
    return take_turns(variants, rounds)


def named(tree: Path) -> str:
    """The name of a checkout: its commit if it has one."""
    command = ["git", "-C", str(tree), "log", "-1", "--format=commit %h of %ad", "--date=short"]
    try:
        return finished(command, dict(os.environ)).strip()
    except (Died, OSError):
        return str(tree)


def one_process(folder: Path, arguments: Sequence[str]) -> float:
    """Seconds of a process as a person starts it: without this shell's variables of threads, and
    with the checkout before an installed minillava on Python's path."""
    kept = {k: v for k, v in os.environ.items() if k not in THREAD_VARIABLES}
    started = time.perf_counter()
    finished([sys.executable, *arguments], kept | {"PYTHONPATH": str(folder)}, folder)
    return time.perf_counter() - started


def startup_table(timings: dict[str, Timing]) -> str:
    """The table. Its last column is the time without importing torch, as a multiple of this
    checkout's."""
    floor, ours = timings[NOTHING].median, timings[HERE].median
    lines = [
        "| start to answer | s | spread | to this checkout's | without torch's import, to this checkout's | others |",
        "|---|" + "---:|" * 5,
    ]
    for name, timing in timings.items():
        rest = "" if name == NOTHING else f"{(timing.median - floor) / (ours - floor):.2f}"
        lines.append(
            f"| {name} | {timing.median:.2f} | ±{timing.spread:.0%} | {timing.median / ours:.2f} "
            f"| {rest} | {statistics.median(timing.others):.2f} |"
        )
    return "\n".join(lines)
