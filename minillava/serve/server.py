"""uvicorn, with limits on slow clients, and a shutdown that cuts no answer."""

import argparse
import logging
import signal
import socket
import sys
import threading
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from minillava.assistant import Assistant
from minillava.cli.messages import Messages
from minillava.generate.engine import Engine, is_final
from minillava.generate.speculate import EXACT
from minillava.serve.app import build
from minillava.serve.flags import PIECES, SLOTS
from minillava.serve.patience import Countdown
from minillava.serve.run import model_name
from minillava.serve.service import Service, Settings

HEAD = 10.0
"""Seconds within which a request's head arrives."""

SEND = 30.0
"""Seconds after which an answer that nobody reads is given up."""


PICTURES = 32
"""Encoded pictures that are kept: 4.7 MB each for a 7B."""

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""How this machine calls itself. Another name in Host is a page's that was led here."""


class PatientProtocol(H11Protocol):
    """A protocol that waits for the model but not for a client: one that is silent before its
    request is complete, or that stops reading, would otherwise keep its connection for ever."""

    arriving: Countdown | None = None
    stuck: Countdown | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.arriving = Countdown(HEAD, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.conn.their_state is h11.IDLE
        if not idle and self.arriving is not None:
            self.arriving.cancel()
            self.arriving = None
        elif idle and self.arriving is None and self.conn.trailing_data[0]:
            self.arriving = Countdown(HEAD, self.transport.close)  # the next has begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck = Countdown(SEND, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stuck is not None:
            self.stuck.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.arriving, self.stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """A server that says where it listens, and that lets running answers finish when it ends."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, address: str):
        super().__init__(config)
        self.engine, self.grace, self.address = engine, grace, address
        self.by = 0  # the signal that ended it

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print(f"listening on {self.address}", flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        # lifespan's shutdown would come only after the last connection has ended
        self.engine.drain(0 if self.should_exit else self.grace)
        self.by = self.by or sig
        super().handle_exit(sig, frame)


def serve(
    args: argparse.Namespace,
    assistant: Assistant,
    weights: str,
    listener: socket.socket,
    keys: list[bytes],
    messages: Messages,
) -> int:
    """Serve a model until a signal comes; returns the exit status."""
    level = logging.INFO if args.verbose else logging.ERROR
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=level)
    engine = start_engine(args, assistant)
    messages.note(memory_line(engine))
    if engine.drafts is not None:
        messages.note(drafts_line(engine))
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    settings = read_settings(args, model_name(weights), shown, keys)
    app = build(Service(assistant, engine, settings))
    server = Server(configure(app, args.grace), engine, args.grace, f"http://{shown}:{port}")
    return _run(server, engine, listener)


def read_settings(args: argparse.Namespace, name: str, host: str, keys: list[bytes]) -> Settings:
    """The flags, as the service reads them. name: of the model's folder. host: as a client writes
    the address."""
    return Settings(
        names=args.served_model_name or [name],
        keys=keys,
        hosts=[*HOSTS, host, *args.allowed_host],
        cors=args.cors,
        page=not args.no_page,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        system=args.system,
        max_body=args.max_body << 20,
        body_timeout=args.body_timeout,
        max_pixels=args.max_pixels * 1_000_000,
        stall=args.stall,
    )


def start_engine(args: argparse.Namespace, assistant: Assistant) -> Engine:
    """The engine that the flags ask for, running."""
    on_gpu = assistant.model.language_model.embed_tokens.weight.device.type != "cpu"
    engine = Engine(
        assistant.model,
        assistant.tokenizer,
        slots=args.slots or SLOTS[on_gpu],
        waiting=args.queue,
        piece=args.prefill_chunk or PIECES[on_gpu],
        pictures=PICTURES,
        capacity=args.context,
        reuse=not args.no_reuse,
        drafts=assistant.drafts(args.draft, args.draft_tokens),
    )
    for slot in engine.slots:
        for tensor in (*slot.cache.keys, *slot.cache.values):
            tensor.zero_()  # the system gives memory only when it is written to: now, or an error
    engine.start()
    return engine


def configure(app: Any, grace: int) -> uvicorn.Config:
    """uvicorn's settings: h11, in which our limits are, and at the end as long as answers take."""
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=grace + 5,
        h11_max_incomplete_event_size=16_384,
    )


def _run(server: Server, engine: Engine, listener: socket.socket) -> int:
    """Run until a signal comes, or until the engine ends by itself; returns the exit status."""

    def watch() -> None:
        engine.join()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    # uvicorn raises the signal again that ended it, and for SIGTERM nobody would hear it
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.drain(0)
        engine.join(60)
    if engine.state == "failed":
        if engine.error is not None and is_final(engine.error):
            raise engine.error  # which says everything
        raise ValueError("the model's thread has ended with an error, which is told above")
    return 130 if server.by == signal.SIGINT else 0


def drafts_line(engine: Engine) -> str:
    """A line about the guesses that an engine with drafts makes."""
    drafts: Any = engine.drafts
    return f"guesses by {drafts.drafter.kind}{EXACT[drafts.is_exact(engine.model)]}"


def memory_line(engine: Engine) -> str:
    """A line about the memory of slots, pictures and weights."""
    model, cache = engine.model, engine.slots[0].cache
    slots = len(engine.slots) * sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    table = model.language_model.embed_tokens.weight
    picture = model.config.tokens_per_image * table.shape[1] * table.element_size()
    bound = "at least" if model.config.grid else "up to"  # a picture may have many tiles
    return (
        f"{len(engine.slots)} slots of {engine.capacity} positions take {slots / 2**30:.2f} GiB, "
        f"pictures {bound} {engine.most_pictures * picture / 2**20:.0f} MiB, "
        f"weights {weights / 2**30:.2f} GiB"
    )
