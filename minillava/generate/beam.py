"""Beam search: several answers to a prompt grow side by side, and the most likely complete ones are
kept.

The tokens are those of transformers 5.23 (`_beam_search`), whose order of float operations is kept.
B prompts, n beams each, K candidates per step, V vocabulary, T prompt positions, m new tokens, R
answers: B times num_return_sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import LanguageOutput, upcast
from minillava.llava import Llava, Spliced
from minillava.loop import decode, decode_in_turn, prefill
from minillava.options import Options
from minillava.sampling import NOTHING_LEFT, REMOVED, Process, check_finite, last_logits
from minillava.streaming import Row, Run
from minillava.tokenizer import Tokenizer

RULED_OUT = -1e9
"""Added to a score so that it loses against every real one, and added rather than put in its place:
two of them still compare as they do in transformers."""


@dataclass
class BeamResult:
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
    path: Tensor  # [B, k, m] the row of B·n in which each token was chosen, -1 after the end
    score: Tensor  # [B, k]
    ended: Tensor  # bool [B, k]

    def take(self, index: Tensor) -> "Beams":
        """The sequences with the numbers `index` [B, j] of each prompt, in that order."""
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
) -> BeamResult:
    """The num_return_sequences best answers to each prompt; with a temperature, transformers' beam
    sampling.

    The prompt is prefilled once and its cache repeated for the beams. Stop texts do not change the
    search: they are cut from the text of finished answers, whose ids and scores stay as they are.
    process: as for `generate`, but it gets the log-probabilities of every beam [B·n, V]. Raises
    ValueError as `generate` does.
    """
    run = Run(model, spliced, options, tokenizer, record, process=process)
    search = Search(model, spliced, run, options)
    recorded: dict[str, list] = {name: [] for name in record}
    with decode_in_turn(model, spliced.embeds, run.capacity, None, run.wanted) as decoder:
        cache = decoder.cache
        output = search.repeat(prefill(model, spliced, cache, **run.wanted), cache)
        while True:
            logits = check_finite(last_logits(output))  # [B·n, V]
            scores = run.sampler.scores_of(logits.log_softmax(-1))
            now = {**vars(output), "logits": logits, "scores": scores}
            for name in record:
                recorded[name].append(now[name])
            candidates = search.propose(scores)
            search.keep_running(candidates)
            search.keep_finished(candidates)
            token_ids, parents = search.last_tokens()  # [B·n]
            run.sampler.remember(token_ids, parents)
            if not search.can_improve():
                break
            cache.select_rows(parents)
            output = decode(model, token_ids, cache, **run.wanted)
    return _collect(model, search.finished, options, tokenizer, recorded)


class Search:
    """The n beams that run and the n best finished answers of each prompt, and how one step changes
    them."""

    def __init__(self, model: Llava, spliced: Spliced, run: Run, options: Options):
        self.run, self.options, self.n, self.most = run, options, options.num_beams, run.most
        self.prompts, self.device = run.batch, run.sampler.history.device
        self.end_ids = torch.tensor(
            model.config.eos_token_ids, dtype=torch.long, device=self.device
        )
        # even if every beam proposes every end token, n candidates remain to go on
        self.count = max(2, 1 + len(self.end_ids)) * self.n
        size = (self.prompts, self.n, self.most)
        # at first all beams are equal, so only one is followed
        first = upcast(spliced.embeds[:0]).new_tensor([0.0] + [RULED_OUT] * (self.n - 1))
        self.running = Beams(
            token_ids=torch.full(size, model.config.pad_token_id, device=self.device),
            path=torch.full(size, -1, device=self.device),
            score=first.repeat(self.prompts, 1),
            ended=torch.zeros(size[:2], dtype=torch.bool, device=self.device),
        )
        self.finished = replace(self.running, score=torch.full_like(self.running.score, RULED_OUT))
        self.improvable = torch.ones((self.prompts, 1), dtype=torch.bool, device=self.device)

    def repeat(self, output: LanguageOutput, cache: KVCache) -> LanguageOutput:
        """Repeat the output and the cache of B prompts for the n beams of each."""
        rows = torch.arange(self.prompts, device=self.device).repeat_interleave(self.n)  # [B·n]
        cache.select_rows(rows)
        self.run.sampler.history = self.run.sampler.history[rows]
        states, weights = (
            recorded and tuple(t[rows] for t in recorded)
            for recorded in (output.hidden_states, output.attentions)
        )
        return LanguageOutput(output.logits[rows], states, weights)

    def propose(self, scores: Tensor) -> Beams:
        """The K best continuations by one token, or K drawn ones; scores [B·n, V]."""
        total = scores.view(self.prompts, self.n, -1) + self.running.score[:, :, None]
        total = total.flatten(1)  # [B, n·V]
        if (total.amax(1) == REMOVED).any():
            raise ValueError(NOTHING_LEFT)
        if self.options.temperature == 0:
            best = total.topk(self.count).indices  # [B, K]
        else:
            best = self.run.sampler.draw(total, self.count)
        beam, token_ids = best // scores.shape[1], best % scores.shape[1]  # [B, K]
        rows, at = torch.arange(self.prompts, device=self.device)[:, None], self.run.sampler.chosen
        found = self.running.take(beam)
        found.token_ids[:, :, at] = token_ids
        found.path[:, :, at] = rows * self.n + beam
        found.score = total.gather(1, best)
        found.ended = torch.isin(token_ids, self.end_ids) | (at + 1 == self.most)
        return found

    def keep_running(self, candidates: Beams) -> None:
        """Keep the n best candidates that have not ended."""
        going_on = candidates.score + candidates.ended * RULED_OUT
        going_on, index = going_on.topk(self.n)
        self.running = replace(candidates.take(index), score=going_on)

    def keep_finished(self, candidates: Beams) -> None:
        """Keep the n best of the finished answers and of the candidates that end now. An end counts
        only among the n best candidates, and only as long as the prompt's answers are neither full
        nor final."""
        early = self.options.early_stopping is True
        full = self.finished.ended.all(1, keepdim=True) & early  # [B, 1]
        ended = candidates.ended.clone()
        ended[:, self.n :] = False
        score = candidates.score / (self.run.sampler.chosen + 1) ** self.options.length_penalty
        score = score + full * RULED_OUT + ~self.improvable * RULED_OUT + ~ended * RULED_OUT
        finished = self.finished.join(replace(candidates, score=score, ended=ended))
        self.finished = finished.take(finished.score.topk(self.n).indices)

    def last_tokens(self) -> tuple[Tensor, Tensor]:
        """The newest token of each running beam, and the row in which it was chosen; both [B·n]."""
        at = self.run.sampler.chosen
        return self.running.token_ids[:, :, at].flatten(), self.running.path[:, :, at].flatten()

    def can_improve(self) -> bool:
        """Whether the best running beam could still enter the finished answers, at its present
        length or ("never") at the length that gives it the best score.

        Scores are negative, so a longer answer, whose sum is divided by more, looks better. With a
        penalty of 1, a sum of -6 after 3 tokens scores -6 / 3 = -2 at its present length, and -6 /
        12 = -0.5 at a maximal length of 12. If the worst finished answer has -1.5, the first score
        means that the beam has lost, the second that it goes on.
        """
        early, penalty, step = (
            self.options.early_stopping,
            self.options.length_penalty,
            self.run.sampler.chosen,
        )
        length = self.most if early == "never" and penalty > 0 else step
        hoped = self.running.score[:, :1] / length**penalty  # [B, 1]
        worst = self.finished.score.amin(1, keepdim=True)
        worst = worst.where(self.finished.ended, RULED_OUT)  # [B, n]
        self.improvable = self.improvable & (hoped > worst).any(1, keepdim=True)
        all_full = early is True and bool(self.finished.ended.all())
        return step < self.most and not all_full and bool(self.improvable.any())


def _collect(
    model: Llava,
    finished: Beams,
    options: Options,
    tokenizer: Tokenizer | None,
    recorded: dict[str, list],
) -> BeamResult:
    """The best finished answers as rows, with their texts, and their part of what was recorded in
    the B·n rows."""
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
    # m times [R]; after the end of its answer a row's entries have no meaning
    followed = path[:, :longest].clamp(min=0).T
    return BeamResult(
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
