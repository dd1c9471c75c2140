"""The rows of a comparison: who answers, at which precision, with how many threads; and the
process that one answer is measured in."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minillava.fast.packed import KIND as PACKED

TOOLS = Path(__file__).resolve().parents[1]
RUN, GGUF = TOOLS / "bench_run.py", Path(__file__).with_name("gguf_files.py")
# what libgomp, MKL and torch read when they are loaded
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
PACKAGES = {"transformers": ["transformers"], "llama.cpp": ["llama_cpp", "gguf"]}
# other names of what is as large as ours
PRECISION = {"bf16": "bfloat16", PACKED: "bfloat16", "q8_0": "int8", "q4_0": "int4"}


@dataclass(frozen=True)
class Row:
    """name: as --rows takes it."""

    name: str
    peer: str
    dtype: str
    compiled: bool = False
    threads: int | None = None  # None: all that torch takes

    @property
    def precision(self) -> str:
        return PRECISION.get(self.dtype, self.dtype)

    @property
    def count(self) -> int:
        return self.threads or torch.get_num_threads()

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        stored = "bfloat16, packed" if self.dtype == PACKED else self.dtype
        return f"{self.peer} {stored}{', compiled' * self.compiled}{threads}"


ROWS = {
    row.name: row
    for row in [
        *(Row(name, "minillava", name) for name in ("float32", "bfloat16", "int8", "int4", PACKED)),
        *(Row(f"{n}-compiled", "minillava", n, True) for n in ("bfloat16", "int8", "int4")),
        *(Row(f"transformers-{n}", "transformers", n) for n in ("float32", "bfloat16")),
        *(
            Row(f"transformers-{n}-compiled", "transformers", n, True)
            for n in ("float32", "bfloat16")
        ),
        *(Row(f"llama.cpp-{n}", "llama.cpp", n) for n in ("bf16", "q8_0", "q4_0")),
    ]
}


def row_of(name: str) -> Row:
    """One of ROWS, or with a number of threads after an @, as in bfloat16@1. Raises ValueError."""
    base, at, threads = name.partition("@")
    if base not in ROWS or (at and not (threads.isdecimal() and int(threads) > 0)):
        raise ValueError(
            f"unknown {name}, expected some of: {', '.join(ROWS)}, each with @N for N threads"
        )
    row = ROWS[base]
    return Row(name, row.peer, row.dtype, row.compiled, int(threads)) if at else row


class Died(RuntimeError):
    """The error for a process that measured nothing; its message says in one line why."""


def run(job: dict, environment: dict[str, str | None] | None = None) -> dict:
    """What bench_run.py reports of one process.

    environment: variables that the process gets besides ours, or without one of ours that is None.
    Raises Died."""
    variables = os.environ | (environment or {})
    command = [sys.executable, str(RUN), str(time.monotonic()), json.dumps(job)]
    out = finished(command, {k: v for k, v in variables.items() if v is not None})
    return json.loads(out.splitlines()[-1])


def make_gguf(folder: Path, kind: str, target: Path) -> None:
    """Make a peer's file in a process of its own, since the peer's code may crash. Raises Died."""
    finished([sys.executable, str(GGUF), str(folder), kind, str(target)], dict(os.environ))


def finished(command: list[str], environment: dict[str, str], folder: Path | None = None) -> str:
    """What a process prints. Raises Died."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, cwd=folder
    )
    if done.returncode == 0:
        return done.stdout
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        raise Died(f"killed by {signal.Signals(-done.returncode).name}")
    raise Died(f"exit status {done.returncode}: {said[-1][:200] if said else 'it said nothing'}")
