"""contrast: what the second row of logits costs, which contrastive decoding needs."""

import statistics
import time
from functools import partial

import torch

from bench_parts.clock import Timing, take_turns
from minillava.cache import KVCache
from minillava.generate.contrast import VCD
from minillava.llava import Llava, Spliced
from minillava.loop import Options, decode, prefill, steps


def contrast(model: Llava, tokens: int, rounds: int, prompt: int) -> dict[str, Timing]:
    """Seconds per decoded token after a prompt of so many positions: plain, with a second row in
    the same batch, and with a second pass of its own."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, prompt, model.config.text.hidden_size, generator=generator) * 0.02
    embeds = embeds.to(model.language_model.embed_tokens.weight.dtype)
    variants = {
        "plain": partial(one_pass, model, embeds[:1], tokens),
        "contrast, two rows of a batch": partial(one_pass, model, embeds, tokens),
        "contrast, two passes": partial(two_passes, model, embeds, tokens),
    }
    return take_turns(variants, rounds)


def spliced(embeds: torch.Tensor) -> Spliced:
    """Embeddings [B, T, C] as a spliced prompt without a picture."""
    token_ids = torch.zeros(embeds.shape[:2], dtype=torch.long)
    return Spliced(embeds, token_ids, None, None, [[] for _ in embeds])


def one_pass(model: Llava, embeds: torch.Tensor, tokens: int) -> float:
    """The time per token of our loop, which puts both rows into one pass."""
    options = Options(max_new_tokens=tokens + 1, min_new_tokens=tokens + 1)
    method = VCD() if len(embeds) == 2 else None
    made = steps(model, spliced(embeds), options, contrast=method)
    next(made)  # the prefill
    started = time.perf_counter()
    for _ in made:
        pass
    return (time.perf_counter() - started) / tokens


@torch.no_grad()
def two_passes(model: Llava, embeds: torch.Tensor, tokens: int) -> float:
    """The time per token as the methods' authors wrote it: each row has a cache and a pass of its
    own."""
    wanted = {"hidden_states": False, "attentions": False}
    caches, outputs, method = [], [], VCD()
    for row in embeds.split(1):
        capacity = row.shape[1] + tokens
        caches.append(KVCache(model.config.text, 1, capacity, dtype=row.dtype, device="cpu"))
        outputs.append(prefill(model, spliced(row), caches[-1], **wanted).logits[:, -1].float())
    started = time.perf_counter()
    for step in range(tokens):
        token = method(*outputs, step).argmax(-1)
        outputs = [decode(model, token, cache, **wanted).logits[:, -1].float() for cache in caches]
    return (time.perf_counter() - started) / tokens


def contrast_table(timings: dict[str, Timing]) -> str:
    first = next(iter(timings.values())).median
    lines = ["| decode | ms per token | spread | ratio | others |", "|---|---:|---:|---:|---:|"]
    for name, timing in timings.items():
        cells = (
            f"{1000 * timing.median:.1f}",
            f"±{timing.spread:.0%}",
            f"{timing.median / first:.2f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(timing.others):.2f} |")
    return "\n".join(lines)
