"""What the sections of tools/gpu_check.py share: their rows and arguments, tensors of ours and of
transformers under one name, and their distance to float64."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import hf
import torch
from bench_checkpoint import config_of
from torch import Tensor

from minillava.assistant import Assistant
from minillava.attention import ATTENTION
from minillava.checkpoint.folders import bundled_weights
from minillava.config import LlavaConfig
from minillava.fast import compiled as capture
from minillava.llava import Llava

BUNDLED = bundled_weights()
PICTURES = [BUNDLED / f"example-{number}.png" for number in (1, 2, 3)]
QUESTIONS = (
    "Is there a red star?",
    "What is at the bottom?",
    "Please describe this image in detail.",
)
PRECISIONS = ("float32", "bfloat16", "float16")
SIZES = {"7b": "7b", "1b": "1b", "tiny": "toy"}  # by bench_checkpoint's names

OK, FAILED, MEASURED, SKIPPED = "ok", "FAILED", "measured", "skipped"


@dataclass
class Row:
    section: str
    check: str
    dtype: str
    found: str
    expected: str
    verdict: str


class Report:
    """The rows so far. They are shown as they come and written to a file, so that a run that is
    killed loses none."""

    def __init__(self, about: dict, path: Path | None):
        self.about, self.path, self.rows, self.section = about, path, [], ""
        self.started = time.monotonic()

    def check(self, what: str, dtype: str, found: object, expected: object, good: bool) -> None:
        self._add(Row(self.section, what, dtype, str(found), str(expected), OK if good else FAILED))

    def measure(self, what: str, dtype: str, found: object) -> None:
        self._add(Row(self.section, what, dtype, str(found), "", MEASURED))

    def skip(self, what: str, why: str) -> None:
        self._add(Row(self.section, what, "", why, "", SKIPPED))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        seconds = time.monotonic() - self.started
        shown = f"{row.section}: {row.check} {row.dtype}: {row.found}"
        expected = f" (expected {row.expected})" if row.expected else ""
        print(f"{seconds:6.1f} s  {shown}{expected}: {row.verdict}", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Write under a temporary name first, so that a file that exists is whole."""
        if self.path is None:
            return
        rows = [asdict(row) for row in self.rows]
        partial_path = self.path.with_name(self.path.name + ".partial")
        partial_path.write_text(
            json.dumps({"about": self.about, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(partial_path, self.path)

    @property
    def failed(self) -> int:
        return sum(row.verdict == FAILED for row in self.rows)

    def table(self) -> str:
        """The table, in Markdown."""
        cells = [("check", "dtype", "found", "expected", "verdict")]
        cells += [
            (f"{r.section}: {r.check}", r.dtype, r.found, r.expected, r.verdict) for r in self.rows
        ]
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
        return "\n".join([*(f"{name}: {value}  " for name, value in self.about.items()), "", lines[0],
                          "|---" * len(cells[0]) + "|", *lines[1:]])  # fmt: skip


class Missing(Exception):
    """What a check needs is not installed here."""


@dataclass
class Run:
    """The arguments of every section."""

    device: str
    size: str
    report: Report

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def config(self) -> LlavaConfig:
        return config_of(SIZES[self.size])


# --- tensors that are compared ---------------------------------------------------------------------


@torch.no_grad()
def tensors_of(model: Llava, ids: list, pixels: Tensor) -> dict[str, Tensor]:
    """What is compared: the tensors of one pass without a cache, without padded positions."""
    prompt = model.splice(ids, pixels)
    eager = model.language_model.attend is ATTENTION["eager"]
    out = model.language_model(
        prompt.embeds, prompt.padding_mask, hidden_states=True, attentions=eager
    )
    real = prompt.padding_mask  # None if nothing is padding
    return real_only(out, torch.ones_like(prompt.token_ids).bool() if real is None else real)


def their_inputs(theirs, ids: list, pixels: Tensor) -> dict[str, Tensor]:
    given = {name: tensor.to(theirs.device) for name, tensor in hf.inputs(theirs, ids).items()}
    return given | {"pixel_values": pixels.to(theirs.device, theirs.dtype)}


@torch.no_grad()
def their_tensors(theirs, ids: list, pixels: Tensor) -> dict[str, Tensor]:
    given = their_inputs(theirs, ids, pixels)
    eager = theirs.config._attn_implementation == "eager"
    out = theirs(**given, use_cache=False, output_hidden_states=True, output_attentions=eager)
    return real_only(out, given["attention_mask"].bool())


def real_only(out, mask: Tensor) -> dict[str, Tensor]:
    tensors = {f"hidden_states.{i}": x[mask] for i, x in enumerate(out.hidden_states)}
    tensors |= {
        f"attentions.{i}": x.transpose(1, 2)[mask] for i, x in enumerate(out.attentions or ())
    }
    return tensors | {"logits": out.logits[mask]}


def distance(x: Tensor, exact: Tensor) -> dict[str, float]:
    """Two distances to the exact tensor. max: the largest difference. norm: of the whole tensor, as a
    fraction of the exact one."""
    difference = x.double() - exact.double()
    return {
        "max": float(difference.abs().max()),
        "norm": float(difference.norm() / exact.double().norm()),
    }


def within(dtype: str) -> tuple[str, float]:
    """What README promises of a computation beside transformers': which distance to float64, and
    how many times theirs."""
    return ("max", 2.0) if dtype == "float32" else ("norm", 1.1)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions without TF32, so that transformers' float32 is one."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def captured_model(assistant: Assistant, device: str) -> Assistant:
    if device == "cpu":
        decode_step = partial(capture.step, assistant.model.language_model)
        assistant.model.decoding = capture.Captured(decode_step)
    else:
        capture.compile_decode(assistant.model)
    return assistant
