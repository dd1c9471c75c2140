"""The generation loop: prefill once, then one token per step.

What is left of `steps` for one prompt, the most likely tokens and nobody who watches:

    def plain(model, spliced, cache, most):
        output = prefill(model, spliced, cache)
        for left in reversed(range(most)):
            token = output.logits[:, -1].argmax(-1)  # [1]
            if int(token) in model.config.eos_token_ids:
                return
            yield int(token)
            if left:  # the last token is chosen but never fed back: the cache has no room for it
                output = decode(model, token, cache)

Everything else is for more rows, other choices, text and records (`Run`, in streaming.py), and for
a GPU that must not wait (`Decoder`). B batch, T prompt positions after the splice, C width, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import LanguageOutput
from minillava.llava import Llava, Spliced
from minillava.options import Options
from minillava.sampling import Process
from minillava.streaming import Run, Step
from minillava.tokenizer import Tokenizer


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

    contrast: f(logits, other, step) -> [B, V], of the logits of two rows; `spliced` then holds 2 B
    rows, B that answer and B that read along and see something else. process: changes scores before
    temperature and filters (see Sampler). cache: what was read before this prompt, which goes on
    from there; it needs room for prompt and answer. Everything needed to go on lives in local
    variables, so any number of loops can share one model. Raises ValueError as `generate`.
    """
    if options.num_beams > 1:
        message = f"num_beams is {options.num_beams}: beams go through generate() or beam.search()"
        raise ValueError(f"{message}, and without contrast")
    run = Run(model, spliced, options, tokenizer, record, contrast, process, cache)
    decoding = model.decoding or decode_in_turn
    with decoding(model, spliced.embeds, run.capacity, cache, run.wanted) as decoder:
        output = prefill(model, spliced, decoder.cache, **run.wanted)
        while True:
            step, told = run.choose(output)
            last = run.sampler.chosen == run.most
            decoder.begin(step.token_ids.repeat(run.rows_per_answer), told, last)
            run.tell(step, decoder.read())  # a GPU may go on meanwhile
            finished = all(step.finish_reason)
            if finished:
                decoder.drop()
            yield step
            if finished:
                return
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
    """The decoder of one answer, the plain one; `load` sets fast.ahead.decode_ahead, which gives
    the same answers. like [B,T,C]: shows rows, dtype and device of its cache, if none is given;
    wanted: what `decode` records."""
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
