"""Beam search: several answers to a prompt grow side by side, and the most likely whole ones are
kept.

Token for token that of transformers 5.23 (`_beam_search`), in its order of float operations. B
prompts, n beams each, K candidates per step, V vocabulary, T prompt positions, m new tokens, R
answers: B times num_return_sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llava import Llava, Spliced
from minillava.loop import (
    NOTHING_LEFT,
    Chooser,
    Process,
    Row,
    check_wishes,
    decode,
    last_logits,
    prefill,
    room_for_answer,
)
from minillava.options import Options
from minillava.sampling import REMOVED
from minillava.tokenizer import Tokenizer

OUT = -1e9
"""Added to a score so that it loses against every real one, and added rather than put in its place:
two of them still compare as they do in transformers."""


@dataclass
class Found:
    """The answers of a beam search: those to one prompt in adjacent rows, the best first."""

    sequences: Tensor  # [R, m] new ids only, rows padded after their end token
    # [R] the sum of a row's log-probabilities, divided by its length to the power of length_penalty
    scores: Tensor
    text: list[str]  # per row, without special tokens and stop text; "" without a tokenizer
    finish_reason: list[str]  # per row: "stop" or "length"
    lengths: list[int]  # per row, tokens up to its end
    # per name in `record`, m times what Step has of that name, of these R rows
    recorded: dict[str, tuple]


@dataclass
class Beams:
    """k sequences for each prompt, all with as many tokens."""

    token_ids: Tensor  # [B, k, m], m the most there can be
    path: Tensor  # [B, k, m] in which of the B·n rows each token was chosen, -1 after the end
    score: Tensor  # [B, k]
    ended: Tensor  # bool [B, k]

    def take(self, index: Tensor) -> "Beams":
        """For each prompt the sequences [B, j] by their number, in that order."""
        rows = torch.arange(len(index), device=index.device)[:, None]  # [B, 1]
        return Beams(*(tensor[rows, index] for tensor in vars(self).values()))

    def join(self, other: "Beams") -> "Beams":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Beams(*(torch.cat(pair, dim=1) for pair in pairs))


@torch.no_grad()
def search(
    model: Llava,
    spliced: Spliced,
    options: Options,
    *,
    tokenizer: Tokenizer | None = None,
    record: Sequence[str] = (),
    process: Process | None = None,
) -> Found:
    """The num_return_sequences best answers to each prompt; with a temperature, transformers' beam
    sampling.

    The prompt is read once and its cache repeated for the beams. Stop texts do not steer the
    search: they are cut from finished answers, whose ids and scores stay whole. process: as for
    `generate`, given the log-probabilities of every beam [B·n, V]. Raises ValueError as `generate`.
    """
    check_wishes(options, tokenizer, record)
    wanted = {name: name in record for name in ("hidden_states", "attentions")}
    n, (prompts, length, _), device = options.num_beams, spliced.embeds.shape, spliced.embeds.device
    budget = min(options.max_new_tokens, room_for_answer(model, spliced))
    end_ids = torch.tensor(model.config.eos_token_ids, dtype=torch.long, device=device)
    # K: even if every beam ends in every way there is, n remain to go on
    count = max(2, 1 + len(end_ids)) * n
    choose = Chooser(model, spliced.input_ids, options, keep=1 + len(end_ids), process=process)
    cache = KVCache(
        model.config.text, prompts, length + budget - 1, dtype=spliced.embeds.dtype, device=device
    )

    output = prefill(model, spliced, cache, **wanted)
    rows = torch.arange(prompts, device=device).repeat_interleave(n)  # [B·n]
    cache.select_rows(rows)
    choose.history = choose.history[rows]
    logits = last_logits(output)[rows]  # [B·n, V]
    states, weights = (
        kept and tuple(t[rows] for t in kept) for kept in (output.hidden_states, output.attentions)
    )

    size = (prompts, n, budget)
    running = Beams(
        token_ids=torch.full(size, model.config.pad_token_id, device=device),
        path=torch.full(size, -1, device=device),
        # at first all are alike: follow one
        score=logits.new_tensor([0.0] + [OUT] * (n - 1)).repeat(prompts, 1),
        ended=torch.zeros((prompts, n), dtype=torch.bool, device=device),
    )
    finished = Beams(
        running.token_ids, running.path, torch.full_like(running.score, OUT), running.ended
    )
    improvable = torch.ones((prompts, 1), dtype=torch.bool, device=device)
    recorded: dict[str, list] = {name: [] for name in record}
    for made in range(budget):
        scores = choose.process(logits.log_softmax(-1))  # [B·n, V]
        now = {"scores": scores, "logits": logits, "hidden_states": states, "attentions": weights}
        for name in record:
            recorded[name].append(now[name])

        total = (scores.view(prompts, n, -1) + running.score[:, :, None]).flatten(1)  # [B, n·V]
        if (total.amax(1) == REMOVED).any():
            raise ValueError(NOTHING_LEFT)
        # [B, K]
        best = total.topk(count).indices if options.temperature == 0 else choose.draw(total, count)
        beam, token_ids = best // scores.shape[1], best % scores.shape[1]  # [B, K]
        candidates = running.take(beam)
        candidates.token_ids[:, :, made] = token_ids
        candidates.path[:, :, made] = rows.view(prompts, n)[:, :1] * n + beam
        candidates.score = total.gather(1, best)
        candidates.ended = torch.isin(token_ids, end_ids) | (made + 1 == budget)

        going_on = candidates.score + candidates.ended * OUT
        going_on, index = going_on.topk(n)
        running = candidates.take(index)
        running.score = going_on

        # An end counts only among the n best candidates, and while the prompt's answers are neither
        # full nor final.
        full = finished.ended.all(1, keepdim=True) & (options.early_stopping is True)  # [B, 1]
        candidates.ended[:, n:] = False
        candidates.score = candidates.score / (made + 1) ** options.length_penalty
        candidates.score = (
            candidates.score + full * OUT + ~improvable * OUT + ~candidates.ended * OUT
        )
        finished = finished.join(candidates)
        finished = finished.take(finished.score.topk(n).indices)

        # Could the best running beam, at this length or ("never") at the length that flatters it
        # most, still get in? Scores are negative, so a longer answer divides its sum by more and
        # looks better: with a penalty of 1, a sum of -6 after 3 tokens is hoped to be worth -6 / 3
        # = -2; flattered, with 12 tokens to come to, -6 / 12 = -0.5. Against a worst finished
        # answer of -1.5 the first has lost, the second goes on.
        flattered = options.early_stopping == "never" and options.length_penalty > 0
        # [B, 1]
        hoped = running.score[:, :1] / (budget if flattered else made + 1) ** options.length_penalty
        worst = finished.score.amin(1, keepdim=True).where(finished.ended, OUT)  # [B, n]
        improvable = improvable & (hoped > worst).any(1, keepdim=True)
        all_full = options.early_stopping is True and finished.ended.all()
        if made + 1 == budget or all_full or not improvable.any():
            break
        # [B·n]
        token_ids, parents = (
            running.token_ids[:, :, made].flatten(),
            running.path[:, :, made].flatten(),
        )
        cache.select_rows(parents)
        choose.remember(token_ids, parents)
        output = decode(model, token_ids, cache, **wanted)
        logits, states, weights = last_logits(output), output.hidden_states, output.attentions

    return _collect(model, finished, options, tokenizer, recorded)


def _collect(
    model: Llava,
    finished: Beams,
    options: Options,
    tokenizer: Tokenizer | None,
    recorded: dict[str, list],
) -> Found:
    """The best of the finished as rows, with their texts, and of what was recorded in the B·n rows
    their own part."""
    token_ids, path, scores = (
        tensor[:, : options.num_return_sequences].flatten(0, 1)
        for tensor in (finished.token_ids, finished.path, finished.score)
    )
    lengths = (path >= 0).sum(1).tolist()
    longest = max(lengths)
    answers = [Row(model.config.eos_token_ids, tokenizer, options.stop) for _ in lengths]
    text = [
        "".join(row.feed(token, last=made == length) for made, token in enumerate(ids[:length], 1))
        for row, ids, length in zip(answers, token_ids.tolist(), lengths, strict=True)
    ]
    # m times [R]: after its end a row shows what means nothing
    followed = path[:, :longest].clamp(min=0).T
    return Found(
        sequences=token_ids[:, :longest],
        scores=scores,
        text=text,
        finish_reason=[row.finish_reason for row in answers],
        lengths=lengths,
        recorded={
            name: tuple(
                tuple(t[at] for t in step) if isinstance(step, tuple) else step[at]
                for step, at in zip(steps[:longest], followed, strict=True)
            )
            for name, steps in recorded.items()
        },
    )
