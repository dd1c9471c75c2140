"""The flags of `python -m minillava.trace`, and which of them go together; they are read before
torch is imported."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from minillava.cli.arguments import (
    Parser,
    check_outputs,
    check_stdin,
    file_name,
    new_parser,
    number_list,
    output_name,
)
from minillava.cli.flags import (
    add_draft_arguments,
    add_flags,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_question_arguments,
    check_drafts,
    flag,
    read_options,
)
from minillava.options import DEPTHS, Options

SETTINGS = (
    "weights", "revision", "model_base", "adapter", "vision_tower", "device", "dtype", "attention",
    "quantize", "template", "system", "image_aspect_ratio",
)  # fmt: skip
"""What the two runs of --compare may differ in: the flags of the model, by name."""

HELP = f"""\
step 0 is the picture and the prompt (prefill), step 1 the first cached token. A * marks a shape
that changed since the step traced before. With --draft a step is a pass over the last token and
what was guessed to follow it; "draft" says which guesses were right.

--compare takes settings, or a file that --save wrote (or anybody else: safetensors, named as --save
names them):
  {", ".join(SETTINGS[:8])},
  {", ".join(SETTINGS[8:])}

examples:
  python -m minillava.trace -m DIR -i x.jpg --depth outline
  python -m minillava.trace -m DIR -i x.jpg --depth everything --layers 0,31 --html trace.html
  python -m minillava.trace -m DIR -i x.jpg --compare attention=eager attention=fused
  python -m minillava.trace -m DIR -i x.jpg --compare dtype=float32 device=cuda,dtype=float16
  python -m minillava.trace -m DIR -i x.jpg --compare reference.safetensors dtype=float32

exit status: 0 traced or compared, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""


def _tolerance(text: str) -> float:
    """A number that is at least 0."""
    number = float(text)
    if not number >= 0:  # also true for NaN
        raise argparse.ArgumentTypeError(f"expected a number from 0, found {text!r}")
    return number


FLAGS = (
    flag(
        "--depth", choices=DEPTHS, default="modules",
        help="outline: the stages; modules: every layer's parts; everything: every module "
        "(default: %(default)s)",
    ),
    flag(
        "--layers", "--layer", type=number_list, metavar="LIST",
        help="which layers of tower and language model, from 0, like 3 or 0,2-4 or all "
        "(default: all)",
    ),
    flag(
        "--steps", "--step", type=number_list, default=(0, 1), metavar="LIST",
        help="which steps of the loop, likewise (default: 0,1)",
    ),
    flag(
        "--html", type=output_name, metavar="FILE",
        help="write one page with pictures; stdout then has the answer",
    ),
    flag(
        "--save", type=output_name, metavar="FILE",
        help="keep the tensors, all in memory at once: safetensors, for --compare; stdout then has "
        "the answer, or with --json the trace",
    ),
    flag(
        "--compare", nargs=2, metavar=("A", "B"),
        help="two runs of this question, each a list of settings such as dtype=float32,device=cpu, "
        "or a --save file",
    ),
    flag(
        "--tolerance", type=_tolerance, metavar="R",
        help="with --compare: relative difference that counts as equal (default: 0)",
    ),
    flag(
        "--exit-code", action="store_true",
        help="with --compare: exit with 1 where the two differ, for scripts",
    ),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.trace") -> Parser:
    parser = new_parser(
        prog,
        "Run one question and print every stage on the way to the answer: name, shape, dtype, the\n"
        "source line that made it, min, mean, max, first values. Or compare two runs.",
        HELP,
    )
    add_question_arguments(parser)
    add_flags(parser, "trace", FLAGS)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_draft_arguments(parser)
    add_output_arguments(parser).add_argument(
        "--json", action="store_true", help="one JSON object a line"
    )
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, options and, for --compare, the two sides; each is a file, or the flags of its run."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    if options["seed"] is None:
        options["seed"] = Options().seed  # the same for both runs of a comparison
    check_stdin(parser, args)
    check_drafts(parser, args)
    check_outputs(parser, args, [args.html, args.save])
    if args.compare is None:
        if args.tolerance is not None:
            parser.error("--tolerance is about two runs: give --compare")
        if args.exit_code:
            parser.error("--exit-code is about two runs: give --compare")
        if args.html and args.json:
            parser.error("--html and --json do not go together: leave one of them out")
        return args, options, ()
    if args.html or args.save:
        parser.error("--html and --save are about one run: leave --compare out")
    if args.draft is not None:
        parser.error("--draft is about one run: leave --compare out")
    sides = [_read_side(parser, argv, side) for side in args.compare]
    if all(isinstance(side, Path) for side in sides):
        parser.error(
            "--compare has two files, and nothing to run: give settings such as dtype=float32 for "
            "one of them"
        )
    return args, options, sides


def _read_side(parser: Parser, given: Sequence[str], side: str) -> Path | argparse.Namespace:
    """A or B of --compare: a stored file, or the arguments of a run."""
    if "=" not in side or os.path.isfile(file_name(side)):
        return Path(file_name(side))
    flags = []
    for setting in re.split(r",(?=\s*[\w-]+\s*=)", side):  # a path may contain commas
        name, _, value = setting.partition("=")
        name = name.strip().replace("-", "_")
        if name not in SETTINGS:
            parser.error(
                f"--compare: unknown setting {setting!r}, expected NAME=VALUE with one of: "
                f"{', '.join(SETTINGS)}"
            )
        flags.append(f"--{name}={value}")
    return parser.parse_args([*given, *flags])
