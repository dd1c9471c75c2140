"""Files written whole or not at all, and text read whatever program wrote it. Knows nothing of
models."""

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
except ImportError:  # Windows, where a file that is open can be neither removed nor replaced
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
    """An error of the system as file, what happened and the next step. name: if the error has none.
    An error that we worded ourselves (it has no errno) stays as it is."""
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
    """What to raise where the system refuses to read (or write) a file or folder. Missing rights
    are not mended by downloading again: it names the file or folder that lacks them, and the
    command."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return OSError(explain(OSError(error.errno, error.strerror, os.fspath(path))))
    real = Path(os.path.realpath(path))
    # A folder that may not be searched hides what is in it, whatever that allows.
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
    """The folder that a mistyped path may have meant: each part that is not there is taken for the
    one most like it. None if nothing is."""
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

    A link keeps leading to its target, which is written; an existing file keeps its mode and, if
    the system allows, its owner. What is not a regular file (a pipe, a device, /dev/stdout) is
    written to and never replaced. Surrogates (of a name that is not UTF-8) are written as \\udc..,
    which JSON reads back. Raises OSError with the name."""
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
                _overwrite(target, content)  # a rename would part it from its other names
                _remove(file, temporary)
            else:
                _rename(file, temporary, target, content)
        sync_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the OSError that `write_whole` would meet now. Leaves nothing behind."""
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
    """Whether this is written to rather than replaced: a pipe, a device, or the number of an open
    file such as /dev/stdout. False where the system does not say; who writes there hears why."""
    try:
        return _descriptor(path) is not None or not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether what is written there comes out where `print` does."""
    if _descriptor(path) == 1:
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(1)) and not os.path.samefile(
            path, os.devnull
        )
    except (OSError, ValueError):
        return False


def same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether writing one would change the other: by links, hard links or another spelling. A
    device is nobody's."""
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
    """A new or changed name is on disk when its folder is. Where folders cannot be synced, the
    system decides when."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(target: Path) -> None:
    """Remove what a killed `write_whole` of this file left. Whoever writes holds a lock on it,
    which ends with the process, also on another host; its number may be another process's by
    now."""
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if re.fullmatch(re.escape(_stem(target)) + r"\.\d+\.new", name):
                path = target.with_name(name)
                if fcntl is None:
                    path.unlink()
                    continue
                with suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # else renamed since
                    if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                        path.unlink()


def lock(file: BinaryIO | TextIO) -> bool:
    """Whether the file is ours alone from now on, until it is closed or our process ends. False if
    another one has it, or where the system has no such locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextmanager
def locked(file: BinaryIO, waiting: Callable[[], None]) -> Iterator[None]:
    """The file is ours alone, among those who ask; `waiting` is called once if somebody else has
    it. Where the system has no such locks, nobody waits."""
    if fcntl is not None:
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _existing(target: Path) -> os.stat_result | None:
    """Of the file that is there; PermissionError if it is marked as not to be written."""
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
    return os.fsdecode(os.fsencode(target.name)[:200])  # a name holds 255 bytes


@contextmanager
def _beside(target: Path, mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file in the same folder, locked while it is ours. The body removes or renames it; an
    error does as well."""
    # without O_BINARY, which only Windows has, it would write "\r\n" for each "\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for attempt in count():
        temporary = target.with_name(f"{_stem(target)}.{os.getpid()}{attempt or ''}.new")
        try:
            number = os.open(temporary, flags, mode)
        except FileExistsError:  # of another thread, or left where there are no locks
            continue
        if fcntl is None:
            break
        with suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(temporary), os.fstat(number)):
                break
        os.close(number)  # another run took it for a leftover between its birth and its lock
    with open(number, "wb") as file:
        try:
            yield file, temporary
        except BaseException:
            _remove(file, temporary)
            raise


def _keep_owner(number: int, old: os.stat_result) -> None:
    if hasattr(os, "fchown"):
        with suppress(OSError):  # only root gives files away
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
        _overwrite(target, content)  # mounted as a single file, as containers do
        _remove(file, temporary)


def _overwrite(target: Path, content: bytes) -> None:
    """In place, once all of it is on the disk under another name."""
    with open(target, "r+b") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _write_through(path: str | os.PathLike[str], content: bytes) -> None:
    number = _descriptor(path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
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
            raise  # whose reader has what it wanted, as after any print

        # So has the reader of this pipe; there may be more to write elsewhere.


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """The number of our own open file, if /dev/stdout, /dev/fd/N, /proc/self/fd/N or a link to one
    of them names it."""
    path = os.path.abspath(path)
    for _ in range(40):  # links to links; the system follows as many
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
    """An error's message without line breaks or anything else that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises FileNotFoundError, OSError for what the system refuses,
    or ValueError when it is not an object."""
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
