"""The flags of `python -m minillava.chat`, and which of them go together; they are read before
torch is imported."""

from collections.abc import Sequence

from minillava.cli.arguments import (
    Parser,
    new_parser,
)
from minillava.cli.flags import (
    add_draft_arguments,
    add_flags,
    add_generation_arguments,
    add_model_arguments,
    add_output_arguments,
    check_drafts,
    flag,
    read_options,
)

COMMANDS_HELP = """\
/image PATH   add a picture, or several, to the next question; <image> in the question places it; a
              file dropped into the terminal is read as a shell reads it, with or without /image
/clear        forget the conversation and its pictures
/save FILE    write the conversation as JSON; a file that this session did not write is not
              overwritten
/help         this list
/quit, /exit  leave, as the end of the input does
Ctrl-C stops an answer, which keeps what it has said; it clears a line, and leaves when pressed
twice at an empty one. In a script it leaves."""

HELP = f"""\
commands:
{COMMANDS_HELP}

examples:
  python -m minillava.chat --weights llava-1.5-7b-hf --image cat.jpg
  printf 'What is it?\\nWhat colour is it?\\n' | python -m minillava.chat -m DIR -i cat.jpg

exit status: 0 the end, 1 an error in one line (at a terminal only one that ends the session),
2 wrong usage, 130 Ctrl-C twice at an empty prompt, or once where stdin is no terminal"""


def make_parser(prog: str = "python -m minillava.chat") -> Parser:
    parser = new_parser(
        prog,
        "Talk with LLaVA-1.5 about pictures. Each line of stdin is a question; the answers go to\n"
        "stdout, everything else to stderr.",
        HELP,
    )
    picture = "picture for the first question: a path or a data: URL; repeat for several"
    add_flags(
        parser,
        "question",
        [flag("-i", "--image", action="append", default=[], metavar="FILE", help=picture)],
    )
    add_model_arguments(parser, answers=True)
    add_generation_arguments(parser)
    add_draft_arguments(parser, shown=True)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags and options."""
    args = parser.parse_args(argv)
    options = read_options(parser, args)
    check_drafts(parser, args, shown=args.show_drafts)
    if "-" in args.image:
        parser.error("--image - would read stdin, where the questions come from: give a path")
    return args, options
