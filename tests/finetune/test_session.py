"""A run of `python -m minillava.finetune`: logged, measured, killed, gone on with, and begun from
nothing."""

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import environment
from paths import REFERENCE, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from waiting import PATIENCE, wait_until

import minillava
from minillava.checkpoint.folders import Folders
from minillava.cli.doors import enter
from minillava.cli.messages import Messages
from minillava.finetune import session, watch
from minillava.finetune.save import check_base, save_whole

main = partial(enter, "finetune")

PLAIN = REFERENCE / "plain"

QUICK = ("--rank", "4", "--batch", "1", "--accumulate", "2", "--rate", "1e-2", "--device", "cpu",
         "--projector-rate", "1e-3")  # fmt: skip

MEASURED = dict.fromkeys(("seconds", "tokens_per_second", "peak_memory"))
"""What no two runs have alike."""


def write_rows(folder: Path, name: str = "rows.json", rows: int = 6) -> Path:
    """Rows about two pictures, the last of text alone."""
    for i in range(2):
        Image.new("RGB", (40, 30), (200 * i, 90, 30)).save(folder / f"{i}.png")
    said = [
        {
            "id": f"{name} {i}",
            "image": f"{i % 2}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"a {'bcd'[i % 3]} " * (i % 3 + 1)},
            ],
        }
        for i in range(rows - 1)
    ]
    hello = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    said.append({"id": "text", "conversations": hello})
    path = folder / name
    path.write_text(json.dumps(said), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path)


def learn(run_main, data: Path, out: Path, *more: object, model: Path = PLAIN) -> str:
    status, printed, errors = run_main(main, model, data, "--out", out, *QUICK, *more)
    assert (status, printed) == (0, ""), errors
    return errors


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def same_files(a: Path, b: Path) -> None:
    """Every file of two runs: bit for bit, but for what was measured."""
    names = {path.relative_to(a) for path in a.rglob("*") if path.is_file()}
    assert names == {path.relative_to(b) for path in b.rglob("*") if path.is_file()}
    for name in names:
        if name.suffix in (".pt", ".bin"):
            first, second = (torch.load(f / name, weights_only=True) for f in (a, b))
            if name.suffix == ".pt":
                logs = [
                    [{**json.loads(x), **MEASURED} for x in s.pop("log")] for s in (first, second)
                ]
                assert logs[0] == logs[1]
            assert str(first) == str(second), name
            same_tensors(first, second)
        elif name.name == "log.jsonl":
            assert [{**r, **MEASURED} for r in log_of(a)] == [{**r, **MEASURED} for r in log_of(b)]
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def same_tensors(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list, tuple)):
        for x, y in zip(*(c.values() if isinstance(c, dict) else c for c in (a, b)), strict=True):
            same_tensors(x, y)


# ------------------------------------------------------------------------------------------ the log


def test_every_update_is_in_the_log_as_soon_as_it_is_made(run_main, data, tmp_path, monkeypatch):
    """A log that is written at the end is lost with a run that is killed, and shows nothing until
    then. stderr is no terminal here: nothing hangs on a bar."""
    seen = []
    monkeypatch.setattr(
        "minillava.finetune.session.tell",
        lambda record, *_: seen.append(log_of(tmp_path / "out")[-1] == record),
    )
    learn(run_main, data, tmp_path / "out", "--clip", 0.01)
    assert seen == [True] * 3
    for record in log_of(tmp_path / "out"):
        assert {"update", "epoch", "loss", "tokens", "rows", "pictures", "rates", "norm", "clipped",
                "seconds", "tokens_per_second", "peak_memory"} == set(record)  # fmt: skip
        assert record["clipped"] is (record["norm"] > 0.01)
        assert record["peak_memory"] > 1e6 and record["tokens_per_second"] > 0


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])  # fmt: skip
def test_a_logger_that_is_not_installed_is_told_with_its_extra(
    run_main, data, tmp_path, monkeypatch, name, package
):
    """The run would end in a traceback, or log nowhere without a word."""
    real = builtins.__import__

    def without(module, *rest, **named):
        if module == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(module, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, errors = run_main(
        main, PLAIN, data, "--out", tmp_path / "out", *QUICK, "--log", name
    )
    assert status == 1
    assert f"pip install 'minillava[{name}]'" in errors and errors.count("error:") == 1
    learn(run_main, data, tmp_path / "out", "--resume")
    assert len(log_of(tmp_path / "out")) == 3


def test_a_logger_that_fails_does_not_stop_a_run(tmp_path, capsys):
    """A network that is gone would end hours of learning."""
    said: list[dict] = []

    def broken(record: dict) -> None:
        said.append(record)
        raise RuntimeError("no network")

    log = watch.Log(tmp_path / "log.jsonl", [], {"wandb": broken}, Messages(False, False))
    for update in (1, 2):
        log.add({"update": update, "loss": 1.0})
    assert len(said) == 1
    assert [record["update"] for record in log_of(tmp_path)] == [1, 2]
    assert "wandb failed (no network); the run goes on without it" in capsys.readouterr().err


def test_numbers_of_a_record_have_a_name_each():
    """A rate would be logged under the name of another part, or NaN end the logger."""
    record = {
        "update": 3,
        "rates": {"LoRA": 0.1, "projector": 0.2},
        "loss": float("nan"),
        "answers": [],
    }
    assert watch.numbers(record) == {"update": 3.0, "rates/LoRA": 0.1, "rates/projector": 0.2}


@pytest.mark.parity
def test_tensorboard_reads_what_was_logged(run_main, data, tmp_path):
    """The events would be empty, or under other updates."""
    pytest.importorskip("tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    learn(run_main, data, tmp_path / "out", "--log", "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    expected = {record["update"]: record["loss"] for record in log_of(tmp_path / "out")}
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parity
def test_wandb_takes_what_is_logged(run_main, data, tmp_path, monkeypatch):
    """Its run would not begin, or reject a record."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told = learn(run_main, data, tmp_path / "out", "--log", "wandb")
    assert "wandb failed" not in told
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))


# ----------------------------------------------------------------------------------------- measured


def test_rows_of_another_file_are_measured_and_the_best_is_kept(run_main, data, tmp_path):
    """A run that learns its rows by heart ends with a worse model than it had on the way. Answers
    show in minutes a model that never stops."""
    val = write_rows(tmp_path, "val.json", 3)
    learn(run_main, data, tmp_path / "out", "--val", val, "--evaluate-every", 2, "--epochs", 2)
    held = [record for record in log_of(tmp_path / "out") if "held_out_loss" in record]
    assert [record["update"] for record in held] == [0, 2, 4, 6]
    for record in held:
        assert [said["row"] for said in record["answers"]] == [
            "'val.json 0' (0)",
            "'val.json 1' (1)",
        ]
        assert all(said["ended"] in ("stop", "length") for said in record["answers"])
    losses = [record["held_out_loss"] for record in held]
    assert losses[-1] < losses[0]
    best = minillava.load(PLAIN, adapter=tmp_path / "out" / "best", device="cpu")
    last = minillava.load(PLAIN, adapter=tmp_path / "out", device="cpu")
    weights = [a.model.projector.linear_1.weight for a in (best, last)]
    assert torch.equal(*weights) == (losses.index(min(losses)) == 3)


def test_a_run_without_gain_ends_early(run_main, data, tmp_path):
    """It would go on for hours after the best model; gone on with, it would learn again."""
    more = ("--hold-out", 0.3, "--rate", 0, "--projector-rate", 0, "--early-stop", 2,
            "--evaluate-every", 1, "--epochs", 9)  # fmt: skip
    learn(run_main, data, tmp_path / "out", *more)
    log = log_of(tmp_path / "out")
    assert max(record["update"] for record in log) == 2
    assert torch.load(tmp_path / "out" / "state.pt", weights_only=True)["update"] == 2
    learn(run_main, data, tmp_path / "out", *more, "--resume")
    assert log_of(tmp_path / "out") == log


def test_the_log_is_read_for_the_best_loss_only_after_a_measurement(
    run_main, data, tmp_path, monkeypatch
):
    """The whole log was read anew after every update: the longer the run, the slower an update."""
    real, asked = session.best_of, []

    def seen(records):
        asked.append(max((record["update"] for record in records), default=0))
        return real(records)

    monkeypatch.setattr(session, "best_of", seen)
    monkeypatch.setattr(session, "answers", lambda *_: [])  # which take long
    learn(run_main, data, tmp_path / "out", "--hold-out", 0.3, "--early-stop", 9,
          "--evaluate-every", 3, "--updates", 6)  # fmt: skip
    assert set(asked) == {0, 3, 6}


# ---------------------------------------------------------------------------------- killed, full


def test_a_run_that_was_killed_before_its_first_state_begins_anew(
    run_main, data, tmp_path, monkeypatch
):
    """Its folder was refused as somebody else's: for the folder of a logger, which is made before
    the log, or for what was best so far."""
    out = tmp_path / "out"
    (out / "best").mkdir(parents=True)
    more = ("--hold-out", 0.3, "--evaluate-every", 1, "--updates", 3, "--resume")
    status, _, errors = run_main(main, PLAIN, data, "--out", out, *QUICK, *more)
    assert status == 1 and "is not empty, and has no state.pt" in errors  # a folder of the user's
    (out / "best").rmdir()
    (out / "tensorboard").mkdir()
    monkeypatch.setattr(session, "answers", lambda *_: [])  # which take long

    def killed(*arguments) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_state", killed)
        status, _, _ = run_main(main, PLAIN, data, "--out", out, *QUICK, *more)
    found = {path.name for path in out.iterdir()}
    assert (status, found) == (130, {"best", "log.jsonl", "recipe.json", "tensorboard"})
    assert "starts anew" in learn(run_main, data, out, *more)


def test_a_model_that_was_moved_away_when_a_run_was_killed_comes_back(tmp_path, monkeypatch):
    """The next run removed it before it had written another: a full disk then left no model."""
    target = tmp_path / "model"
    save_whole({}, Folders(PLAIN), target)
    target.rename(tmp_path / "model.before")
    files = {path.name for path in PLAIN.iterdir() if path.suffix == ".safetensors"}

    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("minillava.finetune.save.write_weights", full)
        with pytest.raises(OSError, match="No space left"):
            save_whole({}, Folders(PLAIN), target)
    assert files <= {path.name for path in target.iterdir()}
    save_whole({}, Folders(PLAIN), target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_loses_nothing_that_was_good(run_main, data, tmp_path, monkeypatch):
    """The only state would be half a file."""
    more = ("--save-every", 1, "--epochs", 2)
    learn(run_main, data, tmp_path / "whole", *more)
    real, states = os.fsync, []

    def full(number: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{number}"))
        states.append(name.startswith("state"))
        if sum(states) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("this system does not tell the name of an open file")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("minillava.files.disk.os.fsync", full)
        status, _, errors = run_main(main, PLAIN, data, "--out", out, *QUICK, *more)
    assert status == 1
    assert "No space left on device; make room there" in errors
    assert torch.load(out / "state.pt", weights_only=True)["update"] == 2
    assert not list(out.glob("*.new"))
    minillava.load(PLAIN, adapter=out, device="cpu")
    learn(run_main, data, out, *more, "--resume")
    same_files(tmp_path / "whole", out)


LATER = (0.0, 0.02, 0.2, 0.5)
"""Seconds after it has begun to write, at which a run is killed."""


@pytest.mark.slow
@pytest.mark.parametrize("learnt", ["lora", "language"])
def test_a_run_that_is_killed_anywhere_goes_on_bit_for_bit(data, tmp_path, learnt):
    """Killed while it computes, saves, or before its first state; files were lost, half written, or
    the folder refused as somebody else's."""
    more = ("--save-every", "1", "--learn", learnt, "--hold-out", "0.3", "--updates", "4")
    command = [sys.executable, "-m", "minillava.finetune", str(PLAIN), str(data), *QUICK, *more]
    errors = tmp_path / "errors.txt"

    def start(out: Path, *resume: str) -> subprocess.Popen:
        with errors.open("w") as file:
            return subprocess.Popen(
                [*command, "--out", str(out), "-q", *resume],
                cwd=ROOT,
                env=environment(),
                stderr=file,
            )

    def written() -> list[tuple[str, int]]:
        found = []
        for path in sorted(out.glob("*.*")):
            with suppress(FileNotFoundError):  # it has another name by now
                found.append((path.name, path.stat().st_mtime_ns))
        return found

    assert start(tmp_path / "whole").wait(timeout=PATIENCE) == 0, errors.read_text()
    out, kills = tmp_path / "parts", 0
    while kills < len(LATER):
        before, running = written(), start(out, "--resume")
        wait_until(lambda: running.poll() is not None or written() != before, pause=0.002)  # noqa: B023
        time.sleep(LATER[kills])
        if running.poll() is None:
            kills += 1
            running.kill()
            running.wait()
        else:  # it was faster: another one is begun, to be killed
            assert running.returncode == 0, errors.read_text()
            same_files(tmp_path / "whole", out)
            shutil.rmtree(out)
    assert start(out, "--resume").wait(timeout=PATIENCE) == 0, errors.read_text()
    assert not (out / "state-next.pt").exists() and not list(out.glob("*.new"))
    same_files(tmp_path / "whole", out)


def test_each_checkpoint_of_a_whole_model_can_be_opened(run_main, data, tmp_path, monkeypatch):
    """Only the last one could; one that was interrupted left no model at all."""
    out, opened = tmp_path / "out", []
    from minillava.finetune.session import Session

    real = Session.write

    def write(self, update: int) -> None:
        real(self, update)
        opened.append(minillava.load(out / "model", device="cpu").model.projector.linear_1.weight)

    monkeypatch.setattr(Session, "write", write)
    learn(run_main, data, out, "--learn", "language", "--save-every", 1)
    assert len(opened) == 3
    assert not torch.equal(opened[1], opened[2])
    assert not list(out.glob("model.*"))


# ------------------------------------------------------------------------------------- from nothing


def vicuna(folder: Path) -> Path:
    """The language model of the stored checkpoint alone, as Vicuna is published."""
    folder.mkdir()
    config = json.loads((PLAIN / "config.json").read_text("utf-8"))["text_config"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), "utf-8")
    shutil.copy(PLAIN / "tokenizer.model", folder)
    tensors = load_file(PLAIN / "model.safetensors")
    own = {n.removeprefix("language_model."): t for n, t in tensors.items() if n.startswith("language_model.")}  # fmt: skip
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_in_several_folders_needs_its_tokenizer_model(tmp_path):
    """The whole model could not be written, which was found only after the training."""
    language = vicuna(tmp_path / "vicuna")
    several = Folders(tmp_path / "projector", model_base=language)
    check_base(several)
    (language / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"none of which has a tokenizer\.model"):
        check_base(several)


def test_the_folder_that_is_quantised_is_named(tmp_path, monkeypatch):
    """The weights of the projector were, where the language model beside them is quantised."""
    monkeypatch.setattr(
        "minillava.finetune.save.StoredWeights", lambda folder: SimpleNamespace(quantised=True)
    )
    with pytest.raises(ValueError, match=r"vicuna: is quantised"):
        check_base(Folders(tmp_path / "projector", model_base=tmp_path / "vicuna"))


def test_both_stages_run_from_a_language_model_and_a_clip(run_main, tmp_path, write_dialect):
    """LLaVA's own way: a projector from nothing learns captions; then it and the language model
    learn to answer. Stage 2 could not be written, and stage 1 not be begun."""
    clip = write_dialect("original-bare", tmp_path / "bare")["vision_tower"]
    language = vicuna(tmp_path / "vicuna")
    captions = [
        {"image": "0.png", "conversations": [{"from": "human", "value": "Describe.\n<image>"},
                                             {"from": "gpt", "value": "a b"}]}
    ] * 4  # fmt: skip
    data = write_rows(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps(captions), "utf-8")
    status, _, errors = run_main(main, language, data, "--check", 1)
    assert status == 1 and "give --vision-tower, the folder of a CLIP" in errors

    small = ("--batch", 2, "--accumulate", 1, "--device", "cpu")
    status, _, errors = run_main(
        main, language, tmp_path / "captions.json", "--vision", clip, "--recipe", "stage1", "--out",
        tmp_path / "one", *small,
    )  # fmt: skip
    assert status == 0, errors
    assert f"--model-base {language} --vision-tower {clip}" in errors
    model = minillava.load(
        tmp_path / "one", model_base=language, vision_tower=clip, device="cpu", dtype="float32"
    ).model
    before = load_file(PLAIN / "model.safetensors")
    kept = model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(
        kept.float(), before["language_model.model.layers.0.mlp.up_proj.weight"].float()
    )

    status, _, errors = run_main(
        main, tmp_path / "one", data, "--model-base", language, "--vision-tower", clip, "--recipe",
        "stage2", "--out", tmp_path / "two", *small, "--rate", "1e-3",
    )  # fmt: skip
    assert status == 0, errors
    model = minillava.load(tmp_path / "two" / "model", device="cpu", dtype="float32").model
    assert not torch.equal(model.language_model.layers[0].mlp.up_proj.weight, kept)
