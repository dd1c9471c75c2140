"""Commands, in this process and in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from paths import ROOT
from waiting import PATIENCE

# Hears Ctrl-C even where this process, running in the background, does not.
HEARS_CTRL_C = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module({module!r}, run_name='__main__')"
)


def status_of(main: Callable[[list[str]], int], arguments: list[object]) -> int:
    """The exit status of a command in this process, however it ends."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # how argparse ends
        return stopped.code


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """Ours, with the repository first on Python's path, and one thread: beside other work, threads
    that wait for one another take ten times as long."""
    paths = os.pathsep.join(map(str, (ROOT, *path)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}


def python(
    *arguments: object, cwd: Path = ROOT, path: tuple[Path, ...] = (), **options
) -> subprocess.CompletedProcess:
    """A fresh Python with these arguments, until it ends; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(*path),
        capture_output=True,
        text=True,
        check=False,
        **{"timeout": PATIENCE, **options},
    )


def start(module: str, *arguments: object, stdin=subprocess.DEVNULL) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS` in a process of its own that can be sent SIGINT; stdout and
    stderr as bytes."""
    return subprocess.Popen(
        [sys.executable, "-c", HEARS_CTRL_C.format(module=module), *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
