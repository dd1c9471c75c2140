#!/usr/bin/env python3
"""How fast minillava is, side by side with its peers and with what the machine can do at most.

    python tools/bench.py compare --size 1b              # a table: ours, transformers, and llama.cpp where installed
    python tools/bench.py growth --size 1b --png x.png   # time per token by context and by batch
    python tools/bench.py kernels                        # one product of a layer: ours, and torch's own
    python tools/bench.py quality                        # how far int8 and int4 are from float64, layer by layer
    python tools/bench.py contrast --size 0.5b           # what a second row of logits costs
    python tools/bench.py threads --size shapes,0.5b     # one thread or all, on an idle machine and on a busy one

Weights are random, of the true shapes. All variants take turns, round after round, and a figure is
the median of its rounds. Machines are shared: `others` is how many cores other processes kept busy
meanwhile; a figure with more than a few hundredths there is worth a second run.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_checkpoint import SIZES, config_of, make_checkpoint, make_gguf

from minillava.cache import KVCache
from minillava.cli import messages
from minillava.cli.arguments import Parser
from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig
from minillava.fast import speed_up
from minillava.fast.linear import linear
from minillava.fast.quantize import quantised_layer, quantize_tensor
from minillava.files.disk import check_writable, explain, write_whole
from minillava.generate.contrast import VCD
from minillava.llava import Llava, Spliced
from minillava.loop import Options, decode, prefill, steps
from minillava.options import DTYPES, KINDS

PROMPT = 625  # positions of the walk-through's picture question: the default
LARGE = 1 << 29  # numbers, 2 GiB in float32: more than any cache holds
RUN = Path(__file__).with_name("bench_run.py")
PICTURE = Path(__file__).resolve().parents[1] / "weights" / "shapes" / "example-1.png"
# a weight
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}
HEAD_BITS = {"q4_0": 6.5625}  # q6_K, in which llama.cpp leaves the head
ROWS = {  # by the name that --rows takes: peer, dtype, compiled
    "float32": ("minillava", "float32", False),
    "bfloat16": ("minillava", "bfloat16", False),
    "int8": ("minillava", "int8", False),
    "int4": ("minillava", "int4", False),
    "bfloat16-compiled": ("minillava", "bfloat16", True),
    "int8-compiled": ("minillava", "int8", True),
    "int4-compiled": ("minillava", "int4", True),
    "transformers-float32": ("transformers", "float32", False),
    "transformers-bfloat16": ("transformers", "bfloat16", False),
    "transformers-float32-compiled": ("transformers", "float32", True),
    "transformers-bfloat16-compiled": ("transformers", "bfloat16", True),
    "llama.cpp-bf16": ("llama.cpp", "bf16", False),
    "llama.cpp-q8_0": ("llama.cpp", "q8_0", False),
    "llama.cpp-q4_0": ("llama.cpp", "q4_0", False),
}
PACKAGES = {"transformers": ["transformers"], "llama.cpp": ["llama_cpp", "gguf"]}


@dataclass
class Timing:
    """seconds: per round. others: cores that other processes kept busy, per round."""

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the slowest round and the fastest, as a fraction of the
        median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def busy_elsewhere() -> float:
    """Seconds of processor time that were neither ours nor our children's, so far; 0 where the
    system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().split()[1:11]
        )
    except FileNotFoundError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def take_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Each variant does its work and returns the seconds that count; one round to warm up goes
    before."""
    timings = {name: Timing() for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            started, before = time.perf_counter(), busy_elsewhere()
            seconds = work()
            if number > 0:
                timings[name].seconds.append(seconds)
                timings[name].others.append(
                    (busy_elsewhere() - before) / (time.perf_counter() - started)
                )
    return timings


# --- compare: processes side by side --------------------------------------------------------------


@dataclass
class Limits:
    """What this machine does at most, as torch reaches it."""

    bandwidth: float  # bytes read per second
    # floating-point operations per second of a matrix product, in the dtype that is fastest
    rate: float

    @classmethod
    def measure(cls, device: str) -> "Limits":
        """The best of several ways and tries: a limit is what was reached once."""
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        large = torch.ones(LARGE, device=device)

        def best(work: Callable[[], object], tries: int) -> float:
            seconds = []
            for _ in range(tries):
                wait()
                started = time.perf_counter()
                work()
                wait()
                seconds.append(time.perf_counter() - started)
            return min(seconds)

        square, column = large.view(-1, 1 << 12), torch.ones(1 << 12, device=device)
        ways = [large.sum, large.max, lambda: torch.mv(square, column)]
        if device == "cuda":  # copying reads and writes
            ways.append(lambda: large[: LARGE // 2].copy_(large[LARGE // 2 :]))
        bandwidth = large.nbytes / min(best(way, 5) for way in ways)
        rates = []
        width = LARGE >> 17 if device == "cpu" else 8192
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = (
                torch.ones(rows, width, dtype=dtype, device=device)
                for rows in (max(640, width // 8), width)
            )
            rates.append(
                2 * x.numel() * len(weight) / best(lambda x=x, weight=weight: x @ weight.T, 5)
            )
        return cls(bandwidth, max(rates))


@dataclass
class Measured:
    """One row of the table: what bench_run.py reported, per round, and who else was busy."""

    name: str
    peer: str
    dtype: str
    rounds: list[dict] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    cold: float | None = None  # seconds to open and read every weight with nothing of it in memory

    def timing(self, key: str) -> Timing | None:
        values = [found[key] for found in self.rounds if found.get(key)]
        return Timing(values) if values else None


def compare(
    names: Sequence[str],
    folder: Path,
    size: str,
    device: str,
    tokens: int,
    rounds: int,
    questions: int,
    cold: bool,
) -> list[Measured]:
    """Start every row's process in turn, `rounds` times."""
    # ids that every vocabulary has
    text = [1, *range(5, PROMPT - config_of(size).tokens_per_image + 4)]
    ids = [*text[: len(text) // 2], IMAGE_TOKEN_INDEX, *text[len(text) // 2 :]]
    rows = [Measured(name, *ROWS[name][:2]) for name in names]
    for number in range(-1 if cold else 0, rounds):
        for row in rows:
            peer, dtype, compiled = ROWS[row.name]
            job = {
                "peer": peer,
                "dtype": dtype,
                "compile": compiled,
                "folder": str(folder),
                "device": device,
            }
            if number < 0:
                if peer == "llama.cpp":  # its weights cannot be touched from here
                    continue
                for path in folder.glob("*.safetensors"):
                    with path.open("rb") as file:
                        os.fsync(file.fileno())  # what is not on disk yet cannot be dropped
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found, _ = run(job | {"questions": 0, "touch": True})
                row.cold = found["open"] + found["touch"]
                continue
            job |= {
                "questions": questions + compiled,
                "tokens": tokens,
                "picture": str(PICTURE),
                "ids": ids,
            }
            if peer == "llama.cpp":
                at = ids.index(IMAGE_TOKEN_INDEX)
                job["ids"] = [*ids[:at], *[5] * config_of(size).tokens_per_image, *ids[at + 1 :]]
            found, others = run(job)
            row.rounds.append(found)
            row.others.append(others)
            speed = f", {1 / found['decode']:.2f} tokens/s" if found["decode"] else ""
            say(
                f"round {number + 1}: {row.name}: first token after {found['process']:.1f} s{speed}"
            )
    return rows


def run(job: dict, environment: dict[str, str] | None = None) -> tuple[dict, float]:
    """What one process reports, and how many cores others kept busy meanwhile.

    environment: variables that the process gets besides ours, or without one of ours that is
    None."""
    variables = os.environ | (environment or {})
    before, started = busy_elsewhere(), time.perf_counter()
    command = [sys.executable, str(RUN), str(time.monotonic()), json.dumps(job)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={k: v for k, v in variables.items() if v is not None},
    )
    if done.returncode:
        raise RuntimeError(f"{job['peer']} {job['dtype']} failed:\n{done.stderr[-2000:]}")
    others = (busy_elsewhere() - before) / (time.perf_counter() - started)
    return json.loads(done.stdout.splitlines()[-1]), others


def weights_read(text: TextConfig) -> int:
    """Weights that decoding a token reads: all of the language model but the table, of which it
    reads one row."""
    width, heads = (
        text.hidden_size,
        text.head_dim * (text.num_attention_heads + text.num_key_value_heads),
    )
    layer = 2 * width * heads + 3 * width * text.intermediate_size
    return text.num_hidden_layers * layer + width * text.vocab_size


def cache_size(config: LlavaConfig, positions: int) -> int:
    """How many numbers the cache of so many positions holds."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions


def table(rows: Sequence[Measured], config: LlavaConfig, limits: Limits, tokens: int) -> str:
    """Markdown. The fractions of the limits are those of decoding (bandwidth) and of reading the
    prompt (rate)."""
    text, read = config.text, weights_read(config.text)
    head = text.hidden_size * text.vocab_size
    # half is masked
    attention = 2 * text.num_hidden_layers * PROMPT**2 * text.num_attention_heads * text.head_dim
    operations = 2 * (read - head) * PROMPT + 2 * head + attention
    lines = [
        "| | start to first token, s | open, s | cold, s | peak GB | picture, s | prompt, s | of "
        "rate | tokens/s "
        "| spread | of bandwidth | others |",
        "|---|" + "---:|" * 11,
    ]
    for row in rows:
        process, opened, vision, first, step = (
            row.timing(key) for key in ("process", "open", "vision", "first", "decode")
        )
        prompt = first.median - (vision.median if vision else 0)
        cache = cache_size(config, PROMPT + tokens // 2) * row.rounds[0].get("width", 2)
        bits = (read - head) * BITS[row.dtype] + head * HEAD_BITS.get(row.dtype, BITS[row.dtype])
        compiled = ROWS[row.name][2]
        cells = [
            # it compiles at the second token, or at the first
            "" if compiled else f"{process.median:.1f}",
            f"{opened.median:.2f}",
            f"{row.cold:.1f}" if row.cold else "",
            f"{max(found['peak'] for found in row.rounds) / 1e9:.2f}",
            f"{vision.median:.2f}" if vision else "",
            f"{prompt:.2f}",
            f"{operations / prompt / limits.rate:.0%}",
            f"{1 / step.median:.2f}",
            f"±{step.spread:.0%}" if len(step.seconds) > 1 else "",
            f"{(bits / 8 + cache) / step.median / limits.bandwidth:.0%}",
            f"{statistics.median(row.others):.2f}",
        ]
        lines.append(f"| {row.peer} {row.dtype}{', compiled' * compiled} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(rows: Sequence[Measured], config: LlavaConfig, tokens: int) -> str:
    """Markdown: the ratios that MEASUREMENTS.md quotes, each of two rows of the same run."""
    known = {row.name: row for row in rows}

    def prompt(row: Measured) -> float:
        vision = row.timing("vision")
        return row.timing("first").median - (vision.median if vision else 0)

    def speed(row: Measured) -> float:
        return 1 / row.timing("decode").median

    peers = [name for name in known if name.startswith("transformers")]
    lines = ["| ratio | |", "|---|---:|"]
    for ours in ("float32", "bfloat16"):
        for peer in peers:
            if ours in known and ours in peer:
                a, b = known[ours], known[peer]
                if not ROWS[peer][2]:  # it compiles in the midst of it
                    whole = a.timing("process").median / b.timing("process").median
                    lines.append(f"| {ours}: start to first token, to {peer}'s | {whole:.2f} |")
                both = b.timing("first").median / a.timing("first").median
                lines.append(
                    f"| {ours}: speed of reading picture and prompt, to {peer}'s | {both:.2f} |"
                )
                lines.append(f"| {ours}: tokens/s, to {peer}'s | {speed(a) / speed(b):.2f} |")
    for small in ("int8", "int4"):
        if small in known and "bfloat16" in known:
            a, b = known[small], known["bfloat16"]
            lines.append(f"| {small}: tokens/s, to our bfloat16's | {speed(a) / speed(b):.2f} |")
            lines.append(
                f"| {small}: time of the prompt, to our bfloat16's | {prompt(a) / prompt(b):.2f} |"
            )
    for ours, peer in (
        ("bfloat16", "llama.cpp-bf16"),
        ("int8", "llama.cpp-q8_0"),
        ("int4", "llama.cpp-q4_0"),
    ):
        if ours in known and peer in known:
            a, b = known[ours], known[peer]
            lines.append(f"| {ours}: tokens/s, to {peer}'s | {speed(a) / speed(b):.2f} |")
            lines.append(
                f"| {ours}: time of the prompt, to {peer}'s | {prompt(a) / prompt(b):.2f} |"
            )
    for name in ("float32", "bfloat16", "int8", "int4"):
        if name in known:
            found = max(known[name].rounds, key=lambda found: found["peak"])
            cache = cache_size(config, PROMPT + tokens) * found["width"]
            expected = 1.05 * found["weights"] + cache + 0.3e9
            lines.append(
                f"| {name}: peak memory, to 1.05 × weights + cache + 300 MB | "
                f"{found['peak'] / expected:.2f} |"
            )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- growth, quality, contrast: the language model alone, in this process -------------------------


def random_model(size: str, dtype: torch.dtype, quantize: str | None = None) -> Llava:
    """A language model of that size with random weights; a CLIP is not needed to decode, so it has
    none."""
    with torch.device("meta"):
        model = Llava(config_of(size))
    model.vision_tower = model.projector = None
    model = model.to(dtype).to_empty(device="cpu")
    speed_up(model)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.requires_grad_(False)
        if p.dim() == 1:
            p.fill_(1)
        else:
            p.copy_(torch.randn(p.shape[-1], generator=generator) * 0.02)  # one random row, and ...
            # ... a factor for each: quick to make
            p.mul_(torch.randn(p.shape[0], 1, generator=generator))
    if quantize:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, quantised_layer(quantize_tensor(layer.weight, quantize)))
    return model


CONTEXTS = (128, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)


def growth(
    size: str, dtypes: Sequence[str], tokens: int, rounds: int
) -> dict[tuple[str, str, int], Timing]:
    """Seconds per step by (dtype, "context" or "batch", how many): one row behind ever longer
    contexts, and ever more rows behind PROMPT positions."""

    def step_time(model: Llava, rows: int, context: int) -> float:
        dtype = model.language_model.embed_tokens.weight.dtype
        cache = KVCache(model.config.text, rows, context + tokens, dtype=dtype, device="cpu")
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(0.01)
        cache.advance(context)
        started, ids = time.perf_counter(), torch.ones(rows, dtype=torch.long)
        with torch.no_grad():
            for _ in range(tokens):
                decode(model, ids, cache, hidden_states=False, attentions=False)
        return (time.perf_counter() - started) / tokens

    found = {}
    for name in dtypes:  # one model at a time; what is compared is the same model with more to do
        dtype = getattr(torch, name) if name in DTYPES else torch.bfloat16
        model = random_model(size, dtype, None if name in DTYPES else name)
        variants = {
            (name, "context", n): lambda n=n, m=model: step_time(m, 1, n - tokens) for n in CONTEXTS
        }
        variants |= {
            (name, "batch", n): lambda n=n, m=model: step_time(m, n, PROMPT) for n in BATCHES
        }
        found |= take_turns(variants, rounds)
        say(f"{name}: done")
    return found


def growth_table(found: dict[tuple[str, str, int], Timing]) -> str:
    lines = []
    for kind, counts in (("context", CONTEXTS), ("batch", BATCHES)):
        lines += ["", f"| ms per step, {kind} | " + " | ".join(map(str, counts)) + " | others |"]
        lines += ["|---|" + "---:|" * (len(counts) + 1)]
        for name in dict.fromkeys(name for name, _, _ in found):
            timings = [found[name, kind, n] for n in counts]
            cells = [f"{1000 * timing.median:.0f}" for timing in timings]
            others = statistics.median(other for timing in timings for other in timing.others)
            lines.append(f"| {name} | {' | '.join(cells)} | {others:.2f} |")
            if kind == "batch":
                gains = [
                    n * timings[0].median / timing.median
                    for n, timing in zip(counts, timings, strict=True)
                ]
                lines.append(
                    f"| {name}, tokens per second to batch 1 | "
                    f"{' | '.join(f'{g:.1f}' for g in gains)} | |"
                )
    return "\n".join(lines[1:])


def growth_plot(found: dict[tuple[str, str, int], Timing], title: str, path: Path) -> None:
    """Two panels, a line per dtype; bars from the fastest round to the slowest. Raises ImportError
    naming the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "--png draws with matplotlib; install it with: pip install -e '.[bench]'"
        ) from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, kind, label in zip(
        figure.subplots(1, 2), ("context", "batch"), ("positions", "rows"), strict=True
    ):
        for name in dict.fromkeys(name for name, _, _ in found):
            chosen = {
                n: timing for (of, what, n), timing in found.items() if (of, what) == (name, kind)
            }
            middle = [1000 * timing.median for timing in chosen.values()]
            low = [
                m - 1000 * min(timing.seconds)
                for m, timing in zip(middle, chosen.values(), strict=True)
            ]
            high = [
                1000 * max(timing.seconds) - m
                for m, timing in zip(middle, chosen.values(), strict=True)
            ]
            axis.errorbar(list(chosen), middle, yerr=[low, high], marker="o", capsize=3, label=name)
        axis.set(xlabel=f"{kind} ({label})", ylabel="ms per step", ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def quality(
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (11008, 4096), (4096, 11008)),
) -> list[dict]:
    """Layers [N, C] of random weights at each precision: the distance to float64 as a fraction of
    what they make, for one row and for many."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n, c in shapes:
        weight, x = (torch.randn(rows, c, generator=generator) for rows in (n, 32))
        narrow = weight.bfloat16()
        layers = {
            "float32": partial(linear, weight=weight),
            "bfloat16": lambda x, narrow=narrow: linear(x.bfloat16(), narrow),
        }
        layers |= {kind: quantised_layer(quantize_tensor(weight, kind)) for kind in KINDS}
        for rows in (1, 32):
            exact = x[:rows].double() @ weight.double().T
            errors = {
                name: float((layer(x[:rows]) - exact).norm() / exact.norm())
                for name, layer in layers.items()
            }
            found.append({"shape": [n, c], "rows": rows, **errors})
    return found


def quality_table(found: Sequence[dict]) -> str:
    kinds = list(found[0])[2:]
    lines = [f"| error of a layer, % | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for row in found:
        cells = [f"{100 * row[kind]:.2g}" for kind in kinds]
        lines.append(
            f"| {row['shape'][0]} × {row['shape'][1]}, {row['rows']} row(s) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


ROW_COUNTS = (1, 2, 4, 8, 16, 32, 625)


def kernels(rounds: int, n: int = 11008, c: int = 4096) -> dict[tuple[str, int], Timing]:
    """Seconds that one product of a layer [N, C] takes, by (way, how many rows); each weight is
    read from memory."""
    weight = torch.randn(n, c, generator=torch.Generator().manual_seed(0))
    variants = {}
    for name, dtype, bits in (("float32", torch.float32, 32), ("bfloat16", torch.bfloat16, 16)):
        copies = [weight.to(dtype).clone() for _ in range(copies_of(n * c * bits // 8))]
        for way, product in ((f"{name}, torch's", F.linear), (name, linear)):
            variants |= {
                (way, rows): partial(one_product, product, copies, torch.randn(rows, c).to(dtype))
                for rows in ROW_COUNTS
            }
    for kind in KINDS:
        stored = quantize_tensor(weight, kind)
        small = {suffix: tensor.nbytes for suffix, tensor in stored.items()}
        layers = [
            quantised_layer({suffix: tensor.clone() for suffix, tensor in stored.items()})
            for _ in range(copies_of(sum(small.values())))
        ]
        call = lambda x, layer: layer(x)  # noqa: E731
        variants |= {
            (kind, rows): partial(one_product, call, layers, torch.randn(rows, c))
            for rows in ROW_COUNTS
        }
    with torch.no_grad():
        return take_turns(variants, rounds)


def copies_of(size: int) -> int:
    """So many that the first is in no cache any more when its turn comes again: four times 64
    MB."""
    return -(-(LARGE >> 1) // size)


def one_product(product: Callable, weights: list, x: torch.Tensor) -> float:
    weights.append(weights.pop(0))
    started = time.perf_counter()
    product(x, weights[0])
    return time.perf_counter() - started


def kernels_table(found: dict[tuple[str, int], Timing]) -> str:
    counts = list(dict.fromkeys(rows for _, rows in found))
    lines = [f"| ms, rows | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    for way in dict.fromkeys(way for way, _ in found):
        lines.append(
            f"| {way} | {' | '.join(f'{1000 * found[way, rows].median:.1f}' for rows in counts)} |"
        )
    return "\n".join(lines)


def contrast(model: Llava, tokens: int, rounds: int, prompt: int) -> dict[str, Timing]:
    """Seconds per decoded token after a prompt of so many positions: plain, with a second row in
    the same batch, and with a second pass of its own."""
    config, dtype = model.config.text, model.language_model.embed_tokens.weight.dtype
    embeds = (
        torch.randn(2, prompt, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(
            dtype
        )
        * 0.02
    )

    def spliced(rows: int) -> Spliced:
        ids = [torch.zeros(prompt, dtype=torch.long)] * rows
        return Spliced(embeds[:rows], None, None, [[] for _ in ids], ids)

    def loop(rows: int) -> float:
        method = VCD() if rows == 2 else None
        made = steps(
            model,
            spliced(rows),
            Options(max_new_tokens=tokens + 1, min_new_tokens=tokens + 1),
            contrast=method,
        )
        next(made)  # the prefill
        started = time.perf_counter()
        for _ in made:
            pass
        return (time.perf_counter() - started) / tokens

    @torch.no_grad()
    def two_passes() -> float:
        caches = [KVCache(config, 1, prompt + tokens, dtype=dtype, device="cpu") for _ in range(2)]
        wanted = {"hidden_states": False, "attentions": False}
        method, outputs = VCD(), []
        for row, cache in enumerate(caches):
            part = spliced(2)
            part = Spliced(part.embeds[row : row + 1], None, None, [[]], part.input_ids[:1])
            outputs.append(prefill(model, part, cache, **wanted).logits[:, -1].float())
        started = time.perf_counter()
        for step in range(tokens):
            token = method(*outputs, step).argmax(-1)
            outputs = [
                decode(model, token, cache, **wanted).logits[:, -1].float() for cache in caches
            ]
        return (time.perf_counter() - started) / tokens

    variants = {
        "plain": lambda: loop(1),
        "contrast, two rows of a batch": lambda: loop(2),
        "contrast, two passes": two_passes,
    }
    return take_turns(variants, rounds)


def contrast_table(timings: dict[str, Timing]) -> str:
    first = next(iter(timings.values())).median
    lines = ["| decode | ms per token | spread | ratio | others |", "|---|---:|---:|---:|---:|"]
    for name, timing in timings.items():
        cells = (
            f"{1000 * timing.median:.1f}",
            f"±{timing.spread:.0%}",
            f"{timing.median / first:.2f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(timing.others):.2f} |")
    return "\n".join(lines)


# --- threads: processes with one thread or all, idle and beside busy loops ------------------------

POLICIES = {  # by the name in the table: variables that libgomp and torch read when they are loaded
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "all": {},
    "all, spin 100": {"GOMP_SPINCOUNT": "100"},
    "all, spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "all, passive": {"OMP_WAIT_POLICY": "passive"},
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes beside ours that never wait, as on a shared machine."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def threads(
    folders: dict[str, Path], tokens: int, rounds: int
) -> dict[tuple[str, int, str], dict[str, Timing]]:
    """Milliseconds to the first token and per further one, by (size, busy loops, policy): every
    policy takes its turn in each round, in a process of its own, on an idle machine and beside one
    and two busy loops."""
    found: dict[tuple[str, int, str], dict[str, Timing]] = {}
    for number in range(rounds):
        for size, folder in folders.items():
            ids = [1, *range(5, 40), IMAGE_TOKEN_INDEX, 5, 6]
            job = {
                "peer": "minillava",
                "dtype": "auto",
                "folder": str(folder),
                "device": "cpu",
                "tokens": tokens,
            }
            job |= {"questions": 2, "picture": str(PICTURE), "ids": ids}  # the first warms up
            for loops in (0, 1, 2):
                with busy_loops(loops):
                    for policy, variables in POLICIES.items():
                        measured, others = run(job, dict.fromkeys(THREAD_VARIABLES) | variables)
                        timings = found.setdefault(
                            (size, loops, policy), {"first": Timing(), "decode": Timing()}
                        )
                        for key, timing in timings.items():
                            timing.seconds.append(measured[key])
                            timing.others.append(others)
        say(f"round {number + 1} of {rounds}: done")
    return found


def threads_table(found: dict[tuple[str, int, str], dict[str, Timing]]) -> str:
    lines = [
        f"| ms | busy loops | {' | '.join(POLICIES)} | others |",
        "|---|---:|" + "---:|" * (len(POLICIES) + 1),
    ]
    for size, loops, _ in dict.fromkeys((size, loops, None) for size, loops, _ in found):
        for key, text in (("first", "first token"), ("decode", "each further token")):
            timings = [found[size, loops, policy][key] for policy in POLICIES]
            cells = " | ".join(f"{1000 * timing.median:.1f}" for timing in timings)
            others = statistics.median(other for timing in timings for other in timing.others)
            lines.append(f"| {size}, {text} | {loops} | {cells} | {others:.2f} |")
    return "\n".join(lines)


# --- the door -------------------------------------------------------------------------------------


def machine(device: str) -> str:
    """What this ran on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in cpu.read_text().splitlines()
        if line.startswith("model name")
    ]
    name, kind = names[0] if names else "a processor", torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} threads of {name}, {kind}, torch {torch.__version__}"


def default_rows(device: str) -> list[str]:
    """Ours at every precision, and every peer that is installed."""
    there = {
        "minillava",
        *(peer for peer, packages in PACKAGES.items() if all(map(find_spec, packages))),
    }
    compiled = device != "cpu"  # on a CPU compiling gains nothing, and takes a minute
    return [
        name for name, (peer, _, extra) in ROWS.items() if peer in there and (compiled or not extra)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["compare", "growth", "kernels", "quality", "contrast", "threads"]
    )
    parser.add_argument(
        "--size", choices=SIZES, default="1b", help="random weights of this shape (default 1b)"
    )
    parser.add_argument(
        "--sizes",
        default="shapes,0.04b,0.13b,0.5b",
        help="threads: these, `shapes` being the bundled model",
    )
    parser.add_argument(
        "--rows",
        metavar="NAMES",
        help=f"compare: some of {','.join(ROWS)} (default: all installed)",
    )
    parser.add_argument(
        "--folder", type=Path, help="compare: keep the checkpoints here (default: made and removed)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--questions", type=int, default=1, help="compare: asked per process; the last is timed"
    )
    parser.add_argument(
        "--no-cold", action="store_true", help="compare: leave out loading from disk"
    )
    parser.add_argument(
        "--dtypes", default="float32,bfloat16,int8,int4", help="growth: which lines"
    )
    parser.add_argument("--png", type=Path, help="growth: draw it here")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="contrast")
    parser.add_argument(
        "--prompt", type=int, default=PROMPT, help=f"contrast: positions before (default {PROMPT})"
    )
    parser.add_argument("--tokens", type=int, default=16, help="decoded per round (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument(
        "--json", action="store_true", help="every figure as JSON, instead of tables"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.tokens < 1 or options.questions < 1:
        parser.error("--rounds, --tokens and --questions need at least 1")
    if options.png and (not options.png.name or not options.png.absolute().parent.is_dir()):
        parser.error(f"--png {options.png}: no such folder")
    if options.png:
        try:
            check_writable(options.png)  # before minutes of measuring
        except OSError as error:
            parser.exit(1, f"error: {explain(error)}\n")
    if options.device != "cpu" and options.what != "compare":
        parser.error(
            f"--device {options.device} is for compare: {options.what} measures the processor"
        )
    if options.what == "growth" and options.tokens >= min(CONTEXTS):
        parser.error(
            f"--tokens is {options.tokens}, expected less than the shortest context, "
            f"{min(CONTEXTS)}"
        )
    command = " ".join(["python tools/bench.py", *(sys.argv[1:] if argv is None else argv)])
    head = f"`{command}`, {date.today()}, {machine(options.device)}"
    if options.what == "compare":
        return _compare(parser, options, head)
    if options.what == "threads":
        return _threads(parser, options, head)
    if options.what == "quality":
        found = quality()
        print(json.dumps(found) if options.json else f"{head}\n\n{quality_table(found)}")
        return 0
    if options.what == "growth":
        dtypes = options.dtypes.split(",")
        if unknown := set(dtypes) - {*DTYPES, *KINDS}:
            parser.error(f"--dtypes: unknown {', '.join(sorted(unknown))}")
        found = growth(options.size, dtypes, options.tokens, options.rounds)
        if options.png:
            growth_plot(
                found, f"{options.size}, random weights, {machine(options.device)}", options.png
            )
        timings, text = found, growth_table(found)
    elif options.what == "kernels":
        timings = kernels(options.rounds)
        text = kernels_table(timings)
    else:
        model = random_model(options.size, getattr(torch, options.dtype))
        timings = contrast(model, options.tokens, options.rounds, options.prompt)
        text = contrast_table(timings)
    if options.json:
        print(json.dumps([{"name": name, **vars(timing)} for name, timing in timings.items()]))
    else:
        print(f"{head}\n\n{text}")
    return 0


def _compare(parser: argparse.ArgumentParser, options: argparse.Namespace, head: str) -> int:
    names = options.rows.split(",") if options.rows else default_rows(options.device)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: unknown {', '.join(unknown)}, expected some of: {', '.join(ROWS)}")
    with ExitStack() as stack:
        home = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = home / f"{options.size}-bfloat16"
        say(f"making {folder}")
        make_checkpoint(folder, options.size, torch.bfloat16)
        for name in names:
            if name.startswith("llama.cpp"):
                make_gguf(folder, ROWS[name][1])
        say("measuring what this machine can do")
        limits = Limits.measure(options.device)
        arguments = (options.tokens + 1, options.rounds, options.questions, not options.no_cold)
        rows = compare(names, folder, options.size, options.device, *arguments)
    if options.json:
        print(json.dumps({"limits": vars(limits), "rows": [vars(row) for row in rows]}))
        return 0
    config = config_of(options.size)
    print(
        f"{head}; {weights_read(config.text) / 1e9:.2f} billion weights read per token, {PROMPT} "
        "positions,",
        end=" ",
    )
    print(
        f"{options.tokens} tokens, {options.rounds} round(s); at most {limits.bandwidth / 1e9:.1f} "
        "GB/s",
        end=" ",
    )
    print(f"and {limits.rate / 1e12:.3f} TFLOP/s\n\n{table(rows, config, limits, options.tokens)}")
    print(f"\n{ratios(rows, config, options.tokens)}")
    return 0


def _threads(parser: argparse.ArgumentParser, options: argparse.Namespace, head: str) -> int:
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in ("shapes", *SIZES)]:
        parser.error(
            f"--sizes: unknown {', '.join(unknown)}, expected some of: shapes, {', '.join(SIZES)}"
        )
    with ExitStack() as stack:
        home = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {
            size: PICTURE.parent if size == "shapes" else home / f"{size}-bfloat16"
            for size in sizes
        }
        for size, folder in folders.items():
            if size != "shapes":
                make_checkpoint(folder, size, torch.bfloat16)
        found = threads(folders, options.tokens + 1, options.rounds)
    if options.json:
        rows = [{"size": a, "busy": b, "policy": c, "timings": {k: vars(t) for k, t in timings.items()}}
                for (a, b, c), timings in found.items()]  # fmt: skip
        print(json.dumps(rows))
    else:
        print(f"{head}\n\n{threads_table(found)}")
    return 0


if __name__ == "__main__":
    interrupts.end(lambda: messages.run(main, verbose=True, prints=True))
