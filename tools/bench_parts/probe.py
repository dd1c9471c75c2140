"""What this machine does at most, as torch reaches it, and what machine it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minillava.fast import processor

# one block of tools/MEASUREMENTS.md for each
KINDS = {
    "amx": "AVX-512 and AMX",
    "avx512-bf16": "AVX-512 with bfloat16",
    "avx512": "AVX-512",
    "avx2": "AVX2",
    "arm-bf16": "ARM with bfloat16",
    "arm": "ARM",
    "unknown": "another kind",
}
LARGE = 1 << 29  # numbers, 2 GiB in float32: more than any processor's cache holds
TRIES = 3


@dataclass
class Limits:
    """The best of several ways and tries: a limit is what was reached once. On a shared machine it
    drifts within minutes, so each measured process has its own, taken right before it; of the
    bandwidth it is the better one of before and after."""

    bandwidth: float  # bytes read per second
    rates: dict[str, float]  # floating-point operations per second of a matrix product, by dtype

    def rate(self, dtype: str) -> float:
        """The rate of float32 for float32; smaller weights may be computed in whichever dtype is
        fastest."""
        return self.rates["float32"] if dtype == "float32" else max(self.rates.values())


def limits(device: str, threads: int) -> Limits:
    with threads_of_torch(threads):
        rates = {dtype: _rate(getattr(torch, dtype), device) for dtype in ("float32", "bfloat16")}
    return Limits(bandwidth(device, threads), rates)


def bandwidth(device: str, threads: int) -> float:
    """The bytes read per second."""
    with threads_of_torch(threads):
        return _bandwidth(device)


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bandwidth(device: str) -> float:
    large = torch.ones(LARGE, device=device)
    square, column = large.view(-1, 1 << 12), torch.ones(1 << 12, device=device)
    ways = [large.sum, large.max, lambda: torch.mv(square, column)]
    if device == "cuda":  # copying reads and writes
        ways.append(lambda: large[: LARGE // 2].copy_(large[LARGE // 2 :]))
    return large.nbytes / min(_best(way, device) for way in ways)


def _rate(dtype: torch.dtype, device: str) -> float:
    width = LARGE >> 17 if device == "cpu" else 8192
    x, weight = (
        torch.ones(rows, width, dtype=dtype, device=device)
        for rows in (max(640, width // 8), width)
    )
    return 2 * x.numel() * len(weight) / _best(lambda: x @ weight.T, device)


def _best(work: Callable[[], object], device: str) -> float:
    """The seconds that a call takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(TRIES):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def machine(device: str) -> str:
    """What this ran on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "a processor"
    return f"{torch.get_num_threads()} threads of {name}, {KINDS[processor.kind()]}, torch {torch.__version__}"
