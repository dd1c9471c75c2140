"""tools/bench_kernels.py: every way is timed, and what is taken is judged by it. Toy sizes: what they
measure means nothing."""

import json

import bench
import bench_kernels
import pytest
from bench_kernels import HEADS, LAYERS, Cell, table, verdict, ways_of

from minillava.fast import processor, same_bits
from minillava.fast.linear import OF_ONE_ROW, PRODUCTS
from minillava.fast.quantize import BLOCKS

TOY = ["kernels", "--layers", "128x64", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two copies of a weight, and no more calls than one to a round."""
    monkeypatch.setattr(bench_kernels, "ENOUGH", 1)
    monkeypatch.setattr(bench_kernels, "LEAST", 1e-9)


def test_the_layers_are_those_of_7b_and_1b():
    """The ways would be chosen by shapes that no model has."""
    assert LAYERS[:3] == [(4096, 4096), (11008, 4096), (4096, 11008)]
    assert LAYERS[3:6] == [(2048, 2048), (5632, 2048), (2048, 5632)]
    assert HEADS == LAYERS[6:] == [(32064, 4096), (32064, 2048)]


@pytest.mark.parametrize("fast", [True, False])
def test_every_way_is_tried(monkeypatch, fast):
    """A new way to the product would never be measured, and so never be chosen."""
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: fast)
    assert set(ways_of("bfloat16", 1)) == set(PRODUCTS)
    assert set(ways_of("bfloat16", 2)) == set(PRODUCTS) - OF_ONE_ROW
    assert {way for way in PRODUCTS if "blocks" not in way} == set(ways_of("float32", 1))
    # without instructions for it, blocks of bfloat16 would only be slow
    blocks = {way for way in BLOCKS if fast or way.startswith("float32")}
    for kind in ("int8", "int4"):
        assert set(ways_of(kind, 1)) == {"kernel", *blocks}


def test_json_has_every_round_and_can_be_read_again(tmp_path, capsys, monkeypatch):
    """A measurement could not be judged again after the tables changed, or be mixed with another
    machine's."""
    assert bench.main([*TOY, "--rows", "1,3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == processor.kind()
    assert found["head"].startswith(
        f"`python tools/bench.py {' '.join(TOY)} --rows 1,3 --json`, 20"
    )
    of = [(cell["stored"], cell["rows"]) for cell in found["cells"]]
    assert of == [(s, r) for s in ("float32", "bfloat16", "int8", "int4") for r in (1, 3)]
    for cell in found["cells"]:
        assert set(cell["seconds"]) == set(ways_of(cell["stored"], cell["rows"]))
        assert cell["taken"] == processor.way(cell["stored"], cell["rows"], (128, 64))
        assert len(cell["seconds"][cell["taken"]]) == 2
        assert all(min(seconds) > 0 for seconds in cell["seconds"].values())
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    monkeypatch.setitem(processor.WAYS[found["kind"]], "int8", ((99, "float32 blocks"),))
    assert bench.main(["kernels", "--read", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(found["head"])
    (line,) = [
        line
        for line in text.split("| int8,")[1].split("\n\n")[0].splitlines()
        if line.startswith("| float32 blocks |")
    ]
    assert line.count("*") in (2, 6)  # taken twice by the table of now, and at best the fastest
    again = tmp_path / "again.json"
    again.write_text(json.dumps(found))
    (kind, _, cells), one = bench_kernels.read([path, again]), found["cells"]
    assert (kind, len(cells)) == (found["kind"], len(one))
    for both, cell in zip(cells, one, strict=True):
        assert both.seconds == {way: 2 * seconds for way, seconds in cell["seconds"].items()}
    path.write_text(json.dumps(found | {"kind": "arm"}))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="of kinds "):
        bench.main(["kernels", "--read", str(path), str(other)])


def test_a_head_is_not_asked_for_a_prompt(monkeypatch, capsys):
    """The bench would spend its time on a product that no model computes: the head of a whole
    prompt."""
    monkeypatch.setattr(bench_kernels, "HEADS", [(128, 64)])
    assert bench.main([*TOY, "--dtypes", "float32", "--rows", "2,640", "--json"]) == 0
    assert [cell["rows"] for cell in json.loads(capsys.readouterr().out)["cells"]] == [2]


def test_bits_are_counted_of_products_and_of_attention(monkeypatch, capsys):
    """This processor would keep the bits of fewer rows than its table promises."""
    monkeypatch.setattr(bench_kernels, "MODELS", ("toy",))
    assert bench.main(["kernels", "--bits", "--layers", "128x64", "--json"]) == 0
    product, attention = json.loads(capsys.readouterr().out)
    assert (product["of"], attention["of"]) == ("128 × 64", "attention of toy")
    for stored, claimed in processor.SAME_ROWS.get(processor.kind(), {}).items():
        assert claimed <= product[stored] <= max(same_bits.ROWS) >= attention[stored] >= 1
    assert bench.main(["kernels", "--bits", "--layers", "128x64", "--dtypes", "int8"]) == 0
    text = capsys.readouterr().out.split("\n\n")[1]
    assert text.splitlines()[2] == f"| 128 × 64 | {product['int8']} |"


def test_the_judgement_is_that_of_medians():
    """One slow round would call a way slow that is the fastest, or a way too slow would pass."""
    rounds = {"plain": [5.0, 1.0, 1.2], "turned": [1.0, 1.0, 1.0], "parts": [3.0]}
    slow = Cell("float32", 128, 64, 2, "plain", rounds)
    assert (slow.fastest, slow.ratio) == ("turned", 1.2)
    right = Cell("float32", 128, 64, 4, "turned", rounds)
    found = verdict([slow, right])
    assert found.startswith("ours is at most 10% slower than the fastest in 1 of 2 cells")
    assert "- float32, 128 × 64, 2 row(s): plain takes 1.20 times as long as turned" in found
    lines = table([slow, right]).splitlines()
    assert lines[0] == "| float32, 128 × 64, ms for rows | 2 | 4 |"
    assert lines[2:6] == [
        "| plain | 1.2e+03 * | 1.2e+03 |",
        "| turned | **1e+03** | **1e+03** * |",
        "| parts | 3e+03 | 3e+03 |",
        "| ours, to the fastest | 1.20 | 1.00 |",
    ]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--layers", "4096"], "--layers"),
        (["--layers", "0x4"], "--layers"),
        (["--dtypes", "int3"], "--dtypes"),
        (["--rows", "0"], "--rows"),
        (["--rows", "some"], "--rows"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_usage(capsys, wrong, named):
    """A wrong flag would be a traceback that does not name it."""
    with pytest.raises(SystemExit, match="2"):
        bench.main(["kernels", *wrong])
    assert named in capsys.readouterr().err
