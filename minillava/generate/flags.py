"""The flags of `python -m minillava.generate`, and which of them go together; they are read before
torch is imported."""

from collections.abc import Sequence

from minillava.cli.arguments import (
    Parser,
    check_outputs,
    check_stdin,
    new_parser,
    output_name,
)
from minillava.cli.flags import (
    add_contrast_arguments,
    add_draft_arguments,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    add_question_arguments,
    add_search_arguments,
    check_drafts,
    option,
    read_contrast,
    read_options,
)

HELP = """\
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


def make_parser(prog: str = "python -m minillava.generate") -> Parser:
    parser = new_parser(
        prog,
        "Ask LLaVA-1.5 about a picture. The answer goes to stdout, everything else to stderr.",
        HELP,
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
    add_draft_arguments(parser, shown=True)
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


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags, options, and the method of contrast."""
    args = parser.parse_args(argv)
    options, contrast = read_options(parser, args), read_contrast(parser, args)
    several = ("--num-return-sequences", args.num_return_sequences > 1)
    check_drafts(parser, args, ("--num-beams", args.num_beams > 1), several, shown=args.show_drafts)
    if args.show_drafts and args.json:
        parser.error("--show-drafts colours a text: leave --json out")
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
