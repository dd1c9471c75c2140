"""Seconds, and who else used the processor meanwhile."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BUSY = 0.1  # cores taken from us, above which a process is measured again, and marked


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
    not say."""

    def __init__(self):
        self.started, self.before = time.perf_counter(), _taken()

    def taken(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        now = zip(("others", "stolen"), self.before, _taken(), strict=True)
        return {name: (after - before) / seconds for name, before, after in now}


def _taken() -> tuple[float, float]:
    """Seconds of processor time so far that were neither ours nor our children's, running ones
    included, such as a server: those that other processes used, and those that the host gave to
    other guests."""
    try:
        numbers = Path("/proc/stat").read_text().split()[1:11]
    except FileNotFoundError:
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, numbers)
    tick = os.sysconf("SC_CLK_TCK")
    busy = (user + nice + system + irq + softirq) / tick
    return busy - sum(os.times()[:4]) - _running(tick), steal / tick


def _running(tick: int) -> float:
    """Seconds of processor time of our children that run, with those of theirs that have ended; the
    system adds a child's to ours only at its end."""
    seconds, ours = 0.0, str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the third on
        except OSError:  # it has ended meanwhile
            continue
        if fields[1] == ours:
            seconds += sum(map(int, fields[11:15])) / tick
    return seconds


def take_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Run the variants in turn, round after round, after one round to warm up. Each variant does its
    work and returns the seconds that count."""
    timings = {name: Timing() for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            neighbours = Neighbours()
            seconds = work()
            if number > 0:
                timings[name].seconds.append(seconds)
                timings[name].others.append(sum(neighbours.taken().values()))
    return timings


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
