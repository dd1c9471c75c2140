"""The door: what is measured, and what it takes."""

import argparse
import io
import json
import time

import numpy as np

from minillava.cli.messages import Messages, print_json, write_outputs
from minillava.cli.opening import find_weights, open_assistant, read_question
from minillava.files.disk import is_stdout
from minillava.files.pictures import open_image
from minillava.look.run import find_words, picture_bytes
from minillava.probe.knockout import ablate, knock_out
from minillava.probe.measure import ROWS, Answered
from minillava.probe.occlude import blocks, occlude
from minillava.probe.page import page, sheet
from minillava.probe.patching import patch
from minillava.probe.report import Findings, as_json, as_text

BLOCK = 3
"""Patches a side that are hidden together: one alone rarely holds all that a word was said of."""


def run(args: argparse.Namespace, options: dict) -> int:
    """What `probe` does with its flags; the exit status."""
    messages = Messages(args.verbose, args.quiet)
    question, (picture,) = read_question(args)
    other = None if args.other is None else open_image(args.other)
    assistant = open_assistant(args, find_weights(args.weights, messages), messages)
    started = time.perf_counter()
    asked = {"system": args.system, **options}
    answered = Answered(assistant, picture, question, **asked)
    messages.stage("answer", started, f"{len(answered.words)} words")
    words = find_words([text for text, _ in answered.words], args.word)
    args.block = min(BLOCK, answered.grid) if args.block is None else args.block
    blocks(answered.grid, args.block)  # before the work: whether it fits
    if args.plan:
        print(plan(args, answered))
        return 0
    found = Findings(answered, words)
    if other is not None:
        started = time.perf_counter()
        found.patching = patch(answered, Answered(assistant, other, question, **asked))
        messages.stage("patching", started, f"{found.patching.moved.size} places")
    measure(args, found, messages)
    files = contents(args, found)
    try:
        if args.json == "-":
            print_json(as_json(found))
        elif not any(map(is_stdout, files)):  # which then has that file alone
            print(as_text(found), flush=True)
    finally:  # also if nobody reads on, as in `| head -1`
        status = write_outputs(files)
    return status


def measure(args: argparse.Namespace, found: Findings, messages: Messages) -> None:
    """The measures that the flags ask for, one after the other."""
    answered, started = found.answered, time.perf_counter()
    if "occlusion" in args.measure:
        messages.progress("hiding parts of the picture ...")
        found.occlusion = occlude(answered, args.hide, args.block)
        messages.stage("occlude", started, f"{args.hide}, {args.block} x {args.block} patches")
    if "knockout" in args.measure:
        started = time.perf_counter()
        messages.progress("cutting off the picture, layer by layer ...")
        found.knock_out = knock_out(answered, args.window)
        messages.stage("knockout", started, f"{found.knock_out.window} layer(s) at a time")
    if "ablation" in args.measure:
        started = time.perf_counter()
        messages.progress("taking out heads and feed-forward layers ...")
        found.ablation = ablate(answered, args.ablate)
        messages.stage("ablate", started, args.ablate)
    messages.progress("")


def contents(args: argparse.Namespace, found: Findings) -> dict[str, str | bytes]:
    """What the flags ask for: names and contents."""
    files: dict[str, str | bytes] = {}
    if args.out is not None:
        files[args.out] = picture_bytes(sheet(found), args.out)
    if args.html is not None:
        files[args.html] = page(found)
    if args.json not in (None, "-"):
        files[args.json] = json.dumps(as_json(found), ensure_ascii=False) + "\n"
    if args.npy is not None:
        file = io.BytesIO()
        np.save(file, found.maps().astype(np.float32))
        files[args.npy] = file.getvalue()
    return files


def plan(args: argparse.Namespace, answered: Answered) -> str:
    """What the measures will take: rows to read, and seconds by one that is timed here."""
    text, positions = answered.model.config.text, answered.embeds.shape[1]
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    rows = {
        "occlusion": len(blocks(answered.grid, args.block)),
        "knockout": 2 * (layers + 1),
        "ablation": layers * (heads + 1),
    }
    rows = {name: count for name, count in rows.items() if name in args.measure}
    if args.other is not None:
        rows["patching"] = 4 * (layers + 1)
    started = time.perf_counter()
    answered.drops(answered.embeds.repeat(ROWS, 1, 1))
    each = (time.perf_counter() - started) / ROWS
    lines = [f"one row is {positions} positions, {each:.3g} s here"]
    lines += [f"{name}: {count:,} rows, about {count * each:.3g} s" for name, count in rows.items()]
    return "\n".join([*lines, f"together about {sum(rows.values()) * each:.3g} s"])
