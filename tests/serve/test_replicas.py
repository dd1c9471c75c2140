"""The server in two copies behind Ray Serve: the example of the page, as it stands there."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from commands import environment
from paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("ray", "fastapi", "starlette"))),
        reason="pip install 'minillava[serve]' 'ray[serve]'",
    ),
]
PAGE = ROOT / "minillava" / "serve" / "REPLICAS.md"


@pytest.fixture(scope="module")
def port():
    """Where the page's example listens."""
    (example,) = re.findall(
        r"<!-- replicas -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    assert example.count("8000") == 1
    place = tempfile.mkdtemp()  # a socket's path has 100 characters
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": place}
    own |= {"RAY_USAGE_STATS_ENABLED": "0"}
    with open(f"{place}/said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", example.replace("8000", str(number))],
            cwd=ROOT, env=environment(**own), stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 150
        while True:
            assert process.poll() is None and time.monotonic() < end, Path(
                f"{place}/said"
            ).read_text()
            with suppress(OSError):
                ask(number, "What is a ring?")
                break
            time.sleep(0.2)
        yield number
    finally:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


def ask(port: int, question: str) -> dict:
    body = json.dumps({"messages": [{"role": "user", "content": question}], "max_tokens": 12})
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        body.encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_two_replicas_give_one_answer(port):
    """A replica with another model, or none, would answer some of the requests."""
    told = [ask(port, "What is a ring?") for _ in range(40)]
    assert len({each["choices"][0]["message"]["content"] for each in told}) == 1
    assert len({each["system_fingerprint"] for each in told}) == 1
    # the fixture asked one copy; the other read the whole prompt once
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in told]
    assert cached.count(0) == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
        assert answer.status == 200
