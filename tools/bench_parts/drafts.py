"""drafts: what a pass over several tokens of one answer costs, which decides whether drafted tokens
are worth checking."""

import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch

from bench_parts.clock import Timing, say, take_turns
from bench_parts.growth import random_model
from minillava.cache import KVCache
from minillava.llava import Llava
from minillava.options import DTYPES

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)


def model_of(size: str, name: str) -> Llava:
    """A language model alone, in one of DTYPES or quantised with bfloat16 between."""
    dtype = getattr(torch, name) if name in DTYPES else torch.bfloat16
    return random_model(size, dtype, None if name in DTYPES else name)


def pass_costs(
    size: str, dtypes: Sequence[str], prompt: int, rounds: int
) -> dict[tuple[str, int], Timing]:
    """Seconds of a pass over so many tokens after `prompt` cached positions, by (dtype, how
    many)."""
    found = {}
    for name in dtypes:  # one model at a time
        model = model_of(size, name)
        dtype = model.language_model.embed_tokens.weight.dtype
        cache = KVCache(model.config.text, 1, prompt + max(COUNTS), dtype=dtype, device="cpu")
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(0.01)
        cache.advance(prompt)
        found |= take_turns({(name, n): partial(one_pass, model, cache, n) for n in COUNTS}, rounds)
        say(f"{name}: done")
    return found


@torch.no_grad()
def one_pass(model: Llava, cache: KVCache, count: int) -> float:
    before, ids = cache.length, torch.ones(1, count, dtype=torch.long)
    started = time.perf_counter()
    model.language_model(ids, None, cache)
    seconds = time.perf_counter() - started
    cache.truncate(before)
    return seconds


def pass_table(found: dict[tuple[str, int], Timing]) -> str:
    lines = [f"| one pass, tokens | {' | '.join(map(str, COUNTS))} | others |"]
    lines.append("|---|" + "---:|" * (len(COUNTS) + 1))
    for name in dict.fromkeys(name for name, _ in found):
        timings = [found[name, n] for n in COUNTS]
        others = statistics.median(other for timing in timings for other in timing.others)
        cells = [f"{1000 * timing.median:.0f}" for timing in timings]
        lines.append(f"| {name}, ms | {' | '.join(cells)} | {others:.2f} |")
        cells = [f"{timing.median / timings[0].median:.2f}" for timing in timings]
        lines.append(f"| {name}, to one token | {' | '.join(cells)} | |")
    return "\n".join(lines)
