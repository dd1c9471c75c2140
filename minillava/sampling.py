"""From logits to the next token: penalties and filters as pure functions on scores [B, V], and the
`Sampler`, which applies them in the order of transformers.

Repetition penalty, no repeated n-grams, no early end; then the caller's own `process`; and only
when sampling, temperature, top-k, top-p, min-p, typical-p. A removed token gets -inf. keep: of the
best, how many a filter leaves.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minillava.config import LlavaConfig
from minillava.files.rows import check_scores
from minillava.llama import LanguageOutput, upcast
from minillava.options import Options

REMOVED = -math.inf

NOTHING_LEFT = (
    "no token is left to choose: contrast's cut, no_repeat_ngram_size, min_new_tokens, process and "
    "the filters together remove all; loosen one of them"
)

NOT_FINITE = (
    "the logits are not finite: damaged weights or a dtype too narrow; try float32 (a command: "
    "--dtype float32)"
)

Process = Callable[[Tensor, Tensor], Tensor]
"""Somebody's own sampling: scores [B, V] and history [B, S] -> scores [B, V]."""


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the row less likely (Keskar et al. 2019). seen: bool [B,V]."""
    # Divide a positive score, multiply a negative one: both move it down.
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Remove every token that would end a run of `size` tokens that is in the row already (Paulus
    et al. 2017). history: the row's ids so far [B,S], -1 where it is padding on the left."""
    vocabulary, length = scores.shape[1], history.shape[1]
    if length < size:
        return scores
    runs = history.unfold(1, size, 1)  # [B, S - size + 1, size]
    repeats = (runs[..., :-1] == history[:, None, length - size + 1 :]).all(-1)  # [B, S - size + 1]
    last = runs[..., -1]
    # Entries that end no repeat, padding, and ids outside the vocabulary are sent to one extra
    # column, which is cut off below.
    last = torch.where(repeats & (last >= 0) & (last < vocabulary), last, vocabulary)
    removed = scores.new_zeros((len(scores), vocabulary + 1), dtype=torch.bool).scatter_(
        1, last, True
    )
    return scores.masked_fill(removed[:, :-1], REMOVED)


def temperature(scores: Tensor, value: float) -> Tensor:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k best; tokens tied with the k-th stay."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]  # [B, 1]
    return scores.masked_fill(scores < kth, REMOVED)


def top_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches p (Holtzman et al. 2020)."""
    # Summed from the least likely upwards, as transformers does: in float32 the two directions
    # differ.
    ascending, order = scores.sort(descending=False)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -keep:] = False
    return scores.masked_fill(remove.scatter(1, order, remove), REMOVED)


def min_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens at least p times as likely as the best one."""
    probabilities = scores.softmax(-1)
    remove = probabilities < p * probabilities.amax(-1, keepdim=True)
    remove.scatter_(1, probabilities.topk(min(keep, scores.shape[-1])).indices, False)
    return scores.masked_fill(remove, REMOVED)


def typical_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the smallest set of tokens that reaches probability p, taking first those whose
    surprise, -log probability, is nearest to the expected one, the entropy (Meister et al. 2022);
    tokens tied with the last one stay."""
    log_p = scores.log_softmax(-1)
    # [B, 1]; a removed token is -inf times 0
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort()
    reached = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < p).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)  # [B, 1]
    remove = distance > distance.gather(1, last)
    remove[:, :keep] = False
    return scores.masked_fill(remove.scatter(1, order, remove), REMOVED)


def draw(scores: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """`count` different tokens per row at random, in proportion to softmax(scores). [B,V] ->
    [B,count]"""
    return torch.multinomial(scores.softmax(-1), count, generator=generator)


class Sampler:
    """From logits to tokens, by the options. Its only state is the ids so far and random numbers.

    history: [B, S] the ids of prompt and answer, a picture as one image id per patch, -1 where a
    row is padding.
    """

    def __init__(
        self,
        config: LlavaConfig,
        token_ids: Tensor,
        options: Options,
        process: Process | None = None,
    ):
        """token_ids: [B, S] the prompt, as `Spliced` has it. process: is given the scores after the
        penalties and returns others, -inf for a token that must not be chosen. Raises ValueError
        if there are seeds for another number of prompts."""
        if process is not None and not callable(process):
            raise ValueError(f"process is {process!r}, expected f(scores, history) -> scores")
        self.options, self.process, device = options, process, token_ids.device
        seeds = options.seed if isinstance(options.seed, tuple) else (options.seed,)
        if not seeds or len(token_ids) % len(seeds):
            raise ValueError(
                f"{len(seeds)} seeds for {len(token_ids)} rows, expected one seed, or one per "
                "prompt"
            )
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        # Beams need candidates that go on even if as many as there are end tokens do not.
        self.keep = 1 if options.num_beams == 1 else 1 + len(config.eos_token_ids)
        ends = [i for i in config.eos_token_ids if i < config.text.vocab_size]
        self.end_ids = torch.tensor(ends, dtype=torch.long, device=device)
        # In transformers a picture is ordinary ids of the prompt, so it is penalised as well.
        self.history, self.prompt_length = token_ids, token_ids.shape[1]

    @property
    def chosen(self) -> int:
        """How many tokens of the answer are chosen."""
        return self.history.shape[1] - self.prompt_length

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, V] float32 -> token ids [B], the scores [B, V] they were chosen from, and bool [B]:
        True for rows with no token left, whose id is meaningless."""
        scores = self.scores_of(logits)
        empty = ~(scores > REMOVED).any(-1)  # [B]
        scores = scores.masked_fill(empty[:, None], 0)
        token_ids = (
            scores.argmax(-1) if self.options.temperature == 0 else self.draw(scores, 1)[:, 0]
        )
        return token_ids, scores, empty

    def scores_of(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities [B, V] -> the scores to choose from, in the order of
        transformers."""
        o, scores = self.options, logits
        if o.repetition_penalty is not None:
            scores = repetition_penalty(scores, self._seen(scores.shape[1]), o.repetition_penalty)
        if o.no_repeat_ngram_size:
            scores = no_repeat_ngram(scores, self.history, o.no_repeat_ngram_size)
        if self.chosen < o.min_new_tokens:
            scores = scores.index_fill(1, self.end_ids, REMOVED)
        if self.process is not None:
            scores = check_scores(self.process(scores.clone(), self.history.clone()), scores)
        if o.temperature == 0:
            return scores
        if o.temperature != 1:
            scores = temperature(scores, o.temperature)
        if o.top_k:
            scores = top_k(scores, max(o.top_k, self.keep))
        if o.top_p is not None and o.top_p < 1:
            scores = top_p(scores, o.top_p, self.keep)
        if o.min_p:
            scores = min_p(scores, o.min_p, self.keep)
        if o.typical_p is not None and o.typical_p < 1:
            scores = typical_p(scores, o.typical_p, self.keep)
        return scores

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """`count` different choices per row, at random: [B, V] -> [B, count]."""
        # [B / seeds, V] each
        shares = zip(scores.chunk(len(self.generators)), self.generators, strict=True)
        return torch.cat([draw(rows, generator, count) for rows, generator in shares])

    def remember(self, token_ids: Tensor, rows: Tensor | None = None) -> None:
        """Note what was chosen [B]. rows: which row each of them follows, when not its own
        (beams)."""
        history = self.history if rows is None else self.history[rows]
        self.history = torch.cat([history, token_ids[:, None]], dim=1)

    def _seen(self, vocabulary: int) -> Tensor:
        """bool [B, V]: which tokens are in each row already."""
        inside = (self.history >= 0) & (self.history < vocabulary)
        known = torch.where(inside, self.history, vocabulary)
        seen = torch.zeros((len(known), vocabulary + 1), dtype=torch.bool, device=known.device)
        return seen.scatter_(1, known, True)[:, :-1]  # the last column took the rest


def last_logits(output: LanguageOutput) -> Tensor:
    """Those of the last position, [B, V] in float32 or better."""
    return upcast(output.logits[:, -1])


def check_finite(logits: Tensor) -> Tensor:
    """The logits. Raises ValueError if they are not all finite."""
    if not logits.isfinite().all():
        raise ValueError(NOT_FINITE)
    return logits
