"""Answers as they stream: how a step's tokens are chosen, what they say, and where each row ends.

B batch, T prompt positions after the splice, S with those cached before, C width, H attention
heads, L layers, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import LanguageOutput
from minillava.llava import Llava, Spliced
from minillava.options import RECORDABLE, Options, remaining_context
from minillava.sampling import NOT_FINITE, NOTHING_LEFT, Process, Sampler, last_logits
from minillava.tokenizer import TextDecoder, Tokenizer


@dataclass
class Step:
    """One new token per row. Rows that had already finished get the pad token and no text."""

    token_ids: Tensor  # [B]
    # token_ids as Python ints, on the CPU; copying them from a GPU waits for it
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
        self.contrast, self.rows_per_answer = contrast, 1 if contrast is None else 2
        rows, length, _ = spliced.embeds.shape
        self.batch, before = rows // self.rows_per_answer, 0 if cache is None else cache.length
        longest = max(spliced.image_spans, key=len)
        each = ", ".join(dict.fromkeys(str(end - start) for start, end in longest))
        self.most = remaining_context(model.config, before + length, len(longest), each=each)
        self.most = min(options.max_new_tokens, self.most)
        self.capacity = length + self.most - 1  # the last token is chosen but never fed back
        self.wanted = {name: name in record for name in ("hidden_states", "attentions")}
        self.sampler = Sampler(model.config, spliced.token_ids[: self.batch], options, process)
        self.pad_token_id = model.config.pad_token_id
        self.rows = [
            Row(model.config.eos_token_ids, tokenizer, options.stop) for _ in range(self.batch)
        ]
        # finished rows, as Python bools; the same as a tensor [B] on the device, once one has
        self.finished = [False] * self.batch
        self.finished_on_device: Tensor | None = None

    def choose(self, output: LanguageOutput) -> tuple[Step, Tensor]:
        """The next token of each row by logits [B or 2 B, 1, V], and the numbers that `tell` wants,
        still on their device."""
        combined = logits = last_logits(output)
        other, finite = None, logits.isfinite().all()
        if self.contrast is not None:
            logits, other = logits.chunk(2)
            combined = self.contrast(logits, other, self.sampler.chosen)
        # multinomial on NaN aborts the CUDA context, and we learn that the logits were not finite
        # only after the draw. So draw from zeros and raise in `tell`.
        token_ids, scores, empty = self.sampler(combined.where(finite, 0))
        finished = [row.finish_reason is not None for row in self.rows]
        if finished != self.finished:  # the one time when the device waits for us
            self.finished = finished
            self.finished_on_device = torch.tensor(finished, device=token_ids.device)
        if self.finished_on_device is not None:
            token_ids = token_ids.masked_fill(self.finished_on_device, self.pad_token_id)
            empty = empty & ~self.finished_on_device
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
        last = self.sampler.chosen == self.most
        step.text = [row.feed(id, last) for row, id in zip(self.rows, step.ids, strict=True)]
        step.finish_reason = [row.finish_reason for row in self.rows]


class Row:
    """One row's answer as it grows: its text, held back where it might still become a stop text,
    and its end."""

    def __init__(
        self, eos_token_ids: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str]
    ):
        self.eos_token_ids, self.stop = eos_token_ids, stop
        self.finish_reason: str | None = None
        self.decoder = None if tokenizer is None else TextDecoder(tokenizer)
        # characters as stop texts see them, and as a reader does: "" for those of special tokens
        self.held: list[tuple[str, str]] = []

    def feed(self, token_id: int, last: bool) -> str:
        """Take the row's next token (`last`: the most ends with it); the text that is now
        certain."""
        if self.finish_reason is not None:
            return ""
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        if self.decoder is not None:
            text = self.decoder.feed(token_id)
            if last or self.finish_reason is not None:
                text += self.decoder.flush()
            self.held += [(char, char) for char in text]
            self.held += [(char, "") for char in self.decoder.hidden(token_id)]
        spelled, sure = "".join(char for char, _ in self.held), len(self.held)
        found = [at for at in map(spelled.find, self.stop) if at >= 0]
        if found:
            sure, self.finish_reason = min(found), "stop"
        elif last and self.finish_reason is None:
            self.finish_reason = "length"
        elif self.finish_reason is None:  # the longest end that may yet become a stop text is held
            ends = ((at, spelled[at:]) for at in range(sure))
            may = (at for at, end in ends if any(stop.startswith(end) for stop in self.stop))
            sure = next(may, sure)
        text, self.held = "".join(shown for _, shown in self.held[:sure]), self.held[sure:]
        return text
