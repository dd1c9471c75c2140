"""tools/bench.py: a table, and what it refuses."""

import sys

import pytest
from test_cli import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import bench


def test_the_fewest_rounds_make_a_table(capsys):
    assert bench.main(["contrast", "--size", "toy", "--dtype", "float32", "--tokens", "1", "--rounds", "2"]) == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "| plain",
        "| contrast, two rows of a batch",
        "| contrast, two passes",
    ]


@pytest.mark.parametrize("wrong", [["--rounds", "1"], ["--tokens", "0"]])
def test_too_few_rounds_or_tokens_are_wrong_usage(capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["contrast", "--size", "toy", *wrong])
    assert "--rounds needs at least 2, --tokens at least 1" in capsys.readouterr().err
