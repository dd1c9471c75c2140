"""The flags of `python -m minillava.convert`, and which of them go together; they are read before
torch is imported."""

import argparse
import re
from collections.abc import Sequence

from minillava.cli.arguments import (
    Parser,
    new_parser,
    path_name,
)
from minillava.cli.flags import (
    add_flags,
    add_output_arguments,
    flag,
)
from minillava.options import KINDS

HELP = """\
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


FLAGS = (
    flag("--to", required=True, choices=LAYOUTS, help="the layout of DST"),
    flag(
        "--vision-tower", type=path_name, metavar="DIR",
        help="folder of a CLIP, if SRC has no tower",
    ),
    flag(
        "--model-base", type=path_name, metavar="DIR",
        help="folder of the language model that SRC lacks",
    ),
    flag("--adapter", type=path_name, metavar="DIR", help="folder of a LoRA adapter to merge"),
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


def make_parser(prog: str = "python -m minillava.convert") -> Parser:
    parser = new_parser(
        prog,
        "Write a folder of LLaVA weights in another layout; no bit of a tensor changes unless\n"
        "asked.",
        HELP,
    )
    parser.add_argument(
        "source", type=path_name, metavar="SRC", help="folder of LLaVA-1.5 weights in any layout"
    )
    parser.add_argument(
        "target", type=path_name, metavar="DST",
        help="folder to make: one that does not exist, or is empty",
    )  # fmt: skip
    add_flags(parser, "what to write", FLAGS)
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    return (parser.parse_args(argv),)
