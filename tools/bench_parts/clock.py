"""Seconds, and who else used the processor meanwhile."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

BUSY = 0.1  # cores taken from us, above which something is measured again, and marked
TRIES = 3  # of what is measured beside a busy neighbour


@dataclass
class Timing:
    """The rounds of one variant. seconds: per round. others: cores that other processes kept busy,
    per round."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the slowest round and the fastest, as a fraction of the
        median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


class Neighbours:
    """How many cores others have taken since this was made: `others` by processes of this system,
    `stolen` by the host, which a guest only sees as steal time. Both are 0 where the system does
    not say. ours: processes that run for us meanwhile, such as a server; further children that
    have not ended are others."""

    def __init__(self, ours: Sequence[int] = ()):
        self.ours = ours
        self.started, self.before = time.perf_counter(), _taken(ours)

    def taken(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        now = zip(("others", "stolen"), self.before, _taken(self.ours), strict=True)
        return {name: (after - before) / seconds for name, before, after in now}


def _taken(ours: Sequence[int]) -> tuple[float, float]:
    """Seconds of processor time so far that were neither ours, nor these processes', nor those of
    our children that have ended: those that other processes used, and those that the host gave to
    other guests."""
    try:
        numbers = Path("/proc/stat").read_text().split()[1:11]
    except FileNotFoundError:
        return 0.0, 0.0
    used = []
    for each in ours:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            stat = Path(f"/proc/{each}/stat").read_text()
            used.append(stat.rpartition(")")[2].split()[11:13])
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, numbers)
    tick = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq - sum(int(part) for each in used for part in each)
    return busy / tick - sum(os.times()[:4]), steal / tick


def take_turns(
    variants: dict[str, Callable[[], float]], rounds: int, ours: Sequence[int] = ()
) -> dict[str, Timing]:
    """Run the variants in turn, round after round, after one round to warm up. Each variant does its
    work and returns the seconds that count. ours: processes that work for us."""
    timings = {name: Timing() for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            neighbours = Neighbours(ours)
            seconds = work()
            if number > 0:
                timings[name].seconds.append(seconds)
                timings[name].others.append(sum(neighbours.taken().values()))
    return timings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
