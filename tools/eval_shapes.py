#!/usr/bin/env python3
"""Ask the bundled model about scenes it has never seen, and print how often its answers are
exactly true, as Markdown.

    python tools/eval_shapes.py --weights weights/shapes
    python tools/eval_shapes.py --contrast    # what sampling and contrastive decoding make of it
    python tools/eval_shapes.py --shape heart --adapter LORA   # a shape that was learnt later

Everything goes through minillava's public functions: `load`, the template, and batched greedy
`generate`.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import multiprocessing
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes

import minillava
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.generate.contrast import METHODS, Contrast
from minillava.generate.generation import generate
from minillava.options import KINDS
from minillava.prompt import place_images, render

MAX_NEW_TOKENS = 100
Item = tuple[shapes.Dialogue, Image.Image]
HELD_OUT_SCENE = {"pairs": shapes.PAIRS, "must_have": sorted(shapes.HELD_OUT)}


def make_items(
    name: str, count: int, kinds: Sequence[str] = shapes.KINDS, picture=None, **scene_options
) -> list[Item]:
    """One dialogue of each kind about each of `count` scenes, where it can be asked. picture: what
    is shown instead of the drawing, made from the scene and its random numbers."""
    items = []
    for i in range(count):
        rng = random.Random(f"evaluation/{name}/{i}")
        scene = shapes.sample_scene(rng, **scene_options)
        shown = shapes.draw(scene) if picture is None else picture(scene, rng)
        for kind in kinds:
            dialogue = shapes.ask(
                scene, kind, rng, scene_options.get("pairs", shapes.TRAINING_PAIRS)
            )
            if dialogue is not None:
                items.append((dialogue, shown))
    return items


def names_held_out(dialogue: shapes.Dialogue) -> bool:
    """Whether a question or an answer puts a held-out pair into words."""
    words = [f"{colour} {shape}" for shape, colour in shapes.HELD_OUT]
    words += [f"{shape} is {colour}" for shape, colour in shapes.HELD_OUT]
    return any(word in text for turn in dialogue.turns for text in turn for word in words)


def noise(scene: shapes.Scene, rng: random.Random) -> Image.Image:
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (scene.height, scene.width, 3), np.uint8
    )
    return Image.fromarray(pixels)


def blank(scene: shapes.Scene, rng: random.Random) -> Image.Image:
    """The scene's background without its things."""
    return shapes.draw(replace(scene, things=()))


def answer(
    assistant, items: Sequence[Item], contrast: Contrast | None = None, **options
) -> list[str]:
    """The model's answer to the last question of every dialogue; earlier turns are given with their
    true answers. options: those of `generate`."""
    ids = []
    for dialogue, _ in items:
        turns = [
            (place_images(q, 1) if i == 0 else q, a) for i, (q, a) in enumerate(dialogue.turns)
        ]
        ids.append(
            assistant.tokenizer.encode(
                render(assistant.template, [*turns[:-1], (turns[-1][0], None)])
            )
        )
    pictures = [picture for _, picture in items]
    second = contrast and contrast.second(
        ids, pictures, assistant.image_processor, torch.Generator().manual_seed(0)
    )
    made = generate(
        assistant.model,
        ids,
        assistant.image_processor(pictures),
        second=second,
        contrast=contrast,
        max_new_tokens=MAX_NEW_TOKENS,
        tokenizer=assistant.tokenizer,
        **options,
    )
    return made.text


def answer_all(
    answer_batch: Callable, items: Sequence[Item], batch: int = 64, map=map
) -> list[str]:
    """All answers, in the order of the items. map: runs the batches, one after the other or in
    several processes."""
    # alike together
    order = sorted(
        range(len(items)), key=lambda i: (items[i][0].kind, len(items[i][0].turns[-1][1]))
    )
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    answers = [""] * len(items)
    for chosen, texts in zip(
        batches, map(answer_batch, [[items[i] for i in b] for b in batches]), strict=True
    ):
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


class Worker:
    """One process of the evaluation, with a model of its own."""

    assistant = None

    @classmethod
    def open(
        cls, weights: Path, dtype: str, quantize: str | None, adapter: Path | None = None
    ) -> None:
        torch.set_num_threads(1)  # two processes of one thread each beat one process of two threads
        cls.assistant = minillava.load(
            weights, dtype=dtype, device="cpu", quantize=quantize, adapter=adapter
        )

    @classmethod
    def answer(cls, items: Sequence[Item], **options) -> list[str]:
        return answer(cls.assistant, items, **options)


def score(items, answers) -> dict[str, tuple[int, int]]:
    """For each kind, how many answers are exactly the true one, and of how many."""
    counts = defaultdict(lambda: [0, 0])
    for (dialogue, _), answer in zip(items, answers, strict=True):
        counts[dialogue.kind][0] += answer == dialogue.turns[-1][1]
        counts[dialogue.kind][1] += 1
    return {kind: (right, asked) for kind, (right, asked) in counts.items()}


def pope(items, answers) -> dict[str, float]:
    """For yes/no questions, the figures of POPE (Li et al. 2023); "yes" is the positive class."""
    pairs = [
        (a, d.turns[-1][1]) for (d, _), a in zip(items, answers, strict=True) if d.kind == "yes/no"
    ]
    said, true = [a.startswith("Yes") for a, _ in pairs], [t.startswith("Yes") for _, t in pairs]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(true))
    return {
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / len(pairs),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / max(1e-9, precision + recall),
        "yes-ratio": sum(said) / len(pairs),
    }


def conditions(scenes: int) -> dict[str, list]:
    fewer = max(1, scenes // 5)
    return {
        "unseen scenes": make_items("plain", scenes),
        "held-out pairs": [
            item
            for item in make_items("held-out", 2 * fewer, **HELD_OUT_SCENE)
            if names_held_out(item[0])
        ],
        "other sizes": make_items("sizes", fewer, sides=(261, 800)),
        "wider, taller": make_items("aspects", fewer, aspects=(0.7, 1 / 0.7)),
        "smooth edges": make_items(
            "smooth", fewer, picture=lambda scene, rng: shapes.draw(scene, sharpness=3)
        ),
        "noise": make_items("noise", fewer, picture=noise),
    }


def items_of_shape(shape: str, scenes: int) -> list[Item]:
    """Dialogues about scenes with a new shape, of which a question or an answer names it."""
    new = shapes.pairs_of(shape)
    made = make_items(shape, scenes, pairs=(*shapes.TRAINING_PAIRS, *new), must_have=new)
    return [item for item in made if any(shape in text for turn in item[0].turns for text in turn)]


def report_shape(ask: Callable, scenes: int, shape: str) -> str:
    """The table of a shape that was learnt later, beside what the model knew before."""
    columns = {f"{shape}s": items_of_shape(shape, scenes), "old": make_items("plain", scenes)}
    found = {name: score(items, ask(items)) for name, items in columns.items()}
    lines = [f"| exact match, % | {' | '.join(found)} |", "|---|---:|---:|"]
    for kind in shapes.KINDS:
        cells = [percent(*scored.get(kind, (0, 0))) for scored in found.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    sums = [[sum(counts) for counts in zip(*each.values(), strict=True)] for each in found.values()]
    lines.append(f"| all | {' | '.join(percent(*each) for each in sums)} |")
    lines.append(f"| answers | {' | '.join(str(asked) for _, asked in sums)} |")
    return "\n".join(lines)


def report(ask: Callable, scenes: int) -> str:
    """The tables, in Markdown. ask: maps items to answers."""
    results, chosen, yes_no = {}, conditions(scenes), {}
    for name, items in chosen.items():
        started = time.perf_counter()
        answers = ask(items)
        results[name] = score(items, answers)
        if name in ("unseen scenes", "held-out pairs", "noise"):
            yes_no[name] = pope(items, answers)
        figures = ", ".join(
            f"{kind} {percent(*counted)}" for kind, counted in results[name].items()
        )
        took = time.perf_counter() - started
        print(
            f"{name}: {len(items)} answers in {took:.0f} s: {figures}", file=sys.stderr, flush=True
        )
    empty = make_items("blank", max(1, scenes // 5), kinds=("describe",), picture=blank)
    answers = ask(empty)
    seen_empty = sum(answer == shapes.EMPTY for answer in answers)

    lines = ["| exact match, % | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for kind in shapes.KINDS:
        cells = [percent(*scored.get(kind, (0, 0))) for scored in results.values()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    counts = [sum(asked for _, asked in scored.values()) for scored in results.values()]
    lines.append("| answers | " + " | ".join(map(str, counts)) + " |")
    lines += [
        "",
        "| yes/no, % | " + " | ".join(next(iter(yes_no.values()))) + " |",
        "|---|" + "---:|" * 5,
    ]
    for name, figures in yes_no.items():
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in figures.values()) + " |"
        )
    lines += ["", f'Blank pictures described as "{shapes.EMPTY}": {seen_empty} of {len(empty)}.']
    return "\n".join(lines)


CHOICES = {
    "greedy": {},
    "sampling": {"temperature": 1.0, "seed": 0},
    **{
        f"sampling, {name}": {"temperature": 1.0, "seed": 0, "contrast": make()}
        for name, make in METHODS.items()
    },
    **{f"greedy, {name}": {"contrast": make()} for name, make in METHODS.items()},
}


def report_contrast(ask: Callable, scenes: int) -> str:
    """POPE's figures and the descriptions of unseen scenes for every way to choose tokens, methods
    at their defaults. ask: from items and the options of a way to answers."""
    items = make_items("contrast", scenes, kinds=("describe", "yes/no"))
    lines = []
    for name, options in CHOICES.items():
        answers = ask(items, options)
        counted, figures = score(items, answers), pope(items, answers)
        cells = [
            with_error(*counted["yes/no"]),
            *(f"{100 * figures[k]:.1f}" for k in ("precision", "recall", "F1")),
        ]
        lines.append(f"| {name} | {' | '.join([*cells, with_error(*counted['describe'])])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = [
        "| % | yes/no right | precision | recall | F1 | descriptions exactly right |",
        "|---|" + "---:|" * 5,
    ]
    return "\n".join([*head, *lines])


def with_error(right: int, asked: int) -> str:
    """A percentage with its standard error."""
    p = right / asked
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / asked) ** 0.5:.1f}"


def percent(right: int, asked: int) -> str:
    return f"{100 * right / asked:.1f}" if asked else "–"


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "weights" / "shapes"
    parser.add_argument("--weights", type=Path, default=default)
    parser.add_argument(
        "--scenes",
        type=int,
        default=1000,
        help="unseen scenes; the other columns have a fifth of it",
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=KINDS)
    parser.add_argument(
        "--contrast", action="store_true", help="compare ways to choose tokens, instead"
    )
    parser.add_argument(
        "--shape", choices=shapes.NEW_SHAPES, help="ask about a shape that was learnt later, and "
        "about unseen scenes of the old ones, instead"
    )  # fmt: skip
    parser.add_argument("--adapter", type=Path, metavar="LORA", help="what was learnt")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default 2)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error happened")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    opened = options.weights, options.dtype, options.quantize, options.adapter
    with ProcessPoolExecutor(options.workers, spawn, Worker.open, opened) as pool:

        def ask(items: Sequence[Item], chosen: dict | None = None) -> list[str]:
            return answer_all(partial(Worker.answer, **chosen or {}), items, map=hand_out)

        def hand_out(answer_batch: Callable, batches: Sequence) -> Iterator[list[str]]:
            with interrupts.blocked():  # the workers are started here
                futures = [pool.submit(answer_batch, batch) for batch in batches]
            # pool.map would cancel the rest, at which a pool without workers stumbles
            return (future.result() for future in futures)

        try:
            if options.shape:
                print(report_shape(ask, options.scenes, options.shape))
            else:
                print((report_contrast if options.contrast else report)(ask, options.scenes))
        except KeyboardInterrupt:
            # The pool would wait for all that is handed out, and Python for what is not sent yet.
            pool._call_queue.cancel_join_thread()
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return 0


if __name__ == "__main__":
    interrupts.end(
        lambda: run(main, verbose=not {"-v", "--verbose"}.isdisjoint(sys.argv), prints=True)
    )
