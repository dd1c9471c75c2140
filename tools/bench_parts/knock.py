"""Ask an address again and again over several connections; bench.py starts this as a process, so
that its interpreter does not bound what it measures.

    python tools/bench_parts/knock.py http://ADDRESS/PATH CONNECTIONS SECONDS

Each connection stays open and has one request at a time. Prints a line of JSON: how many answers
came, from when to when (monotonic) in how many seconds, and within how many half of them and 99 of 100 had come. Standard library
alone. An answer that is not 200, and a connection that ends, are errors.
"""

import asyncio
import json
import re
import sys
import time
from urllib.parse import urlsplit

HEAD = re.compile(rb"HTTP/1\.1 (\d+) .*?\r\n\r\n", re.DOTALL)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """Sends the next request when the answer to the last one is complete, until `end`."""

    def __init__(self, request: bytes, end: float, done: asyncio.Future):
        self.request, self.end, self.done = request, end, done
        self.seconds: list[float] = []  # of each answer
        self.got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.sent = time.monotonic()
        self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.got += data
        if (head := HEAD.match(self.got)) is None:
            return
        length = LENGTH.search(head[0])
        if head[1] != b"200" or length is None:
            self.fail(head[0].decode("latin-1").partition("\r\n")[0])
        elif len(self.got) >= head.end() + int(length[1]):
            self.got = self.got[head.end() + int(length[1]) :]
            now = time.monotonic()
            self.seconds.append(now - self.sent)
            if now < self.end:
                self.ask()
            elif not self.done.done():
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"the connection ended ({exc})")

    def fail(self, told: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"expected an answer with 200, found: {told}"))


async def knock(url: str, connections: int, seconds: float) -> dict[str, float]:
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    began = time.monotonic()  # a clock that all processes share
    opened = []
    for _ in range(connections):
        one = Connection(request, began + seconds, loop.create_future())
        await loop.create_connection(lambda one=one: one, parts.hostname, parts.port)
        opened.append(one)
    await asyncio.gather(*(one.done for one in opened))
    ended = time.monotonic()
    each = sorted(second for one in opened for second in one.seconds)
    for one in opened:
        one.transport.close()
    half, most = each[len(each) // 2], each[int(0.99 * len(each))]
    times = {"began": began, "ended": ended, "seconds": ended - began}
    return {"answers": len(each), **times, "half": half, "most": most}


if __name__ == "__main__":
    found = asyncio.run(knock(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
    print(json.dumps(found))
