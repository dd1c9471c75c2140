"""Waiting for what other threads and processes do. Nothing that a test says hangs on how long it
takes: a machine of tests may be slow, or stand still for minutes."""

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 600
"""Seconds until something hangs."""


def wait_until(true: Callable[[], object], pause: float = 0.005) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def ended(process: int | str) -> bool:
    """Whether there is no such process any more, or nothing of it but its number, for which nobody
    asks: who started it has ended before."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


def free_port() -> int:
    """A port for a process that cannot choose one itself: until that binds it, Linux gives it to
    nobody, since it is not of those that it gives, unless told otherwise."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
