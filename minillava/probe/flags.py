"""The flags of `python -m minillava.probe`, and which of them go together; they are read before
torch is imported."""

from collections.abc import Sequence

from minillava.cli.arguments import (
    PICTURE_NAMES,
    Parser,
    check_outputs,
    check_stdin,
    file_name,
    new_parser,
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
Numbers are nats: by how much the log-probability of a word falls when something is changed.

examples:
  python -m minillava.probe -i weights/shapes/example-1.png -p "What colour is the circle?"
  python -m minillava.probe -m DIR -i x.jpg --plan
  python -m minillava.probe -m DIR -i x.jpg --word cat --measure occlusion --hide grey --out a.png
  python -m minillava.probe -m DIR -i red.png --other blue.png -p "What colour is the circle?"

exit status: 0 measured, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""

MEASURES = ("occlusion", "knockout", "ablation")
HIDINGS = ("mean", "zero", "grey", "blur")  # two act on the embeddings, two on the pixels
ABLATIONS = ("mean", "zero")  # of heads and feed-forward layers

FILES = (
    flag(
        "--out", type=output_name, metavar="FILE.png",
        help="a picture: for each word its attention, and what was measured of it",
    ),
    flag("--html", type=output_name, metavar="FILE", help="a page with everything measured"),
    flag(
        "--json", nargs="?", const="-", type=file_name, metavar="FILE",
        help="everything as numbers; without FILE on stdout, instead of the tables",
    ),
    flag(
        "--npy", type=output_name, metavar="FILE",
        help="the maps of occlusion as one float32 array [words, rows, columns]",
    ),
)  # fmt: skip

MEASURE_FLAGS = (
    flag("--word", action="append", default=[], metavar="WORD", help="only this word; repeatable"),
    flag(
        "--measure", action="append", choices=MEASURES,
        help="only this: hiding parts of the picture, cutting the answer off from it, taking out "
        "heads; repeatable (default: all)",
    ),
    flag(
        "--block", type=int, metavar="N",
        help="hide N x N patches at a time (default: 3, if the picture has as many)",
    ),
    flag(
        "--hide", choices=HIDINGS,
        help="by the mean patch or zeros, in the embeddings; by grey or a blur, in the pixels "
        f"(default: {HIDINGS[0]})",
    ),
    flag(
        "--window", type=int, metavar="N",
        help="cut N layers off from the picture at a time (default: a fifth of them)",
    ),
    flag(
        "--ablate", choices=ABLATIONS,
        help="what a head says instead: its mean over the prompt, or nothing "
        f"(default: {ABLATIONS[0]})",
    ),
    flag(
        "--other", type=file_name, metavar="FILE",
        help="a picture that differs in one fact: find where that fact is, by patching",
    ),
    flag("--plan", action="store_true", help="say what it would take, and measure nothing"),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.probe") -> Parser:
    parser = new_parser(
        prog,
        "Measure why a model answered: change something, and see what each word loses.",
        HELP,
    )
    add_question_arguments(parser, one_picture=True)
    add_flags(parser, "what to write", FILES)
    add_flags(parser, "what to measure", MEASURE_FLAGS)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags and options."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    args.measure = args.measure or list(MEASURES)
    if len(args.image) > 1:
        parser.error(f"--image is given {len(args.image)} times: probe needs one picture")
    for name in ("block", "window"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name} is {vars(args)[name]}, expected at least 1")
    check_stdin(parser, args)
    paths = [path for path in (args.out, args.html, args.json, args.npy) if path is not None]
    if args.plan and paths:
        parser.error("--plan measures nothing: leave it out, or the files")
    inputs = [] if args.other is None else [args.other]
    check_outputs(parser, args, [path for path in paths if path != "-"], inputs)
    about = {"npy": 0, "block": 0, "hide": 0, "window": 1, "ablate": 2}  # of MEASURES
    for name, measure in ((name, MEASURES[number]) for name, number in about.items()):
        if vars(args)[name] is not None and measure not in args.measure:
            parser.error(f"--{name} is about {measure}: add --measure {measure}")
    args.hide, args.ablate = args.hide or HIDINGS[0], args.ablate or ABLATIONS[0]
    if args.out is not None and not args.out.lower().endswith(PICTURE_NAMES):
        parser.error(f"--out {args.out}: the name must end in .png, .jpg or .webp")
    return args, options
