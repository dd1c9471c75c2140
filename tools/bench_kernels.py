#!/usr/bin/env python3
"""One product of a layer, by every way that is known: which is the fastest on this processor, and
is it the one that minillava takes?

    python tools/bench.py kernels                                    # all of it, for a quarter of an hour
    python tools/bench.py kernels --layers 11008x4096 --dtypes int8  # a part of it
    python tools/bench.py kernels --json > found.json                # every round of every way
    python tools/bench.py kernels --read found.json                  # the tables of what was found before
    python tools/bench.py kernels --read first.json second.json ...  # judged by the median of several runs
    python tools/bench.py kernels --journal some.jsonl --seconds 120 # some of it now, the rest by the same command later
    python tools/bench.py kernels --bits                             # whose bits depend on who shares a pass
    python tools/bench.py kernels --pieces 1b                        # what --same-bits costs a prompt

Weights are random and read from memory: so many copies take turns that none is in a cache. The ways
to one product take turns, too, round after round; a figure is the median of its rounds. A way that
took more than SLOW times as long as the fastest while warming up keeps that one figure.

The machine may change within those seconds, and the fastest of many ways is partly the luckiest. So
where ours looks more than DOUBT times as slow as another, it and every way that looked so much faster
are measured again, side by side, each round forwards and backwards. What counts then is the median of
the rounds' own ratios; what it looked like before stands behind it in brackets.

What was measured beside a busy neighbour is measured again, too, up to three times; the least disturbed
counts, and `others` says how much.

A cell in which the faster way would change the bits of a row that shares its pass, where
processor.SAME_ROWS promises that it has those that it has alone, is kept as it is, and counted apart.

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
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_checkpoint import SIZES, config_of
from bench_parts.clock import BUSY, TRIES, Neighbours, Timing, say, take_turns
from bench_parts.growth import random_model, stored_as
from bench_parts.journal import PACKAGE, Journal, add_flags, code
from bench_parts.probe import machine

from minillava.cache import KVCache
from minillava.cli import messages
from minillava.cli.arguments import Parser
from minillava.fast import fused, processor, row_by_row, same_bits
from minillava.fast.linear import OF_ONE_ROW, PRODUCTS, linear
from minillava.fast.packed import KIND as PACKED
from minillava.fast.packed import packs
from minillava.fast.quantize import BLOCKS, QuantisedLinear
from minillava.llama import LanguageModel

ROWS = (1, 2, 4, 8, 16, 32, 640)  # the last one is a prompt
STORED = ("float32", "bfloat16", "int8", "int4", *[PACKED] * packs())
QUANTISED = ("int8", "int4", PACKED)
MODELS = ("7b", "1b")
PROMPT = 625  # positions of a picture question, after which attention is measured
ENOUGH = 1 << 28  # bytes of weights that take turns: more than any cache of one processor holds
LEAST = 5e-3  # seconds that a round of one way takes at least, in as many calls as that needs
SLOW = 2.0
DOUBT = 1.05  # what looks so many times as slow as another way is measured again beside it
AGAIN = (3, 15)  # rounds side by side, at least and at most
AGAIN_SECONDS = 2.0  # after so many no further round begins, once there are enough
TOLERANCE = 1.10  # the way taken may be slower than the best by no more than this

# the files of the ways: cells of others do not belong in one journal
WRITTEN_IN = [PACKAGE / "fast" / name for name in ("linear.py", "quantize.py")]


@dataclass
class Cell:
    """Every way to one product: rows of x with a weight [n, c]. taken: ours. seconds: by way, per
    round. others: cores that other processes kept busy meanwhile. again: rounds side by side of ours
    and of the ways that looked faster, seconds by way. changes: those of them by which a row would
    have other bits than it has by ours among another number of rows."""

    stored: str
    n: int
    c: int
    rows: int
    taken: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: float = 0.0
    again: list[dict[str, float]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int, int]:
        return self.stored, self.n, self.c, self.rows

    @property
    def medians(self) -> dict[str, float]:
        return {way: statistics.median(found) for way, found in self.seconds.items()}

    @property
    def fastest(self) -> str:
        """Before anything was measured again."""
        return min(self.medians, key=self.medians.__getitem__)

    @property
    def looked(self) -> float:
        """The time of ours, as a multiple of the fastest way's, before."""
        return self.medians[self.taken] / self.medians[self.fastest]

    def beside(self, way: str) -> list[float]:
        """The time of ours, as a multiple of this way's, in each round that had both side by side."""
        return [
            found[self.taken] / found[way]
            for found in self.again
            if way in found and self.taken in found
        ]

    def slower(self, way: str) -> float:
        """The time of ours, as a multiple of this way's."""
        beside = self.beside(way)
        if beside:
            return statistics.median(beside)
        return self.medians[self.taken] / self.medians[way]

    @property
    def rival(self) -> str:
        """The fastest way, by all that was measured."""
        return max(self.seconds, key=self.slower)

    @property
    def ratio(self) -> float:
        return self.slower(self.rival)

    def kept(self, kind: str) -> bool:
        """Whether every way that is faster by more than the tolerance would break a promise of
        SAME_ROWS, of which one row is a part as well."""
        promised = processor.SAME_ROWS.get(kind, {}).get(self.stored, 1)
        faster = {way for way in self.seconds if self.slower(way) > TOLERANCE}
        return promised >= max(2, self.rows) and faster <= set(self.changes)


@dataclass
class Pooled(Cell):
    """The same cell of several runs, each of which counts once: also one in which ours looked well
    and nothing was measured again. The rest is that of all together."""

    runs: list[Cell] = field(default_factory=list)

    def slower(self, way: str) -> float:
        return statistics.median(run.slower(way) for run in self.runs if way in run.seconds)


def pooled(runs: Sequence[Cell]) -> Cell:
    """One cell of runs with the same key and the same way taken."""
    if len(runs) == 1:
        return runs[0]
    whole = Pooled(*runs[0].key, runs[0].taken, runs=list(runs))
    for run in runs:
        for way, seconds in run.seconds.items():
            whole.seconds.setdefault(way, []).extend(seconds)
        whole.again += run.again
        whole.changes = sorted({*whole.changes, *run.changes})
        whole.others = max(whole.others, run.others)
    return whole


def runs_of(cell: Cell) -> list[Cell]:
    return cell.runs if isinstance(cell, Pooled) else [cell]


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
    if stored == PACKED:
        return ["kernel", "unpacked"]
    if stored in QUANTISED:
        fast = processor.has_fast_bfloat16()
        return ["kernel", *(way for way in BLOCKS if fast or not way.startswith("bfloat16"))]
    other = ("onednn",) if stored == "bfloat16" else ("float32 blocks", "float32 blocks x4")
    return [way for way in PRODUCTS if way not in other and (way not in OF_ONE_ROW or rows == 1)]


def weights(stored: str, n: int, c: int) -> list:
    """Copies of one weight, as a tensor or as a layer."""
    weight = torch.randn(n, c, generator=torch.Generator().manual_seed(0))
    if stored == PACKED:
        dense = weight.bfloat16()
        return [(stored_as(PACKED, dense), dense.clone()) for _ in range(copies(dense.nbytes))]
    if stored in QUANTISED:
        first = stored_as(stored, weight)
        size = sum(tensor.nbytes for tensor in first.buffers())
    else:
        first = weight.to(getattr(torch, stored))
        size = first.nbytes
    return [first, *(copy.deepcopy(first) for _ in range(copies(size) - 1))]


def copies(size: int) -> int:
    return math.ceil(ENOUGH / size)


def by(way: str, weight: Tensor | QuantisedLinear | tuple, x: Tensor) -> Tensor:
    if isinstance(weight, tuple):  # packed, and the same as it was
        packed, dense = weight
        return linear(x, dense) if way == "unpacked" else packed.by(way, x)
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
        neighbours = Neighbours()
        first_look(cell, work, turns, rounds)
        if rivals := [way for way in work if cell.slower(way) > DOUBT]:
            side_by_side(cell, work, turns, rivals)
            if rows <= max(same_bits.ROWS):
                cell.changes = [way for way in rivals if not keeps_bits(way, cell, turns[0], x)]
        cell.others = sum(neighbours.taken().values())
        yield cell


def first_look(cell: Cell, work: dict[str, Callable], turns: list, rounds: int) -> None:
    """All ways, in turn."""
    warm = {way: round_of(call, turns, 1) for way, call in work.items()}
    warm = {way: min(s, round_of(work[way], turns, 1)) if s < 1 else s for way, s in warm.items()}
    going = {
        way: seconds
        for way, seconds in warm.items()
        if seconds <= SLOW * min(warm.values()) or way == cell.taken
    }
    cell.seconds = {way: [] if way in going else [seconds] for way, seconds in warm.items()}
    for _ in range(rounds):
        for way, seconds in going.items():
            cell.seconds[way].append(round_of(work[way], turns, calls_of(seconds)))


def side_by_side(cell: Cell, work: dict[str, Callable], turns: list, rivals: list[str]) -> None:
    """Ours and these, again. A round goes through them forwards and backwards, so that a machine
    that grows slower meanwhile slows all alike."""
    (least, most), started = AGAIN, time.perf_counter()
    ways, medians = [cell.taken, *rivals], cell.medians
    while len(cell.again) < most and (
        len(cell.again) < least or time.perf_counter() - started < AGAIN_SECONDS
    ):
        found = dict.fromkeys(ways, 0.0)
        for way in (*ways, *reversed(ways)):
            found[way] += round_of(work[way], turns, calls_of(medians[way])) / 2
        cell.again.append(found)


def calls_of(seconds: float) -> int:
    return min(32, math.ceil(LEAST / seconds))


def keeps_bits(way: str, cell: Cell, weight: Tensor | QuantisedLinear, x: Tensor) -> bool:
    """Whether each row has by this way the bits that it has by ours alone; or one row those that it
    has by ours beside another."""

    def ours(rows: Tensor) -> Tensor:
        return by(processor.way(cell.stored, len(rows), (cell.n, cell.c)), weight, rows)

    here = by(way, weight, x)
    if len(x) == 1:
        return torch.equal(here, ours(x.repeat(2, 1))[:1])
    return all(torch.equal(here[i], ours(row[None])[0]) for i, row in enumerate(x))


def table(cells: Sequence[Cell]) -> str:
    """Markdown, milliseconds: the fastest in bold, ours with a star."""
    lines = []
    for stored, n, c in dict.fromkeys((cell.stored, cell.n, cell.c) for cell in cells):
        of = [cell for cell in cells if (cell.stored, cell.n, cell.c) == (stored, n, c)]
        of.sort(key=lambda cell: cell.rows)
        ways = list(dict.fromkeys(way for cell in of for way in cell.seconds))
        lines += [
            "",
            f"| {stored}, {n} × {c}, ms for rows | {' | '.join(str(cell.rows) for cell in of)} |",
        ]
        lines += ["|---|" + "---:|" * len(of)]
        for way in ways:
            lines.append(f"| {way} | {' | '.join(shown(cell, way) for cell in of)} |")
        lines.append(f"| ours, to the fastest | {' | '.join(map(ratio_shown, of))} |")
        lines.append(f"| others | {' | '.join(f'{cell.others:.2f}' for cell in of)} |")
    return "\n".join(lines[1:])


def shown(cell: Cell, way: str) -> str:
    if way not in cell.seconds:
        return ""
    number = f"{1000 * cell.medians[way]:.3g}"
    return (f"**{number}**" if way == cell.fastest else number) + " *" * (way == cell.taken)


def ratio_shown(cell: Cell) -> str:
    return f"{cell.ratio:.2f} ({cell.looked:.2f})" if cell.again else f"{cell.ratio:.2f}"


def verdict(cells: Sequence[Cell], kind: str) -> str:
    over = [cell for cell in cells if cell.ratio > TOLERANCE]
    kept = [cell for cell in over if cell.kept(kind)]
    slow = [cell for cell in over if not cell.kept(kind)]
    again = [cell for cell in cells if cell.looked > TOLERANCE and cell.again]
    lines = [
        f"ours is at most {TOLERANCE - 1:.0%} slower than the fastest in {len(cells) - len(over)} of "
        f"{len(cells)} cells; kept for the same bits: {len(kept)}; slower: {len(slow)} "
        f"({len(again)} cells looked slower and were measured again side by side)"
    ]
    lines += [f"- slower: {told(cell)}" for cell in slow]
    if kept:
        lines.append(f"- kept: {SAME_BITS}")
    lines += [f"- kept: {told(cell)}" for cell in kept]
    return "\n".join(lines)


SAME_BITS = (
    "by the faster way a row would have other bits than it has alone or among others "
    "(SAME_ROWS in minillava/fast/processor.py)"
)


def told(cell: Cell) -> str:
    beside = sorted(cell.beside(cell.rival))
    rounds = f" ({beside[0]:.2f} to {beside[-1]:.2f} in {len(beside)} rounds)" if beside else ""
    busy = f", while others kept {cell.others:.2f} cores busy" if cell.others > BUSY else ""
    return (
        f"{cell.stored}, {cell.n} × {cell.c}, {cell.rows} row(s): {cell.taken} takes "
        f"{cell.ratio:.2f} times as long as {cell.rival}{rounds}{busy}"
    )


@torch.no_grad()
def bits(stored: str, n: int, c: int) -> int:
    """Up to how many rows our product gives each row the bits that it has alone."""
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, c, generator=draw) for rows in (n, max(same_bits.ROWS)))
    if stored in QUANTISED:
        given = dtype_of(stored) if stored == PACKED else torch.float32
        return same_bits.rows_alike(stored_as(stored, weight.to(given)), x.to(given))
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
    quantised = stored if stored in QUANTISED else None
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
    add_flags(parser)
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
        try:
            cells = measured(options, kind)
        except ValueError as error:
            parser.error(str(error))
    if options.json:
        found = [asdict(run) for cell in cells for run in runs_of(cell)]
        print(json.dumps({"kind": kind, "head": head, "cells": found}))
    else:
        print(f"{head}; processor of kind {kind}\n\n{table(cells)}\n\n{verdict(cells, kind)}")
    return 0


def measured(options: argparse.Namespace, kind: str) -> list[Cell]:
    """Every cell asked for that there is time for, those of the journal included; what was measured
    beside a busy neighbour again, up to TRIES times."""
    settings = {"kind": kind, "machine": machine("cpu"), "code": code(WRITTEN_IN)}
    journal = Journal(options.journal, settings)
    found: dict[tuple, list[Cell]] = {}
    for record in journal.records:
        cell = Cell(**record)
        found.setdefault(cell.key, []).append(cell)
    end = time.perf_counter() + options.seconds
    for (n, c), stored in TRIES * list(product(options.layers, options.dtypes)):
        rows = [
            r for r in rows_of(options.rows, n, c) if not good(found.get((stored, n, c, r), []))
        ]
        if rows and time.perf_counter() >= end:
            say(f"{stored}, {n} x {c} and what follows: no time left")
            break
        for cell in measure(stored, n, c, rows, options.rounds) if rows else ():
            journal.add(asdict(cell))
            found.setdefault(cell.key, []).append(cell)
            say(f"{stored}, {n} x {c}, {cell.rows} row(s): done")
            if time.perf_counter() >= end:
                break
    return [min(cells, key=lambda cell: cell.others) for cells in found.values()]


def good(tries: Sequence[Cell]) -> bool:
    return len(tries) >= TRIES or any(cell.others <= BUSY for cell in tries)


def rows_of(asked: Sequence[int], n: int, c: int) -> list[int]:
    """A head sees the last row of a prompt only."""
    return [rows for rows in asked if rows < ROWS[-1] or (n, c) not in HEADS]


def read(paths: Sequence[Path]) -> tuple[str, str, list[Cell]]:
    """The kind, the heading and the cells that runs with --json found, with the way that WAYS would
    take now. Raises ValueError if the runs are of processors of different kinds."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    kinds = sorted({part["kind"] for part in found})
    if len(kinds) > 1:
        raise ValueError(f"measured on processors of kinds {', '.join(kinds)}, expected one kind")
    runs: dict[tuple, list[Cell]] = {}
    for cell in (Cell(**cell) for part in found for cell in part["cells"]):
        now = processor.way(cell.stored, cell.rows, (cell.n, cell.c), on=kinds[0])
        if now != cell.taken:  # whose bits the others change is known of the way before
            cell.taken, cell.changes = now, []
        runs.setdefault(cell.key, []).append(cell)
    heads = "; ".join(dict.fromkeys(part["head"] for part in found))
    return kinds[0], heads, [pooled(each) for each in runs.values()]


if __name__ == "__main__":
    interrupts.end(lambda: messages.run(main, verbose=True, prints=True))
