"""README: every block marked `<!-- run -->` runs, and prints what it says it prints."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig
from minillava.llava import Llava

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```(\w+)\n(.*?)\n```", README, re.DOTALL)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
CONSOLE = [
    tuple(part.rstrip("\n").split("\n", 1))
    for kind, text in BLOCKS
    if kind == "console"
    for part in text.split("$ ")
    if part
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture
def folder(reference, tmp_path):
    return furnish(tmp_path, reference)


@pytest.fixture(scope="module")
def done(reference, tmp_path_factory):
    """What became of every command: two at a time, for most of their time is spent on imports, on one core."""
    commands = [f"set -e\n{commands}" for commands in SHELL] + [command for command, _ in CONSOLE]
    with ThreadPoolExecutor(2) as pool:
        folders = [furnish(tmp_path_factory.mktemp("readme"), reference) for _ in commands]
        started = {
            command: pool.submit(run, command, folder) for command, folder in zip(commands, folders, strict=True)
        }
        yield lambda command: started[command].result()
        pool.shutdown(cancel_futures=True)


def furnish(tmp_path, reference):
    """A folder as the README's reader has it, with the toy checkpoint under the name of the real one."""
    for name in ("tests", "tools", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "llava-1.5-7b-hf").symlink_to(reference / "plain")
    for name, picture in (("x.jpg", "landscape"), ("y.jpg", "portrait")):
        shutil.copy(reference / "pictures" / f"{picture}.png", tmp_path / name)
    questions = re.search(r"\$ cat questions.jsonl\n(.*?)\n\$", README, re.DOTALL)[1]
    (tmp_path / "questions.jsonl").write_text(f"{questions}\n", encoding="utf-8")
    return tmp_path


def run(command, folder):
    """Through a shell in `folder`, with `python` being this one, without a device or precision of its own choosing."""
    path = folder / "bin"
    path.mkdir()
    (path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (path / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_there_is_something_to_run():
    assert (len(SHELL) >= 3, len(CONSOLE) >= 1, len(PYTHON) >= 1) == (True, True, True)


@pytest.mark.parametrize("commands", SHELL)
def test_commands_run(commands, done):
    """Those of a block one after the other, in one folder."""
    found = done(f"set -e\n{commands}")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.strip()


@pytest.mark.parametrize(("command", "output"), CONSOLE)
def test_commands_print_what_the_readme_says(command, output, done):
    found = done(command)
    assert (found.returncode, (found.stderr + found.stdout).rstrip("\n")) == (0, output)


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_memory_table_is_true():
    wide = TextConfig(vocab_size=32064)
    wider = replace(wide, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                    num_key_value_heads=40, head_dim=128)  # fmt: skip
    for name, text in (("7B", wide), ("13B", wider)):
        with torch.device("meta"):
            model = Llava(LlavaConfig(CLIP_LARGE_336, text))
        count = sum(p.numel() for p in model.parameters()) / 1e9
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2 * 1000 / 1e9
        row = f"| LLaVA-1.5 {name} | {count:.2f} billion | {2 * count:.1f} GB | {4 * count:.1f} GB | {cache:.2f} GB |"
        assert row in README


def test_every_command_is_marked_or_in_continuous_integration():
    blocks = re.findall(r"(<!-- [\w: ]+ -->\n)?```(sh|console|python)\n", README)
    assert all(marker for marker, _ in blocks)
    for name in ("main", "test"):
        assert f"<!-- ci: {name} -->" in README
        assert f"readme_command {name}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
