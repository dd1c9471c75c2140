"""drafts: what each drafter gains on the bundled model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench_parts.clock import Timing, take_turns
from bench_parts.compare import PICTURE
from minillava.assistant import Assistant, load
from minillava.fast.passes import pass_cost
from minillava.generate.medusa import Medusa
from minillava.generate.speculate import Drafts
from minillava.loop import steps
from minillava.options import KINDS

QUESTIONS = ("Please describe this image in detail.", "How many shapes are there?")

WAYS: dict[str, tuple[str, int, int | None] | None] = {
    # (drafter, tokens of each head that may be guessed, guesses in a pass)
    "plain": None,
    "lookup": ("lookup", 0, None),
    "the model itself, 3": ("model", 0, 3),
    "Medusa, chain of 3": ("medusa", 1, 3),
    "Medusa, tree of 7": ("medusa", 10, 7),
    "Medusa, as many as pay": ("medusa", 10, None),
}


@dataclass
class Gain:
    """seconds per token, and tokens a pass, by way."""

    timings: dict[str, Timing]
    passes: dict[str, float]


def heads(dtypes: Sequence[str], rounds: int) -> dict[str, Gain]:
    """By dtype; the ways take turns."""
    found = {}
    for name in dtypes:
        assistant = load(PICTURE.parent, **{"quantize" if name in KINDS else "dtype": name})
        passes: dict[str, float] = {}
        variants = {}
        for way, chosen in WAYS.items():
            drafts = None if chosen is None else drafts_of(assistant, *chosen)
            variants[way] = lambda a=assistant, w=way, d=drafts, p=passes: answers(a, d, w, p)
        found[name] = Gain(take_turns(variants, rounds), passes)
    return found


def drafts_of(assistant: Assistant, kind: str, ranks: int, tokens: int | None) -> Drafts:
    if kind != "medusa":
        drafts = assistant.drafts(PICTURE.parent if kind == "model" else kind, tokens)
        assert drafts is not None
        return drafts
    opened, language = assistant.drafts(kind), assistant.model.language_model
    assert opened is not None and isinstance(opened.drafter, Medusa)
    drafter = Medusa(opened.drafter.heads.state_dict(), None, language, ranks=ranks)
    return Drafts(drafter, tokens, pass_cost(language))


def answers(
    assistant: Assistant, drafts: Drafts | None, way: str, passes: dict[str, float]
) -> float:
    """Seconds per token after the first, of all answers."""
    seconds, tokens, made = 0.0, 0, 0
    options = assistant.options()
    for question in QUESTIONS:
        spliced = assistant.prepare(PICTURE, assistant.prompt(question))
        times = []
        follow = steps if drafts is None else partial(drafts.steps, pictures=[PICTURE])
        for _ in follow(assistant.model, spliced, options):
            times.append(time.perf_counter())
        seconds, tokens = seconds + times[-1] - times[0], tokens + len(times) - 1
        made += len(times) - 1 if drafts is None or drafts.report is None else drafts.report.passes
    passes[way] = tokens / made
    return seconds / tokens


def heads_table(found: dict[str, Gain]) -> str:
    ways = [way for way in WAYS if way != "plain"]
    titles = [f"{way}, to plain (tokens a pass)" for way in ways]
    lines = [f"| bundled model | plain, tokens/s | {' | '.join(titles)} |"]
    lines.append("|---|" + "---:|" * (len(ways) + 1))
    for name, each in found.items():
        plain = each.timings["plain"].median
        cells = [f"{plain / each.timings[way].median:.2f} ({each.passes[way]:.1f})" for way in ways]
        lines.append(f"| {name} | {1 / plain:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)
