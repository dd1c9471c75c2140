"""The doors: how they are found, and that Ctrl-C ends one at any moment without a traceback."""

import contextlib
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import python
from paths import ROOT

import minillava
from minillava.cli import doors

WEIGHTS = ROOT / "weights" / "shapes"


@pytest.fixture
def front(run_main, monkeypatch):
    """`front(*words)`: status, stdout and stderr of `python -m minillava WORDS`, in this
    process."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/minillava/__main__.py"])
    before = signal.getsignal(signal.SIGINT)

    yield partial(run_main, doors.main)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_without_a_door_they_are_listed(front, words):
    """It said "cannot be directly executed", and nothing listed the doors."""
    status, out, err = front(*words)
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(doors.DOORS)
    assert all(line.endswith(doors.DOORS[line.split()[0]][0]) for line in lines)


def test_a_door_by_its_name_answers_as_the_door_does(front):
    """`minillava generate` would change what `python -m minillava.generate` prints."""
    picture = str(WEIGHTS / "example-1.png")
    status, out, err = front(
        "generate", "-q", "--weights", str(WEIGHTS), "-i", picture, "-p", "Is there a red star?"
    )
    assert (status, out, err) == (0, "Yes.\n", "")


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@FULL
@pytest.mark.parametrize("words", [(), ("--version",), ("chat", "--help"), ("look", "--version")])
def test_what_a_full_disk_or_a_closed_stdout_swallows_is_not_a_success(front, monkeypatch, words):
    """--help and --version into a full disk would exit with 0 although nothing arrived."""
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        assert front(*words) == (
            1,
            "",
            "error: stdout: No space left on device; make room there, then repeat the command\n",
        )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        status, _, err = front(*words)
        with contextlib.suppress(OSError):
            sys.stdout.close()
    assert (
        status,
        err.startswith("error: stdout is closed, so the answer has nowhere to go; "),
    ) == (1, True)


@FULL
@pytest.mark.parametrize("words", [("nowhere",), ("chat", "--nowhere")])
def test_wrong_usage_is_2_where_nobody_can_be_told(front, monkeypatch, words):
    """Where stderr is closed or full, wrong usage would exit with another status than 2."""
    for path in (None, "/dev/full"):
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setattr(sys, "stderr", path and stack.enter_context(open(path, "w")))
            assert front(*words)[:2] == (2, "")
            with contextlib.suppress(OSError, AttributeError):
                sys.stderr.close()


@pytest.mark.parametrize("door", doors.DOORS)
def test_help_and_errors_of_a_door_name_the_command_that_was_typed(front, door):
    """Help and errors would name a command other than the one the user typed."""
    status, out, err = front(door, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: python -m minillava {door} ")
    status, out, err = front(door, "--no-such-flag")
    assert (status, out) == (2, "")
    assert err.endswith(f"(see python -m minillava {door} --help)\n")


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("door", ["look --image a.png --json", "batch --questions q --answers"])
@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("a.png/x", "a part of the path is a file"),
        ("circle", "its links lead in a circle"),
        ("circle/x", "its links lead in a circle"),
        ("x" * 300, "choose a shorter name"),
        ("x" * 300 + "/x", "choose a shorter name"),
    ],
    ids=lambda text: text[:10],
)
def test_an_output_that_cannot_be_is_one_line(front, monkeypatch, tmp_path, door, output, advice):
    """The flags are read before the work, where nothing caught what the system says of a file."""
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    Path("circle").symlink_to("circle")
    before = sorted(os.listdir())
    status, out, err = front(*door.split(), output)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {output}: ")
    assert advice in err
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("verbose", [(), ("-v",), ("--verbose",)])
def test_an_error_while_flags_are_read_has_a_traceback_only_with_verbose(
    front, monkeypatch, verbose
):
    """An error of the system while flags are read would be a traceback, or hide one from -v."""

    def closed(*_):
        raise PermissionError(13, "Permission denied", "noread/sub/z")

    monkeypatch.setattr(doors.flags_of("generate"), "check_outputs", closed)
    status, out, err = front("generate", "-p", "x", *verbose)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: noread/sub/z: Permission denied; ")
    assert ("Traceback" in err) == bool(verbose)


def test_a_package_that_is_not_there_means_another_python(front, monkeypatch):
    """The system's Python, without torch, was called a bug of minillava."""

    def absent(*_):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(doors.flags_of("generate"), "read_flags", absent)
    status, out, err = front("generate", "-p", "x")
    assert (status, out) == (1, "")
    assert err == (
        f"error: No module named 'torch' for {sys.executable}; in the project's folder: "
        "source .venv/bin/activate, or pip install -e .\n"
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("generat", "no door 'generat'; did you mean generate?"),
        ("tarce", "no door 'tarce'; did you mean trace?"),
        ("xyzzy", "no door 'xyzzy'; there are: generate, chat,"),
        ("--image", "--image stands where the name of a door should; there are: generate,"),
        ("", "no door ''; there are: generate,"),
    ],
)
def test_an_unknown_door_is_wrong_usage(front, word, message):
    """A mistyped door would fail without saying which one is meant."""
    status, out, err = front(word, "x.jpg")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_version(front):
    """`minillava --version` would need a door, or name another version than the package."""
    assert front("--version") == (0, f"minillava {minillava.__version__}\n", "")


def test_an_installed_package_has_the_command():
    """The installed command would call a function that has moved."""
    script = re.search(
        r'"console_scripts": \["minillava = minillava\.([\w.]+):(\w+)"\]',
        (ROOT / "setup.py").read_text(),
    )
    assert script.groups() == (doors.main.__module__.partition(".")[2], doors.main.__name__)


def test_the_shared_file_of_the_command_lines_lists_the_doors_too():
    """`python -m minillava.cli` did nothing, and said nothing."""
    done = python("-m", "minillava.cli")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  generate  " in done.stdout


@pytest.mark.slow
def test_python_shows_what_the_package_has():
    """The Tab key and help() found nothing, since `load` is fetched on first use."""
    assert {"Assistant", "load", "__version__"} <= set(dir(minillava))
    done = python("-c", "import minillava; help(minillava)")
    assert "load(weights" in done.stdout and "class Assistant" in done.stdout


ASKED = ["-i", str(WEIGHTS / "example-1.png")]
INTERRUPTED = """
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
sys.argv[1:] = {words}
runpy.run_module("minillava.{door}", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("door", "module"),
    [
        ("generate", "argparse"),
        ("generate", "torch"),
        ("generate", "torch.nn"),
        ("chat", "minillava.prompt"),
        ("look", "numpy"),
        ("trace", "PIL"),
        ("inspect", "torch._C"),
        ("convert", "safetensors"),
        ("pope", "minillava.pope.files"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_while_something_is_imported_leaves_no_traceback(door, module):
    """Python's signal handler raises KeyboardInterrupt in the middle of whatever runs: for 1.7 s
    that was torch."""
    words = {
        "chat": [],
        "inspect": [],
        "look": [*ASKED, "--npy", os.devnull],
        "convert": [str(WEIGHTS), "no", "--to", "hf"],
        "pope": ["--questions", "q", "--answers", "a"],
    }.get(door, ASKED)
    done = python("-c", INTERRUPTED.format(module=module, door=door, words=words))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("words", "module"),
    [(["-m", "minillava.chat"], "minillava.chat"), (["-mminillava"], "minillava.cli.messages")],
)
def test_ctrl_c_before_the_door_is_found_leaves_no_traceback(tmp_path, words, module):
    """`python -m` imports the package first, and showed a traceback of runpy and typing."""
    interrupts = INTERRUPTED.partition("sys.argv[1:]")[0]
    (tmp_path / "sitecustomize.py").write_text(interrupts.format(module=module), encoding="utf-8")
    done = python(*words, path=(tmp_path,))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_importing_minillava_leaves_ctrl_c_as_it_is(tmp_path):
    """Only `python -m minillava...` is ours; a program that imports it, also run by -m, is not."""
    (tmp_path / "other.py").write_text(
        "import signal, minillava\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = python("-m", "other", path=(tmp_path,))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_ctrl_c_inside_exec_is_the_same_status():
    """Python ended the process by the signal: what was seen as -2 by who started it."""
    script = """if 1:
        from minillava.cli import doors
        from minillava.pope import flags, run

        def interrupted(*_):
            print("so far", end="")
            exec("raise KeyboardInterrupt")

        run.run = interrupted
        doors.begin("pope", ["--questions", "q", "--answers", "a"])"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "so far", "\n")


def test_ctrl_c_that_became_another_error_is_still_ctrl_c():
    """ "could not determine the shape of object type 'torch.storage.UntypedStorage'", with status 1."""
    script = """if 1:
        import os, signal
        from minillava.cli import doors
        from minillava.pope import flags, run

        def interrupted(*_):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None

        run.run = interrupted
        doors.begin("pope", ["--questions", "q", "--answers", "a"])"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_ctrl_c_after_the_answer_changes_nothing():
    """While Python ended, the signal ended it first: the answer was there, with the status of a
    killed process."""
    script = """if 1:
        import os, signal
        from minillava.cli import doors
        from minillava.pope import flags, run

        class Last:
            def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
                kill(process, number)

        signal.last = Last()
        run.run = lambda *_: print("all") or 0
        doors.begin("pope", ["--questions", "q", "--answers", "a"])"""
    done = python("-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all\n", "")


@pytest.mark.slow
def test_who_starts_a_door_with_ctrl_c_ignored_is_obeyed():
    """As `nohup` and a shell's `&` do."""
    script = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + INTERRUPTED
    done = python("-c", script.format(module="torch", door="generate", words=ASKED))
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    assert done.stdout.startswith("I see a large red star")
