#!/usr/bin/env python3
"""Measures how far the maps and tables of `probe` can be trusted, on the bundled model and scenes it
has never seen, and prints it as markdown tables.

    python tools/probe_shapes.py --weights weights/shapes

The drawings are made from descriptions, so what a word was said of is known. Four questions:

1. Does a word lose most where its object is? Objects and words are counted as tools/point_shapes.py
   counts them for attention.
2. If the patches that a map ranks first are hidden first, how many does it take until the model
   would say another colour? Fewer is a better map.
3. If one object's colour is changed, which states of the other run turn the answer: those of the
   object's patches, of these and those around them, of the others, or of the position that answers; and in which layers?
4. Do two halves of the scenes find the same heads?
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import point_shapes
import shapes

import minillava
from minillava.assistant import Assistant
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.probe.knockout import ablate
from minillava.probe.measure import Answered
from minillava.probe.occlude import hidden_pixels, occlude
from minillava.probe.patching import Patching, patch

KINDS = ("shape", "colour", "place")
# what is hidden, and how many patches a side at once
HIDINGS = (("mean", 1), ("zero", 1), ("grey", 1), ("blur", 1), ("mean", 3), ("grey", 3))
BATCH = 9  # of the deletion test: many maps are through after the first
SETS = ("object's patches", "with neighbours", "other patches", "text between", "last position")


class Question(NamedTuple):
    """About one thing's colour, which the model answers rightly. word: its number in the answer."""

    scene: shapes.Scene
    thing: shapes.Thing
    answered: Answered
    word: int

    @property
    def text(self) -> str:
        return self.answered.question


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------- 1. where it is
def strongest(assistant: Assistant, scenes: int) -> dict[str, dict[str, list[float]]]:
    """Per map (attention, and each of HIDINGS) and kind of word: for every word that describes an
    object exactly, how much of the strongest patch, or of the patches of the strongest block, has
    its centre in the object's ninth of the picture."""
    found: dict[str, dict[str, list[float]]] = {}
    for i in range(scenes):
        progress(f"1. scene {i + 1} of {scenes}")
        scene = shapes.sample_scene(random.Random(f"probing/{i}"), i % shapes.MAX_OBJECTS + 1)
        answered = Answered(
            assistant, shapes.draw(scene), point_shapes.QUESTION, max_new_tokens=100
        )
        cell = point_shapes.cells(scene, assistant, answered.grid**2).numpy()
        words = [text.strip(".,") for text, _ in answered.words]
        maps = {"attention": np.stack(answered.attention)}  # [words, G, G]
        for hiding, block in HIDINGS:
            drops = np.moveaxis(occlude(answered, hiding, block).drops, 0, -1)
            name = f"{hiding}, {block} x {block}"
            maps[name] = np.moveaxis(answered.by_word(drops), -1, 0)
        for thing in scene.things:
            at = point_shapes.words_about(thing, words)
            for kind in KINDS if at else ():
                for name, map_ in maps.items():
                    one, inside = map_[at[kind]].ravel(), cell == thing.place
                    hit = float(inside[one == one.max()].mean())
                    found.setdefault(name, {}).setdefault(kind, []).append(hit)
    return found


# ------------------------------------------------------------------------------ colour questions
def questions(assistant: Assistant, count: int, name: str) -> list[Question]:
    """As many questions about colours as asked for, each about another scene, that the model
    answers rightly."""
    found: list[Question] = []
    for i in range(4 * count):  # it is right nearly always, but not every scene can be asked about
        rng = random.Random(f"probing {name}/{i}")
        scene = shapes.sample_scene(rng, i % shapes.MAX_OBJECTS + 1)
        alone = [t for t in scene.things if [o.shape for o in scene.things].count(t.shape) == 1]
        if alone:
            thing = rng.choice(alone)
            asked = about(assistant, scene, thing)
            found += [] if asked is None else [asked]
        if len(found) == count:
            break
    return found


def about(assistant: Assistant, scene: shapes.Scene, thing: shapes.Thing) -> Question | None:
    """The question what colour this thing is; None if the answer is wrong."""
    text = f"What color is the {thing.shape}?"
    answered = Answered(assistant, shapes.draw(scene), text)
    if answered.text != f"The {thing.shape} is {thing.colour}.":
        return None
    return Question(scene, thing, answered, len(answered.words) - 1)


# ------------------------------------------------------------------------------------ 2. deletion
def deletion(asked: Sequence[Question]) -> dict[str, list[int]]:
    """Per map: how many patches were hidden, the strongest first, when the model would have said
    another word; all and one more if that was never so."""
    found: dict[str, list[int]] = {}
    for i, question in enumerate(asked):
        progress(f"2. question {i + 1} of {len(asked)}")
        answered, rng = question.answered, np.random.default_rng(i)
        maps = {
            "attention": answered.attention[question.word],
            "random": rng.random((answered.grid, answered.grid)),
        }
        for hiding, block in HIDINGS:
            drops = np.moveaxis(occlude(answered, hiding, block).drops, 0, -1)
            maps[f"{hiding}, {block} x {block}"] = answered.by_word(drops)[..., question.word]
        for name, heat in maps.items():
            found.setdefault(name, []).append(broken_after(question, heat.ravel()))
    return found


def broken_after(question: Question, heat: np.ndarray) -> int:
    """How many of the patches, in the order of their heat, must be grey until the word's first
    token is no longer the most likely one; tried are 1, 2, ... and then about a sixth more each
    time. In the pixels, since the mean patch has some of the colour in it."""
    answered = question.answered
    order = [divmod(patch, answered.grid) for patch in np.argsort(-heat, kind="stable").tolist()]
    counts = [1]
    while counts[-1] < len(order):
        counts.append(min(len(order), counts[-1] + 1 + counts[-1] // 6))
    token, start = answered.words[question.word][1][0], answered.picture_start
    for first in range(0, len(counts), BATCH):
        some = counts[first : first + BATCH]
        rows = hidden_pixels(answered, "grey", [order[:count] for count in some])
        last = answered.kept.again(rows[:, start:], start)
        said = most_likely(answered, last[:, answered.first + token - start])
        wrong = (said != answered.ids[token]).nonzero().flatten().tolist()
        if wrong:
            return some[wrong[0]]
    return len(order) + 1


@torch.no_grad()
def most_likely(answered: Answered, last: Tensor) -> Tensor:
    """The most likely tokens after last states [B, C]: ids [B]."""
    language = answered.model.language_model
    return language.head(language.norm(last)).argmax(-1)


# ------------------------------------------------------------------------------------ 3. patching
def patched(assistant: Assistant, asked: Sequence[Question]) -> list[Patching]:
    """Each question about its scene and about one in which the thing has another colour."""
    found = []
    for i, question in enumerate(asked):
        progress(f"3. pair {i + 1} of {len(asked)}")
        scene, thing, rng = question.scene, question.thing, random.Random(f"pair/{i}")
        taken = {t.colour for t in scene.things}
        free = [c for s, c in shapes.TRAINING_PAIRS if s == thing.shape and c not in taken]
        changed = replace(thing, colour=rng.choice(free))
        things = tuple(changed if t == thing else t for t in scene.things)
        other = about(assistant, replace(scene, things=things), changed)
        if other is not None:
            found.append(patch(question.answered, other.answered))
    return found


def flips(moved: Patching, name: str) -> np.ndarray:
    """Whether B's word is ahead of A's, if state l of these positions is B's: bool [L + 1]."""
    start, goal = moved.apart
    column = list(moved.sets).index(name)
    return start + moved.moved[:, column] * (goal - start) > 0


# --------------------------------------------------------------------------------------- 4. heads
def heads_of(asked: Sequence[Question]) -> np.ndarray:
    """What the colour loses without each head, [questions, L, H]."""
    tables = []
    for i, question in enumerate(asked):
        progress(f"4. question {i + 1} of {len(asked)}")
        lost = ablate(question.answered).heads  # [L, H, m]
        tables.append(question.answered.by_word(lost)[..., question.word])
    return np.stack(tables)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two arrays without equal numbers."""
    ranks = [x.ravel().argsort().argsort() for x in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


# ----------------------------------------------------------------------------------------- report
def percent(hits: Sequence[float] | np.ndarray) -> str:
    return f"{100 * float(np.mean(hits)):.1f}"


def report_strongest(found: dict[str, dict[str, list[float]]], scenes: int) -> list[str]:
    counted = len(found["attention"]["shape"])
    lines = [
        f"{scenes} scenes, {counted} objects described exactly right.\n",
        "| strongest patch in the object's ninth, % | shape word | colour word | place word |",
        "|---|---:|---:|---:|",
    ]
    for name, kinds in found.items():
        lines.append(f"| {name} | " + " | ".join(percent(kinds[kind]) for kind in KINDS) + " |")
    return lines


def report_deletion(found: dict[str, list[int]], patches: int) -> list[str]:
    count = len(next(iter(found.values())))
    lines = [
        "",
        f"| {count} colour questions: patches hidden until another word | median | mean "
        "| never, % |",
        "|---|---:|---:|---:|",
    ]
    for name, needed in sorted(found.items(), key=lambda row: np.mean(row[1])):
        never = percent([n > patches for n in needed])
        lines.append(f"| {name} | {np.median(needed):.0f} | {np.mean(needed):.1f} | {never} |")
    return lines


def report_patching(found: Sequence[Patching]) -> list[str]:
    lines = [
        "",
        f"| {len(found)} pairs: the word flips, %; by state | {' | '.join(SETS)} |",
        "|---|" + "---:|" * len(SETS),
    ]
    by_set = {name: np.stack([flips(each, name) for each in found]) for name in SETS}
    for state in range(len(found[0].moved)):
        row = [percent(by_set[name][:, state]) for name in SETS]
        lines.append(f"| {state} | " + " | ".join(row) + " |")
    return lines


def report_heads(tables: np.ndarray) -> list[str]:
    halves = tables[::2].mean(0), tables[1::2].mean(0)  # [L, H]
    mean = tables.mean(0)
    best = np.argsort(-mean.ravel())[:3]
    told = [
        f"layer {i // mean.shape[1]} head {i % mean.shape[1]} {mean.ravel()[i]:.2f}" for i in best
    ]
    same = [{*np.argsort(-half.ravel())[:3].tolist()} for half in halves]
    return [
        "",
        f"{len(tables)} colour questions, the table of {mean.size} heads on both halves: rank "
        f"correlation {rank_correlation(*halves):.2f}; {len(same[0] & same[1])} of the first three "
        f"heads are the same. Nats that the colour loses: {', '.join(told)}.",
    ]


def measure(assistant: Assistant, scenes: int) -> list[str]:
    """All four, each on so many scenes."""
    lines = report_strongest(strongest(assistant, scenes), scenes)
    asked = questions(assistant, scenes, "colours")
    if not asked:
        raise ValueError("no question about a colour was answered rightly: nothing to measure")
    lines += report_deletion(deletion(asked), asked[0].answered.grid ** 2)
    lines += report_patching(patched(assistant, asked))
    lines += report_heads(heads_of(asked))
    progress("")
    return lines


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "weights" / "shapes"
    parser.add_argument("--weights", type=Path, default=default)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to gain from a second one
    assistant = minillava.load(options.weights, dtype=options.dtype, device="cpu")
    print("\n".join(measure(assistant, options.scenes)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, verbose=True, prints=True))
