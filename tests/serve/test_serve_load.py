"""The server under load and faults: few of each by default, all of them in .ci/run (`slow`).

What is drawn at random is drawn by a seed, and what fails is printed whole.
"""

import base64
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from commands import environment
from served import (
    LONG,
    SHAPES,
    Running,
    Streaming,
    answered,
    completions,
    hung_up,
    idle,
    picture,
    raw_request,
    said,
    serving,
    text,
)
from waiting import PATIENCE, wait_until

import minillava
from minillava.fast.row_by_row import keep_bits

pytestmark = pytest.mark.parity  # the mark of what needs an extra


def few_and_all(few: object, many: object):
    """A test twice: with few by default, with all in .ci/run."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


QUESTIONS = [
    "How many shapes are there?", "Where is the ring?", "Is it red?", "Describe this image.",
    "What is at the bottom right?", "Please describe this image in detail.", "What is a ring?",
]  # fmt: skip
OPTIONS = [
    {},
    {"max_new_tokens": 3},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_p": 0.9, "seed": 8},
    {"stop": ["ring", "red"]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


PRECISIONS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4")]


@few_and_all(16, 200)
def test_every_answer_is_the_one_asked_alone(shared, assistant, count):
    """Rows join and leave, prompts are read in pieces and begin with what others left: an answer
    would have words of another, or another one's picture, seed or stop text. Half are streams."""
    ask_at_once(shared, assistant, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(24, marks=pytest.mark.numeric), 200])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(filter(None, p)))
def test_with_same_bits_every_answer_is_the_one_asked_alone(precision, count):
    """In these precisions two tokens are often as likely, so that who shares a step would choose
    words; --same-bits promises that nobody does. The few are for other processors."""
    dtype, kind = precision
    assistant = minillava.load(SHAPES, device="cpu", dtype=dtype, quantize=kind)
    keep_bits(assistant.model)
    running = Running(assistant)
    try:
        ask_at_once(running, assistant, count)
    finally:
        running.close()


def ask_at_once(running, assistant, count: int) -> None:
    """Ask as 12 clients, and compare with what the model says alone."""
    chance = random.Random(count)
    cases = [
        (chance.choice([None, 1, 2, 3]), chance.choice(QUESTIONS), chance.choice(OPTIONS), i % 2)
        for i in range(count)
    ]
    found: dict[int, str] = {}

    def ask(first: int) -> None:
        for i in range(first, count, 12):
            number, question, options, streams = cases[i]
            parts = [text(question)] if number is None else [picture(number), text(question)]
            given = dict(options)
            if "max_new_tokens" in given:
                given["max_tokens"] = given.pop("max_new_tokens")
            if streams:
                *events, _ = running.events(parts, **given)
                deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
                found[i] = "".join(delta.get("content", "") for delta in deltas)
            else:
                found[i] = said(running.ask(parts, **given))

    in_threads(ask, range(12))
    alone: dict[str, str] = {}  # many ask the same
    for i, (number, question, options, _) in enumerate(cases):
        path, asked = number and SHAPES / f"example-{number}.png", str(cases[i][:3])
        if asked not in alone:
            alone[asked] = assistant.ask(path, question, **options)
        assert found[i] == alone[asked], cases[i]


def in_threads(work, items) -> None:
    threads = [threading.Thread(target=work, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


# --- what is malformed ----------------------------------------------------------------------------


def good(chance: random.Random) -> dict:
    """A request with which nothing is wrong."""
    return {
        "model": "shapes",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [text(chance.choice(QUESTIONS)), picture(1)]},
        ],
        "max_tokens": 1,
        "temperature": 1,
        "seed": 1,
        "stop": ["."],
        "stream": False,
        "logprobs": True,
        "top_logprobs": 2,
    }


PNG = (SHAPES / "example-1.png").read_bytes()
PICTURES = [
    b"", b"no picture", PNG[: len(PNG) // 2], PNG[:8], b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\x03\x04" + b"\0" * 40, b"\xff\xd8\xff\xe0",
    b"BM" + b"\xff" * 60, b"RIFF\xff\xff\xff\xffWEBPVP8 ", zlib.compress(b"x" * 100),
]  # fmt: skip
ADDRESSES = [
    "http://127.0.0.1:1/x.png", "file:///etc/passwd", "/etc/passwd", "data:", "", "data:,x",
    "data:image/png;base64,@@@", "data:image/png;base64,QUJD ", "javascript:alert(1)", "x" * 5000,
]  # fmt: skip
VALUES: list = [
    None, True, -1, 0, 1e308, -(2**70), 2**70, "", "x", "\0", [], [[]], {}, {"a": 1}, [None], [1],
    ["x"] * 2000, "y" * 70_000,
]  # fmt: skip


def malformed(chance: random.Random) -> bytes:
    """A good request that is broken somewhere. Some of the mutations leave it good."""
    body = good(chance)
    kind = chance.randrange(7)
    if kind == 0:  # cut off
        whole = json.dumps(body).encode()
        return whole[: chance.randrange(len(whole))]
    if kind == 1:  # a byte changed
        whole = bytearray(json.dumps(body).encode())
        whole[chance.randrange(len(whole))] = chance.randrange(256)
        return bytes(whole)
    if kind == 2:  # another value
        body[chance.choice([*body, "n", "tools", "min_p", "stream_options"])] = chance.choice(
            VALUES
        )
    elif kind == 3:  # a name that nobody knows
        chance.choice([body, *body["messages"]])[f"x{chance.random()}"] = chance.choice(VALUES)
    elif kind == 4:  # another value in a message, or a message too many
        messages = body["messages"]
        if chance.random() < 0.5:
            messages[chance.randrange(2)][chance.choice(["role", "content"])] = chance.choice(
                VALUES
            )
        else:
            messages += [chance.choice([*messages, {}, None, 3])] * chance.choice([1, 2000])
    elif kind == 5:  # something else as a picture
        content = base64.b64encode(chance.choice(PICTURES)).decode()
        address = chance.choice([f"data:image/png;base64,{content}", *ADDRESSES])
        shown = chance.choice([{"url": address}, address, {"url": address, "detail": "huge"}, {}])
        body["messages"][1]["content"][1]["image_url"] = shown
    else:  # deep, or not a number
        deep = b"[" * 5000 + b"]" * 5000
        return json.dumps(body).encode().replace(b'"seed": 1', b'"seed": ' + chance.choice(
            [deep, b"NaN", b"-Infinity", b"1e999", b"0x1", b'"\\ud800"', b"1" * 400]
        ))  # fmt: skip
    return json.dumps(body).encode()


@few_and_all(150, 1000)
def test_malformed_requests_are_the_clients_fault(shared, count, caplog):
    """One of them would be answered with 500, with a body that no client can show, or take the
    server down."""
    chance, statuses = random.Random(5), Counter()
    for _ in range(count):
        body = malformed(chance)
        status, headers, answer = shared.send("POST", "/v1/chat/completions", body)
        statuses[status] += 1
        assert status in (200, 400, 404, 413, 415), (status, body[:500], answer)
        assert headers["content-type"] == "application/json", body[:500]
        if status != 200:
            error = json.loads(answer)["error"]
            assert {*error} == {"message", "type", "param", "code"} and error["code"], body[:500]
            assert "Traceback" not in error["message"] and len(error["message"]) < 1000
    assert statuses[400] > count / 2, statuses
    assert not [record for record in caplog.records if record.exc_info]
    assert said(shared.ask("What is a ring?", max_tokens=2))


@pytest.mark.slow
def test_what_the_schema_allows_is_answered(shared, tmp_path):
    """A body that the types allow would meet code that does not expect it."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    (tmp_path / "openapi.json").write_bytes(shared.send("GET", "/openapi.json")[2])
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json"),
        "--url", f"http://127.0.0.1:{shared.port}", "--max-examples", "150", "--seed", "1",
        "--checks", "not_a_server_error,content_type_conformance,response_schema_conformance",
        "--no-color", "--request-timeout", str(PATIENCE), "--suppress-health-check", "too_slow",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# --- who hangs up, and who is slow ----------------------------------------------------------------


def cancelled(running) -> float:
    found = running.send("GET", "/metrics")[2].decode()
    return float(re.search(r"^minillava_cancelled_total (.+)$", found, re.MULTILINE)[1])


@few_and_all(10, 200)
def test_who_hangs_up_frees_the_slot(start, count):
    """Before the first token, while its prompt is read, in the middle of an answer, in the middle of
    its body, streamed or not: each leaves nothing behind."""
    running = start("--slots", "2", "--prefill-chunk", "16")
    chance, left = random.Random(1), 0
    for i in range(count):
        stream = bool(i % 2)
        if chance.random() < 0.2:
            with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as half:
                half.sendall(raw_request(b"x" * 1000)[:-500])
            continue
        one = Streaming(running, LONG, stream)
        if stream and chance.random() < 0.7:
            assert one.read_until(b'"content":"')
        elif chance.random() < 0.5:
            wait_until(lambda: running.engine.running)
        one.close()
        left += 1
    wait_until(lambda: idle(running) and not running.engine.answers)
    assert said(running.ask("What is a ring?", max_tokens=3))
    assert 0 < cancelled(running) <= left
    found = running.send("GET", "/metrics")[2].decode()
    route = r'minillava_requests_total\{route="/v1/chat/completions",status="500"\}'
    assert not re.search(route, found)


RAW = [
    (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", (400, 431)),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", (400,)),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", (400,)),
    (b"GET /health HTTP/1.1\r\n\r\n", (400,)),
    (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", (400,)),
    (b"GET /health HTTP/1.1\r\nHost: a/b?c\r\n\r\n", (400,)),
    (b"GET http://evil.example/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (200, 400, 404)),
    (b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n", (200,)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    (b"nonsense\r\n\r\n", (400,)),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (404,)),
    (b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", (200,)),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "statuses"), RAW, ids=lambda value: str(value)[:40])
def test_what_is_no_proper_http(shared, sent, statuses):
    """Ambiguous lengths and names let one request pass for two, or for another host's."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=PATIENCE) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert int(answer.split()[1]) in statuses, answer[:300]
    assert b"root:" not in answer


@few_and_all(10, 50)
def test_slow_peers_keep_nobody_waiting(start, monkeypatch, count):
    """A few silent connections would fill the server, and stay for ever."""
    monkeypatch.setattr(serving, "HEAD", 0.5)
    running = start()
    slow = [
        socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
        for _ in range(count)
    ]
    for i, each in enumerate(slow):
        with suppress(ConnectionError):  # where this machine was slow
            each.sendall(b"GET /health HTTP/1.1\r\nHost: 1"[: i % 30])
    assert answered(running, "What is a ring?", max_tokens=3)
    for each in slow:
        assert hung_up(each)
        each.close()


@few_and_all(1, 20)
def test_who_does_not_read_is_given_up(start, monkeypatch, count):
    """An answer that nobody reads would be held in memory, and its slot with it."""
    monkeypatch.setattr(serving, "SEND", 0.3)
    monkeypatch.setattr(completions, "PING", 0.001)
    running, stalled = start("--slots", "1"), []
    running.listener.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 8192
    )  # of its connections, too
    body = {"messages": [{"role": "user", "content": "What is a ring?"}], "stream": True}
    sent = raw_request(json.dumps({**body, **LONG, "logprobs": True, "top_logprobs": 20}).encode())
    for number in range(count):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        each.connect(("127.0.0.1", running.port))
        each.sendall(sent)
        stalled.append(each)
        wait_until(lambda number=number: cancelled(running) == number + 1, pause=0.05)
    wait_until(lambda: idle(running))
    for each in stalled:
        each.close()


# --- the end, and memory --------------------------------------------------------------------------


def door(*words: object) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "minillava.serve", "-m", SHAPES, "-q", "--port", "0", *map(str, words)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    return process, int(re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", line)[1])


class At:
    def __init__(self, port: int):
        self.port = port


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(
    ("slots", "waiting", "number", "status"),
    [
        (2, 1, signal.SIGINT, 130),
        pytest.param(8, 4, signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_at_the_end_streams_finish_and_who_waits_is_told(slots, waiting, number, status):
    """A server that goes down would cut streams off, which clients then ask again; uvicorn alone
    would end with the signal's status."""
    process, port = door("--slots", slots, "--grace", PATIENCE)
    try:
        long = {"max_tokens": 60, "min_tokens": 60}
        running = [Streaming(At(port), long) for _ in range(slots)]
        for each in running:
            assert each.read_until(b'"content":"')
        later = [Streaming(At(port), {"max_tokens": 2}) for _ in range(waiting)]
        for each in later:
            assert each.read_until(b"\r\n\r\n")
        process.send_signal(number)
        for each in running:
            assert each.read_until(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in each.got
        for each in later:
            assert each.read_until(b"0\r\n\r\n")
            # it waited, or a slot was free before the signal came
            assert (b'"code":"shutting_down"' in each.got) != (b"[DONE]" in each.got)
        for each in (*running, *later):
            each.close()
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, err.strip()) == (status, "")


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
@pytest.mark.slow
def test_memory_and_files_stay_as_they_are_over_1000_requests(tmp_path):
    """Every request would leave a little behind: a tensor, a connection, a thread, a file."""
    process, port = door("--slots", 2, "--dtype", "float32")
    proc, at = Path(f"/proc/{process.pid}"), At(port)

    def ask(times: int, seed: int) -> None:
        chance = random.Random(seed)
        for i in range(times):
            number = chance.randrange(50)
            content = base64.b64encode(PNG + bytes([number])).decode()
            shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}
            parts = [shown, text(chance.choice(QUESTIONS))]
            options = {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}
            one = Streaming(at, options, stream=bool(i % 2))
            if chance.random() < 0.7:
                assert one.read_until(b"[DONE]" if i % 2 else b'"minillava"')
            one.close()

    def both(seed: int) -> None:
        """Two clients, since there are two slots."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ask, (500, 500), (seed, seed + 1)))

    def idle() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as asked:
            asked.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return b'"running":0,"waiting":0' in b"".join(iter(lambda: asked.recv(4096), b""))

    def counts() -> tuple[int, int]:
        return len([*(proc / "fd").iterdir()]), len([*(proc / "task").iterdir()])

    try:
        both(3)  # until the caches, and the memory that each thread keeps for itself, are full
        wait_until(idle)
        held, grown = counts(), []
        # What is left behind every time makes it grow every time; the gaps that a thread's memory
        # has do so now and then.
        for seed in (5, 7, 9):
            before = resident(process.pid)
            both(seed)
            wait_until(idle)
            wait_until(lambda: counts()[0] <= held[0])  # connections that are still being closed
            grown.append(resident(process.pid) - before)
            if grown[-1] < min(20e6, 0.05 * before):
                break
        else:
            pytest.fail(f"{grown} bytes more after 1,000 requests each")
        assert counts()[1] <= held[1] + 8  # a pool of threads grows once
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0 and not os.listdir(tmp_path)
