"""The flags that several doors share, as data, and the checks of flags that belong together."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

from minillava import __version__
from minillava.cli.arguments import Parser, not_empty
from minillava.files.text import as_meant
from minillava.generate.contrast import METHODS, Contrast
from minillava.options import (
    ASPECTS,
    ATTENTION,
    DEVICES,
    DRAFT_TOKENS,
    DTYPES,
    KINDS,
    TRANSFORMS,
    WEIGHTS_VARIABLE,
    Options,
)
from minillava.prompt import DEFAULT_PROMPT
from minillava.templates import DEFAULT_TEMPLATE, TEMPLATES

Flag = tuple[tuple[str, ...], dict[str, Any]]
"""One flag: its spellings, and what `argparse.add_argument` is told about it."""


def flag(*names: str, **settings: Any) -> Flag:
    return names, settings


def folder(*names: str, help: str, metavar: str = "DIR") -> Flag:
    """A flag that takes the name of a folder or of a model."""
    return flag(*names, type=not_empty, metavar=metavar, help=help)


def option(*names: str, type: Any, metavar: str, help: str) -> Flag:
    """A flag that is a field of `Options` and has its default."""
    default = vars(Options)[names[-1].strip("-").replace("-", "_")]
    return flag(
        *names, type=type, default=default, metavar=metavar, help=help.format(default=default)
    )


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> Any:
    """Add a group of flags, with its title in --help; returns the group, to which a door may add
    its own flags."""
    group = parser.add_argument_group(title)
    for names, settings in flags:
        group.add_argument(*names, **settings)
    return group


# ------------------------------------------------------------------------------------- the question


def add_question_arguments(parser: argparse.ArgumentParser, one_picture: bool = False) -> None:
    """Add --image and --prompt, as `opening.read_question` takes them. one_picture: for a door that
    needs exactly one picture."""
    several, placed = ("; repeat for several", "; <image> in it places a picture")
    if one_picture:
        several = placed = ""
    picture = f"picture: a path, a data: URL, or - for stdin{several}"
    question = f"question, or - for stdin{placed} (default: {DEFAULT_PROMPT!r})"
    add_flags(
        parser,
        "question",
        (
            flag(
                "-i", "--image", action="append", default=[], required=one_picture,
                metavar="FILE", help=picture,
            ),
            flag("-p", "--prompt", "--query", type=as_meant, metavar="TEXT", help=question),
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- the model

MODEL_FLAGS = (
    folder(
        "-m", "--weights", "--model", "--model-path",
        help="folder of LLaVA-1.5 weights in any layout, or ORG/NAME in the local hub cache "
        f"(default: ${WEIGHTS_VARIABLE}, else the bundled demo model)",
    ),
    folder("--revision", metavar="NAME", help="branch, tag or commit of a model in the hub cache"),
    folder("--vision-tower", help="folder of a CLIP, for original releases, which hold none"),
    folder(
        "--model-base",
        help="language model under --weights that hold only a projector or a LoRA",
    ),
    folder("--adapter", help="folder of a LoRA to merge into the weights"),
    flag(
        "--device", default="auto", metavar="NAME",
        help=f"one of {', '.join(DEVICES)} (default: auto)",
    ),
    flag(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="precision (default: auto: the checkpoint's on a GPU; on a CPU bfloat16 where it is "
        "fast, which for large models it always is, else float32)",
    ),
    flag(
        "--attention", default="fused", choices=ATTENTION,
        help="fused is fast; eager is written out and bit-identical to Hugging Face's eager "
        "(default: fused)",
    ),
    flag(
        "--quantize", choices=KINDS,
        help="the language model in 8 or 4 bits a weight, made while loading: small and fast on a "
        "CPU, a little less exact; on a GPU small, and fast only with --compile "
        "(default: as --dtype)",
    ),
    flag(
        "--pack", action="store_true",
        help="put the language model's bfloat16 weights into the order that this processor reads "
        "fastest: the same answers, to the last bit, at more tokens a second; opening takes longer "
        "(on a CPU with AVX-512 instructions for bfloat16 and without AMX)",
    ),
    flag(
        "--compile", action="store_true",
        help="compile the decoding step: for a GPU and long or many answers, since compiling takes "
        "up to a minute; on a CPU it gains nothing",
    ),
    flag(
        "--template", "--conv-mode", choices=list(TEMPLATES), metavar="NAME",
        help=f"conversation template: {', '.join(TEMPLATES)} (default: {DEFAULT_TEMPLATE})",
    ),
    flag(
        "--system", type=as_meant, metavar="TEXT",
        help='system text instead of the template\'s; "" for none',
    ),
    flag(
        "--image-aspect-ratio", choices=ASPECTS,
        help="pad the picture to a square, crop it, or squash it (default: as the model was "
        "trained); with squash, tiled models see an overview without tiles: faster, and coarser",
    ),
)  # fmt: skip


SAME_BITS = flag(
    "--same-bits", action="store_true",
    help="an answer has the same bits alone, in a batch, in a conversation and with drafts: "
    "prompts are read one by one, in pieces, which takes longer in int8 and int4, and in a batch",
)  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser, answers: bool = False) -> None:
    """Add the flags of every door that opens a model, as `opening.open_assistant` takes them.
    answers: for a door that watches no layer at work."""
    parser.set_defaults(same_bits=False)  # also for a door without the flag
    add_flags(parser, "model", (*MODEL_FLAGS, *[SAME_BITS] * answers))


# ------------------------------------------------------------------------------- how it is answered

GENERATION_FLAGS = (
    option(
        "-n", "--max-new-tokens", type=int, metavar="N",
        help="longest answer (default: {default})",
    ),
    option(
        "--min-new-tokens", type=int, metavar="N",
        help="no end token before N tokens (default: {default})",
    ),
    option(
        "--temperature", type=float, metavar="T",
        help="0 is greedy: always the most likely token; above 0 samples (default: {default})",
    ),
    option("--top-k", type=int, metavar="K", help="sample among the K most likely tokens"),
    option(
        "--top-p", type=float, metavar="P",
        help="sample among the most likely tokens that reach probability P",
    ),
    option(
        "--min-p", type=float, metavar="P",
        help="sample among tokens at least P times as likely as the best",
    ),
    option(
        "--typical-p", type=float, metavar="P",
        help="sample among the least surprising and surprised tokens that reach probability P",
    ),
    option(
        "--repetition-penalty", type=float, metavar="R",
        help="above 1 makes tokens already in the text less likely",
    ),
    option(
        "--no-repeat-ngram-size", type=int, metavar="N",
        help="never say N tokens in a row that are in prompt or answer already",
    ),
    option(
        "--seed", type=int, metavar="S",
        help="makes samples, and the noise of --contrast, reproducible (greedy default: 0)",
    ),
    flag(
        "--stop", action="append", type=as_meant, default=[], metavar="TEXT",
        help="end before TEXT; repeatable",
    ),
)  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every door that makes text: fields of `Options`, as `read_options` takes
    them."""
    add_flags(parser, "generation", GENERATION_FLAGS)


def _early_stopping(text: str) -> bool | str:
    return {"false": False, "true": True}.get(text, text)


SEARCH_FLAGS = (
    option(
        "--num-beams", type=int, metavar="N",
        help="follow the N most likely answers at once and take the best (default: {default}: off)",
    ),
    option(
        "--length-penalty", type=float, metavar="L",
        help="above 0 favours long beams, below 0 short ones (default: {default})",
    ),
    option(
        "--early-stopping", type=_early_stopping, metavar="true|false|never",
        help="stop when N beams have ended (true), a better one is unlikely (false) or impossible "
        "(never) (default: false)",
    ),
)  # fmt: skip


def add_search_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags of beams, further fields of `Options`, for a door that takes whole answers;
    returns their group."""
    return add_flags(parser, "search", SEARCH_FLAGS)


def read_options(parser: Parser, args: argparse.Namespace) -> dict:
    """The values of the flags of generation and search, as fields of `Options`; a value out of
    range is wrong usage."""
    options = {
        name: vars(args)[name] for name in Options.__dataclass_fields__ if name in vars(args)
    }
    try:
        Options(**options)
    except ValueError as error:
        parser.error(str(error))
    return options


class ContrastFlag(NamedTuple):
    """A flag that is a field of some methods of contrast. default: shown in --help instead of the
    field's."""

    name: str
    type: Any
    metavar: str
    methods: tuple[str, ...]
    field: str
    help: str
    default: str | None = None


def _spaced(name: str) -> str:
    """The real name of a method of two words, which is typed with a hyphen, so that it needs no
    quotes."""
    return name.replace("-", " ")


CONTRAST_FLAGS = (
    ContrastFlag("--cd-alpha", float, "A", ("vcd",), "alpha", "weight of the difference in vcd"),
    ContrastFlag(
        "--cd-beta", float, "B", tuple(METHODS), "beta",
        "cut tokens less than B times as likely as the best; 0: none",
    ),
    ContrastFlag(
        "--noise-step", int, "N", ("vcd",), "noise_step",
        "how noisy the second picture of vcd is, 0 to 999",
    ),
    ContrastFlag(
        "--ritual-alpha", float, "A", ("ritual",), "alpha",
        "weight of the transformed picture in ritual",
    ),
    ContrastFlag(
        "--ritual-transform", _spaced, "NAME", ("ritual",), "transform",
        f"one of: {', '.join(TRANSFORMS)}", "drawn for each picture",
    ),
    ContrastFlag(
        "--m3id-rate", float, "R", ("m3id",), "rate",
        "how fast m3id leaves what the text alone says, per token",
    ),
    ContrastFlag(
        "--m3id-unsure", float, "P", ("m3id",), "unsure",
        "m3id only while no token is as likely as P", "always",
    ),
)  # fmt: skip


def add_contrast_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags of contrastive decoding, as `read_contrast` takes them; returns their group."""
    group = parser.add_argument_group("contrastive decoding")
    group.add_argument(
        "--contrast",
        choices=list(METHODS),
        help="compare with a second row that sees a noised picture (vcd), a transformed one "
        "(ritual) or none (m3id)",
    )
    for one in CONTRAST_FLAGS:
        shown = one.default or getattr(METHODS[one.methods[0]], one.field)
        group.add_argument(
            one.name, type=one.type, metavar=one.metavar, help=f"{one.help} (default: {shown})"
        )
    return group


def read_contrast(parser: Parser, args: argparse.Namespace) -> Contrast | None:
    """The method for which the flags of `add_contrast_arguments` ask, None for none; a flag of
    another method is wrong usage, and so are beams."""
    if args.contrast and args.num_beams > 1:
        parser.error("--contrast and --num-beams do not go together: leave one of them out")
    given = {}
    for one in CONTRAST_FLAGS:
        value = vars(args)[one.name.strip("-").replace("-", "_")]
        if value is None:
            continue
        if args.contrast not in one.methods:
            parser.error(
                f"{one.name} belongs to --contrast {'|'.join(one.methods)}, found "
                f"{args.contrast or 'no --contrast'}"
            )
        given[one.field] = value
    try:
        return METHODS[args.contrast](**given) if args.contrast else None
    except ValueError as error:  # the error names the field
        names = {one.field: one.name for one in CONTRAST_FLAGS if args.contrast in one.methods}
        name = names.get(str(error).partition(" is ")[0])
        parser.error(f"{name}: {error}" if name else str(error))


# ------------------------------------------------------------------------------------------ drafts


def _draft_tokens(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and 1 <= int(text) <= DRAFT_TOKENS):
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 to {DRAFT_TOKENS}, or auto")
    return text if text == "auto" else int(text)


DRAFT_FLAGS = (
    folder(
        "--draft", metavar="lookup|medusa[:DIR]|DIR",
        help="guess several tokens and check them in one pass, which saves passes and changes no "
        "answer: lookup guesses what followed the same words before, medusa asks heads that lie "
        "beside the weights or in DIR, DIR is a small Llama or LLaVA with the same tokenizer",
    ),
    flag(
        "--draft-tokens", type=_draft_tokens, metavar="N|auto",
        help="how many are guessed at a time (default: auto: as many as pay here, which may be "
        "none)",
    ),
)  # fmt: skip


SHOW_DRAFTS = flag(
    "--show-drafts", action="store_true",
    help="in a terminal, what was guessed right in green (NO_COLOR: not)",
)  # fmt: skip


def add_draft_arguments(parser: argparse.ArgumentParser, shown: bool = False) -> Any:
    """Add the flags of drafts, which `check_drafts` checks and `Assistant.drafts` takes; returns
    their group. shown: with --show-drafts."""
    return add_flags(parser, "drafts", (*DRAFT_FLAGS, SHOW_DRAFTS) if shown else DRAFT_FLAGS)


def check_drafts(
    parser: Parser, args: argparse.Namespace, *others: tuple[str, bool], shown: bool = False
) -> None:
    """Check the flags of drafts; together with flags that drafts do not support they are wrong
    usage. others: such flags of this door, and whether each is used. shown: --show-drafts."""
    if args.draft is None:
        if args.draft_tokens is not None:
            parser.error(f"--draft-tokens {args.draft_tokens} needs --draft")
        if shown:
            parser.error("--show-drafts needs --draft")
        return
    for name, used in (("--compile", args.compile), *others):
        if used:
            parser.error(f"--draft and {name} do not go together: leave one of them out")


# ---------------------------------------------------------------------------------- what is printed


def add_output_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags about messages; returns their group, to which a door may add its own flags."""
    group = parser.add_argument_group("output")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "-v", "--verbose", action="store_true", help="one line per stage with its time; tracebacks"
    )
    either.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    group.add_argument("--version", action="version", version=f"minillava {__version__}")
    return group
