"""Ctrl-C in a tool: no traceback, and status 130, as in minillava's doors (minillava/cli/doors.py).

A tool imports this before all else and, where it is the program, calls `leave_at_once`: importing
torch takes seconds, and an exception there shows somebody else's code.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process, which has not begun anything; `end` takes that back."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _leave)


def end(main: Callable[[], int]) -> None:
    """Run a tool, in which Ctrl-C is a KeyboardInterrupt, and end the process with its status."""
    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        # all is done; Python takes a moment to end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # before or after what reports errors
        status = 130
    sys.exit(status)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that are started within never get Ctrl-C: it is for the first process to end them.
    One that comes meanwhile comes at the end. Where there are no signals to block, nothing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it unblocks Ctrl-C when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(*_) -> None:
    os._exit(130)
