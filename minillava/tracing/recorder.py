"""What happens inside a model while it runs, as records: each tensor summarised as it comes, and
let go.

The model knows nothing of this. Hooks (cli/hooks.py) see what each module returns, and give the
decoder's attention a function that calls the real one and records what went in. B batch, T new
tokens, S cached and new tokens, H heads, K key/value heads, D head width, V vocabulary.
"""

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minillava.attention import eager
from minillava.cli import hooks
from minillava.llama import Context, LanguageModel, apply_rotary, positions_and_mask, rotary_tables
from minillava.llava import Llava
from minillava.options import dtype_name

FIRST = 4
"""How many values of each tensor are shown."""

DEPTHS = {  # by name, what each depth adds to the one before
    "outline": r"vision_tower(\.embeddings\.patch_embedding)?|projector",
    "modules": r"vision_tower\.(embeddings|pre_layrnorm|encoder\.layers\.\d+)|"
    r"projector\.\w+|language_model\."
    r"(embed_tokens|norm|layers\.\d+(\.mlp|\.self_attn(\.(q|k|v|attention_weights))?|\.cache\.(keys|values))?)",
    "everything": r"(vision_tower|projector|language_model)\..+",
}

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass
class Record:
    """One line of a trace. A tensor has shape, dtype and, unless empty, numbers; anything else has
    a value."""

    # 0: picture and prompt (prefill); 1, 2, ...: one cached token each; None: before or after them
    step: int | None
    stage: str  # what it is shown under
    name: str  # the module's name in the model, or what the walk through the code calls it
    source: str  # file:line that made it
    shape: list[int] | None = None
    dtype: str | None = None
    min: float | str | None = None  # a text if it is not finite: JSON has no such number
    mean: float | str | None = None
    max: float | str | None = None
    first: list | None = None
    was: list[int] | None = None  # the shape at the step traced before, if it was another
    value: object = None

    @property
    def key(self) -> str:
        """The name of its tensor in a file."""
        return self.name if self.step is None else f"{self.step}/{self.name}"

    @property
    def heading(self) -> str:
        if self.step is None:
            return self.stage
        return f"step {self.step} ({'cached decode' if self.step else 'prefill'}): {self.stage}"

    @property
    def short_name(self) -> str:
        """Without what the heading says already."""
        return (
            re.sub(
                r"^(language_model\.(layers\.\d+(\.|$))?|vision_tower\.|projector\.)", "", self.name
            )
            or "output"
        )

    @property
    def value_text(self) -> str:
        """The value in words: rows as `id piece`, settings as `name value`."""
        if isinstance(self.value, dict):
            return ", ".join(f"{k} {v!r}" for k, v in self.value.items())
        if isinstance(self.value, list):
            return "  ".join(" ".join(map(str, row)) for row in self.value)
        return "" if self.value is None else repr(self.value) if "\n" in self.value else self.value

    def json(self) -> dict:
        """As JSON's kinds of values."""
        return {k: v for k, v in asdict(self).items() if v is not None}


Consume = Callable[[Record, Tensor | None], None]


class Recorder:
    """Hooks on a model, for the time of a `with`; each tensor goes to `consume` with its record and
    is not kept.

    depth: a name of DEPTHS. layers: which layers of tower and decoder, None for all. steps: which
    forward passes of the language model; encoding the picture belongs to 0. What the model computes
    stays the same to the last bit.
    """

    def __init__(
        self,
        model: Llava,
        consume: Consume,
        depth: str,
        layers: Collection[int] | None,
        steps: Collection[int],
    ):
        self.model, self.consume, self.layers, self.steps = model, consume, layers, steps
        # the forward pass of the language model that runs, and how many have begun
        self.step, self.calls = 0, 0
        self._wanted = [
            re.compile(pattern)
            for pattern in list(DEPTHS.values())[: list(DEPTHS).index(depth) + 1]
        ]
        self._shapes: dict[str, list[int]] = {}
        self._hooks = hooks.Hooks()

    def __enter__(self) -> "Recorder":
        language_model, watch = self.model.language_model, self._hooks
        watch.before(language_model, self._begin)
        for name, module in self.model.named_modules():
            nothing = isinstance(module, nn.Identity)  # a stage that this kind of model has not
            if name != "language_model" and self.wants(name) and not nothing:
                watch.after(module, partial(self._made, name))
        watch.after(language_model, self._logits)
        watch.before(language_model.layers[0], self._positions)
        for i, layer in enumerate(language_model.layers):
            if self.wants(f"language_model.layers.{i}.self_attn.q"):
                watch.attention(layer.self_attn, partial(self._attention, i))
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks away; nothing more is recorded."""
        self._hooks.close()
        self.steps = ()

    def wants(self, name: str) -> bool:
        layer = re.search(r"\blayers\.(\d+)", name)
        chosen = layer is None or self.layers is None or int(layer[1]) in self.layers
        return chosen and any(pattern.fullmatch(name) for pattern in self._wanted)

    def add(
        self,
        stage: str,
        name: str,
        tensor: Tensor | None = None,
        source: str | Callable = "",
        value=None,
    ) -> None:
        """A record of the step that runs, if that is wanted. source: a function, or nothing for the
        calling line."""
        if self.step not in self.steps:
            return
        record = Record(
            self.step,
            stage,
            name,
            source_of(source) if callable(source) else source or _calling_line(),
        )
        record.value = value
        if tensor is not None:
            vars(record).update(summarise(tensor))
            before = self._shapes.get(name, record.shape)
            record.was = None if before == record.shape else before
            self._shapes[name] = record.shape
        self.consume(record, tensor)

    def _begin(self, *_) -> None:
        self.step, self.calls = self.calls, self.calls + 1

    def _made(self, name: str, module, args, output) -> None:
        found = re.match(r"language_model\.layers\.(\d+)", name)
        stage = f"layer {found[1]}" if found else name.split(".")[0].replace("_", " ")
        # Words are looked up by the splice, before the language model runs.
        stage = "splice" if name.endswith("embed_tokens") and self.calls == 0 else stage
        self.add(stage, name, output[0] if isinstance(output, tuple) else output)

    def _logits(self, module, args, output) -> None:
        self.add("choice", "logits", output.logits, LanguageModel.head)  # [B, 1, V]

    def _positions(self, module, args) -> None:
        x, (cos, sin, mask, causal, _, cache) = args
        offset, length = cache.length, x.shape[1]
        # [B, S]
        real = None if cache.padding_mask is None else cache.padding_mask[:, : offset + length]
        # The layers get angles, not positions: what the model asked, asked again.
        positions, _, _ = positions_and_mask(real, offset, length, x.device)  # [B|1, T]
        self.add("language model", "positions", positions, positions_and_mask)
        words = f"none: causal, the attention function draws its own triangle [{length}, {length}]"
        words = words if causal else f"none: one new token, which may look at all {offset + length}"
        self.add(
            "language model", "mask", mask, positions_and_mask, words if mask is None else None
        )
        for name, tensor in (("cos", cos), ("sin", sin)):
            if self.wants(f"language_model.{name}"):
                self.add("language model", name, tensor, rotary_tables)  # [B|1, 1, T, D]

    def _attention(self, layer: int, context: Context) -> Context | None:
        if self.step not in self.steps:
            return None
        attend, cache = context.attend, context.cache
        stage, prefix = f"layer {layer}", f"language_model.layers.{layer}"

        def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool):
            new = q.shape[2]  # k and v hold what is cached, too
            self.add(stage, f"{prefix}.self_attn.q", q, apply_rotary)  # [B, H, T, D]
            self.add(stage, f"{prefix}.self_attn.k", k[:, :, -new:], apply_rotary)  # [B, K, T, D]
            self.add(stage, f"{prefix}.self_attn.v", v[:, :, -new:])
            self.add(stage, f"{prefix}.cache.keys", k, cache.update)  # [B, K, S, D]
            self.add(stage, f"{prefix}.cache.values", v, cache.update)
            out, weights = attend(q, k, v, mask, causal)
            # `fused` has none to show
            seen = eager(q, k, v, mask, causal)[1] if weights is None else weights
            self.add(stage, f"{prefix}.self_attn.attention_weights", seen, eager)  # [B, H, T, S]
            return out, weights

        return context._replace(attend=watched)


def summarise(tensor: Tensor) -> dict:
    """Fields of a Record: shape, dtype and, unless it is empty or on the meta device, the
    numbers."""
    found = {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
    if tensor.numel() == 0 or tensor.is_meta:
        return found
    x, row = tensor if tensor.is_floating_point() else tensor.to(torch.int64), tensor
    while row.dim() > 1:
        row = row[0]
    low, high = x.aminmax()
    mean = x.mean(dtype=torch.promote_types(x.dtype, torch.float32))
    ends = {"min": _number(low.item()), "mean": _number(mean.item()), "max": _number(high.item())}
    return {**found, **ends, "first": [_number(v) for v in row.reshape(-1)[:FIRST].tolist()]}


def _number(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)


def number_text(x: float | int | str | None) -> str:
    return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)


def source_of(function: Callable) -> str:
    """file:line where a function begins."""
    code = inspect.unwrap(function).__code__
    return f"{_shown(code.co_filename)}:{code.co_firstlineno}"


def _shown(path: str) -> str:
    """A file of ours by its place in the package, since two are called attention.py; another by its
    name."""
    return path.removeprefix(_PACKAGE) if path.startswith(_PACKAGE) else os.path.basename(path)


def _calling_line() -> str:
    """file:line of the innermost of our own files that runs, apart from those that watch."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and path not in (__file__, hooks.__file__):
            return f"{_shown(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
