"""The question, the pictures and the model that the flags ask for, opened and reported."""

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
from minillava.options import WEIGHTS_VARIABLE, dtype_name
from minillava.prompt import DEFAULT_PROMPT, place_images

if TYPE_CHECKING:  # flags are read before these, which import torch, are
    from PIL import Image

    from minillava.assistant import Assistant

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many

SMALL = 50_000_000  # parameters: a model below gains less by a second thread than it can lose


def read_question(args: argparse.Namespace) -> tuple[str, list[Image.Image]]:
    """--prompt and --image, `-` from stdin. What can be wrong with them is found here, before
    gigabytes are opened. Raises ValueError for an empty question, and ValueError or OSError for a
    picture that cannot be opened (see `open_image`)."""
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
    """Many models since take several pictures, and who comes from them expects it."""
    if count > 1:
        messages.note(
            "several pictures in one prompt: LLaVA-1.5 was trained on one, and may mix them up"
        )


def say_what_is_awaited(args: argparse.Namespace, what: str) -> None:
    """At a terminal it would wait without a word."""
    if sys.stdin is not None and sys.stdin.isatty():
        end = "Ctrl-Z and Enter end" if os.name == "nt" else "Ctrl-D at the start of a line ends"
        Messages(args.verbose, args.quiet).note(f"- reads {what} from here; {end} it")


def read_stdin() -> bytes:
    """All of stdin. Raises OSError with its name."""
    try:
        return (
            sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdin") from error


def _read_stdin() -> io.BytesIO:
    """A picture from stdin, as a file with a name for messages."""
    file = io.BytesIO(read_stdin())
    file.name = "stdin"
    return file


def find_weights(given: str | None, messages: Messages) -> str:
    """--weights, else the default ones; if those are the bundled model, a note says so. Raises
    ValueError if there are none (see default_weights)."""
    from minillava.checkpoint.folders import HOW_TO_GET_WEIGHTS, default_weights

    weights = default_weights() if given is None else given
    if given is None and not os.environ.get(WEIGHTS_VARIABLE):
        messages.note(
            "this is the bundled demo model, which knows only coloured shapes; "
            f"{HOW_TO_GET_WEIGHTS}"
        )
    return weights


def open_assistant(args: argparse.Namespace, weights: str, messages: Messages) -> Assistant:
    """What the flags of `add_model_arguments` ask for, opened and reported."""
    from minillava.assistant import load
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
                compile=args.compile,
                vision_tower=args.vision_tower,
                model_base=args.model_base,
                adapter=args.adapter,
                revision=args.revision,
                template=args.template,
                image_aspect_ratio=args.image_aspect_ratio,
            )
        if getattr(args, "same_bits", False):
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
    """One thread for a small model, unless the user has set how many; returns how many there are.

    A product of a small layer takes less time than two threads take to meet, and beside another
    busy program a thread waits for the other's turn: milliseconds, at each of hundreds of products
    (`tools/bench.py threads`).
    """
    import torch

    if parameters < SMALL and not any(os.environ.get(name) for name in THREAD_VARIABLES):
        torch.set_num_threads(1)
    return torch.get_num_threads()
