#!/usr/bin/env python3
"""Rows that teach the bundled model a shape which it does not know, in LLaVA's own form.

    python tools/shape_rows.py --shape heart --scenes 300 --out hearts

OUT gets the pictures and rows.json, a conversation in each row. The new shape is in one half of the
scenes. The other half is of the old shapes alone, so that what the model knew is practised beside
what is new: without it, the model would forget.
"""

import argparse
import json
import random
import sys
from pathlib import Path

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes

from minillava.cli.arguments import Parser
from minillava.cli.messages import run
from minillava.files.new_folder import new_folder

DIALOGUES = 4  # about each scene; one of them describes it
SHARE = 0.5  # of the scenes that have the new shape


def make_scene(
    shape: str, number: int, seed: int, count: int | None = None
) -> tuple[shapes.Scene, list[shapes.Dialogue]]:
    """A scene to learn from, and the dialogues about it. count: of its things."""
    rng = random.Random(f"rows/{shape}/{seed}/{number}")
    new = shapes.pairs_of(shape) if rng.random() < SHARE else ()
    pairs = (*shapes.TRAINING_PAIRS, *new)
    scene = shapes.sample_scene(rng, count, pairs, must_have=new)
    return scene, shapes.ask_any(scene, DIALOGUES, rng, pairs)


def as_row(dialogue: shapes.Dialogue, image: str) -> dict:
    """A dialogue as a row of LLaVA's files."""
    messages = []
    for i, (question, answer) in enumerate(dialogue.turns):
        marked = f"<image>\n{question}" if i == 0 else question
        messages += [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": messages}


def write_rows(shape: str, scenes: int, seed: int, out: Path, count: int | None = None) -> None:
    """Write the pictures, and their rows. Raises ValueError if `out` is not empty."""
    rows = []
    with new_folder(out) as folder:
        for number in range(scenes):
            scene, dialogues = make_scene(shape, number, seed, count)
            shapes.draw(scene).save(folder / f"{number}.png")
            rows += [as_row(dialogue, f"{number}.png") for dialogue in dialogues]
        (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.NEW_SHAPES, default=shapes.NEW_SHAPES[0])
    parser.add_argument("--scenes", type=int, default=300, help="(default 300)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}, expected 1 or more")
    write_rows(options.shape, options.scenes, options.seed, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, verbose=False, prints=True))
