"""Files whole or not at all, whatever has their name; text in any encoding; what errors of the
system say."""

import errno
import io
import json
import os
import stat
import threading
from pathlib import Path

import pytest
from waiting import PATIENCE

from minillava.files import disk
from minillava.files.disk import (
    _beside,
    check_writable,
    explain,
    is_stream,
    refused,
    same_file,
    write_whole,
)
from minillava.files.text import decode, read_lines

posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes of Unix")
not_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere"
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what may not be read -------------------------------------------------------------------------


@posix
def test_missing_rights_name_the_file_that_lacks_them_and_the_command(tmp_path, monkeypatch):
    """They were called a damaged or missing file, to be downloaded again."""
    closed, file = tmp_path / "closed", tmp_path / "closed" / "x y.json"
    closed.mkdir()
    file.touch()
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    told = str(refused(file, error))
    assert (
        told
        == f"{file}: may not be read (Permission denied); its owner can allow it with: chmod u+r '{file}'"
    )
    assert str(refused(closed, error)).endswith(f"chmod u+rx {closed}")
    assert str(refused(file, error, writing=True)).endswith(f"chmod u+w '{file}'")
    assert str(refused(closed / "new", error, writing=True)).endswith(f"chmod u+wx {closed}")
    may = os.access  # root may search every folder
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and may(path, mode))
    assert str(refused(file, error)).endswith(f"chmod u+x {closed}")


@pytest.mark.parametrize(
    ("number", "step"),
    [(errno.EIO, "the disk or the network failed"), (errno.ELOOP, "its links lead in a circle"),
     (errno.ENAMETOOLONG, "choose a shorter name"), (errno.EMFILE, "too many files are open")],
)  # fmt: skip
def test_other_refusals_keep_the_system_s_words_and_get_a_step(number, step):
    """A failed disk, a circle of links or a name that is too long would be reported without what to
    do next."""
    told = str(refused("a.json", OSError(number, os.strerror(number))))
    assert told.startswith(f"a.json: {os.strerror(number)}; {step}")


# --- writing --------------------------------------------------------------------------------------


def test_a_new_and_an_old_file_hold_what_was_written_and_nothing_else_is_left(tmp_path):
    """A temporary file would stay beside the written one, or text that is not UTF-8 would end in a
    traceback."""
    for content in ("first", b"second", "not UTF-8: \udcff"):
        write_whole(tmp_path / "a", content)
        assert names(tmp_path) == ["a"]
    assert json.loads(f'"{(tmp_path / "a").read_text()}"') == "not UTF-8: \udcff"


@posix
def test_a_link_keeps_leading_to_its_target(tmp_path):
    """A link was replaced by a file, and its target kept the old content."""
    (tmp_path / "real").write_text("old")
    for name, target in (("link", "real"), ("chain", "link"), ("dangling", "absent")):
        (tmp_path / name).symlink_to(target)
        check_writable(tmp_path / name)
        write_whole(tmp_path / name, name)
        assert os.readlink(tmp_path / name) == target
    assert (tmp_path / "real").read_text() == "chain"
    assert (tmp_path / "absent").read_text() == "dangling"


@posix
def test_links_in_a_circle_are_an_error_with_the_name(tmp_path):
    """Following links that lead in a circle would never end, or the error would not name the
    file."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (check_writable, lambda path: write_whole(path, "")):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "a")
        assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(tmp_path / "a"))
    assert names(tmp_path) == ["a", "b"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_an_existing_file_keeps_its_mode_and_a_new_one_follows_the_umask(tmp_path, mode):
    """A file put in place of a private one would be readable by others, or lose what others may do
    with it."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(mode)
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "old", "new")
        write_whole(tmp_path / "new", "new")
    finally:
        os.umask(before)
    found = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("old", "new")]
    assert found == [mode, 0o640]
    assert (tmp_path / "old").read_text() == "new"


@posix
def test_a_file_of_two_names_is_still_one_file(tmp_path):
    """Replacing a file that has a second name would leave the old content under that name."""
    (tmp_path / "a").write_text("something long")
    os.link(tmp_path / "a", tmp_path / "b")
    write_whole(tmp_path / "a", "short")
    assert (tmp_path / "b").read_text() == "short"
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")


@posix
def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path):
    """A pipe was replaced by a file, so that `--html >(cmd)` could not work."""
    os.mkfifo(tmp_path / "pipe")
    content, found = os.urandom(300_000), []
    check_writable(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", content)
    reader.join(timeout=PATIENCE)
    assert found == [content]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["pipe"]


@posix
def test_a_device_gets_the_content_and_stays_a_device():
    """Writing to a terminal or /dev/null would replace the device by a file."""
    ours, theirs = os.openpty()
    try:
        write_whole(os.ttyname(theirs), "hello")
        assert os.read(ours, 100) == b"hello"
        assert stat.S_ISCHR(os.stat(os.ttyname(theirs)).st_mode)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/fd") and not os.path.exists("/dev/fd"),
    reason="no names for these",
)
@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_an_open_file_by_its_number_is_written_where_it_stands(tmp_path, folder):
    """`--json /dev/stdout` replaced the machine's link by a file."""
    if not os.path.exists(folder):
        pytest.skip(f"there is no {folder}")
    with open(tmp_path / "a", "wb") as file:
        file.write(b"before ")
        file.flush()
        (tmp_path / "link").symlink_to(f"{folder}/{file.fileno()}")
        for path in (f"{folder}/{file.fileno()}", tmp_path / "link"):
            assert is_stream(path)
            check_writable(path)
            write_whole(path, "x")
    assert (tmp_path / "a").read_bytes() == b"before xx"
    assert names(tmp_path) == ["a", "link"]


@posix
def test_a_pipe_whose_reader_left_has_given_what_was_wanted():
    """A reader such as head, which stops early, would end the command with a broken pipe."""
    read, write = os.pipe()
    os.close(read)
    try:
        write_whole(f"/dev/fd/{write}", "x" * 10)
    finally:
        os.close(write)


def test_what_the_disk_refuses_leaves_the_old_file_and_says_its_name(tmp_path, monkeypatch):
    """A full disk would cost the user the old file, and leave half of the new one."""
    (tmp_path / "a").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            write_whole(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


@not_root
def test_what_may_not_be_written_is_known_before_and_nothing_changes(tmp_path):
    """A rename would replace a file that its owner marked as not to be written."""
    (tmp_path / "kept").write_text("old")
    (tmp_path / "kept").chmod(0o444)
    (tmp_path / "closed").mkdir(0o555)
    for path in (tmp_path / "kept", tmp_path / "closed" / "new"):
        for write in (check_writable, lambda path: write_whole(path, "new")):
            with pytest.raises(PermissionError) as caught:
                write(path)
            assert "chmod" in explain(caught.value)
    assert (tmp_path / "kept").read_text() == "old"
    assert names(tmp_path) == ["closed", "kept"]
    (tmp_path / "closed").chmod(0o755)


def test_asking_whether_a_file_can_be_written_leaves_nothing(tmp_path):
    """The check before a long run would leave an empty file behind, empty the old one, or refuse a
    long name that can be written."""
    (tmp_path / "old").write_text("old")
    for name in ("old", "new", "ü" * 120):
        check_writable(tmp_path / name)
    assert (names(tmp_path), (tmp_path / "old").read_text()) == (["old"], "old")
    write_whole(tmp_path / ("ü" * 120), "a name as long as a disk allows")
    with pytest.raises(OSError, match="long"):
        check_writable(tmp_path / ("n" * 300))
    with pytest.raises(OSError, match="directory"):
        check_writable(tmp_path / "old" / "inside")


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    """a.json.123.new stayed for ever. Other files with such names are other people's."""
    for name in (
        "a.json.123.new",
        "a.json.notes.new",
        "a.json.123.new.txt",
        "b.json.123.new",
        "a.json.new",
    ):
        (tmp_path / name).write_text("left")
    write_whole(tmp_path / "a.json", "new")
    assert names(tmp_path) == [
        "a.json",
        "a.json.123.new.txt",
        "a.json.new",
        "a.json.notes.new",
        "b.json.123.new",
    ]
    (tmp_path / f"b.json.{os.getpid()}.new").write_text("of a process that had our number")
    check_writable(tmp_path / "b.json")
    assert not [name for name in names(tmp_path) if name.startswith("b.json")]


@pytest.mark.skipif(disk.fcntl is None, reason="an open file cannot be removed there")
def test_what_another_run_is_writing_is_not_a_leftover(tmp_path):
    """One run would delete the temporary file that another is still writing."""
    with _beside(tmp_path / "a", 0o666) as (_, temporary):
        write_whole(tmp_path / "a", "of another run")
        assert temporary.exists()
        temporary.unlink()
    assert names(tmp_path) == ["a"]


def test_runs_at_once_leave_one_whole_file(tmp_path):
    """Two runs that write one file would leave a mixture of both."""
    contents = [bytes([i]) * 50_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_whole, args=(tmp_path / "a", content)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents
    assert names(tmp_path) == ["a"]


# --- which files are the same ---------------------------------------------------------------------


@posix
def test_the_same_file_by_every_spelling(tmp_path, monkeypatch):
    """An input named by another spelling or a link would be overwritten as if it were another
    file."""
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("")
    Path("other").write_text("")
    os.link("a", "hard")
    Path("soft").symlink_to("a")
    Path("dangling").symlink_to("absent")
    for spelling in ("a", "./a", "../" + tmp_path.name + "/a", str(tmp_path / "a"), "hard", "soft"):
        assert same_file("a", spelling)
        assert not same_file("other", spelling)
    assert same_file("absent", "dangling")
    assert not same_file("absent", "nowhere")
    assert not same_file(os.devnull, os.devnull)  # which everybody may write to


# --- errors ---------------------------------------------------------------------------------------


def test_an_error_of_the_system_is_a_name_what_happened_and_a_next_step():
    """A user would see an error number, or a name with a line break in it, instead of one line that
    says what to do."""
    found = explain(OSError(errno.ENOSPC, "No space left on device", "a.json"))
    assert found == "a.json: No space left on device; make room there, then repeat the command"
    assert explain(OSError(errno.EACCES, "Permission denied", b"a\nb")).startswith(
        "'a\\nb': Permission denied; "
    )
    assert explain(OSError(errno.EIO, "Failed"), "name").startswith("name: Failed; ")
    assert (
        explain(FileNotFoundError("x: no such picture; check the path"))
        == "x: no such picture; check the path"
    )


# --- text -----------------------------------------------------------------------------------------

TEXT = "Où est 星?\nÀ gauche?"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "le", "be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_any_program_reads_the_same(encoding, end):
    """Questions saved by Notepad or Excel would begin with a byte order mark, or end in a carriage
    return."""
    text = TEXT.replace("\n", end)
    wide = {
        "le": b"\xff\xfe" + text.encode("utf-16-le"),
        "be": b"\xfe\xff" + text.encode("utf-16-be"),
    }
    content = wide.get(encoding) or text.encode(encoding)
    assert decode(content, "a.txt") == TEXT
    for last in ("", end):
        more = content + last.encode({"le": "utf-16-le", "be": "utf-16-be", "utf-16": "utf-16-le",
                                      "utf-32": "utf-32-le"}.get(encoding, "utf-8"))  # fmt: skip
        assert list(read_lines(io.BytesIO(more), "stdin")) == TEXT.split("\n")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (TEXT.encode("utf-16-le"), "a.txt: "),
        ("What?".encode("utf-16-le"), "NUL"),
        ("What?".encode("utf-16-be"), "UTF-16 without a byte order mark"),
        (b"What\0?", "NUL"),
        (b"caf\xe9", "byte 0xe9 at 3"),
        (b"\xff\xfeW\0h", "not text in utf-16"),
        (b"\xff\xfeW\0\0\0", "NUL"),
        (b"\x89PNG\r\n\x1a\n\0", "not text in utf-8"),
    ],
)
def test_what_is_not_text_is_one_line_that_says_what_to_do(content, found):
    """UTF-16 without a mark, or a picture in the place of a text, would be read as letters that
    nobody wrote."""
    with pytest.raises(ValueError, match="save it as UTF-8") as caught:
        decode(content, "a.txt")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_encoding_is_tried_last():
    """Text that is valid UTF-8 would be read as Latin-1 and show é as two letters."""
    assert decode(b"caf\xe9", "stdin", "latin-1") == "café"
    assert decode("café".encode(), "stdin", "latin-1") == "café"


def test_a_line_that_is_not_utf_8_spoils_itself_alone():
    """One bad line would end a run of many questions."""
    lines = list(read_lines(io.BytesIO(b"\xef\xbb\xbfone\ncaf\xe9\nthree"), "stdin"))
    assert lines == ["one", "caf\udce9", "three"]
    assert list(read_lines(io.BytesIO(b""), "stdin")) == []
    assert list(read_lines(io.BytesIO(b"one\ntw\0o\nthree"), "stdin")) == ["one", "tw\0o", "three"]


def test_lines_come_as_they_arrive():
    """Who drives chat through a pipe waits for an answer before the next question."""
    read, write = os.pipe()
    with open(read, "rb") as stream, open(write, "wb", buffering=0) as driver:
        lines = read_lines(stream, "stdin")
        for text in ("one", "two"):
            driver.write(f"{text}\r\n".encode())
            assert next(lines) == text
