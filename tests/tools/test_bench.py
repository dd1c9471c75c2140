"""tools/bench.py: tables of true measurements, and what it refuses. Toy sizes: what they measure
means nothing."""

import json

import bench
import pytest
import torch
from bench_checkpoint import config_of, make_checkpoint

from minillava.assistant import load
from minillava.checkpoint.stored import StoredWeights


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What the machine can do is measured on less than it would take to be true."""
    monkeypatch.setattr(bench, "LARGE", 1 << 20)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def test_the_checkpoint_is_whole_and_makes_finite_numbers(checkpoints):
    folder = checkpoints / "toy-bfloat16"
    make_checkpoint(folder, "toy", torch.bfloat16)
    written = (folder / "config.json").stat().st_mtime_ns
    make_checkpoint(folder, "toy", torch.bfloat16)  # is there already
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert sorted(path.name for path in checkpoints.iterdir()) == ["toy-bfloat16"]
    assistant = load(folder, dtype="float32", device="cpu")
    logits = assistant.model([[1, -200, 5, 6]], torch.randn(1, 3, 56, 56)).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    # CLIP's last block and norm, which transformers wants to see
    assert len(assistant.unused) == 18


def test_weights_and_cache_are_counted_as_they_are(checkpoints):
    folder = checkpoints / "toy-bfloat16"
    make_checkpoint(folder, "toy", torch.bfloat16)
    checkpoint = StoredWeights(folder)
    linear = [
        checkpoint.shape(n)
        for n in checkpoint.tensors
        if n.startswith("language_model.") and "embed" not in n
    ]
    assert bench.weights_read(config_of("toy").text) == sum(
        shape[0] * shape[1] for shape in linear if len(shape) == 2
    )
    assert bench.cache_size(config_of("7b"), 1) == 2 * 32 * 4096


def test_compare_measures_processes_side_by_side(checkpoints, capsys):
    arguments = [
        "compare",
        "--size",
        "toy",
        "--folder",
        str(checkpoints),
        "--rows",
        "float32,int4",
        "--rounds",
        "1",
    ]
    assert bench.main([*arguments, "--tokens", "3", "--no-cold"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(
        f"`python tools/bench.py {' '.join(arguments)} --tokens 3 --no-cold`, 20"
    )
    rows = {
        line.split(" | ")[0]: line.split(" | ")[1:]
        for line in lines
        if line.startswith("| minillava")
    }
    assert list(rows) == ["| minillava float32", "| minillava int4"]
    columns = [column.strip() for column in lines[2].strip("|").split("|")][1:]
    assert all(len(cells) == len(columns) for cells in rows.values())
    cells = dict(zip(columns, rows["| minillava float32"], strict=True))
    assert 0.3 < float(cells["start to first token, s"]) < 100  # a process that imports torch
    assert 0.1 < float(cells["peak GB"]) < 2
    assert float(cells["tokens/s"]) > 0
    assert "round 1: int4: first token after" in err
    assert "| float32: peak memory, to 1.05 × weights + cache + 300 MB |" in out


def test_json_has_every_round(checkpoints, capsys):
    arguments = [
        "compare",
        "--size",
        "toy",
        "--folder",
        str(checkpoints),
        "--rows",
        "bfloat16",
        "--rounds",
        "1",
    ]
    assert bench.main([*arguments, "--tokens", "3", "--no-cold", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert len(row["rounds"]) == 1
    for measured in row["rounds"]:
        assert len(measured["ids"]) == 4  # the first, and three more
        assert measured["import"] + measured["open"] < measured["process"]
        assert measured["vision"] < measured["first"]
    assert found["limits"]["bandwidth"] > 1e8


@pytest.mark.parity
def test_transformers_answers_the_same(checkpoints, capsys):
    pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
    arguments = [
        "compare",
        "--size",
        "toy",
        "--folder",
        str(checkpoints),
        "--rows",
        "float32,transformers-float32",
    ]
    assert bench.main([*arguments, "--rounds", "1", "--tokens", "5", "--json"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < ours["cold"] < 60
    assert 0 < theirs["cold"] < 60
    assert ours["rounds"][0]["ids"] == theirs["rounds"][0]["ids"]


def test_growth_measures_every_length_and_batch(monkeypatch, capsys):
    monkeypatch.setattr(bench, "CONTEXTS", (8, 16))
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    arguments = [
        "growth",
        "--size",
        "toy",
        "--dtypes",
        "float32,int8",
        "--tokens",
        "2",
        "--rounds",
        "1",
    ]
    assert bench.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found][:4] == [
        ["float32", *x] for x in (["context", 8], ["context", 16], ["batch", 1], ["batch", 2])
    ]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in found)
    assert bench.main(arguments) == 0
    lines = [
        line.split(" | ")[0]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert lines[:3] == ["| ms per step, context", "| float32", "| int8"]


@pytest.mark.parity
def test_growth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install -e '.[bench]'")
    timings = {
        ("float32", kind, n): bench.Timing([n / 100, n / 90], [0.0])
        for kind in ("context", "batch")
        for n in (1, 2)
    }
    bench.growth_plot(timings, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_quality_is_the_distance_to_float64():
    found = bench.quality(shapes=((128, 256),))
    for row in found:
        assert 0 < row["float32"] < 1e-5 < row["bfloat16"] < row["int8"] < row["int4"] < 0.2
    assert len(bench.quality_table(found).splitlines()) == 2 + len(found) == 4


def test_kernels_are_timed_one_by_one(monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROW_COUNTS", (1, 3))
    found = bench.kernels(rounds=2, n=128, c=64)
    assert len(found) == 6 * 2
    assert all(len(timing.seconds) == 2 and min(timing.seconds) > 0 for timing in found.values())
    assert bench.kernels_table(found).splitlines()[0] == "| ms, rows | 1 | 3 |"


def test_contrast_makes_a_table(capsys):
    assert (
        bench.main(
            ["contrast", "--size", "toy", "--dtype", "float32", "--tokens", "1", "--rounds", "2"]
        )
        == 0
    )
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "| plain",
        "| contrast, two rows of a batch",
        "| contrast, two passes",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["contrast", "--rounds", "0"], "--rounds, --tokens and --questions need at least 1"),
        (["contrast", "--tokens", "0"], "--rounds, --tokens and --questions need at least 1"),
        (
            ["compare", "--rows", "float32,gpt"],
            "--rows: unknown gpt, expected some of: float32, bfloat16, int8",
        ),
        (["growth", "--dtypes", "int3"], "--dtypes: unknown int3"),
        (
            ["growth", "--device", "cuda"],
            "--device cuda is for compare: growth measures the processor",
        ),
        (
            ["growth", "--tokens", "128"],
            "--tokens is 128, expected less than the shortest context, 128",
        ),
        (["growth", "--png", "/no/such/folder/x.png"], "no such folder"),
    ],
)
def test_wrong_usage(capsys, wrong, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main([*wrong, "--size", "toy"])
    assert message in capsys.readouterr().err
