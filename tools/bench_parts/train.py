"""train: rows per second and peak memory of a training step, ours beside transformers and PEFT on
the same weights and the same rows. Each variant is a process of its own, since peak memory is.

    python -m bench_parts.train JOB     # what a process of it does; JOB is JSON, the answer a line
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

TOOLS = Path(__file__).resolve().parents[1]
# run from a checkout, installed or not
sys.path[:0] = [str(TOOLS), str(TOOLS.parent), str(TOOLS.parent / "tests" / "support")]

from bench_parts.clock import BUSY, Neighbours, say  # noqa: E402
from bench_parts.rows import finished  # noqa: E402

PEERS = ("minillava", "transformers")
ROWS, ANSWER = 2, 40  # rows of a micro-batch, tokens that each learns
RANK = 16


class Variant(NamedTuple):
    """One training step: who computes it, and how."""

    peer: str
    learn: str  # lora, or the whole language model
    dtype: str
    checkpointing: bool
    attention: str  # eager, or fused, which is theirs of torch (sdpa)
    read: int  # tokens of a row that are only read

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.learn} {self.dtype}, {self.attention}{more}"


class Measured(NamedTuple):
    """rate: rows per second, the median of rounds. peak: bytes above those of before the step.
    whole: bytes of the process at most. loss: of the first step."""

    rate: float
    spread: float
    peak: int
    whole: int
    loss: float
    others: float


def variants(
    learns: Sequence[str], dtypes: Sequence[str], attention: str, read: int
) -> list[Variant]:
    return [
        Variant(peer, learn, dtype, again, attention, read)
        for learn in learns
        for again in (False, True)
        for dtype in dtypes
        for peer in PEERS
    ]


def train(chosen: Sequence[Variant], folder: Path, rounds: int) -> dict[Variant, Measured]:
    """Each variant once, peers one after the other. Raises Died."""
    found = {}
    for variant in chosen:
        job = {**variant._asdict(), "folder": str(folder), "rounds": rounds}
        command = [sys.executable, "-m", "bench_parts.train", json.dumps(job)]
        neighbours = Neighbours()
        out = finished(command, dict(os.environ), TOOLS)
        measured = json.loads(out.splitlines()[-1])
        found[variant] = Measured(**measured, others=sum(neighbours.taken().values()))
        say(f"{variant.peer} {variant}: {measured['rate']:.2f} rows/s")
    return found


def train_table(found: dict[Variant, Measured]) -> str:
    """A line for each way to learn; ours in relation to the peer."""
    lines = [
        "| step | rows/s, ours | theirs | ratio | peak, ours | theirs | ratio | loss, ours | theirs "
        "| others |",
        "|---|" + "---:|" * 9,
    ]
    for variant, ours in found.items():
        theirs = found.get(variant._replace(peer="transformers"))
        if variant.peer != "minillava" or theirs is None:
            continue
        busy = max(ours.others, theirs.others)
        lines.append(
            f"| {variant} | {ours.rate:.2f} ±{ours.spread:.0%} | {theirs.rate:.2f} "
            f"±{theirs.spread:.0%} | {ours.rate / theirs.rate:.2f} | {ours.whole / 1e9:.2f} GB "
            f"| {theirs.whole / 1e9:.2f} GB | {ours.whole / theirs.whole:.2f} | {ours.loss:.4f} "
            f"| {theirs.loss:.4f} | {busy:.2f}{' busy' * (busy > BUSY)} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------ inside a process


def one_process(job: dict) -> dict:
    """Make the step, take it once to warm up, and `rounds` times."""
    variant = Variant(**{name: job[name] for name in Variant._fields})
    make = our_step if variant.peer == "minillava" else their_step
    step = make(Path(job["folder"]), variant)
    before = _peak()
    loss, seconds = step(), []
    for _ in range(job["rounds"]):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "rate": ROWS / median,
        "spread": (max(seconds) - min(seconds)) / 2 / median,
        "peak": _peak() - before,
        "whole": _peak(),
        "loss": loss,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(vocabulary: int, read: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels of the rows: a picture, a question, an answer that is learnt; both as long, so
    that nobody computes padding."""
    drawn = torch.Generator().manual_seed(0)
    length = read + ANSWER
    ids = torch.randint(3, min(600, vocabulary), (ROWS, length), generator=drawn).tolist()
    ids = [[1, -200, *row] for row in ids]
    labels = [[-100] * (2 + read) + row[2 + read :] for row in ids]
    return ids, labels


def pixels_of(side: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, side, side, generator=torch.Generator().manual_seed(1))


def our_step(folder: Path, variant: Variant) -> Callable[[], float]:
    from minillava.checkpoint.folders import find_folders
    from minillava.finetune.learning import make_optimiser, prepare
    from minillava.finetune.loop import Batch, arithmetic, summed_loss
    from minillava.finetune.recipe import Recipe
    from minillava.finetune.start import open_model

    recipe = Recipe(learn=variant.learn, rank=RANK, alpha=2 * RANK, dropout=0.0, rate=1e-5,
                    projector_rate=1e-5, dtype=variant.dtype, attention=variant.attention)  # fmt: skip
    assistant = open_model(recipe, find_folders(str(folder), None, None, None), "cpu")
    model = assistant.model
    optimiser = make_optimiser(prepare(model, recipe, variant.checkpointing), recipe)
    for group in optimiser.param_groups:
        group["lr"] = group["base_rate"]
    ids, labels = rows_of(model.config.text.vocab_size, variant.read)
    batch = Batch(ids, labels, pixels_of(model.config.vision.image_size), ROWS * ANSWER)

    def step() -> float:
        with arithmetic(model, recipe):
            loss = summed_loss(model, batch) / batch.tokens
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def their_step(folder: Path, variant: Variant) -> Callable[[], float]:
    import hf
    import peft

    learns_all = variant.learn == "language"
    frozen = "float32" if learns_all else variant.dtype
    attention = {"fused": "sdpa"}.get(variant.attention, variant.attention)
    model = hf.load(folder, frozen, attention=attention)
    model.requires_grad_(False)
    if variant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if learns_all:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        model.model.multi_modal_projector.requires_grad_(True)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0,
            target_modules=r".*language_model\.layers.*_proj",
            modules_to_save=["multi_modal_projector"],
        ))  # fmt: skip
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-5, weight_decay=0.0)
    base = model if learns_all else model.base_model.model
    ids, labels = rows_of(base.config.text_config.vocab_size, variant.read)
    given = hf.inputs(base, ids, labels)
    pixels = pixels_of(base.config.vision_config.image_size)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=variant.dtype == "bfloat16"):
            loss = model(**given, pixel_values=pixels, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    print(json.dumps(one_process(json.loads(sys.argv[1]))))
