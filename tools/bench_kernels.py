#!/usr/bin/env python3
"""One product of a layer, by every way that is known: which is the fastest on this processor, and
is it the one that minillava takes?

    python tools/bench.py kernels                                    # all of it, for a quarter of an hour
    python tools/bench.py kernels --layers 11008x4096 --dtypes int8  # a part of it
    python tools/bench.py kernels --json > found.json                # every round of every way
    python tools/bench.py kernels --read found.json                  # the tables of what was found before
    python tools/bench.py kernels --bits                             # whose bits depend on who shares a pass
    python tools/bench.py kernels --pieces 1b                        # what --same-bits costs a prompt

Weights are random and read from memory: so many copies take turns that none is in a cache. The ways
to one product take turns, too, round after round; a figure is the median of its rounds. A way that
took more than SLOW times as long as the fastest while warming up keeps that one figure.

The table in minillava/fast/processor.py is written by hand from what this prints. To see an older
processor's kernels, cap all three libraries (see .ci/processors): ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_checkpoint import SIZES, config_of
from bench_parts.clock import Neighbours, Timing, say, take_turns
from bench_parts.growth import random_model
from bench_parts.probe import machine

from minillava.cache import KVCache
from minillava.cli import messages
from minillava.cli.arguments import Parser
from minillava.fast import fused, processor, row_by_row, same_bits
from minillava.fast.linear import OF_ONE_ROW, PRODUCTS, linear
from minillava.fast.quantize import BLOCKS, QuantisedLinear, quantised_layer, quantize_tensor
from minillava.llama import LanguageModel

ROWS = (1, 2, 4, 8, 16, 32, 640)  # the last one is a prompt
STORED = ("float32", "bfloat16", "int8", "int4")
MODELS = ("7b", "1b")
PROMPT = 625  # positions of a picture question, after which attention is measured
ENOUGH = 1 << 28  # bytes of weights that take turns: more than any cache of one processor holds
LEAST = 5e-3  # seconds that a round of one way takes at least, in as many calls as that needs
SLOW = 2.0
TOLERANCE = 1.10  # the way taken may be slower than the best by no more than this

Product = Callable[[Tensor], object]


@dataclass
class Cell:
    """Every way to one product: rows of x with a weight [n, c]. taken: ours. seconds: by way, per
    round. others: cores that other processes kept busy meanwhile."""

    stored: str
    n: int
    c: int
    rows: int
    taken: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: float = 0.0

    @property
    def medians(self) -> dict[str, float]:
        return {way: statistics.median(found) for way, found in self.seconds.items()}

    @property
    def fastest(self) -> str:
        return min(self.medians, key=self.medians.__getitem__)

    @property
    def ratio(self) -> float:
        """The time of the way taken, as a multiple of the fastest way's."""
        return self.medians[self.taken] / self.medians[self.fastest]


def layers_of(models: Sequence[str]) -> list[tuple[int, int]]:
    """The shapes [N, C] of their linear layers, the heads last."""
    texts = [config_of(name).text for name in models]
    shapes = [
        shape
        for width, inner in ((text.hidden_size, text.intermediate_size) for text in texts)
        for shape in ((width, width), (inner, width), (width, inner))
    ]
    return [*shapes, *((text.vocab_size, text.hidden_size) for text in texts)]


LAYERS = layers_of(MODELS)
HEADS = LAYERS[-len(MODELS) :]


def ways_of(stored: str, rows: int) -> list[str]:
    if stored in ("int8", "int4"):
        fast = processor.has_fast_bfloat16()
        return ["kernel", *(way for way in BLOCKS if fast or not way.startswith("bfloat16"))]
    return [
        way
        for way in PRODUCTS
        if (way not in OF_ONE_ROW or rows == 1) and (stored == "bfloat16" or "blocks" not in way)
    ]


def weights(stored: str, n: int, c: int) -> list:
    """Copies of one weight, as a tensor or as a layer."""
    weight = torch.randn(n, c, generator=torch.Generator().manual_seed(0))
    if stored in ("int8", "int4"):
        first = quantised_layer(quantize_tensor(weight, stored))
        size = sum(tensor.nbytes for tensor in first.buffers())
    else:
        first = weight.to(getattr(torch, stored))
        size = first.nbytes
    return [first, *(copy.deepcopy(first) for _ in range(math.ceil(ENOUGH / size) - 1))]


def by(way: str, weight: Tensor | QuantisedLinear, x: Tensor) -> Tensor:
    return weight.by(way, x) if isinstance(weight, QuantisedLinear) else PRODUCTS[way](x, weight)


def round_of(work: Callable[[object], object], turns: list, calls: int) -> float:
    """Seconds of one call."""
    spent = 0.0
    for _ in range(calls):
        turns.append(turns.pop(0))
        started = time.perf_counter()
        work(turns[0])
        spent += time.perf_counter() - started
    return spent / calls


@torch.no_grad()
def measure(stored: str, n: int, c: int, row_counts: Sequence[int], rounds: int) -> Iterator[Cell]:
    turns = weights(stored, n, c)
    for rows in row_counts:
        x = torch.randn(rows, c, generator=torch.Generator().manual_seed(1)).to(dtype_of(stored))
        work = {
            way: lambda weight, way=way, x=x: by(way, weight, x) for way in ways_of(stored, rows)
        }
        cell = Cell(stored, n, c, rows, processor.way(stored, rows, (n, c)))
        warm = {way: round_of(call, turns, 1) for way, call in work.items()}
        warm = {
            way: min(s, round_of(work[way], turns, 1)) if s < 1 else s for way, s in warm.items()
        }
        going = {
            way: seconds
            for way, seconds in warm.items()
            if seconds <= SLOW * min(warm.values()) or way == cell.taken
        }
        neighbours = Neighbours()
        cell.seconds = {way: [] if way in going else [seconds] for way, seconds in warm.items()}
        for _ in range(rounds):
            for way, seconds in going.items():
                calls = min(32, math.ceil(LEAST / seconds))
                cell.seconds[way].append(round_of(work[way], turns, calls))
        cell.others = sum(neighbours.taken().values())
        yield cell


def table(cells: Sequence[Cell]) -> str:
    """Markdown, milliseconds: the fastest in bold, ours with a star."""
    lines = []
    for stored, n, c in dict.fromkeys((cell.stored, cell.n, cell.c) for cell in cells):
        of = [cell for cell in cells if (cell.stored, cell.n, cell.c) == (stored, n, c)]
        ways = list(dict.fromkeys(way for cell in of for way in cell.seconds))
        lines += [
            "",
            f"| {stored}, {n} × {c}, ms for rows | {' | '.join(str(cell.rows) for cell in of)} |",
        ]
        lines += ["|---|" + "---:|" * len(of)]
        for way in ways:
            lines.append(f"| {way} | {' | '.join(shown(cell, way) for cell in of)} |")
        lines.append(f"| ours, to the fastest | {' | '.join(f'{cell.ratio:.2f}' for cell in of)} |")
        lines.append(f"| others | {' | '.join(f'{cell.others:.2f}' for cell in of)} |")
    return "\n".join(lines[1:])


def shown(cell: Cell, way: str) -> str:
    if way not in cell.seconds:
        return ""
    number = f"{1000 * cell.medians[way]:.3g}"
    return (f"**{number}**" if way == cell.fastest else number) + " *" * (way == cell.taken)


def verdict(cells: Sequence[Cell]) -> str:
    slow = [cell for cell in cells if cell.ratio > TOLERANCE]
    lines = [
        f"ours is at most {TOLERANCE - 1:.0%} slower than the fastest in {len(cells) - len(slow)} of {len(cells)} cells"
    ]
    lines += [
        f"- {cell.stored}, {cell.n} × {cell.c}, {cell.rows} row(s): {cell.taken} takes {cell.ratio:.2f} times as long as {cell.fastest}"
        for cell in slow
    ]
    return "\n".join(lines)


@torch.no_grad()
def bits(stored: str, n: int, c: int) -> int:
    """Up to how many rows our product gives each row the bits that it has alone."""
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, c, generator=draw) for rows in (n, max(same_bits.ROWS)))
    if stored in ("int8", "int4"):
        return same_bits.rows_alike(quantised_layer(quantize_tensor(weight, stored)), x)
    dtype = getattr(torch, stored)
    narrow = weight.to(dtype)
    return same_bits.rows_alike(lambda row: linear(row, narrow), x.to(dtype))


@torch.no_grad()
def bits_of_attention(stored: str, model: str) -> int:
    """The same of attention with one query, PROMPT cached positions and a model's heads."""
    text, draw = config_of(model).text, torch.Generator().manual_seed(0)
    rows, heads = max(same_bits.ROWS), text.num_attention_heads
    q, k, v = (
        torch.randn(rows, heads, keys, text.head_dim, generator=draw).to(dtype_of(stored))
        for keys in (1, PROMPT, PROMPT)
    )
    return same_bits.queries_alike(fused, q, k, v)


def bits_found(options: argparse.Namespace) -> list[dict]:
    found = []
    for n, c in options.layers:
        found.append({"of": f"{n} × {c}", **{s: bits(s, n, c) for s in options.dtypes}})
        say(f"{n} x {c}: done")
    for model in MODELS:
        heads = {stored: bits_of_attention(stored, model) for stored in options.dtypes}
        found.append({"of": f"attention of {model}", **heads})
    return found


def bits_table(found: Sequence[dict]) -> str:
    names = list(found[0])[1:]
    lines = [
        f"| same bits up to so many rows | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    lines += [f"| {row['of']} | {' | '.join(str(row[name]) for name in names)} |" for row in found]
    return "\n".join(lines)


PIECES = (128, 256, 512)


@torch.no_grad()
def pieces(size: str, stored: str, rounds: int) -> dict[str, Timing]:
    """Seconds that prefilling PROMPT positions takes: at once, and with `--same-bits` in pieces of
    so many positions."""
    quantised = stored if stored in ("int8", "int4") else None
    model = random_model(size, dtype_of(stored), quantised).language_model
    text = model.config
    embeds = torch.randn(1, PROMPT, text.hidden_size).to(dtype_of(stored)) * 0.02

    def read(piece: int) -> float:
        cache = KVCache(text, 1, PROMPT, dtype=embeds.dtype, device="cpu")
        model.__class__ = LanguageModel if piece == PROMPT else row_by_row.RowByRow
        row_by_row.PIECE = piece
        started = time.perf_counter()
        model(embeds, None, cache, last_only=True)
        return time.perf_counter() - started

    variants = {f"pieces of {piece}": partial(read, piece) for piece in PIECES}
    return take_turns({"whole": partial(read, PROMPT)} | variants, rounds)


def pieces_table(size: str, found: dict[str, dict[str, Timing]]) -> str:
    names = list(next(iter(found.values())))
    lines = [
        f"| {size}, {PROMPT} positions, seconds, and how much of the whole | {' | '.join(names)} | others |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for stored, timings in found.items():
        whole = timings["whole"].median
        cells = [
            f"{timings[name].median:.2f} ({timings[name].median / whole:.2f})" for name in names
        ]
        others = statistics.median(other for timing in timings.values() for other in timing.others)
        lines.append(f"| {stored} | {' | '.join(cells)} | {others:.2f} |")
    return "\n".join(lines)


def dtype_of(stored: str) -> torch.dtype:
    """The dtype of activations: the one that `auto` chooses for quantised layers where bfloat16 is
    fast."""
    if stored == "bfloat16" or (stored != "float32" and processor.has_fast_bfloat16()):
        return torch.bfloat16
    return torch.float32


def numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def shapes(text: str) -> list[tuple[int, int]]:
    found = [tuple(numbers(shape.replace("x", ","))) for shape in text.split(",")]
    if {len(shape) for shape in found} != {2}:
        raise ValueError
    return found


def stored_in(text: str) -> list[str]:
    found = text.split(",")
    if set(found) - set(STORED):
        raise ValueError
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="bench.py kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers", type=shapes, default=LAYERS, help="NxC,... (default: those of 7b and 1b)"
    )
    parser.add_argument(
        "--dtypes",
        type=stored_in,
        default=list(STORED),
        help=f"what weights are stored in, some of {','.join(STORED)} (default: all)",
    )
    parser.add_argument(
        "--rows", type=numbers, default=ROWS, help=f"of x (default {','.join(map(str, ROWS))})"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--json", action="store_true", help="every round of every way as JSON")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="JSON", help="tables of what was found before"
    )
    parser.add_argument("--bits", action="store_true", help="measure bits, not seconds")
    parser.add_argument("--pieces", choices=SIZES, help="measure a prompt in pieces")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds needs at least 1")
    command = " ".join(["python tools/bench.py kernels", *(sys.argv[1:] if argv is None else argv)])
    kind, head = processor.kind(), f"`{command}`, {date.today()}, {machine('cpu')}"
    if options.pieces:
        found = {s: pieces(options.pieces, s, options.rounds) for s in options.dtypes}
        listed = [{"name": [s, n], **vars(t)} for s, of in found.items() for n, t in of.items()]
        text = f"{head}\n\n{pieces_table(options.pieces, found)}"
        print(json.dumps(listed) if options.json else text)
        return 0
    if options.bits:
        found = bits_found(options)
        print(json.dumps(found) if options.json else f"{head}\n\n{bits_table(found)}")
        return 0
    if options.read:
        kind, head, cells = read(options.read)
    else:
        cells = []
        for n, c in options.layers:
            for stored in options.dtypes:
                # the head sees the last row of a prompt only
                rows = [r for r in options.rows if r < ROWS[-1] or (n, c) not in HEADS]
                cells += measure(stored, n, c, rows, options.rounds)
                say(f"{stored}, {n} x {c}: done")
    if options.json:
        print(json.dumps({"kind": kind, "head": head, "cells": [asdict(cell) for cell in cells]}))
    else:
        print(f"{head}; processor of kind {kind}\n\n{table(cells)}\n\n{verdict(cells)}")
    return 0


def read(paths: Sequence[Path]) -> tuple[str, str, list[Cell]]:
    """The kind, the heading and the cells that runs with --json found, with the way that WAYS would
    take now; a cell of several runs has the rounds of all. Raises ValueError if the runs are of
    processors of different kinds."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    kinds = sorted({part["kind"] for part in found})
    if len(kinds) > 1:
        raise ValueError(f"measured on processors of kinds {', '.join(kinds)}, expected one kind")
    cells: dict[tuple, Cell] = {}
    for cell in (Cell(**cell) for part in found for cell in part["cells"]):
        first = cells.setdefault((cell.stored, cell.n, cell.c, cell.rows), cell)
        if cell is not first:
            for way, seconds in cell.seconds.items():
                first.seconds.setdefault(way, []).extend(seconds)
            first.others = max(first.others, cell.others)
        first.taken = processor.way(cell.stored, cell.rows, (cell.n, cell.c), on=kinds[0])
    heads = "; ".join(dict.fromkeys(part["head"] for part in found))
    return kinds[0], heads, list(cells.values())


if __name__ == "__main__":
    interrupts.end(lambda: messages.run(main, verbose=True, prints=True))
