#!/usr/bin/env python3
"""How long things take, side by side in one run: every figure is a median over rounds in which all variants take turns.

    python tools/bench.py contrast --size 0.5b --dtype bfloat16

Weights are random and made in memory. Machines are shared: `others` is how many cores other processes kept busy
meanwhile; a figure with more than a few hundredths there is worth a second run.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from minillava.assistant import DTYPES
from minillava.cache import KVCache
from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig
from minillava.contrast import VCD
from minillava.linear import use_fast_linear
from minillava.llava import Llava, Spliced
from minillava.loop import Options, decode, prefill, steps

# hidden size, feed-forward size, layers, heads
SIZES = {
    "toy": (64, 128, 2, 4),
    "0.5b": (1280, 3456, 24, 20),
    "1b": (2048, 5632, 22, 16),
    "7b": (4096, 11008, 32, 32),
}
PROMPT = 625  # positions of the walk-through's picture question: the default


def random_model(size: str, dtype: torch.dtype) -> Llava:
    """A language model of that size with random weights; a CLIP is not needed to decode, so it has none."""
    hidden, feed_forward, layers, heads = SIZES[size]
    text = TextConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    with torch.device("meta"):
        model = Llava(LlavaConfig(vision=CLIP_LARGE_336, text=text))
    model.vision_tower = model.projector = None
    model = model.to(dtype).to_empty(device="cpu")
    use_fast_linear(model)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() == 1:
            p.fill_(1)
        else:
            p.copy_(torch.randn(p.shape[-1], generator=generator).roll(7) * 0.02)  # one random row, and ...
            p.mul_(torch.randn(p.shape[0], 1, generator=generator))  # ... a factor for each: quick to make
    return model


@dataclass
class Timing:
    """seconds: per round. others: cores that other processes kept busy, per round."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a fraction of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def busy_elsewhere() -> float:
    """Seconds of processor time that were not ours, so far; 0 where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    except FileNotFoundError:
        return 0.0
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def take_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Each variant does its work and returns the seconds that count; one round to warm up goes before."""
    timings = {name: Timing() for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            started, before = time.perf_counter(), busy_elsewhere()
            seconds = work()
            if number > 0:
                timings[name].seconds.append(seconds)
                timings[name].others.append((busy_elsewhere() - before) / (time.perf_counter() - started))
    return timings


def contrast(model: Llava, tokens: int, rounds: int, prompt: int) -> dict[str, Timing]:
    """Seconds per decoded token after a prompt of so many positions: plain, with a second row in the same batch, and
    with a second pass of its own."""
    config, dtype = model.config.text, model.language_model.embed_tokens.weight.dtype
    embeds = torch.randn(2, prompt, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02

    def spliced(rows: int) -> Spliced:
        ids = [torch.zeros(prompt, dtype=torch.long)] * rows
        return Spliced(embeds[:rows], None, None, [[] for _ in ids], ids)

    def loop(rows: int) -> float:
        method = VCD() if rows == 2 else None
        made = steps(
            model, spliced(rows), Options(max_new_tokens=tokens + 1, min_new_tokens=tokens + 1), contrast=method
        )
        next(made)  # the prefill
        started = time.perf_counter()
        for _ in made:
            pass
        return (time.perf_counter() - started) / tokens

    @torch.no_grad()
    def two_passes() -> float:
        caches = [KVCache(config, 1, prompt + tokens, dtype=dtype, device="cpu") for _ in range(2)]
        wanted = {"hidden_states": False, "attentions": False}
        method, outputs = VCD(), []
        for row, cache in enumerate(caches):
            part = spliced(2)
            part = Spliced(part.embeds[row : row + 1], None, None, [[]], part.input_ids[:1])
            outputs.append(prefill(model, part, cache, **wanted).logits[:, -1].float())
        started = time.perf_counter()
        for step in range(tokens):
            token = method(*outputs, step).argmax(-1)
            outputs = [decode(model, token, cache, **wanted).logits[:, -1].float() for cache in caches]
        return (time.perf_counter() - started) / tokens

    variants = {
        "plain": lambda: loop(1),
        "contrast, two rows of a batch": lambda: loop(2),
        "contrast, two passes": two_passes,
    }
    return take_turns(variants, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["contrast"])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"positions read before (default {PROMPT})")
    parser.add_argument("--tokens", type=int, default=16, help="decoded per round")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2, for a spread")
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.tokens < 1:
        parser.error("--rounds needs at least 2, --tokens at least 1")
    model = random_model(options.size, DTYPES[options.dtype])
    count = sum(p.numel() for p in model.parameters())
    timings = contrast(model, options.tokens, options.rounds, options.prompt)
    threads = torch.get_num_threads()
    print(f"{count / 1e6:,.0f} million parameters, {options.dtype}, {threads} threads, ", end="")
    print(f"{options.rounds} rounds of {options.tokens} tokens after a prompt of {options.prompt} positions\n")
    print("| decode | ms per token | spread | ratio | others |\n|---|---:|---:|---:|---:|")
    first = next(iter(timings.values())).median
    for name, timing in timings.items():
        cells = f"{1000 * timing.median:.1f}", f"±{timing.spread:.0%}", f"{timing.median / first:.2f}"
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(timing.others):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
