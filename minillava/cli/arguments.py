"""The flags that doors share, and what they mean; wrong usage ends with exit status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from minillava import __version__
from minillava.cli.messages import show
from minillava.files.disk import check_writable, explain, is_stream, same_file
from minillava.files.text import as_meant
from minillava.generate.contrast import METHODS, Contrast
from minillava.options import (
    ASPECTS,
    ATTENTION,
    DEVICES,
    DTYPES,
    KINDS,
    TRANSFORMS,
    WEIGHTS_VARIABLE,
    Options,
)
from minillava.prompt import DEFAULT_TEMPLATE, TEMPLATES

MODEL_FILES = (".json", ".model", ".safetensors", ".bin", ".pth")
"""How the names of the files end that make a model."""


class Parser(argparse.ArgumentParser):
    """Errors in one line; `--max_new_tokens` is `--max-new-tokens`."""

    def error(self, message: str):
        # it quotes what was typed
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None):
        super().exit(status, message if sys.stderr is not None else None)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        if file is not sys.stdout:
            super()._print_message(message, file)
        elif status := show(message):  # --help and --version can meet a full disk, too
            sys.exit(status)

    @property
    def flags(self) -> Collection[str]:
        """All spellings of them."""
        return self._option_string_actions

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        given = list(sys.argv[1:] if args is None else args)
        for i, argument in enumerate(given):
            name, equals, value = argument.partition("=")
            if name.replace("_", "-") in self.flags:
                given[i] = name.replace("_", "-") + equals + value
            elif re.match("-[a-z]{2}", name) and f"-{name}" in self.flags:
                self.error(
                    f"{name} is read as {name[:2]} with the value {name[2:]!r}: did you mean "
                    f"-{name}?"
                )
        found, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self.error(self._about_unknown(unknown))
        return found

    def _about_unknown(self, unknown: list[str]) -> str:
        """What is wrong with arguments that no flag takes, with the nearest flag."""
        name, *_ = unknown[0].partition("=")
        if not name.startswith("-"):
            places = {
                "--prompt": "a question",
                "--image": "a picture",
                "--questions": "a file of questions",
            }
            hint = "; ".join(
                f"{what} goes behind {flag}" for flag, what in places.items() if flag in self.flags
            )
            return f"unrecognized argument {unknown[0]!r}" + (f": {hint}" if hint else "")
        from difflib import get_close_matches

        name, flags = name.replace("_", "-"), [flag for flag in self.flags if flag.startswith("--")]
        near = [flag for flag in flags if flag.startswith(name)] or get_close_matches(
            name, flags, 1
        )
        return f"unrecognized arguments: {' '.join(unknown)}" + (
            f"; did you mean {' or '.join(near)}?" if near else ""
        )


def not_empty(text: str) -> str:
    """A flag's name or folder. Without this, `-m "$WEIGHTS"` would be no -m where WEIGHTS is not
    set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set?")
    return text


def file_name(text: str) -> str:
    """A flag's file or folder. `~` is the home folder, which the shell leaves alone in --flag=~/x;
    a file that is really named so goes first."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def output_name(text: str) -> str:
    """A flag's file to write. `-`, stdout for other programs, would be a file of that name."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "- is no name here: /dev/stdout is stdout, and ./- a file that is named so"
        )
    return file_name(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that opens a model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--weights", "--model", "--model-path", type=not_empty, metavar="DIR",
        help="folder of LLaVA-1.5 weights in any layout, or ORG/NAME in the local hub cache "
        f"(default: ${WEIGHTS_VARIABLE}, else the bundled demo model)",
    )  # fmt: skip
    group.add_argument(
        "--revision",
        type=not_empty,
        metavar="NAME",
        help="branch, tag or commit of a model in the hub cache",
    )
    group.add_argument(
        "--vision-tower",
        type=not_empty,
        metavar="DIR",
        help="folder of a CLIP, for original releases, which hold none",
    )
    group.add_argument(
        "--model-base",
        type=not_empty,
        metavar="DIR",
        help="language model under --weights that hold only a projector or a LoRA",
    )
    group.add_argument(
        "--adapter",
        type=not_empty,
        metavar="DIR",
        help="folder of a LoRA to merge into the weights",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(DEVICES)} (default: auto)",
    )
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="precision (default: auto: the checkpoint's on a GPU; on a CPU bfloat16 where it is fast, which for large "
        "models it always is, else float32)",
    )  # fmt: skip
    group.add_argument(
        "--attention", default="fused", choices=ATTENTION,
        help="fused is fast; eager is written out and bit-identical to Hugging Face's eager (default: fused)",
    )  # fmt: skip
    group.add_argument(
        "--quantize", choices=KINDS,
        help="the language model in 8 or 4 bits a weight, made while loading: small and fast on a CPU, a little less "
        "exact; on a GPU small, and fast only with --compile (default: as --dtype)",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="compile the decoding step: for a GPU and long or many answers, since compiling takes up to a minute; on "
        "a CPU it gains nothing",
    )  # fmt: skip
    group.add_argument(
        "--template", "--conv-mode", choices=list(TEMPLATES), metavar="NAME",
        help=f"conversation template: {', '.join(TEMPLATES)} (default: {DEFAULT_TEMPLATE})",
    )  # fmt: skip
    group.add_argument(
        "--system",
        type=as_meant,
        metavar="TEXT",
        help='system text instead of the template\'s; "" for none',
    )
    group.add_argument(
        "--image-aspect-ratio", choices=ASPECTS,
        help="pad the picture to a square, or crop it (default: config.json's, else pad)",
    )  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that makes text: fields of `Options`, as `read_options` takes them
    from there."""
    group = parser.add_argument_group("generation")
    flags = (
        ("--max-new-tokens", int, "N", "longest answer (default: {})"),
        ("--min-new-tokens", int, "N", "no end token before N tokens (default: {})"),
        (
            "--temperature",
            float,
            "T",
            "0 is greedy: always the most likely token; above 0 samples (default: {})",
        ),
        ("--top-k", int, "K", "sample among the K most likely tokens"),
        ("--top-p", float, "P", "sample among the most likely tokens that reach probability P"),
        ("--min-p", float, "P", "sample among tokens at least P times as likely as the best"),
        (
            "--typical-p",
            float,
            "P",
            "sample among the least surprising and surprised tokens that reach probability P",
        ),
        (
            "--repetition-penalty",
            float,
            "R",
            "above 1 makes tokens already in the text less likely",
        ),
        (
            "--no-repeat-ngram-size",
            int,
            "N",
            "never say N tokens in a row that are in prompt or answer already",
        ),
        (
            "--seed",
            int,
            "S",
            "makes samples, and the noise of --contrast, reproducible (greedy default: 0)",
        ),
    )
    for flag, kind, metavar, text in flags:
        names = ["-n", flag] if flag == "--max-new-tokens" else [flag]
        default = vars(Options)[flag.strip("-").replace("-", "_")]
        group.add_argument(
            *names, type=kind, default=default, metavar=metavar, help=text.format(default)
        )
    group.add_argument(
        "--stop",
        action="append",
        type=as_meant,
        default=[],
        metavar="TEXT",
        help="end before TEXT; repeatable",
    )


def add_search_arguments(parser: argparse.ArgumentParser):
    """Flags of beams: further fields of `Options`, for a command that takes whole answers; returns
    their group."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--num-beams", type=int, default=Options.num_beams, metavar="N",
        help=f"follow the N most likely answers at once and take the best (default: {Options.num_beams}: off)",
    )  # fmt: skip
    group.add_argument(
        "--length-penalty", type=float, default=Options.length_penalty, metavar="L",
        help=f"above 0 favours long beams, below 0 short ones (default: {Options.length_penalty})",
    )  # fmt: skip
    group.add_argument(
        "--early-stopping", type=lambda text: {"false": False, "true": True}.get(text, text),
        default=Options.early_stopping, metavar="true|false|never",
        help="stop when N beams have ended (true), a better one is unlikely (false) or impossible (never) "
        "(default: false)",
    )  # fmt: skip
    return group


def number_list(text: str) -> list[int] | None:
    """A flag's list of numbers from 0: "0,2-4" -> [0, 2, 3, 4]; "all" -> None."""
    if text.strip() == "all":
        return None
    found = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not numbers:
            raise argparse.ArgumentTypeError(f"{text!r} is not like 3 or 0,2-4 or all")
        found += numbers
    return sorted(set(found))


def read_options(parser: Parser, args: argparse.Namespace) -> dict:
    """What the flags of `add_generation_arguments` say, as fields of `Options`; one out of range is
    wrong usage."""
    options = {
        name: vars(args)[name] for name in Options.__dataclass_fields__ if name in vars(args)
    }
    try:
        Options(**options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _name(text: str) -> str:
    """A name of two words, as one can type it without quotes."""
    return text.replace("-", " ")


# flag, kind, metavar, the methods it belongs to, their field, help
CONTRAST_FLAGS = (
    ("--cd-alpha", float, "A", ("vcd",), "alpha", "weight of the difference in vcd"),
    (
        "--cd-beta",
        float,
        "B",
        tuple(METHODS),
        "beta",
        "cut tokens less than B times as likely as the best; 0: none",
    ),
    (
        "--noise-step",
        int,
        "N",
        ("vcd",),
        "noise_step",
        "how noisy the second picture of vcd is, 0 to 999",
    ),
    (
        "--ritual-alpha",
        float,
        "A",
        ("ritual",),
        "alpha",
        "weight of the transformed picture in ritual",
    ),
    (
        "--ritual-transform",
        _name,
        "NAME",
        ("ritual",),
        "transform",
        f"one of: {', '.join(TRANSFORMS)}",
    ),
    (
        "--m3id-rate",
        float,
        "R",
        ("m3id",),
        "rate",
        "how fast m3id leaves what the text alone says, per token",
    ),
    (
        "--m3id-unsure",
        float,
        "P",
        ("m3id",),
        "unsure",
        "m3id only while no token is as likely as P",
    ),
)

NO_DEFAULT = {"--ritual-transform": "drawn for each picture", "--m3id-unsure": "always"}


def add_contrast_arguments(parser: argparse.ArgumentParser):
    """Flags of contrastive decoding, as `read_contrast` takes them from there; returns their
    group."""
    group = parser.add_argument_group("contrastive decoding")
    group.add_argument(
        "--contrast", choices=list(METHODS),
        help="compare with a second row that sees a noised picture (vcd), a transformed one (ritual) or none (m3id)",
    )  # fmt: skip
    for flag, kind, metavar, methods, field, text in CONTRAST_FLAGS:
        default = (
            vars(METHODS[methods[0]])[field] if len(methods) == 1 else METHODS[methods[0]].beta
        )
        shown = NO_DEFAULT.get(flag, default)
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {shown})")
    return group


def read_contrast(parser: Parser, args: argparse.Namespace) -> Contrast | None:
    """The method that the flags of `add_contrast_arguments` ask for; a flag of another method is
    wrong usage, and so are beams."""
    if args.contrast and args.num_beams > 1:
        parser.error("--contrast and --num-beams do not go together: leave one of them out")
    given = {}
    for flag, _, _, methods, field, _ in CONTRAST_FLAGS:
        value = vars(args)[flag.strip("-").replace("-", "_")]
        if value is None:
            continue
        if args.contrast not in methods:
            parser.error(
                f"{flag} belongs to --contrast {'|'.join(methods)}, found "
                f"{args.contrast or 'no --contrast'}"
            )
        given[field] = value
    try:
        return METHODS[args.contrast](**given) if args.contrast else None
    except ValueError as error:  # which names the field
        flags = {row[4]: row[0] for row in CONTRAST_FLAGS if args.contrast in row[3]}
        flag = flags.get(str(error).partition(" is ")[0])
        parser.error(f"{flag}: {error}" if flag else str(error))


def add_output_arguments(parser: argparse.ArgumentParser):
    """Flags about messages; returns their group, for a command to add its own."""
    group = parser.add_argument_group("output")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "-v", "--verbose", action="store_true", help="one line per stage with its time; tracebacks"
    )
    either.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    group.add_argument("--version", action="version", version=f"minillava {__version__}")
    return group


def check_stdin(parser: Parser, args: argparse.Namespace) -> None:
    """`-` twice among --image and --prompt is wrong usage."""
    if args.image.count("-") + (args.prompt == "-") > 1:
        parser.error("only one of --image and --prompt can read stdin")


def check_outputs(
    parser: Parser, args: argparse.Namespace, paths: Sequence[str | None], inputs: Sequence = ()
) -> None:
    """Check the files to write before the work begins.

    Wrong usage: an empty name, a folder, a file in a folder that does not exist, the same file
    twice, a file that is read (a picture of --image, a file of the model, one of `inputs`), by
    whatever spelling, or a new one that would be taken for a file of the model. A file that the
    system does not let us write is an error."""
    paths = [os.fspath(path) for path in paths if path is not None]
    real = {path: os.path.realpath(path) for path in paths}
    there = any(map(os.path.exists, paths))
    alike = [path for path in paths if real[path].endswith(MODEL_FILES)]
    folders = list(_model_folders(args)) if there or alike else []
    inputs = [*inputs, *_inputs(args, folders)] if there else []
    for i, path in enumerate(paths):
        if not path:
            parser.error("a file to write has an empty name")
        if os.path.isdir(path):
            parser.error(f"{path}: is a folder, expected the name of a file")
        try:
            os.stat(os.path.dirname(real[path]))
        except FileNotFoundError:
            if not is_stream(path):
                parser.error(f"{path}: no such folder; make it first")
        except OSError:
            pass  # check_writable meets it as well
        for other in paths[:i]:
            if same_file(path, other):
                parser.error(f"{path} is given twice; each file needs a name of its own")
        for given in inputs:
            if same_file(path, given):
                parser.error(f"{path} is read, as {given}: what is written needs a name of its own")
        for folder in folders if path in alike else ():
            if same_file(os.path.dirname(real[path]), folder):
                parser.error(
                    f"{path}: would count as a file of the model in {folder}; choose another folder"
                )
    for path in paths:
        try:
            check_writable(path)
        except OSError as error:
            parser.exit(1, f"error: {explain(error)}\n")


def _inputs(args: argparse.Namespace, folders: Sequence[Path]) -> Iterator[str | Path]:
    """What a command reads: pictures, stdin, and the files of the model's folders."""
    for image in vars(args).get("image") or ():
        yield from ("/dev/stdin",) if image == "-" else (image, os.path.expanduser(image))
    if vars(args).get("prompt") == "-":
        yield "/dev/stdin"
    for folder in folders:
        yield from (path for path in folder.glob("*") if path.suffix in MODEL_FILES)


def _model_folders(args: argparse.Namespace) -> Iterator[Path]:
    """The folders of --weights and of what is beside them."""
    from minillava.checkpoint.folders import default_weights, find_folder

    for name in ("weights", "vision_tower", "model_base", "adapter"):
        with suppress(ValueError, OSError):  # what is wrong with it is told when it is opened
            given = vars(args).get(name) or (default_weights() if name == "weights" else None)
            if given:
                yield find_folder(given, vars(args).get("revision") if name == "weights" else None)
