"""A folder that is written whole or not at all: it takes its name once it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from minillava.files.disk import lock, refused

OWNER = "writer.pid"
"""The file in an unfinished folder with the number of the process that writes it."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder TARGET.partial, renamed to `target` when the body succeeds and removed when it
    fails. `target` must not exist, or be empty. Raises ValueError, or OSError if the system refuses
    to write."""
    target = Path(target).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty folder; name a new one")
    folder = target.with_name(f"{target.name}.partial")
    try:
        owner = _claim(folder)
    except OSError as error:
        raise refused(folder, error, writing=True) from None
    try:
        yield folder
        (folder / OWNER).unlink()
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException as error:
        shutil.rmtree(folder)
        if (
            isinstance(error, OSError)
            and error.errno
            and str(error.filename or folder).startswith(str(folder))
        ):
            raise refused(target, error, writing=True) from None
        raise
    finally:
        owner.close()


def _claim(folder: Path) -> TextIO:
    """Make the folder, with a file in it that stays locked while this process lives. The next run
    removes a folder whose lock is gone, since its run was killed. Raises ValueError if the lock is
    held, since another run is writing the folder."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        left = f"{folder}: left by an interrupted run, or another is writing it; remove it"
        try:
            with (folder / OWNER).open(encoding="utf-8") as file:
                if not lock(file):
                    found = f"process {file.read(20)} is writing it; wait until that ends"
                    raise ValueError(f"{folder}: {found}, or remove it if it has ended") from None
                shutil.rmtree(folder)
        except FileNotFoundError:
            raise ValueError(left) from None
        folder.mkdir(parents=True)
    owner = (folder / f"{OWNER}.new").open("w", encoding="utf-8")
    locked = lock(owner)
    owner.write(str(os.getpid()))
    owner.flush()
    if not locked:  # Windows renames no open file
        owner.close()
    (folder / f"{OWNER}.new").rename(folder / OWNER)  # under this name it is locked from the start
    return owner
