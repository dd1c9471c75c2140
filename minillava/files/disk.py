"""Files that are written whole or not at all, and the system's errors in one line each."""

import errno
import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither removed nor replaced
    fcntl = None  # type: ignore[assignment]  # a module by its type

# --- what a system's error means to its reader ----------------------------------------------------
_RIGHTS = "change its rights with chmod or chown, or choose another name"

_ROOM = "make room there, then repeat the command"

ADVICE = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "a file may not be so large on this disk, or by `ulimit -f`",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EISDIR: "give the name of a file",
    errno.ENOTDIR: "a part of the path is a file; check it",
    errno.ENOENT: "check the path",
    errno.ELOOP: "its links lead in a circle; remove one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "another program holds it; end that, then repeat the command",
    errno.ETXTBSY: "it is running as a program; choose another name",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open; end other programs",
    errno.ENOMEM: "the memory is full; end other programs, or take a smaller model",
    errno.EBADF: "it is closed; redirect it to a file or a pipe",
    errno.EIO: "the disk or the network failed; check it, then repeat the command",
    errno.ESTALE: "the network's folder was moved or removed; check it, then repeat the command",
}


LONGEST_PATH = 1 << 15
"""No system opens a longer one; following the links of a data: URL would take hours."""


def explain(error: OSError, name: str | os.PathLike[str] | None = None) -> str:
    """An error of the system in one line: the file, what happened and the next step. name: the
    file's, if the error does not say it. An error that we worded ourselves (it has no errno) stays
    as it is."""
    if error.errno is None:
        return str(error)
    name = error.filename if error.filename is not None else name
    name = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else name
    if isinstance(name, str) and not name.isprintable():
        name = repr(name)
    parts = [str(name)] if name is not None else []
    advice = ADVICE.get(error.errno, "check it, then repeat the command")
    return ": ".join([*parts, f"{error.strerror or os.strerror(error.errno)}; {advice}"])


def refused(path: str | os.PathLike[str], error: OSError, writing: bool = False) -> OSError:
    """The error to raise if the system refuses to read (or write) a file or folder. Downloading
    again does not mend missing rights, so the message names the file or folder that lacks them, and
    the command that gives them."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return OSError(explain(OSError(error.errno, error.strerror, os.fspath(path))))
    real = Path(os.path.realpath(path))
    # A folder that may not be searched hides its files, whatever their own rights are.
    closed = [folder for folder in real.parents if not os.access(folder, os.X_OK)]
    if closed:
        denied, rights = closed[-1], "x"
    elif writing:
        denied, rights = (real, "w") if real.is_file() else (real.parent, "wx")
    else:
        denied, rights = real, "rx" if real.is_dir() else "r"
    step = f"its owner can allow it with: chmod u+{rights} {shlex.quote(str(denied))}"
    return PermissionError(
        f"{path}: may not be {'written' if writing else 'read'} ({error.strerror}); {step}"
    )


def nearest_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder that a mistyped path may have meant: each part that does not exist is replaced by
    the most similar name. None if no name is similar."""
    found, given = Path(), Path(path).expanduser()
    for part in given.parts:
        if not (found / part).is_dir():
            try:
                names = [entry.name for entry in os.scandir(found) if entry.is_dir()]
            except OSError:
                return None
            near = get_close_matches(part, names, n=1)
            if not near:
                return None
            part = near[0]
        found /= part
    return found if found != given else None


# --- writing --------------------------------------------------------------------------------------
def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole or not at all: under another name first, which is then renamed. It is on
    disk when this returns.

    If the path is a link, its target is written and the link stays. An existing file keeps its mode
    and, if the system allows, its owner. What is not a regular file (a pipe, a device, /dev/stdout)
    is written to and never replaced. Surrogates (of a name that is not UTF-8) are written as
    \\udc.., which JSON reads back. Raises OSError with the name."""
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        if is_stream(path):
            _write_through(path, content)
            return
        target = Path(os.path.realpath(path))
        old = _existing(target)
        remove_leftovers(target)
        with _beside(target, 0o666 if old is None else stat.S_IMODE(old.st_mode)) as (
            file,
            temporary,
        ):
            if old is not None:
                _keep_owner(file.fileno(), old)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if old is not None and old.st_nlink > 1:
                _overwrite(target, content)  # a rename would separate it from its other hard links
                _remove(file, temporary)
            else:
                _rename(file, temporary, target, content)
        sync_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the OSError that `write_whole` would raise now. Leaves no file."""
    try:
        if is_stream(path):
            if _descriptor(path) is None and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = Path(os.path.realpath(path))
        _existing(target)
        remove_leftovers(target)
        with _beside(target, 0o600) as (file, temporary):
            _remove(file, temporary)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is written to rather than replaced: a pipe, a device, or the number of an open
    file such as /dev/stdout. False if the system does not say; writing then raises the reason."""
    try:
        return _descriptor(path) is not None or not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether what is written to `path` comes out on stdout, as what `print` writes."""
    if _descriptor(path) == 1:
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(1)) and not os.path.samefile(
            path, os.devnull
        )
    except (OSError, ValueError):
        return False


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether writing one path would change the other: through links, hard links or another
    spelling. A device never counts as the same file."""
    if max(len(os.fspath(a)), len(os.fspath(b))) > LONGEST_PATH:
        return False
    try:
        if (
            _descriptor(a) is None
            and _descriptor(b) is None
            and os.path.realpath(a) == os.path.realpath(b)
        ):
            return not os.path.exists(a) or not stat.S_ISCHR(os.stat(a).st_mode)
        found = os.stat(a)
        return os.path.samestat(found, os.stat(b)) and not stat.S_ISCHR(found.st_mode)
    except (OSError, ValueError):
        return False


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk: a new or changed name is on disk once its folder is. If
    folders cannot be synced, the system decides when."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(target: Path) -> None:
    """Remove the files that a killed `write_whole` of this file left. A file that is being written
    is locked, and the lock ends with its process, also on another host. A process number would not
    do: another process may have it by now."""
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if re.fullmatch(re.escape(_stem(target)) + r"\.\d+\.new", name):
                path = target.with_name(name)
                if fcntl is None:
                    path.unlink()
                    continue
                with suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # otherwise it was renamed since
                    if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                        path.unlink()


def lock(file: BinaryIO | TextIO) -> bool:
    """Lock a file until it is closed or our process ends; returns whether that worked. False if
    another process has the lock, or if the system has no such locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextmanager
def locked(file: BinaryIO, waiting: Callable[[], None]) -> Iterator[None]:
    """A block that holds the file's lock, which all our processes ask for; `waiting` is called once
    if another process has it. If the system has no such locks, nobody waits."""
    if fcntl is not None:
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _existing(target: Path) -> os.stat_result | None:
    """The stat of an existing file, None if there is none. Raises PermissionError if the file is
    marked as not to be written."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return found


def _stem(target: Path) -> str:
    return os.fsdecode(os.fsencode(target.name)[:200])  # a name has at most 255 bytes


@contextmanager
def _beside(target: Path, mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A new, locked file in the same folder. The body renames or removes it; after an error it is
    removed."""
    # without O_BINARY, which only Windows has, it would write "\r\n" for each "\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for attempt in count():
        temporary = target.with_name(f"{_stem(target)}.{os.getpid()}{attempt or ''}.new")
        try:
            number = os.open(temporary, flags, mode)
        except FileExistsError:  # another thread's, or one that was left on a system without locks
            continue
        if fcntl is None:
            break
        with suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(temporary), os.fstat(number)):
                break
        os.close(number)  # another run removed it as a leftover before it was locked
    with open(number, "wb") as file:
        try:
            yield file, temporary
        except BaseException:
            _remove(file, temporary)
            raise


def _keep_owner(number: int, old: os.stat_result) -> None:
    if hasattr(os, "fchown"):
        with suppress(OSError):  # only root may change the owner
            os.fchown(number, old.st_uid, old.st_gid)
        os.fchmod(number, stat.S_IMODE(old.st_mode))


def _remove(file: BinaryIO, temporary: Path) -> None:
    if fcntl is None:
        file.close()
    temporary.unlink(missing_ok=True)


def _rename(file: BinaryIO, temporary: Path, target: Path, content: bytes) -> None:
    if fcntl is None:
        file.close()
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        _overwrite(target, content)  # a file that is mounted on its own, as containers do
        _remove(file, temporary)


def _overwrite(target: Path, content: bytes) -> None:
    """Write a file in place, once all its content is on the disk under another name."""
    with open(target, "r+b") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _write_through(path: str | os.PathLike[str], content: bytes) -> None:
    number = _descriptor(path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):  # what was printed earlier must come first
            if stream is not None:
                stream.flush()
        number = os.dup(number)
    try:
        with open(path if number is None else number, "wb", buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) or 0 :]
    except BrokenPipeError:
        if is_stdout(path):
            raise  # the reader has what it wanted and closed the pipe

        # The reader of this pipe has what it wanted, too; other files may still have to be written.


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """The descriptor of our own open file that /dev/stdout, /dev/fd/N, /proc/self/fd/N or a link to
    one of them names; None for any other path."""
    path = os.path.abspath(path)
    for _ in range(40):  # links to links; the system follows 40, too
        folder, name = os.path.split(path)
        folder = os.path.realpath(folder)
        own = rf"/dev/fd|/proc/{os.getpid()}(/task/\d+)?/fd"
        if name.isascii() and name.isdigit() and re.fullmatch(own, folder):
            return int(name)
        path = os.path.join(folder, name)
        try:
            path = os.path.join(folder, os.readlink(path))
        except (OSError, ValueError):
            return None
    return None


def one_line(error: Exception) -> str:
    """An error's message on one line, without any character that controls a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises FileNotFoundError, OSError if the system refuses to read
    it, or ValueError if it is not a JSON object."""
    # opening a pipe would wait for somebody to write to it
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is a folder, pipe or device, expected a file; download it again")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: not found; check that this is the folder of a LLaVA checkpoint"
        ) from None
    except OSError as error:
        raise refused(path, error) from None
    except (ValueError, RecursionError) as error:
        # Not only bad JSON: also bad UTF-8, a number of thousands of digits, endless nesting.
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: holds a JSON {type(content).__name__}, expected an object; download the file "
            "again"
        )
    return content
