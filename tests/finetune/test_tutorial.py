"""The tutorial: every command of its page, and that the model has learnt what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from minillava.cli import doors

PAGE = (ROOT / "minillava" / "finetune" / "TUTORIAL.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"<!-- tutorial -->\n```sh\n(.*?)\n```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


def type_all(folder: Path) -> list[str]:
    """Type the page's commands in a folder that has a checkout's; returns what each prints."""
    for name in ("tools", "weights"):
        (folder / name).symlink_to(ROOT / name)
    # one thread, since a second makes an update of so small a model no shorter beside other tests
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("MINILLAVA_WEIGHTS", None)
    printed = []
    for command in COMMANDS:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True,
            timeout=3000, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


def scores(table: str) -> tuple[float, float]:
    """Percent of right answers about hearts, and about what was known."""
    (line,) = re.findall(r"^\| all \| (.*) \| (.*) \|$", table, re.MULTILINE)
    return float(line[0]), float(line[1])


def test_the_page_has_commands_that_exist():
    """A command of the page would be run by nobody."""
    assert len(COMMANDS) == 8 and all(c.startswith("python ") for c in COMMANDS)
    assert PAGE.count("```sh") == PAGE.count("<!-- tutorial -->")
    for command in COMMANDS:
        if "-m minillava." in command:
            name = command.split("-m minillava.")[1].split()[0]
            assert name in doors.DOORS, command
        else:
            assert (ROOT / command.split()[1]).is_file(), command


@pytest.mark.slow
def test_the_model_learns_a_heart_and_forgets_nothing(tmp_path):
    """The page would promise what a fresh machine does not do, or have a flag that is refused. In
    runs with other data and seeds, on another processor and on a GPU, 250 updates of nearly this
    rate came to 74 % at least, and what was known stayed at 96.8 % at least; from these, four
    standard errors of so many answers."""
    printed = type_all(tmp_path)
    assert (tmp_path / "heart-lora" / "curve.png").read_bytes().startswith(b"\x89PNG")
    tables = [scores(text) for text in printed if "| all |" in text]
    (before, old_before), (after, old_after) = tables
    assert before < 25 and old_before > 98
    assert after > 74 - 4 * 2.0
    assert old_after > 96.8 - 4 * 0.55
