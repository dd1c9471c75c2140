"""One model in several processes: each has its part of the weights, and together they give the
answers of one process."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import bench_checkpoint
import hf
import kinds
import pytest
import tiled
import torch
from commands import environment
from models import stored
from paths import REFERENCE
from safetensors.torch import save_file
from two import (
    PICTURE,
    QUESTIONS,
    SHAPES,
    each_in_two,
    everything,
    in_two,
    interrupted,
    left,
    logits_of,
    of_a_relative,
    watched,
    without_the_other,
)
from waiting import PATIENCE, wait_until

import minillava
from minillava.attention import fused
from minillava.checkpoint.adapter import Delta
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import open_checkpoint
from minillava.cli import opening
from minillava.cli.parts import follow
from minillava.config import TextConfig
from minillava.convert.run import convert
from minillava.fast import attention, linear, parallel
from minillava.fast.parallel import HEAD, Share
from minillava.fast.quantize import pack_here, quantised_layer, quantize_tensor
from minillava.options import KINDS

QUERIES, OUT = (f"language_model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
TWO = [Share(0, 2), Share(1, 2)]


# --- parts ----------------------------------------------------------------------------------------


def test_parts_of_a_weight_are_the_whole_weight():
    """A row that two processes have, or none, would give a wrong answer without a word."""
    whole = torch.randn(256, 384)
    for name, dim in ((QUERIES, 0), (OUT, 1), (HEAD, 0)):
        parts = [share.cut(name, whole) for share in TWO]
        assert torch.equal(torch.cat(parts, dim), whole)
    for name in ("language_model.norm.weight", "projector.linear_1.weight"):
        assert torch.equal(TWO[1].cut(name, whole), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_each_process_keeps_the_numbers_of_its_part_and_no_others(dtype, quantize):
    """A view of what was converted, grown or quantised kept the whole of it in memory, so that two
    processes took as much as four should. And what a LoRA adds is rounded once, as in one process:
    cut before it is added, it would be rounded twice."""
    folders = Folders(REFERENCE / "plain")
    weights, config = open_checkpoint(folders, read_config(folders.weights))
    numbers = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    a, b = (SimpleNamespace(read=lambda each=each: each) for each in (numbers, numbers.mT))
    weights.deltas[QUERIES] = Delta(a, b, 0.1)
    given = (config, weights, fused)
    options = {"dtype": dtype, "device": "cpu", "quantize": quantize, "min_rows": 500}
    whole = build_model(*given, **options).state_dict()
    for share in TWO:
        for name, part in build_model(*given, **options, share=share).state_dict().items():
            if part.is_meta or name.endswith("scale"):
                continue
            expected = share.cut(name, whole[name])
            assert torch.equal(part, expected), name
            mapped = part.dtype == torch.float32 and name != QUERIES  # as in the file
            if len(expected) < len(whole[name]) and not mapped:
                assert part.untyped_storage().nbytes() == part.nbytes, name


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", [64 * 501, 64 * 2, 1000, 7])
def test_the_tokens_of_the_head_are_divided_without_gaps(size, count):
    """A vocabulary seldom divides evenly: 32,064 tokens are 501 tiles of 64."""
    bounds = [Share(rank, count).bounds(size, 64) for rank in range(count)]
    assert bounds[0][0] == 0 and bounds[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(bounds))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", [QUERIES, OUT, HEAD])
def test_parts_of_a_quantised_weight_stand_for_the_numbers_of_the_whole(kind, name):
    """A scale that belongs to another part would change every number."""
    parts = quantize_tensor(torch.randn(256, 384), kind)
    whole = quantised_layer(parts).dequantise(slice(None), torch.float32)
    cut = [
        quantised_layer(share.cut_parts(name, parts)).dequantise(slice(None), torch.float32)
        for share in TWO
    ]
    assert torch.equal(torch.cat(cut, 1 if name == OUT else 0), whole)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", [QUERIES, OUT, HEAD])
@pytest.mark.parametrize("shape", [(256, 384), (200, 400)])  # int4 takes the first alone
def test_a_part_is_quantised_as_in_the_whole(kind, name, shape):
    """A weight is cut before it is quantised, for which each process would else need all of it; but
    a scale of int8 is that of a whole row, of which a process may have a half."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for share in TWO:
        expected = share.cut_parts(name, quantize_tensor(weight, kind))
        found = share.quantised(name, weight, kind)
        assert list(found) == list(expected)
        assert all(torch.equal(found[suffix], expected[suffix]) for suffix in expected)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in found.values())


@pytest.mark.parametrize("name", [QUERIES, HEAD])
def test_rows_of_packed_weights_are_cut_as_they_are_stored(name):
    """Unpacking them would take the memory and the time that packing them saves."""
    parts = quantize_tensor(torch.randn(256, 384), "int4")
    for share in TWO:
        found, expected = (
            share.cut_parts(name, pack_here(parts)),
            pack_here(share.cut_parts(name, parts)),
        )
        assert list(found) == list(expected)
        assert all(torch.equal(found[suffix], expected[suffix]) for suffix in expected)


def test_what_cannot_be_divided_is_refused_with_the_numbers():
    """Half a key/value head has no meaning, and int4 is packed in tiles."""
    text = TextConfig(num_attention_heads=32, num_key_value_heads=8)
    with pytest.raises(ValueError, match="num_key_value_heads is 8, which 3 processes"):
        replace(TWO[0], count=3).config(replace(text, num_attention_heads=33))
    assert TWO[1].config(text).head_dim == text.head_dim == 128
    parts = quantize_tensor(torch.randn(192, 128), "int4")
    with pytest.raises(ValueError, match=r"192 rows .* among 2 processes for int4"):
        TWO[0].cut_parts(QUERIES, parts)


@pytest.mark.parametrize("way", ["fused", "eager"])
def test_a_head_that_is_the_table_stays_a_fast_product(monkeypatch, way):
    """In bfloat16 without instructions for it, torch's own product takes many times as long, and a
    Qwen's head is a fourth of what a token reads."""
    model, seen = stored("tied", attention=way).model.language_model, []
    real = linear.linear
    monkeypatch.setattr(linear, "linear", lambda x, w: seen.append(w) or real(x, w))
    parallel.share_model(model, TWO[0])
    model.passing = True
    found = model.head(torch.ones(1, 1, model.config.hidden_size))
    assert found.shape == (1, 1, model.config.vocab_size)
    assert [weight is model.embed_tokens.weight for weight in seen] == [True] * (way == "fused")


def test_a_model_in_parts_needs_torchrun(monkeypatch):
    """A single process would wait for others that nobody starts."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        minillava.load(SHAPES, parallel=True)


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (["a", ""], "process 1 of 2 is to have GPU 1 of here, which has 1, counted from 0"),
        (["a", "a"], "processes 0 and 1 of 2 have the same GPU of here"),
    ],
)
def test_a_process_without_a_gpu_of_its_own_is_refused_in_all(monkeypatch, gpus, told):
    """One would fail in NCCL, and the others wait for it."""

    def gather(found, _):
        found[:] = [("here", rank, 1, gpu) for rank, gpu in enumerate(gpus)]

    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for share in TWO:
        with pytest.raises(ValueError, match=told):
            parallel.own_gpu(share)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_only_some_have_a_gpu_all_are_refused(monkeypatch, device):
    """Those with a GPU would wait for the word of those that have none, which never say one."""

    def gather(found, own):
        found[:] = [own, not own]

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(parallel.dist, name, lambda value=value: value)
    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"some have none; .* --device cpu"):
        parallel.join(device, True)


@pytest.mark.parametrize("interrupted", [False, True])
def test_who_follows_says_that_another_ended_while_opening(monkeypatch, capfd, interrupted):
    """Its error is a ValueError, and those are left for rank 0 to say, which may be who has ended:
    all of them would end without a word. Of Ctrl-C nobody complains."""

    def ended(*_):
        if interrupted:
            signal.raise_signal(signal.SIGINT)
        raise parallel.OthersEnded

    monkeypatch.setattr(opening, "find_weights", ended)
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGINT)
    try:
        assert follow("generate", SimpleNamespace(weights=None)) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    told = "" if interrupted else f"error: {parallel.OthersEnded()}\n"
    assert capfd.readouterr().err == told


def test_who_follows_knows_the_attention_that_is_sent_for_its_models_own():
    """A copy would be taken for one that watches, and rows would no longer be computed together."""
    assert pickle.loads(pickle.dumps(attention.fused)) is attention.fused


OPENED = """
import sys
from pathlib import Path
import torch
from minillava.attention import fused
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import open_checkpoint
from minillava.fast.parallel import Share

folders, quantize = Folders(Path(sys.argv[1])), sys.argv[2] or None
config = read_config(folders.weights)
options = {"dtype": torch.bfloat16, "device": "cpu", "quantize": quantize, "share": Share(1, 2)}
model = build_model(config, open_checkpoint(folders, config)[0], fused, **options)
tensors = [each for each in (*model.parameters(), *model.buffers()) if not each.is_meta]
lines = Path("/proc/self/status").read_text().splitlines()
print(sum(each.nbytes for each in tensors))
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
"""
"""Bytes of the second process's part of a model, and what opening it took beside its files."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quantize", KINDS)
def test_each_process_takes_the_memory_of_its_part(tmp_path, monkeypatch, quantize):
    """The allocator kept what was freed, between what stayed: up to three times a part in int4.
    What twelve layers take more than two is compared, since opening the first takes more."""
    sizes = {"two": (768, 2048, 2, 12), "twelve": (768, 2048, 12, 12)}
    monkeypatch.setattr(bench_checkpoint, "SIZES", bench_checkpoint.SIZES | sizes)
    for name in sizes:
        bench_checkpoint.make_checkpoint(tmp_path / name, name, torch.bfloat16)
        convert(tmp_path / name, tmp_path / f"{name}-{quantize}", "hf", quantize=quantize)

    def grown(before: bool) -> float:
        found = []
        for name in sizes:
            folder = tmp_path / (f"{name}-{quantize}" if before else name)
            command = [sys.executable, "-c", OPENED, str(folder), "" if before else quantize]
            told = subprocess.run(
                command,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=True,
            )
            found.append([*map(int, told.stdout.split())])
        (few, least), (many, most) = found
        return (most - least) / (many - few)

    for before in (False, True):
        # up to a twelfth is the allocator's own, which is another one from run to run
        assert any(grown(before) <= 1.1 for _ in range(5))


# --- two processes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[object]:
    """What two processes find, the last of it while one of them dies."""
    return in_two({"dtype": "float64"}, logits_of, watched, interrupted, without_the_other)


def test_two_processes_give_the_logits_and_attention_of_one(found):
    """The sum of two parts is the whole up to the order of adding, and every head is told."""
    logits, attentions, scores = found[0]
    expected, others, right = logits_of(minillava.load(SHAPES, device="cpu", dtype="float64"))
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert scores == pytest.approx(right, rel=1e-12)
    assert [a.shape for a in attentions] == [b.shape for b in others]
    assert max(float((a - b).abs().max()) for a, b in zip(attentions, others, strict=True)) < 1e-12


def test_a_function_that_cannot_be_sent_is_refused_and_the_others_go_on(found):
    """The other heads would do without it, and the answer would be half one thing, half another."""
    refused = "what watches or changes attention is not for a model in several processes"
    assert found[1] == f"{refused}There are three shapes."


def test_an_interrupt_waits_until_a_pass_is_over(found):
    """A chat goes on after Ctrl-C, and the other process has to be where this one is."""
    assert found[2] == "interrupted. There are three shapes."


def test_a_process_that_dies_ends_the_answer(found):
    """The others would wait for its part for ever."""
    assert found[3] == str(parallel.OthersEnded())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_two_processes_give_the_answers_of_one(quantize):
    """A cache that only one process changes (beams, a conversation, drafts, slots) would answer
    from another past; and the scale of a row belongs to all of its columns, of which each has a
    half."""
    options = {"dtype": "float32", "quantize": quantize}
    (together,) = in_two(options, everything)
    assert together == everything(minillava.load(SHAPES, device="cpu", **options))


@pytest.mark.slow
@pytest.mark.parity
def test_two_processes_give_the_answers_of_one_for_every_relative(tmp_path, monkeypatch):
    """Biases, grouped heads, a table that is the head, tiles, several layers of the tower, a LoRA,
    and layers that were quantised before: each is cut in a way of its own, and cut wrongly would
    answer something else without a word."""
    pytest.importorskip("transformers", reason="pip install 'minillava[parity]'")
    wide = {**hf.SIZES["toy"]["text"], "hidden_size": 256, "intermediate_size": 256}  # for int4
    monkeypatch.setitem(hf.SIZES["toy"], "text", wide)
    jobs: list[tuple[Path, dict]] = [
        (kinds.write_kind(each, tmp_path / each), {}) for each in kinds.KINDS
    ]
    config, tokenizer = tiled.config_of("onevision"), REFERENCE / "plain" / "tokenizer.model"
    state = hf.random_state(config, 11)
    jobs.append((tmp_path / "onevision", {}))
    hf.write_checkpoint(jobs[-1][0], config, state, tokenizer=tokenizer)
    jobs.append((tmp_path / "mistral", {"adapter": write_lora(tmp_path / "lora")}))
    for name in ("interleave", "mistral", "tiles"):
        for kind in KINDS:
            jobs.append((tmp_path / name, {"quantize": kind}))
            jobs.append((tmp_path / f"{name}-{kind}", {}))
            convert(tmp_path / name, jobs[-1][0], "hf", quantize=kind)
    jobs = [(folder, {"dtype": "float64", **options}) for folder, options in jobs]
    for (folder, options), ((found, answers),) in zip(
        jobs, each_in_two(jobs, of_a_relative), strict=True
    ):
        alone = minillava.load(folder, device="cpu", **options)
        expected, others = of_a_relative(alone)
        told = f"{folder.name}, {options}"
        assert found.shape[1] > 128, told  # see LONG
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max(), told
        assert answers == others, told


def write_lora(folder: Path) -> Path:
    """Of a layer that is divided by columns, and of one by rows."""
    folder.mkdir()
    generator, matrices = torch.Generator().manual_seed(0), {}
    for module, rows in (("mlp.down_proj", 256), ("self_attn.v_proj", 128)):
        prefix = f"base_model.model.model.layers.1.{module}"
        matrices[f"{prefix}.lora_A.weight"] = torch.randn(2, 256, generator=generator)
        matrices[f"{prefix}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(matrices, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "layers_to_transform": [1]}
    hf.write_json(
        {**config, "target_modules": ["down_proj", "v_proj"]}, folder / "adapter_config.json"
    )
    return folder


@pytest.mark.slow
def test_no_pass_begins_after_one_that_was_left():
    """The others stand in the middle of a pass: they would add what they have to another one."""
    (told,) = in_two({"dtype": "float32"}, left)
    assert told == ["no room", str(parallel.OthersEnded())]


@pytest.mark.slow
def test_an_error_of_one_is_told_once_with_its_numbers():
    """The queries of the bundled model are 192 rows, and int4 wants multiples of 64."""
    with pytest.raises(AssertionError, match=r"q_proj\.weight: its 192 rows cannot be divided"):
        in_two({"quantize": "int4"}, everything)


# --- by torchrun ----------------------------------------------------------------------------------


def begun(door: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A command in two processes, in a group of processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", f"minillava.{door}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        **options,
    )


def torchrun(door: str, *arguments: object, said: str = "") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in two processes. A hang is a failure."""
    process = begun(door, *arguments)
    try:
        out, err = process.communicate(said, timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


@pytest.mark.slow
def test_torchrun_prints_one_answer():
    """Two processes that both talk would print it twice."""
    asked = ["-q", "-m", SHAPES, "-i", SHAPES / "example-2.png"]
    found = torchrun("generate", *asked, "-p", "Where is the triangle?")
    assert found[:2] == (0, "The triangle is on the left.\n")
    lines = "Where is the triangle?\nIs it small or large?\n"
    found = torchrun("chat", *asked, said=lines)
    assert found[:2] == (0, "The triangle is on the left.\nIt is large.\n")


@pytest.mark.slow
def test_torchrun_answers_a_file_once(tmp_path):
    """Two processes that both write would leave every answer twice."""
    rows = [
        {"question_id": i, "image": PICTURE.name, "text": question}
        for i, question in enumerate(QUESTIONS)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    wanted = ["-m", SHAPES, "--questions", questions, "--images", SHAPES, "--answers"]
    torchrun("batch", "-q", *wanted, tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assistant = minillava.load(SHAPES, device="cpu")
    assert [each["text"] for each in found] == assistant.ask(PICTURE, QUESTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "arguments", "error"),
    [
        ("generate", ["-m", "nothing", "-i", PICTURE], "error: nothing: no such folder"),
        ("trace", ["-m", SHAPES, "-i", PICTURE], "error: trace is for one process"),
        ("generate", ["-m", SHAPES, "-i", PICTURE, "--same-bits"], "error: --compile and --same"),
    ],
)
def test_torchrun_tells_an_error_once(door, arguments, error):
    """Each process would tell it."""
    status, out, err = torchrun(door, *arguments)
    assert (status, out) == (1, "")
    assert len(re.findall("^error: ", err, re.MULTILINE)) == 1 and error in err


def lines_of(journal: Path) -> int:
    with suppress(FileNotFoundError):
        return journal.read_bytes().count(b"\n")
    return 0


def ranks_in(folder: Path) -> dict[int, int]:
    """Rank -> id of the processes that torchrun started in this folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (entry / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(entry.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("whom", "by"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (None, signal.SIGTERM), (None, signal.SIGINT)],
)
def test_a_process_that_is_killed_ends_all_of_them(tmp_path, whom, by):
    """The others would wait for its part for ever, in pages of tracebacks, or write into the file
    that every question left has failed; and what is sent to torchrun would leave them behind."""
    asked = {"image": PICTURE.name, "text": QUESTIONS[1]}
    rows = (json.dumps({"question_id": i} | asked) for i in range(400))
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    wanted = ["-m", SHAPES, "--questions", "q.jsonl", "--images", SHAPES, "--answers", "a.jsonl"]
    answers, journal = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    while True:  # until it is killed before it has answered everything
        process = begun("batch", "-q", *wanted, cwd=tmp_path)
        try:
            wait_until(lambda: process.poll() is not None or lines_of(journal) >= 3)  # noqa: B023
            # torchrun, which ends the others as soon as it sees that one has, stands still, so that
            # the other has to end by itself
            if whom is not None and process.poll() is None:
                process.send_signal(signal.SIGSTOP)
            there = ranks_in(tmp_path)
            if process.poll() is None and (whom is None or whom in there):
                if whom is None:
                    process.send_signal(by)
                else:
                    os.kill(there[whom], by)
                    wait_until(lambda: not ranks_in(tmp_path))
            process.send_signal(signal.SIGCONT)
            err = process.communicate(timeout=PATIENCE)[1]
            left = ranks_in(tmp_path)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode and not answers.exists():
            break
        answers.unlink()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert left == {}
    # of two that torchrun ends one after the other, the second may have seen the first one's end
    assert len(errors) == 1 if whom is not None else len(errors) <= 1, err
    assert all(line.startswith("error: another of the processes has ended") for line in errors), err
    assert "minillava/" not in err.replace("minillava/batch/__main__.py", ""), err
    # a question that was not answered is asked again
    assert b'"error": ' not in journal.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("whom", [0, 1])
@pytest.mark.parametrize("door", ["chat", "serve"])
def test_a_process_that_dies_while_nothing_is_asked_ends_all_of_them(tmp_path, door, whom):
    """Rank 0 waits for a person or for a client, and would learn of it at the next question only,
    which may come tomorrow."""
    arguments = {"chat": ["-i", PICTURE], "serve": ["--port", "0"]}[door]
    process = begun(door, "-q", "-m", SHAPES, *arguments, cwd=tmp_path)
    try:
        if door == "chat":
            process.stdin.write(f"{QUESTIONS[0]}\n")
            process.stdin.flush()
        assert process.stdout.readline()  # an answer, or where the server listens
        os.kill(ranks_in(tmp_path)[whom], signal.SIGKILL)
        err = process.communicate(timeout=PATIENCE)[1]
        left = ranks_in(tmp_path)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode and left == {}
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1  # torchrun says it, too, and may be first
    assert all(line.startswith("error: another of the processes has ended") for line in errors), err
