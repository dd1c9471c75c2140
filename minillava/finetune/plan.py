"""What a run takes, told before it begins: parameters, bytes and time, from the sizes alone.

The bytes that the backward pass needs are counted by a forward pass without numbers (torch's fake
tensors); the time is that of one block on this machine, times the blocks. B rows of a micro-batch,
T positions, C width, N learnt tokens, P positions of a picture.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from minillava.attention import ATTENTION, eager
from minillava.checkpoint.place import available_memory
from minillava.config import LlavaConfig
from minillava.fast.quantize import stored_shapes
from minillava.finetune import processes
from minillava.finetune.learning import blocks_of, learnt_of, prepare
from minillava.finetune.loop import arithmetic
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example
from minillava.finetune.save import count
from minillava.llama import Context, positions_and_mask, rotary_tables, upcast
from minillava.llava import Llava

CHECKED = 2.0  # seconds that a block is measured for, at least once


@dataclass(frozen=True)
class Plan:
    """The sizes of a run; bytes where nothing else is said. activations: what a micro-batch keeps
    for its backward pass, logits with it, at the longest row; again: if blocks are computed again.
    learnt: parameters by part."""

    total: int
    learnt: dict[str, int]
    weights: int
    gradients: int
    moments: int
    activations: int
    again: int

    def memory(self, again: bool) -> int:
        activations = self.again if again else self.activations
        return self.weights + self.gradients + self.moments + activations


def make_plan(config: LlavaConfig, recipe: Recipe, examples: Sequence[Example]) -> Plan:
    """The sizes of a run, as a CPU computes it."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # which takes a second to import

    dtype = getattr(torch, recipe.dtype)
    # open_model has the frozen rest in float32, too, where a whole model learns
    held = torch.float32 if recipe.learn in ("language", "everything") else dtype
    with FakeTensorMode():
        model = Llava(config, eager)
        model.language_model.attend = ATTENTION[recipe.attention]
        total = sum(p.numel() for p in model.parameters())
        shapes = {name: p.shape for name, p in model.named_parameters()}
        _convert(model, dict(model.named_parameters()), held)
        _convert(model, prepare(model, replace(recipe, quantize=None)), torch.float32)
        learning = learnt_of(model)
        kept = Kept(model)
        with arithmetic(model, recipe), kept:
            if recipe.learn != "medusa":  # whose heads keep little beside what the trunk computes
                _forward(model, longest(examples, recipe.batch), kept)
    numbers = sum(p.numel() for p in learning.values())
    frozen = {name: shape for name, shape in shapes.items() if name not in learning}
    return Plan(
        total,
        count(model, learning),
        4 * numbers + sum(_stored(n, s, held, recipe.quantize) for n, s in frozen.items()),
        4 * numbers,
        8 * numbers + 4 * len(learning),  # and the number of the step, one a tensor
        kept.bytes,
        kept.again,
    )


def checkpoints(wish: str, learn: str, plan: Plan, device: str) -> bool:
    """Whether blocks are computed again in the backward pass: on, off, or auto, if the plan without
    does not fit in what is free, of which each process on a CPU has its part. All processes of a
    run get one answer, since in a block they wait for each other's weights. Raises ValueError for
    on with heads, whose backward pass goes through no block."""
    if learn == "medusa":
        if wish == "on":
            raise ValueError("--checkpoint on does nothing for --learn medusa; leave it out")
        return False
    if wish != "auto":
        return wish == "on"
    free = available_memory(device)
    if free is not None and device == "cpu":
        free //= processes.count()
    return processes.anybody(free is not None and plan.memory(again=False) > free)


def _convert(model: Llava, names: Iterable[str], dtype: torch.dtype) -> None:
    """Give the parameters of these names another dtype; as Module.to, which fails on tensors
    without numbers."""
    for name in names:
        owner, _, last = name.rpartition(".")
        found = model.get_parameter(name)
        new = nn.Parameter(found.detach().to(dtype), requires_grad=found.requires_grad)
        setattr(model.get_submodule(owner), last, new)


def longest(examples: Sequence[Example], batch: int) -> list[Example]:
    """The micro-batch that takes most: as many of the longest rows as one has."""
    return sorted(examples, key=lambda example: example.positions, reverse=True)[:batch]


class Kept(saved_tensors_hooks):
    """Counts what a forward pass keeps for the backward pass, beside the model itself, each
    memory once. between: the count where of blocks only the inputs are kept; again: and one block,
    as it is computed again."""

    def __init__(self, model: Llava):
        self.model = {p.untyped_storage()._cdata for p in model.parameters()}
        self.found: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}
        self.blocks: list[set[int]] = []
        self.before: set[int] = set()
        for block in blocks_of(model):
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)
        super().__init__(self.note, lambda tensor: tensor)

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor, unless it is counted or one of the model's."""
        key = tensor.untyped_storage()._cdata
        if key not in self.model:
            self.found[key] = tensor  # which keeps its address from being used again
        return tensor

    def _enter(self, block: nn.Module, given: tuple) -> None:
        self.before = set(self.found)

    def _leave(self, block: nn.Module, given: tuple, out: object) -> None:
        new = self.found.keys() - self.before
        if new:  # a block that does not learn, of which nothing is kept, keeps no input either
            self.blocks.append(new)
            for each in (*given[:1], *(given[1][:3] if given[1:] else ())):  # x, the context
                if each is not None:
                    self.inputs[each.untyped_storage()._cdata] = each

    @property
    def bytes(self) -> int:
        return _bytes(self.found.values())

    @property
    def between(self) -> int:
        inside = set().union(*self.blocks)
        outside = {key: t for key, t in self.found.items() if key not in inside}
        return _bytes({**outside, **self.inputs}.values())

    @property
    def again(self) -> int:
        of_blocks = [[self.found[k] for k in block - self.inputs.keys()] for block in self.blocks]
        return self.between + max(map(_bytes, of_blocks), default=0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _forward(model: Llava, examples: Sequence[Example], kept: Kept) -> None:
    """A micro-batch without numbers, as the loop computes it."""
    text, side = model.config.text, model.config.vision.image_size
    pictures = sum(len(example.pictures) for example in examples)
    if pictures:
        model.encode_images(torch.empty(pictures, 3, side, side))
    for example in examples:
        model.language_model.embed_tokens(torch.zeros(len(example.ids), dtype=torch.long))
    lengths = [example.positions for example in examples]
    shape = len(examples), max(lengths), text.hidden_size
    x = torch.empty(shape, dtype=_dtype(model), requires_grad=True)
    mask = None if min(lengths) == max(lengths) else torch.ones(shape[:2], dtype=torch.bool)
    context = _context(model, x, mask)
    for block in model.language_model.layers:
        x, _ = block(x, context)
    x = model.language_model.norm(x)
    learnt = sum(example.learnt for example in examples)
    # A mask chooses the positions that are learnt; how many it does is not known without numbers.
    kept.note(torch.empty(shape[:2], dtype=torch.bool))
    chosen = x.new_empty(learnt, text.hidden_size, requires_grad=True)
    following = torch.zeros(learnt, dtype=torch.long)
    F.cross_entropy(upcast(model.language_model.head(chosen)), following, reduction="sum")


def _dtype(model: Llava) -> torch.dtype:
    return model.language_model.embed_tokens.weight.dtype


def _context(model: Llava, x: Tensor, padding_mask: Tensor | None) -> Context:
    positions, mask, causal = positions_and_mask(padding_mask, 0, x.shape[1], x.device)
    tables = rotary_tables(positions, model.config.text, x.dtype)
    return Context(*tables, mask, causal, model.language_model.attend, None)


def _stored(name: str, shape: torch.Size, dtype: torch.dtype, quantize: str | None) -> int:
    """Bytes of a frozen weight."""
    linear = name.startswith("language_model.") and len(shape) == 2 and "embed" not in name
    if quantize is None or not linear:
        return prod(shape) * dtype.itemsize
    parts = stored_shapes((shape[0], shape[1]), quantize).values()
    return sum(prod(part) * kind.itemsize for part, kind in parts)


def told(plan: Plan, recipe: Recipe, examples: Sequence[Example], again: bool, device: str) -> str:
    """The plan in three lines: what learns, from how many rows, in how much memory."""
    parts = ", ".join(
        f"{part} {numbers / 1e6:.1f} M at {recipe.rate_of(part):g}"
        for part, numbers in plan.learnt.items()
    )
    rows, updates = len(examples), recipe.updates_for(len(examples))
    most = max(example.positions for example in examples)
    free = available_memory(device)
    lines = [
        f"learn    {sum(plan.learnt.values()) / 1e6:.1f} M of {plan.total / 1e6:.1f} M parameters: "
        f"{parts}",
        f"rows     {rows:,}, {updates:,} update(s) of {recipe.batch * recipe.accumulate} rows in "
        f"micro-batches of {recipe.batch}, longest {most:,} positions",
        f"memory   weights {plan.weights / 1e9:.2f} + gradients and moments "
        f"{(plan.gradients + plan.moments) / 1e9:.2f} + activations "
        f"{(plan.again if again else plan.activations) / 1e9:.2f}{' (checkpointing)' * again} = "
        f"{plan.memory(again) / 1e9:.2f} GB"
        + ("" if free is None else f"; free {free / 1e9:.1f} GB"),
    ]
    return "\n".join(lines)


def told_time(seconds: float) -> str:
    """The line of the plan that says how long it takes."""
    words = f"{seconds:.0f} seconds"
    for size, name in ((60, "minutes"), (3600, "hours"), (86400, "days")):
        if seconds >= 2 * size:
            words = f"{seconds / size:.0f} {name}"
    return f"time     about {words} here, from one block that was measured"


def estimate_seconds(
    config: LlavaConfig,
    recipe: Recipe,
    examples: Sequence[Example],
    again: bool,
    device: str = "cpu",
) -> float:
    """About how long the whole run takes on this machine: one block of each part with random
    weights is measured on one micro-batch of rows of middle length, and scaled to all positions.
    Reading weights, saving and held-out rows come on top."""
    dtype = getattr(torch, recipe.dtype)
    one = replace(
        config,
        text=replace(config.text, num_hidden_layers=1, tie_word_embeddings=True),
        vision=replace(config.vision, num_hidden_layers=1),
        feature_layer=1,
    )
    model = Llava(one, ATTENTION[recipe.attention])
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    model.to(device, dtype)
    _convert(model, prepare(model, replace(recipe, quantize=None)), torch.float32)
    ordered = sorted(examples, key=lambda example: example.positions)
    middle = ordered[len(ordered) // 2]
    rows = min(recipe.batch, max(1, 4096 // middle.positions))
    twice = 4 / 3 if again else 1  # of a block's forward and backward: another forward
    block = _block(model, middle.positions, rows, recipe) * twice
    head = _head(model, middle.learnt * rows, recipe)
    tower = _tower(model, rows * len(middle.pictures), recipe)
    if recipe.learn == "everything":
        tower *= twice
    of_batch = block * config.text.num_hidden_layers + head + tower * config.vision_layers_needed
    share = sum(e.positions for e in examples) / len(examples) / middle.positions
    done = recipe.updates_for(len(examples)) * min(len(examples), recipe.batch * recipe.accumulate)
    return of_batch / rows * share * done


def _block(model: Llava, positions: int, rows: int, recipe: Recipe) -> float:
    """Seconds of one block, forward and backward."""
    place = model.language_model.embed_tokens.weight
    x = place.new_empty(rows, positions, place.shape[1]).normal_().requires_grad_()
    context = _context(model, x, None)

    def work() -> None:
        with arithmetic(model, recipe):
            y, _ = model.language_model.layers[0](x, context)
        y.sum().backward()

    return _seconds(work, model.parameters())


def _head(model: Llava, learnt: int, recipe: Recipe) -> float:
    """Seconds of the head where tokens are learnt, forward and backward."""
    place = model.language_model.embed_tokens.weight
    x = place.new_empty(learnt, place.shape[1]).normal_().requires_grad_()
    answers = torch.zeros(learnt, dtype=torch.long, device=place.device)

    def work() -> None:
        with arithmetic(model, recipe):
            loss = F.cross_entropy(upcast(model.language_model.head(x)), answers)
        loss.backward()

    return _seconds(work, model.parameters())


def _tower(model: Llava, pictures: int, recipe: Recipe) -> float:
    """Seconds of a block of the vision tower, forward, and backward where the tower learns."""
    vision, block = model.config.vision, model.vision_tower.encoder.layers[0]
    weight = model.vision_tower.embeddings.patch_embedding.weight
    x = weight.new_empty(pictures, vision.num_positions, vision.hidden_size).normal_()
    x.requires_grad_(weight.requires_grad)

    def work() -> None:
        with arithmetic(model, recipe):
            y = block(x)
        if y.requires_grad:
            y.sum().backward()

    return _seconds(work, block.parameters()) if pictures else 0.0


def _seconds(work: Callable[[], None], learning: Iterable[nn.Parameter]) -> float:
    """The fastest of a few times, the first left out, since it allocates."""
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < 2 or (time.perf_counter() - started < CHECKED / 3 and len(found) < 10):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    for parameter in learning:
        parameter.grad = None
    return min(found[1:])
