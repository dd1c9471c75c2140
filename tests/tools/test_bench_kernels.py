"""tools/bench_kernels.py: every way is timed, and what is taken is judged by it. Toy sizes: what they
measure means nothing."""

import json
from dataclasses import asdict

import bench
import bench_kernels
import pytest
from bench_kernels import HEADS, LAYERS, Cell, table, verdict, ways_of

from minillava.fast import processor, same_bits
from minillava.fast.linear import OF_ONE_ROW, PRODUCTS
from minillava.fast.packed import packs
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
    assert set(ways_of("bfloat16", 1)) == set(PRODUCTS) - {"onednn"}
    assert set(ways_of("bfloat16", 2)) == set(PRODUCTS) - {"onednn"} - OF_ONE_ROW
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
    assert of == [(s, r) for s in bench_kernels.STORED for r in (1, 3)]
    assert of[-2:] == [("packed", 1), ("packed", 3)] or not packs()
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


def test_several_runs_count_once_each(tmp_path, capsys):
    """A cell that looked slow in one run of three, and was measured again there alone, was judged
    by that run."""
    here = processor.kind()
    taken, other = processor.way("float32", 3, (128, 64)), "halves"
    good = Cell("float32", 128, 64, 3, taken, {taken: [1.0], other: [1.05]})
    bad = Cell("float32", 128, 64, 3, taken, {taken: [1.5], other: [1.0]}, 0.2)
    bad.again = [{taken: 1.4, other: 1.0}] * 3
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, cell in zip(paths, (good, bad, good), strict=True):
        path.write_text(json.dumps({"kind": here, "head": path.stem, "cells": [asdict(cell)]}))
    _, head, (cell,) = bench_kernels.read(paths)
    assert head == "0; 1; 2"
    assert (cell.slower(other), cell.others) == (pytest.approx(1 / 1.05), 0.2)
    assert verdict([cell], here).startswith("ours is at most 10% slower than the fastest in 1 of 1")
    _, _, (cell,) = bench_kernels.read([paths[1], *paths[:2]])  # slow in two of three
    assert cell.slower(other) == pytest.approx(1.4)
    assert "slower: 1" in verdict([cell], here)
    assert bench.main(["kernels", "--json", "--read", *map(str, paths)]) == 0
    paths[0].write_text(capsys.readouterr().out)  # is read again as the three runs that it is of
    _, _, (cell,) = bench_kernels.read(paths[:1])
    assert cell.slower(other) == pytest.approx(1 / 1.05)


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
    found = verdict([slow, right], "avx2")
    assert found.startswith(
        "ours is at most 10% slower than the fastest in 1 of 2 cells; kept for the same bits: 0; slower: 1"
    )
    assert (
        "- slower: float32, 128 × 64, 2 row(s): plain takes 1.20 times as long as turned" in found
    )
    lines = table([right, slow]).splitlines()
    assert lines[0] == "| float32, 128 × 64, ms for rows | 2 | 4 |"
    assert lines[2:6] == [
        "| plain | 1.2e+03 * | 1.2e+03 |",
        "| turned | **1e+03** | **1e+03** * |",
        "| parts | 3e+03 | 3e+03 |",
        "| ours, to the fastest | 1.20 | 1.00 |",
    ]


class Machine:
    """Stands in for a processor and its clock: a call of a way takes the seconds that `cost` says,
    given how many calls there were. `made`: what a way adds to the first number of each row, given
    the number of rows. `busy`: what others take while a cell is measured, cell after cell."""

    def __init__(self, monkeypatch, cost, made=lambda way, rows: 0.0):
        self.now, self.calls, self.cost, self.made, self.busy = 0.0, 0, cost, made, []
        monkeypatch.setattr(bench_kernels, "time", self)
        monkeypatch.setattr(bench_kernels, "by", self.by)
        monkeypatch.setattr(bench_kernels, "Neighbours", lambda: self)

    def taken(self) -> dict[str, float]:
        return {"others": self.busy.pop(0) if self.busy else 0.0}

    def perf_counter(self) -> float:
        return self.now

    def by(self, way, weight, x):
        self.now += self.cost(way, self.calls)
        self.calls += 1
        return x[:, :1] + self.made(way, len(x))

    def cell(self, stored="float32", rows=2, rounds=3) -> Cell:
        (cell,) = bench_kernels.measure(stored, 128, 64, [rows], rounds)
        return cell


def test_what_looked_slow_on_a_drifting_machine_is_measured_side_by_side(monkeypatch):
    """A ratio of moments in which the host gave unequal shares would count as a miss."""
    monkeypatch.setattr(processor, "way", lambda *_, **__: "plain")
    rounds, ways = 3, ways_of("float32", 2)
    first = (2 + rounds) * len(ways)

    def drifts(way, calls):
        """While all take turns, whoever comes first is slowed; later everybody alike, ever more."""
        return 1.3 if way == "plain" and calls < first else 1.0 + max(0, calls - first) / 20

    cell = Machine(monkeypatch, drifts).cell()
    assert cell.looked == pytest.approx(1.3)
    assert set(cell.again[0]) == set(ways)  # all the others looked faster
    assert len(cell.again) == bench_kernels.AGAIN[0]  # the seconds were over
    assert cell.ratio == pytest.approx(1.0)
    found = verdict([cell], "avx2")
    assert found.startswith("ours is at most 10% slower than the fastest in 1 of 1 cells")
    assert found.endswith("slower: 0 (1 cells looked slower and were measured again side by side)")
    assert "| ours, to the fastest | 1.00 (1.30) |" in table([cell])


def test_what_is_slow_side_by_side_as_well_is_a_miss(monkeypatch):
    """Measuring again would excuse whatever is slow."""
    monkeypatch.setattr(processor, "way", lambda *_, **__: "plain")
    machine = Machine(monkeypatch, lambda way, _: {"plain": 0.012, "turned": 0.01}.get(way, 0.0119))
    cell = machine.cell()
    assert len(cell.again) == bench_kernels.AGAIN[1]  # so many take less than the seconds
    # nobody else looked faster by so much that it would be asked again
    assert all(set(found) == {"plain", "turned"} for found in cell.again)
    cell.others = 0.0
    found = verdict([cell], "avx2")
    assert "kept for the same bits: 0; slower: 1 (1 cells looked slower" in found
    assert found.splitlines()[1:] == [
        "- slower: float32, 128 × 64, 2 row(s): plain takes 1.20 times as long as turned "
        "(1.20 to 1.20 in 15 rounds)"
    ]
    cell.others = 0.5  # then it says little
    assert "15 rounds), while others kept 0.50 cores busy" in verdict([cell], "avx2")


def test_what_is_nearly_as_fast_is_not_measured_again(monkeypatch):
    """The bench would take twice its time."""
    monkeypatch.setattr(processor, "way", lambda *_, **__: "plain")
    cell = Machine(monkeypatch, lambda way, _: 0.0104 if way == "plain" else 0.01).cell()
    assert (cell.again, cell.changes) == ([], [])
    assert verdict([cell], "avx2").startswith("ours is at most 10% slower than the fastest in 1 of")


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_way_is_kept_for_the_same_bits_only_where_they_would_change(monkeypatch, rows):
    """A choice that keeps a promise would count as a miss; or any miss could be called such a
    choice."""
    monkeypatch.setattr(processor, "way", lambda *_, **__: "plain")
    monkeypatch.setattr(processor, "SAME_ROWS", {"avx2": {"bfloat16": 2}})
    cost = lambda way, _: {"turned": 0.005, "parts": 0.008}.get(way, 0.01)  # noqa: E731
    other = lambda way, _: 1.0 if way in ("turned", "parts") else 0.0  # noqa: E731
    cell = Machine(monkeypatch, cost, other).cell("bfloat16", rows)
    assert sorted(cell.changes) == ["parts", "turned"]
    assert cell.kept("avx2") == (rows <= 2)  # of more nothing is promised
    assert not cell.kept("avx512")
    promised = verdict([cell], "avx2")
    if rows <= 2:
        assert "kept for the same bits: 1; slower: 0" in promised
        assert promised.count("SAME_ROWS") == 1  # the reason once, however many cells
        assert f"- kept: bfloat16, 128 × 64, {rows} row(s): plain takes 2.00" in promised
    else:
        assert "kept for the same bits: 0; slower: 1" in promised
    # one of the two faster ways would keep the bits: then it should be taken
    some = lambda way, _: 1.0 if way == "turned" else 0.0  # noqa: E731
    cell = Machine(monkeypatch, cost, some).cell("bfloat16", rows)
    assert (cell.changes, cell.kept("avx2")) == (["turned"], False)
    # bits that hang on how many share the pass
    by_rows = lambda way, rows: rows if way == "turned" else 0.0  # noqa: E731
    cell = Machine(monkeypatch, cost, by_rows).cell("bfloat16", rows)
    assert "turned" in cell.changes


def test_bits_of_the_way_before_excuse_nothing(tmp_path, monkeypatch):
    """After the table has changed, a miss would be excused by what was found about another way."""
    cell = Cell("bfloat16", 128, 64, 1, "mv", {"mv": [1.2], "plain": [1.0], "twice": [1.2]})
    cell.again, cell.changes = [{"mv": 1.2, "plain": 1.0}] * 2, ["plain"]
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"kind": "amx", "head": "", "cells": [vars(cell)]}))
    monkeypatch.setitem(processor.WAYS["amx"], "bfloat16", ((99, "mv"),))
    _, _, (same,) = bench_kernels.read([path])
    assert same.kept("amx") and same.ratio == pytest.approx(1.2)
    monkeypatch.setitem(processor.WAYS["amx"], "bfloat16", ((99, "twice"),))
    _, _, (other,) = bench_kernels.read([path])
    assert (other.taken, other.kept("amx")) == ("twice", False)
    assert other.ratio == pytest.approx(1.2)  # not measured side by side: by the medians


def test_a_run_goes_on_from_its_journal(tmp_path, monkeypatch, capsys):
    """Whatever ends a run of a quarter of an hour, all that it found would be lost."""
    path = tmp_path / "found.jsonl"
    machine = Machine(monkeypatch, lambda *_: 0.01)
    asked = [*TOY, "--dtypes", "float32", "--rows", "2,4,8", "--journal", str(path), "--json"]
    # two calls of each way to warm up and two rounds, and the time ends within the second cell
    seconds = 1.5 * 4 * 0.01 * len(ways_of("float32", 2))
    assert bench.main([*asked, "--seconds", str(seconds)]) == 0
    rows = [cell["rows"] for cell in json.loads(capsys.readouterr().out)["cells"]]
    assert rows == [2, 4]
    assert bench.main(asked) == 0
    found = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["rows"] for cell in found] == [2, 4, 8]
    calls = machine.calls
    assert bench.main(asked) == 0
    assert (json.loads(capsys.readouterr().out)["cells"], machine.calls) == (found, calls)
    assert bench.main([*asked, "--seconds", "0", "--dtypes", "int8"]) == 0
    assert "no time left" in capsys.readouterr().err
    path.write_text("{}\n")
    with pytest.raises(SystemExit, match="2"):
        bench.main(asked)
    assert "not a journal of bench.py" in capsys.readouterr().err


def test_what_was_measured_beside_a_busy_neighbour_is_measured_again(tmp_path, monkeypatch, capsys):
    """Half of the cells would be of a machine of which others had the other half."""
    machine = Machine(monkeypatch, lambda *_: 0.01)
    asked = [*TOY, "--dtypes", "float32", "--rows", "2,4,8", "--json"]
    asked += ["--journal", str(tmp_path / "found.jsonl")]
    machine.busy = [0.5, 0.0, 0.9, 0.05, 0.4, 0.6]
    assert bench.main(asked) == 0
    others = [cell["others"] for cell in json.loads(capsys.readouterr().out)["cells"]]
    assert others == [0.05, 0.0, 0.4]  # the last one after as many tries as there are
    calls = machine.calls
    assert bench.main(asked) == 0
    assert machine.calls == calls


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
