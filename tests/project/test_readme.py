"""README and the pages beside the code: the blocks of each, typed one after another into one
shell, do and print what it says.

Marked `<!-- run -->` is what runs here; `<!-- ci: NAME -->` makes the environment, which .ci/run
does.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import bench_chart
import bench_checkpoint
import pytest
import relatives
import screenshots
import torch
from paths import ROOT
from waiting import PATIENCE

from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig
from minillava.files.hub import DOWNLOAD, SMALL_DOWNLOAD, SMALL_RELEASE
from minillava.llava import Llava

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "minillava").glob("*/README.md"))]
}
README = PAGES["README.md"]
LINKED = [
    *PAGES,
    "minillava/finetune/TUTORIAL.md",
    "minillava/DIFFERENCES.md",
    "tools/MEASUREMENTS.md",
    "weights/README.md",
]


class Typed(NamedTuple):
    kind: str  # of the block: sh, console or python
    text: str  # a whole block, or one command of a console
    output: str | None  # what README shows, on both streams


def typed_blocks(text: str) -> list[Typed]:
    found = []
    for kind, block in re.findall(r"<!-- run -->\n```(\w+)\n(.*?)\n```", text, re.DOTALL):
        if kind == "console":
            parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
            parts = [part.rstrip("\n").partition("\n") for part in parts]
            found += [Typed(kind, command, output) for command, _, output in parts]
        else:
            found.append(Typed(kind, block, None))
    return found


# A page's blocks are typed after README's first, which makes the environment known to the shell.
TYPED = {
    name: typed_blocks(README)[: name != "README.md"] + typed_blocks(text)
    for name, text in PAGES.items()
}
TITLES = [(name, i) for name, typed in TYPED.items() for i in range(len(typed))]

# Importing torch takes two seconds of each command. This process has imported it, and is forked for
# every `python` that the shell starts, which is a client that sends its arguments and streams.
SERVER = """
import json, os, runpy, signal, socket, sys, traceback
import minillava.generate.answer, minillava.assistant, minillava.cli.opening
def run(argv):
    if argv[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(argv[1], None)
        sys.argv = argv[1:]
        return runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    if argv[0] in ("-c", "-"):
        sys.path.insert(0, os.getcwd())
        sys.argv = [argv[0], *argv[2:]]
        code = argv[1] if argv[0] == "-c" else sys.stdin.read()
        return exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    sys.argv = argv
    return runpy.run_path(argv[0], run_name="__main__")
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    if os.fork():
        connection.close()
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    argv, folder, environment = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        run(argv)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status]))
    os._exit(0)
"""
CLIENT = """
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(sys.argv[1])
message = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [message], [0, 1, 2])
sys.exit(server.recv(1)[0])
"""


@pytest.fixture(scope="module")
def done(reference, tmp_path_factory):
    """`done[page][i]` -> (exit status, stdout, stderr) of what `TYPED[page][i]` does, a page's all
    in one shell and folder."""
    # a socket's path has 100 characters
    short = tempfile.mkdtemp()
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "MINILLAVA_WEIGHTS"} | own
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, address := f"{short}/python"],
        env=environment,
        stdout=subprocess.PIPE,
    )

    # Before there are threads: the first call of all empties the folder that holds the others.
    folders = {name: tmp_path_factory.mktemp("page") for name in PAGES}

    def type_page(name: str) -> list[tuple[int, str, str]]:
        folder = folders[name]
        furnish(folder, reference, address)
        subprocess.run(
            ["bash", "--norc", "-c", script(TYPED[name])],
            cwd=folder,
            env=environment | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
            timeout=PATIENCE,
            check=True,
        )
        read = lambda i: [  # noqa: E731
            (folder / f"{kind}.{i}").read_text(encoding="utf-8")
            for kind in ("status", "out", "err")
        ]
        return [(int(status), out, err) for status, out, err in map(read, range(len(TYPED[name])))]

    try:
        assert server.stdout.readline() == b"ready\n"
        with ThreadPoolExecutor(2) as shells:  # as many as there are cores to run the tests on
            yield dict(zip(PAGES, shells.map(type_page, PAGES), strict=True))
    finally:
        server.terminate()
        server.communicate()
        shutil.rmtree(short)


def script(typed: list[Typed]) -> str:
    lines = []
    for i, (kind, text, _) in enumerate(typed):
        text = f"python - <<'END_OF_BLOCK'\n{text}\nEND_OF_BLOCK" if kind == "python" else text
        lines.append(f"{{ {text}\n}} < /dev/null > out.{i} 2> err.{i}; echo $? > status.{i}")
    return "\n".join(lines)


def furnish(folder: Path, reference: Path, address: str) -> None:
    """A checkout after README's first command: an environment that is not active yet, with a toy
    under the name of the real model and two pictures of the reader's."""
    for name in ("tests", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "weights").mkdir()
    (folder / "weights" / "shapes").symlink_to(ROOT / "weights" / "shapes")
    (folder / "weights" / "llava-1.5-7b-hf").symlink_to(reference / "plain")
    small = folder / "weights" / SMALL_RELEASE.partition("/")[2]
    relatives.stored(small, "interleave")
    for name, picture in (("x.jpg", "landscape"), ("y.jpg", "portrait")):
        shutil.copy(reference / "pictures" / f"{picture}.png", folder / name)
    (folder / "client.py").write_text(CLIENT, encoding="utf-8")
    environment = folder / ".venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    client = f'exec "{sys.executable}" -IS "{folder}/client.py" "{address}" "$@"'
    (folder / "bin").mkdir()
    for path, does in (
        (environment, client),
        (folder / "bin", 'echo "python: not found" >&2; exit 127'),
    ):
        (path / "python").write_text(f"#!/bin/sh\n{does}\n")
        (path / "python").chmod(0o755)


def test_there_is_something_to_type():
    """The tests below would pass on an empty list."""
    assert {block.kind for block in TYPED["README.md"]} == {"sh", "console", "python"}
    assert len(PAGES) >= 6 and len(TITLES) >= 30
    assert all(len(typed) >= 2 for typed in TYPED.values())
    text = "<!-- run -->\n```console\n$ a 'b'\nc\n$ x\n$ d\ne\nf\n```\n<!-- run -->\n```sh\ng\nh\n```\n"
    assert typed_blocks(text) == [
        Typed("console", "a 'b'", "c"),
        Typed("console", "x", ""),
        Typed("console", "d", "e\nf"),
        Typed("sh", "g\nh", None),
    ]


@pytest.mark.parametrize(
    ("page", "i"), TITLES, ids=[f"{name}-{i}-{TYPED[name][i].text[:40]}" for name, i in TITLES]
)
@pytest.mark.slow
def test_typed_after_all_before_it(page, i, done):
    """Blocks that each ran in a folder of its own hid that one needed another's name for its
    answers, and that nothing had made `python` known to the shell."""
    kind, text, output = TYPED[page][i]
    status, out, err = done[page][i]
    if kind == "console":
        assert (status, (err + out).rstrip("\n")) == (0, output)
    else:
        answers = kind == "python" or "python -m" in text
        assert (status, err, bool(out.strip())) == (0, "", answers)


def test_the_memory_table_is_true():
    """A user would buy or rent a machine by numbers that are wrong."""
    wide = TextConfig(vocab_size=32064)
    wider = replace(wide, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                    num_key_value_heads=40, head_dim=128)  # fmt: skip
    small = bench_checkpoint.config_of(bench_checkpoint.INTERLEAVE)
    configs = {
        "LLaVA-1.5 7B": LlavaConfig(CLIP_LARGE_336, wide),
        "llava-interleave-qwen 0.5B": small,
    }
    configs["LLaVA-1.5 13B"] = LlavaConfig(CLIP_LARGE_336, wider)
    for name, config in configs.items():
        text = config.text
        with torch.device("meta"):
            model = Llava(config)
        count = sum(p.numel() for p in model.parameters()) / 1e9
        cache = (
            2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 1000 / 1e9
        )
        row = (
            f"| {name} | {count:.2f} billion | {2 * count:.1f} GB | {4 * count:.1f} GB | "
            f"{cache:.2f} GB |"
        )
        assert row in (ROOT / "weights" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_marked_or_in_continuous_integration(page):
    """A command on a page would be run by nobody, and stop working unnoticed."""
    blocks = re.findall(r"(<!-- [\w: ]+ -->\n)?```(sh|console|python)\n", PAGES[page])
    assert all(marker for marker, _ in blocks)


def test_continuous_integration_runs_the_two_commands_of_readme():
    """The two commands that a reader tries first would change on the page and not where they are
    tested."""
    for name in ("main", "test"):
        assert f"<!-- ci: {name} -->" in README
        assert f"readme_command {name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """The anchors that a code host makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    """A link to a page or heading that was renamed would lead nowhere."""
    path = ROOT / page
    for link in re.findall(r"\]\(([^)]+)\)", text := path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        if "://" not in link:
            assert (target := path.parent / file if file else path).exists(), link
            assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), link
    assert page == "README.md" or "README.md" in text


@pytest.mark.parametrize("page", [page for page in LINKED if page != "README.md"])
def test_readme_leads_to_every_page(page):
    """A page that nobody finds is not read."""
    assert f"]({page}" in README


def test_the_first_screen_quotes_what_its_command_prints():
    """The answer stands there before anything is typed, so nothing else compares it."""
    command, screen = README.split("<!-- ci: main -->")[1].split("## ")[0].split("\n```\n", 1)
    (answer,) = re.findall(r"^`(.+)`$", screen, re.MULTILINE)
    asked = command.rpartition(".venv/bin/")[2].strip()
    (printed,) = (typed.output for typed in TYPED["README.md"] if typed.text == asked)
    assert answer == printed.splitlines()[-1]


def test_without_a_browser_the_pictures_say_what_is_missing(monkeypatch):
    """Making the pictures of README would end in a traceback where Chromium is not installed."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="install Chromium"):
        screenshots.main()


def test_readme_stays_short():
    """It had grown to 634 lines, and who came to ask about one picture read about benchmarks."""
    assert len(README.splitlines()) <= 260


def test_pictures_are_small():
    """Everyone who clones downloads them."""
    shown = {
        (ROOT / page).parent / picture
        for page in LINKED
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / page).read_text("utf-8"))
    }
    assert len(shown) >= 4
    assert {path.name: path.stat().st_size for path in shown if path.stat().st_size > 150_000} == {}


def test_the_chart_is_drawn_from_the_measurements():
    """A chart that is not drawn again shows what was true before."""
    text = bench_chart.MEASURED.read_text(encoding="utf-8")
    assert bench_chart.CHART.read_text(encoding="utf-8") == bench_chart.draw(text)
    for place in bench_chart.PANELS.values():
        names = bench_chart.speeds(text, *place)
        assert {name.split()[0].strip(",") for name in names} >= {"minillava", "transformers"}
    assert "5.66" not in bench_chart.draw(text)  # of another size


def test_the_chart_shows_the_later_of_two_runs():
    """The chart would show an old measurement though a newer one is in the table."""
    table = (
        "\n\nas said\n\n| | dtype | tokens/s |\n|---|---|---:|\n| a | b | {} |\n| c | d | 3.0 |\n"
    )
    text = "# t\n## GPU, one" + table.format("1.0") + "\n## GPU, two" + table.format("2.0")
    assert bench_chart.speeds(text, "## GPU", "said") == {"a b": "2.0", "c d": "3.0"}
    assert bench_chart.speeds(text, "## GPU, one", "said") == {"a b": "1.0", "c d": "3.0"}
    assert (
        bench_chart.speeds(text, "## CPU", "said") == bench_chart.speeds(text, "## GPU", "x") == {}
    )


def test_every_page_puts_the_download_into_the_folder_that_git_ignores():
    """README's own folder was one in the checkout, whose 14 GB git offered to add."""
    weights = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for command in (SMALL_DOWNLOAD, DOWNLOAD):
        assert " --local-dir weights/" in command
        assert command in README and command in weights
    # the one that any laptop runs comes first, and what its licence allows is said with it
    (section,) = re.findall(r"## The real model\n(.*?)\n## ", README, re.DOTALL)
    assert section.index(SMALL_DOWNLOAD) < section.index(DOWNLOAD)
    assert "licence" in section and "licence" in weights
    assert "weights/*\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")
