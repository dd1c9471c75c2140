"""The flags of `python -m minillava.serve`, and which of them go together; they are read before
torch is imported."""

import argparse
import re
from collections.abc import Sequence

from minillava.cli.arguments import (
    Parser,
    new_parser,
    not_empty,
    path_name,
)
from minillava.cli.flags import (
    add_draft_arguments,
    add_flags,
    add_model_arguments,
    add_output_arguments,
    check_drafts,
    flag,
)
from minillava.options import Options

HELP = """\
It speaks OpenAI's format: POST /v1/chat/completions and /v1/responses (streamed or not), GET
/v1/models. Pictures come as data: URLs; nothing is fetched. Besides: a page at /, POST /tokenize,
GET /health, /livez, /metrics, /openapi.json. It needs pip install 'minillava[serve]'.

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


ADDRESS = (
    flag("--host", type=not_empty, default="127.0.0.1", metavar="NAME",
         help="address to listen on (default: %(default)s, this machine alone)"),
    flag("--port", type=int, default=8000, metavar="N",
         help="0 for a free one (default: %(default)s)"),
    flag("--allowed-host", action="append", default=[], type=not_empty, metavar="NAME",
         help="a further name by which clients reach it; repeatable"),
    flag("--api-key-file", type=path_name, metavar="FILE",
         help="keys, one a line, of which clients send one; or $MINILLAVA_API_KEY"),
    flag("--no-key", action="store_true", help="let everybody in who reaches --host"),
    flag("--cors", action="append", default=[], type=not_empty, metavar="ORIGIN",
         help="a site whose pages may ask, such as https://example.org; repeatable"),
    flag("--served-model-name", action="append", type=not_empty, metavar="NAME",
         help="what clients call the model; repeatable (default: the folder's name)"),
)  # fmt: skip

SLOTS, PIECES = (2, 4), (64, 512)
"""What --slots and --prefill-chunk are on a CPU, and on a GPU."""

LIMITS = (
    flag("--slots", type=_from_1, metavar="N",
         help=f"answers at once (default: {SLOTS[0]} on a CPU, {SLOTS[1]} on a GPU)"),
    flag("--context", type=_from_1, default=2048, metavar="N",
         help="positions of a prompt and its answer (default: %(default)s)"),
    flag("--queue", type=_from_1, default=32, metavar="N",
         help="requests that may wait (default: %(default)s)"),
    flag("--prefill-chunk", type=_from_1, metavar="N",
         help="positions of a prompt that are read between two tokens of other answers "
         f"(default: {PIECES[0]} on a CPU, {PIECES[1]} on a GPU)"),
    flag("--no-reuse", action="store_true",
         help="read every prompt whole: its time then says nothing about what others asked"),
    flag("--max-body", type=_from_1, default=32, metavar="MIB",
         help="of a request (default: %(default)s)"),
    flag("--body-timeout", type=_from_1, default=60, metavar="S",
         help="seconds within which a body arrives (default: %(default)s)"),
    flag("--max-pixels", type=_from_1, default=64, metavar="M",
         help="million pixels of a picture (default: %(default)s)"),
    flag("--no-page", action="store_true", help="do without the page at /"),
    flag("--grace", type=_from_1, default=30, metavar="S",
         help="seconds that answers have to finish at the end (default: %(default)s)"),
    flag("--stall", type=_from_1, default=300, metavar="S",
         help="seconds without a step after which /health says so (default: %(default)s)"),
)  # fmt: skip

ANSWERS = (
    flag("--max-tokens", type=_from_1, default=Options.max_new_tokens, metavar="N",
         help="longest answer where a request says nothing (default: %(default)s)"),
    flag("--temperature", type=float, default=Options.temperature, metavar="T",
         help="where a request says nothing; 0 is greedy (default: %(default)s)"),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.serve") -> Parser:
    parser = new_parser(prog, "Serve a model to OpenAI's clients.", HELP)
    add_flags(parser, "who may ask", ADDRESS)
    add_flags(parser, "limits", LIMITS)
    add_flags(parser, "answers", ANSWERS)
    add_model_arguments(parser, answers=True)
    add_draft_arguments(parser)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    check_drafts(parser, args)
    if not 0 <= args.port < 65536:
        parser.error(f"--port is {args.port}, expected 0 to 65535")
    if not 0 <= args.temperature <= 2:
        parser.error(f"--temperature is {args.temperature}, expected 0 to 2")
    for origin in args.cors:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            parser.error(f"--cors is {origin}, expected a site such as https://example.org")
    if args.compile:  # a compiled step writes all rows at one position, but each row is at its own
        parser.error("--compile is for one answer at a time: leave it out")
    return (args,)
