"""`batch --on ray`: the file of one process, whoever dies on the way. Without Ray, what needs none."""

import importlib.util
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import environment
from paths import REFERENCE, ROOT
from waiting import PATIENCE, wait_until

from minillava.batch import workers
from minillava.batch.journal import Journal
from minillava.batch.questions import Question
from minillava.batch.workers import Cluster, blocks_of, check_address, cores_for_each
from minillava.cli.doors import enter

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="pip install 'minillava[ray]'"
)
PICTURES = REFERENCE / "pictures"
NAMES = ("square.png", "grey.png", "landscape.png", "portrait.png")
ROUNDS = 20
# with a token of its own, Ray writes none into the user's folder
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def asked(folder: Path, count: int) -> list[str]:
    """The arguments of a command for so many questions: neighbours on one picture, one whose
    picture is not there, and a line that is no question."""
    rows = [
        {"question_id": i, "image": NAMES[i // 3 % 4], "text": "What is it? " + "Look. " * (i % 5)}
        for i in range(count)
    ]
    rows[5]["image"] = "none.png"
    lines = [json.dumps(row) for row in rows]
    (folder / "q.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    given = ["-m", REFERENCE / "plain", "--device", "cpu", "--dtype", "float32", "-n", "6", "-q"]
    given += ["--temperature", "1.5", "--seed", "3", "--batch-size", "4", "--images", PICTURES]
    return [*map(str, given), "--questions", "q.jsonl", "--answers"]


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "minillava.batch", *map(str, arguments)],
        cwd=folder,
        env=environment(**TOKEN),
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def head():
    """The address of Ray on this machine, as `ray start` starts it, told that it has four cores."""
    place = tempfile.mkdtemp()  # a socket's path has 100 characters
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port", "0", "--num-cpus", "4"]
    command += ["--num-gpus", "0", "--include-dashboard", "false", "--temp-dir", place]
    command += ["--disable-usage-stats", "--object-store-memory", "100000000"]
    with open(f"{place}/said", "wb") as said:
        process = subprocess.Popen(
            command, env=environment(**TOKEN), stdout=said, stderr=said, start_new_session=True
        )
    try:
        told = Path(f"{place}/said")
        started = "Ray runtime started"
        wait_until(lambda: process.poll() is not None or started in told.read_text(), pause=0.1)
        assert process.poll() is None, told.read_text()
        yield re.search(r"ray start --address='(\S+)'", told.read_text())[1]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


# --- without Ray ----------------------------------------------------------------------------------


def test_a_worker_gets_the_cores_for_which_there_is_room():
    """A worker that no machine has room for would be waited for without end."""
    assert cores_for_each(2, [2]) == 1
    assert cores_for_each(2, [8, 8]) == 8
    assert cores_for_each(3, [8, 8]) == 4
    assert cores_for_each(2, [64, 8]) == 32
    with pytest.raises(ValueError, match="9 workers want a core each, and Ray has 2"):
        cores_for_each(9, [1, 1, 0])


def test_neighbours_on_one_picture_stay_together():
    """Each worker would encode every picture."""
    images = ["a", "a", "b", "b", "b", "a"]
    work = [[Question(i, images=[name])] for i, name in enumerate(images, 1)]
    found = [[one[0].line for one in block] for block in blocks_of(work, 2)]
    assert found == [[1, 2], [3, 4], [5], [6]]


def test_nobody_at_the_address_is_told_at_once():
    """Ray tries for two minutes, with a page of its own messages."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(OSError):
                check_address(address)
    check_address("auto")
    check_address(None)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--workers", "2"], 2, "--address and --workers are for --on ray"),
        (["--on", "ray", "--workers", "0"], 2, "workers is 0, expected at least 1"),
        (["--on", "ray"], 1, "pip install 'minillava[ray]'"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, run_main, arguments, status, told):
    """Without the extra it would end in a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = run_main(partial(enter, "batch"), *asked(tmp_path, 9), "a.jsonl", *arguments)
    assert (found[0], found[2].count("\n")) == (status, 1) and told in found[2]
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_workers_that_want_a_gpu_each_are_told_that_there_is_none():
    """No worker would be started, and the run would wait for ever."""
    machine = {"Alive": True, "Resources": {"CPU": 2.0}}
    ray = SimpleNamespace(nodes=lambda: [machine])
    with pytest.raises(ValueError, match="want a GPU each, and Ray has 0"):
        Cluster(ray, None, "cuda")


# --- with Ray -------------------------------------------------------------------------------------


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--num-beams", "2", "--temperature", "0"]])
def test_two_workers_write_the_file_of_one_process(tmp_path, head, monkeypatch, more):
    """Another order, seed or batch would give another file, and a run begun by one process could
    not be finished by several."""
    monkeypatch.chdir(tmp_path)
    given = asked(tmp_path, 40)
    assert enter("batch", [*given, "whole.jsonl", *more]) == 1
    add, left = Journal.add, [13]

    def interrupted(journal, records):
        add(journal, records)
        left[0] -= len(records)
        if left[0] <= 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        assert enter("batch", [*given, "begun.jsonl", *more]) == 130
    for name in ("ray.jsonl", "begun.jsonl"):
        where = ["--on", "ray", "--address", head, "--workers", "2"]
        process = start(tmp_path, *given, name, *more, *where)
        told = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1, told
        assert "\nerror: 2 of 41 questions have no answer;" in f"\n{told}"
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert list(tmp_path.glob("*.partial")) == []


@needs_ray
@pytest.mark.slow
def test_what_a_worker_cannot_open_is_one_line_that_names_its_machine(tmp_path, head):
    """The machine at fault would be looked for in a page of Ray's."""
    given = asked(tmp_path, 9)
    more = ["--draft", "medusa", "--temperature", "0"]  # there are no such heads
    process = start(tmp_path, *given, "a.jsonl", *more, "--on", "ray", "--address", head)
    told = process.communicate(timeout=PATIENCE)[1]
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1, told
    assert errors[0].startswith(f"error: the worker on {socket.gethostname()}: ")


def living(folder: Path) -> list[int]:
    """The workers, which are where the command was typed."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if title.startswith(b"ray::") and (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_workers_and_a_killed_driver_lose_and_repeat_nothing(tmp_path, head, monkeypatch):
    """What a dead worker was at would be missing, or be answered twice."""
    monkeypatch.chdir(tmp_path)
    given = asked(tmp_path, 500)
    assert enter("batch", [*given, "whole.jsonl"]) == 1
    chance, kills, journal = random.Random(0), 0, tmp_path / "ray.jsonl.partial"
    command = [*given, "ray.jsonl", "--on", "ray", "--address", head, "--workers", "4"]
    process = start(tmp_path, *command)

    def answered() -> int:
        with suppress(FileNotFoundError):
            return journal.read_bytes().count(b"\n") - 1
        return 0

    def over() -> None:
        told = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 1, told
        assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not journal.exists()

    while kills < ROUNDS:
        wanted = answered() + chance.randrange(1, 12)
        wait_until(
            lambda: process.poll() is not None or (answered() >= wanted and living(tmp_path)),  # noqa: B023
            pause=0.01,
        )
        if process.poll() is not None:  # it was faster: another one is begun, to be killed
            over()
            (tmp_path / "ray.jsonl").unlink()
            process = start(tmp_path, *command)
            continue
        with suppress(IndexError, ProcessLookupError):
            os.kill(chance.choice(living(tmp_path)), signal.SIGKILL)
            kills += 1
            if kills == ROUNDS // 2:
                process.kill()
                process.communicate()
                process = start(tmp_path, *command)
    with suppress(FileNotFoundError):  # if it has not ended yet
        # the last may be half written, for the command goes on
        lines = [line for line in journal.read_bytes().splitlines()[1:] if line.endswith(b"]")]
        assert len({json.loads(line)[0] for line in lines}) == len(lines)
    over()


@needs_ray
@pytest.mark.slow
def test_workers_that_always_die_end_the_run(tmp_path, monkeypatch):
    """A question that ends every process which asks it would be asked for ever."""
    import ray

    cluster = object.__new__(workers.Cluster)
    cluster.ray, cluster.dead = ray, workers.DEATHS - 2

    def died(_):
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", died)
    assert cluster._result(None) is None
    with pytest.raises(ValueError, match="10 workers died one after the other without an answer"):
        cluster._result(None)


@needs_ray
@pytest.mark.slow
def test_what_readme_types_for_several_processes_and_machines(tmp_path):
    """The only commands of README that no environment without Ray can run would be run by nobody."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- several -->\n```sh\n(.*?)```", page, re.DOTALL)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    # what pip installs as torchrun
    (tmp_path / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    (tmp_path / "torchrun").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    place = tempfile.mkdtemp()
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=tmp_path,
        env=environment(**TOKEN, **path, RAY_TMPDIR=place),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    shutil.rmtree(place, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("I see a large red star at the top left")
    (record,) = map(json.loads, (tmp_path / "by-ray.jsonl").read_text().splitlines())
    assert record["text"] == "There are three shapes."
