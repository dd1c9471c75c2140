"""serve: whole answers over HTTP, one client and several at once, and how long a late client waits for
its first token."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from bench_parts.clock import Timing, take_turns

ROOT = Path(__file__).resolve().parents[2]
STREAMS = 4
QUESTION = "What is at the top of the picture, and what is at its bottom right? " * 3

numbers = count()  # no two questions begin alike: each prompt is read whole


def serve(
    folder: Path, dtype: str, tokens: int, rounds: int, others: dict[str, str]
) -> dict[str, Timing]:
    """Seconds of each variant, of our server with as many slots as streams, and of others by name and
    address."""
    with started(folder, dtype) as (own, process):
        variants = {}
        for name, url in {"minillava": own, **others}.items():
            ask = partial(stream, url, tokens)
            variants |= {
                f"{name}: 1 stream, per token": partial(together, ask, 1, tokens),
                f"{name}: {STREAMS} streams, per token": partial(together, ask, STREAMS, tokens),
                f"{name}: to the first token": partial(first_token, ask),
                f"{name}: to the first token beside {STREAMS} streams": partial(late, ask),
            }
        return take_turns(variants, rounds, [process])


@contextlib.contextmanager
def started(folder: Path, dtype: str) -> Iterator[tuple[str, int]]:
    """The address of a server of ours, and its process."""
    command = [
        sys.executable, "-m", "minillava.serve", "-q", "-m", str(folder), "--port", "0",
        "--dtype", dtype, "--slots", str(STREAMS), "--context", "1024",
    ]  # fmt: skip
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


def stream(url: str, tokens: int) -> Iterator[float]:
    """Ask a question of its own; yields when each piece of the answer came."""
    parts = urlsplit(url)
    question = {"role": "user", "content": f"{next(numbers)}. {QUESTION}"}
    lengths = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0}
    body = json.dumps({"messages": [question], "stream": True, "logprobs": True, **lengths})
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    with contextlib.closing(connection):
        head = {"Content-Type": "application/json"}
        connection.request("POST", f"{parts.path}/chat/completions", body, head)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{url}: {answer.status} {answer.read().decode()[:300]}")
        for line in answer:
            if line.startswith(b"data: {") and b'"logprob":' in line.replace(b'": ', b'":'):
                yield time.perf_counter()


def together(ask: Callable[[], Iterator[float]], streams: int, tokens: int) -> float:
    """Seconds per token of all streams, from the first question sent to the last answer's end."""
    made: list[int] = []
    threads = [
        threading.Thread(target=lambda: made.append(sum(1 for _ in ask()))) for _ in range(streams)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(made) < streams or min(made) < tokens - 1:  # an end token has no log-probability
        raise RuntimeError(f"expected {streams} answers of {tokens} tokens, found {made}")
    return seconds / sum(made)


def first_token(ask: Callable[[], Iterator[float]]) -> float:
    began = time.perf_counter()
    made = ask()
    seconds = next(made) - began
    for _ in made:
        pass
    return seconds


def late(ask: Callable[[], Iterator[float]]) -> float:
    """To the first token of a client that comes when every slot has just begun an answer."""
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
    seconds = first_token(ask)
    for thread in threads:
        thread.join()
    return seconds


def serve_table(found: dict[str, Timing]) -> str:
    lines = ["| | median | tokens/s | spread | others |", "|---|---:|---:|---:|---:|"]
    for name, timing in found.items():
        rate = f"{1 / timing.median:.1f}" if name.endswith("per token") else ""
        seconds = f"{1e3 * timing.median:.1f} ms" if rate else f"{timing.median:.2f} s"
        others = f"{max(timing.others):.2f}"
        lines.append(f"| {name} | {seconds} | {rate} | ±{timing.spread:.0%} | {others} |")
    return "\n".join(lines)
