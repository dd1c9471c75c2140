"""What a terminal pastes when files are dropped into it, and what Tab makes of a line."""

import os
from urllib.parse import quote

import pytest

from minillava.chat.terminal import Terminal, dropped, dropped_first, means_a_path, read_paths

POSIX = pytest.mark.skipif(os.name == "nt", reason="a backslash stands between folders here")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of files whose names are trouble, as the current and the home folder."""
    (tmp_path / "my photos").mkdir()
    for name in ("my photos/a star.png", "my photos/it's (1).png", "b.png", ".hidden.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "spelled",
    [
        "{0}", "'{0}'", '"{0}"', "  {0} ", "'{0}' ",
        pytest.param("{1}", marks=POSIX),
        "file://{2}", "file://localhost{2}", "file:{2}", "FILE://{2}", "'file://{2}'",
    ],
)  # fmt: skip
def test_a_dropped_path_is_understood(folder, spelled):
    """/image refused the quotes and backslashes that terminals write where a path has spaces."""
    path = f"{folder.as_posix()}/my photos/a star.png"
    url = ("/" if os.name == "nt" else "") + quote(path)
    line = spelled.format(path, path.replace(" ", "\\ "), url)
    assert read_paths(line) == [path]
    assert dropped(line) == [path]


@pytest.mark.parametrize(
    "spelled",
    [
        "& '{0}'", '& "{0}"', "\u202a{0}", "\u202a{0}\u202c", "\ufeff{0}", "“{0}”", "‘{0}’", "'{0}'\r",
        "\u00a0{0}", "“{0}”\u200b",
    ],
)  # fmt: skip
def test_a_path_from_powershell_explorer_or_a_word_processor(folder, spelled):
    """PowerShell calls what is dropped into it; Explorer's "copy as path" puts a mark in front."""
    path = f"{folder.as_posix()}/my photos/a star.png"
    assert read_paths(spelled.format(path)) == [path]
    assert dropped(spelled.format(path)) == [path]


@POSIX
@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("it's.png", "& '{0}/it''s.png'"),
        ("$HOME.png", '"{0}/\\$HOME.png"'),
        ("`a`.png", '"{0}/\\`a\\`.png"'),
        ('say "hi".png', '"{0}/say \\"hi\\".png"'),
        ("a\\b.png", '"{0}/a\\b.png"'),  # before another letter a backslash stays one
        ("a\tb.png", "$'{0}/a\\tb.png'"),
        ("it's.png", "$'{0}/it\\'s.png'"),
        ("é.png", "$'{0}/\\303\\251.png'"),
        ("é.png", "$'{0}/\\xc3\\xa9.png'"),
        ("éa.png", "$'{0}/\\u00e9a.png'"),
        ("9.41\u202fAM.png", "{0}/9.41\u202fAM.png"),
        ("at 9\u202fAM.png", "{0}/at\\ 9\u202fAM.png"),  # macOS names screenshots so
        ("‘a’ b.png", "{0}/‘a’\\ b.png"),
    ],
)
def test_a_path_as_a_shell_writes_it(folder, name, spelled):
    """A path that a shell has quoted in its own way would not be found."""
    (folder / name).touch()
    assert read_paths(spelled.format(folder)) == [f"{folder}/{name}"]
    assert dropped(spelled.format(folder)) == [f"{folder}/{name}"]


@pytest.mark.parametrize(
    "spelled",
    [
        "my photos/it's (1).png", '"my photos/it\'s (1).png"',
        pytest.param("my\\ photos/it\\'s\\ \\(1\\).png", marks=POSIX), "'my photos/it'\"'\"'s (1).png'",
        pytest.param("'my photos/it'\\''s (1).png'", marks=POSIX),
    ],
)  # fmt: skip
def test_quotes_and_brackets_in_a_name(folder, spelled):
    """A name with quotes and brackets could not be given in any spelling."""
    assert read_paths(spelled) == ["my photos/it's (1).png"]


def test_home(folder):
    """`~` would be taken for a folder of that name, though a shell expands it."""
    assert read_paths("~/b.png") == read_paths("'~/b.png'") == [os.path.expanduser("~/b.png")]
    assert dropped("~/b.png") == [os.path.expanduser("~/b.png")]


def test_several_paths_at_once(folder):
    """Several dropped files would be read as one path with spaces."""
    expected = ["my photos/a star.png", "b.png"]
    assert read_paths("'my photos/a star.png' b.png") == expected
    assert read_paths("'my photos/a star.png'\nb.png\n") == expected
    first, second = (f"{folder.as_posix()}/{name}" for name in expected)
    assert dropped(f"'{first}' '{second}'") == [first, second]


@POSIX
@pytest.mark.parametrize(
    "name", ["'b.png'", '"b.png"', "b\\ c.png", "b.png ", " b.png", "b.png b.png", "~", "#b.png"]
)
def test_a_file_that_is_really_called_so_goes_first(folder, name):
    """A file with quotes or a space in its name would be shadowed by what they mean."""
    (folder / name).touch()
    assert read_paths(name) == [name] or (name == "~" and read_paths("./~") == ["./~"])


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("nowhere.png", ["nowhere.png"]),
        ("'no where.png'", ["no where.png"]),
        ("no where.png", ["no where.png"]),  # one path with a space, as it was typed
        ("b.png nowhere.png", ["b.png", "nowhere.png"]),
        ("'b.png", ["'b.png"]),
        ("file:///no/where%20.png", ["/no/where .png"]),
        ("data:image/png;base64,AA AA", ["data:image/png;base64,AA AA"]),
        ("a\0b", ["a\0b"]),
    ],
)
def test_what_is_not_there_comes_back_for_the_message(folder, typed, shown):
    """The error would name another path than the one typed."""
    assert read_paths(typed) == shown
    assert dropped(typed) == []


@pytest.mark.parametrize(
    "line", ["Is b.png there?", "b.png", "/", "'What is it?'", "/my photos", "", "~", "file:///"]
)
def test_a_question_is_no_dropped_file(folder, line):
    """A question that happens to name a file would be added as a picture."""
    assert dropped(line) == []


@pytest.mark.parametrize(
    "spelled",
    ["'{0}'", '"{0}"', "{0}", "“{0}”", "& '{0}'", "file://{2}", pytest.param("{1}", marks=POSIX)],
)
@pytest.mark.parametrize("question", ["what colour is the star?", "What's 'it'?", "", "a  b\nc"])
def test_a_question_may_follow_a_dropped_file(folder, spelled, question):
    """A file is dropped and the question typed behind it: "no such command"."""
    path = f"{folder.as_posix()}/my photos/a star.png"
    line = spelled.format(path, path.replace(" ", "\\ "), quote(path))
    assert dropped_first(f" {line} {question}\n") == ([path], question)
    other = f"{folder.as_posix()}/b.png"
    assert dropped_first(f"'{path}' {other} {question}") == ([path, other], question)


@pytest.mark.parametrize("line", ["Is b.png there?", "b.png what?", "'/no/x.png' what?", "~ what?"])
def test_a_question_about_a_file_is_all_question(folder, line):
    """The first word of a question would be cut off because a file has that name."""
    assert dropped_first(line) == ([], line)
    assert not means_a_path(line)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("/no/such.png", True),
        ("/such.png", True),
        ("/no/such.png what's it?", True),
        ("'/no/such one.png'", True),
        ("~/such.png", True),
        ("file:///no/such.png", True),
        ("C:/no/such.png", True),
        ("/imaeg x.png", False),
        ("/imaeg", False),
        ("/", False),
        ("'/'", False),
        ("'What is it?'", False),
        ("", False),
    ],
)
def test_what_can_only_be_a_path(folder, line, path):
    """A mistyped path would be called an unknown command, or be asked as a question."""
    assert means_a_path(line) is path
    assert dropped_first(line)[0] == []


def test_tab_completes_commands_and_paths(folder, monkeypatch):
    """Tab would complete inside a question, or not find a path with a space."""
    monkeypatch.setattr("sys.stdout", None)  # no line editing: this is about what a line can become
    complete = Terminal(["/image", "/save", "/help"]).completions
    assert complete("/i") == ["/image "]
    assert complete("/") == ["/image ", "/save ", "/help"]
    assert (
        complete("") == complete("What") == complete("/help b") == complete("/image no/where") == []
    )
    assert complete("/image ") == ["/image b.png", "/image my photos/"]
    assert complete("/image my") == complete("/image 'my") == ["/image my photos/"]
    assert complete('/save "my') == ["/save my photos/"]
    assert complete("/save my photos/a") == ["/save my photos/a star.png"]
    assert complete("/image .h") == ["/image .hidden.png"]
    assert complete("/image ~/b") == ["/image ~/b.png"]
    if os.name != "nt":
        assert complete("/image my\\ photos/a\\ s") == ["/image my photos/a star.png"]
    assert complete("/image a\0") == []
