"""The generation loop: prefill once, then one token per step; how each is chosen, and when to stop.

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

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava import sampling
from minillava.cache import KVCache
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.llama import LanguageOutput
from minillava.llava import Llava, Spliced, as_rows
from minillava.options import Options
from minillava.tokenizer import TextDecoder, Tokenizer

Process = Callable[[Tensor, Tensor], Tensor]
"""Somebody's own sampling: scores [B, V] and history [B, S] -> scores [B, V]."""

RECORDABLE = ("scores", "logits", "hidden_states", "attentions")


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

    contrast: makes one [B, V] of the logits of two rows and the number of the step, where `spliced`
    holds 2 B rows: B that answer and B that read along and see something else. They are one batch,
    so weights are read once for both. process: changes scores before temperature and filters (see
    Chooser). cache: what was read before this prompt, which goes on from there; it needs room for
    prompt and answer. Everything it needs to go on lives in its local variables, so any number of
    loops can share one model. Stops when every row has finished: on a CPU without another forward
    pass, on a GPU with one begun and forgotten. Raises ValueError as `generate`.
    """
    if options.num_beams > 1:
        raise ValueError(
            f"num_beams is {options.num_beams}: beams go through generate() or beam.search(), and "
            "without contrast"
        )
    check_wishes(options, tokenizer, record)
    wanted = {name: name in record for name in ("hidden_states", "attentions")}
    rows_read, length, _ = spliced.embeds.shape
    batch = rows_read // (1 if contrast is None else 2)
    room = room_for_answer(model, spliced, 0 if cache is None else cache.length)
    most = min(options.max_new_tokens, room)
    capacity = length + most - 1  # the last token is chosen but never fed back
    choose = Chooser(model, spliced.input_ids[:batch], options, process=process)
    rows = [Row(model.config.eos_token_ids, tokenizer, options.stop) for _ in range(batch)]
    decoding = model.decoding or decode_in_turn
    with decoding(model, spliced.embeds, capacity, cache, wanted) as decoder:
        # not its output: a name would hold what is recorded of the prompt until the answer ends
        read_prompt = partial(prefill, model, spliced, decoder.cache, **wanted)
        yield from _loop(decoder, read_prompt(), choose, rows, most, contrast)


def _loop(decoder, output, choose, rows, most, contrast) -> Iterator[Step]:  # type: ignore[no-untyped-def]
    """Choose a token by the output of the prompt, see what it says, decode it; and so on, until
    every row has its answer."""
    batch, streams, device = len(rows), 1 if contrast is None else 2, output.logits.device
    done, known = torch.zeros(batch, dtype=torch.bool, device=device), [None] * batch  # [B]
    for made in range(1, most + 1):
        logits = wide_logits(output)  # [streams·B, V]
        all_finite = logits.isfinite().all()
        logits, other = (logits, None) if contrast is None else logits.chunk(2)  # [B, V]
        combined = logits if contrast is None else contrast(logits, other, made - 1)
        # A GPU that draws from what is no number is lost, and what it was is known only later.
        token_ids, scores, empty = choose(combined.where(all_finite, 0))
        token_ids = token_ids.masked_fill(done, choose.pad_token_id)  # [B]
        choose.remember(token_ids)

        # What we must know here; a GPU may go on meanwhile.
        told = torch.cat([token_ids, torch.stack([all_finite, (empty & ~done).any()]).long()])
        decoder.begin(token_ids.repeat(streams), told, last=made == most)
        *ids, finite, stuck = decoder.read()
        if not finite:
            raise ValueError(NOT_FINITE)
        if stuck:
            raise ValueError(NOTHING_LEFT)
        text = [row.feed(token, last=made == most) for row, token in zip(rows, ids, strict=True)]
        reasons = [row.finish_reason for row in rows]
        states, attentions = (
            recorded and tuple(t[:batch] for t in recorded)
            for recorded in (output.hidden_states, output.attentions)
        )
        if all(reasons):
            decoder.drop()
        yield Step(token_ids, ids, text, reasons, logits, other, scores, states, attentions)
        if all(reasons):
            return
        # a row has finished: the one time when the device waits for what we know
        if reasons != known:
            done, known = torch.tensor([r is not None for r in reasons], device=device), reasons
        output = decoder.next()


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


def check_wishes(options: Options, tokenizer: Tokenizer | None, record: Sequence[str]) -> None:
    """Raises ValueError for a record that does not exist, and for stop texts that nobody could
    see."""
    unknown = set(record) - set(RECORDABLE)
    if unknown:
        raise ValueError(
            f"cannot record {sorted(unknown)}, expected some of: {', '.join(RECORDABLE)}"
        )
    if options.stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer: pass tokenizer=")


def prefill(model: Llava, spliced: Spliced, cache: KVCache, **wanted: bool) -> LanguageOutput:
    """All positions of the prompt at once, after those in the cache; logits of the last only,
    [B,1,V]. wanted: hidden_states, attentions."""
    return model.language_model(
        spliced.embeds, spliced.attention_mask, cache, last_only=True, **wanted
    )


def decode(model: Llava, token_ids: Tensor, cache: KVCache, **wanted: bool) -> LanguageOutput:
    """One new position per row; everything before it is read from the cache. token_ids [B] ->
    logits [B,1,V]"""
    return model.language_model(token_ids[:, None], None, cache, **wanted)


NOTHING_LEFT = (
    "no token is left to choose: contrast's cut, no_repeat_ngram_size, min_new_tokens, process and "
    "the filters together remove all; loosen one of them"
)

NOT_FINITE = (
    "the logits are not finite: damaged weights or a dtype too narrow; try float32 (a command: "
    "--dtype float32)"
)


def check_scores(found: Tensor, given: Tensor) -> Tensor:
    """What `process` made of the given scores [B, V]. Raises ValueError for what cannot be chosen
    from."""
    expected = f"{list(given.shape)} {str(given.dtype).removeprefix('torch.')} on {given.device}"
    if not isinstance(found, Tensor):
        raise ValueError(f"process returned {type(found).__name__}, expected a tensor {expected}")
    if (found.shape, found.dtype, found.device) != (given.shape, given.dtype, given.device):
        shape, dtype = list(found.shape), str(found.dtype).removeprefix("torch.")
        raise ValueError(
            f"process returned a tensor {shape} {dtype} on {found.device}, expected {expected}"
        )
    if not (found < math.inf).all():  # nor is NaN
        raise ValueError(
            "process returned NaN or +inf, expected finite scores, and -inf for a token to remove"
        )
    return found


def wide_logits(output: LanguageOutput) -> Tensor:
    """Those of the last position, [B, V] in float32 or better."""
    # What follows divides, exponentiates and sums over the whole vocabulary; in half precision it
    # would round tokens into ties that the model did not mean. transformers copies to float32 at
    # the same place.
    return output.logits[:, -1].to(torch.promote_types(output.logits.dtype, torch.float32))


def last_logits(output: LanguageOutput) -> Tensor:
    """`wide_logits`. Raises ValueError where they are no numbers."""
    logits = wide_logits(output)
    if not logits.isfinite().all():
        raise ValueError(NOT_FINITE)
    return logits


def room_for_answer(model: Llava, spliced: Spliced, before: int = 0) -> int:
    """How many tokens the context has left after `before` positions read earlier and the prompt.
    Raises ValueError with the numbers when they fill it."""
    length = before + spliced.embeds.shape[1]
    return _room(model, length, max(map(len, spliced.image_spans)))


def check_room(model: Llava, input_ids: Tensor | Sequence[Sequence[int]]) -> None:
    """Raises ValueError as `room_for_answer`, but before a word is looked up or a picture encoded:
    for a prompt of megabytes that takes gigabytes. input_ids: rows, with -200 for each picture."""
    for ids in as_rows("input_ids", input_ids, "cpu"):
        pictures = int((ids == IMAGE_TOKEN_INDEX).sum())
        _room(model, len(ids) + pictures * (model.config.tokens_per_image - 1), pictures)


def _room(model: Llava, length: int, pictures: int) -> int:
    """What the context has left after `length` positions."""
    context, each = model.config.text.context, model.config.tokens_per_image
    if length >= context:
        raise ValueError(
            f"the prompt takes {length} positions ({pictures} picture(s) of {each} each), the "
            f"model's context holds {context} with the answer; shorten the prompt or give fewer "
            "pictures"
        )
    return context - length


class Chooser:
    """From logits to tokens, by the options: the ids so far and the random numbers are its only
    state.

    history: [B, S] the ids of prompt and answer, a picture as one image id per patch, -1 where a
    row is padding.
    """

    def __init__(
        self,
        model: Llava,
        input_ids: Sequence[Tensor],
        options: Options,
        keep: int = 1,
        process: Process | None = None,
    ):
        """input_ids: per row, the prompt with its -200. keep: how many tokens the filters leave at
        least. process: is given the scores after the penalties and returns others, -inf for a token
        that must not be chosen."""
        if process is not None and not callable(process):
            raise ValueError(f"process is {process!r}, expected f(scores, history) -> scores")
        self.options, self.keep, self.custom = options, keep, process
        device = input_ids[0].device
        seeds = options.seed if isinstance(options.seed, tuple) else (options.seed,)
        if not seeds or len(input_ids) % len(seeds):
            raise ValueError(
                f"{len(seeds)} seeds for {len(input_ids)} rows, expected one seed, or one per "
                "prompt"
            )
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        config, rows = model.config, []
        self.pad_token_id = config.pad_token_id
        for ids in input_ids:
            # In transformers a picture is ordinary ids of the prompt, so it is penalised as well.
            is_image = ids == IMAGE_TOKEN_INDEX
            repeats = torch.where(is_image, config.tokens_per_image, 1)
            rows.append(ids.masked_fill(is_image, config.image_token_id).repeat_interleave(repeats))
        self.prompt_length = max(map(len, rows))
        self.history = torch.stack(
            [F.pad(row, (self.prompt_length - len(row), 0), value=-1) for row in rows]
        )
        ends = [i for i in config.eos_token_ids if i < config.text.vocab_size]
        self.end_ids = torch.tensor(ends, dtype=torch.long, device=device)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, V] float32 -> token ids [B], the scores [B, V] they were chosen from, and bool [B]:
        rows of which nothing is left to choose, and any token is chosen."""
        scores = self.process(logits)
        empty = ~(scores > sampling.REMOVED).any(-1)  # [B]
        scores = scores.masked_fill(empty[:, None], 0)
        token_ids = (
            scores.argmax(-1) if self.options.temperature == 0 else self.draw(scores, 1)[:, 0]
        )
        return token_ids, scores, empty

    def process(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities [B, V] -> the scores to choose from, in the order of
        transformers."""
        o, scores = self.options, logits
        if o.repetition_penalty is not None:
            scores = sampling.repetition_penalty(
                scores, self._seen(scores.shape[1]), o.repetition_penalty
            )
        if o.no_repeat_ngram_size:
            scores = sampling.no_repeat_ngram(scores, self.history, o.no_repeat_ngram_size)
        if self.history.shape[1] - self.prompt_length < o.min_new_tokens:
            scores = scores.index_fill(1, self.end_ids, sampling.REMOVED)
        if self.custom is not None:
            scores = check_scores(self.custom(scores.clone(), self.history.clone()), scores)
        if o.temperature == 0:
            return scores
        if o.temperature != 1:
            scores = sampling.temperature(scores, o.temperature)
        if o.top_k:
            scores = sampling.top_k(scores, max(o.top_k, self.keep))
        if o.top_p is not None and o.top_p < 1:
            scores = sampling.top_p(scores, o.top_p, self.keep)
        if o.min_p:
            scores = sampling.min_p(scores, o.min_p, self.keep)
        if o.typical_p is not None and o.typical_p < 1:
            scores = sampling.typical_p(scores, o.typical_p, self.keep)
        return scores

    def draw(self, scores: Tensor, count: int) -> Tensor:
        """`count` different choices per row, at random: [B, V] -> [B, count]."""
        # [B / seeds, V] each
        shares = zip(scores.chunk(len(self.generators)), self.generators, strict=True)
        return torch.cat([sampling.draw(rows, generator, count) for rows, generator in shares])

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
        return seen.scatter_(1, known, True)[:, :-1]  # the last column took what is no token


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
