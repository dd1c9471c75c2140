"""The decoding step with shapes that never change, so that it can be compiled once and then
replayed: `--compile`. A reader may skip this file.

The step in llama.py reads a cache that is one position longer each time. The step in this file
reads the whole cache, and a mask hides the positions that are not filled yet; the position of the
new token is a number on the device. On a GPU torch.compile then records its few hundred kernels as
one CUDA graph, which starts at once instead of kernel by kernel.

B batch, S capacity of the cache, C width, K key/value heads, D head width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.config import TextConfig
from minillava.fast.ahead import choose_decoder, decode_ahead
from minillava.fast.packed import is_packed
from minillava.files.disk import one_line
from minillava.llama import Context, LanguageModel, LanguageOutput, rotary_tables
from minillava.llava import Llava
from minillava.loop import Decoder

CAPACITY_STEP = 512  # a cache's capacity is a multiple: each other capacity is compiled anew

RECOMPILE_LIMIT = 64  # for so many capacities and numbers of rows; torch's own limit is 8


def compile_decode(model: Llava) -> None:
    """Let the loop decode by `CapturedDecode`. Compiling happens at an answer's second token, the
    first that is decoded, and takes from seconds to a minute. Raises ValueError for packed
    weights, of which a compiler knows nothing."""
    if is_packed(model):
        raise ValueError("a compiled step cannot read packed weights; leave pack out")
    on_gpu = model.language_model.embed_tokens.weight.is_cuda
    # The limit is that of the whole process: whoever else compiles gets it, too, so it is only ever
    # raised. The name is torch's before 2.7, which later versions still know, for recompile_limit.
    torch._dynamo.config.cache_size_limit = max(
        RECOMPILE_LIMIT, torch._dynamo.config.cache_size_limit
    )
    compiled = torch.compile(
        partial(step, model.language_model),
        mode="reduce-overhead" if on_gpu else "default",
        fullgraph=True,
        dynamic=False,
    )
    model.decoding = Captured(compiled)


class Captured:
    """`decode_ahead` with a compiled step, and the memory of the caches with which it was
    recorded."""

    def __init__(self, decode_step: Callable):
        """decode_step: `step`, compiled or not, for one model."""
        self.decode_step, self.memory = decode_step, []

    @contextmanager
    def __call__(
        self,
        model: Llava,
        like: Tensor,
        capacity: int,
        cache: KVCache | None,
        wanted: dict[str, bool],
    ) -> Iterator[Decoder]:
        """Arguments as for `decode_in_turn`; what is recorded comes from the plain step."""
        if any(wanted.values()):
            opened = decode_ahead(model, like, capacity, cache, wanted)
        elif cache is None:
            opened = self.spare_cache(model.config.text, len(like), capacity, like)
        else:
            opened = nullcontext(cache)
        with opened as found:
            if isinstance(found, KVCache):
                found = choose_decoder(CapturedDecode(self.decode_step, found), found, like.device)
            yield found

    @contextmanager
    def spare_cache(
        self, text: TextConfig, rows: int, capacity: int, like: Tensor
    ) -> Iterator[KVCache]:
        """An empty cache of at least this capacity, in memory that is kept for the next cache.

        Caches of all shapes begin at the same addresses: for another address the graph would be
        recorded anew, and torch forgets no recording. As much memory is kept as the largest of them
        took. like: gives dtype and device."""
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        cache = KVCache(text, rows, capacity, dtype=like.dtype, device="meta")  # the shapes
        size, kind = cache.keys[0].numel(), {"dtype": like.dtype, "device": like.device}
        memory, self.memory = self.memory, []
        fits = memory and (memory[0].dtype, memory[0].device) == (like.dtype, like.device)
        if not fits or len(memory[0]) < size:
            memory.clear()  # before there is more
            # memory allocated in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                memory = [torch.empty(size, **kind) for _ in (*cache.keys, *cache.values)]
        tensors = [beginning(each, cache.keys[0].shape) for each in memory]
        layers = text.num_hidden_layers
        cache.keys, cache.values = tensors[:layers], tensors[layers:]
        try:
            yield cache
        finally:
            # Also if a caller stopped early: the GPU finishes its work on this memory before the
            # work of the next answer.
            self.memory = self.memory or memory  # of two at once, the first to end


def beginning(memory: Tensor, shape: torch.Size) -> Tensor:
    """The first numbers of `memory` as a tensor that is not a view: a compiler would see a view's
    base."""
    with torch.inference_mode(False):
        return memory.new_empty(0).set_(memory.untyped_storage(), 0, shape)


class CapturedDecode:
    """`decode`, one new position per row after the cached positions; the sums are added up in
    another order."""

    def __init__(self, decode_step: Callable, cache: KVCache):
        """decode_step: `step`, compiled or not, for one model."""
        self.decode_step, self.cache, self.cleared = decode_step, cache, None

    def __call__(self, token_ids: Tensor) -> LanguageOutput:
        """token ids [B] -> logits [B, 1, V]. Raises ValueError if nothing can be compiled on this
        machine, or if the cache is full."""
        cache = self.cache
        cache.reserve(len(token_ids), 1, None)
        if self.cleared is not cache.keys[0]:  # new, or grown meanwhile
            self._clear()
        try:
            logits = self.decode_step(
                token_ids[:, None], self.position, cache.padding_mask, cache.keys, cache.values
            )
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = one_line(error)[:200]
                raise ValueError(
                    f"torch.compile does not work here ({reason}); leave --compile out"
                ) from error
            raise
        self.position += 1
        cache.advance(1)
        # a replay writes to the same memory as the one before
        return LanguageOutput(logits.clone())

    def _clear(self) -> None:
        # The mask makes the weight of an unfilled position zero, but zero times the old content of
        # that memory may be NaN.
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor[:, :, self.cache.length :] = 0
            if tensor.is_cuda:
                # Otherwise the graph would copy the cache at every step. Without the guard, another
                # cache of this shape is recorded again but not compiled again, and the compiled
                # code does not keep its memory alive.
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.cleared = self.cache.keys[0]
        # filled on the device, since copying a number to it would make the processor wait
        self.position = torch.full((1,), self.cache.length, device=self.cleared.device)


def step(
    model: LanguageModel,
    token_ids: Tensor,
    position: Tensor,
    real: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """`LanguageModel.forward` for one new token per row and a cache that is written in place.

    token_ids [B, 1]; position [1], that of the new tokens; real bool [B, S], False for padding, or
    None; keys and values per layer [B, K, S, D] -> logits [B, 1, V].
    """
    x = model.embed_tokens(token_ids)  # [B, 1, C]
    mask = torch.arange(keys[0].shape[2], device=x.device) <= position  # [S]
    if real is None:
        positions, mask = position[None], mask[None]  # [1, 1], [1, S]
    else:
        mask = mask & real  # [B, S]
        positions = mask.sum(-1, keepdim=True) - 1  # [B, 1], counting real tokens only
    tables, cache = rotary_tables(positions, model.config, x.dtype), InPlace(position, keys, values)
    context = Context(*tables, mask[:, None, None], False, model.attend, cache)
    for layer in model.layers:
        x, _ = layer(x, context)
    return model.head(model.norm(x))


class InPlace:
    """The cache as a layer sees it: the new position is written in place."""

    def __init__(self, position: Tensor, keys: list[Tensor], values: list[Tensor]):
        self.position, self.keys, self.values = position, keys, values

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, K, 1, D] at the position; return all [B, K, S, D]."""
        return self.keys[layer].index_copy_(2, self.position, k), self.values[layer].index_copy_(
            2, self.position, v
        )
