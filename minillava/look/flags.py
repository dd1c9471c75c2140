"""The flags of `python -m minillava.look`, and which of them go together; they are read before
torch is imported."""

from collections.abc import Sequence

from minillava.cli.arguments import (
    PICTURE_NAMES,
    Parser,
    check_outputs,
    check_stdin,
    file_name,
    new_parser,
    number_list,
    output_name,
)
from minillava.cli.flags import (
    add_flags,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_question_arguments,
    flag,
    read_options,
)

HELP = """\
examples:
  python -m minillava.look --image weights/shapes/example-1.png --out look.png --html look.html
  python -m minillava.look -m DIR -i x.jpg --word cat --layers 14-20 --out cat.png

exit status: 0 written, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""

FILES = (
    flag(
        "--out", type=output_name, metavar="FILE.png",
        help="the picture with a heat map for each word",
    ),
    flag(
        "--html", type=output_name, metavar="FILE",
        help="a page: hover a word for its map, a patch for its words",
    ),
    flag(
        "--json", nargs="?", const="-", type=file_name, metavar="FILE",
        help="the maps as numbers, with words and token ids; without FILE on stdout, instead of "
        "the answer",
    ),
    flag(
        "--npy", type=output_name, metavar="FILE",
        help="the maps as one float32 array [words, rows, columns]",
    ),
    flag(
        "--grid", type=output_name, metavar="FILE.png",
        help="the picture as the model sees it, cut into patches",
    ),
    flag(
        "--lens", type=output_name, metavar="FILE",
        help="a page: the token each patch and layer would decode to",
    ),
)  # fmt: skip

ATTENTION = (
    flag("--word", action="append", default=[], metavar="WORD", help="only this word; repeatable"),
    flag(
        "--layers", "--layer", type=number_list, default=(), metavar="LIST",
        help="layers to average, from 0, like 3 or 0,2-4 or all (default: the upper half)",
    ),
    flag(
        "--heads", "--head", type=number_list, default=(), metavar="LIST",
        help="heads to average, likewise (default: all)",
    ),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.look") -> Parser:
    parser = new_parser(
        prog,
        "Show what each word of an answer looked at. The answer goes to stdout, unless a file is\n"
        "/dev/stdout.",
        HELP,
    )
    add_question_arguments(parser, one_picture=True)
    add_flags(parser, "what to write, at least one", FILES)
    add_flags(parser, "which attention", ATTENTION)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags and options."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    paths = [
        path
        for path in (args.out, args.html, args.json, args.npy, args.grid, args.lens)
        if path is not None
    ]
    if not paths:
        parser.error("nothing to write: give --out, --html, --json, --npy, --grid or --lens")
    if len(args.image) > 1:
        parser.error(f"--image is given {len(args.image)} times: it looks at one picture")
    check_stdin(parser, args)
    check_outputs(parser, args, [path for path in paths if path != "-"])
    chosen = {"--word": args.word, "--layers": args.layers != (), "--heads": args.heads != ()}
    if not any((args.out, args.html, args.json, args.npy)) and any(chosen.values()):
        flag = next(flag for flag, given in chosen.items() if given)
        parser.error(f"{flag} is about the maps: give --out, --html, --json or --npy")
    for flag, path in (("--out", args.out), ("--grid", args.grid)):
        if path is not None and not path.lower().endswith(PICTURE_NAMES):
            parser.error(f"{flag} {path}: the name must end in .png, .jpg or .webp")
    return args, options
