"""tools/bench.py: tables of true measurements, and what it refuses. Toy sizes: what they measure
means nothing."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import bench
import bench_chart
import bench_checkpoint
import pytest
import torch
from bench_checkpoint import config_of, make_checkpoint
from bench_parts import (
    clock,
    compare,
    drafts,
    exact,
    growth,
    probe,
    profile,
    rows,
    serve,
    startup,
    threads,
    work,
    workers,
)
from bench_parts.compare import Asked, Measured
from bench_parts.gguf_files import pairs_side_by_side, vocabulary
from bench_parts.journal import Journal
from bench_parts.probe import Limits
from bench_parts.rows import Died, row_of
from bench_parts.tables import COLUMNS, cells_of, memory, ratios, table
from waiting import free_port, wait_until

from minillava.assistant import load
from minillava.checkpoint.stored import StoredWeights
from minillava.llava import Llava
from minillava.loop import Step
from minillava.prompt import render
from minillava.templates import LLAVA_V1
from minillava.tokenizer import Tokenizer

SETTINGS = {"size": "toy", "machine": "one"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What the machine can do is measured on less than it would take to be true, and once beside
    whoever is busy."""
    monkeypatch.setattr(probe, "LARGE", 1 << 20)
    monkeypatch.setattr(compare, "TRIES", 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def found(**other) -> dict:
    """What one process reports."""
    limits = Limits(10e9, {"float32": 1e12, "bfloat16": 4e12})
    times = {"process": 3.0, "open": 1.0, "vision": 0.5, "first": 1.5, "decode": 0.1}
    sizes = {"peak": 2e9, "weights": 1e9, "width": 2}
    taken = {"others": 0.01, "stolen": 0.0}
    return {**times, **sizes, **taken, "limits": vars(limits), **other}


def told(journal: Journal, *names: str) -> list[Measured]:
    return compare.measured([row_of(name) for name in names], journal)


ASKED = Asked("toy", Path("toy"), Path("toy"), "cpu", 4, 1)


def test_the_checkpoint_is_whole_and_makes_finite_numbers(checkpoints):
    """The bench would time NaN, whose speed is another, or write gigabytes anew at every run."""
    folder = checkpoints / "toy-bfloat16"
    make_checkpoint(folder, "toy", torch.bfloat16)
    written = (folder / "config.json").stat().st_mtime_ns
    make_checkpoint(folder, "toy", torch.bfloat16)  # is there already
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert sorted(path.name for path in checkpoints.iterdir()) == ["toy-bfloat16"]
    assistant = load(folder, dtype="float32", device="cpu")
    logits = assistant.model([[1, -200, 5, 6]], torch.randn(1, 3, 56, 56)).logits
    assert logits.isfinite().all()
    # a row of the head has norm 1 and the last norm's output sqrt(C) in all, so logits spread by 1;
    # their own spread over 3 x 32,064 numbers is within a tenth
    assert 0.9 < logits.std() < 1.1
    # CLIP's last block and norm, which transformers wants to see
    assert len(assistant.unused) == 18
    assert assistant.tokenizer.vocab_size == 32000
    assert assistant.tokenizer.decode(assistant.tokenizer.encode("a red star")) == "a red star"
    assert assistant.tokenizer.decode([31999]) == "<31999>"


def test_weights_and_cache_are_counted_as_they_are(checkpoints):
    """Wrong counts of bytes would make every fraction of the bandwidth in the table wrong."""
    folder = checkpoints / "toy-bfloat16"
    make_checkpoint(folder, "toy", torch.bfloat16)
    checkpoint = StoredWeights(folder)
    linear = [
        checkpoint.shape(n)
        for n in checkpoint.tensors
        if n.startswith("language_model.") and "embed" not in n
    ]
    assert work.weights_read(config_of("toy").text) == sum(
        shape[0] * shape[1] for shape in linear if len(shape) == 2
    )
    assert work.cache_size(config_of("7b"), 1) == 2 * 32 * 4096
    head = 64 * 32064
    layers = work.weights_read(config_of("toy").text) - head
    assert work.bytes_read(config_of("toy"), "q4_0", 2, 0) == (layers * 4.5 + head * 6.5625) / 8


def test_the_small_relative_is_as_it_is_on_the_hub(tmp_path, monkeypatch):
    """The page would show the speed of another network than llava-interleave-qwen-0.5b, or of one
    whose folder no program opens."""
    config = config_of("interleave-0.5b")
    with torch.device("meta"):
        model = Llava(config)
    count = sum(each.numel() for each in model.parameters())
    # as transformers counts its own, with the norm that LLaVA does not use
    assert count + 2 * config.vision.hidden_size == 864_031_264
    assert (config.tokens_per_image, config.image_token_id) == (729, 151646)
    assert config.eos_token_ids == (151645, 151643) and config.pad_token_id == 151643
    # a head that is the table of words is read as it is stored
    words = 2 * config.text.hidden_size * config.text.vocab_size
    assert work.bytes_read(config, "int4", 2, 0) == words + 24 * (1024 * 4096 + 3 * 1024 * 2816) * (
        4.5 / 8
    )
    vision = replace(config.vision, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=2, image_size=28)  # fmt: skip
    text = replace(config.text, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=704)  # fmt: skip
    small = replace(config, vision=vision, text=text, image_token_id=403,
                    pad_token_id=400)  # fmt: skip
    monkeypatch.setattr(bench_checkpoint, "config_of", lambda size: small)
    monkeypatch.setattr(bench_checkpoint, "BYTE_PIECES", 400)
    make_checkpoint(tmp_path / "made", "interleave-0.5b", torch.bfloat16)
    assistant = load(tmp_path / "made", dtype="float32", device="cpu")
    assert assistant.model.config == small
    assert assistant.tokenizer.decode(assistant.tokenizer.encode("a red star")) == "a red star"
    assert isinstance(assistant.ask(compare.PICTURE, "What is it?", max_new_tokens=2), str)


@pytest.mark.parametrize("size", ["toy", "shapes", "7b", "interleave-0.5b"])
def test_a_prompt_has_the_positions_it_is_said_to_have(size):
    """The table would name another length of prompt than was measured."""
    config = config_of(size)
    positions = work.positions(size, config)
    ids = work.prompt_ids(config, positions)
    assert len(ids) - 1 + config.tokens_per_image == positions
    expected = {"toy": 625, "shapes": 81 + 49, "7b": 625, "interleave-0.5b": 729 + 49}
    assert positions == expected[size]
    three = work.positions(size, config, 3)
    assert work.prompt_ids(config, three, 3).count(-200) == 3
    assert len(work.prompt_ids(config, three, 3)) - 3 + 3 * config.tokens_per_image == three
    assert max(ids) < config.text.vocab_size


@pytest.mark.slow
def test_compare_measures_processes_side_by_side(checkpoints, capsys, tmp_path):
    """One process per row and round, kept as it comes; the same command then has nothing to do."""
    journal = tmp_path / "found.jsonl"
    arguments = ["compare", "--size", "toy", "--folder", str(checkpoints), "--rounds", "1"]
    arguments += ["--rows", "float32,int4@1", "--tokens", "3", "--no-cold"]
    assert bench.main([*arguments, "--journal", str(journal)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(f"`python tools/bench.py {' '.join(arguments)} --journal {journal}`")
    # peak memory has a table of its own, by the same names
    first_table = lines[: lines.index("", 2)]
    shown = {row[0]: row[1:] for row in map(cells, first_table) if row[0].startswith("minillava")}
    names = ["minillava float32", "minillava int4, 1 thread"]
    assert [name.removesuffix(" !") for name in shown][:2] == names
    columns = cells(lines[2])[1:]
    first = dict(zip(columns, next(iter(shown.values())), strict=True))
    assert float(first["start to first token, s"]) > float(first["open, s"]) > 0
    assert float(first["tokens/s"]) > 0
    assert float(first["GB/s"]) > 0
    assert "round 1: int4@1: first token after" in err

    settings, *records = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
    assert (settings["size"], settings["tokens"]) == ("toy", 3)
    for record in records:
        measured = record["found"]
        assert len(measured["ids"]) == 4  # the first, and three more
        assert measured["import"] + measured["open"] < measured["process"]
        assert measured["vision"] < measured["first"]

    def nothing(*_):
        raise AssertionError("it was measured already")

    kept = journal.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run", nothing)
        assert bench.main([*arguments, "--journal", str(journal), "--json"]) == 0
    assert journal.read_bytes() == kept
    again = json.loads(capsys.readouterr().out)["rows"]
    assert [row["rounds"] for row in again] == [[record["found"]] for record in records]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parity
def test_transformers_answers_the_same(checkpoints, capsys):
    """The table would compare our speed with that of a peer that says something else."""
    pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
    arguments = ["compare", "--size", "toy", "--folder", str(checkpoints), "--rounds", "1"]
    arguments += ["--rows", "float32,transformers-float32", "--tokens", "5", "--json"]
    assert bench.main([*arguments, "--no-cold"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert ours["rounds"][0]["ids"] == theirs["rounds"][0]["ids"]


# --- a machine that drifts, neighbours, peers that die --------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine whose processes and neighbours a test makes up: -> lists of what the next ones
    report, and of what was done."""
    made, done = {"runs": [], "taken": [], "limits": []}, []

    def run(job, variables):
        done.append(("run", job["peer"], job["dtype"], variables["OMP_NUM_THREADS"]))
        next_one = made["runs"].pop(0)
        if isinstance(next_one, BaseException):
            raise next_one
        return next_one

    class Neighbours:
        def taken(self):
            return dict(zip(("others", "stolen"), made["taken"].pop(0), strict=True))

    def limits(device, threads):
        done.append(("probe", threads))
        return Limits(made["limits"].pop(0), {"float32": 1e12, "bfloat16": 1e12})

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare, "Neighbours", Neighbours)
    monkeypatch.setattr(compare, "limits", limits)
    monkeypatch.setattr(compare, "bandwidth", lambda *_: made.get("after", 0.0))
    monkeypatch.setattr(compare, "TRIES", 3)
    return made, done


def test_every_process_has_a_probe_of_its_own_right_before_it(machine):
    """One probe for a whole table made fractions of 140 %, since the host gives a guest another
    bandwidth every few minutes."""
    made, done = machine
    made |= {"runs": [found(), found()], "taken": [(0, 0)] * 2, "limits": [20e9, 40e9]}
    journal, names = Journal(None, SETTINGS), ["float32", "float32@1"]
    compare.compare([row_of(name) for name in names], ASKED, 1, False, journal, 100)
    count = torch.get_num_threads()
    assert done == [
        ("probe", count),
        ("run", "minillava", "float32", str(count)),
        ("probe", 1),
        ("run", "minillava", "float32", "1"),
    ]
    column = COLUMNS.index("of bandwidth")
    fast, slow = (int(cells_of(each, ASKED)[column][:-1]) for each in told(journal, *names))
    # half the bandwidth, twice the fraction; both are rounded to a percent
    assert abs(fast - 2 * slow) <= 1.5


def test_a_host_that_gives_more_meanwhile_makes_no_fraction_above_one(machine):
    """llama.cpp read at 114 % of what torch had read before it was started."""
    made, _ = machine
    made |= {"runs": [found()], "taken": [(0, 0)], "limits": [20e9], "after": 30e9}
    journal = Journal(None, SETTINGS)
    compare.compare([row_of("float32")], ASKED, 1, False, journal, 100)
    assert journal.records[0]["found"]["limits"]["bandwidth"] == 30e9


def test_a_row_beside_a_busy_neighbour_is_measured_again_and_marked(machine):
    """A row measured beside a busy neighbour would look slow, and nothing in the table would say
    why."""
    made, _ = machine
    made["runs"] = [found(decode=value) for value in (0.9, 0.1, 0.8, 0.3, 0.7)]
    # the first row is alone at the second try; the second never, once because of the host
    made["taken"] = [(0.5, 0.0), (0.02, 0.0), (0.9, 0.0), (0.2, 0.0), (0.0, 0.6)]
    made["limits"] = [10e9] * 5
    journal, names = Journal(None, SETTINGS), ["float32@1", "bfloat16@1"]
    compare.compare([row_of(name) for name in names], ASKED, 1, False, journal, 100)
    quiet, busy = told(journal, *names)
    by_name = {each.row.name: each for each in (quiet, busy)}
    first, second = (record["row"] for record in journal.records)
    assert [record["tries"] for record in journal.records] == [2, 3]
    assert (by_name[first].disturbed, by_name[second].disturbed) == (False, True)
    assert by_name[first].rounds[0]["decode"] == 0.1
    assert by_name[second].rounds[0]["decode"] == 0.3  # the least disturbed
    text = table([quiet, busy], ASKED)
    assert [row[0] for row in map(cells, text.splitlines()) if row[0].endswith(" !")] == [
        str(by_name[second].row) + " !"
    ]
    assert "!: in each of 3 tries" in text


def test_a_peer_that_dies_is_a_row_that_says_so(machine, capsys):
    """One llama.cpp that was killed took the whole table with it."""
    made, done = machine
    made["runs"] = [found(), Died("killed by SIGSEGV"), found()]
    made |= {"taken": [(0, 0)] * 3, "limits": [10e9] * 3}
    journal, names = Journal(None, SETTINGS), ["float32", "llama.cpp-q8_0"]
    compare.compare([row_of(name) for name in names], ASKED, 2, False, journal, 100)
    assert [kind for kind, *_ in done].count("run") == 3  # it is not asked again
    text = table(told(journal, *names), ASKED)
    assert "| llama.cpp q8_0 | died: killed by SIGSEGV | |" in text.replace("|  |", "| |")
    assert "llama.cpp-q8_0: killed by SIGSEGV" in capsys.readouterr().err
    assert len(told(journal, "float32")[0].rounds) == 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("raise ValueError('no such | thing')", "exit status 1: ValueError: no such | thing"),
        ("import sys; sys.exit(3)", "exit status 3: it said nothing"),
    ],
)
def test_how_a_process_died_is_one_line(code, said):
    """A row whose process was killed or failed would not say what became of it."""
    with pytest.raises(Died, match=said.replace("|", r"\|")):
        rows.finished([sys.executable, "-c", code], dict(os.environ))


def test_ctrl_c_shows_what_is_finished(machine, checkpoints, capsys, tmp_path):
    """And the journal has it, so that the same command goes on; a line cut short is made again."""
    made, _ = machine
    made |= {"runs": [found(), KeyboardInterrupt()], "taken": [(0, 0)] * 9, "limits": [10e9] * 9}
    journal = tmp_path / "found.jsonl"
    arguments = ["compare", "--size", "toy", "--folder", str(checkpoints), "--rounds", "2"]
    arguments += ["--rows", "float32", "--no-cold", "--journal", str(journal)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    assert "| minillava float32 | 3.00 | 1.00 |" in capsys.readouterr().out
    whole = journal.read_text(encoding="utf-8")
    journal.write_text(whole + '{"row": "float32", "rou', encoding="utf-8")
    made["runs"] = [found(process=5.0)]
    assert bench.main(arguments) == 0
    assert "| minillava float32 | 4.00 | 1.00 |" in capsys.readouterr().out
    assert journal.read_text(encoding="utf-8").startswith(whole)
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 3


def test_opening_from_a_disk_is_a_round_of_its_own(machine, monkeypatch):
    """Of every row but llama.cpp's, whose weights cannot be touched from here; the bandwidth of
    memory says nothing about it."""
    made, done = machine
    forgotten = []
    monkeypatch.setattr(compare, "forget", forgotten.append)
    made |= {"runs": [{"open": 2.0, "touch": 1.5}, found(), found()], "limits": [10e9] * 2}
    made["taken"] = [(0, 0)] * 3
    journal, names = Journal(None, SETTINGS), ["float32@1", "llama.cpp-bf16@1"]
    compare.compare([row_of(name) for name in names], ASKED, 1, True, journal, 100)
    assert [kind for kind, *_ in done] == ["run", "probe", "run", "probe", "run"]
    assert forgotten == [ASKED.folder]
    assert [each.cold for each in told(journal, *names)] == [3.5, None]


def test_nothing_is_begun_when_the_time_is_over(machine, capsys):
    """A bench would go on beyond the time that it was given."""
    _, done = machine
    journal = Journal(None, SETTINGS)
    compare.compare([row_of("float32")], ASKED, 1, False, journal, -1)
    assert done == journal.records == []
    assert "s are over" in capsys.readouterr().err


def test_one_of_ours_that_dies_is_an_error(machine, checkpoints, capsys):
    """A bench in which one of our own rows died would end as if all were well."""
    made, _ = machine
    made |= {"runs": [Died("killed by SIGKILL")], "limits": [10e9]}
    arguments = ["compare", "--size", "toy", "--folder", str(checkpoints), "--rows", "int8"]
    assert bench.main([*arguments, "--no-cold"]) == 1
    assert "died: killed by SIGKILL" in capsys.readouterr().out


def test_a_journal_of_other_settings_is_not_gone_on_with(tmp_path):
    """Rounds of other settings would be mixed into one table, or a file of somebody's be
    overwritten."""
    path = tmp_path / "found.jsonl"
    Journal(path, SETTINGS).add({"row": "float32", "round": 0, "tries": 1, "found": found()})
    assert len(Journal(path, SETTINGS).records) == 1
    with pytest.raises(ValueError, match="begun with another size: toy, now 7b; name another file"):
        Journal(path, SETTINGS | {"size": "7b"})
    before = path.read_text(encoding="utf-8")
    for text in ('{"a": 1}\n', "# A title\nand more\n", before.replace("\n", "\nx\n", 1)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="journal"):
            Journal(path, SETTINGS)
        assert path.read_text(encoding="utf-8") == text  # it may be somebody's


def test_ratios_are_of_two_rows_of_one_round():
    """On a machine that was twice as slow in the second round, medians of each row by itself gave
    a ratio that no round had."""
    journal = Journal(None, SETTINGS)
    values = {"bfloat16": (0.1, 0.2, 0.4), "transformers-bfloat16": (0.15, 0.3, 0.6)}
    values |= {"int8": (0.05, 0.1), "bfloat16@1": (0.3,)}
    for name, steps in values.items():
        for number, step in enumerate(steps):
            record = {"row": name, "round": number, "tries": 1, "found": found(decode=step)}
            journal.add(record)
    lines = [cells(line) for line in ratios(told(journal, *values)).splitlines()[2:]]
    assert [[line[0], line[-1]] for line in lines] == [
        ["minillava bfloat16 to transformers bfloat16", "1.50"],
        ["minillava int8 to minillava bfloat16", "2.00"],
    ]
    expected = 1.05 * 1e9 + work.cache_size(config_of("toy"), 625 + 4) * 2 + 0.3e9
    shown = cells(memory(told(journal, "int8"), ASKED).splitlines()[-1])
    assert shown == ["minillava int8", f"{2e9 / expected:.2f}"]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system does not say who is busy")
def test_a_neighbour_is_seen():
    """A child counts as one until it has ended and was waited for, unless it is said to be ours: a
    benchmark's own server was told to have disturbed it."""
    with threads.busy_loops(2) as loops:
        neighbours = clock.Neighbours()
        told = clock.Neighbours([loop.pid for loop in loops])
        # a core, or half of one beside others, as soon as they have begun
        wait_until(lambda: neighbours.taken()["others"] > 0.3)
        wait_until(lambda: neighbours.taken()["others"] - told.taken()["others"] > 0.05)


def test_threads_are_measured_beside_as_many_loops_as_asked(monkeypatch, capsys):
    """A machine that is quiet for minutes only has no time for all of the table, and a part of it
    could not be asked for."""
    beside, asked = [], []

    @contextmanager
    def loops(count):
        beside.append(count)
        yield []

    def answer(job, variables):
        asked.append(job["tokens"])
        return {"first": 0.5, "decode": 0.25}

    monkeypatch.setattr(threads, "busy_loops", loops)
    monkeypatch.setattr(threads, "run", answer)
    assert bench.main(["threads", "--sizes", "shapes", "--busy", "0,3", "--rounds", "1"]) == 0
    assert beside == [0, 3]
    assert asked == [17] * 2 * len(threads.POLICIES)
    lines = [cells(line) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [line[:3] for line in lines] == [
        ["shapes, first token", "0", "500.0"],
        ["shapes, each further token", "0", "250.0"],
        ["shapes, first token", "3", "500.0"],
        ["shapes, each further token", "3", "250.0"],
    ]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system does not say who is busy")
def test_a_process_of_ours_that_has_ended_hides_nobody():
    """All that anyone had used since the machine's start was taken for nothing, and the cores of
    others became a large negative number."""
    with threads.busy_loops(1) as loops:
        ours = [loop.pid for loop in loops]
    assert not Path(f"/proc/{ours[0]}").exists()
    assert clock.Neighbours(ours).before[0] > 0


def test_llama_cpp_is_given_pairs_side_by_side():
    """Of a head's four rows, the first turns with the third in the hub's order."""
    weight = torch.arange(8.0).reshape(8, 1)
    assert pairs_side_by_side(weight, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_cpp_is_given_a_vocabulary_that_spells_every_text(checkpoints):
    """Its rows had names of their own, none of them a byte's: llama.cpp ended at the first text."""
    folder = checkpoints / "toy"
    make_checkpoint(folder, "toy", torch.float32)
    for home, count in ((folder, 32064), (bench.PICTURE.parent, 640)):
        texts, scores, kinds = vocabulary(home, count)
        assert len(set(texts)) == len(scores) == len(kinds) == count  # a text twice is refused
        assert [text for text, kind in zip(texts, kinds, strict=True) if kind == "BYTE"] == [
            f"<0x{byte:02X}>" for byte in range(256)
        ]
        assert kinds[:3] == ["UNKNOWN", "CONTROL", "CONTROL"] and kinds[-2:] == ["UNUSED"] * 2
        assert "▁the" in texts and kinds[texts.index("▁the")] == "NORMAL"
        # which it merges first: the piece with the higher score
        assert scores[texts.index("▁the")] > scores[texts.index("▁right")]


@pytest.mark.parity
def test_llama_cpp_reads_the_files_that_we_write(tmp_path, capsys):
    """Language model, eye and picture. Its answers are not compared: it reads a picture's positions
    from another place than CLIP puts them."""
    if None in map(find_spec, rows.PACKAGES["llama.cpp"]):
        pytest.skip("needs pip install llama-cpp-python gguf")
    arguments = ["compare", "--size", "shapes", "--folder", str(tmp_path), "--no-cold", "--json"]
    arguments += ["--rows", "float32,llama.cpp-bf16", "--tokens", "3", "--rounds", "1"]
    assert bench.main(arguments) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["rows"]
    assert theirs["failed"] is None
    for row in (ours, theirs):
        assert row["rounds"][0]["vision"] > 0
        assert len(row["rounds"][0]["ids"]) == 4


def test_the_chart_has_the_rows_that_stand_beside_each_other():
    """A row that died has no speed to draw, and one thread is another race."""
    journal = Journal(None, SETTINGS)
    for name in ("bfloat16", "bfloat16@1"):
        # beside a busy neighbour, which is no part of the name
        record = {"row": name, "round": 0, "tries": 3, "found": found(others=0.4)}
        journal.add(record)
    journal.add({"row": "llama.cpp-q8_0", "round": 0, "failed": "killed by SIGSEGV"})
    rows = told(journal, "bfloat16", "bfloat16@1", "llama.cpp-q8_0")
    text = f"## One\n\nas said\n\n{table(rows, ASKED)}"
    assert bench_chart.speeds(text, "## One", "as said") == {"minillava bfloat16": "10.00"}


# --- the others -----------------------------------------------------------------------------------


def test_growth_measures_every_length_and_batch(monkeypatch, capsys):
    """A context, a batch or a dtype that was asked for would be missing from the table."""
    monkeypatch.setattr(growth, "CONTEXTS", (8, 16))
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
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
def test_drafts_times_passes_and_answers(monkeypatch, capsys):
    """The table of drafts would lack a row, or show a gain from guesses that are never right."""
    monkeypatch.setattr(drafts, "COUNTS", (1, 3))
    monkeypatch.setattr(drafts, "RATES", (0.0, 1.0))
    arguments = ["drafts", "--size", "toy", "--dtypes", "float32,int4", "--prompt", "5"]
    assert bench.main([*arguments, "--rounds", "1", "--tokens", "7"]) == 0
    shown = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert shown[0] == ["one pass, tokens", "1", "3", "others"]
    names = ["float32, ms", "float32, to one token", "int4, ms", "int4, to one token"]
    assert [row[0] for row in shown[1:5]] == names
    assert [row[1] for row in shown[2:5:2]] == ["1.00", "1.00"]
    assert [row[0] for row in shown[5:8]] == ["guesses", "float32", "int4"]
    medusa = ["bundled model", "float32", "int4"]
    assert [row[0] for row in shown[8:]] == medusa
    for row in shown[9:]:  # heads that are never right would make one token a pass
        assert all(float(cell.split("(")[1].rstrip(")")) > 1.5 for cell in row[3:6])
    for row in shown[6:8]:  # a guess that is never right saves no pass
        assert row[2].endswith("(1.0)")


def test_an_oracle_is_right_as_often_as_it_is_told():
    """The gain shown for a rate of right guesses would be that of another rate."""
    answer = [7] * 2000
    for rate in (0.0, 0.5, 1.0):
        oracle = drafts.Oracle(answer, rate, 640).begin([], None, [])
        oracle.accept([7, 7], None)
        guesses = oracle.propose(1998)
        right = sum(guess == 7 for guess in guesses)
        # four standard deviations of a coin that is thrown as often
        assert abs(right - rate * 1998) <= 4 * (rate * (1 - rate) * 1998) ** 0.5
        assert all(5 <= guess < 640 for guess in guesses)


def test_the_table_of_exactness_finds_what_differs(monkeypatch, capsys):
    """A cell that cannot say no: other tokens, or scores that are a rounding apart, would pass."""
    monkeypatch.setattr(exact, "LENGTH", 8)
    monkeypatch.setattr(exact, "QUESTIONS", exact.QUESTIONS[:1])
    monkeypatch.setattr(exact, "DRAFTERS", ("lookup", "oracle"))
    assert bench.main(["exact", "--dtypes", "float32,int8"]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    heads = [f"{drafter}, {way}" for drafter in ("lookup", "oracle") for way in exact.WAYS]
    assert rows[0] == ["weights", "claimed", *heads]
    assert [row[0] for row in rows[1:]] == ["float32", "int8"]
    for row in rows[1:]:
        assert all(told.startswith("same ") for told in row[2:])
        assert row[1] != "exact" or set(row[2:]) == {"same bits"}

    def step(token, score):
        return Step(
            None, [token], [], [None], None, None, torch.tensor([score, -torch.inf]), *2 * [None]
        )

    plain = [step(5, 1.0), step(6, 1.0), step(7, 1.0)]
    for other, told in (
        ([step(5, 1.0), step(6, 1.5), step(7, 1.0)], "same tokens, scores 5e-01"),
        ([step(5, 1.0), step(9, 1.0), step(7, 3.0)], "1 of 1 answers differ"),
        (plain, "same bits"),
    ):
        cell = exact.Cell("float32", "oracle", "greedy", answers=1)
        exact.hold(cell, plain, iter(other))
        assert cell.told() == told
    assert exact.Cell("float32", "medusa", "greedy").told() == "none here"


@pytest.mark.parity
def test_a_small_model_guesses_beside_transformers(capsys):
    """The two would be given other weights, or one of them no draft: the ids differ then, and the
    oracle of first layers is not right."""
    pytest.importorskip("transformers")
    arguments = ["assisted", "--size", "toy", "--dtype", "float32", "--prompt", "9"]
    assert bench.main([*arguments, "--rounds", "1", "--tokens", "11"]) == 0
    out = capsys.readouterr().out
    names = ["minillava", "minillava, draft", "transformers", "transformers, assisted"]
    assert [cells(line)[0] for line in out.splitlines()[4:8]] == names
    assert "All ids are the same." in out


def test_costs_between_two_counts_lie_on_a_line():
    """A count between two measured ones would get the cost of the wrong neighbour, or be an
    error."""
    costs = {n: clock.Timing([n / 10]) for n in drafts.COUNTS}
    assert [drafts.cost_of(costs, n) for n in (1, 5, 7, 16, 20)] == pytest.approx([1, 5, 7, 16, 16])


def test_startup_names_each_checkout_and_says_which_fails(monkeypatch, tmp_path, capsys):
    """What stands in the way is not torch's import: the last column leaves it out."""
    taken = {"-c": 1.0, "-m": 2.0}
    monkeypatch.setattr(startup, "one_process", lambda folder, arguments: taken[arguments[0]])
    (tmp_path / "minillava").mkdir()
    monkeypatch.setattr(startup, "named", lambda tree: tree.name)
    assert bench.main(["startup", "--beside", str(tmp_path), "--rounds", "1"]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[:2] for row in rows] == [
        ["`import torch` alone", "1.00"],
        [tmp_path.name, "2.00"],
        ["this checkout", "2.00"],
    ]
    assert [row[4] for row in rows] == ["", "1.00", "1.00"]
    with pytest.raises(SystemExit, match="2"):
        bench.main(["startup", "--beside", str(tmp_path / "minillava")])
    assert "not a checkout of minillava" in capsys.readouterr().err


@pytest.mark.parity
def test_growth_is_drawn(tmp_path):
    """--png would end in a traceback after all was measured, or write a file that is no picture."""
    pytest.importorskip("matplotlib", reason="needs pip install -e '.[bench]'")
    timings = {
        ("float32", kind, n): clock.Timing([n / 100, n / 90], [0.0])
        for kind in ("context", "batch")
        for n in (1, 2)
    }
    growth.growth_plot(timings, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_quality_is_the_distance_to_float64():
    """The table of errors would be of something else than the rounding of each stored form."""
    found = bench.quality(shapes=((128, 256),))
    for row in found:
        # A sum of 256 products is off by at most 256 units of rounding of the sum of their sizes,
        # which for normal numbers is 10 times the size of the sum.
        assert 0 < row["float32"] < 256 * 10 * 2**-24
        # Weight, input and result are each rounded by 2^-9 at most, independently of each other.
        assert row["float32"] < row["bfloat16"] < 3**0.5 * 2**-9
        # Half a step is the most that a weight is off by: of 255 steps for a row, of 15 for a group
        # of it, where a row of 256 spans at most ten standard deviations.
        assert row["bfloat16"] < row["int8"] < row["bfloat16"] + 10 / 255 / 2
        assert row["int8"] < row["int4"] < row["bfloat16"] + 10 / 15 / 2
    assert len(bench.quality_table(found).splitlines()) == 2 + len(found) == 4


def test_profile_asks_what_the_other_tables_ask(monkeypatch):
    """A picture of 729 patches alone is more than the 625 positions of a question, and nothing of
    the question was left."""
    config = config_of("interleave-0.5b")
    model = SimpleNamespace(config=config)
    monkeypatch.setattr(profile, "load", lambda *_, **__: SimpleNamespace(model=model))
    monkeypatch.setattr(profile, "answer", lambda model, ids, tokens: ids)
    ids = profile.profile("interleave-0.5b", Path(), "float32", 1)
    shown = len(ids) - 1 + config.tokens_per_image
    assert shown == work.positions("interleave-0.5b", config)


def test_profile_says_where_all_of_the_time_goes(capsys):
    """Shares would be of another total, or an operation would be left out with the small ones."""
    assert bench.main(["profile", "--size", "shapes", "--dtype", "float32", "--tokens", "2"]) == 0
    head, _, *lines, seconds = capsys.readouterr().out.splitlines()[2:]
    assert head == "| % of the time of a | picture | prompt | token |"
    assert lines[-1].startswith("| others, each below 1 |")
    assert {"mm", "addmm", "bmm"} & {line.split(" | ")[0].removeprefix("| ") for line in lines}
    for column in (2, 3, 4):
        shares = [int(line.split("|")[column]) for line in lines]
        assert abs(sum(shares) - 100) <= len(shares) / 2  # each is rounded
        assert float(seconds.split("|")[column]) > 0


def test_contrast_makes_a_table(capsys):
    """The table would lack one of the ways to contrast, and so what the others are compared
    with."""
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
        (
            ["contrast", "--rounds", "0"],
            "--rounds, --tokens, --questions, --asked and --pictures need at least 1",
        ),
        (
            ["contrast", "--tokens", "0"],
            "--rounds, --tokens, --questions, --asked and --pictures need at least 1",
        ),
        (
            ["compare", "--rows", "float32,gpt"],
            "--rows: unknown gpt, expected some of: float32, bfloat16, int8",
        ),
        (["--rounds", "1", "kernels"], "kernels has flags of its own and comes before them"),
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
        (["threads", "--busy", "0,some"], "--busy: 'some' is no number of loops"),
    ],
)
def test_wrong_usage(capsys, wrong, message):
    """A wrong flag would be noticed after minutes of measuring, or in a traceback."""
    with pytest.raises(SystemExit, match="2"):
        bench.main([*wrong, "--size", "toy"])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parity
def test_serve_asks_a_server_and_another_beside_it(capsys, monkeypatch):
    """A client that is refused, or answers that end early, would count as fast ones."""
    pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
    monkeypatch.setattr(serve, "SECONDS", 0.3)
    few = ["serve", "--size", "shapes", "--tokens", "3", "--rounds", "1"]
    with serve.started(bench.PICTURE.parent, "float32") as (other, _):
        assert bench.main([*few, "--url", f"other={other}"]) == 0
    *lines, _, added = capsys.readouterr().out.splitlines()[4:]
    who = [line.partition(":")[0] for line in lines]
    assert who.count("| other") == 4 and who.count("| without HTTP") == 2
    assert len(who) == who.count("| minillava") + 6 == 14
    assert "of 1 (" in added and "of 4 (" in added
    with pytest.raises(SystemExit, match="2"):
        bench.main([*few, "--url", "localhost:8080"])


@pytest.mark.slow
@pytest.mark.parity
def test_llama_cpp_serves_the_files_that_we_write(tmp_path, capsys, monkeypatch):
    """It ended at the first question, whose text its vocabulary could not spell."""
    server = shutil.which("llama-server")
    if server is None or find_spec("gguf") is None:
        pytest.skip("needs llama-server, of llama.cpp, and pip install gguf")
    shapes, port = bench.PICTURE.parent, free_port()
    rows.make_gguf(shapes, "bf16", tmp_path)
    command = [server, "-m", str(tmp_path / "bf16.gguf"), "--port", str(port), "-c", "4096"]
    command += ["-np", "4"]
    other, log = f"http://127.0.0.1:{port}", tmp_path / "log"

    def answered(path, body=None):
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            with urllib.request.urlopen(other + path, body) as answer:
                return json.load(answer)
        except OSError:  # it does not listen yet, or still loads
            return None

    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(lambda: answered("/health"))
        ours = Tokenizer(shapes / "tokenizer.model")
        for text in ("The star is at the top.", "Übung\n\n 7 🦙 <0x41> USER: "):
            asked = json.dumps({"content": text, "add_special": True}).encode()
            assert answered("/tokenize", asked) == {"tokens": ours.encode(text)}
        asked = json.dumps({"messages": [{"role": "user", "content": "What is a ring?"}]}).encode()
        prompt = str(render(LLAVA_V1, [("What is a ring?", None)]))
        assert answered("/apply-template", asked) == {"prompt": prompt}
        monkeypatch.setattr(serve, "SECONDS", 0.3)
        few = ["serve", "--size", "shapes", "--tokens", "3", "--rounds", "1"]
        assert bench.main([*few, "--url", f"llama.cpp={other}/v1"]) == 0
        assert capsys.readouterr().out.count("\n| llama.cpp: ") == 4
    finally:
        process.terminate()
        process.wait()


class Knocked(http.server.BaseHTTPRequestHandler):
    """Answers in two pieces, so that a client may find half of one; with `bad` it refuses."""

    protocol_version = "HTTP/1.1"
    bad = 0

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(503 if self.bad else 200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"he")
        self.wfile.flush()
        self.wfile.write(b"re")

    def log_message(self, *_):
        pass


@pytest.fixture
def door():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Knocked) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_each_answer_is_counted_once(door):
    """Half an answer would count as one, and the rest of it as the next."""
    url = f"http://127.0.0.1:{door.server_port}/health"
    found = json.loads(rows.finished([sys.executable, serve.KNOCK, url, "3", "0.1"], os.environ))
    assert found["answers"] == len(door.asked) >= 3 and set(door.asked) == {"/health"}
    assert 0 < found["half"] <= found["most"] <= found["seconds"]


def test_a_refusal_is_no_fast_answer(door, monkeypatch):
    """A server that answers that it has failed would have been the fastest of all."""
    monkeypatch.setattr(Knocked, "bad", 1)
    url = f"http://127.0.0.1:{door.server_port}/health"
    with pytest.raises(Died, match=r"expected an answer with 200, found: HTTP/1\.1 503"):
        rows.finished([sys.executable, serve.KNOCK, url, "1", "0.1"], dict(os.environ))


def test_streams_run_until_the_last_knock():
    """A stream that ends before would leave the server to the knocks alone; one that is not hung
    up on would be waited for."""
    over, ended, asked, made = threading.Event(), [], [], []

    def ask():
        asked.append(1)
        try:
            yield from (1.0, 2.0)
        finally:
            ended.append(1)

    stream = serve.again(ask, over, made)
    assert [next(stream) for _ in range(5)] == made == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert len(asked) == 3
    over.set()
    assert list(stream) == [] and len(ended) == len(asked) == 3


def test_what_http_adds_is_of_the_same_round():
    """Of a machine that was slow in one round, medians of different rounds would be compared."""
    found = {
        serve.per_token("minillava", 1): clock.Timing([2.0, 9.0, 3.0], [0.0] * 3),
        serve.per_token("without HTTP", 1): clock.Timing([1.5, 8.0, 2.75], [0.0] * 3),
    }
    assert serve.added_by_http(found, 1) == [0.5, 1.0, 0.25]
    assert serve.added_by_http(found, 4) == []
    last = serve.serve_table(found).splitlines()[-1]
    assert last == "HTTP adds, by streams: 500.00 ms to a token of 1 (250.00 to 1000.00 by round)."


@pytest.mark.slow
def test_processes_are_timed_and_weighed(capsys):
    """A variant would be of another model, keep all weights instead of its part, or be torch's way
    under the name of ours."""
    arguments = ["parallel", "--size", "0.13b", "--dtype", "float32", "--prompt", "20", "--json"]
    assert bench.main([*arguments, "--rounds", "1", "--tokens", "2"]) == 0
    found = {(row["way"], row["attention"]): row for row in json.loads(capsys.readouterr().out)}
    assert len(found) == 5
    assert len({tuple(row["ids"]) for row in found.values()}) == 1
    (whole,), parts = found["whole", "fused"]["weights"], found["sums", "fused"]["weights"]
    text = config_of("0.13b").text
    shared = work.weights_read(text) * 4  # bytes: all but the table of words
    assert parts[1] == pytest.approx(shared / 2, rel=0.01)
    assert parts[0] == pytest.approx(whole - shared / 2, rel=0.01)
    # What one process takes beside its weights each of two may take; of the weights, no more than
    # its part and, for a moment, one of them whole.
    (peak,) = found["whole", "fused"]["peak"]
    for part, most in zip(parts, found["sums", "fused"]["peak"], strict=True):
        assert most - part < peak - whole + 0.1 * part


@pytest.mark.slow
def test_both_ways_of_batch_answer_every_question(capsys):
    """A way that leaves questions out, or asks others, would count as the faster one."""
    few = ["batch", "--size", "shapes", "--asked", "19", "--tokens", "8", "--rounds", "1"]
    assert bench.main([*few, "--dtype", "float32", "--json"]) == 0
    engine, padded = json.loads(capsys.readouterr().out)
    assert engine["name"] != padded["name"] and engine["answers"] == padded["answers"]
    assert sorted(map(int, engine["answers"])) == [*range(19)]
    assert all(isinstance(each, str) and each for each in engine["answers"].values())
    assert bench.main([*few, "--dtype", "float32"]) == 0
    assert "19 of 19 answers are the same" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parity
def test_workers_are_timed_beside_one_process(capsys):
    """The table would have another order than its lines, or count the start as questions."""
    pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")
    arguments = ["workers", "--size", "shapes", "--asked", "20", "--tokens", "4", "--rounds", "1"]
    assert bench.main(arguments) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == list(workers.WAYS)
    assert all(float(row[1]) > 0 for row in rows)
