#!/usr/bin/env python3
"""How fast minillava is, side by side with its peers and with what the machine can do at most.

    python tools/bench.py compare --size 1b              # a table: ours, transformers, and llama.cpp where installed
    python tools/bench.py compare --size interleave-0.5b # the same with SigLIP and Qwen2; --pictures N of them in a prompt
    python tools/bench.py growth --size 1b --png x.png   # time per token by context and by batch
    python tools/bench.py drafts --size 1b               # checking guesses: its cost, and what it gains
    python tools/bench.py assisted --size 0.5b           # a small model that guesses, beside transformers
    python tools/bench.py exact                          # whether answers with drafts are the same here
    python tools/bench.py kernels                        # one product of a layer, by every way (see kernels --help)
    python tools/bench.py quality                        # how far int8 and int4 are from float64, layer by layer
    python tools/bench.py profile --size 1b              # which operations take the time of a prompt and a token
    python tools/bench.py contrast --size 0.5b           # what a second row of logits costs
    python tools/bench.py threads --sizes shapes,0.5b    # one thread or all, on an idle machine and on a busy one
    python tools/bench.py serve --size shapes             # answers per second over HTTP, one client and four
    python tools/bench.py batch --size shapes --asked 500 # questions of a file, on the engine and in padded batches
    python tools/bench.py train --size 0.13b     # a training step beside transformers and PEFT
    python tools/bench.py parallel --size 0.5b    # one model in two processes, beside one and beside DTensor
    python tools/bench.py workers --size shapes    # questions of a file, by one process and by Ray's workers
    python tools/bench.py startup --beside OTHER         # start to answer, of this checkout and of others

Weights are random, of the true shapes; `--size shapes` is the bundled model. All variants take turns,
round after round, and a figure is the median of its rounds. Machines are shared: `others` is how many
cores other processes kept busy meanwhile, and `stolen` how many the host took away. What compare
measures beside a busy neighbour is measured again, and marked if that does not help. --journal keeps
what is finished, whatever ends the run, and the same command goes on from there.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

import torch

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_kernels
from bench_checkpoint import SHAPES, SIZES, make_checkpoint
from bench_parts.assisted import assisted, assisted_table
from bench_parts.batch import batch, batch_table
from bench_parts.clock import say
from bench_parts.compare import PICTURE, Asked, compare, default_rows, measured
from bench_parts.contrast import contrast, contrast_table
from bench_parts.drafts import drafts, drafts_table
from bench_parts.exact import exact, exact_table
from bench_parts.growth import CONTEXTS, growth, growth_plot, growth_table, random_model
from bench_parts.heads import heads, heads_table
from bench_parts.journal import Journal, add_flags
from bench_parts.parallel import in_parts, parallel_table
from bench_parts.probe import machine
from bench_parts.profile import profile, profile_table
from bench_parts.quality import quality, quality_table
from bench_parts.rows import ROWS, Died, Row, make_gguf, row_of
from bench_parts.serve import serve, serve_table
from bench_parts.startup import startup, startup_table
from bench_parts.tables import memory, ratios, table
from bench_parts.threads import threads, threads_table
from bench_parts.train import train, train_table, variants
from bench_parts.work import PROMPT, weights_read
from bench_parts.workers import workers, workers_table

from minillava.cli import messages
from minillava.cli.arguments import Parser
from minillava.fast.packed import KIND as PACKED
from minillava.files.disk import check_writable, explain
from minillava.options import ATTENTION, DTYPES, KINDS

# --- the door -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["kernels"]:
        return bench_kernels.main(given[1:])
    parser = parser_of_flags()
    options = parser.parse_args(given)
    check(parser, options)
    command = " ".join(["python tools/bench.py", *given])
    options.head = f"`{command}`, {date.today()}, {machine(options.device)}"
    if options.what == "compare":
        return compare_command(parser, options)
    found, text = COMMANDS[options.what](parser, options)
    print(json.dumps(found) if options.json else f"{options.head}\n\n{text}")
    return 0


def parser_of_flags() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "kernels", *COMMANDS])
    parser.add_argument(
        "--size",
        choices=[SHAPES, *SIZES],
        default="1b",
        help="random weights of this shape, or the bundled model (default 1b)",
    )
    parser.add_argument("--tokens", type=int, default=16, help="decoded per round (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument(
        "--json", action="store_true", help="every figure as JSON, instead of tables"
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the checkpoints here (default: made and removed)"
    )
    flags_of_compare(parser.add_argument_group("compare"))
    flags_of_others(parser.add_argument_group("the others"))
    return parser


def flags_of_compare(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rows",
        metavar="NAMES",
        help=f"some of {','.join(ROWS)}, each with @N for N threads (default: all installed)",
    )
    group.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    group.add_argument(
        "--questions", type=int, default=1, help="asked per process; the last is timed"
    )
    group.add_argument(
        "--pictures", type=int, default=1, help="that a question is about (default 1)"
    )
    group.add_argument("--no-cold", action="store_true", help="leave out loading from disk")
    add_flags(group)


def flags_of_others(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sizes",
        default="shapes,0.04b,0.13b,0.5b",
        help="threads: these, `shapes` being the bundled model",
    )
    group.add_argument(
        "--busy", default="0,1,2", help="threads: beside so many busy loops (default 0,1,2)"
    )
    group.add_argument(
        "--dtypes", default="float32,bfloat16,int8,int4", help="growth, drafts, exact: which lines"
    )
    group.add_argument("--learn", default="lora,language", help="train: which of these")
    group.add_argument(
        "--attention", choices=ATTENTION, default="eager", help="train: fused is their sdpa"
    )
    group.add_argument("--read", type=int, default=60, help="train: tokens of a row before answers")
    group.add_argument(
        "--asked",
        type=int,
        default=200,
        help="workers, batch: questions that are counted (default 200)",
    )
    group.add_argument("--png", type=Path, help="growth: draw it here")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="contrast, profile, assisted, serve, parallel, workers, batch",
    )
    group.add_argument("--quantize", choices=KINDS, help="parallel: its language model's layers")
    group.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="NAME=ADDRESS",
        help="serve: another server of OpenAI's format that runs already, such as llama.cpp's "
        "(llama-server -m MODEL.gguf --parallel 4) as llama.cpp=http://127.0.0.1:8080/v1",
    )
    group.add_argument(
        "--prompt",
        type=int,
        default=PROMPT,
        help=f"contrast, drafts, assisted, parallel: positions before (default {PROMPT})",
    )
    group.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="startup: another checkout (may be given several times)",
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be right, before minutes of measuring."""
    if options.what == "kernels":
        parser.error("kernels has flags of its own and comes before them: kernels --help")
    counts = (options.rounds, options.tokens, options.questions, options.asked, options.pictures)
    if min(counts) < 1:
        parser.error("--rounds, --tokens, --questions, --asked and --pictures need at least 1")
    if options.device != "cpu" and options.what != "compare":
        parser.error(
            f"--device {options.device} is for compare: {options.what} measures the processor"
        )
    if options.what == "growth" and options.tokens >= min(CONTEXTS):
        parser.error(
            f"--tokens is {options.tokens}, expected less than the shortest context, "
            f"{min(CONTEXTS)}"
        )
    random = ("growth", "contrast", "drafts", "assisted", "train", "parallel")
    if options.size == SHAPES and options.what in random:
        parser.error(f"--size {SHAPES} is for compare: {options.what} measures random weights")
    for flag, path in (("--png", options.png), ("--journal", options.journal)):
        if path is None:
            continue
        if not path.name or not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: no such folder")
        try:
            check_writable(path)
        except OSError as error:
            parser.exit(1, f"error: {explain(error)}\n")


def compare_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Show what is finished, whatever ends the run. Returns 1 if one of our own rows has failed."""
    try:
        names = options.rows.split(",") if options.rows else []
        rows = list(map(row_of, names)) or default_rows(options.device, options.size)
        journal = Journal(options.journal, settings_of(options))
    except ValueError as error:
        parser.error(f"--rows: {error}" if "expected some of" in str(error) else str(error))
    with ExitStack() as stack:
        home = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        asked = asked_of(options, home)
        try:
            make_files(rows, asked, journal)
            compare(rows, asked, options.rounds, not options.no_cold, journal, options.seconds)
        finally:
            show(options, rows, asked, journal)
    failed = [each.row.peer for each in measured(rows, journal) if each.failed]
    return 1 if "minillava" in failed else 0


def settings_of(options: argparse.Namespace) -> dict:
    """The settings that all rows of a table have in common."""
    names = ("size", "device", "tokens", "questions", "pictures")
    return {name: getattr(options, name) for name in names} | {"machine": machine(options.device)}


def asked_of(options: argparse.Namespace, home: Path) -> Asked:
    bundled = options.size == SHAPES
    folder = PICTURE.parent if bundled else home / f"{options.size}-bfloat16"
    gguf = home / f"{SHAPES}-gguf" if bundled else folder
    numbers = (options.tokens + 1, options.questions, options.pictures)
    return Asked(options.size, folder, gguf, options.device, *numbers)


def make_files(rows: Sequence[Row], asked: Asked, journal: Journal) -> None:
    """A peer that cannot read or make its own weights becomes a row that says so."""
    if asked.size != SHAPES:
        say(f"making {asked.folder}")
        make_checkpoint(asked.folder, asked.size, torch.bfloat16)
    for row in rows:
        if row.peer == "llama.cpp" and not journal.has(row.name, 0):
            try:
                make_gguf(asked.folder, row.dtype, asked.gguf)
            except Died as error:
                journal.add({"row": row.name, "round": 0, "failed": f"making its file: {error}"})


def show(options: argparse.Namespace, rows: Sequence[Row], asked: Asked, journal: Journal) -> None:
    found = measured(rows, journal)
    if options.json:
        rows = [
            vars(each) | {"row": each.row.name, "rounds": list(each.rounds.values())}
            for each in found
        ]
        print(json.dumps({"settings": journal.settings, "rows": rows}))
        return
    if not found:
        say("nothing was measured")
        return
    billions = weights_read(asked.config.text) / 1e9
    rounds = max(len(each.rounds) for each in found)
    print(
        f"{options.head}; {billions:.3g} billion weights read per token, {asked.positions} "
        f"positions, {options.tokens} tokens, {rounds} round(s)\n\n{table(found, asked)}"
    )
    for text in (ratios(found), memory(found, asked)):
        if text:
            print(f"\n{text}")


def dtypes_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    dtypes = options.dtypes.split(",")
    if unknown := set(dtypes) - {*DTYPES, *KINDS, PACKED}:
        parser.error(f"--dtypes: unknown {', '.join(sorted(unknown))}")
    return dtypes


def drafts_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    dtypes = dtypes_of(parser, options)
    found = drafts(options.size, dtypes, options.prompt, options.tokens, options.rounds)
    rows = [
        {
            "dtype": name,
            "costs": listed(each.costs),
            "answers": listed(each.answers),
            "passes": each.passes,
        }
        for name, each in found.items()
    ]
    medusa = heads(dtypes, options.rounds)
    rows += [
        {"dtype": name, "medusa": listed(each.timings), "passes": each.passes}
        for name, each in medusa.items()
    ]
    return rows, f"{drafts_table(found)}\n\n{heads_table(medusa)}"


def assisted_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    dtype = getattr(torch, options.dtype)
    timings, ids = assisted(options.size, dtype, options.prompt, options.tokens, options.rounds)
    return listed(timings), assisted_table(timings, ids)


def exact_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    found = exact(dtypes_of(parser, options))
    return [vars(cell) for cell in found], exact_table(found)


def growth_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    dtypes = dtypes_of(parser, options)
    found = growth(options.size, dtypes, options.tokens, options.rounds)
    if options.png:
        title = f"{options.size}, random weights, {machine(options.device)}"
        growth_plot(found, title, options.png)
    return listed(found), growth_table(found)


def quality_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    found = quality()
    return found, quality_table(found)


def profile_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    with folder_of(options) as folder:
        found = profile(options.size, folder, options.dtype, options.tokens)
    return found, profile_table(found)


def contrast_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    model = random_model(options.size, getattr(torch, options.dtype))
    found = contrast(model, options.tokens, options.rounds, options.prompt)
    return listed(found), contrast_table(found)


def serve_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    others = dict(each.partition("=")[::2] for each in options.url)
    if wrong := [name for name, url in others.items() if not url.startswith("http://")]:
        parser.error(f"--url {wrong[0]}: expected NAME=http://ADDRESS")
    with folder_of(options) as folder:
        # a large model would take its memory twice, and show HTTP's part of its time to nobody
        both = options.size == SHAPES
        found = serve(folder, options.dtype, options.tokens, options.rounds, others, both)
    return listed(found), serve_table(found)


def batch_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    with folder_of(options) as folder:
        found = batch(folder, options.dtype, options.tokens, options.asked, options.rounds)
    rows = [{"name": way, **each._asdict()} for way, rounds in found.items() for each in rounds]
    return rows, batch_table(found)


def workers_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    with folder_of(options) as folder:
        found = workers(folder, options.dtype, options.tokens, options.asked, options.rounds)
    rows = [
        {"name": name, "start": vars(start), "each": vars(each)}
        for name, (start, each) in found.items()
    ]
    return rows, workers_table(found)


@contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of --size, made where --folder says, or for as long as this lasts."""
    with ExitStack() as stack:
        home = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = PICTURE.parent if options.size == SHAPES else home / f"{options.size}-bfloat16"
        if options.size != SHAPES:
            make_checkpoint(folder, options.size, torch.bfloat16)
        yield folder


def parallel_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    with folder_of(options) as folder:
        found = in_parts(
            folder,
            options.dtype,
            options.quantize,
            options.prompt,
            options.tokens,
            options.rounds,
        )
    rows = [{**key._asdict(), **value._asdict()} for key, value in found.items()]
    return rows, parallel_table(found)


def startup_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    for folder in options.beside:
        if not (folder / "minillava").is_dir():
            parser.error(f"--beside {folder}: not a checkout of minillava")
    found = startup([folder.resolve() for folder in options.beside], options.rounds)
    return listed(found), startup_table(found)


def threads_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    sizes = options.sizes.split(",")
    if unknown := [size for size in sizes if size not in (SHAPES, *SIZES)]:
        parser.error(
            f"--sizes: unknown {', '.join(unknown)}, expected some of: {SHAPES}, {', '.join(SIZES)}"
        )
    busy = options.busy.split(",")
    if wrong := [count for count in busy if not count.isdecimal()]:
        parser.error(f"--busy: {wrong[0]!r} is no number of loops, expected some such as 0,1,2")
    with ExitStack() as stack:
        home = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {
            size: PICTURE.parent if size == SHAPES else home / f"{size}-bfloat16" for size in sizes
        }
        for size, folder in folders.items():
            if size != SHAPES:
                make_checkpoint(folder, size, torch.bfloat16)
        found = threads(folders, list(map(int, busy)), options.tokens + 1, options.rounds)
    rows = [
        {"size": a, "busy": b, "policy": c, "timings": {k: vars(t) for k, t in timings.items()}}
        for (a, b, c), timings in found.items()
    ]
    return rows, threads_table(found)


def train_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple:
    dtypes = dtypes_of(parser, options)
    if unknown := set(dtypes) - {"float32", "bfloat16"}:
        dtypes = [
            dtype for dtype in dtypes if dtype not in unknown
        ]  # weights of these do not learn
    chosen = variants(options.learn.split(","), dtypes, options.attention, options.read)
    with folder_of(options) as folder:
        found = train(chosen, folder, options.rounds)
    rows = [{**key._asdict(), **value._asdict()} for key, value in found.items()]
    return rows, train_table(found)


def listed(timings: dict) -> list[dict]:
    return [{"name": name, **vars(timing)} for name, timing in timings.items()]


# Each returns what --json prints, and the table.
COMMANDS: dict[str, Callable[[argparse.ArgumentParser, argparse.Namespace], tuple]] = {
    "growth": growth_command,
    "drafts": drafts_command,
    "assisted": assisted_command,
    "exact": exact_command,
    "quality": quality_command,
    "profile": profile_command,
    "contrast": contrast_command,
    "threads": threads_command,
    "startup": startup_command,
    "serve": serve_command,
    "parallel": parallel_command,
    "workers": workers_command,
    "batch": batch_command,
    "train": train_command,
}


if __name__ == "__main__":
    interrupts.end(lambda: messages.run(main, verbose=True, prints=True))
