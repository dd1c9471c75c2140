"""threads: processes with one thread or all, on an idle machine and beside busy loops."""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench_parts.clock import Neighbours, Timing, say
from bench_parts.compare import PICTURE
from bench_parts.rows import THREAD_VARIABLES, run
from minillava.config import IMAGE_TOKEN_INDEX

POLICIES = {  # by the name in the table: variables that libgomp and torch read when they are loaded
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "all": {},
    "all, spin 100": {"GOMP_SPINCOUNT": "100"},
    "all, spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "all, passive": {"OMP_WAIT_POLICY": "passive"},
}


@contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen]]:
    """Keep so many other processes busy inside, as on a shared machine."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def threads(
    folders: dict[str, Path], busy: Sequence[int], tokens: int, rounds: int
) -> dict[tuple[str, int, str], dict[str, Timing]]:
    """Milliseconds to the first token and per further one, by (size, busy loops, policy): every
    policy takes its turn in each round, in a process of its own, beside so many busy loops."""
    found: dict[tuple[str, int, str], dict[str, Timing]] = {}
    for number in range(rounds):
        for size, folder in folders.items():
            for loops in busy:
                with busy_loops(loops):
                    for policy, variables in POLICIES.items():
                        timings = found.setdefault(
                            (size, loops, policy), {"first": Timing(), "decode": Timing()}
                        )
                        one_process(folder, tokens, variables, timings)
        say(f"round {number + 1} of {rounds}: done")
    return found


def one_process(
    folder: Path, tokens: int, variables: dict[str, str], timings: dict[str, Timing]
) -> None:
    """Ask a short question in one process, and add the times that it took."""
    job = {
        "peer": "minillava",
        "dtype": "auto",
        "folder": str(folder),
        "device": "cpu",
        "tokens": tokens,
        "questions": 2,  # the first warms up
        "pictures": [str(PICTURE)],
        "ids": [1, *range(5, 40), IMAGE_TOKEN_INDEX, 5, 6],
    }
    neighbours = Neighbours()
    measured = run(job, dict.fromkeys(THREAD_VARIABLES) | variables)
    taken = sum(neighbours.taken().values())
    for key, timing in timings.items():
        timing.seconds.append(measured[key])
        timing.others.append(taken)


def threads_table(found: dict[tuple[str, int, str], dict[str, Timing]]) -> str:
    lines = [
        f"| ms | busy loops | {' | '.join(POLICIES)} | others |",
        "|---|---:|" + "---:|" * (len(POLICIES) + 1),
    ]
    for size, loops, _ in dict.fromkeys((size, loops, None) for size, loops, _ in found):
        for key, text in (("first", "first token"), ("decode", "each further token")):
            timings = [found[size, loops, policy][key] for policy in POLICIES]
            cells = " | ".join(f"{1000 * timing.median:.1f}" for timing in timings)
            others = statistics.median(other for timing in timings for other in timing.others)
            lines.append(f"| {size}, {text} | {loops} | {cells} | {others:.2f} |")
    return "\n".join(lines)
