"""The generation loop: prefill once, then one token per step; how each is chosen, and when to stop.

B batch, T prompt positions after the splice, C width, H attention heads, L layers, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava import sampling
from minillava.cache import KVCache
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.llama import LanguageOutput
from minillava.llava import Llava, Spliced
from minillava.tokenizer import TextDecoder, Tokenizer

RECORDABLE = ("scores", "logits", "hidden_states", "attentions")


@dataclass(frozen=True)
class Options:
    """How the next token is chosen and when to stop. These are the defaults, everywhere.

    temperature 0 is greedy: the most likely token; the filters top_k, top_p, min_p and typical_p need a temperature.
    stop: texts that end an answer and are cut from it. seed: if None, a fresh one is drawn and kept here.
    num_return_sequences: answers per prompt, in adjacent rows. Raises ValueError for a value out of range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    num_return_sequences: int = 1

    def __post_init__(self):
        ranges = (  # name, smallest, largest, whether a whole number
            ("max_new_tokens", 1, math.inf, True),
            ("min_new_tokens", 0, math.inf, True),
            ("temperature", 0, 1e6, False),
            ("top_k", 0, math.inf, True),
            ("top_p", 0, 1, False),
            ("min_p", 0, 1, False),
            ("typical_p", 0, 1, False),
            ("repetition_penalty", 0.01, 100, False),
            ("no_repeat_ngram_size", 0, math.inf, True),
            ("num_return_sequences", 1, math.inf, True),
            ("seed", -(2**63), 2**64 - 1, True),
        )
        for name, low, high, whole in ranges:
            value = vars(self)[name]
            if value is None:
                continue
            of_kind = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not of_kind or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                limit = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
                raise ValueError(f"{name} is {value!r}, expected {kind} {limit}")
        for name in ("top_p", "typical_p"):
            if vars(self)[name] == 0:
                raise ValueError(f"{name} is 0, expected a number above 0: no token would be left")
        if 0 < self.temperature < 1e-6:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or at least 1e-6")
        filters = self.top_k or self.top_p not in (None, 1) or self.min_p or self.typical_p not in (None, 1)
        if self.temperature == 0 and (filters or self.num_return_sequences > 1):
            raise ValueError(
                "top_k, top_p, min_p, typical_p and num_return_sequences are about samples: "
                "set a temperature above 0 (1.0 changes nothing)"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not all(isinstance(s, str) for s in stop):
            raise ValueError(f"stop is {self.stop!r}, expected texts")
        object.__setattr__(self, "stop", tuple(s for s in stop if s))  # an empty text would match everywhere
        if self.seed is None:
            object.__setattr__(self, "seed", torch.Generator().seed() % 2**32)


@dataclass
class Step:
    """One new token per row. Rows that had already finished get the pad token and no text."""

    token_ids: Tensor  # [B]
    text: list[str]  # per row, the text that can now be shown; "" without a tokenizer
    finish_reason: list[str | None]  # per row: None while it goes on, "stop" (end token or stop text), "length"
    logits: Tensor  # [B, V] float32, as the model gave them
    other_logits: Tensor | None  # [B, V] float32, those of the second rows; None without `contrast`
    scores: Tensor  # [B, V] float32, after contrast, penalties and filters: what the choice was made from
    hidden_states: tuple[Tensor, ...] | None  # L + 1 times [B, T, C] at prefill, then [B, 1, C]
    attentions: tuple[Tensor, ...] | None  # L times [B, H, T, T] at prefill, then [B, H, 1, T + steps]


@torch.no_grad()
def steps(
    model: Llava,
    spliced: Spliced,
    options: Options,
    *,
    tokenizer: Tokenizer | None = None,
    record: Sequence[str] = (),
    contrast: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    cache: KVCache | None = None,
) -> Iterator[Step]:
    """The loop, one Step per token: the first costs the whole prompt, each further one a single position.

    contrast: makes one [B, V] of the logits of two rows and the number of the step, where `spliced` holds 2 B rows: B
    that answer and B that read along and see something else. They are one batch, so they cost little more than one.
    cache: what was read before this prompt, which goes on from there; it needs room for prompt and answer.
    Everything it needs to go on lives in its local variables, so any number of loops can share one model.
    Stops without another forward pass when every row has finished. Raises ValueError as `generate`.
    """
    unknown = set(record) - set(RECORDABLE)
    if unknown:
        raise ValueError(f"cannot record {sorted(unknown)}, expected some of: {', '.join(RECORDABLE)}")
    if options.stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer: pass tokenizer=")
    wanted = {name: name in record for name in ("hidden_states", "attentions")}
    streams = 1 if contrast is None else 2
    rows_read, length, _ = spliced.embeds.shape
    batch = rows_read // streams
    budget = min(options.max_new_tokens, room_for_answer(model, spliced, 0 if cache is None else cache.length))
    if cache is None:
        # The last token is chosen but never fed back, so the cache can be one shorter.
        dtype, device = spliced.embeds.dtype, spliced.embeds.device
        cache = KVCache(model.config.text, rows_read, length + budget - 1, dtype=dtype, device=device)
    choose = Chooser(model, spliced.input_ids[:batch], options)
    rows = [Row(model.config.eos_token_ids, tokenizer, options.stop) for _ in range(batch)]

    output = prefill(model, spliced, cache, **wanted)
    for made in range(1, budget + 1):
        done = torch.tensor([row.finish_reason is not None for row in rows], device=spliced.embeds.device)  # [B]
        logits = output.logits[:, -1].to(torch.promote_types(output.logits.dtype, torch.float32))  # [streams·B, V]
        logits, other = (logits, None) if contrast is None else logits.chunk(2)  # [B, V]
        token_ids, scores = choose(logits if contrast is None else contrast(logits, other, made - 1))
        token_ids = token_ids.masked_fill(done, model.config.pad_token_id)  # [B]
        choose.remember(token_ids)
        text = [row.feed(token, last=made == budget) for row, token in zip(rows, token_ids.tolist(), strict=True)]
        reasons = [row.finish_reason for row in rows]
        states, attentions = (
            recorded and tuple(t[:batch] for t in recorded) for recorded in (output.hidden_states, output.attentions)
        )
        yield Step(token_ids, text, reasons, logits, other, scores, states, attentions)
        if all(reasons):
            return
        output = decode(model, token_ids.repeat(streams), cache, **wanted)


def prefill(model: Llava, spliced: Spliced, cache: KVCache, *, hidden_states: bool, attentions: bool) -> LanguageOutput:
    """All positions of the prompt at once, into an empty cache; logits of the last one only. -> logits [B,1,V]"""
    return model.language_model(
        spliced.embeds,
        spliced.attention_mask,
        cache,
        last_only=True,
        hidden_states=hidden_states,
        attentions=attentions,
    )


def decode(model: Llava, token_ids: Tensor, cache: KVCache, *, hidden_states: bool, attentions: bool) -> LanguageOutput:
    """One new position per row; everything before it is read from the cache. token_ids [B] -> logits [B,1,V]"""
    return model.language_model(token_ids[:, None], None, cache, hidden_states=hidden_states, attentions=attentions)


def room_for_answer(model: Llava, spliced: Spliced, before: int = 0) -> int:
    """How many tokens the context has left after `before` positions read earlier and the prompt. Raises ValueError
    with the numbers when they fill it."""
    context, length = model.config.text.max_position_embeddings, before + spliced.embeds.shape[1]
    if length >= context:
        pictures, each = max(len(spans) for spans in spliced.image_spans), model.config.tokens_per_image
        raise ValueError(
            f"the prompt takes {length} positions ({pictures} picture(s) of {each} each), the model's context holds "
            f"{context} with the answer; shorten the prompt or give fewer pictures"
        )
    return context - length


class Chooser:
    """From logits to tokens, by the options: what was seen so far and the random numbers are its only state."""

    def __init__(self, model: Llava, input_ids: Sequence[Tensor], options: Options):
        """input_ids: per row, the prompt with its -200."""
        self.options = options
        device = input_ids[0].device
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(options.seed)
        self.seen = None
        if options.repetition_penalty is not None:
            size = (len(input_ids), model.config.text.vocab_size)
            self.seen = torch.zeros(size, dtype=torch.bool, device=device)  # [B, V]
            for row, ids in zip(self.seen, input_ids, strict=True):
                # In transformers a picture is an ordinary id of the prompt, so it is penalised as well.
                ids = torch.where(ids == IMAGE_TOKEN_INDEX, model.config.image_token_id, ids)
                row[ids[ids < len(row)]] = True

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[B, V] float32 -> token ids [B] and the scores [B, V] they were chosen from."""
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite: damaged weights or a dtype too narrow; try --dtype float32")
        o, scores = self.options, logits
        if o.repetition_penalty is not None:
            scores = sampling.repetition_penalty(scores, self.seen, o.repetition_penalty)
        if o.temperature == 0:
            return scores.argmax(-1), scores
        if o.temperature != 1:
            scores = sampling.temperature(scores, o.temperature)
        if o.top_k:
            scores = sampling.top_k(scores, o.top_k)
        if o.top_p is not None and o.top_p < 1:
            scores = sampling.top_p(scores, o.top_p)
        if o.min_p:
            scores = sampling.min_p(scores, o.min_p)
        return sampling.draw(scores, self.generator), scores

    def remember(self, token_ids: Tensor) -> None:
        if self.seen is not None:
            self.seen.scatter_(1, token_ids[:, None], True)


class Row:
    """One row's answer as it grows: its text, held back where it might still become a stop text, and its end."""

    def __init__(self, eos_token_ids: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str]):
        self.eos_token_ids, self.stop = eos_token_ids, stop
        self.finish_reason: str | None = None
        self.decoder = None if tokenizer is None else TextDecoder(tokenizer)
        self.held = ""

    def feed(self, token_id: int, last: bool) -> str:
        """Take the row's next token (`last`: the budget ends with it); the text that is now certain."""
        if self.finish_reason is not None:
            return ""
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        if self.decoder is not None:
            self.held += self.decoder.feed(token_id)
            if last or self.finish_reason is not None:
                self.held += self.decoder.flush()
            found = [at for at in map(self.held.find, self.stop) if at >= 0]
            if found:
                self.held, self.finish_reason = self.held[: min(found)], "stop"
        if last and self.finish_reason is None:
            self.finish_reason = "length"
        return self._release()

    def _release(self) -> str:
        keep = 0
        if self.finish_reason is None:
            # The longest end of the text that is the beginning of a stop text.
            keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text
