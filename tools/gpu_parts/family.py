"""family: small random networks of every kind that minillava opens, on the device, beside
transformers: bit for bit, or both by their distance to float64; and their answers, which must be
the CPU's."""

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import drawn
import hf
import tiled
import torch
from paths import REFERENCE
from torch import Tensor

from gpu_parts.common import (
    PRECISIONS,
    Missing,
    Run,
    captured_model,
    distance,
    tensors_of,
    their_tensors,
    within,
    without_tf32,
)
from minillava.assistant import load
from minillava.files.disk import one_line
from minillava.generate.generation import generate
from minillava.llava import Llava

KINDS = {
    "LLaVA-1.5": "plain",
    "Llama 3's heads": "grouped",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "llava-interleave": "interleave",
    "ViP-LLaVA": "vip",
}
"""By the name that is shown, as tests/support/drawn.py draws them."""

TILED = {"LLaVA-1.6": "llama", "LLaVA-1.6, Mistral": "mistral", "LLaVA-1.6, Qwen2": "qwen2"}
"""Likewise, the language models of tests/support/tiled.py."""

CAPTURED = ("llava-interleave", "LLaVA-1.6, Mistral")  # whose steps are compiled, too
TOKENS = 16  # of an answer

Tensors = dict[str, Tensor]


@dataclass
class Drawn:
    """One network in a folder, and how it is asked: `inputs` gives the rows of ids and what they
    see, for a model of ours; `ours` and `theirs` compute the tensors that are compared."""

    name: str
    folder: Path
    inputs: Callable[[Any], tuple[list, Any]]
    ours: Callable[[Llava, list, Any], Tensors]
    theirs: Callable[[Any, list, Any], Tensors]


def family(run: Run) -> None:
    if not find_spec("transformers"):
        run.report.skip("all of it", "transformers is not installed")
        return
    with tempfile.TemporaryDirectory(prefix="family-") as folder, without_tf32():
        for name, make in networks(Path(folder)).items():
            try:
                one = make()
                compare(run, one)
                compare_answers(run, one)
            except TimeoutError:  # of the section
                raise
            except Missing as missing:
                run.report.skip(name, str(missing))
            except Exception as error:  # the other kinds are still asked
                found = f"failed: {type(error).__name__}: {one_line(error)[:200]}"
                run.report.check(f"{name}: no error", "", found, "none", False)


def networks(folder: Path) -> dict[str, Callable[[], Drawn]]:
    """By name, what makes each kind. Raises Missing for one that this transformers does not
    know."""
    square = {
        name: partial(a_square_one, name, kind, folder / kind) for name, kind in KINDS.items()
    }
    return square | {
        name: partial(a_tiled_one, name, text, folder / f"tiled-{text}")
        for name, text in TILED.items()
    }


def a_square_one(name: str, kind: str, folder: Path) -> Drawn:
    choose = random.Random(kind)
    config = drawn.draw_config(kind, choose)
    write(folder, config)
    size, words = config["vision_config"]["image_size"], config["image_token_index"]
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    rows = drawn.draw_rows([0, 1, 2], words, choose)
    return Drawn(name, folder, lambda assistant: (rows, pixels), tensors_of, their_tensors)


def a_tiled_one(name: str, text: str, folder: Path) -> Drawn:
    write(folder, tiled.config_of(text))
    ids = [1, 7, hf.IMAGE, 13, hf.IMAGE, 13, 20, 30, 40]
    shown = [tiled.draw(*size) for size in tiled.SIZES[:2]]

    @torch.no_grad()
    def ours(model: Llava, rows: list, pictures: Any) -> Tensors:
        return {"logits": model(rows, pictures).logits[0]}

    def theirs(model: Any, rows: list, pictures: Any) -> Tensors:
        return {"logits": tiled.theirs_of(model, rows[0], pictures)}

    return Drawn(name, folder, lambda each: ([ids], each.image_processor(shown)), ours, theirs)


def write(folder: Path, config: dict) -> None:
    try:
        hf.classes(config)
    except (AttributeError, ImportError) as error:
        raise Missing(f"transformers does not have it: {one_line(error)[:120]}") from None
    state = hf.random_state(config, seed=7)
    hf.write_checkpoint(folder, config, state, tokenizer=REFERENCE / "plain" / "tokenizer.model")


def compare(run: Run, one: Drawn) -> None:
    """Eager ours beside eager theirs, in every precision. Float64 of the weights of that precision
    judges where the bits differ, so that only the computation rounds."""
    for dtype in PRECISIONS:
        assistant = load(one.folder, device=run.device, dtype=dtype, attention="eager")
        rows, seen = one.inputs(assistant)
        ours = one.ours(assistant.model, rows, seen)
        theirs = one.theirs(hf.load(one.folder, dtype).to(run.device), rows, seen)
        same = sum(torch.equal(ours[name], theirs[name]) for name in ours)
        found, expected = f"{same} of {len(ours)} tensors bit-identical", "all"
        good = same == len(ours)
        if run.on_gpu and not good:  # where nobody promises it
            exact_model = load(one.folder, device=run.device, dtype="float64", attention="eager")
            weights = assistant.model.state_dict()
            exact_model.model.load_state_dict({name: w.double() for name, w in weights.items()})
            exact = one.ours(exact_model.model, rows, seen)["logits"]
            kind, factor = within(dtype)
            error, bound = (distance(each["logits"], exact)[kind] for each in (ours, theirs))
            found += f", logits to float64 ({kind}) {error:.3e}"
            expected += f", or at most {factor} × transformers' {bound:.3e}"
            good = error <= factor * bound
        run.report.check(f"{one.name}: eager beside transformers'", dtype, found, expected, good)


def compare_answers(run: Run, one: Drawn) -> None:
    """Greedy ids in float32, alone, as a batch and captured: those of the CPU. With random weights
    any token may be the end token, so none is."""
    right = answers_of(one, "cpu")
    ways = {"fused": {}, "eager": {"attention": "eager"}}
    if one.name in CAPTURED:
        ways["captured"] = {"compile": True}
    for way, options in ways.items():
        found = answers_of(one, run.device, **options)
        same = sum(a == b for a, b in zip(found, right, strict=True))
        told = f"{same} of {len(right)} as on the CPU"
        run.report.check(f"{one.name}: ids, {way}", "float32", told, "all", found == right)


def answers_of(one: Drawn, device: str, compile: bool = False, **options: Any) -> list[list[int]]:
    """The ids of all rows together, and of the last one alone, which has the last two pictures."""
    assistant = load(one.folder, device=device, dtype="float32", **options)
    assistant = captured_model(assistant, device) if compile else assistant
    model = assistant.model
    model.config = replace(model.config, eos_token_ids=())
    rows, seen = one.inputs(assistant)
    ask = partial(generate, model, max_new_tokens=TOKENS)
    own = rows[-1].count(hf.IMAGE)
    together, last = ask(rows, seen), ask(rows[-1:], seen[len(seen) - own :])
    return [*together.sequences.tolist(), *last.sequences.tolist()]
