"""The generation loop: prefill once, then one token per step.

What is left of `steps` for one prompt, the most likely tokens and nobody who watches:

    def plain(model, spliced, cache, most):
        output = prefill(model, spliced, cache)
        for _ in range(most):
            token = last_logits(output).argmax(-1)  # [1]
            if int(token) in model.config.eos_token_ids:
                return
            yield int(token)
            output = decode(model, token, cache)

Everything else is for more rows, other choices, text, records, and a GPU that must not wait.

B batch, T prompt positions after the splice, S with those cached before, C width, H attention
heads, L layers, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import LanguageOutput
from minillava.llava import Llava, Spliced, upcast
from minillava.options import RECORDABLE, Options, remaining_context
from minillava.sampling import NOT_FINITE, NOTHING_LEFT, Process, Sampler
from minillava.streaming import Row
from minillava.tokenizer import Tokenizer

BEAMS_GO_ELSEWHERE = "beams go through generate() or beam.search(), and without contrast"


@dataclass
class Step:
    """One new token per row. Rows that had already finished get the pad token and no text."""

    token_ids: Tensor  # [B]
    # the same numbers, here: to read them from a GPU is to wait for the step that it has begun
    ids: list[int]
    text: list[str]  # per row, the text that can now be shown; "" without a tokenizer
    # per row: None while it goes on, "stop" (end token or stop text), "length"
    finish_reason: list[str | None]
    logits: Tensor  # [B, V] float32, as the model gave them
    other_logits: Tensor | None  # [B, V] float32, those of the second rows; None without `contrast`
    # [B, V] float32, after contrast, penalties and filters: what the choice was made from
    scores: Tensor
    hidden_states: tuple[Tensor, ...] | None  # L + 1 times [B, T, C] at prefill, then [B, 1, C]
    # L times [B, H, T, S] at prefill (S = T without a cache), then [B, H, 1, S + steps]
    attentions: tuple[Tensor, ...] | None


@torch.no_grad()
def steps(
    model: Llava,
    spliced: Spliced,
    options: Options,
    *,
    tokenizer: Tokenizer | None = None,
    record: Sequence[str] = (),
    contrast: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    process: Process | None = None,
    cache: KVCache | None = None,
) -> Iterator[Step]:
    """The loop, one Step per token: the first costs the whole prompt, each further one a single
    position.

    contrast: makes one [B, V] of the logits of two rows and the number of the step; `spliced` then
    holds 2 B rows, B that answer and B that read along and see something else. process: changes
    scores before temperature and filters (see Sampler). cache: what was read before this prompt,
    which goes on from there; it needs room for prompt and answer. Everything needed to go on lives
    in local variables, so any number of loops can share one model. Raises ValueError as `generate`.
    """
    if options.num_beams > 1:
        raise ValueError(f"num_beams is {options.num_beams}: {BEAMS_GO_ELSEWHERE}")
    run = Run(model, spliced, options, tokenizer, record, contrast, process, cache)
    decoding = model.decoding or decode_in_turn
    with decoding(model, spliced.embeds, run.capacity, cache, run.wanted) as decoder:
        output = prefill(model, spliced, decoder.cache, **run.wanted)
        while True:
            step, told = run.choose(output)
            decoder.begin(step.token_ids.repeat(run.streams), told, run.sampler.step == run.most)
            run.tell(step, decoder.read())  # a GPU may go on meanwhile
            finished = all(step.finish_reason)
            if finished:
                decoder.drop()
            yield step
            if finished:
                return
            output = decoder.next()


class Run:
    """Answers as they grow: how a token is chosen, and what it says. Every loop starts with it."""

    def __init__(
        self,
        model: Llava,
        spliced: Spliced,
        options: Options,
        tokenizer: Tokenizer | None = None,
        record: Sequence[str] = (),
        contrast: Callable[[Tensor, Tensor, int], Tensor] | None = None,
        process: Process | None = None,
        cache: KVCache | None = None,
    ):
        """Arguments as for `steps`. Raises ValueError before anything is computed."""
        if unknown := set(record) - set(RECORDABLE):
            some = ", ".join(RECORDABLE)
            raise ValueError(f"cannot record {sorted(unknown)}, expected some of: {some}")
        if options.stop and tokenizer is None:
            raise ValueError("stop texts need a tokenizer: pass tokenizer=")
        self.contrast, self.streams = contrast, 1 if contrast is None else 2
        rows, length, _ = spliced.embeds.shape
        self.batch, before = rows // self.streams, 0 if cache is None else cache.length
        pictures = max(map(len, spliced.image_spans))
        self.most = remaining_context(model.config, before + length, pictures)
        self.most = min(options.max_new_tokens, self.most)
        self.capacity = length + self.most - 1  # the last token is chosen but never fed back
        self.wanted = {name: name in record for name in ("hidden_states", "attentions")}
        self.sampler = Sampler(model.config, spliced.token_ids[: self.batch], options, process)
        self.pad_token_id = model.config.pad_token_id
        self.rows = [
            Row(model.config.eos_token_ids, tokenizer, options.stop) for _ in range(self.batch)
        ]
        # which rows have finished: here, and on the device [B] once one has
        self.known = [False] * self.batch
        self.done: Tensor | None = None

    def choose(self, output: LanguageOutput) -> tuple[Step, Tensor]:
        """The next token of each row by logits [B or 2 B, 1, V], and the numbers that `tell` wants,
        still on their device."""
        combined = logits = last_logits(output)
        other, finite = None, logits.isfinite().all()
        if self.contrast is not None:
            logits, other = logits.chunk(2)
            combined = self.contrast(logits, other, self.sampler.step)
        # multinomial on NaN aborts the CUDA context, and we learn that the logits were not finite
        # only after the draw. So draw from zeros and raise in `tell`.
        token_ids, scores, empty = self.sampler(combined.where(finite, 0))
        known = [row.finish_reason is not None for row in self.rows]
        if known != self.known:  # a row has finished: the one time when the device waits for us
            self.known, self.done = known, torch.tensor(known, device=token_ids.device)
        if self.done is not None:
            token_ids = token_ids.masked_fill(self.done, self.pad_token_id)
            empty = empty & ~self.done
        self.sampler.remember(token_ids)
        states, attentions = (
            recorded and tuple(t[: self.batch] for t in recorded)
            for recorded in (output.hidden_states, output.attentions)
        )
        told = torch.cat([token_ids, torch.stack([finite, empty.any()]).long()])
        return Step(token_ids, [], [], [], logits, other, scores, states, attentions), told

    def tell(self, step: Step, told: list[int]) -> None:
        """Fill in what must be read from the device: ids, text and ends. Raises ValueError if there
        was nothing to choose from."""
        *step.ids, finite, empty = told
        if not finite:
            raise ValueError(NOT_FINITE)
        if empty:
            raise ValueError(NOTHING_LEFT)
        last = self.sampler.step == self.most
        step.text = [row.feed(id, last) for row, id in zip(self.rows, step.ids, strict=True)]
        step.finish_reason = [row.finish_reason for row in self.rows]


class Decoder:
    """From one token to the next, by a `step` that makes token ids [B] logits [B,1,V] and adds to
    the cache. Here it runs when its logits are wanted; in fast/ahead.py it is begun before."""

    def __init__(self, step: Callable[[Tensor], LanguageOutput], cache: KVCache):
        self.step, self.cache = step, cache

    def begin(self, token_ids: Tensor, told: Tensor, last: bool) -> None:
        """What to go on with [B], unless it is the last, and the numbers to read meanwhile."""
        self.token_ids, self.told = token_ids, told

    def read(self) -> list[int]:
        return self.told.tolist()

    def next(self) -> LanguageOutput:
        return self.step(self.token_ids)

    def drop(self) -> None:
        """At the answer's end, forget a step that was begun in vain: here, none was."""


@contextmanager
def decode_in_turn(
    model: Llava, like: Tensor, capacity: int, cache: KVCache | None, wanted: dict[str, bool]
) -> Iterator[Decoder]:
    """The decoder of one answer. like [B,T,C]: shows rows, dtype and device of its cache, if none
    is given; wanted: what `decode` records."""
    if cache is None:
        text = model.config.text
        cache = KVCache(text, len(like), capacity, dtype=like.dtype, device=like.device)
    yield Decoder(partial(decode, model, cache=cache, **wanted), cache)  # type: ignore[arg-type]


def prefill(model: Llava, spliced: Spliced, cache: KVCache, **wanted: bool) -> LanguageOutput:
    """All positions of the prompt at once, after the cached positions; logits of the last only,
    [B,1,V]. wanted: hidden_states, attentions."""
    return model.language_model(
        spliced.embeds, spliced.padding_mask, cache, last_only=True, **wanted
    )


def decode(model: Llava, token_ids: Tensor, cache: KVCache, **wanted: bool) -> LanguageOutput:
    """One new position per row; everything before it is read from the cache. token_ids [B] ->
    logits [B,1,V]"""
    return model.language_model(token_ids[:, None], None, cache, **wanted)


def last_logits(output: LanguageOutput) -> Tensor:
    """Those of the last position, [B, V] in float32 or better."""
    return upcast(output.logits[:, -1])
