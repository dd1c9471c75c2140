"""A command whose model is in several processes, started by torchrun: what each of them does.

Rank 0 runs the command, as ever. The others open their part of the model and follow.
"""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress

PARALLEL = ("generate", "chat", "batch", "serve")
"""The doors whose model may be in several processes."""


def one_of_several(name: str, args: argparse.Namespace) -> bool:
    """Follow rank 0 to its end, unless this process is rank 0, or the only one. Returns whether
    that was this process's whole work. Raises ValueError for a door that is for one process."""
    from minillava.fast.parallel import end_followers, launched, rank

    if not launched():
        return False
    if rank():
        follow(name, args)
        return True
    if name not in PARALLEL:
        raise ValueError(
            f"{name} is for one process: start it without torchrun, which is for "
            f"{', '.join(PARALLEL)} and finetune"
        )
    if args.compile or args.same_bits:
        raise ValueError(
            "--compile and --same-bits are for one process: leave them out, or torchrun"
        )
    import atexit

    atexit.register(end_followers)
    return False


def follow(name: str, args: argparse.Namespace) -> None:
    """Open this process's part of the model and compute what rank 0 asks for. What it finds wrong,
    rank 0 says."""
    from minillava.cli.messages import Messages
    from minillava.cli.opening import find_weights, open_assistant
    from minillava.fast import parallel

    # The terminal sends Ctrl-C to all of them, and rank 0 decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if name not in PARALLEL:
        return
    # Whatever ends rank 0 ends the connection, and there is nothing left to do.
    with suppress(ValueError, OSError, RuntimeError):
        quiet = Messages(verbose=False, quiet=True)
        assistant = open_assistant(args, find_weights(args.weights, quiet), quiet)
        parallel.follow(assistant.model.language_model)
