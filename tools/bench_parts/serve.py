"""serve: whole answers over HTTP, one client and several at once, beside the same answers without
HTTP; how long a late client waits for its first token; and a small request, asked again and again."""

import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bench_parts.clock import Timing, take_turns
from bench_parts.rows import finished
from minillava.cli.messages import Messages
from minillava.cli.opening import open_assistant

if TYPE_CHECKING:  # of the extra [serve], which other commands do without
    from minillava.serve.service import Service

ROOT = Path(__file__).resolve().parents[2]
KNOCK = Path(__file__).with_name("knock.py")
STREAMS = 4
CONNECTIONS, SECONDS = 32, 3.0  # of those who ask for /health meanwhile
QUESTION = "What is at the top of the picture, and what is at its bottom right? " * 3

numbers = count()  # no two questions begin alike: each prompt is read whole


def serve(
    folder: Path, dtype: str, tokens: int, rounds: int, others: dict[str, str], both: bool
) -> dict[str, Timing]:
    """Seconds of each variant, of our server with as many slots as streams, and of others by name
    and address. both: without HTTP, too, by a second copy of the model."""
    loads: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        own, process = stack.enter_context(started(folder, dtype))
        variants = {}
        for name, url in {"minillava": own, **others}.items():
            variants |= whole(name, partial(stream, url, tokens), tokens)
            if both and name == "minillava":
                ask = partial(without_http, stack.enter_context(engine(folder, dtype)), tokens)
                variants |= whole("without HTTP", ask, tokens)
        for name, url in {"minillava": own, **others}.items():
            ask = partial(stream, url, tokens)
            variants |= {
                f"{name}: to the first token": partial(first_token, ask),
                f"{name}: to the first token beside {STREAMS} streams": partial(late, ask),
            }
        health = f"minillava: /health by {CONNECTIONS} connections beside {STREAMS} streams"
        address = own.removesuffix("/v1") + "/health"
        knocking = partial(knock, partial(stream, own, tokens), address, loads)
        found = take_turns(variants | {f"{health}, per request": knocking}, rounds, [process])
    taken = found[f"{health}, per request"].others
    for name, key in (
        ("half of them within", "half"),
        ("99 of 100 within", "most"),
        ("the streams meanwhile, per token", "token"),
    ):  # the first load is to warm up
        found[f"{health}, {name}"] = Timing([load[key] for load in loads[1:]], taken)
    return found


def whole(
    name: str, ask: Callable[[], Iterator[float]], tokens: int
) -> dict[str, Callable[[], float]]:
    return {
        per_token(name, streams): partial(together, ask, streams, tokens)
        for streams in (1, STREAMS)
    }


def per_token(name: str, streams: int) -> str:
    return f"{name}: {streams} stream{'s' * (streams > 1)}, per token"


def flags(folder: Path, dtype: str) -> list[str]:
    """Of a server of ours."""
    return [
        "-q", "-m", str(folder), "--port", "0", "--dtype", dtype, "--slots", str(STREAMS),
        "--context", "1024",
    ]  # fmt: skip


@contextlib.contextmanager
def started(folder: Path, dtype: str) -> Iterator[tuple[str, int]]:
    """The address of a server of ours, and its process."""
    command = [sys.executable, "-m", "minillava.serve", *flags(folder, dtype)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"listening on (http://\S+)", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield found[1] + "/v1", process.pid
    finally:
        process.terminate()
        process.communicate()  # which closes the pipe, too


@contextlib.contextmanager
def engine(folder: Path, dtype: str) -> Iterator["Service"]:
    """What such a server has behind HTTP, in this process."""
    from minillava.serve.flags import make_parser
    from minillava.serve.server import read_settings, start_engine
    from minillava.serve.service import Service

    args = make_parser().parse_args(flags(folder, dtype))
    assistant = open_assistant(args, str(folder), Messages(args.verbose, args.quiet))
    running = start_engine(args, assistant)
    try:
        yield Service(assistant, running, read_settings(args, folder.name, "127.0.0.1", []))
    finally:
        running.drain(0)
        running.join()


def body(tokens: int) -> bytes:
    """A question of its own."""
    question = {"role": "user", "content": f"{next(numbers)}. {QUESTION}"}
    lengths = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    told = {"stream": True, "logprobs": True, "top_logprobs": 1}  # llama.cpp would tell 20
    return json.dumps({"messages": [question], **told, **lengths}).encode()


def stream(url: str, tokens: int) -> Iterator[float]:
    """Ask over HTTP; yields when each piece of the answer came."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    with contextlib.closing(connection):
        head = {"Content-Type": "application/json"}
        connection.request("POST", f"{parts.path}/chat/completions", body(tokens), head)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {answer.read().decode()[:300]}")
        for line in answer:
            if line.startswith(b"data: {") and b'"logprob":' in line.replace(b'": ', b'":'):
                yield time.monotonic()


def without_http(service: "Service", tokens: int) -> Iterator[float]:
    """Ask the engine itself; yields when each token came."""
    from minillava.generate.engine import Failed
    from minillava.serve.protocol import ChatRequest, read_request

    events: SimpleQueue = SimpleQueue()
    asked = read_request(body(tokens), ChatRequest)
    service.submit(service.prepare(asked, lambda number, event: events.put(event)))
    reason = None
    while reason is None:
        event = events.get()
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        reason = event.finish_reason
        yield time.monotonic()


def together(ask: Callable[[], Iterator[float]], streams: int, tokens: int) -> float:
    """Seconds per token of all streams, from the first question sent to the last answer's end."""
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda: made.append(sum(1 for _ in ask()))) for _ in range(streams)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    if len(made) < streams or min(made) < tokens - 1:  # an end token has no log-probability
        raise RuntimeError(f"expected {streams} answers of {tokens} tokens, found {made}")
    return seconds / sum(made)


def first_token(ask: Callable[[], Iterator[float]]) -> float:
    began = time.monotonic()
    made = ask()
    seconds = next(made) - began
    for _ in made:
        pass
    return seconds


def late(ask: Callable[[], Iterator[float]]) -> float:
    """To the first token of a client that comes when every slot has just begun an answer."""
    with busy(ask):
        return first_token(ask)


@contextlib.contextmanager
def busy(ask: Callable[[], Iterator[float]]) -> Iterator[None]:
    """STREAMS clients whose answers have just begun; at the end, they are waited for."""
    begun = threading.Barrier(STREAMS + 1, timeout=600)

    def hold() -> None:
        made = ask()
        next(made)
        begun.wait()
        for _ in made:
            pass

    threads = [threading.Thread(target=hold) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait()
    yield
    for thread in threads:
        thread.join()


def knock(ask: Callable[[], Iterator[float]], url: str, loads: list[dict[str, float]]) -> float:
    """Seconds per answer of an address that is asked by many while streams run. `loads` gets what
    knock.py found, and the seconds per token of all streams meanwhile."""
    over, made = threading.Event(), []
    command = [sys.executable, str(KNOCK), url, str(CONNECTIONS), str(SECONDS)]
    with busy(partial(again, ask, over, made)):
        try:
            load = json.loads(finished(command, dict(os.environ)))
        finally:
            over.set()
    tokens = sum(load["began"] < each <= load["ended"] for each in made)
    load["token"] = load["seconds"] / tokens if tokens else float("inf")
    loads.append(load)
    return load["seconds"] / load["answers"]


def again(
    ask: Callable[[], Iterator[float]], over: threading.Event, made: list[float]
) -> Iterator[float]:
    """One answer after the other, until `over` is set; on the last one the client hangs up. made:
    gets when each token came."""
    while not over.is_set():
        with contextlib.closing(ask()) as answer:  # type: ignore[type-var]
            for each in answer:
                made.append(each)
                yield each
                if over.is_set():
                    return


def serve_table(found: dict[str, Timing]) -> str:
    lines = ["| | median | a second | spread | others |", "|---|---:|---:|---:|---:|"]
    for name, timing in found.items():
        rate = f"{1 / timing.median:.1f}" if ", per " in name else ""
        short = timing.median < 1
        seconds = f"{1e3 * timing.median:.1f} ms" if short else f"{timing.median:.2f} s"
        others = f"{max(timing.others):.2f}"
        lines.append(f"| {name} | {seconds} | {rate} | ±{timing.spread:.0%} | {others} |")
    added = [
        f"{1e3 * statistics.median(each):.2f} ms to a token of {streams} "
        f"({1e3 * min(each):.2f} to {1e3 * max(each):.2f} by round)"
        for streams in (1, STREAMS)
        if (each := added_by_http(found, streams))
    ]
    return "\n".join([*lines, *(added and ["", f"HTTP adds, by streams: {', '.join(added)}."])])


def added_by_http(found: dict[str, Timing], streams: int) -> list[float]:
    """Seconds per token of each round; none if answers without HTTP were not measured."""
    names = [per_token(name, streams) for name in ("minillava", "without HTTP")]
    if names[1] not in found:
        return []
    over, without = (found[name].seconds for name in names)
    return [a - b for a, b in zip(over, without, strict=True)]
