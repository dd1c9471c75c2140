"""The flags of `python -m minillava.inspect`, and which of them go together; they are read before
torch is imported."""

from collections.abc import Sequence

from minillava.cli.arguments import (
    Parser,
    new_parser,
    not_empty,
)
from minillava.cli.flags import (
    add_flags,
    add_model_arguments,
    add_output_arguments,
    flag,
)

HELP = """\
examples:
  python -m minillava.inspect weights/shapes
  python -m minillava.inspect llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --keys
  python -m minillava.inspect llava-1.5-7b-hf --doctor --image cat.jpg

exit status: 0 it can be opened (and no check FAILED), 1 it cannot, 2 wrong usage, 130 Ctrl-C"""

FLAGS = (
    flag("--keys", action="store_true", help="list every tensor: names, shape, dtype, file"),
    flag("--json", action="store_true", help="one JSON object instead, with everything"),
    flag(
        "--doctor", action="store_true",
        help="also open the model and check it here: memory, NaN, two ways to compute the same, "
        "whether it sees",
    ),
    flag(
        "-i", "--image", metavar="FILE",
        help="with --doctor: show it this picture, not a drawn one",
    ),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.inspect") -> Parser:
    parser = new_parser(
        prog,
        "Say what a folder of weights holds and lacks, and what it needs in memory, from the\n"
        "headers of its files.",
        HELP,
    )
    parser.add_argument(
        "folder", nargs="?", type=not_empty, metavar="DIR", help="the weights, as for --weights"
    )
    add_flags(parser, "what to say", FLAGS)
    add_model_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    if args.folder is not None and args.weights is not None:
        parser.error(f"DIR and --weights are the same: give {args.folder} or {args.weights}")
    if args.image is not None and not args.doctor:
        parser.error("--image is what --doctor shows the model: give both")
    return (args,)
