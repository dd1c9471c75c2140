"""drafts: what a pass over several tokens of one answer costs, and what guesses gain that are right
so and so often."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from bench_parts.clock import Timing, say, take_turns
from bench_parts.growth import random_model
from minillava.cache import KVCache
from minillava.generate.speculate import Drafts, query_by_query
from minillava.llava import Llava, Spliced
from minillava.loop import steps
from minillava.options import DTYPES, Options

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens of a pass
RATES = (0.0, 0.5, 0.7, 0.9)


@dataclass
class Found:
    """Of one dtype. costs: seconds of a pass, by how many tokens; answers: seconds per token, plain
    (None) and by how often guesses are right; passes: tokens that a pass made, by the same."""

    costs: dict[int, Timing] = field(default_factory=dict)
    answers: dict[float | None, Timing] = field(default_factory=dict)
    passes: dict[float, float] = field(default_factory=dict)


class Oracle:
    """Knows the answer, and errs so often: a drafter as minillava/generate/speculate.py wants one,
    and the draft of its one answer."""

    kind, cost = "oracle", 0.0

    def __init__(self, answer: Sequence[int], rate: float, vocabulary: int):
        self.ids, self.known = list(answer), 0
        right = torch.rand(len(answer), generator=torch.Generator().manual_seed(0)) < rate
        for i in (~right).nonzero().flatten().tolist():
            self.ids[i] = 5 + (answer[i] + 1) % (vocabulary - 5)  # nor a special token

    def begin(self, prompt: list[int], sampler: object, pictures: Sequence) -> "Oracle":
        self.known = 0
        return self

    def propose(self, count: int) -> list[int]:
        return self.ids[self.known : self.known + count]

    def accept(self, ids: list[int], hidden: torch.Tensor) -> None:
        self.known += len(ids)


def drafts(
    size: str, dtypes: Sequence[str], prompt: int, tokens: int, rounds: int
) -> dict[str, Found]:
    """By dtype, one model at a time; all after `prompt` cached positions. Plain and drafted answers
    take turns; how many tokens to guess is decided by the costs that were measured before."""
    found = {}
    for name in dtypes:
        dtype = getattr(torch, name) if name in DTYPES else torch.bfloat16
        model = random_model(size, dtype, None if name in DTYPES else name)
        cache = filled(model, dtype, prompt, max(tokens + 4, *COUNTS))
        each = found[name] = Found()
        variants = {count: partial(one_pass, model, cache, count) for count in COUNTS}
        each.costs = take_turns(variants, rounds)
        answers(each, model, cache, tokens, rounds)
        say(f"{name}: done")
    return found


def filled(model: Llava, dtype: torch.dtype, prompt: int, more: int) -> KVCache:
    cache = KVCache(model.config.text, 1, prompt + more, dtype=dtype, device="cpu")
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(0.01)
    cache.advance(prompt)
    return cache


@torch.no_grad()
def one_pass(model: Llava, cache: KVCache, count: int) -> float:
    """Seconds of what checks count - 1 guesses."""
    language, before = model.language_model, cache.length
    ids = torch.full((1, count), 5)
    started = time.perf_counter()
    attend = query_by_query(language.attend, language.each_alone, padded=False)
    language(ids, None, cache, attend=attend)
    seconds = time.perf_counter() - started
    cache.truncate(before)
    return seconds


def answers(found: Found, model: Llava, cache: KVCache, tokens: int, rounds: int) -> None:
    options = Options(max_new_tokens=tokens + 1, min_new_tokens=tokens + 1)
    prompt = model.splice([[1, 5]], None)
    ids: list[int] = []
    plain = partial(one_answer, steps, model, prompt, options, cache)
    plain(ids)
    variants: dict[float | None, Callable[[], float]] = {None: plain}
    users = {}
    for rate in RATES:
        oracle = Oracle(ids, rate, model.config.text.vocab_size)
        users[rate] = Drafts(oracle, pass_cost=partial(cost_of, found.costs))
        variants[rate] = partial(one_answer, users[rate].steps, model, prompt, options, cache)
    found.answers = take_turns(variants, rounds)
    for rate, user in users.items():
        found.passes[rate] = (user.report.tokens - 1) / user.report.passes


def one_answer(
    way: Callable, model: Llava, prompt: Spliced, options: Options, cache: KVCache, ids=None
) -> float:
    """Seconds per token after the first. ids: are given those of the answer."""
    before, times, made = cache.length, [], []
    for step in way(model, prompt, options, cache=cache):
        times.append(time.perf_counter())
        made += step.ids
    cache.truncate(before)
    if ids is not None:
        ids += made
    return (times[-1] - times[0]) / (len(times) - 1)


def cost_of(costs: dict[int, Timing], rows: int) -> float:
    """Of a pass over so many tokens, in single steps: between two counts, on the line between
    them."""
    above = next((n for n in COUNTS if n >= rows), COUNTS[-1])
    below = max((n for n in COUNTS if n <= rows), default=COUNTS[0])
    low, high = (costs[n].median / costs[COUNTS[0]].median for n in (below, above))
    return low if above == below else low + (high - low) * (rows - below) / (above - below)


def drafts_table(found: dict[str, Found]) -> str:
    """Costs, and what guesses gain."""
    lines = [f"| one pass, tokens | {' | '.join(map(str, COUNTS))} | others |"]
    lines.append("|---|" + "---:|" * (len(COUNTS) + 1))
    for name, each in found.items():
        cells = [f"{1000 * each.costs[n].median:.0f}" for n in COUNTS]
        lines.append(f"| {name}, ms | {' | '.join(cells)} | {others(each.costs.values())} |")
        cells = [f"{cost_of(each.costs, n):.2f}" for n in COUNTS]
        lines.append(f"| {name}, to one token | {' | '.join(cells)} | |")
    heads = [f"{rate:.0%} right, to plain (tokens a pass)" for rate in RATES]
    lines += ["", f"| guesses | plain, tokens/s | {' | '.join(heads)} | others |"]
    lines.append("|---|" + "---:|" * (len(RATES) + 2))
    for name, each in found.items():
        plain = each.answers[None].median
        cells = [
            f"{plain / each.answers[rate].median:.2f} ({each.passes[rate]:.1f})" for rate in RATES
        ]
        taken = others(each.answers.values())
        lines.append(f"| {name} | {1 / plain:.2f} | {' | '.join(cells)} | {taken} |")
    return "\n".join(lines)


def others(timings) -> str:
    return f"{statistics.median(other for timing in timings for other in timing.others):.2f}"
