"""Opening and reporting the question, the pictures and the model for which the flags ask."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING

from minillava.cli.messages import Messages
from minillava.files.text import decode
from minillava.options import dtype_name
from minillava.prompt import DEFAULT_PROMPT, place_images

if TYPE_CHECKING:  # these import torch, and flags are read before that
    from PIL import Image

    from minillava.assistant import Assistant

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with which a user sets their number

SMALL = 50_000_000  # parameters: a smaller model gains less from a second thread than it can lose


def read_question(args: argparse.Namespace) -> tuple[str, list[Image.Image]]:
    """Read --prompt and --image; `-` is stdin. Mistakes in them are found before gigabytes are
    opened. Raises ValueError for an empty question, and ValueError or OSError for a picture that
    cannot be opened (see `open_image`)."""
    from minillava.files.pictures import open_image

    if args.prompt == "-":
        say_what_is_awaited(args, "the question")
        question = decode(read_stdin(), "stdin", sys.stdin.encoding).removesuffix("\n")
    else:
        question = DEFAULT_PROMPT if args.prompt is None else args.prompt
    if "-" in args.image:
        say_what_is_awaited(args, "a picture's file")
    images = [open_image(_read_stdin() if image == "-" else image) for image in args.image]
    place_images(question, len(images))
    return question, images


def note_several(count: int, messages: Messages) -> None:
    """Note that LLaVA-1.5 was trained on one picture: many later models take several, and their
    users expect it."""
    if count > 1:
        messages.note(
            "several pictures in one prompt: LLaVA-1.5 was trained on one, and may mix them up"
        )


def say_what_is_awaited(args: argparse.Namespace, what: str) -> None:
    """Say at a terminal that input is awaited; otherwise the command would wait without a word."""
    if sys.stdin is not None and sys.stdin.isatty():
        end = "Ctrl-Z and Enter end" if os.name == "nt" else "Ctrl-D at the start of a line ends"
        Messages(args.verbose, args.quiet).note(f"- reads {what} from here; {end} it")


def read_stdin() -> bytes:
    """All of stdin. Raises OSError that names it."""
    try:
        return (
            sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdin") from error


def _read_stdin() -> io.BytesIO:
    """A picture from stdin, as a file that has a name for messages."""
    file = io.BytesIO(read_stdin())
    file.name = "stdin"
    return file


def find_weights(given: str | None, messages: Messages) -> str:
    """--weights, or the default weights; if those are the bundled model, a note says so. Raises
    ValueError if there are none (see default_weights)."""
    from minillava.checkpoint.folders import HOW_TO_GET_WEIGHTS, bundled_weights, default_weights

    weights = default_weights() if given is None else given
    if given is None and weights == str(bundled_weights()):
        messages.note(
            "this is the bundled demo model, which knows only coloured shapes; "
            f"{HOW_TO_GET_WEIGHTS}"
        )
    return weights


def open_assistant(args: argparse.Namespace, weights: str, messages: Messages) -> Assistant:
    """Open and report the model for which the flags of `add_model_arguments` ask."""
    from minillava.assistant import load
    from minillava.fast.parallel import launched
    from minillava.fast.quantize import count_parameters, quantised_kinds
    from minillava.fast.row_by_row import keep_bits

    started = time.perf_counter()
    messages.progress(f"loading {weights} ...")
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            assistant = load(
                weights,
                device=args.device,
                dtype=args.dtype,
                attention=args.attention,
                quantize=args.quantize,
                pack=args.pack,
                compile=args.compile,
                vision_tower=args.vision_tower,
                model_base=args.model_base,
                adapter=args.adapter,
                revision=args.revision,
                template=args.template,
                image_aspect_ratio=args.image_aspect_ratio,
                parallel=launched(),
            )
        if args.same_bits:
            keep_bits(assistant.model)
    finally:
        messages.progress("")
    for note in notes:
        messages.note(str(note.message))
    parameter = assistant.model.language_model.embed_tokens.weight
    count = count_parameters(assistant.model)
    dtype = " and ".join([dtype_name(parameter.dtype), *quantised_kinds(assistant.model)])
    rest = f"; {len(assistant.unused)} stored tensors are not needed" if assistant.unused else ""
    where = str(parameter.device)
    if where == "cpu":
        threads = choose_threads(count)
        where += f" with {threads} thread{'s' * (threads > 1)}"
    messages.stage("load", started, f"{weights}: {count:,} parameters, {dtype} on {where}{rest}")
    return assistant


def choose_threads(parameters: int) -> int:
    """Use one thread for a small model, unless the user has set how many; returns the number of
    threads.

    A product of a small layer takes less time than two threads need to synchronise. If another
    program is busy, a thread waits until the other thread gets its turn: milliseconds at each of
    hundreds of products (`tools/bench.py threads`).
    """
    import torch

    if parameters < SMALL and not any(os.environ.get(name) for name in THREAD_VARIABLES):
        torch.set_num_threads(1)
    return torch.get_num_threads()
