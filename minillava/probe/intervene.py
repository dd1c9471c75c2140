"""Interventions: what the language model computes at some place is replaced, for the time of a
`with`.

    with intervene(model, Heads([3], heads=[0, 5]), zero):
        ...  # any forward pass: two heads of layer 3 say nothing

A place is named by layers and by positions of the whole sequence, counted from 0: after the splice,
and the same with a cache. Each place says which tensor it is; a function gets what was computed
there and returns what goes on instead.

B rows, n chosen positions, T positions of a pass, S with those in the cache, C width, H heads,
h chosen heads, D head width, L layers.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillava.cli.hooks import Hooks
from minillava.fast.compiled import Captured
from minillava.llama import Context, LanguageModel
from minillava.llava import Llava
from minillava.options import dtype_name

Positions = Collection[int] | slice | None
"""Of the sequence, from 0; None: all of them."""


@dataclass(frozen=True)
class States:
    """What goes from layer to layer, [B, n, C]: state 0 goes into the first layer, state l into
    layer l, state L into the last norm."""

    layers: Collection[int]
    positions: Positions = None


@dataclass(frozen=True)
class Heads:
    """What heads have read, before o_proj adds it up: [B, n, h, D]. heads: None for all."""

    layers: Collection[int]
    heads: Sequence[int] | None = None
    positions: Positions = None


@dataclass(frozen=True)
class MLPs:
    """What feed-forward layers add to the state, [B, n, C]."""

    layers: Collection[int]
    positions: Positions = None


@dataclass(frozen=True)
class Attention:
    """Which positions (queries) may attend to which (keys): bool [B or 1, 1, queries, keys]. With
    `zero`, none of these queries attends to any of these keys."""

    layers: Collection[int]
    queries: Positions = None
    keys: Positions = None


Where = States | Heads | MLPs | Attention


class At(NamedTuple):
    """Where a value stands: a layer, the chosen positions of this pass (of attention: the queries),
    and the heads or, of attention, the keys."""

    layer: int
    positions: list[int]
    others: list[int]


How = Callable[[Tensor, At], Tensor]
"""What was computed, and where -> what goes on instead: a tensor of that shape, or the same one to
change nothing."""


def zero(values: Tensor, at: At) -> Tensor:
    """Nothing: zeros, or in a mask False."""
    return torch.zeros_like(values)


def put(stored: Mapping[int, Tensor] | Sequence[Tensor]) -> How:
    """What was stored of each layer: states or the like [B or 1, T, ...] of all positions, or
    [..., 1, ...], the same for all of them; of heads all H."""

    def take(values: Tensor, at: At) -> Tensor:
        found = stored[at.layer]
        found = found if found.shape[1] == 1 else found[:, at.positions]
        found = found[:, :, at.others] if found.dim() == 4 else found
        return found.to(values).expand_as(values)

    return take


class Keep(dict[int, Tensor]):
    """Changes nothing, and keeps what was computed: layer -> [B, T, ...], pass after pass."""

    def __call__(self, values: Tensor, at: At) -> Tensor:
        before = [self[at.layer]] if at.layer in self else []
        self[at.layer] = torch.cat([*before, values], dim=1)
        return values


@contextmanager
def intervene(
    model: Llava | LanguageModel, where: Where | Sequence[Where], how: How
) -> Iterator[None]:
    """Inside, `how` replaces what this thread's forward passes compute at these places.

    Interventions within each other add up: at one place, the outer acts first. Where nothing is
    chosen, every bit stays as it was. On any exit the model is as before. Raises ValueError for a
    layer, head or position that cannot be, and for a model whose decoding is compiled.
    """
    if isinstance(model, Llava) and isinstance(model.decoding, Captured):
        raise ValueError("a compiled step calls no hooks; load the model without compile")
    language = model.language_model if isinstance(model, Llava) else model
    with Hooks() as hooks:
        for place in [where] if isinstance(where, Where) else where:
            _check(language, place)
            for layer in place.layers:
                _Layer(language, place, layer, how).install(hooks)
        yield


def _check(language: LanguageModel, place: Where) -> None:
    count = len(language.layers)
    last = count if isinstance(place, States) else count - 1
    for layer in place.layers:
        if not 0 <= layer <= last:
            kind = "state" if isinstance(place, States) else "layer"
            raise ValueError(f"no {kind} {layer}: this model has {kind}s 0 to {last}")
    heads = language.config.num_attention_heads
    for head in (place.heads or ()) if isinstance(place, Heads) else ():
        if not 0 <= head < heads:
            raise ValueError(f"no head {head}: this model has heads 0 to {heads - 1}")
    for name in ("positions", "queries", "keys"):
        chosen = vars(place).get(name)
        if chosen is not None and not isinstance(chosen, slice) and min(chosen, default=0) < 0:
            raise ValueError(f"{name} count from 0, found {min(chosen)}")


class _Layer:
    """One layer of a place, as its hooks act."""

    def __init__(self, language: LanguageModel, place: Where, layer: int, how: How):
        self.place, self.layer, self.how = place, layer, how
        config = language.config
        self.heads, self.head_dim = list(range(config.num_attention_heads)), config.head_dim
        if isinstance(place, Heads) and place.heads is not None:
            self.heads = list(place.heads)
        # state l is what the layer before it returns, so that recorded states show the change
        is_state = isinstance(place, States) and layer > 0
        self.block: Any = language.layers[layer - 1 if is_state else layer]
        self.start = 0  # how many positions were read before this pass

    def install(self, hooks: Hooks) -> None:
        hooks.before(self.block, self.note_start)
        if isinstance(self.place, Attention):
            hooks.attention(self.block.self_attn, self.change_mask)
        elif isinstance(self.place, Heads):
            hooks.before(self.block.self_attn.o_proj, lambda _, given: first(given, self.change))
        elif isinstance(self.place, MLPs):
            hooks.after(self.block.mlp, lambda _, given, output: self.change(output))
        elif self.layer == 0:
            hooks.before(self.block, lambda _, given: first(given, self.change))
        else:
            hooks.after(self.block, lambda _, given, output: first(output, self.change))

    def note_start(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """The parts of a layer are not told where their positions stand."""
        _, context = given
        self.start = 0 if context.cache is None else context.cache.length

    def change(self, x: Tensor) -> Tensor | None:
        """x [B, T, C] or, of heads, [B, T, H·D] -> the same changed, or None."""
        assert not isinstance(self.place, Attention)
        positions = chosen(self.place.positions, self.start, self.start + x.shape[1])
        rows = torch.tensor([i - self.start for i in positions], dtype=torch.long, device=x.device)
        if not isinstance(self.place, Heads):
            return self.replace(x, (slice(None), rows), At(self.layer, positions, []))
        x = x.unflatten(-1, (-1, self.head_dim))  # [B, T, H, D]
        heads = torch.tensor(self.heads, dtype=torch.long, device=x.device)
        index = (slice(None), rows[:, None], heads)
        changed = self.replace(x, index, At(self.layer, positions, self.heads))
        return None if changed is None else changed.flatten(2)

    def change_mask(self, context: Context) -> Context | None:
        """Which queries of this pass may attend to which keys, written out and changed."""
        assert isinstance(self.place, Attention)
        length, device = context.cos.shape[2], context.cos.device
        end = self.start + length
        queries = chosen(self.place.queries, self.start, end)
        keys = chosen(self.place.keys, 0, end)
        mask = context.mask
        if mask is None:  # the triangle that the attention functions would draw
            every = torch.arange(end, device=device)
            mask = (every <= every[self.start :, None])[None, None]  # [1, 1, T, S]
        rows = torch.tensor([i - self.start for i in queries], dtype=torch.long, device=device)
        columns = torch.tensor(keys, dtype=torch.long, device=device)
        index = (slice(None), slice(None), rows[:, None], columns)
        changed = self.replace(mask, index, At(self.layer, queries, keys))
        if changed is None:
            return None
        if not changed.any(-1).all():
            raise ValueError("a position has nothing left to attend to; leave each query one key")
        return context._replace(mask=changed, causal=False)

    def replace(self, x: Tensor, index: tuple[Any, ...], at: At) -> Tensor | None:
        """x with other values at the index, or None if they are the same ones. Raises ValueError if
        `how` returns something that does not fit."""
        values = x[index]
        if values.numel() == 0:
            return None
        new = self.how(values, at)
        if new is values:
            return None
        if (new.shape, new.dtype) != (values.shape, values.dtype):
            found, expected = (f"{list(t.shape)} {dtype_name(t.dtype)}" for t in (new, values))
            raise ValueError(f"how returned {found} at layer {at.layer}, expected {expected}")
        changed = x.clone()
        changed[index] = new
        return changed


def first(given: tuple[Any, ...], change: Callable[[Tensor], Tensor | None]) -> Any:
    """Arguments or outputs of a module with the first of them changed; None if it is not."""
    changed = change(given[0])
    return None if changed is None else (changed, *given[1:])


def chosen(positions: Positions, start: int, end: int) -> list[int]:
    """Those of the positions that lie in start..end, in order."""
    if positions is None:
        return list(range(start, end))
    if isinstance(positions, slice):
        return [i for i in range(*positions.indices(end)) if i >= start]
    return sorted(i for i in set(positions) if start <= i < end)


class _Callable(ModuleType):
    """Python makes a file that was imported an attribute of its folder, so `minillava.probe.
    intervene` becomes this module instead of its function. So it can be called like it."""

    def __call__(self, model: Llava | LanguageModel, where: Where | Sequence[Where], how: How):  # type: ignore[no-untyped-def]
        return intervene(model, where, how)


sys.modules[__name__].__class__ = _Callable
