"""The door: what is measured, and what it takes."""

import argparse
import io
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minillava.cli.messages import Messages, duration, print_json, write_outputs
from minillava.cli.opening import find_weights, open_assistant, read_question
from minillava.files.disk import is_stdout
from minillava.files.pictures import open_image
from minillava.look.run import find_words, picture_bytes
from minillava.probe.knockout import ablate, ablate_work, knock_out, knock_out_work
from minillava.probe.measure import Answered
from minillava.probe.occlude import in_embeddings, occlude, occlude_work
from minillava.probe.page import page
from minillava.probe.patching import patch, patch_work
from minillava.probe.report import Findings, as_json, as_text
from minillava.probe.sheet import sheet

BLOCK = 3
"""Patches a side that are hidden together: one alone rarely holds all that a word was said of."""

LONG = 60
"""Seconds from which a person is told before the work how long it will take."""


class Task(NamedTuple):
    """A measure: the rows that it reads, what of them is computed (positions times layers), and the
    function that does it. field: of Findings."""

    name: str
    field: str
    rows: int
    work: int
    measure: Callable[[], Any]


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
    second = None if other is None else Answered(assistant, other, question, **asked)
    tasks = all_tasks(args, answered, second)  # before the work: whether it can be done
    if args.plan:
        print(plan(args, answered, tasks))
        return 0
    found = Findings(answered, words)
    measure(found, tasks, messages)
    files = contents(args, found)
    try:
        if args.json == "-":
            print_json(as_json(found))
        elif not any(map(is_stdout, files)):  # which then has that file alone
            print(as_text(found), flush=True)
    finally:  # also if nobody reads on, as in `| head -1`
        status = write_outputs(files)
    return status


def all_tasks(args: argparse.Namespace, a: Answered, b: Answered | None) -> list[Task]:
    """What the flags ask for. Raises ValueError for a setting that cannot be."""
    tasks = []
    if b is not None:
        tasks.append(Task("patching", "patching", *patch_work(a, b), partial(patch, a, b)))
    if "occlusion" in args.measure:
        how = args.hide, args.block
        work = occlude_work(a, *how)
        tasks.append(Task("occlusion", "occlusion", *work, partial(occlude, a, *how)))
    if "knockout" in args.measure:
        work = knock_out_work(a, args.window)
        tasks.append(Task("knockout", "knock_out", *work, partial(knock_out, a, args.window)))
    if "ablation" in args.measure:
        work = ablate_work(a, args.ablate)
        tasks.append(Task("ablation", "ablation", *work, partial(ablate, a, args.ablate)))
    return tasks


def measure(found: Findings, tasks: Sequence[Task], messages: Messages) -> None:
    """The measures one after the other, and how far they are."""
    kept = found.answered.kept
    expected = kept.seconds * sum(task.work for task in tasks) / found.answered.whole()
    if expected > LONG:
        messages.note(
            f"this takes about {duration(expected)} here; --plan tells the parts, --measure "
            "chooses among them"
        )
    for task in tasks:
        started = time.perf_counter()
        kept.done = Progress(messages, task)
        setattr(found, task.field, task.measure())
        messages.stage(task.name, started, f"{task.rows} rows")
    messages.progress("")


class Progress:
    """The line that says how far a measure is: told after each batch what was computed."""

    def __init__(self, messages: Messages, task: Task):
        self.messages, self.task = messages, task
        self.computed, self.started = 0, time.perf_counter()
        messages.progress(f"{task.name} ...")

    def __call__(self, work: int) -> None:
        self.computed += work
        share = self.computed / self.task.work
        left = (time.perf_counter() - self.started) * (1 - share) / share
        self.messages.progress(f"{self.task.name}: {share:.0%}, about {duration(left)} left")


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


def plan(args: argparse.Namespace, answered: Answered, tasks: Sequence[Task]) -> str:
    """What the measures will take: rows, what of them is computed, and how long by a pass that was
    timed here."""
    pace, whole = answered.pace(), answered.whole()
    encode = 0.0 if in_embeddings(args.hide) else picture_seconds(answered)

    def takes(task: Task) -> float:
        return task.work * pace + (task.rows * encode if task.name == "occlusion" else 0)

    def told(task: Task) -> str:
        share = task.work / (task.rows * whole)
        return f"{task.rows:,} rows, {share:.0%} of them computed, about {duration(takes(task))}"

    layers = len(answered.model.language_model.layers)
    each = f"{answered.embeds.shape[1]} positions in {layers} layers, {whole * pace:.2g} s here"
    lines = [f"one row is {each}; {answered.at_once()} at once"]
    lines += [f"{task.name}: {told(task)}" for task in tasks]
    lines.append(f"together about {duration(sum(map(takes, tasks)))}")
    if "occlusion" in args.measure and args.block < min(BLOCK, answered.grid):
        other = occlude_work(answered, args.hide, BLOCK)
        lines.append(f"--block {BLOCK}: {told(Task('occlusion', 'occlusion', *other, plan))}")
    return "\n".join(lines)


def picture_seconds(answered: Answered) -> float:
    """What it takes to encode a picture, timed here."""
    started = time.perf_counter()
    answered.assistant.encode(answered.picture).cpu()
    return time.perf_counter() - started
