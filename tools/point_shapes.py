#!/usr/bin/env python3
"""Measures whether the bundled model's attention points at what it talks about, and prints it as
markdown tables.

    python tools/point_shapes.py --weights weights/shapes

The model describes scenes it has never seen. A word about an object points at it when the hottest
patch of its map (minillava/look/run.py) has its centre in the object's ninth of the picture; guessing
would be right one time in nine. Only objects that the answer describes exactly right are counted:
of the others nobody knows which one was meant. Choose the default layers of look/run.py (`DEPTH`) by
the first table, and measure again whenever the weights change.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes

import minillava
from minillava.assistant import Assistant
from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.look import run as look
from minillava.tokenizer import TextDecoder

QUESTION = "Please describe this image in detail."
# the words of "large red star at the top left", in their order
KINDS = ("size", "colour", "shape", "place")


def rows_by_word(assistant: Assistant, picture) -> list[tuple[str, Tensor]]:
    """The words of the model's description, and the attention [L, H, P] of each: the mean over its
    tokens."""
    spliced = assistant.prepare(picture, assistant.prompt(QUESTION))
    options, decoder, pieces, rows = (
        assistant.options(max_new_tokens=100),
        TextDecoder(assistant.tokenizer),
        [],
        [],
    )
    for step, row in look.watch(assistant.model, spliced, options, assistant.tokenizer):
        pieces.append(decoder.feed(step.ids[0]))
        rows.append(row)
    words = look.join_words(pieces)
    return [
        (text.strip(".,"), torch.stack([rows[i] for i in tokens]).mean(0)) for text, tokens in words
    ]


def words_about(thing: shapes.Thing, words: list[str]) -> dict[str, int]:
    """Where in a description each kind of word about one thing stands; {} where the thing is not
    described exactly. Of the place it is the last word that tells ("left" of "at the top left")."""
    phrase = f"{thing.size} {thing.name} {shapes.PLACES[thing.place]}".split()
    for at in range(len(words)):
        end = at + len(phrase)
        # "at the top" is also how "at the top left" begins
        if words[at:end] == phrase and words[end : end + 1] not in (["left"], ["right"]):
            return dict(zip(KINDS, (at, at + 1, at + 2, end - 1), strict=True))
    return {}


def cells(scene: shapes.Scene, assistant: Assistant, patches: int) -> Tensor:
    """The ninth of the picture that each patch's centre lies in, [P]; -1 outside of the picture."""
    left, top, right, bottom = look.seen_box((scene.width, scene.height), assistant.image_processor)
    side = round(patches**0.5)
    centres = (torch.arange(side) + 0.5) / side
    column = ((left + centres * (right - left)) / scene.width * 3).floor()  # [side]
    row = ((top + centres * (bottom - top)) / scene.height * 3).floor()[:, None]
    inside = (column >= 0) & (column < 3) & (row >= 0) & (row < 3)
    return torch.where(inside, row * 3 + column, -1).long().flatten()


def measure(
    assistant: Assistant, scenes: int
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], int]:
    """Per kind of word, (attention [L, H, P], which patches lie in the object's ninth [P]) of every
    one counted; and how many objects there were."""
    found, objects = {kind: [] for kind in KINDS}, 0
    for i in range(scenes):
        scene = shapes.sample_scene(
            random.Random(f"pointing/{i}"), count=i % shapes.MAX_OBJECTS + 1
        )
        described = rows_by_word(assistant, shapes.draw(scene))
        cell = cells(scene, assistant, described[0][1].shape[-1])
        objects += len(scene.things)
        for thing in scene.things:
            for kind, at in words_about(thing, [text for text, _ in described]).items():
                found[kind].append((described[at][1], cell == thing.place))
        if sys.stderr.isatty():
            print(f"\r{i + 1} of {scenes}", end="" if i + 1 < scenes else "\n", file=sys.stderr)
    return found, objects


def hits(found: list[tuple[Tensor, Tensor]], layers: slice, head: int | None = None) -> float:
    """How often, in %, the hottest patch of the mean over these layers and one or all heads is one
    of the object's."""
    heads = slice(None) if head is None else slice(head, head + 1)
    right = [inside[rows[layers, heads].mean((0, 1)).argmax()] for rows, inside in found]
    return 100 * sum(map(int, right)) / max(1, len(right))


def report(found: dict[str, list[tuple[Tensor, Tensor]]], objects: int, scenes: int) -> str:
    counted = found["shape"]
    count, heads = counted[0][0].shape[:2]
    default = look.default_layers(count)
    ranges = [
        (first, end)
        for size in range(1, count + 1)
        for first in range(count - size + 1)
        for end in [first + size]
    ]
    lines = [
        f"{scenes} scenes, {objects} objects, {len(counted)} of them described exactly right.\n",
        "| shape word, % | " + " | ".join(f"head {h}" for h in range(heads)) + " | all heads |",
        "|---|" + "---:|" * (heads + 1),
    ]
    for first, end in ranges:
        name = f"layer {first}" if end == first + 1 else f"layers {first}-{end - 1}"
        name += " (default)" * (default == list(range(first, end)))
        cells = [hits(counted, slice(first, end), head) for head in (*range(heads), None)]
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in cells) + " |")
    lines += [
        "",
        "| default layers, all heads | hottest patch in the object's ninth, % |",
        "|---|---:|",
    ]
    chosen = slice(default[0], default[-1] + 1)
    lines += [f"| {kind} word | {hits(found[kind], chosen):.1f} |" for kind in KINDS]
    return "\n".join(lines)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "weights" / "shapes"
    parser.add_argument("--weights", type=Path, default=default)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to gain from a second one
    assistant = minillava.load(options.weights, dtype=options.dtype, device="cpu")
    found, objects = measure(assistant, options.scenes)
    if not found["shape"]:
        print(
            f"none of {objects} objects is described exactly right: nothing to measure",
            file=sys.stderr,
        )
        return 1
    print(report(found, objects, options.scenes))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, verbose=True, prints=True))
