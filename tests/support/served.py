"""A server of the bundled model in a thread of the tests' process, and what one asks it."""

import base64
import contextlib
import http.client
import json
import socket
import threading
from dataclasses import replace

import pytest
from paths import ROOT
from waiting import PATIENCE, wait_until

from minillava.serve.flags import make_parser
from minillava.serve.run import listen

serving, application, services, completions = (
    pytest.importorskip(f"minillava.serve.{name}", reason="the extra [serve] is not installed")
    for name in ("server", "app", "service", "completions")
)

SHAPES = ROOT / "weights" / "shapes"
LONG = {"min_tokens": 900, "max_tokens": 900}
NAMES = ("--served-model-name", "shapes", "--served-model-name", "small")


class Running:
    """A server in a thread of this process: with the door's flags, and settings that replace what
    these say."""

    def __init__(self, assistant, *flags, **settings):
        args = make_parser().parse_args(["--slots", "4", *NAMES, *flags])
        self.engine = serving.start_engine(args, assistant)
        given = serving.read_settings(args, "shapes", "127.0.0.1", [])
        service = services.Service(assistant, self.engine, replace(given, **settings))
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        config = serving.configure(application.build(service), 5)
        self.server = serving.Server(config, self.engine, 5, "somewhere")
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )
        self.thread.start()
        wait_until(lambda: self.server.started)

    def close(self) -> None:
        self.engine.drain(0)
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        self.engine.join(PATIENCE)
        self.listener.close()
        assert not self.thread.is_alive() and not self.engine.is_alive()

    def send(self, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
        """Status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            if body is not None:
                headers = {"content-type": "application/json", **headers}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def chat(self, messages, **options) -> tuple[int, dict]:
        status, _, body = self.send(
            "POST", "/v1/chat/completions", {"messages": messages, **options}
        )
        return status, json.loads(body)

    def ask(self, content, **options) -> dict:
        status, answer = self.chat([{"role": "user", "content": content}], **options)
        assert status == 200, answer
        return answer

    def events(self, content, **options) -> list:
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **options}
        status, headers, raw = self.send("POST", "/v1/chat/completions", body)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert raw.endswith(b"\n\n") and b"\r" not in raw
        lines = raw.decode().removesuffix("\n\n").split("\n\n")
        lines = [line for line in lines if line != ": ping"]  # where this machine stood still
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line.removeprefix("data: ") for line in lines]


def idle(running) -> bool:
    """Whether nobody waits and no slot is in use; asked in the order in which requests pass."""
    return not running.engine.waiting and not running.engine.running


def answered(running, question: str, **options) -> str:
    """An answer of a server that hangs up on who is slow, asked again where this machine was: where
    no answer comes at all, the last try says so."""
    for _ in range(50):
        with contextlib.suppress(ConnectionError):
            return said(running.ask(question, **options))
    return said(running.ask(question, **options))


def hung_up(peer: socket.socket) -> bool:
    """Waits for the end of a connection, be it that what was sent into it came after its end."""
    with contextlib.suppress(ConnectionError):
        return peer.recv(100) == b""
    return True


def picture(number: int) -> dict:
    content = base64.b64encode((SHAPES / f"example-{number}.png").read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def said(answer: dict, i: int = 0) -> str:
    return answer["choices"][i]["message"]["content"]


class Streaming:
    """A request whose answer is read as one likes."""

    def __init__(self, running, options, stream=True):
        self.socket = socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
        body = {"messages": [{"role": "user", "content": "What is a ring?"}], "stream": stream}
        self.socket.sendall(raw_request(json.dumps({**body, **options}).encode()))
        self.got = b""

    def read_until(self, ending: bytes) -> bool:
        while ending not in self.got:
            more = self.socket.recv(65536)
            if not more:
                return False
            self.got += more
        return True

    def close(self) -> None:
        self.socket.close()


def raw_request(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
