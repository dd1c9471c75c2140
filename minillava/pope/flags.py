"""The flags of `python -m minillava.pope`, and which of them go together; they are read before
torch is imported."""

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

HELP = """\
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

SCORERS = ("llava", "vcd", "ritual")

FLAGS = (
    flag(
        "--questions", "--question-file", type=path_name, nargs="+", required=True, metavar="FILE",
        help="questions with labels",
    ),
    flag(
        "--asked", type=path_name, metavar="FILE",
        help="the questions as they were asked, where their ids are not those of --questions "
        "(LLaVA's llava_pope_test.jsonl)",
    ),
    flag(
        "--answers", "--answers-file", type=path_name, required=True, metavar="FILE",
        help="answers to them",
    ),
    flag(
        "--scorer", choices=[*SCORERS, "all"], default="all", help="default: %(default)s"
    ),
)  # fmt: skip


def make_parser(prog: str = "python -m minillava.pope") -> Parser:
    parser = new_parser(
        prog,
        'Score answers to POPE (Li et al. 2023: "Is there a ... in the image?") in the three ways\n'
        "that papers do.",
        HELP,
    )
    add_flags(parser, "files", FLAGS)
    add_output_arguments(parser).add_argument(
        "--json", action="store_true", help="one JSON object, with all ids and disagreements"
    )
    return parser


def read_flags(parser: Parser, argv: Sequence[str]) -> tuple:
    """Flags."""
    return (parser.parse_args(argv),)
