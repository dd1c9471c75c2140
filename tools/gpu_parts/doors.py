"""doors: everything a user can start, on the device, with the bundled model. An answer must be the
CPU's in float32, numbers must be the CPU's in float64 up to rounding, and each door is a row, so
that one that fails leaves the others.
"""

import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.common import BUNDLED, PICTURES, QUESTIONS, Missing, Run
from minillava import llama
from minillava.assistant import load
from minillava.cli.doors import enter
from minillava.files.disk import one_line
from minillava.inspection.doctor import TOLERANCE
from minillava.probe import again
from minillava.serve.run import EXTRA

ROOT = Path(__file__).resolve().parents[2]
ALIKE = TOLERANCE[torch.float64]  # of tensors, relative, and far below what a wrong kernel does
# of the numbers that are told: maps are float32, and a share is the sum of one's 81 patches
TOLD_ALIKE = 81 * torch.finfo(torch.float32).eps
ABOUT = QUESTIONS[2]
ASKED = ("-i", PICTURES[0], "-p", ABOUT, "-n", 40)
UPDATES = 12  # of a training
PATIENCE = 120  # seconds for a process

CPU = ("--device", "cpu", "--dtype", "float32")


class Wrong(Exception):
    """What a door did is not what it should have done."""


def doors(run: Run) -> None:
    with tempfile.TemporaryDirectory(prefix="doors-") as folder:
        for name, work in all_doors(run, Path(folder)).items():
            try:
                found = work()
            except TimeoutError:  # of the section
                raise
            except Missing as missing:
                run.report.skip(name, str(missing))
            except (Exception, SystemExit) as error:
                told = error if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
                run.report.check(name, "", one_line(told)[:300], "as on the CPU", False)
            else:
                run.report.check(name, "", one_line(found), "as on the CPU", True)


def all_doors(run: Run, folder: Path) -> dict[str, Callable[[], str]]:
    """What is started, by the name of its row. Each returns what it found, or raises."""
    device = run.device
    generate = partial(same_answer, device, "generate", ASKED)
    rows = partial(questions, folder)
    return {
        "generate": generate,
        "generate, beams": partial(generate, "--num-beams", 3),
        "generate, vcd": partial(generate, "--contrast", "vcd", "--seed", 1),
        "generate, ritual": partial(generate, "--contrast", "ritual", "--seed", 1),
        "generate, m3id": partial(generate, "--contrast", "m3id"),
        "generate, drafts by lookup": partial(generate, "--draft", "lookup"),
        "generate, drafts by medusa": partial(generate, "--draft", "medusa"),
        "generate, same bits": partial(generate, "--same-bits"),
        "generate, int8": partial(generate, "--quantize", "int8"),
        "generate, int4": partial(generate, "--quantize", "int4"),
        "generate, float16": partial(plain, device, "generate", *ASKED, "--dtype", "float16"),
        "chat": partial(same_answer, device, "chat", ("-i", PICTURES[0]), stdin=QUESTIONS),
        "batch": partial(batch, device, folder, rows),
        "batch, same bits, vcd": partial(batch, device, folder, rows, "--same-bits", "--contrast", "vcd"),
        "look": partial(numbers, device, "look", "--html", folder / "look.html", "--lens", folder / "lens.html", "--out", folder / "look.png"),
        "probe": partial(numbers, device, "probe", "--html", folder / "probe.html", "--out", folder / "probe.png"),
        "probe, grey": partial(numbers, device, "probe", "--hide", "grey", "--measure", "occlusion"),
        "probe, another picture": partial(numbers, device, "probe", "--other", PICTURES[1], "--measure", "occlusion"),
        "trace, a page": partial(traced, device, folder),
        "trace, every tensor": partial(compared, device, folder),
        "inspect --doctor": partial(doctor, device),
        "serve": partial(served, device),
        "finetune, LoRA": partial(finetuned, device, folder, "lora"),
        "finetune, medusa": partial(finetuned, device, folder, "medusa"),
        "torchrun, one process": partial(torchrun, device, "-m", "minillava.generate", *ASKED, "--device", device, "--dtype", "float32", "-q"),
        "torchrun, collectives": partial(torchrun, device, Path(__file__).with_name("one_process.py"), device, ABOUT),
    }  # fmt: skip


# --- a door in this process -----------------------------------------------------------------------


def door(name: str, *flags: object, stdin: Sequence[str] = ()) -> str:
    """What a door writes to stdout. Raises Wrong with its last message if it does not end well."""
    given = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in stdin).encode()), "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with replaced_stdin(given), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = enter(name, [str(flag) for flag in flags])
    written, told = (stream.buffer.getvalue().decode() for stream in (out, err))
    if status:
        raise Wrong(f"{name} ended with {status}: {(told or written).strip()[-250:]}")
    return written


@contextlib.contextmanager
def replaced_stdin(stream: io.TextIOWrapper) -> Iterator[None]:
    before, sys.stdin = sys.stdin, stream
    try:
        yield
    finally:
        sys.stdin = before


def on(device: str, dtype: str = "float32") -> tuple[str, ...]:
    return ("--device", device, "--dtype", dtype, "-q")


def plain(device: str, name: str, *flags: object) -> str:
    """The door on the device, whose answer is checked by a person."""
    written = door(name, *flags, "--device", device, "-q").strip()
    return expect(bool(written), written, "an answer")


def expect(good: bool, found: object, expected: object) -> str:
    if not good:
        raise Wrong(f"{found!r} instead of {expected!r}")
    return str(found)


def same_answer(
    device: str, name: str, asked: Sequence[object], *flags: object, stdin: Sequence[str] = ()
) -> str:
    """The answer of the device, which must be the CPU's to the last letter."""
    found, right = (
        door(name, *asked, *flags, *on(where), stdin=stdin) for where in (device, "cpu")
    )
    return expect(found == right, found.strip(), right.strip())


def questions(folder: Path) -> Path:
    """A file of questions about all pictures, for batch."""
    path = folder / "questions.jsonl"
    pairs = [(picture, question) for picture in PICTURES for question in QUESTIONS]
    rows = [
        {"question_id": number, "image": picture.name, "text": question}
        for number, (picture, question) in enumerate(pairs)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def batch(device: str, folder: Path, rows: Callable[[], Path], *flags: object) -> str:
    texts = {}
    for where in (device, "cpu"):
        out = folder / f"answers-{where}-{len(flags)}.jsonl"
        files = ("--questions", rows(), "--images", BUNDLED, "--answers", out, "--overwrite")
        door("batch", *files, "-n", 40, *flags, *on(where))
        lines = out.read_text(encoding="utf-8").splitlines()
        texts[where] = [json.loads(line).get("text") for line in lines]
    same = sum(a == b for a, b in zip(texts[device], texts["cpu"], strict=True))
    expect(texts[device] == texts["cpu"], texts[device], texts["cpu"])
    return f"{same} of {len(texts['cpu'])} answers"


# --- numbers, in float64 --------------------------------------------------------------------------


def numbers(device: str, name: str, *flags: object) -> str:
    """What `--json` says on the device and on the CPU, both in float64; and that the files are
    written."""
    with tables_of_the_cpu():
        found, right = (
            json.loads(door(name, *ASKED, "--json", *flags, *on(where, "float64")))
            for where in (device, "cpu")
        )
    count, apart = differ(found, right)
    files = [flag for flag in flags if isinstance(flag, Path) and flag.suffix in (".html", ".png")]
    empty = [path.name for path in files if not (path.exists() and path.stat().st_size)]
    told = f"{count} numbers, {apart:.1e} apart" + (f"; empty: {empty}" if empty else "")
    return expect(
        count > 0 and apart <= TOLD_ALIKE and not empty, told, f"at most {TOLD_ALIKE:.0e} apart"
    )


@contextlib.contextmanager
def tables_of_the_cpu() -> Iterator[None]:
    """Rotary tables are float32 in every precision, since they define the network, and a device's
    power and cosine may differ from another's in the last bit. Inside, all of them are the CPU's."""
    real = llama.rotary_tables

    def tables(positions: Tensor, *given: Any) -> tuple[Tensor, ...]:
        return tuple(table.to(positions.device) for table in real(positions.cpu(), *given))

    places = (llama, again)
    for place in places:
        place.rotary_tables = tables
    try:
        yield
    finally:
        for place in places:
            place.rotary_tables = real


def differ(found: Any, right: Any, where: str = "") -> tuple[int, float]:
    """How many numbers two JSON values have, and how far apart they are at most, as a part of the
    larger one or, below 1, of 1. Raises Wrong where anything else differs. Seconds are left out."""
    if isinstance(right, dict) and isinstance(found, dict) and found.keys() == right.keys():
        keys = [key for key in right if "seconds" not in key]
        pairs = [differ(found[key], right[key], f"{where}.{key}") for key in keys]
    elif isinstance(right, list) and isinstance(found, list) and len(found) == len(right):
        pairs = [
            differ(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(found, right, strict=True))
        ]
    elif isinstance(right, float) and isinstance(found, float):
        return 1, abs(found - right) / max(abs(found), abs(right), 1.0)
    else:
        expect(found == right, f"{where} {found!r:.80}", f"{right!r:.80}")
        return 0, 0.0
    return sum(n for n, _ in pairs), max((apart for _, apart in pairs), default=0.0)


def traced(device: str, folder: Path) -> str:
    path = folder / "trace.html"
    answer = door("trace", *ASKED, "--depth", "everything", "--html", path, *on(device)).strip()
    right = door("generate", *ASKED, *on("cpu")).strip()
    expect(path.stat().st_size > 0, "an empty page", "a page")
    return expect(answer == right, answer, right)


def compared(device: str, folder: Path) -> str:
    """Every tensor on the way to an answer beside the CPU's, both in float64."""
    saved = folder / "trace.safetensors"
    door("trace", *ASKED, "--save", saved, *on("cpu", "float64"))
    settings = f"device={device},dtype=float64"
    flags = ("--compare", saved, settings, "--tolerance", ALIKE, "--exit-code")
    with tables_of_the_cpu():
        written = door("trace", *ASKED, *flags, *on("cpu"))
    return one_line(written.strip().splitlines()[-1])[:160]


def doctor(device: str) -> str:
    """Its own checks, of which none may fail; one that warns is no failure."""
    lines = door("inspect", BUNDLED, "--doctor", "--device", device).splitlines()
    return " ".join(next((line for line in lines if "same bits" in line), "").split())[:160]


# --- what has a process or a thread of its own ----------------------------------------------------


def served(device: str) -> str:
    """A request, a stream, maps of what was looked at, contrast."""
    lacking = [name for name in (*EXTRA, "pytest") if not find_spec(name)]
    if lacking:
        raise Missing(f"not installed: {', '.join(lacking)}")
    from served import Running, picture, said, text

    content = [picture(1), text(ABOUT)]
    answers = {}
    for where in (device, "cpu"):
        running = Running(load(BUNDLED, device=where, dtype="float32"), "--device", where)
        try:
            told = {"plain": said(running.ask(content, max_tokens=40))}
            chunks = [json.loads(each) for each in running.events(content, max_tokens=40)[:-1]]
            deltas = [each["choices"][0]["delta"] for each in chunks if each["choices"]]
            told["stream"] = "".join(delta.get("content") or "" for delta in deltas)
            (choice,) = running.ask(content, look=True, max_tokens=40)["choices"]
            told["look"] = [word["text"] for word in choice["look"]["words"]]
            for name in ("vcd", "ritual", "m3id"):
                told[name] = said(
                    running.ask(content, contrast={"method": name}, seed=1, max_tokens=40)
                )
        finally:
            running.close()
        answers[where] = told
    expect(answers[device] == answers["cpu"], answers[device], answers["cpu"])
    return f"{len(answers['cpu'])} kinds of requests"


def finetuned(device: str, folder: Path, learn: str) -> str:
    """A short training: its loss is finite and falls, and what it learnt opens on the device."""
    rows, out = folder / f"{learn}.json", folder / learn
    rows.write_text(json.dumps([
        {"id": number, "image": picture.name, "conversations": [
            {"from": "human", "value": "<image>\nWho painted this?"},
            {"from": "gpt", "value": f"Number {number}."},
        ]}
        for number, picture in enumerate(PICTURES)
    ]), encoding="utf-8")  # fmt: skip
    speed = ("--rate", "1e-2", "--rank", 8) if learn == "lora" else ("--heads", 2)
    door("finetune", BUNDLED, rows, "--images", BUNDLED, "--out", out, "--learn", learn, *speed,
         "--batch", 3, "--accumulate", 1, "--updates", UPDATES, "--device", device, "-q")  # fmt: skip
    lines = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    told = f"loss {losses[0]:.3f}, after {len(losses)} updates {losses[-1]:.3f}"
    good = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    expect(good and len(losses) == UPDATES, told, f"{UPDATES} losses that fall")
    opened = ("--adapter", out) if learn == "lora" else ("--draft", f"medusa:{out}")
    answer = door("generate", *ASKED, *opened, *on(device)).strip()
    return f"{told}; {answer[:60]!r}"


def torchrun(device: str, *what: object) -> str:
    """torchrun with one process, whose answer must be the CPU's."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    command = [sys.executable, *launch, *map(str, what)]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise Wrong(f"did not end within {PATIENCE} s") from None
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if "rror" in line] or [
            ended.stderr[-250:]
        ]
        raise Wrong(f"ended with {ended.returncode}: {lines[0].strip()[:250]}")
    right = door("generate", *ASKED, *CPU, "-q").strip()
    return expect(ended.stdout.strip() == right, ended.stdout.strip(), right)
