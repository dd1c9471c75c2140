"""parallel: one model in two processes of one thread each, beside one process with two threads, and
beside torch's own way to divide a model (DTensor).

    torchrun --nproc-per-node 2 tools/bench_parts/parallel.py JOB   # what the processes of a variant do;
                                                                    # JOB is JSON, the answer a line
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TOOLS = Path(__file__).resolve().parents[1]
# run from a checkout, installed or not; without this folder, whose names hide some of Python's own
if __name__ == "__main__":
    sys.path[:1] = [str(TOOLS), str(TOOLS.parent)]

import minillava  # noqa: E402
from bench_parts.clock import Neighbours, say  # noqa: E402
from bench_parts.rows import finished  # noqa: E402
from minillava.assistant import Assistant  # noqa: E402
from minillava.fast import parallel  # noqa: E402
from minillava.generate.generation import generate  # noqa: E402
from minillava.llama import LanguageModel  # noqa: E402

PROCESSES = 2
# Their layers are divided as ours are: what comes out of these has a part of the columns,
BY_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
# and what comes out of these is a sum.
BY_ROWS = ("o_proj", "down_proj")


class Variant(NamedTuple):
    """attention: eager has torch's products, fused those of this processor (fast/)."""

    way: str  # whole, sums or DTensor
    attention: str

    def __str__(self) -> str:
        name = {
            "whole": f"1 process, {PROCESSES} threads",
            "sums": f"{PROCESSES} processes, sums",
            "DTensor": f"{PROCESSES} processes, DTensor",
        }[self.way]
        return f"{name}, {self.attention}"


VARIANTS = [
    Variant("whole", "fused"),
    Variant("sums", "fused"),
    Variant("whole", "eager"),
    Variant("sums", "eager"),
    Variant("DTensor", "eager"),
]


class Measured(NamedTuple):
    """prompt, step: seconds, one of each round. others: cores that other processes kept busy.
    weights, peak: bytes of each process, rank 0's first: what it keeps, and the most that it took
    above that of before it loaded, until the answer is made; what is mapped from a file counts once
    it is read, which nobody reads of the vision tower here. ids: the answer."""

    prompt: list[float]
    step: list[float]
    others: list[float]
    weights: list[int]
    peak: list[int]
    ids: list[int]


def in_parts(
    folder: Path, dtype: str, quantize: str | None, positions: int, tokens: int, rounds: int
) -> dict[Variant, Measured]:
    """Every variant takes its turn in each round, in processes of its own. Quantised layers are not
    for DTensor."""
    variants = [each for each in VARIANTS if not quantize or each.way != "DTensor"]
    found = {variant: Measured(*([] for _ in Measured._fields)) for variant in variants}
    for number in range(rounds):
        for variant, measured in found.items():
            job = variant._asdict() | {"folder": str(folder), "dtype": dtype, "quantize": quantize}
            neighbours = Neighbours()
            told = started(job | {"positions": positions, "tokens": tokens})
            measured.others.append(sum(neighbours.taken().values()))
            measured.prompt.append(told["prompt"])
            measured.step.append(told["step"])
            measured.weights[:], measured.peak[:] = told["weights"], told["peak"]
            measured.ids[:] = told["ids"]
            say(f"round {number + 1} of {rounds}, {variant}: {told['step'] * 1000:.0f} ms a step")
    return found


def started(job: dict) -> dict:
    """What rank 0 of a variant's processes prints. Raises Died."""
    alone = job["way"] == "whole"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [sys.executable, *([] if alone else torchrun), __file__, json.dumps(job)]
    environment = os.environ | {"OMP_NUM_THREADS": str(PROCESSES if alone else 1)}
    return json.loads(finished(command, environment).splitlines()[-1])


def parallel_table(found: dict[Variant, Measured]) -> str:
    lines = [
        "| | prompt, s | a token, ms | tokens/s, of one process | weights of each, MB | most memory, "
        "MB | same answer | others |",
        "|---|" + "---:|" * 7,
    ]
    for variant, measured in found.items():
        prompt, step = map(statistics.median, (measured.prompt, measured.step))
        whole = found[Variant("whole", variant.attention)]
        alone = statistics.median(whole.step)
        lines.append(
            f"| {variant} | {prompt:.2f} | {1000 * step:.0f} | {alone / step:.2f} | "
            f"{', '.join(f'{each / 1e6:,.0f}' for each in measured.weights)} | "
            f"{', '.join(f'{each / 1e6:,.0f}' for each in measured.peak)} | "
            f"{'yes' if measured.ids == whole.ids else 'no'} | "
            f"{statistics.median(measured.others):.2f} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ inside a process


def one_process(job: dict) -> dict | None:
    """What rank 0 finds; None in the other processes."""
    before = _status("VmRSS")
    assistant = minillava.load(
        job["folder"], device="cpu", dtype=job["dtype"], attention=job["attention"],
        quantize=job["quantize"], parallel=job["way"] == "sums",
    )  # fmt: skip
    all_of_it = (*assistant.model.parameters(), *assistant.model.buffers())
    kept = (each for each in all_of_it if not each.is_meta)
    weights = sum(each.numel() * each.element_size() for each in kept)
    of_all: list = [(weights, before)]
    if job["way"] != "whole":
        if job["way"] == "DTensor":
            by_dtensor(assistant)
        of_all *= PROCESSES
        dist.all_gather_object(of_all, (weights, before))
    if job["way"] == "sums" and parallel.rank():
        parallel.follow(assistant.model.language_model)
        return None
    ids = [list(range(5, 5 + job["positions"]))]
    timed(assistant, ids, 2)  # warms up
    prompt, _ = timed(assistant, ids, 1)
    whole, answer = timed(assistant, ids, 1 + job["tokens"])
    language, nothing = assistant.model.language_model, torch.zeros(1)
    if job["way"] == "sums":
        peaks = language.run(most_of_each, nothing, None)
        parallel.end_followers()
    else:
        peaks = (
            [_status("VmHWM")] if job["way"] == "whole" else most_of_each(language, nothing, None)
        )
    return {
        "prompt": prompt,
        "step": (whole - prompt) / job["tokens"],
        "ids": answer,
        "weights": [weights for weights, _ in of_all],
        "peak": [peak - before for peak, (_, before) in zip(peaks, of_all, strict=True)],
    }


def most_of_each(language: LanguageModel, x: Tensor, caches: None) -> list[int]:
    """The most that each process has taken so far. `SharedLanguageModel.run` runs it in all."""
    told = [0] * PROCESSES
    dist.all_gather_object(told, _status("VmHWM"))
    return told


def timed(
    assistant: Assistant, ids: Sequence[Sequence[int]], tokens: int
) -> tuple[float, list[int]]:
    """Seconds of an answer of so many tokens, and its ids."""
    began = time.perf_counter()
    found = generate(assistant.model, ids, max_new_tokens=tokens, min_new_tokens=tokens)
    return time.perf_counter() - began, found.sequences[0].tolist()


def by_dtensor(assistant: Assistant) -> None:
    """Divide the language model as torch's own tensor parallelism does. Every process then runs the
    whole program. Its head is divided, too, and all get all logits."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    dist.init_process_group("gloo")
    language = assistant.model.language_model
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for name, _ in language.named_modules():
        last = name.rpartition(".")[2]
        if last in BY_COLUMNS:
            plan[name] = ColwiseParallel()
        elif last in BY_ROWS:
            plan[name] = RowwiseParallel()
    parallelize_module(language, init_device_mesh("cpu", (PROCESSES,)), plan)
    # the cache has the heads of this process
    share = parallel.Share(dist.get_rank(), PROCESSES)
    language.config = share.config(language.config)
    assistant.model.config = replace(assistant.model.config, text=language.config)


def _status(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    answer = one_process(json.loads(sys.argv[1]))
    if answer is not None and parallel.rank() == 0:
        print(json.dumps(answer))
