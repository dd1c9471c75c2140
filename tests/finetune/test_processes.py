"""Several processes learn what one does; a process that waits for ever is a failed test."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import environment
from paths import REFERENCE, ROOT
from PIL import Image
from waiting import PATIENCE

import minillava

PLAIN = REFERENCE / "plain"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this torch has no gloo, by which processes on CPUs talk",
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Seven rows; in the order of the file the third micro-batch and the last have no picture."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (40, 30), (200, 90, 30)).save(folder / "a.png")
    rows = [
        {"image": "a.png", "conversations": [{"from": "human", "value": f"<image>\nWhat{i}?"},
                                             {"from": "gpt", "value": "a b c d" * (i + 1)}]}
        for i in range(4)
    ]  # fmt: skip
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    rows[2:2] = [text, text]
    path = folder / "rows.json"
    path.write_text(json.dumps([*rows, text]), encoding="utf-8")
    return path


def learn(data: Path, out: Path, processes: int, *more: str) -> dict:
    """A run in float64; returns its state."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable, *(start if processes > 1 else []), "-m", "minillava.finetune", str(PLAIN),
        str(data), "--out", str(out), "--rank", "4", "--batch", "1", "--accumulate", "4",
        "--order", "file", "--rate", "1e-3", "--projector-rate", "1e-3", "--clip", "0.5",
        "--warmup", "0", "--epochs", "2", "--device", "cpu", "--dtype", "float64", *more,
    ]  # fmt: skip
    running = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True,
        env=environment(), text=True,
    )  # fmt: skip
    try:
        _, errors = running.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        pytest.fail(f"{processes} processes wait for one another:\n{running.communicate()[1]}")
    assert running.returncode == 0, errors
    return torch.load(out / "state.pt", weights_only=True)


@pytest.mark.parametrize(
    "more",
    [("--learn", "lora"), ("--learn", "projector", "--loss-mean", "microbatch"),
     ("--learn", "language"), ("--learn", "everything", "--hold-out", "0.3")],
    ids=lambda more: more[1],
)  # fmt: skip
def test_two_processes_learn_what_one_does(data, tmp_path, more):
    """A process whose rows have no picture never calls the projector, and the others wait for it;
    means over processes weigh a row by where it was computed. In float64, where the order of a sum
    does not show."""
    one, two = (learn(data, tmp_path / str(n), n, *more) for n in (1, 2))
    assert one["update"] == two["update"] == 4 or "--hold-out" in more
    for name, tensor in one["learnt"].items():
        assert tensor.dtype == torch.float64
        difference = (tensor - two["learnt"][name]).abs().max()
        assert difference <= 1e-12 * tensor.abs().max().clamp(min=1), name
    logs = [[json.loads(line) for line in state["log"]] for state in (one, two)]
    for a, b in zip(*logs, strict=True):
        for name in {"loss", "norm", "held_out_loss"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-11), name
        assert [a.get(n) for n in ("rows", "tokens")] == [b.get(n) for n in ("rows", "tokens")]
    if "language" in more:  # the parts were joined in what was written
        weights = minillava.load(tmp_path / "2" / "model", device="cpu", dtype="float32").model
        found = weights.language_model.norm.weight.double()
        assert torch.allclose(found, two["learnt"]["language_model.norm.weight"], atol=1e-6)


@pytest.mark.parametrize("learnt", ["lora", "language"])
def test_a_run_of_two_processes_goes_on(data, tmp_path, learnt):
    """Its moments would be those of one process's part, or the second process begin anew."""
    from minillava.finetune.state import BEFORE_NAME, STATE_NAME

    more = ("--learn", learnt, "--save-every", "1")
    whole = learn(data, tmp_path / "whole", 2, *more)
    out = tmp_path / "parts"
    learn(data, out, 2, *more)
    os.replace(out / BEFORE_NAME, out / STATE_NAME)  # as if it had been killed after update 3
    assert torch.load(out / STATE_NAME, weights_only=True)["update"] == 3
    parts = learn(data, out, 2, *more, "--resume")
    assert parts["update"] == 4
    for name, tensor in whole["learnt"].items():
        assert torch.equal(tensor, parts["learnt"][name]), name
