"""The flags of `python -m minillava.batch`, and which of them go together; they are read before
torch is imported."""

import os
from collections.abc import Sequence
from pathlib import Path

from minillava.cli.arguments import (
    Parser,
    check_outputs,
    file_name,
    new_parser,
    output_name,
)
from minillava.cli.flags import (
    add_contrast_arguments,
    add_draft_arguments,
    add_flags,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_search_arguments,
    check_drafts,
    flag,
    read_contrast,
    read_options,
)
from minillava.files.disk import is_stream, same_file

HELP = """\
questions: one JSON object per line, or one JSON array of them, with question_id, text and, if it is
           about one, image
answers:   in the same order, question_id, prompt, text, answer_id, model_id, metadata with the
           finish_reason ("stop", or "length" for an answer that -n cut); or question_id and error

A run that was killed goes on where it was when the same command is given again. Once it is
finished, the same command asks again only what became an error; --images may then be another.

With a temperature, the question on line N is sampled with seed S + N, whatever shares its batch;
S is 0 without --seed.

exit status: 0 all answered, 1 some could not be, or an error in one line, 2 wrong usage,
130 Ctrl-C"""


def _questions(text: str) -> Path | str:
    """A file of questions; "-" stays a text, so that ./- can be a file of that name."""
    return text if text == "-" else Path(file_name(text))


FILES = (
    flag(
        "--questions", "--question-file", required=True, type=_questions, metavar="FILE",
        help="questions, - for stdin",
    ),
    flag(
        "--images", "--image-folder", type=file_name, default=".", metavar="DIR",
        help="folder of the pictures that questions name (default: the current one)",
    ),
    flag(
        "--answers", "--answers-file", required=True, type=lambda text: Path(output_name(text)),
        metavar="FILE", help="answers, JSON lines; FILE.partial while it runs",
    ),
    flag(
        "--overwrite", action="store_true",
        help="start anew; old answers stay until the new are complete",
    ),
)  # fmt: skip

SPEED = (
    flag(
        "--batch-size", type=int, default=8, metavar="N",
        help="questions at a time (default: %(default)s)",
    ),
    flag(
        "--image-cache", type=int, default=32, metavar="N",
        help="encoded pictures kept, 5 MB each at 7B in 16 bits (default: %(default)s)",
    ),
)  # fmt: skip

MANY = (
    flag(
        "--on", choices=["ray"],
        help="ask by several workers that Ray starts, each with a model (default: by this process)",
    ),
    flag(
        "--address", metavar="HOST:PORT",
        help="where Ray runs already (default: $RAY_ADDRESS, else it is started on this machine)",
    ),
    flag(
        "--workers", type=int, metavar="N",
        help="how many (default: one on each GPU, or, where there is none, on each machine)",
    ),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.batch") -> Parser:
    parser = new_parser(
        prog,
        "Answer a file of questions about pictures, in the format of LLaVA's evaluation.",
        HELP,
    )
    add_flags(parser, "files", FILES)
    add_flags(parser, "speed", SPEED)
    add_flags(parser, "several workers", MANY)
    add_model_arguments(parser, answers=True)
    add_generation_arguments(parser)
    add_search_arguments(parser)
    add_contrast_arguments(parser)
    add_draft_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, and the options with which each question is asked."""
    args = parser.parse_args(argv)
    options = read_options(parser, args) | {
        "contrast": read_contrast(parser, args),
        "system": args.system,
    }
    check_drafts(parser, args, ("--num-beams", args.num_beams > 1))
    for name, least in (("batch_size", 1), ("image_cache", 0)):
        if vars(args)[name] < least:
            parser.error(f"{name} is {vars(args)[name]}, expected at least {least}")
    if args.workers is not None and args.workers < 1:
        parser.error(f"workers is {args.workers}, expected at least 1")
    if args.on is None and (args.address is not None or args.workers is not None):
        parser.error("--address and --workers are for --on ray")
    if args.on is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("--on ray starts its workers itself: leave torchrun out")
    if same_file(args.answers, args.questions):
        parser.error("--questions and --answers are the same file")
    journal = (
        [] if is_stream(args.answers) else [args.answers.with_name(f"{args.answers.name}.partial")]
    )
    given = "/dev/stdin" if args.questions == "-" else args.questions
    check_outputs(parser, args, [args.answers, *journal], [given])
    return args, options
