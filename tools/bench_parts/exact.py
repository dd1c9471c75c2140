"""exact: whether answers with drafts are those without, by what weights are stored in and by who
guesses; the bundled model answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench_parts.clock import say
from bench_parts.compare import PICTURE
from bench_parts.drafts import Oracle
from minillava.assistant import Assistant, load
from minillava.generate.speculate import Drafts
from minillava.loop import Step, steps
from minillava.options import KINDS

DRAFTERS = ("lookup", "model", "medusa", "oracle")
TOKENS = 4  # guessed at a time
LENGTH = 40  # tokens of an answer: over its end, so that some of it is not in the training's manner
QUESTIONS = ("Please describe this image in detail.", "How many shapes are there?")
RIGHT = 0.7  # of the oracle's guesses
WAYS = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 1}}


@dataclass
class Cell:
    """One kind of weights, one drafter, greedy or sampled. differ: answers with another token.
    distance: of the scores, at most, as far as the tokens are the same. None: no such drafter."""

    stored: str
    drafter: str
    way: str
    claimed: bool | None = None  # that a pass has the bits of single steps
    answers: int = 0
    differ: int = 0
    distance: float = 0.0
    accepted: int = 0

    def told(self) -> str:
        if not self.answers:
            return "none here"
        if self.differ:
            return f"{self.differ} of {self.answers} answers differ"
        return "same bits" if self.distance == 0 else f"same tokens, scores {self.distance:.0e}"


def exact(stored: Sequence[str]) -> list[Cell]:
    """Every kind of weights with every drafter, greedy and sampled."""
    found = []
    for name in stored:
        kind = {"quantize": name} if name in KINDS else {"dtype": name}
        assistant = load(PICTURE.parent, device="cpu", **kind)
        cells = [Cell(name, drafter, way) for drafter in DRAFTERS for way in WAYS]
        for cell in cells:
            compare(cell, assistant)
        found += cells
        say(f"{name}: done")
    return found


def compare(cell: Cell, assistant: Assistant) -> None:
    chosen = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, **WAYS[cell.way]}
    options = assistant.options(**chosen)
    for question in QUESTIONS:
        spliced = assistant.prepare(PICTURE, assistant.prompt(question))
        plain = list(steps(assistant.model, spliced, options))
        drafts = drafts_of(cell.drafter, assistant, [step.ids[0] for step in plain])
        if drafts is None:
            return
        found = drafts.steps(assistant.model, spliced, options, pictures=[PICTURE])
        cell.answers, cell.claimed = cell.answers + 1, drafts.is_exact(assistant.model)
        hold(cell, plain, found)
        cell.accepted += 0 if drafts.report is None else drafts.report.accepted


def hold(cell: Cell, plain: Sequence[Step], found: Iterator[Step]) -> None:
    """Hold one answer against another, up to the first token that differs."""
    for a, b in zip(plain, found, strict=True):
        if a.ids != b.ids:
            cell.differ += 1
            return
        if not torch.equal(a.scores, b.scores):
            apart = torch.where(a.scores == b.scores, 0, a.scores - b.scores)
            cell.distance = max(cell.distance, float(apart.abs().max()))


def drafts_of(drafter: str, assistant: Assistant, answer: Sequence[int]) -> Drafts | None:
    """None: the bundled model has no such drafter."""
    if drafter == "oracle":
        return Drafts(Oracle(answer, RIGHT, assistant.model.config.text.vocab_size), TOKENS)
    folder = str(PICTURE.parent)
    names = {"lookup": "lookup", "model": folder, "medusa": f"medusa:{folder}"}
    try:
        return assistant.drafts(names[drafter], TOKENS)
    except FileNotFoundError:
        return None


def exact_table(found: Sequence[Cell]) -> str:
    heads = [f"{drafter}, {way}" for drafter in DRAFTERS for way in WAYS]
    lines = [f"| weights | claimed | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for name in dict.fromkeys(cell.stored for cell in found):
        cells = [cell for cell in found if cell.stored == name]
        claimed = any(cell.claimed for cell in cells)
        told = "exact" if claimed else "exact up to rounding"
        lines.append(f"| {name} | {told} | {' | '.join(cell.told() for cell in cells)} |")
    return "\n".join(lines)
