"""The server in two copies behind Ray Serve: the example of the page, as it stands there."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from commands import environment
from paths import ROOT
from waiting import PATIENCE, free_port, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("ray", "fastapi", "starlette"))),
        reason="pip install 'minillava[serve]' 'ray[serve]'",
    ),
]
PAGE = ROOT / "minillava" / "serve" / "REPLICAS.md"


@pytest.fixture(scope="module")
def started():
    """Where the page's example listens, and its first answer."""
    (example,) = re.findall(
        r"<!-- replicas -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    number, first = free_port(), []
    assert example.count("8000") == 1
    place = tempfile.mkdtemp()  # a socket's path has 100 characters
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": place}
    own |= {"RAY_USAGE_STATS_ENABLED": "0"}
    with open(f"{place}/said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", example.replace("8000", str(number))],
            cwd=ROOT, env=environment(**own), stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        assert process.poll() is None, Path(f"{place}/said").read_text()
        with suppress(OSError):
            first.append(ask(number, "What is a ring?"))
        return bool(first)

    try:
        wait_until(answers, pause=0.2)
        yield number, first[0]
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
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def cached_of(told: list[dict]) -> list[int]:
    return [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in told]


def test_two_replicas_give_one_answer(started):
    """A replica with another model, or none, would answer some of the requests."""
    port, first = started
    told = [first]

    def both() -> bool:
        """A copy reads the whole prompt once; the second may be there later than the first."""
        told.append(ask(port, "What is a ring?"))
        return cached_of(told).count(0) == 2

    wait_until(both)
    told += [ask(port, "What is a ring?") for _ in range(20)]
    assert cached_of(told).count(0) == 2
    assert len({each["choices"][0]["message"]["content"] for each in told}) == 1
    assert len({each["system_fingerprint"] for each in told}) == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE) as answer:
        assert answer.status == 200
