#!/usr/bin/env python3
"""What a GPU must get right, and how fast it is: one command, one table.

    python tools/gpu_check.py --json found.json                  # everything, on one GPU of 80 GB
    python tools/gpu_check.py --only parity,answers --size 1b    # some of it
    python tools/gpu_check.py --device cpu --size tiny           # what a CPU can run of it

Family: small random networks of every kind against transformers. Doors: everything a user can
start, against the CPU. Parity: the bundled network and a wide one against float64 and
transformers. Answers: every way to make one gives the CPU's. Syncs: how often a token makes the processor wait. Growth: memory after many
answers. The other sections time random weights of a true size, which are never on the disk; `first`
times the parts of the first token. Exit status: 1 if a check failed; a measured time is not a check.
"""

import argparse
import gc
import platform
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, installed or not
# the tests drive transformers through the same lines
sys.path.insert(0, str(ROOT / "tests" / "support"))

import hf  # noqa: E402
from bench_checkpoint import random_tensor  # noqa: E402
from bench_parts.work import PROMPT, bytes_read, prompt_ids  # noqa: E402
from gpu_parts.common import (  # noqa: E402
    BUNDLED,
    PICTURES,
    PRECISIONS,
    QUESTIONS,
    SIZES,
    Report,
    Run,
    captured_model,
    distance,
    tensors_of,
    their_inputs,
    their_tensors,
    within,
    without_tf32,
)
from gpu_parts.doors import doors  # noqa: E402
from gpu_parts.family import family  # noqa: E402

from minillava import loop  # noqa: E402
from minillava.assistant import Assistant, load  # noqa: E402
from minillava.attention import ATTENTION  # noqa: E402
from minillava.cache import KVCache  # noqa: E402
from minillava.chat.conversation import Conversation  # noqa: E402
from minillava.checkpoint.write_json import hub_config  # noqa: E402
from minillava.cli.arguments import Parser  # noqa: E402
from minillava.cli.messages import run  # noqa: E402
from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig  # noqa: E402
from minillava.fast import ahead as run_ahead  # noqa: E402
from minillava.fast import speed_up  # noqa: E402
from minillava.fast.ahead import AsyncRead, decode_ahead  # noqa: E402
from minillava.fast.compiled import compile_decode  # noqa: E402
from minillava.fast.quantize import quantised_layer, quantize_tensor  # noqa: E402
from minillava.files.disk import one_line  # noqa: E402
from minillava.generate.contrast import METHODS, VCD  # noqa: E402
from minillava.generate.engine import Engine, Failed, Request  # noqa: E402
from minillava.generate.generation import generate  # noqa: E402
from minillava.image import ImageProcessor  # noqa: E402
from minillava.llava import Llava  # noqa: E402
from minillava.loop import steps  # noqa: E402
from minillava.options import KINDS, Options  # noqa: E402
from minillava.sampling import Sampler, last_logits  # noqa: E402

TOKENS = {"7b": 64, "1b": 64, "tiny": 4}  # of a timed answer
ANSWERS = {"7b": 200, "1b": 200, "tiny": 14}  # of which none may leave memory behind
# bytes, more than a cache holds; on a CPU the number means nothing
COPIED = {"cuda": 2 << 30, "cpu": 1 << 24}
LONGEST = 40  # tokens of an answer that is compared
SYNC_TOKENS = 12  # of an answer whose waits are counted

# --- models ---------------------------------------------------------------------------------------


def random_state(config: LlavaConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random weights by our names, created on the device where they stay."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llava(config).state_dict().items()}
    generator = torch.Generator(device=device).manual_seed(0)
    return {name: random_tensor(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def network(
    config: LlavaConfig,
    state: dict[str, Tensor],
    attention: str = "fused",
    quantize: str | None = None,
) -> Llava:
    """The network with these tensors. None of them is copied, except those that are quantised."""
    with torch.device("meta"):
        model = Llava(config, ATTENTION[attention])
    model.load_state_dict(state, strict=True, assign=True)
    if quantize:
        layers = [
            (n, m)
            for n, m in model.language_model.named_modules()
            if isinstance(m, torch.nn.Linear)
        ]
        for name, layer in layers:
            model.language_model.set_submodule(
                name, quantised_layer(quantize_tensor(layer.weight.detach(), quantize))
            )
    if attention != "eager":
        speed_up(model, model.language_model)
    model.decoding = decode_ahead
    return model.eval().requires_grad_(False)


def transformers_of(config: LlavaConfig, state: dict[str, Tensor]):
    """transformers' model with the same tensors, which are not copied."""
    from transformers import LlavaForConditionalGeneration

    hf.quiet()
    some = next(iter(state.values()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(some.dtype)
    try:
        with torch.device(some.device):
            theirs = LlavaForConditionalGeneration(hf.llava_config(hub_config(config, some.dtype)))
    finally:
        torch.set_default_dtype(before)
    language, head, tower, projector = hf.PREFIXES["modules"]
    parts = {
        "language_model.lm_head.": f"{head}lm_head.",
        "language_model.": language,
        "vision_tower.": tower,
    }
    parts["projector."] = projector
    named = {}
    for name, tensor in state.items():
        part = next(part for part in parts if name.startswith(part))
        named[parts[part] + name.removeprefix(part)] = tensor
    missing, unexpected = theirs.load_state_dict(named, strict=False, assign=True)
    # which nobody reads, and we do not build
    last = f"{tower}encoder.layers.{config.vision.num_hidden_layers - 1}."
    unread = (last, f"{tower}post_layernorm.")
    missing = [name for name in missing if not name.startswith(unread)]
    if missing or unexpected:
        raise ValueError(
            f"transformers has other names: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    theirs.config.dtype = some.dtype
    return theirs.eval().requires_grad_(False)


# --- parity ---------------------------------------------------------------------------------------


def parity(run: Run) -> None:
    """Two networks: the bundled one, and two layers of the true width, each with a padded batch."""
    with without_tf32():
        compare_both(run)


def compare_both(run: Run) -> None:
    bundled = load(BUNDLED, device=run.device, dtype="float64")
    ids = [bundled.tokenizer.encode(bundled.prompt(question)) for question in QUESTIONS]
    pixels = bundled.image_processor(PICTURES)
    compare_networks(
        run, "bundled model", bundled.model.config, bundled.model.state_dict(), ids, pixels
    )
    whole = run.config
    text, vision = (
        replace(whole.text, num_hidden_layers=2),
        replace(whole.vision, num_hidden_layers=3),
    )
    config, side = replace(whole, text=text, vision=vision), vision.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = [[1, *range(9, 20), IMAGE_TOKEN_INDEX, *range(30, 30 + more)] for more in (5, 1, 30)]
    state = random_state(config, torch.float32, run.device)
    compare_networks(
        run, "two wide layers", config, {name: t.double() for name, t in state.items()}, ids, pixels
    )


@dataclass
class Compared:
    """One network at one dtype, on the same weights and prompts in three ways."""

    run: Run
    name: str
    config: LlavaConfig
    dtype: str
    state: dict[str, Tensor]
    ids: list
    pixels: Tensor
    exact: Tensor  # logits in float64 of the weights of this dtype, so that only the computation rounds
    theirs: object  # transformers' model, or None

    def check(self, what: str, found: object, expected: object, good: bool) -> None:
        self.run.report.check(f"{self.name}, {what}", self.dtype, found, expected, good)

    def measure(self, what: str, found: object) -> None:
        self.run.report.measure(f"{self.name}, {what}", self.dtype, found)


def compare_networks(
    run: Run, name: str, config: LlavaConfig, state: dict[str, Tensor], ids: list, pixels: Tensor
) -> None:
    """For each dtype: how far ours and theirs are from float64, and whether they are bit-identical.
    state: float64."""
    for dtype in PRECISIONS:
        rounded = {key: tensor.to(getattr(torch, dtype)) for key, tensor in state.items()}
        in_float64 = network(config, {key: t.double() for key, t in rounded.items()}, "eager")
        exact = tensors_of(in_float64, ids, pixels)["logits"]
        theirs = transformers_of(config, rounded) if find_spec("transformers") else None
        if theirs is None:
            run.report.skip(f"{name}: against transformers", "transformers is not installed")
        both = Compared(run, name, config, dtype, rounded, ids, pixels, exact, theirs)
        for attention, peer in (("eager", "eager"), ("fused", "sdpa")):
            compare_attention(both, attention, peer)


def compare_attention(both: Compared, attention: str, peer: str) -> None:
    """Compare ours with one kind of attention to theirs with its own."""
    model = network(both.config, both.state, attention)
    ours = tensors_of(model, both.ids, both.pixels)
    if both.run.on_gpu and both.dtype == "float32" and attention == "fused":
        check_tf32(both, model, ours["logits"])
    if both.theirs is None:
        error = distance(ours["logits"], both.exact)["norm"]
        both.measure(f"{attention}: logits to float64, relative norm", f"{error:.2e}")
        return
    both.theirs.set_attn_implementation(peer)
    others = their_tensors(both.theirs, both.ids, both.pixels)
    check_distance(both, attention, peer, ours["logits"], others["logits"])
    if attention == "eager":
        check_bits(both, ours, others)
    check_ids(both, attention, peer, model)


def check_tf32(both: Compared, model: Llava, logits: Tensor) -> None:
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    same = torch.equal(tensors_of(model, both.ids, both.pixels)["logits"], logits)
    torch.backends.cudnn.allow_tf32 = False
    found = "the same bits" if same else "others"
    both.check("fused: with TF32 allowed in convolutions", found, "the same bits", same)


def check_distance(both: Compared, attention: str, peer: str, ours: Tensor, others: Tensor) -> None:
    """Check what README promises of fused; eager must be at least as close."""
    kind, factor = within(both.dtype)
    error, bound = (distance(logits, both.exact)[kind] for logits in (ours, others))
    expected = f"at most {factor} × transformers {peer}'s {bound:.3e}"
    what = f"{attention}: logits to float64 ({kind})"
    both.check(what, f"{error:.3e}", expected, error <= factor * bound)


def check_bits(both: Compared, ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Compare real positions only. Both pad on the left, and nobody reads a padded position."""
    equal = [key for key in ours if torch.equal(ours[key], others[key])]
    worst = distance(ours["logits"], others["logits"])["max"]
    found = f"{len(equal)} of {len(ours)} tensors bit-identical, logits differ by {worst:.1e}"
    if both.run.on_gpu:  # where nobody promises it
        both.measure("eager: against transformers'", found)
    else:
        both.check("eager: against transformers'", found, "all", len(equal) == len(ours))


def check_ids(both: Compared, attention: str, peer: str, model: Llava, tokens: int = 12) -> None:
    """Compare greedy answers. With random weights any token may be the end token."""
    model.config = replace(both.config, eos_token_ids=())
    answer = generate(model, both.ids, both.pixels, max_new_tokens=tokens).sequences.tolist()
    their_answer = their_ids(both.theirs, both.ids, both.pixels, tokens)
    same = sum(a == b for a, b in zip(answer, their_answer, strict=True))
    found = f"{same} of {len(answer)} answers have the ids of {peer}"
    if both.dtype == "float32" or (not both.run.on_gpu and attention == "eager"):
        both.check(f"{attention}: greedy ids", found, "all", same == len(answer))
    else:
        both.measure(f"{attention}: greedy ids", found)


def their_ids(theirs, ids: list, pixels: Tensor, tokens: int) -> list[list[int]]:
    given = their_inputs(theirs, ids, pixels)
    del given["position_ids"]  # generate makes its own
    theirs.generation_config.eos_token_id = None
    pad = theirs.config.pad_token_id
    made = theirs.generate(**given, do_sample=False, max_new_tokens=tokens, pad_token_id=pad)
    return made[:, given["input_ids"].shape[1] :].tolist()


# --- answers --------------------------------------------------------------------------------------

Ask = Callable[[Assistant, list[tuple[Path, str]]], list[str]]
WHOSE = "as on the CPU in float32"
DRAFTS = ("lookup", "medusa")
RANDOM = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}


def one_by_one(assistant: Assistant, asked: list[tuple[Path, str]], **options) -> list[str]:
    return [
        assistant.ask(picture, question, max_new_tokens=LONGEST, **options)
        for picture, question in asked
    ]


def as_batch(assistant: Assistant, asked: list[tuple[Path, str]], **options) -> list[str]:
    pictures, questions = zip(*asked, strict=True)
    return assistant.ask(list(pictures), list(questions), max_new_tokens=LONGEST, **options)


def in_turns(assistant: Assistant, asked: list[tuple[Path, str]]) -> list[str]:
    """One conversation about all pictures, whose cache is kept."""
    conversation, answers = Conversation(assistant), []
    for picture, question in asked:
        conversation.add_image(picture)
        answers.append(conversation.ask(question, max_new_tokens=LONGEST))
    return answers


def in_turns_anew(assistant: Assistant, asked: list[tuple[Path, str]]) -> list[str]:
    """The same conversation, read from its beginning at every question."""
    conversation, answers = Conversation(assistant), []
    for picture, question in asked:
        conversation.add_image(picture)
        conversation.cache = None
        answers.append(conversation.ask(question, max_new_tokens=LONGEST))
    return answers


def likelier(assistant: Assistant, asked: list[tuple[Path, str]]) -> list[str]:
    answers = ["Yes.", "No.", "A large green star is at the bottom."]
    scores = [assistant.score(picture, question, answers) for picture, question in asked]
    return [answers[max(range(3), key=each.__getitem__)] for each in scores]


def among_others(assistant: Assistant, asked: list[tuple[Path, str]]) -> list[str]:
    """All of them at once, by the engine of the server, with fewer slots than questions."""
    count = len(asked)
    settings = {"slots": 2, "waiting": count, "piece": 64, "pictures": count}
    engine = Engine(assistant.model, assistant.tokenizer, **settings)
    answers, events = [""] * len(asked), queue.Queue()
    for number, (picture, question) in enumerate(asked):
        engine.submit(
            Request(
                assistant.tokenize(assistant.prompt(question)),
                [(str(picture).encode(), assistant.image_processor(picture)[0])],
                [assistant.options(max_new_tokens=LONGEST)],
                lambda _, event, number=number: events.put((number, event)),
            )
        )
    engine.start()
    left = len(asked)
    while left:
        number, event = events.get(timeout=60)
        if isinstance(event, Failed):
            raise RuntimeError(f"the engine failed: {event.message}")
        answers[number] += event.text
        left -= event.finish_reason is not None
    engine.drain(0)
    engine.join()
    return answers


@contextmanager
def running_ahead(runs: bool) -> Iterator[None]:
    before = run_ahead.overlaps_reading
    run_ahead.overlaps_reading = lambda device: runs
    try:
        yield
    finally:
        run_ahead.overlaps_reading = before


def not_ahead(assistant: Assistant, asked: list, **options) -> list[str]:
    with running_ahead(False):
        return one_by_one(assistant, asked, **options)


def captured(assistant: Assistant, device: str) -> Assistant:
    """The same model, decoding by fast/compiled.py: compiled on a GPU, on a CPU the step as it is."""
    model = network(assistant.model.config, assistant.model.state_dict())
    return captured_model(
        Assistant(model, assistant.tokenizer, assistant.image_processor, assistant.template), device
    )


class Answers:
    """The same questions in many ways, and what is right: what a CPU says in float32."""

    def __init__(self, run: Run):
        self.run = run
        self.asked = [(picture, question) for question in QUESTIONS for picture in PICTURES][
            :: 4 if run.size == "tiny" else 1
        ]
        self.few = self.asked[:3]  # a conversation's pictures have to fit into one context
        self.contrasts = {name: {"contrast": METHODS[name](), "seed": 1} for name in METHODS}
        self.plain = {dtype: self.load(dtype) for dtype in ("float32", "bfloat16")}
        self.right = self.of_a_cpu()

    def load(self, dtype: str, quantize: str | None = None) -> Assistant:
        return load(BUNDLED, device=self.run.device, dtype=dtype, quantize=quantize)

    def of_a_cpu(self) -> dict[str, list[str]]:
        cpu, asked = load(BUNDLED, device="cpu", dtype="float32"), self.asked
        with running_ahead(False):
            right = {
                "plain": one_by_one(cpu, asked),
                "turns": in_turns_anew(cpu, self.few),
                "score": likelier(cpu, asked),
                "beams": one_by_one(cpu, asked, num_beams=3),
            }
            right |= {name: one_by_one(cpu, asked, **o) for name, o in self.contrasts.items()}
            for kind in KINDS:
                small = load(BUNDLED, device="cpu", dtype="float32", quantize=kind)
                right[kind] = one_by_one(small, asked)
        return right

    def compare(
        self, what: str, dtype: str, found: list[str], expected: list[str], whose: str = WHOSE
    ) -> None:
        pairs = list(zip(found, expected, strict=True))
        same = sum(a == b for a, b in pairs)
        odd = next((f"; {a!r} instead of {b!r}" for a, b in pairs if a != b), "")
        told = f"{same} of {len(expected)} the same{odd}"
        self.run.report.check(what, dtype, told, f"all {whose}", not odd)


def answers(run: Run) -> None:
    """Ways to make an answer, those that compile last."""
    all_of_them = Answers(run)
    ask_in_every_way(all_of_them)
    ask_the_quantised(all_of_them)
    ask_the_captured(all_of_them)


def ask_in_every_way(every: Answers) -> None:
    ways: list[tuple[str, str, Ask]] = [
        ("one by one", "plain", one_by_one),
        ("one by one, not running ahead", "plain", not_ahead),
        ("as a batch", "plain", as_batch),
        ("beams, as a batch", "beams", partial(as_batch, num_beams=3)),
        *(
            (f"{name}, as a batch", name, partial(as_batch, **options))
            for name, options in every.contrasts.items()
        ),
        ("a conversation's kept cache", "turns", in_turns),
        ("the likeliest of three answers", "score", likelier),
        ("the server's engine", "plain", among_others),
        *((f"drafts by {kind}", "plain", partial(one_by_one, draft=kind)) for kind in DRAFTS),
    ]
    for dtype, assistant in every.plain.items():
        for what, key, ask in ways:
            with running_ahead(True):
                found = ask(assistant, every.few if key == "turns" else every.asked)
            every.compare(what, dtype, found, every.right[key])
        sampled = [ask(assistant, every.asked, **RANDOM) for ask in (ahead, not_ahead)]
        every.compare("sampled, running ahead", dtype, *sampled, "as without")
        for kind in DRAFTS:
            drafted = not_ahead(assistant, every.asked, draft=kind, **RANDOM)
            every.compare(f"sampled, drafts by {kind}", dtype, drafted, sampled[1], "as without")


def ask_the_quantised(every: Answers) -> None:
    for kind in KINDS:
        for dtype in every.plain:
            found = ahead(every.load(dtype, quantize=kind), every.asked)
            every.compare(kind, dtype, found, every.right[kind])


def ask_the_captured(every: Answers) -> None:
    """Whose steps are compiled and recorded on a GPU."""
    run, asked, right = every.run, every.asked, every.right
    skips = graph_skips()
    fast = captured(every.plain["float32"], run.device)
    every.compare("captured", "float32", ahead(fast, asked), right["plain"])
    every.compare("captured, as a batch", "float32", as_batch(fast, asked), right["plain"])
    found = ahead(fast, asked, **every.contrasts["vcd"])
    every.compare("captured, vcd", "float32", found, right["vcd"])
    every.compare("captured, a conversation", "float32", in_turns(fast, every.few), right["turns"])
    found = ahead(captured(every.plain["bfloat16"], run.device), asked)
    every.compare("captured", "bfloat16", found, right["plain"])
    for kind in KINDS:
        small = captured_model(every.load("bfloat16", quantize=kind), run.device)
        every.compare(f"captured, {kind}", "bfloat16", ahead(small, asked), right[kind])
    if run.on_gpu:
        found = graph_skips() - skips
        run.report.check("captured: steps that did not become a graph", "", found, 0, found == 0)


def ahead(assistant: Assistant, asked: list, **options) -> list[str]:
    with running_ahead(True):
        return one_by_one(assistant, asked, **options)


def graph_skips() -> int:
    """How often torch.compile found that what it compiled cannot be recorded."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


# --- syncs ----------------------------------------------------------------------------------------


class CountWaits(TorchDispatchMode):
    """On a CPU: operations that on a GPU would wait for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        self.count += indexed or name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "unique",
        )
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(device: str) -> Iterator[Callable[[], int]]:
    """Count inside the operations for which the processor waits until the device has done its
    work."""
    if device == "cpu":
        with CountWaits() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def syncs(run: Run) -> None:
    """The waits of tokens after the second: what happens once per answer may wait."""
    check_that_waits_are_seen(run)
    assistant = load(BUNDLED, device=run.device, dtype="bfloat16" if run.on_gpu else "float32")
    ids = [assistant.tokenizer.encode(assistant.prompt(question)) for question in QUESTIONS]
    pixels = assistant.image_processor(PICTURES)
    for what, (model, rows, options, contrast) in ways_to_wait(run, assistant).items():
        streams = 1 if contrast is None else 2
        spliced = model.model.splice(ids[:rows] * streams, torch.cat([pixels[:rows]] * streams))
        chosen = Options(max_new_tokens=SYNC_TOKENS, min_new_tokens=SYNC_TOKENS, **options)
        for _ in range(2):  # the second time nothing is compiled or recorded
            with running_ahead(True):
                found = waits_of(steps(model.model, spliced, chosen, contrast=contrast), run.device)
        run.report.check(f"{what}: waits in {SYNC_TOKENS - 2} tokens", "", found, 0, found == 0)
    found = waits_of_beams(assistant, ids[:1], pixels[:1], run.device)
    run.report.measure("beams: waits per token", "", f"{found:.1f}")


def check_that_waits_are_seen(run: Run) -> None:
    number = torch.ones((), device=run.device)
    with waits(run.device) as count:
        for _ in range(3):
            float(number)
        found = count()
    run.report.check("a number that is read three times", "", found, "at least 3", found >= 3)


def ways_to_wait(run: Run, assistant: Assistant) -> dict[str, tuple]:
    """The cases by name: the model, the number of rows, the options and the contrast method."""
    penalties = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    ways = {
        "greedy": (assistant, 1, {}, None),
        "a batch": (assistant, 3, {}, None),
        "penalties": (assistant, 1, penalties, None),
        # its cut may leave the end alone, which is barred
        "contrast": (assistant, 1, {}, VCD(beta=0)),
    }
    if run.on_gpu:  # on a CPU, torch looks at what it draws from
        filters = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
        every = {"temperature": 1.0, **filters, "seed": 3}
        ways["sampled, by every filter"] = (assistant, 1, every, None)
    return ways | {"captured": (captured(assistant, run.device), 1, {}, None)}


def waits_of_beams(assistant: Assistant, ids: list, pixels: Tensor, device: str) -> float:
    """Waits per token: those of a longer answer minus those of a shorter one."""
    found = []
    for tokens in (4, 4 + SYNC_TOKENS):
        with waits(device) as count:
            length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            generate(assistant.model, ids, pixels, num_beams=3, **length)
            found.append(count())
    return (found[1] - found[0]) / SYNC_TOKENS


def waits_of(answer: Iterator, device: str) -> int:
    for _ in range(2):
        next(answer)
    with waits(device) as count:
        for _ in answer:
            pass
        return count()


# --- growth ---------------------------------------------------------------------------------------


def held(device: str) -> int:
    """Bytes of tensors: of a GPU what torch has allocated, else what Python can reach. Without cuBLAS's
    workspaces: a product makes them and a recording lets them go, and both may come last."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules' attributes warn when they are looked at
        for thing in gc.get_objects():
            kind = type(
                thing
            )  # a compiler's stand-ins hold nothing, and sparse tensors are none of ours
            if not issubclass(kind, Tensor) or issubclass(kind, FakeTensor):
                continue
            if thing.is_cpu and thing.layout == torch.strided:
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def abandon(assistant: Assistant, number: int) -> None:
    pieces = assistant.stream(PICTURES[number % 3], QUESTIONS[2], max_new_tokens=30)
    for _ in range(number % 4 + 1):
        next(pieces)
    if number % 2:
        pieces.close()


def growth(run: Run) -> None:
    """Make answers of different shapes, some of which are stopped early."""
    assistant = load(BUNDLED, device=run.device, dtype="bfloat16" if run.on_gpu else "float32")

    def one(number: int) -> None:
        picture, question = PICTURES[number % 3], QUESTIONS[number % len(QUESTIONS)]
        match number % 7:
            case 0:
                abandon(assistant, number)
            case 1:
                assistant.ask([picture] * 3, list(QUESTIONS), max_new_tokens=4 + number % 5)
            case 2:
                assistant.ask(picture, question, contrast=VCD(), max_new_tokens=4 + number % 3)
            case 3:
                assistant.ask(picture, question, num_beams=2 + number % 2, max_new_tokens=6)
            case 4:
                in_turns(assistant, [(picture, question), (PICTURES[0], QUESTIONS[0])])
            case _:
                assistant.ask(picture, question, max_new_tokens=4 + number % 9)

    check_growth(run, "answers", one, ANSWERS[run.size])


def growth_captured(run: Run) -> None:
    """Numbers of rows take turns, each with a graph of its own, which must be recorded once."""
    assistant = load(BUNDLED, device=run.device, dtype="bfloat16" if run.on_gpu else "float32")
    fast = captured(assistant, run.device)

    def one(number: int) -> None:
        if number % 3 == 0:
            abandon(fast, number)
        elif number % 3 == 1:
            fast.ask([PICTURES[0]] * 2, list(QUESTIONS[:2]), max_new_tokens=6)
        else:
            fast.ask(PICTURES[number % 3], QUESTIONS[number % 3], max_new_tokens=4 + number % 9)

    before = recorded_inputs()
    recorded = check_growth(run, "captured answers", one, ANSWERS[run.size] // 2)
    if run.on_gpu:
        found = f"{recorded_inputs() - recorded}; {recorded - before} in those before"
        same = recorded_inputs() == recorded
        run.report.check("inputs of graphs that were recorded in them", "", found, 0, same)


def check_growth(run: Run, what: str, work: Callable[[int], None], count: int) -> int:
    """What many answers leave behind. One round before counts for nothing; -> `recorded_inputs`
    after it."""
    for number in range(min(21, count)):
        work(number)
    before, recorded = held(run.device), recorded_inputs()
    taken = of_the_card(run.device)
    for number in range(count):
        work(number)
    grown = held(run.device) - before
    run.report.check(f"bytes more after {count} {what}", "", grown, "at most 0", grown <= 0)
    if run.on_gpu:
        wheres = ("in torch's reserve", "outside of it, where graphs are")
        for where, was, is_now in zip(wheres, taken, of_the_card(run.device), strict=True):
            more = f"{(is_now - was) / 1e6:.1f}"
            run.report.measure(f"MB more {where}, after {count} {what}", "", more)
    return recorded


def recorded_inputs() -> int:
    """What grows with every recording of a graph."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"]


def of_the_card(device: str) -> tuple[int, int]:
    """The bytes that torch has reserved, and the bytes that anybody has taken besides."""
    if device == "cpu":
        return 0, 0
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return reserved, total - free - reserved


# --- times ----------------------------------------------------------------------------------------


def wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """The bytes per second, read and written, of a copy."""
    source = torch.ones(
        COPIED["cpu" if device == "cpu" else "cuda"], dtype=torch.uint8, device=device
    )
    target, seconds = torch.empty_like(source), []
    for _ in range(12):
        wait_for(device)
        started = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds[2:])


class Clocked:
    """An answer's times: seconds to its first token and per token after it, each the median of the
    rounds."""

    def __init__(self, answer: Callable[[], list[float]], warm: int, rounds: int):
        """answer: makes one, and says when it was begun and when each token was there."""
        started = time.perf_counter()
        for _ in range(warm):
            answer()
        self.warming = time.perf_counter() - started
        times = [answer() for _ in range(rounds)]
        self.first = statistics.median(each[1] - each[0] for each in times)
        self.step = statistics.median((each[-1] - each[1]) / (len(each) - 2) for each in times)


def random_pixels(config: LlavaConfig) -> Tensor:
    side = config.vision.image_size
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def timed_answer(run: Run, model: Llava) -> Callable[[], list[float]]:
    config, tokens = model.config, TOKENS[run.size]
    pixels = random_pixels(config).to(run.device, torch.bfloat16)  # as theirs are
    options = Options(max_new_tokens=tokens, min_new_tokens=tokens)

    @torch.no_grad()
    def answer() -> list[float]:
        wait_for(run.device)
        times = [time.perf_counter()]
        for _ in steps(model, model.splice([prompt_ids(config)], pixels), options):
            times.append(time.perf_counter())
        return times

    return answer


def their_timed_answer(run: Run, theirs, compiled: bool) -> Callable[[], list[float]]:
    """transformers' generate, told to go on to the last token. compiled: its static cache and
    torch.compile."""
    tokens, config = TOKENS[run.size], run.config
    given = their_inputs(theirs, [prompt_ids(config)], random_pixels(config))
    del given["position_ids"]  # generate makes its own
    settings = {"cache_implementation": "static"} if compiled else {}
    theirs.generation_config.eos_token_id = None

    class Clock:
        """What generate tells a streamer: the prompt, then each token."""

        def __init__(self):
            self.times = [time.perf_counter()]

        def put(self, value: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer() -> list[float]:
        wait_for(run.device)
        clock = Clock()
        theirs.generate(
            **given, do_sample=False, streamer=clock, max_new_tokens=tokens, pad_token_id=config.pad_token_id,
            **settings,
        )  # fmt: skip
        return [clock.times[0], *clock.times[2:]]  # without the prompt

    return answer


def show_times(run: Run, what: str, dtype: str, clocked: Clocked, bandwidth: float) -> None:
    """The fraction is of a copy's bandwidth, were reading every weight and the cache all that a
    token takes."""
    read = bytes_read(run.config, dtype, 2, PROMPT + TOKENS[run.size] // 2)
    run.report.measure(f"{what}: seconds to the first token", dtype, f"{clocked.first:.4f}")
    fraction = f"{read / clocked.step / bandwidth:.0%} of bandwidth"
    found = f"{1 / clocked.step:.1f}, {fraction}; {clocked.warming:.1f} s to warm up"
    run.report.measure(f"{what}: tokens per second", dtype, found)


def timed(
    run: Run, quantize: str | None, compiled: bool, state: dict[str, Tensor] | None = None
) -> None:
    """Time our own model. state: weights that exist already."""
    if compiled and not run.on_gpu:
        run.report.skip("captured", "a CUDA graph needs a GPU")
        return
    state = random_state(run.config, torch.bfloat16, run.device) if state is None else state
    model = network(run.config, state, quantize=quantize)
    if quantize:  # what was quantised is let go
        state.clear()
        gc.collect()
    bandwidth = copy_bandwidth(run.device)
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    skips = graph_skips()
    if compiled:
        compile_decode(model)
    clocked = Clocked(timed_answer(run, model), warm=2 if compiled else 1, rounds=3)
    name = "minillava, captured" if compiled else "minillava"
    show_times(run, name, quantize or "bfloat16", clocked, bandwidth)
    if compiled:
        found = graph_skips() - skips
        run.report.check("captured: steps that did not become a graph", "", found, 0, found == 0)
    if run.on_gpu:
        peak = torch.cuda.max_memory_allocated() / 1e9
        weights = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()) / 1e9
        run.report.measure(
            f"{name}: GB at most, of which weights",
            quantize or "bfloat16",
            f"{peak:.2f}, {weights:.2f}",
        )


def plain(run: Run) -> None:
    run.report.measure(
        "GB per second of a copy, read and written", "", f"{copy_bandwidth(run.device) / 1e9:.0f}"
    )
    timed(run, None, compiled=False)


def transformers(run: Run, compiled: bool) -> None:
    if not find_spec("transformers"):
        run.report.skip("transformers", "it is not installed")
        return
    if compiled and not run.on_gpu:
        run.report.skip("transformers, static cache, compiled", "it compiles on a GPU only")
        return
    theirs = transformers_of(run.config, random_state(run.config, torch.bfloat16, run.device))
    theirs.set_attn_implementation("sdpa")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    clocked = Clocked(
        their_timed_answer(run, theirs, compiled), warm=2 if compiled else 1, rounds=2
    )
    name = "transformers, static cache" if compiled else "transformers, sdpa"
    if compiled:
        did = torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
        name += ", compiled" if did else ", not compiled"
    show_times(run, name, "bfloat16", clocked, copy_bandwidth(run.device))


def first(run: Run) -> None:
    """The first token of ours and of transformers, part by part, on the same weights."""
    state = random_state(run.config, torch.bfloat16, run.device)
    ids = [prompt_ids(run.config)]
    pixels = random_pixels(run.config).to(run.device, torch.bfloat16)
    with torch.no_grad():
        for what, part in our_parts(run, network(run.config, state), ids, pixels).items():
            show_part(run, f"minillava: {what}", part)
        if not find_spec("transformers"):
            run.report.skip("transformers", "it is not installed")
            return
        theirs = transformers_of(run.config, state)
        for what, part in their_parts(theirs, run.config, ids, pixels).items():
            show_part(run, f"transformers: {what}", part)


def our_parts(run: Run, model: Llava, ids: list, pixels: Tensor) -> dict[str, Callable]:
    """Functions for the parts of the first token, in their order, and for the whole."""
    options, picture = Options(max_new_tokens=8, min_new_tokens=8), Image.open(PICTURES[0])
    processor = ImageProcessor(run.config.vision.image_size)
    nothing = {"hidden_states": False, "attentions": False}
    features = model.encode_images(pixels)
    spliced = model.splice(ids, features)
    room = spliced.embeds.shape[1] + 8
    cache = KVCache(run.config.text, 1, room, dtype=torch.bfloat16, device=run.device)
    output = loop.prefill(model, spliced, cache, **nothing)

    def read() -> None:
        cache.truncate(0)
        loop.prefill(model, spliced, cache, **nothing)

    def choose() -> list[int]:
        logits = last_logits(output)
        sampler = Sampler(model.config, spliced.token_ids, options)
        return AsyncRead(sampler(logits)[0]).wait()

    def decode() -> None:
        loop.decode(model, token, cache, **nothing)
        cache.truncate(cache.length - 1)

    token = torch.tensor(choose(), device=run.device)
    return {
        "a picture's pixels, on the CPU": lambda: processor([picture]),
        "encode_images": lambda: model.encode_images(pixels),
        "splice": lambda: model.splice(ids, features),
        "prefill": read,
        "the first choice": choose,
        "a step after it": decode,
        "from pixels to the first token": lambda: next(
            steps(model, model.splice(ids, pixels), options)
        ),
    }


def their_parts(theirs, config: LlavaConfig, ids: list, pixels: Tensor) -> dict[str, Callable]:
    theirs.set_attn_implementation("sdpa")
    theirs.generation_config.eos_token_id = None
    given = their_inputs(theirs, ids, pixels)
    del given["position_ids"]  # they make their own
    one_token = {"do_sample": False, "max_new_tokens": 1, "pad_token_id": config.pad_token_id}
    return {
        "get_image_features": lambda: theirs.get_image_features(given["pixel_values"]),
        "forward": lambda: theirs(**given, use_cache=True, logits_to_keep=1),
        "generate, one token": lambda: theirs.generate(**given, **one_token),
    }


def show_part(run: Run, what: str, work: Callable[[], object]) -> None:
    """Milliseconds until it is done, and until this processor had given it to the GPU: medians."""
    begun, done = [], []
    for _ in range(7):
        wait_for(run.device)
        started = time.perf_counter()
        work()
        begun.append(time.perf_counter() - started)
        wait_for(run.device)
        done.append(time.perf_counter() - started)
    given, whole = (1e3 * statistics.median(seconds[2:]) for seconds in (begun, done))
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.on_gpu else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn of being asked twice
        with profile(activities=kinds) as seen:
            work()
            wait_for(run.device)
    kind = DeviceType.CUDA if run.on_gpu else DeviceType.CPU
    events = [event.name for event in seen.events() if event.device_type == kind]
    count = sum(not name.startswith(("Memcpy", "Memset")) for name in events)
    unit = "kernels" if run.on_gpu else "operations"
    found = f"{whole:.2f}, begun after {given:.2f}; {count} {unit}"
    run.report.measure(f"{what}: ms", "bfloat16", found)


# --- the whole ------------------------------------------------------------------------------------

# By value: what it does, and how many seconds it may take at most.
SECTIONS: dict[str, tuple[Callable[[Run], None], int]] = {
    "family": (family, 120),
    "doors": (doors, 200),
    "parity": (parity, 80),
    "answers": (answers, 150),
    "syncs": (syncs, 40),
    "growth": (growth, 60),
    "growth-captured": (growth_captured, 60),
    "plain": (plain, 40),
    "first": (first, 40),
    "captured": (partial(timed, quantize=None, compiled=True), 120),
    "transformers": (partial(transformers, compiled=False), 40),
    "int8": (partial(timed, quantize="int8", compiled=False), 40),
    "int4": (partial(timed, quantize="int4", compiled=False), 40),
    "int8-captured": (partial(timed, quantize="int8", compiled=True), 120),
    "transformers-compiled": (partial(transformers, compiled=True), 120),
    "int4-captured": (partial(timed, quantize="int4", compiled=True), 120),
}
LEAST = 5  # seconds with which no section is begun any more


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside once they are over, where the system has alarms."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def over(*_):
        raise TimeoutError(f"{seconds:.0f} s were over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_all(run: Run, names: Sequence[str], seconds: float) -> None:
    """Run each section by itself. An error becomes its last row, and the next section begins."""
    report = run.report
    for name in names:
        report.section = name
        work, most = SECTIONS[name]
        left = seconds - (time.monotonic() - report.started)
        if left < LEAST:
            report.skip("all of it", f"the {seconds:.0f} s were over")
            continue
        started, allowed = time.monotonic(), min(most, left)
        try:
            with at_most(allowed):
                work(run)
        except Exception as error:
            # whatever became of the alarm on its way here
            if time.monotonic() - started >= allowed:
                report.skip("the rest of it", f"its {allowed:.0f} s were over")
            else:
                traceback.print_exc()
                found = f"failed: {type(error).__name__}: {one_line(error)[:200]}"
                report.check("no error", "", found, "none", False)
        finally:
            let_go(run.device)
            report.measure("seconds in all", "", f"{time.monotonic() - started:.1f}")


def let_go(device: str) -> None:
    """Let go of what was compiled, recorded and allocated."""
    torch._dynamo.reset()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    try:
        if trees is not None and device != "cpu":
            trees.reset_cudagraph_trees()
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    except Exception:  # of a section that broke the GPU's context; the next one will say so
        traceback.print_exc()


def about(device: str) -> dict[str, object]:
    """What the numbers were measured on."""
    found: dict[str, object] = {"torch": torch.__version__, "python": platform.python_version()}
    if find_spec("transformers"):
        found["transformers"] = version("transformers")
    if device == "cpu":
        return {"card": "none (CPU)", **found}
    matmul = torch.backends.cuda.matmul
    return {
        "card": torch.cuda.get_device_name(),
        "memory": f"{torch.cuda.mem_get_info()[1] / 1e9:.0f} GB",
        "driver": driver(),
        "CUDA": torch.version.cuda,
        **found,
        "TF32 in products": matmul.allow_tf32,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "bfloat16 sums in bfloat16": matmul.allow_bf16_reduced_precision_reduction,
        "float16 sums in float16": matmul.allow_fp16_reduced_precision_reduction,
    }


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--size", choices=list(SIZES), default="7b", help="of what is timed (default: 7b)"
    )
    parser.add_argument(
        "--only",
        default=",".join(SECTIONS),
        metavar="NAMES",
        help=f"some of: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--seconds", type=float, default=390, help="after which nothing is begun (default: 390)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows here, as they come"
    )
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(
            f"--only: unknown {', '.join(unknown)}, expected some of: {', '.join(SECTIONS)}"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that this PyTorch can use; --device cpu runs what a CPU can")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: {args.json.parent}: no such folder")
    report = Report({"size": args.size, **about(args.device)}, args.json)
    try:
        check_all(Run(args.device, args.size, report), names, args.seconds)
    finally:
        print(report.table(), flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(run(main, verbose=True, prints=True))
