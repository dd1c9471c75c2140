"""The flags of `python -m minillava.finetune`, and which of them go together; they are read before
torch is imported."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
from minillava.finetune.recipe import INITS, LEARN, MEANS, ORDERS, RECIPES, Recipe
from minillava.finetune.watch import LOGGERS
from minillava.options import ASPECTS, ATTENTION, DEVICES, KINDS
from minillava.templates import TEMPLATES

HELP = """\
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

FLAGS = (
    flag("--images", type=path_name, metavar="DIR", help="what pictures are named from (default: "
         "the folder of DATA)"),
    flag("--out", type=path_name, metavar="OUT", help="folder of what is learnt"),
    flag("--check", type=int, metavar="N", help="check the rows, print N of them with what is "
         "learnt in [[ ]], and stop"),
    flag("--plan", action="store_true", help="say what would be learnt, and stop"),
    flag("--skip-bad", action="store_true", help="leave rows out that cannot be learnt"),
    flag("--missing-images", choices=("error", "skip"), default="error", help="skip: leave rows "
         "out whose picture is not there or has no bytes (default: %(default)s)"),
    flag("--resume", action="store_true", help="go on with the run in OUT"),
    flag("--save-every", type=int, default=100, metavar="N", help="updates (default: %(default)s)"),
    flag("--val", type=path_name, metavar="FILE", help="rows that are measured, instead of "
         "--hold-out"),
    flag("--evaluate-every", type=int, metavar="N", help="updates (default: as --save-every)"),
    flag("--early-stop", type=int, metavar="N", help="after so many evaluations without gain"),
    flag("--log", action="append", choices=LOGGERS, default=[], help="besides log.jsonl; needs "
         "the extra of that name"),
    flag("--checkpoint", choices=("auto", "on", "off"), default="auto", help="compute each block "
         "again in the backward pass: the same bits in less memory; auto: if the plan does not fit "
         "without (default: %(default)s)"),
    flag("--layout", choices=("hf", "llava"), help="of a LoRA (default: as MODEL)"),
    flag("--merged", action="store_true", help="also write the whole model with the LoRA in it"),
)  # fmt: skip

RECIPE_FLAGS = (
    flag("--recipe", choices=RECIPES, default="lora", help="(default: %(default)s)"),
    flag("--learn", choices=LEARN, help="what learns; everything: the vision tower, "
         "too; medusa: heads that guess, for --draft medusa:OUT"),
    flag("--template", choices=TEMPLATES, help="the words around questions and answers"),
    flag("--image-aspect-ratio", dest="aspect", choices=ASPECTS, help="how a picture becomes a "
         "square"),
    flag("--rate", type=float, metavar="X", help="of LoRA or language model"),
    flag("--projector-rate", type=float, metavar="X", help="of the projector"),
    flag("--vision-rate", type=float, metavar="X", help="of the vision tower, with --learn "
         "everything"),
    flag("--rank", type=int, metavar="N", help="of the LoRA"),
    flag("--alpha", type=float, metavar="X", help="the LoRA counts alpha / rank (default: twice "
         "the rank)"),
    flag("--rslora", action="store_true", help="... or alpha / its square root"),
    flag("--init", choices=INITS, help="how A of the LoRA begins (default: kaiming)"),
    flag("--heads", type=int, metavar="N", help=f"of Medusa (default: {Recipe.heads})"),
    flag("--dropout", type=float, metavar="X", help="of what the LoRA reads"),
    flag("--batch", type=int, metavar="N", help="rows that are computed at once"),
    flag("--accumulate", type=int, metavar="N", help="batches of an update"),
    flag("--epochs", type=int, metavar="N", help="how often each row is learnt"),
    flag("--updates", type=int, metavar="N", help="instead of epochs"),
    flag("--max-length", type=int, metavar="N", help="positions of a row; its end is cut"),
    flag("--warmup", type=float, metavar="X", help="share of the updates until the full rate"),
    flag("--decay", type=float, metavar="X", help="weight decay"),
    flag("--clip", type=float, metavar="X", help="largest norm of a gradient; 0: none"),
    flag("--order", choices=ORDERS, help="of the rows"),
    flag("--loss-mean", choices=MEANS, help="over an update's tokens, or "
         "over each batch's alone, as LLaVA was trained"),
    flag("--attention", choices=ATTENTION, help="eager, whose bits are those of transformers, or "
         "fused, which keeps no weights of attention (default: eager on a CPU)"),
    flag("--add-tokens", type=path_name, metavar="FILE", help="new tokens, one a line, whose rows "
         "in both tables learn, too"),
    flag("--seed", type=int, metavar="N", help="of order, start and dropout"),
    flag("--hold-out", type=float, metavar="X", help="share of the rows that are not learnt; their "
         "loss is told before the first update and at each evaluation"),
    flag("--dtype", metavar="NAME", help="auto, float32, bfloat16: of products and of frozen "
         "weights; what learns is float32"),
    flag("--quantize", choices=KINDS, help="the language model, which a LoRA or the projector then "
         "learns on, in 8 or 4 bits a weight"),
)  # fmt: skip


class Source(NamedTuple):
    """A file of rows, and how often each of its rows is learnt in an epoch."""

    path: Path
    weight: float = 1.0


def source(text: str) -> Source:
    """FILE or FILE:WEIGHT. Raises argparse.ArgumentTypeError for a weight out of range."""
    path, colon, weight = text.rpartition(":")
    try:
        number = float(weight)
    except ValueError:  # no weight: a colon of the name, as in C:\rows.json
        return Source(path_name(text))
    if not colon or Path(text).exists():
        return Source(path_name(text))
    if not 0 < number <= 1000:
        raise argparse.ArgumentTypeError(
            f"{text}: its weight is {weight}, expected a number above 0, at most 1000"
        )
    return Source(path_name(path), number)


def make_parser(prog: str = "python -m minillava.finetune") -> Parser:
    parser = new_parser(
        prog,
        "Learn from rows of pictures and conversations: a LoRA, the projector, the language\n"
        "model, or Medusa's heads.",
        HELP,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of LLaVA-1.5 weights, or hub id")
    parser.add_argument(
        "data",
        type=source,
        nargs="+",
        metavar="DATA",
        help="rows, JSON or JSON lines; FILE:0.5 learns half of its rows, FILE:2 each twice",
    )
    add_flags(parser, "the run", FLAGS)
    add_flags(parser, "the recipe; where nothing is given, its own numbers stand", RECIPE_FLAGS)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--vision-tower",
        "--vision",
        metavar="DIR",
        help="folder of a CLIP, if MODEL has none; where MODEL is a language model alone, a fresh "
        "projector is put between them",
    )
    group.add_argument("--model-base", metavar="DIR", help="language model, if MODEL has none")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help=f"one of {', '.join(DEVICES)}"
    )
    add_output_arguments(parser)
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    args = parser.parse_args(argv)
    if args.out is None and args.check is None and not args.plan:
        parser.error("--out says where what is learnt goes; or --check N, or --plan")
    if args.val and args.hold_out:
        parser.error("--val and --hold-out are two ways to choose rows; give one")
    if args.early_stop and not (args.val or args.hold_out):
        parser.error("--early-stop needs rows that are measured: --hold-out or --val")
    for name in ("check", "save_every", "evaluate_every", "early_stop"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {vars(args)[name]}, expected 1 or more")
    return (args,)


def read_options(model: object, data: object, options: Mapping[str, Any]) -> argparse.Namespace:
    """The flags by their names in Python, read and checked as those of a command line. Raises
    ValueError for what is wrong usage there, and TypeError for a name that is no flag's."""
    parser = make_parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign]
    spelled = parser.spelled
    given: list[str] = []
    for name, value in options.items():
        if name not in spelled:
            raise TypeError(f"there is no option {name!r}: expected some of: {', '.join(spelled)}")
        if value is True:
            given.append(spelled[name])
        elif value is not None and value is not False:
            several = value if isinstance(value, (list, tuple)) else [value]
            given += [f"{spelled[name]}={one}" for one in several]
    files = data if isinstance(data, (list, tuple)) else [data]
    (args,) = read_flags(parser, [*given, "--", str(model), *map(str, files)])
    return args
