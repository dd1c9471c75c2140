"""tools/gpu_check.py: what it checks on a GPU, as far as a CPU can run it; and that its checks can
fail."""

import json
import time
import warnings

import gpu_check
import gpu_parts.doors as doors
import gpu_parts.family as family
import pytest
import torch
from gpu_parts.common import FAILED, MEASURED, OK, SKIPPED, Report, Run

from minillava import loop
from minillava.sampling import Sampler

pytestmark = pytest.mark.slow


@pytest.fixture
def few(monkeypatch):
    """Less of everything."""
    monkeypatch.setattr(gpu_check, "PRECISIONS", ("float32",))
    monkeypatch.setitem(gpu_check.ANSWERS, "tiny", 7)
    monkeypatch.setattr(gpu_check, "SYNC_TOKENS", 4)
    monkeypatch.setattr(gpu_check, "LONGEST", 6)


def rows_of(work, device: str = "cpu") -> list:
    report = Report({}, None)
    work(Run(device, "tiny", report))
    return report.rows


def verdicts(rows: list) -> dict[str, str]:
    return {f"{row.check} {row.dtype}".strip(): row.verdict for row in rows}


def test_the_command_makes_a_table_and_a_file(few, capsys, tmp_path):
    """A section would be missing from the table or the file after a run that a GPU was lent for."""
    names = "parity,syncs,growth,growth-captured,plain,captured,int4,transformers-compiled"
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--size", "tiny", "--only", names, "--json", str(path)]
    assert gpu_check.main(arguments) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]
    assert found["about"]["torch"] == torch.__version__
    assert list(dict.fromkeys(row["section"] for row in found["rows"])) == names.split(",")
    assert {row["verdict"] for row in found["rows"]} == {OK, MEASURED, SKIPPED}
    out, err = capsys.readouterr()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert table[0] == "| check | dtype | found | expected | verdict |"
    assert len(table) == 2 + len(found["rows"])
    assert err.count("\n") >= len(found["rows"])


def test_every_door_is_as_on_the_cpu(monkeypatch):
    """A door would be missing, or fail by how it is started and not by what a GPU does."""
    monkeypatch.setattr(doors, "UPDATES", 4)
    rows = rows_of(gpu_check.doors)
    assert {row.verdict for row in rows} <= {OK, SKIPPED}, [r for r in rows if r.verdict == FAILED]
    assert {row.check for row in rows if row.verdict == SKIPPED} <= {"serve"}
    assert {row.check.split(",")[0].split(" ")[0] for row in rows} == {
        *("generate", "chat", "batch", "look", "probe", "trace", "inspect", "serve", "finetune"),
        "torchrun",
    }


def test_a_door_that_says_something_else_is_found(monkeypatch):
    """A row that cannot fail. Another answer, another number, another tensor, an error, a loss that
    stays: each ends its own row alone."""
    real = doors.enter

    def enter(name, flags):
        if name == "chat":
            raise RuntimeError("Expected all tensors to be on the same device")
        if name == "batch":
            return 1
        if name in ("generate", "look", "trace") and flags[flags.index("--device") + 1] == "cpu:0":
            flags = [*flags, "--system", "Be brief."]
        return real(name, flags)

    monkeypatch.setattr(doors, "enter", enter)
    monkeypatch.setattr(doors, "served", lambda device: "answered")
    monkeypatch.setattr(doors, "torchrun", lambda device, *what: "answered")
    monkeypatch.setattr(doors, "finetuned", lambda device, *what: "learnt")
    rows = {row.check: row for row in rows_of(gpu_check.doors, "cpu:0")}
    failed = {name for name, row in rows.items() if row.verdict == FAILED}
    assert {"chat", "batch", "look"} <= failed
    assert "inspect --doctor" not in failed and "probe" not in failed
    assert rows["chat"].found == "RuntimeError: Expected all tensors to be on the same device"
    assert rows["batch"].found.startswith("batch ended with 1")


@pytest.mark.parity
def test_the_family_is_compared(monkeypatch):
    """A kind would be missing; and where bits differ, as they may on a GPU, a network that computes
    otherwise would pass beside one that only adds up in another order."""
    pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
    monkeypatch.setattr(family, "PRECISIONS", ("float32",))
    monkeypatch.setattr(family, "KINDS", {"LLaVA-1.5": "plain"})
    monkeypatch.setattr(family, "TILED", {"LLaVA-1.6, Mistral": "mistral"})
    monkeypatch.setattr(family, "CAPTURED", ())
    assert {row.verdict for row in rows_of(gpu_check.family)} == {OK}
    real = family.tensors_of
    for change, verdict in ((1e-7, OK), (1e-3, FAILED)):
        monkeypatch.setattr(family, "tensors_of", changed(real, change))
        rows = verdicts(rows_of(gpu_check.family, "cpu:0"))
        assert rows["LLaVA-1.5: eager beside transformers' float32"] == verdict
        assert rows["LLaVA-1.6, Mistral: eager beside transformers' float32"] == OK
    monkeypatch.setattr(family.tiled, "draw", None)
    rows = rows_of(gpu_check.family)
    assert (len(rows), rows[-1].found) == (
        4,
        "failed: TypeError: 'NoneType' object is not callable",
    )


def changed(real, by: float):
    """`tensors_of`, but for a network in float64, with other logits."""

    def tensors_of(model, ids, pixels):
        found = real(model, ids, pixels)
        if found["logits"].dtype != torch.float64:
            found["logits"] = found["logits"] + by
        return found

    return tensors_of


def test_every_way_to_answer_agrees(few, monkeypatch):
    """A way to answer would not be among those that are compared, so that its faults stay
    hidden."""
    rows = verdicts(rows_of(gpu_check.answers))
    assert set(rows.values()) == {OK}
    for way in (
        "as a batch",
        "vcd, as a batch",
        "a conversation's kept cache",
        "sampled, running ahead",
        "int8",
    ):
        assert {f"{way} float32", f"{way} bfloat16"} <= set(rows)
    assert {"captured float32", "captured bfloat16", "captured, int4 bfloat16"} <= set(rows)


def test_another_answer_is_found(monkeypatch):
    """One way that says something else fails, and names both answers; the others stay as they
    are."""

    def ask(self, image, question, **options):
        return "A ship." if isinstance(question, str) else ["A boat."] * len(question)

    monkeypatch.setattr(gpu_check.Assistant, "ask", ask)
    monkeypatch.setattr(
        gpu_check.Conversation, "ask", lambda self, question, **options: str(self.cache)
    )
    monkeypatch.setattr(gpu_check.Assistant, "score", lambda *arguments: [-1.0, 0.0, -2.0])
    rows = rows_of(gpu_check.answers)
    failed = {row.check for row in rows if row.verdict == FAILED}
    assert {"as a batch", "beams, as a batch", "vcd, as a batch", "captured, as a batch"} <= failed
    assert not {"one by one", "captured", "int8", "a conversation's kept cache"} & failed
    batch = next(row for row in rows if row.check == "as a batch")
    assert batch.found == "0 of 3 the same; 'A boat.' instead of 'A ship.'"


@pytest.mark.parity
def test_a_network_that_computes_otherwise_is_found(few, monkeypatch):
    """The parity check would pass a network with a wrong constant."""
    pytest.importorskip("transformers", reason="needs pip install -e '.[parity]'")
    real = gpu_check.network

    def off(config, state, attention="fused", quantize=None):
        model = real(config, state, attention, quantize)
        if next(iter(state.values())).dtype == torch.float32:
            model.language_model.norm.eps = 0.1
        return model

    monkeypatch.setattr(gpu_check, "network", off)
    rows = verdicts(rows_of(gpu_check.parity))
    for name in ("bundled model", "two wide layers"):
        assert rows[f"{name}, eager: logits to float64 (max) float32"] == FAILED
        assert rows[f"{name}, fused: logits to float64 (max) float32"] == FAILED
        assert rows[f"{name}, eager: against transformers' float32"] == FAILED


def test_without_transformers_parity_is_that_to_float64(few, monkeypatch):
    """Where transformers is absent, the whole section would fail instead of what needs it being
    skipped."""
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    rows = rows_of(gpu_check.parity)
    assert {row.verdict for row in rows} == {MEASURED, SKIPPED}
    assert all(float(row.found) < 1e-4 for row in rows if row.verdict == MEASURED)


def test_a_loop_that_waits_is_found(few, monkeypatch):
    """A loop that waits for the GPU at every token would pass the check that is there to find
    it."""
    real = Sampler.remember

    def remember(self, token_ids, rows=None):
        if int(token_ids[0]) >= 0:
            real(self, token_ids, rows)

    monkeypatch.setattr(Sampler, "remember", remember)
    rows = verdicts(rows_of(gpu_check.syncs))
    assert rows["a number that is read three times"] == OK
    assert {verdict for name, verdict in rows.items() if "waits in" in name} == {FAILED}


def test_memory_that_an_answer_keeps_is_found(few, monkeypatch):
    """An answer that keeps its cache would pass the check that is there to find it."""
    kept, real = [], loop.KVCache

    def cache(*arguments, **options):
        kept.append(real(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(loop, "KVCache", cache)
    (row,) = rows_of(gpu_check.growth)
    assert (row.verdict, row.check) == (FAILED, "bytes more after 7 answers")
    assert int(row.found) > 7 * 81 * 8
    (row,) = rows_of(gpu_check.growth_captured)  # which have a cache of their own
    assert (row.verdict, row.check) == (OK, "bytes more after 3 captured answers")


def test_a_graph_that_is_recorded_again_is_found(few, monkeypatch):
    """Bytes do not show it: a graph is no tensor."""
    as_a_gpu(monkeypatch)
    recorded = torch._dynamo.utils.counters["inductor"]
    real, answered, again = gpu_check.check_growth, [], []

    def work(number):
        answered.append(number)
        recorded["cudagraph_recorded_non_static_inputs"] += 3 if len(answered) in again else 0

    def check(run, what, one, count):
        return real(run, what, work, count)

    monkeypatch.setattr(gpu_check, "check_growth", check)
    for which, verdict, found in (({1, 2}, OK, "0; 6 in"), ({1, 5}, FAILED, "3; 3 in")):
        again[:] = which
        answered.clear()
        row = rows_of(gpu_check.growth_captured, "cpu:0")[-1]
        assert (row.verdict, row.found) == (verdict, f"{found} those before")


def test_the_first_token_is_taken_apart(few):
    """A part of the time to the first token would be missing, or seem to begin after it has
    ended."""
    rows = rows_of(gpu_check.first)
    parts = [row.check.removesuffix(": ms") for row in rows if row.check.startswith("minillava")]
    expected = ("encode_images", "splice", "prefill", "the first choice")
    assert parts[1:5] == [f"minillava: {part}" for part in expected]
    for row in rows:
        if row.verdict == MEASURED:
            times, count = row.found.split("; ")
            whole, given = map(float, times.split(", begun after "))
            assert 0 < given <= whole
            assert int(count.split()[0]) > 0


def test_a_section_that_fails_is_a_row_and_the_next_one_runs(monkeypatch, capsys, tmp_path):
    """One section that fails or hangs would take all that was measured with it."""

    def broken(run):
        run.report.measure("before", "", 1)
        raise RuntimeError("device-side\nassert")

    def slow(run):
        time.sleep(30)

    def killed(run):
        assert (
            json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["rows"][0]["check"]
            == "before"
        )
        run.report.check("kept", "", 1, 1, True)

    sections = {"a": (broken, 60), "b": (slow, 0.2), "c": (killed, 60)}
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    arguments = ["--device", "cpu", "--only", "a,b,c", "--json", str(tmp_path / "x.json")]
    assert gpu_check.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "| a: no error |  | failed: RuntimeError: device-side assert | none | FAILED |" in out
    assert "| b: the rest of it |  | its 0 s were over |  | skipped |" in out
    assert "| c: kept |  | 1 | 1 | ok |" in out
    assert err.count("Traceback") == 1  # of the one that failed; time that is over is one line
    assert "Traceback" not in out
    # nothing is begun, and so nothing failed
    assert gpu_check.main([*arguments, "--seconds", "1"]) == 0
    assert capsys.readouterr().out.count("| skipped |") == 3


def test_what_only_a_gpu_runs_is_run_here_with_a_cpu_in_its_place(few, monkeypatch):
    """So that nothing is misspelt where a mistake costs a machine: the device is a CPU by another
    name."""
    as_a_gpu(monkeypatch)
    sections = ("syncs", "growth", "growth-captured", "first", "int8-captured")
    rows = {name: rows_of(gpu_check.SECTIONS[name][0], "cpu:0") for name in sections}
    waits = [
        row.found for row in rows["syncs"] if "waits in" in row.check or "three times" in row.check
    ]
    assert waits == ["1"] * len(waits)  # as often as it was said
    assert {row.verdict for row in rows["growth"] + rows["growth-captured"]} == {OK, MEASURED}
    found = [row.found for row in rows["first"] if row.verdict == MEASURED]
    assert {each.split()[-1] for each in found} == {"kernels"}
    (speed,) = (row.found for row in rows["int8-captured"] if "tokens per second" in row.check)
    assert float(speed.split(",")[0]) > 0
    gpu_check.let_go("cpu:0")


def as_a_gpu(monkeypatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 10**9)

    def set_sync_debug_mode(mode):
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(gpu_check.COPIED, "cuda", 1 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**10))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ["--only", "parity,speed"],
            "--only: unknown speed, expected some of: family, doors, parity, answers",
        ),
        (
            ["--device", "cuda"],
            "there is no GPU that this PyTorch can use; --device cpu runs what a CPU can",
        ),
        (
            ["--device", "cpu", "--json", "/no/such/folder/x.json"],
            "--json: /no/such/folder: no such folder",
        ),
    ],
)
def test_wrong_usage(capsys, monkeypatch, wrong, message):
    """A wrong flag would be noticed only after the sections have run, or in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(wrong)
    assert message in capsys.readouterr().err
