"""Is a checkpoint well on this machine? The checks of `python -m minillava.inspect DIR --doctor`,
one line each.

T prompt positions after the splice, m decoded tokens, C width, V vocabulary; one row everywhere.
"""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import PIL
import safetensors
import sentencepiece
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from minillava.assistant import Assistant
from minillava.attention import ATTENTION
from minillava.cache import KVCache
from minillava.checkpoint.place import available_memory, choose_device, choose_dtype
from minillava.cli.hooks import attending
from minillava.fast import processor
from minillava.fast.processor import has_fast_bfloat16
from minillava.fast.quantize import QuantisedLinear, quantised_kinds
from minillava.fast.same_bits import ROWS, queries_alike, rows_alike
from minillava.files.disk import one_line
from minillava.generate.speculate import MOST, keeps_bits
from minillava.inspection.memory import gigabytes
from minillava.llava import Spliced
from minillava.options import dtype_name, remaining_context
from minillava.sampling import check_finite, last_logits

OK, WARNING, FAILED = "ok", "warning", "FAILED"

QUESTION = "Is there a red circle in this picture?"
"""What the checks ask. Its answer begins with yes for the drawn picture and no for a black one,
where descriptions of all pictures begin with the same word."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far two ways to compute the same logits may part, relative to the largest: far above what
rounding did in the models of the tests (8e-7, 2.4e-3, 1.3e-2), since deeper ones round more often,
and far below a wrong kernel's 1."""

BLIND = 3.0
"""The model tells two pictures apart when their first-token distributions differ by more than BLIND
times what rounding does to the two, measured once each: another time it may well be twice that. A
model that does not read the patches stays at rounding, mostly at exactly 0; the bundled one answers
yes and no."""

ALIKE = 1e-12  # and never by less, which is rounding in float64

TOKENS = 4  # decoded in the check of the cache

KEYS = 512  # cached positions in the check of attention's bits

SEED = 0


@dataclass(frozen=True)
class Finding:
    """What one check found: its name, OK, WARNING or FAILED, one line for a person, the numbers
    behind it."""

    check: str
    status: str
    text: str
    figures: dict = field(default_factory=dict)


def environment() -> Finding:
    """Versions, threads and what the processor can do."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "sentencepiece": sentencepiece.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }
    threads, processors = torch.get_num_threads(), os.cpu_count()
    capability, fast = torch.backends.cpu.get_cpu_capability(), has_fast_bfloat16()
    kind = processor.kind()
    crowded = processors is not None and threads > processors
    text = (
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {threads} "
        f"thread(s) on {processors} "
        f"processor(s){', more than there are: they wait for one another' * crowded}; "
        f"{capability}, "
        f"bfloat16 {'is fast' if fast else 'is emulated'}; products by the table of {kind}"
        f"{', which nobody has measured' * (kind in processor.GUESSED)}"
    )
    figures = {
        "threads": threads,
        "processors": processors,
        "capability": capability,
        "fast_bfloat16": fast,
        "kind": kind,
    }
    return Finding("environment", WARNING if crowded else OK, text, {**versions, **figures})


def precision(device: str, dtype: torch.dtype, stored: torch.dtype, parameters: int) -> Finding:
    """What `auto` chooses and why; a warning where device and dtype, as chosen, are slow here."""
    auto_device = choose_device("auto")
    auto_dtype = choose_dtype("auto", auto_device, stored, parameters)
    emulated = (
        "bfloat16 would be emulated"
        if auto_dtype == torch.float32
        else "so large, it is half as much to read"
    )
    on_cpu = "this processor has instructions for it" if has_fast_bfloat16() else emulated
    why = on_cpu if auto_device == "cpu" else "it is what is stored"
    found = "PyTorch finds no GPU" if auto_device == "cpu" else "PyTorch finds it"
    text = (
        f"auto chooses {auto_device} ({found}) and {dtype_name(auto_dtype)} ({why}; stored: "
        f"{dtype_name(stored)})"
    )
    if (device, dtype) != (auto_device, auto_dtype):
        text += f"; asked for: {device} and {dtype_name(dtype)}"
    slow = device.startswith("cpu") and dtype == torch.float16
    figures = {
        "auto": [auto_device, dtype_name(auto_dtype)],
        "chosen": [device, dtype_name(dtype)],
        "stored": dtype_name(stored),
    }
    text += ", which processors emulate: bfloat16 or float32 is faster" * slow
    return Finding("device and dtype", WARNING if slow else OK, text, figures)


def memory(weights: int, cache: int, device: str, mapped: bool) -> Finding:
    """Bytes needed against those available. mapped: the weights stay on disk, from where the system
    reads them again when memory is short, so that too little memory is slow but no failure."""
    available = available_memory(device)
    figures = {"weights": weights, "cache_at_full_context": cache, "available": available}
    text = f"weights {gigabytes(weights)}, cache at full context {gigabytes(cache)}"
    if available is None:
        return Finding(
            "memory", OK, f"{text}; this system does not say how much is available", figures
        )
    text += f"; available {gigabytes(available)}"
    if weights + cache <= available:
        return Finding("memory", OK, text, figures)
    if weights <= available:
        return Finding("memory", WARNING, f"{text}: long conversations will not fit", figures)
    if mapped:
        return Finding(
            "memory", WARNING, f"{text}: the weights are read from disk again and again", figures
        )
    return Finding(
        "memory", FAILED, f"{text}: does not fit; try another --dtype or --device", figures
    )


def examine(
    assistant: Assistant, picture: Image.Image | None = None, system: str | None = None
) -> Iterator[Finding]:
    """The checks of an opened model: its weights, its two attentions, its cache, its eyes. picture:
    what it is shown, instead of a drawn one."""
    yield finite_weights(assistant.model)
    yield same_bits(assistant.model)
    try:
        yield from _ask(
            assistant,
            draw_picture(assistant.image_processor.image_size) if picture is None else picture,
            system,
        )
    except (
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: memory that runs out, an operation this device lacks
        yield Finding("answer", FAILED, one_line(error))


@torch.no_grad()
def _ask(assistant: Assistant, picture: Image.Image, system: str | None) -> Iterator[Finding]:
    prompt = assistant.prompt(QUESTION, system=system)
    black, noise = other_pictures(picture.size)
    # attention -> picture -> [V]
    logits: dict[str, dict[str, Tensor]] = {name: {} for name in ATTENTION}
    for name, attend in ATTENTION.items():
        with attending(assistant.model, attend):
            for shown, look in {"picture": picture, "black": black, "noise": noise}.items():
                logits[name][shown] = first_logits(assistant, assistant.prepare(look, prompt))
    eager, fused = logits["eager"], logits["fused"]
    # Kernels of quantised layers take a row in bfloat16, prefill takes many as they are.
    small = bool(quantised_kinds(assistant.model))
    dtype = torch.bfloat16 if small else assistant.model.language_model.embed_tokens.weight.dtype
    yield same("eager and fused attention", eager["picture"], fused["picture"], dtype)
    yield same(
        "cache and no cache",
        *cached_and_whole(assistant, assistant.prepare(picture, prompt)),
        dtype,
    )
    rounding = {name: total_variation(eager[name], fused[name]) for name in fused}
    yield sight(fused, rounding, assistant.tokenizer.decode)


def finite_weights(model: nn.Module) -> Finding:
    """Every number of every weight, as it is used."""
    wrong = [
        name
        for name, tensor in model.state_dict().items()
        if not (tensor.to_dense() if tensor.is_mkldnn else tensor).isfinite().all()  # as packed
    ]
    if not wrong:
        return Finding("weights", OK, "every number is finite", {"not_finite": []})
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    text = (
        f"NaN or infinity in {', '.join(wrong[:3])}{more}: damaged, or too large for the dtype; "
        "download again"
    )
    return Finding("weights", FAILED, text, {"not_finite": wrong})


@torch.no_grad()
def same_bits(model: nn.Module) -> Finding:
    """Up to how many rows of a pass each has the bits that it has alone, in the products of the
    language model's layers and in its attention of one query."""
    language, config = model.language_model, model.config.text
    like, most = language.embed_tokens.weight, max(ROWS)
    draw = torch.Generator().manual_seed(SEED)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(like.device, like.dtype)

    layers = {
        (layer.out_features, layer.in_features): layer
        for layer in language.modules()
        if isinstance(layer, nn.Linear | QuantisedLinear)
    }
    products = min(rows_alike(layer, numbers(most, c)) for (_, c), layer in layers.items())
    head = (config.num_key_value_heads, min(KEYS, config.context), config.head_dim)
    attention = queries_alike(
        language.attend,
        numbers(most, config.num_attention_heads, 1, config.head_dim),
        numbers(most, *head),
        numbers(most, *head),
    )
    drafts = keeps_bits(language, 1 + MOST)  # which takes attention row by row
    kind = " and ".join(quantised_kinds(model)) or dtype_name(like.dtype)
    text = (
        f"in {kind}, a token decoded beside others has the bits that it has alone up to {products} "
        f"row(s) of products and {attention} of attention; answers with drafts are exact"
        f"{'' if drafts else ' up to rounding'}"
    )
    figures = {"products": products, "attention": attention, "most": most, "drafts": drafts}
    return Finding("same bits", OK, text, figures)


def first_logits(assistant: Assistant, spliced: Spliced) -> Tensor:
    """The logits of the answer's first token, [V]. Raises ValueError if they are not finite."""
    output = assistant.model.language_model(spliced.embeds, spliced.padding_mask, last_only=True)
    return check_finite(last_logits(output))[
        0
    ].cpu()  # not every GPU has the float64 of `total_variation`


def cached_and_whole(assistant: Assistant, spliced: Spliced) -> tuple[Tensor, Tensor]:
    """The logits of the first tokens of the greedy answer twice, [m + 1, V]: one position after the
    other with a cache, and all positions at once without."""
    model = assistant.model
    language, length = model.language_model, spliced.embeds.shape[1]
    tokens = min(TOKENS, remaining_context(model.config, length))
    dtype, device = spliced.embeds.dtype, spliced.embeds.device
    cache = KVCache(model.config.text, 1, length + tokens, dtype=dtype, device=device)
    # each [1, V]
    output = language(spliced.embeds, spliced.padding_mask, cache, last_only=True)
    cached = [check_finite(last_logits(output))]
    ids = []
    for _ in range(tokens):
        ids.append(cached[-1].argmax(-1, keepdim=True))  # [1, 1]
        cached.append(check_finite(last_logits(language(ids[-1], None, cache))))
    words = language.embed_tokens(torch.cat(ids, dim=1))  # [1, m, C]
    # [m + 1, V]
    whole = language(torch.cat([spliced.embeds, words], dim=1)).logits[0, length - 1 :]
    return torch.cat(cached), whole.to(cached[0].dtype)


def same(check: str, one: Tensor, other: Tensor, dtype: torch.dtype) -> Finding:
    """Whether logits that were computed in two ways are the same but for rounding (TOLERANCE)."""
    apart = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    agree, limit = apart <= TOLERANCE[dtype], TOLERANCE[dtype]  # NaN does not
    text = (
        f"the logits differ by {apart:.1e} of their size, {'within' if agree else 'more than'} "
        f"{limit:.0e}"
    )
    text += (
        ""
        if agree
        else f", what rounding in {dtype_name(dtype)} explains: this PyTorch computes something "
        "else"
    )
    return Finding(
        check, OK if agree else FAILED, text, {"relative_difference": apart, "tolerance": limit}
    )


def draw_picture(side: int) -> Image.Image:
    """Three shapes on a light ground, where a fixed seed puts them; a red circle lies on top."""
    picture, rng = Image.new("RGB", (side, side), (240, 240, 230)), np.random.default_rng(SEED)
    draw, third = ImageDraw.Draw(picture), side // 3
    for shape, colour in ((draw.ellipse, "green"), (draw.rectangle, "blue"), (draw.ellipse, "red")):
        left, top = rng.integers(0, side - third, 2).tolist()
        shape((left, top, left + third, top + third), fill=colour)
    return picture


def other_pictures(size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A black picture and one of noise, (width, height)."""
    noise = np.random.default_rng(SEED).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.new("RGB", size), Image.fromarray(noise)


def total_variation(one: Tensor, other: Tensor) -> float:
    """Half the sum of the differences of two distributions, given as logits [V]: 0 where they are
    the same, 1 where they share no token."""
    return float((one.double().softmax(-1) - other.double().softmax(-1)).abs().sum() / 2)


def sight(shown: dict[str, Tensor], rounding: dict[str, float], decode: Callable) -> Finding:
    """The blind test: do three pictures lead to three answers? Not to see is to tell the first from
    none of the others. shown: name -> first-token logits [V]. rounding: name -> total variation of
    that distribution computed twice."""
    names = list(shown)
    pairs = {f"{a} and {b}": (a, b) for i, a in enumerate(names) for b in names[i + 1 :]}
    distances = {pair: total_variation(shown[a], shown[b]) for pair, (a, b) in pairs.items()}
    limits = {
        pair: max(BLIND * (rounding[a] + rounding[b]), ALIKE) for pair, (a, b) in pairs.items()
    }
    alike = [pair for pair in pairs if not distances[pair] > limits[pair]]
    figures = {"total_variation": distances, "limits": limits}
    numbers = ", ".join(
        f"{pair} {distance:.2g} (limit {limits[pair]:.1g})" for pair, distance in distances.items()
    )
    words = ", ".join(
        f"{name} {decode([int(logits.argmax())])!r}" for name, logits in shown.items()
    )
    text = f"total variation {numbers}; first words: {words}"
    if all(pair in alike for pair, (a, _) in pairs.items() if a == names[0]):
        advice = "check that projector and vision tower are those it was trained with"
        return Finding(
            "blind test", FAILED, f"THE MODEL IGNORES THE PICTURE: {advice}; {text}", figures
        )
    if alike:
        return Finding(
            "blind test",
            WARNING,
            f"the model cannot tell {', '.join(alike)} apart; {text}",
            figures,
        )
    return Finding("blind test", OK, f"the answer depends on the picture; {text}", figures)
