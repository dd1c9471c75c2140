"""A command whose model is in several processes, started by torchrun: what each of them does.

Rank 0 runs the command, as ever. The others open their part of the model and follow.
"""

from __future__ import annotations

import argparse
import signal
import sys

PARALLEL = ("generate", "chat", "batch", "serve")
"""The doors whose model may be in several processes."""


def one_of_several(name: str, args: argparse.Namespace) -> int | None:
    """Follow rank 0 to its end, unless this process is rank 0, or the only one. Returns the exit
    status, None if the door is still to be run. Raises ValueError for a door that is for one
    process."""
    from minillava.fast.parallel import end_followers, launched, rank

    if not launched():
        return None
    if rank():
        return follow(name, args)
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
    if name == "serve":
        args.no_page = True  # it asks for what each token looked at, which no process knows
    return None


def follow(name: str, args: argparse.Namespace) -> int:
    """Open this process's part of the model and compute what rank 0 asks for; returns the exit
    status. What it finds wrong, rank 0 says, except that its own memory is full, or that
    another process is gone."""
    import torch

    from minillava.cli.messages import Messages
    from minillava.cli.opening import find_weights, open_assistant
    from minillava.fast import parallel
    from minillava.files.disk import one_line

    # The terminal sends Ctrl-C to all of them, and rank 0 decides what it means.
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    if name not in PARALLEL:
        return 0
    try:
        quiet = Messages(verbose=False, quiet=True)
        assistant = open_assistant(args, find_weights(args.weights, quiet), quiet)
        parallel.follow(assistant.model.language_model)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: process {parallel.rank()}: {one_line(error)}", file=sys.__stderr__)
        return 1
    except (parallel.OthersEnded, RuntimeError):  # while opening, or while following
        if parallel.rank() == 1 and not interrupts:  # rank 0 may be who has ended: one says so
            print(f"error: {parallel.OthersEnded()}", file=sys.__stderr__)
    except (ValueError, OSError):
        pass  # rank 0 has found the same, and says it
    finally:
        parallel.leave()
    return 0
