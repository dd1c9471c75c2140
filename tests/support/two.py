"""One model in two processes, for tests: what rank 0 of them finds.

The functions that run there stand here, since a new process has to find them by their names.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from paths import ROOT
from waiting import PATIENCE

import minillava
from minillava.chat import Conversation
from minillava.fast import parallel
from minillava.fast.quantize import quantised_kinds
from minillava.generate.engine import Engine, Request
from minillava.generate.generation import generate

SHAPES = ROOT / "weights" / "shapes"
PICTURE = SHAPES / "example-1.png"
QUESTIONS = ["How many shapes are there?", "Describe this image.", "Where is the circle?"]


def in_two(options: dict[str, Any], *bodies: Callable[..., Any]) -> list[Any]:
    """What each of `bodies` returns for the assistant of rank 0. options: of `load`."""
    return each_in_two([(SHAPES, options)], *bodies)[0]


def each_in_two(jobs: list[tuple[Path, dict[str, Any]]], *bodies: Callable[..., Any]) -> list[Any]:
    """The same for several models, one after the other in the same two processes. jobs: weights,
    and options of `load`. A hang is a failure."""
    # as torchrun does it: the two meet at a store that is there before they are
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    ports = [store.port for store in stores]
    # a fork would inherit the locks of libraries as they are
    context = multiprocessing.get_context("spawn")
    results, pids = context.Queue(), context.Array("i", 2)
    processes = [
        context.Process(target=_one_of_two, args=(rank, ports, pids, results, jobs, bodies))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        good, found = results.get(timeout=PATIENCE)
        for process in processes:
            process.join(PATIENCE)
            assert not process.is_alive(), "a process does not end"
    finally:
        for process in processes:
            process.kill()
    assert good, found
    return pickle.loads(found)  # tensors by value: their owner has ended


def _one_of_two(rank: int, ports: list[int], pids, results, jobs, bodies) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pids[rank] = os.getpid()
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    found = []
    try:
        for port, (weights, options) in zip(ports, jobs, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            assistant = minillava.load(weights, device="cpu", parallel=True, **options)
            if rank:
                parallel.follow(assistant.model.language_model)
                continue
            assistant.other = pids[1]
            found.append([body(assistant) for body in bodies])
            parallel.end_followers()
        if rank == 0:
            results.put((True, pickle.dumps(found)))
    except BaseException as error:  # told to the test
        if rank == 0:
            results.put((False, f"{type(error).__name__}: {error}"))


def everything(assistant) -> dict[str, object]:
    """Answers by every way that uses a cache in a way of its own."""
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    sampled = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    return {
        "one": assistant.ask(PICTURE, QUESTIONS[1]),
        "batch": assistant.ask(PICTURE, QUESTIONS),
        "beams": assistant.ask(PICTURE, QUESTIONS[1], num_beams=3),
        "sampled": assistant.ask(PICTURE, QUESTIONS[1], **sampled),
        "contrast": assistant.ask(PICTURE, QUESTIONS[0], contrast="vcd", seed=1),
        "tree": assistant.ask(PICTURE, QUESTIONS[1], draft="medusa"),
        "drafts": assistant.ask(PICTURE, QUESTIONS[1], draft="lookup"),
        "chat": [conversation.ask(question) for question in QUESTIONS],
        "engine": by_engine(assistant),
        "guesses": by_engine(assistant, "medusa"),
    }


LONG = "Look at it. " * 24 + QUESTIONS[0]
"""More positions than a kernel takes for quantised layers, which rounds what it multiplies."""


def of_a_relative(assistant) -> tuple[torch.Tensor, dict[str, object]]:
    """Logits of a long prompt and, of a model that is not quantised, answers by several ways."""
    ids, pixels = [assistant.tokenize(assistant.prompt(LONG))], assistant.image_processor(PICTURE)
    with torch.no_grad():
        logits = assistant.model(ids, pixels).logits
    if quantised_kinds(assistant.model):
        return logits, {}
    conversation, few = Conversation(assistant), {"max_new_tokens": 6}
    conversation.add_image(PICTURE)
    return logits, {
        "batch": assistant.ask(PICTURE, QUESTIONS, **few),
        "beams": assistant.ask(PICTURE, QUESTIONS[1], num_beams=2, **few),
        "contrast": assistant.ask(PICTURE, QUESTIONS[0], contrast="vcd", seed=1, **few),
        "drafts": assistant.ask(PICTURE, QUESTIONS[1], draft="lookup", **few),
        "chat": [conversation.ask(question, **few) for question in QUESTIONS[:2]],
    }


def by_engine(assistant, draft: str | None = None) -> list[str]:
    """All questions at once, one of them answered twice, which copies a cache. draft: guesses for
    the one that is alone at the end."""
    settings = {"slots": 3, "waiting": 3, "piece": 64, "pictures": 1}
    settings["drafts"] = assistant.drafts(draft, 4)
    engine, events = Engine(assistant.model, assistant.tokenizer, **settings), queue.Queue()
    pixels, left = assistant.image_processor(PICTURE)[0], 0
    for number, question in enumerate(QUESTIONS):
        options = [assistant.options()] * (1 + (number == 0))
        left += len(options)
        ids = assistant.tokenize(assistant.prompt(question))
        put = lambda n, event, number=number: events.put(((number, n), event))  # noqa: E731
        engine.submit(Request(ids, [(b"picture", pixels)], options, put))
    engine.start()
    texts: dict[tuple[int, int], str] = {}
    while left:
        key, event = events.get(timeout=PATIENCE)
        texts[key] = texts.get(key, "") + event.text
        left -= event.finish_reason is not None
    engine.drain(0)
    engine.join()
    return [texts[key] for key in sorted(texts)]


def logits_of(assistant) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    ids = [assistant.tokenize(assistant.prompt(QUESTIONS[0]))]
    pixels = assistant.image_processor(PICTURE)
    with torch.no_grad():
        logits = assistant.model(ids, pixels).logits
    found = generate(assistant.model, ids, pixels, max_new_tokens=3, record=("attentions",))
    scores = assistant.score(PICTURE, QUESTIONS[0], ["Two.", "Three."])
    return logits, [layer for step in found.attentions for layer in step], scores


def watched(assistant) -> str:
    pixels, ids = assistant.image_processor(PICTURE), assistant.tokenize(assistant.prompt("Why?"))
    embeds = assistant.model.splice([ids], pixels).embeds
    try:
        assistant.model.language_model(embeds, attend=lambda *_: None)
    except ValueError as error:
        return str(error) + assistant.ask(PICTURE, QUESTIONS[0])
    return "no error"


def fails_here(language, x, caches) -> None:
    """A pass that rank 0 leaves in its middle."""
    if language.share.rank == 0:
        raise torch.OutOfMemoryError("no room")


def left(assistant) -> list[str]:
    told = []
    for ask in (
        lambda: assistant.model.language_model.run(fails_here, torch.zeros(1, 1, 192), None),
        lambda: assistant.ask(PICTURE, QUESTIONS[0]),
    ):
        try:
            ask()
        except (torch.OutOfMemoryError, ValueError) as error:
            told.append(str(error))
    return told


def interrupted(assistant) -> str:
    """Ctrl-C in the middle of passes; then a question."""
    told = "not interrupted"
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while True:
            assistant.ask(PICTURE, QUESTIONS[1])
    except KeyboardInterrupt:
        told = "interrupted. "
    return told + assistant.ask(PICTURE, QUESTIONS[0])


def without_the_other(assistant) -> str:
    assistant.ask(PICTURE, QUESTIONS[0])
    os.kill(assistant.other, signal.SIGKILL)
    try:
        for _ in range(3):
            assistant.ask(PICTURE, QUESTIONS[0])
    except ValueError as error:
        return str(error)
    return "no error"
