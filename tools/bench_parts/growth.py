"""growth: the time per token of a language model alone, by context and by batch, in this process."""

import io
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from bench_checkpoint import config_of
from torch import Tensor

from bench_parts.clock import Timing, say, take_turns
from bench_parts.work import PROMPT
from minillava.cache import KVCache
from minillava.fast import speed_up
from minillava.fast.packed import KIND as PACKED
from minillava.fast.packed import PackedLinear
from minillava.fast.quantize import QuantisedLinear, quantised_layer, quantize_tensor
from minillava.files.disk import write_whole
from minillava.llava import Llava
from minillava.loop import decode
from minillava.options import DTYPES


def random_model(size: str, dtype: torch.dtype, quantize: str | None = None) -> Llava:
    """A language model of that size with random weights. It has no vision tower, which decoding does
    not need."""
    with torch.device("meta"):
        model = Llava(config_of(size))
    model.vision_tower = model.projector = None
    model = model.to(dtype).to_empty(device="cpu")
    speed_up(model, model.language_model)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() == 1:
            p.fill_(1)
        else:
            p.copy_(torch.randn(p.shape[-1], generator=generator) * 0.02)  # one random row, and ...
            # ... a factor for each: quick to make
            p.mul_(torch.randn(p.shape[0], 1, generator=generator))
    if quantize:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, stored_as(quantize, layer.weight))
    return model


def stored_as(kind: str, weight: Tensor) -> QuantisedLinear:
    """A layer of int8, int4 or packed weights."""
    if kind == PACKED:
        return PackedLinear(weight)
    return quantised_layer(quantize_tensor(weight, kind))


CONTEXTS = (128, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)


def step_time(model: Llava, rows: int, context: int, tokens: int) -> float:
    """Seconds per step of a batch of so many rows, each after so many cached positions."""
    dtype = model.language_model.embed_tokens.weight.dtype
    cache = KVCache(model.config.text, rows, context + tokens, dtype=dtype, device="cpu")
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(0.01)
    cache.advance(context)
    started, ids = time.perf_counter(), torch.ones(rows, dtype=torch.long)
    with torch.no_grad():
        for _ in range(tokens):
            decode(model, ids, cache, hidden_states=False, attentions=False)
    return (time.perf_counter() - started) / tokens


def growth(
    size: str, dtypes: Sequence[str], tokens: int, rounds: int
) -> dict[tuple[str, str, int], Timing]:
    """Seconds per step by (dtype, "context" or "batch", how many): one row after ever longer
    contexts, and ever more rows after PROMPT positions."""

    found = {}
    for name in dtypes:  # one model at a time; what is compared is the same model with more to do
        dtype = getattr(torch, name) if name in DTYPES else torch.bfloat16
        model = random_model(size, dtype, None if name in DTYPES else name)
        variants = {
            (name, "context", n): partial(step_time, model, 1, n - tokens, tokens) for n in CONTEXTS
        }
        variants |= {
            (name, "batch", n): partial(step_time, model, n, PROMPT, tokens) for n in BATCHES
        }
        found |= take_turns(variants, rounds)
        say(f"{name}: done")
    return found


def growth_table(found: dict[tuple[str, str, int], Timing]) -> str:
    lines = []
    for kind, counts in (("context", CONTEXTS), ("batch", BATCHES)):
        lines += ["", f"| ms per step, {kind} | " + " | ".join(map(str, counts)) + " | others |"]
        lines += ["|---|" + "---:|" * (len(counts) + 1)]
        for name in dict.fromkeys(name for name, _, _ in found):
            timings = [found[name, kind, n] for n in counts]
            cells = [f"{1000 * timing.median:.0f}" for timing in timings]
            others = statistics.median(other for timing in timings for other in timing.others)
            lines.append(f"| {name} | {' | '.join(cells)} | {others:.2f} |")
            if kind == "batch":
                gains = [
                    n * timings[0].median / timing.median
                    for n, timing in zip(counts, timings, strict=True)
                ]
                lines.append(
                    f"| {name}, tokens per second to batch 1 | "
                    f"{' | '.join(f'{g:.1f}' for g in gains)} | |"
                )
    return "\n".join(lines[1:])


def growth_plot(found: dict[tuple[str, str, int], Timing], title: str, path: Path) -> None:
    """Draw two panels with a line per dtype, and bars from the fastest round to the slowest. Raises
    ImportError naming the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "--png draws with matplotlib; install it with: pip install -e '.[bench]'"
        ) from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, kind, label in zip(
        figure.subplots(1, 2), ("context", "batch"), ("positions", "rows"), strict=True
    ):
        for name in dict.fromkeys(name for name, _, _ in found):
            chosen = {
                n: timing for (of, what, n), timing in found.items() if (of, what) == (name, kind)
            }
            middle = [1000 * timing.median for timing in chosen.values()]
            low = [
                m - 1000 * min(timing.seconds)
                for m, timing in zip(middle, chosen.values(), strict=True)
            ]
            high = [
                1000 * max(timing.seconds) - m
                for m, timing in zip(middle, chosen.values(), strict=True)
            ]
            axis.errorbar(list(chosen), middle, yerr=[low, high], marker="o", capsize=3, label=name)
        axis.set(xlabel=f"{kind} ({label})", ylabel="ms per step", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())
