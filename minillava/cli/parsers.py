"""The flags of each door, and which of them go together; they are read before torch is imported.

For each door NAME of doors.py there are `NAME_parser()` and `read_NAME(parser, argv)`, which
returns the arguments of the door's function. Wrong usage ends the process with status 2. Flags that
several doors share are in flags.py.
"""

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
    not_empty,
    number_list,
    output_name,
)
from minillava.cli.flags import (
    add_contrast_arguments,
    add_draft_arguments,
    add_flags,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_question_arguments,
    add_search_arguments,
    check_drafts,
    flag,
    option,
    read_contrast,
    read_options,
)
from minillava.files.disk import is_stream, same_file
from minillava.options import ASPECTS, DEPTHS, DEVICES, KINDS, Options
from minillava.templates import TEMPLATES

PICTURE_NAMES = (".png", ".jpg", ".jpeg", ".webp")
"""How the names of pictures end that are written."""


def _parser(prog: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _path(text: str) -> Path:
    return Path(file_name(not_empty(text)))


# ----------------------------------------------------------------------------------------- generate

GENERATE_HELP = """\
examples:
  python -m minillava.generate --image weights/shapes/example-1.png
  python -m minillava.generate -m llava-1.5-7b-hf -i cat.jpg -p "What is the cat doing?"
  python -m minillava.generate -m DIR -i a.png -i b.png -p "<image> or <image>: which is brighter?"
  cat x.jpg | python -m minillava.generate -m DIR -i - --json
  python -m minillava.generate -m DIR -i x.jpg --temperature 0.7 --top-p 0.9 --seed 1 --verbose

--json: text, ids (the new ones), finish_reason (stop, length), with beams score, with --logprobs
  tokens (of each id: id, piece, logprob, and top, a list of the same three for the likeliest).
  Then answers, a list of such objects, of which the first is the one above: one, or as many as
  --num-return-sequences asks for. Then prompt, seed, and timings: seconds of load, encode, prefill
  (up to the first token) and decode (the rest), with beams search. With --draft also draft: kind,
  passes (after the prompt's), drafted, accepted, lengths (in how many passes 0, 1, ... guesses were
  right), exact (whether a pass has the bits of single steps here).

exit status: 0 answered, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""


def generate_parser(prog: str = "python -m minillava.generate") -> Parser:
    parser = _parser(
        prog,
        "Ask LLaVA-1.5 about a picture. The answer goes to stdout, everything else to stderr.",
        GENERATE_HELP,
    )
    add_question_arguments(parser)
    add_model_arguments(parser, answers=True)
    add_generation_arguments(parser)
    names, several = option(
        "--num-return-sequences",
        type=int,
        metavar="N",
        help="N answers, an empty line between them, the best beam first (default: {default})",
    )
    add_search_arguments(parser).add_argument(*names, **several)
    add_contrast_arguments(parser).add_argument(
        "--contrast-log",
        type=output_name,
        metavar="FILE",
        help="write what each token was chosen from, one JSON object a line",
    )
    add_draft_arguments(parser)
    group = add_output_arguments(parser)
    group.add_argument(
        "--json", action="store_true", help="one JSON object: text, ids, finish reason, timings"
    )
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: of each token id, piece and log-probability, and the K most likely ones "
        "in its place; by the raw logits, before penalties, temperature and filters",
    )
    group.add_argument(
        "--print-prompt", action="store_true", help="show the exact prompt on stderr"
    )
    return parser


def read_generate(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, options, and the method of contrast."""
    args = parser.parse_args(argv)
    options, contrast = read_options(parser, args), read_contrast(parser, args)
    check_drafts(parser, args)
    if args.contrast_log and contrast is None:
        parser.error("--contrast-log needs --contrast")
    if args.contrast_log and args.num_return_sequences > 1:
        parser.error("--contrast-log follows one answer: leave --num-return-sequences out")
    if args.logprobs is not None and (not args.json or args.logprobs < 0):
        parser.error(
            f"--logprobs {args.logprobs}: " + ("is below 0" if args.json else "needs --json")
        )
    if contrast is not None and not args.image:
        parser.error(
            f"--contrast {args.contrast} contrasts two views of a picture: give one with --image"
        )
    if not args.image and args.prompt is None:
        parser.error("nothing to answer: give a picture with --image, or a question with --prompt")
    check_stdin(parser, args)
    check_outputs(parser, args, [args.contrast_log])
    return args, options, contrast


# --------------------------------------------------------------------------------------------- chat

CHAT_COMMANDS = """\
/image PATH   add a picture, or several, to the next question; <image> in the question places it; a
              file dropped into the terminal is read as a shell reads it, with or without /image
/clear        forget the conversation and its pictures
/save FILE    write the conversation as JSON; a file that this session did not write is not
              overwritten
/help         this list
/quit, /exit  leave, as the end of the input does
Ctrl-C stops an answer, which keeps what it has said; it clears a line, and leaves when pressed
twice at an empty one. In a script it leaves."""

CHAT_HELP = f"""\
commands:
{CHAT_COMMANDS}

examples:
  python -m minillava.chat --weights llava-1.5-7b-hf --image cat.jpg
  printf 'What is it?\\nWhat colour is it?\\n' | python -m minillava.chat -m DIR -i cat.jpg

exit status: 0 the end, 1 an error in one line (at a terminal only one that ends the session),
2 wrong usage, 130 Ctrl-C twice at an empty prompt, or once where stdin is no terminal"""


def chat_parser(prog: str = "python -m minillava.chat") -> Parser:
    parser = _parser(
        prog,
        "Talk with LLaVA-1.5 about pictures. Each line of stdin is a question; the answers go to\n"
        "stdout, everything else to stderr.",
        CHAT_HELP,
    )
    picture = "picture for the first question: a path or a data: URL; repeat for several"
    add_flags(
        parser,
        "question",
        [flag("-i", "--image", action="append", default=[], metavar="FILE", help=picture)],
    )
    add_model_arguments(parser, answers=True)
    add_generation_arguments(parser)
    add_draft_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_chat(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags and options."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    check_drafts(parser, args)
    if "-" in args.image:
        parser.error("--image - would read stdin, where the questions come from: give a path")
    return args, options


# -------------------------------------------------------------------------------------------- batch

BATCH_HELP = """\
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


BATCH_FILES = (
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

BATCH_SPEED = (
    flag(
        "--batch-size", type=int, default=8, metavar="N",
        help="questions at a time (default: %(default)s)",
    ),
    flag(
        "--image-cache", type=int, default=32, metavar="N",
        help="encoded pictures kept, 5 MB each at 7B in 16 bits (default: %(default)s)",
    ),
)  # fmt: skip


def batch_parser(prog: str = "python -m minillava.batch") -> Parser:
    parser = _parser(
        prog,
        "Answer a file of questions about pictures, in the format of LLaVA's evaluation.",
        BATCH_HELP,
    )
    add_flags(parser, "files", BATCH_FILES)
    add_flags(parser, "speed", BATCH_SPEED)
    add_model_arguments(parser, answers=True)
    add_generation_arguments(parser)
    add_search_arguments(parser)
    add_contrast_arguments(parser)
    add_draft_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_batch(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, and the options with which each question is asked."""
    args = parser.parse_args(argv)
    options = read_options(parser, args) | {
        "contrast": read_contrast(parser, args),
        "system": args.system,
    }
    check_drafts(parser, args)
    for name, least in (("batch_size", 1), ("image_cache", 0)):
        if vars(args)[name] < least:
            parser.error(f"{name} is {vars(args)[name]}, expected at least {least}")
    if same_file(args.answers, args.questions):
        parser.error("--questions and --answers are the same file")
    journal = (
        [] if is_stream(args.answers) else [args.answers.with_name(f"{args.answers.name}.partial")]
    )
    given = "/dev/stdin" if args.questions == "-" else args.questions
    check_outputs(parser, args, [args.answers, *journal], [given])
    return args, options


# --------------------------------------------------------------------------------------------- look

LOOK_HELP = """\
examples:
  python -m minillava.look --image weights/shapes/example-1.png --out look.png --html look.html
  python -m minillava.look -m DIR -i x.jpg --word cat --layers 14-20 --out cat.png

exit status: 0 written, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""

LOOK_FILES = (
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

LOOK_ATTENTION = (
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


def look_parser(prog: str = "python -m minillava.look") -> Parser:
    parser = _parser(
        prog,
        "Show what each word of an answer looked at. The answer goes to stdout, unless a file is\n"
        "/dev/stdout.",
        LOOK_HELP,
    )
    add_question_arguments(parser, one_picture=True)
    add_flags(parser, "what to write, at least one", LOOK_FILES)
    add_flags(parser, "which attention", LOOK_ATTENTION)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_look(parser: Parser, argv: Sequence[str]) -> tuple:
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


# -------------------------------------------------------------------------------------------- probe

PROBE_HELP = """\
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

PROBE_FILES = (
    flag(
        "--out", type=output_name, metavar="FILE.png",
        help="for each word its attention, and what hiding parts of the picture does to it",
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

PROBE_MEASURES = (
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
        "--hide", choices=HIDINGS, default=HIDINGS[0],
        help="by the mean patch or zeros, in the embeddings; by grey or a blur, in the pixels "
        f"(default: {HIDINGS[0]})",
    ),
    flag(
        "--window", type=int, metavar="N",
        help="cut N layers off from the picture at a time (default: a fifth of them)",
    ),
    flag(
        "--ablate", choices=ABLATIONS, default=ABLATIONS[0],
        help="what a head says instead: its mean over the prompt, or nothing "
        f"(default: {ABLATIONS[0]})",
    ),
    flag(
        "--other", type=file_name, metavar="FILE",
        help="a picture that differs in one fact: find where that fact is, by patching",
    ),
    flag("--plan", action="store_true", help="say what it would take, and measure nothing"),
)  # fmt: skip


def probe_parser(prog: str = "python -m minillava.probe") -> Parser:
    parser = _parser(
        prog,
        "Measure why a model answered: change something, and see what each word loses.",
        PROBE_HELP,
    )
    add_question_arguments(parser, one_picture=True)
    add_flags(parser, "what to write", PROBE_FILES)
    add_flags(parser, "what to measure", PROBE_MEASURES)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_probe(parser: Parser, argv: Sequence[str]) -> tuple:
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
    for name in ("out", "npy"):
        if vars(args)[name] is not None and "occlusion" not in args.measure:
            parser.error(f"--{name} is about occlusion: add --measure occlusion")
    if args.out is not None and not args.out.lower().endswith(PICTURE_NAMES):
        parser.error(f"--out {args.out}: the name must end in .png, .jpg or .webp")
    return args, options


# -------------------------------------------------------------------------------------------- trace

SETTINGS = (
    "weights", "revision", "model_base", "adapter", "vision_tower", "device", "dtype", "attention",
    "quantize", "template", "system", "image_aspect_ratio",
)  # fmt: skip
"""What the two runs of --compare may differ in: the flags of the model, by name."""

TRACE_HELP = f"""\
step 0 is the picture and the prompt (prefill), step 1 the first cached token. A * marks a shape
that changed since the step traced before.

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


TRACE_FLAGS = (
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


def trace_parser(prog: str = "python -m minillava.trace") -> Parser:
    parser = _parser(
        prog,
        "Run one question and print every stage on the way to the answer: name, shape, dtype, the\n"
        "source line that made it, min, mean, max, first values. Or compare two runs.",
        TRACE_HELP,
    )
    add_question_arguments(parser)
    add_flags(parser, "trace", TRACE_FLAGS)
    add_model_arguments(parser)
    add_generation_arguments(parser)
    add_output_arguments(parser).add_argument(
        "--json", action="store_true", help="one JSON object a line"
    )
    return parser


def read_trace(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, options and, for --compare, the two sides; each is a file, or the flags of its run."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    if options["seed"] is None:
        options["seed"] = Options().seed  # the same for both runs of a comparison
    check_stdin(parser, args)
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


# ------------------------------------------------------------------------------------------ inspect

INSPECT_HELP = """\
examples:
  python -m minillava.inspect weights/shapes
  python -m minillava.inspect llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --keys
  python -m minillava.inspect llava-1.5-7b-hf --doctor --image cat.jpg

exit status: 0 it can be opened (and no check FAILED), 1 it cannot, 2 wrong usage, 130 Ctrl-C"""

INSPECT_FLAGS = (
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


def inspect_parser(prog: str = "python -m minillava.inspect") -> Parser:
    parser = _parser(
        prog,
        "Say what a folder of weights holds and lacks, and what it needs in memory, from the\n"
        "headers of its files.",
        INSPECT_HELP,
    )
    parser.add_argument(
        "folder", nargs="?", type=not_empty, metavar="DIR", help="the weights, as for --weights"
    )
    add_flags(parser, "what to say", INSPECT_FLAGS)
    add_model_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_inspect(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    if args.folder is not None and args.weights is not None:
        parser.error(f"DIR and --weights are the same: give {args.folder} or {args.weights}")
    if args.image is not None and not args.doctor:
        parser.error("--image is what --doctor shows the model: give both")
    return (args,)


# ------------------------------------------------------------------------------------------ convert

CONVERT_HELP = """\
layouts:
  hf           the names and files of llava-hf on the hub: what Hugging Face transformers loads
  original     LLaVA's own names and flat config.json, the vision tower inside
  safetensors  the names and files of SRC as they are, its .bin weights as safetensors

example:
  python -m minillava.convert llava-v1.5-7b OUT --to hf --vision-tower clip-vit-large-patch14-336

Weights are written shard by shard, so that memory holds one, and read back and compared. Until then
the folder is called DST.partial.

exit status: 0 converted, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""

LAYOUTS = ("hf", "original", "safetensors")


def read_size(text: str) -> float:
    """The bytes of a size such as 4GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size such as 4GB")
    return float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")


CONVERT_FLAGS = (
    flag("--to", required=True, choices=LAYOUTS, help="the layout of DST"),
    flag("--vision-tower", type=_path, metavar="DIR", help="folder of a CLIP, if SRC has no tower"),
    flag(
        "--model-base", type=_path, metavar="DIR",
        help="folder of the language model that SRC lacks",
    ),
    flag("--adapter", type=_path, metavar="DIR", help="folder of a LoRA adapter to merge"),
    flag(
        "--dtype", choices=("float32", "float16", "bfloat16"),
        help="precision to convert to (default: as stored)",
    ),
    flag(
        "--quantize", choices=KINDS,
        help="the language model's linear layers in 8 or 4 bits a weight",
    ),
    flag(
        "--shard-size", type=read_size, default="4GB", metavar="SIZE",
        help="largest weight file (default: %(default)s)",
    ),
)  # fmt: skip


def convert_parser(prog: str = "python -m minillava.convert") -> Parser:
    parser = _parser(
        prog,
        "Write a folder of LLaVA weights in another layout; no bit of a tensor changes unless\n"
        "asked.",
        CONVERT_HELP,
    )
    parser.add_argument(
        "source", type=_path, metavar="SRC", help="folder of LLaVA-1.5 weights in any layout"
    )
    parser.add_argument(
        "target", type=_path, metavar="DST",
        help="folder to make: one that does not exist, or is empty",
    )  # fmt: skip
    add_flags(parser, "what to write", CONVERT_FLAGS)
    add_output_arguments(parser)
    return parser


def read_convert(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    return (parser.parse_args(argv),)


# --------------------------------------------------------------------------------------------- pope

POPE_HELP = """\
examples:
  python -m minillava.pope --questions coco_pope_popular.json --answers pope-answers.jsonl
  python -m minillava.pope --questions coco/*.json --asked llava_pope_test.jsonl --answers a.jsonl

--questions are POPE's files with labels, {question_id, image, text, label[, category]}; answers are
{question_id, text[, prompt]} as batch and LLaVA write them; JSON lines or an array. "yes" is the
positive class. The scorers, each as its authors published it:

- llava (llava/eval/eval_pope.py): the text up to the first full stop, without commas, cut at spaces
  (not at the ends of lines); "no" if No, not or no is among these words, else "yes".
- vcd (experiments/eval/eval_pope.py): letters in lower case, words or not: where "yes" is right,
  right if "yes" is anywhere in the text; where "no" is right, right if "no" is ("know" will do).
  Its reading depends on the label.
- ritual (eval_bench/pope_eval_llava.py): one verdict per line of the answer, without full stops and
  commas; "no" if one of No, not, no, NO or a word in n't is in it, else "yes". An answer of several
  lines makes several verdicts, which are compared with the labels of the questions that follow. The
  published script reads a category per run, so the shift is here within a category; verdicts beyond
  the last label count in the yes-ratio only.

Answers are matched by question_id, where the published scripts go by the order of the lines. An
answer that names another prompt than the question's text is left out; an instruction after the text
is not another prompt. POPE's files are each numbered from 1, and LLaVA's file of all of them is
not: --asked is then the file that was asked, and its questions are found among the labels by
category, picture and text. The category of a label is its field, or else the word in the file's
name. Without --asked such answers are refused, since the ids of one category would fit the labels
of another. A figure that would divide by zero is left out, where the published scripts end with an
error.

exit status: 0 each question has one answer and each answer its question, 1 otherwise, or a file
cannot be read, 2 wrong usage, 130 Ctrl-C"""

POPE_SCORERS = ("llava", "vcd", "ritual")

POPE_FLAGS = (
    flag(
        "--questions", "--question-file", type=_path, nargs="+", required=True, metavar="FILE",
        help="questions with labels",
    ),
    flag(
        "--asked", type=_path, metavar="FILE",
        help="the questions as they were asked, where their ids are not those of --questions "
        "(LLaVA's llava_pope_test.jsonl)",
    ),
    flag(
        "--answers", "--answers-file", type=_path, required=True, metavar="FILE",
        help="answers to them",
    ),
    flag(
        "--scorer", choices=[*POPE_SCORERS, "all"], default="all", help="default: %(default)s"
    ),
)  # fmt: skip


def pope_parser(prog: str = "python -m minillava.pope") -> Parser:
    parser = _parser(
        prog,
        'Score answers to POPE (Li et al. 2023: "Is there a ... in the image?") in the three ways\n'
        "that papers do.",
        POPE_HELP,
    )
    add_flags(parser, "files", POPE_FLAGS)
    add_output_arguments(parser).add_argument(
        "--json", action="store_true", help="one JSON object, with all ids and disagreements"
    )
    return parser


def read_pope(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    return (parser.parse_args(argv),)


# -------------------------------------------------------------------------------------------- serve

SERVE_HELP = """\
It speaks OpenAI's format: POST /v1/chat/completions (streamed or not), GET /v1/models. Pictures
come as data: URLs; nothing is fetched. Besides: POST /tokenize, GET /health, /livez, /metrics. It
needs pip install 'minillava[serve]'.

example:
  python -m minillava.serve -m llava-1.5-7b-hf --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is a ring?"}]}'

exit status: 0 ended by SIGTERM, 1 an error in one line, 2 wrong usage, 130 Ctrl-C"""


def _from_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a whole number from 1")
    return number


SERVE_ADDRESS = (
    flag("--host", type=not_empty, default="127.0.0.1", metavar="NAME",
         help="address to listen on (default: %(default)s, this machine alone)"),
    flag("--port", type=int, default=8000, metavar="N", help="0 for a free one (default: 8000)"),
    flag("--allowed-host", action="append", default=[], type=not_empty, metavar="NAME",
         help="a further name by which clients reach it; repeatable"),
    flag("--api-key-file", type=_path, metavar="FILE",
         help="keys, one a line, of which clients send one; or $MINILLAVA_API_KEY"),
    flag("--no-key", action="store_true", help="let everybody in who reaches --host"),
    flag("--served-model-name", action="append", type=not_empty, metavar="NAME",
         help="what clients call the model; repeatable (default: the folder's name)"),
)  # fmt: skip

SERVE_LIMITS = (
    flag("--slots", type=_from_1, metavar="N",
         help="answers at once (default: 2 on a CPU, 4 on a GPU)"),
    flag("--context", type=_from_1, default=2048, metavar="N",
         help="positions of a prompt and its answer (default: %(default)s)"),
    flag("--queue", type=_from_1, default=32, metavar="N",
         help="requests that may wait (default: %(default)s)"),
    flag("--prefill-chunk", type=_from_1, metavar="N",
         help="positions of a prompt that are read between two tokens of other answers "
         "(default: 64 on a CPU, 512 on a GPU)"),
    flag("--no-reuse", action="store_true",
         help="read every prompt whole: its time then says nothing about what others asked"),
    flag("--max-body", type=_from_1, default=32, metavar="MIB", help="of a request (default: 32)"),
    flag("--body-timeout", type=_from_1, default=60, metavar="S",
         help="seconds within which a body arrives (default: %(default)s)"),
    flag("--max-pixels", type=_from_1, default=64, metavar="M",
         help="million pixels of a picture (default: %(default)s)"),
    flag("--grace", type=_from_1, default=30, metavar="S",
         help="seconds that answers have to finish at the end (default: %(default)s)"),
    flag("--stall", type=_from_1, default=300, metavar="S",
         help="seconds without a step after which /health says so (default: %(default)s)"),
)  # fmt: skip

SERVE_ANSWERS = (
    flag("--max-tokens", type=_from_1, default=Options.max_new_tokens, metavar="N",
         help="longest answer where a request says nothing (default: %(default)s)"),
    flag("--temperature", type=float, default=Options.temperature, metavar="T",
         help="where a request says nothing; 0 is greedy (default: %(default)s)"),
)  # fmt: skip


def serve_parser(prog: str = "python -m minillava.serve") -> Parser:
    parser = _parser(prog, "Serve a model to OpenAI's clients.", SERVE_HELP)
    add_flags(parser, "who may ask", SERVE_ADDRESS)
    add_flags(parser, "limits", SERVE_LIMITS)
    add_flags(parser, "answers", SERVE_ANSWERS)
    add_model_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_serve(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port is {args.port}, expected 0 to 65535")
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}, expected 0 to 2")
    if args.compile:  # a compiled step writes all rows at one position, but each row is at its own
        parser.error("--compile is for one answer at a time: leave it out")
    return (args,)


# ----------------------------------------------------------------------------------------- finetune

FINETUNE_HELP = """\
examples:
  python -m minillava.finetune MODEL rows.json --images photos --check 3
  python -m minillava.finetune MODEL rows.json --images photos --out cats --rank 16 --accumulate 1
  python -m minillava.generate --weights MODEL --adapter cats --image photos/1.jpg

DATA is a list, or lines, of LLaVA's rows:
  {"id": 1, "image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                {"from": "gpt", "value": "A cat."}]}
All rows are checked before the model is opened. Learnt are the answers and what ends them, and
nothing else. The recipes have the numbers that LLaVA-1.5 was trained with, on 8 GPUs; any flag
changes one. OUT gets what was learnt, log.jsonl with a line per update, and the state from which
--resume goes on as if nothing had happened.

A LoRA in --layout hf is opened by PEFT on a llava-hf model, in --layout llava by LLaVA. A whole
model (--learn language, or --merged) is written like the one it began from, to OUT/model.

exit status: 0 learnt, 1 an error in one line, 2 wrong usage, 130 Ctrl-C (what is done is saved)"""

RECIPE_NAMES = ("stage1", "stage2", "lora", "task", "task-lora")

FINETUNE_FLAGS = (
    flag("--images", type=_path, metavar="DIR", help="what pictures are named from (default: "
         "the folder of DATA)"),
    flag("--out", type=_path, metavar="OUT", help="folder of what is learnt"),
    flag("--check", type=int, metavar="N", help="check the rows, print N of them with what is "
         "learnt in [[ ]], and stop"),
    flag("--plan", action="store_true", help="say what would be learnt, and stop"),
    flag("--skip-bad", action="store_true", help="leave rows out that cannot be learnt"),
    flag("--resume", action="store_true", help="go on with the run in OUT"),
    flag("--save-every", type=int, default=100, metavar="N", help="updates (default: %(default)s)"),
    flag("--layout", choices=("hf", "llava"), help="of a LoRA (default: as MODEL)"),
    flag("--merged", action="store_true", help="also write the whole model with the LoRA in it"),
)  # fmt: skip

RECIPE_FLAGS = (
    flag("--recipe", choices=RECIPE_NAMES, default="lora", help="(default: %(default)s)"),
    flag("--learn", choices=("projector", "lora", "language"), help="what learns"),
    flag("--template", choices=TEMPLATES, help="the words around questions and answers"),
    flag("--image-aspect-ratio", dest="aspect", choices=ASPECTS, help="how a picture becomes a "
         "square"),
    flag("--rate", type=float, metavar="X", help="of LoRA or language model"),
    flag("--projector-rate", type=float, metavar="X", help="of the projector"),
    flag("--rank", type=int, metavar="N", help="of the LoRA"),
    flag("--alpha", type=float, metavar="X", help="the LoRA counts alpha / rank (default: twice "
         "the rank)"),
    flag("--dropout", type=float, metavar="X", help="of what the LoRA reads"),
    flag("--batch", type=int, metavar="N", help="rows that are computed at once"),
    flag("--accumulate", type=int, metavar="N", help="batches of an update"),
    flag("--epochs", type=int, metavar="N", help="how often each row is learnt"),
    flag("--updates", type=int, metavar="N", help="instead of epochs"),
    flag("--max-length", type=int, metavar="N", help="positions of a row; its end is cut"),
    flag("--warmup", type=float, metavar="X", help="share of the updates until the full rate"),
    flag("--decay", type=float, metavar="X", help="weight decay"),
    flag("--clip", type=float, metavar="X", help="largest norm of a gradient; 0: none"),
    flag("--order", choices=("length", "shuffle", "file"), help="of the rows"),
    flag("--loss-mean", choices=("tokens", "microbatch"), help="over an update's tokens, or "
         "over each batch's alone, as LLaVA was trained"),
    flag("--seed", type=int, metavar="N", help="of order, start and dropout"),
    flag("--hold-out", type=float, metavar="X", help="share of the rows that are not learnt; their "
         "loss is told before the first update and at each save"),
    flag("--quantize", choices=KINDS, help="the language model, which a LoRA or the projector then "
         "learns on, in 8 or 4 bits a weight"),
)  # fmt: skip


def finetune_parser(prog: str = "python -m minillava.finetune") -> Parser:
    parser = _parser(
        prog,
        "Learn from rows of pictures and conversations: a LoRA, the projector, or the language\n"
        "model.",
        FINETUNE_HELP,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of LLaVA-1.5 weights, or hub id")
    parser.add_argument("data", type=_path, metavar="DATA", help="rows, JSON or JSON lines")
    add_flags(parser, "the run", FINETUNE_FLAGS)
    add_flags(parser, "the recipe; where nothing is given, its own numbers stand", RECIPE_FLAGS)
    group = parser.add_argument_group("model")
    group.add_argument("--vision-tower", metavar="DIR", help="folder of a CLIP, if MODEL has none")
    group.add_argument("--model-base", metavar="DIR", help="language model, if MODEL has none")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help=f"one of {', '.join(DEVICES)}"
    )
    add_output_arguments(parser)
    return parser


def read_finetune(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    if args.out is None and args.check is None and not args.plan:
        parser.error("--out says where what is learnt goes; or --check N, or --plan")
    for name in ("check", "save_every"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {vars(args)[name]}, expected 1 or more")
    return (args,)
