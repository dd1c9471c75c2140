"""profile: which of torch's operations take the time of a picture, of a prompt and of a token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench_parts.work import positions, prompt_ids
from minillava import load
from minillava.cache import KVCache
from minillava.generate.inputs import encode_pixels
from minillava.llava import Llava
from minillava.loop import decode, prefill

WARM = 2  # answers before the one that is looked at
LEAST = 0.01  # of a column: what takes less everywhere has no line of its own

Spent = dict[str, dict[str, float]]  # part -> operation -> seconds


def profile(size: str, folder: Path, dtype: str, tokens: int) -> Spent:
    """Seconds by operation, without those that it calls, of a picture, of a prompt with it, and of
    the mean of so many tokens."""
    model = load(folder, device="cpu", dtype=dtype).model
    ids = prompt_ids(model.config, positions(size, model.config))
    return [answer(model, ids, tokens) for _ in range(WARM + 1)][-1]


@torch.no_grad()
def answer(model: Llava, ids: list[int], tokens: int) -> Spent:
    side, channels = model.config.vision.image_size, model.config.vision.num_channels
    # not zeros, with which numbers become so small that a processor is slow
    pixels = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    patches, picture = watched(lambda: encode_pixels(model, pixels))
    spliced = model.splice([ids], patches)
    like, capacity = spliced.embeds, spliced.embeds.shape[1] + tokens
    cache = KVCache(model.config.text, 1, capacity, dtype=like.dtype, device="cpu")
    _, prompt = watched(lambda: prefill(model, spliced, cache))
    one = torch.ones(1, dtype=torch.long)
    _, steps = watched(lambda: [decode(model, one, cache) for _ in range(tokens)])
    token = {name: seconds / tokens for name, seconds in steps.items()}
    return {"picture": picture, "prompt": prompt, "token": token}


def watched(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What it returns, and the seconds of each operation in it."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
        result = work()
    return result, {each.key: each.self_cpu_time_total / 1e6 for each in seen.key_averages()}


def profile_table(found: Spent) -> str:
    totals = {part: sum(spent.values()) for part, spent in found.items()}
    shares = {
        name: [spent.get(name, 0) / totals[part] for part, spent in found.items()]
        for name in dict.fromkeys(name for spent in found.values() for name in spent)
    }
    listed = sorted((name for name in shares if max(shares[name]) >= LEAST), key=shares.get)
    rest = [1 - sum(shares[name][i] for name in listed) for i in range(len(found))]
    lines = [f"| % of the time of a | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    lines += [line(name.removeprefix("aten::"), shares[name]) for name in reversed(listed)]
    total = " | ".join(f"{seconds:.3g}" for seconds in totals.values())
    return "\n".join([*lines, line("others, each below 1", rest), f"| seconds | {total} |"])


def line(name: str, shares: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |"
