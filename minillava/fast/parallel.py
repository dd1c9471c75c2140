"""One model over several processes, each with a part of the language model's weights: tensor
parallelism (Shoeybi et al. 2019), started by torchrun.

Every process has some of the heads and some columns of the feed-forward layers; what leaves an
attention or a feed-forward layer is the sum over all of them. Rank 0 is the whole program: it sees
the picture, embeds, chooses tokens and talks. The others follow: they wait for what rank 0 passes
to the language model, pass it through their own part, and keep their part of every cache. So
`generate`, `chat`, `batch` and `serve` work as in one process. Of the files in the reading order,
only assistant.py knows this one.

B rows, T new positions, S cached and new ones, C width, H heads, V vocabulary.
"""

import os
import pickle
import re
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillava.cache import KVCache
from minillava.config import TextConfig
from minillava.fast.quantize import GROUP, TILE, kind_for, quantize_tensor
from minillava.llama import LanguageModel, LanguageOutput

ROWS = re.compile(r"language_model\.layers\.\d+\.(self_attn\.[qkv]|mlp\.(gate|up))_proj\.\w+")
COLUMNS = re.compile(r"language_model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj\.weight")
HEAD = "language_model.lm_head.weight"
"""Weights [N, K] of which a process has some rows, some columns, or, of the head, some tokens."""

FOREVER = timedelta(days=30)  # until a person at a chat types the next question

SMALL = 1 << 18
"""Numbers in a sum that gloo's processes send whole to one another; longer ones they add in parts,
of which less is sent where there are more than two."""


class OthersEnded(ValueError):
    """The error for a process that is gone. It is about no question, so nobody goes on."""

    final = True

    def __init__(self):
        super().__init__(
            "another of the processes has ended, and with it a part of the weights; start again"
        )


@dataclass(frozen=True)
class Share:
    """Which part of the weights is this process's: number `rank` of `count`."""

    rank: int
    count: int

    def config(self, text: TextConfig) -> TextConfig:
        """The numbers of this process's part. Raises ValueError if they cannot be divided."""
        numbers = {
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "intermediate_size": text.intermediate_size,
        }
        for name, number in numbers.items():
            if number % self.count:
                raise ValueError(
                    f"{name} is {number}, which {self.count} processes cannot divide evenly; start "
                    "another number of processes"
                )
        each = {name: number // self.count for name, number in numbers.items()}
        return replace(text, head_dim=text.head_dim, **each)

    def bounds(self, size: int, unit: int = 1) -> tuple[int, int]:
        """This process's part of so many rows: (first, one after the last), multiples of `unit`
        as far as `size` is one. The first ranks have one unit more than the last."""
        unit = unit if size % unit == 0 else 1
        each, rest = divmod(size // unit, self.count)
        first = self.rank * each + min(self.rank, rest)
        return first * unit, (first + each + (self.rank < rest)) * unit

    def copies(self, name: str) -> bool:
        """Whether this process's part of a tensor is a copy, so that the whole is read in vain."""
        return self.count > 1 and COLUMNS.fullmatch(name) is not None

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of a weight or a bias; of rows a view, of columns a copy."""
        part = self._part(name, tensor.shape)
        if part is None:
            return tensor
        return tensor[part] if len(part) == 1 else tensor[part].contiguous()

    def cut_parts(self, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """`cut` for a weight that is quantised (fast/quantize.py), int4 in the order stored for
        every processor or, if its rows are divided, in a processor's own. Raises ValueError for
        parts that int4 cannot take."""
        (kind, whole), (scales, others) = parts.items()
        int4 = kind != "weight_int8"
        part = self._part(name, (len(whole), whole.shape[1] * (2 if int4 else 1)), int4)
        if part is None:
            return parts
        if len(part) == 1:
            return {kind: whole[part], scales: others[part]}
        if not int4:
            return {kind: whole[part].contiguous(), scales: others}
        pairs, groups = (slice(part[1].start // n, part[1].stop // n) for n in (2, GROUP))
        return {kind: whole[:, pairs].contiguous(), scales: others[:, groups].contiguous()}

    def quantised(self, name: str, whole: Tensor, kind: str) -> dict[str, Tensor]:
        """This process's part of a weight that becomes quantised. It is cut before that, except for
        the columns of int8, where a scale belongs to a whole row. Raises ValueError for parts that
        int4 cannot take."""
        kind = kind_for(whole.shape, kind)
        part = self._part(name, whole.shape, kind == "int4")
        if kind == "int8" and part is not None and len(part) == 2:
            return self.cut_parts(name, quantize_tensor(whole, kind))
        return quantize_tensor(self.cut(name, whole), kind)

    def _part(
        self, name: str, shape: Sequence[int], int4: bool = False
    ) -> tuple[slice] | tuple[slice, slice] | None:
        """Where this process's part of a tensor is: (rows,) or (all rows, columns); None if it is
        not divided. Raises ValueError for parts that int4 cannot take."""
        rows = name == HEAD or ROWS.fullmatch(name) is not None
        if self.count == 1 or not (rows or COLUMNS.fullmatch(name)):
            return None
        size, step, what = (shape[0], TILE, "rows") if rows else (shape[1], GROUP, "columns")
        first, end = self.bounds(size, TILE if name == HEAD else 1)
        if int4 and (first % step or end % step):
            raise ValueError(
                f"{name}: its {size} {what} cannot be divided among {self.count} processes for "
                f"int4, which needs multiples of {step} for each; use int8"
            )
        return (slice(first, end),) if rows else (slice(None), slice(first, end))

    def has(self, name: str) -> bool:
        """Whether this process has any of a tensor: pictures and words are rank 0's alone."""
        apart = ("vision_tower.", "projector.", "language_model.embed_tokens.")
        return self.rank == 0 or not name.startswith(apart)


WHOLE = Share(0, 1)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join(device: str, parallel: bool) -> tuple[Share, str]:
    """Join the other processes, if the model is parallel; returns the share of this one, and its
    device. Raises ValueError if torchrun did not start it, and in all processes if only some of
    them have a GPU, since those would wait for the others."""
    if not parallel:
        return WHOLE, device
    if not launched():
        how = "torchrun --nproc-per-node 2 -m minillava.generate ..."
        raise ValueError(f"a model in parts needs several processes; start them with: {how}")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=FOREVER)
    share = Share(dist.get_rank(), dist.get_world_size())
    on_gpu = device.startswith("cuda")
    if len({*gathered(on_gpu, share)}) > 1:
        raise ValueError(
            "some of the processes have a GPU and some have none; start them where each has one, "
            "or add --device cpu"
        )
    return share, own_gpu(share) if on_gpu else device


def gathered(own: Any, share: Share) -> list[Any]:
    """What all processes say, by rank. Raises OthersEnded if one of them has."""
    told: list[Any] = [None] * share.count
    try:
        dist.all_gather_object(told, own)
    except RuntimeError as error:
        raise OthersEnded from error
    return told


def own_gpu(share: Share) -> str:
    """This process's GPU, which becomes the current one. Raises ValueError in all processes if one
    of them has none of its own, with which NCCL would fail or wait."""
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    known = str(torch.cuda.get_device_properties(local).uuid) if local < count else ""
    told = gathered((socket.gethostname(), local, count, known), share)
    others: dict[str, int] = {}
    for number, (host, wanted, there, gpu) in enumerate(told):
        if not gpu:
            raise ValueError(
                f"process {number} of {share.count} is to have GPU {wanted} of {host}, which has "
                f"{there}, counted from 0; start as many processes as there are GPUs, or add "
                "--device cpu"
            )
        if gpu in others:
            raise ValueError(
                f"processes {others[gpu]} and {number} of {share.count} have the same GPU of "
                f"{host}; each needs one of its own"
            )
        others[gpu] = number
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def together(share: Share, build: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What `build` makes of its arguments and this `share`, in every process; if it fails in any,
    all of them raise ValueError, with what that one said."""
    if share == WHOLE:
        return build(*given, share=share, **options)
    result, failed = None, None
    try:
        result = build(*given, share=share, **options)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        failed = error
    told = gathered(None if failed is None else str(failed), share)
    if failed is not None:
        raise failed
    for number, message in enumerate(told):
        if message is not None:
            raise ValueError(f"process {number} of {share.count}: {message}")
    return result


# --- layers ---------------------------------------------------------------------------------------


class Summed(nn.Module):
    """A layer whose output is the sum over the processes, since each has some of its columns. In
    float32 or better, since a sum of rounded parts would be rounded twice."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, K / processes] -> [B, T, C]"""
        out = self.inner(x)
        wide = out.to(torch.promote_types(out.dtype, torch.float32)).contiguous()
        if wide.is_cuda or wide.numel() > SMALL:
            dist.all_reduce(wide)
            return wide.to(out.dtype)
        # gloo's all-reduce takes more turns of its threads, which wait for one another's cores
        parts = [torch.empty_like(wide) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, wide)
        return sum(parts[1:], parts[0]).to(out.dtype)  # in one order, so alike everywhere


class Gathered(nn.Module):
    """The head, of which each process has some tokens: rank 0 gets all logits, the others their
    own."""

    def __init__(self, inner: nn.Module, vocabulary: int, share: Share):
        super().__init__()
        self.inner, self.vocabulary, self.share = inner, vocabulary, share

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, V]"""
        own = self.inner(x)
        sizes = [
            end - first
            for first, end in (
                replace(self.share, rank=i).bounds(self.vocabulary, TILE)
                for i in range(self.share.count)
            )
        ]
        most = max(sizes)  # a gather wants the same shape of all
        padded = nn.functional.pad(own, (0, most - own.shape[-1])).contiguous()
        if self.share.rank:
            dist.gather(padded)
            return own
        found = [torch.empty_like(padded) for _ in sizes]
        dist.gather(padded, found)
        return torch.cat([each[..., :size] for each, size in zip(found, sizes, strict=True)], -1)


# --- rank 0, and those who follow -----------------------------------------------------------------


class Seen(NamedTuple):
    """A cache as a pass finds it."""

    key: int
    rows: int
    capacity: int
    length: int


class Pass(NamedTuple):
    """What rank 0 tells the others before a pass. inputs: shape and dtype of the embeddings that
    follow; arguments: those after them and after the caches. freed: caches that are gone."""

    function: Callable[..., Any]
    caches: Seen | list[Seen] | None
    inputs: tuple[torch.Size, torch.dtype]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    freed: list[int]


class Change(NamedTuple):
    """A method of a cache that moves what is in it, to be called everywhere. A Seen among its
    arguments stands for a cache."""

    cache: Seen
    method: str
    arguments: tuple[Any, ...]


class SharedCache(KVCache):
    """Rank 0's part of a cache, which the others have a part of, too. What only counts (truncate,
    advance) and what makes room need no word: a pass tells length and capacity."""

    key: int
    owner: "SharedLanguageModel"

    def select_rows(self, rows: Tensor) -> None:
        with to_its_end():
            tell(Change(self.seen(), "select_rows", (rows.cpu(),)))
            super().select_rows(rows)

    def keep(self, positions: list[int]) -> None:
        with to_its_end():
            tell(Change(self.seen(), "keep", (positions,)))
            super().keep(positions)

    def copy_to(self, other: KVCache, length: int) -> None:
        with to_its_end():
            tell(Change(self.seen(), "copy_to", (self.owner.see(other), length)))
            super().copy_to(other, length)

    def seen(self) -> Seen:
        return Seen(self.key, len(self.keys[0]), self.capacity, self.length)


class SharedLanguageModel(LanguageModel):
    """Rank 0's part of a language model, of which the others have a part, too."""

    share: Share
    keys: "count[int]"
    freed: list[int]
    lock: threading.RLock
    passing: bool  # whether all of them compute; those who follow do nothing else
    lost: bool  # whether a pass was left in its middle

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
        **options: Any,
    ) -> LanguageOutput:
        """As LanguageModel's, by all processes. Raises ValueError for an `attend` that cannot be
        sent: it has to be a function of a module, or a `partial` of one."""
        x = inputs if inputs.is_floating_point() else self.embed_tokens(inputs)
        return self.run(forward, x, cache, padding_mask, **options)

    def run(  # type: ignore[override]
        self, function: Callable[..., Any], x: Tensor, caches: Any, *rest: Any, **options: Any
    ) -> Any:
        """function(model, x, caches, *rest) in all processes, each with its part of the model and
        of the caches: a cache, None, or a list."""
        with self.lock, to_its_end():
            many = isinstance(caches, list)
            seen = [
                None if each is None else self.see(each) for each in (caches if many else [caches])
            ]
            told, freed = moved((rest, options), "cpu"), list(self.freed)
            if self.lost:
                raise OthersEnded
            tell(Pass(function, seen if many else seen[0], (x.shape, x.dtype), *told, freed))
            del self.freed[: len(freed)]
            with self._pass():
                dist.broadcast(x.contiguous(), 0)
                return function(self, x, caches, *rest, **options)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """What fails in the middle of a pass leaves the others there: no further pass is begun.
        Only a ValueError comes from what all of them check at the same place."""
        self.passing = True
        try:
            yield
        except ValueError:
            raise
        except BaseException as error:
            self.lost = True
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise OthersEnded from error
            raise
        finally:
            self.passing = False

    def head(self, x: Tensor) -> Tensor:
        """As LanguageModel's, within a pass or, of what drafters make, after it."""
        if not self.passing:
            return self.run(head, x, None)
        # A tied head is the table of words, which rank 0 has whole.
        return super().head(x) if self.share.rank == 0 or hasattr(self, "lm_head") else x

    def see(self, cache: KVCache) -> Seen:
        if not isinstance(cache, SharedCache):
            self._adopt(cache)
        return cache.seen()  # type: ignore[attr-defined]

    def _adopt(self, cache: KVCache) -> None:
        """A cache that nobody has written to yet becomes this process's part of one."""
        if cache.length:
            raise ValueError("a cache that another model has filled cannot go on in several parts")
        heads = self.config.num_key_value_heads // self.share.count
        for tensors in (cache.keys, cache.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty(len(old), heads, *old.shape[2:])
        cache.__class__ = SharedCache
        key = next(self.keys)
        cache.key, cache.owner = key, self  # type: ignore[attr-defined]
        weakref.finalize(cache, self.freed_later, key).atexit = False

    def freed_later(self, key: int) -> None:
        """Remember that a cache is gone; the next pass tells it. It may be called at any moment, by
        whichever thread frees an object."""
        self.freed.append(key)


def share_model(language: LanguageModel, share: Share) -> None:
    """Let a language model that has only its part of the weights compute with the others."""
    if share == WHOLE:
        return
    text = language.config
    for block in language.layers:
        block.self_attn.o_proj = Summed(block.self_attn.o_proj)
        block.mlp.down_proj = Summed(block.mlp.down_proj)
    if not text.tie_word_embeddings:
        language.lm_head = Gathered(language.lm_head, text.vocab_size, share)
    # a head that is the table of words stays the product of the class that the model has
    kind = type(language)
    language.__class__ = type(kind.__name__, (SharedLanguageModel, kind), {})
    assert isinstance(language, SharedLanguageModel)
    language.share, language.keys, language.freed = share, count(), []
    language.lock, language.passing = threading.RLock(), share.rank > 0
    language.lost = False
    language.alike = 1  # products of a part were not compared


def gather_attentions(output: LanguageOutput, share: Share) -> LanguageOutput:
    """Each process has the attention weights of its heads; rank 0 gets those of all."""
    if output.attentions is None:
        return output
    whole = []
    for own in output.attentions:  # [B, H / processes, T, S]
        found = [torch.empty_like(own) for _ in range(share.count)] if share.rank == 0 else None
        dist.gather(own.contiguous(), found)
        whole.append(own if found is None else torch.cat(found, dim=1))
    return replace(output, attentions=tuple(whole))


@contextmanager
def to_its_end() -> Iterator[None]:
    """Ctrl-C takes effect only after what is inside, since a process that left the others in the
    middle of a pass could not go on with them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])


def tell(what: Pass | Change | None) -> None:
    """Send a message from rank 0 to the others. Raises OthersEnded if one of them has."""
    try:
        dist.broadcast_object_list([what])
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "what watches or changes attention is not for a model in several processes"
        ) from error
    except RuntimeError as error:
        raise OthersEnded from error


def moved(value: Any, device: torch.device | str) -> Any:
    """The same with its tensors on this device: a tensor, or tuples and dicts with tensors."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(each, device) for name, each in value.items()}
    return tuple(moved(each, device) for each in value) if type(value) is tuple else value


def end_followers() -> None:
    """Tell the others that there is nothing more to do. Rank 0 calls it at its end."""
    if not dist.is_initialized():
        return
    with suppress(Exception):
        tell(None)
    leave()


def leave() -> None:
    """End the connection to the others, without which NCCL warns at the end of a process."""
    if dist.is_initialized():
        with suppress(Exception):
            dist.destroy_process_group()


def forward(
    language: LanguageModel, x: Tensor, cache: KVCache | None, *mask: Tensor | None, **options: Any
) -> LanguageOutput:
    """LanguageModel.forward in one of the processes."""
    output = LanguageModel.forward(language, x, *mask, cache, **options)
    return gather_attentions(output, language.share)


def head(language: LanguageModel, x: Tensor, cache: None) -> Tensor:
    """LanguageModel.head in one of the processes."""
    return language.head(x)


@torch.no_grad()
def follow(language: LanguageModel) -> None:
    """Compute what rank 0 asks for, until it ends."""
    caches: dict[int, KVCache] = {}
    config, device = language.share.config(language.config), language.norm.weight.device
    dtype = language.norm.weight.dtype

    def ours(seen: Any) -> Any:
        """This process's part of a cache, as long and as large as rank 0's."""
        if isinstance(seen, list):
            return [ours(each) for each in seen]
        if not isinstance(seen, Seen):
            return seen
        if seen.key not in caches:
            caches[seen.key] = KVCache(config, seen.rows, seen.capacity, dtype=dtype, device=device)
        cache = caches[seen.key]
        cache.length = seen.length
        if cache.capacity != seen.capacity:
            cache.grow(seen.capacity)
        return cache

    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box)
        what = box[0]
        if what is None:
            dist.destroy_process_group()
            return
        if isinstance(what, Change):
            arguments = [ours(each) for each in moved(what.arguments, device)]
            getattr(ours(what.cache), what.method)(*arguments)
            continue
        for key in what.freed:
            caches.pop(key, None)
        x = torch.empty(what.inputs[0], dtype=what.inputs[1], device=device)
        dist.broadcast(x, 0)
        # What is wrong with a cache or with arguments, rank 0 finds at the same place, and tells.
        with suppress(ValueError):
            rest, options = moved((what.arguments, what.options), device)
            what.function(language, x, ours(what.caches), *rest, **options)
