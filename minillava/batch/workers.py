"""The questions of a file, asked by workers on one machine or on many: `batch --on ray`.

Ray starts the workers, actors that each hold one assistant, and tells when one has died. This
process opens no weights: it reads the questions, deals them out, and keeps the journal. A worker
takes one question at a time, several at once, so an answer is in the journal as soon as it is made;
what a dead worker had is dealt out again. Ray Data would bring answers back in blocks, and plan the
run anew where it goes on.
"""

import argparse
import os
import socket
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch

from minillava.assistant import Assistant
from minillava.batch.questions import Question
from minillava.batch.run import InBatches, in_batches
from minillava.batch.together import Answered, Together
from minillava.checkpoint.folders import find_folders
from minillava.checkpoint.parts import open_parts
from minillava.checkpoint.place import choose_device
from minillava.cli.messages import Messages
from minillava.cli.opening import open_assistant
from minillava.files.disk import one_line
from minillava.llava import Llava
from minillava.templates import find_template, template_of

DEATHS = 10
"""Workers that die one after the other without an answer between them, until the run gives up."""

Work = list[Question]
"""What is asked at once: a question, or a batch that begins and ends together."""


class Job(NamedTuple):
    """What every worker is told. options: the fields of `Options`, `system` and `contrast` by name.
    most: positions of the longest prompt. size: questions at a time."""

    args: argparse.Namespace
    weights: str
    options: dict[str, Any]
    most: int
    size: int


class Worker:
    """One assistant in a process of its own."""

    def open(self, job: Job, folder: str) -> None:
        """Open the model. folder: to which names are relative. Raises ValueError that names the
        machine if it cannot be opened."""
        try:
            os.chdir(folder)
            assistant = open_assistant(job.args, job.weights, Messages(verbose=False, quiet=True))
            if in_batches(job.args):
                self.asks: Any = InBatches(assistant, job.args, job.options)
                return
            self.prompts: dict[int, Sequence[int]] = {}
            self.asks = Together(
                assistant, self.prompts, job.most, job.options,
                size=job.size, pictures=job.args.image_cache,
            )  # fmt: skip
            self.asks.engine.start()
        except (ValueError, OSError, MemoryError) as error:
            raise ValueError(f"the worker on {socket.gethostname()}: {one_line(error)}") from error

    def answer(self, work: Work, prompts: dict[int, Sequence[int]]) -> list[Answered]:
        """The answers of some questions. prompts: line -> ids."""
        if isinstance(self.asks, InBatches):
            return self.asks.answer(work)
        self.prompts |= prompts
        try:
            return [self.asks.answer(question) for question in work]
        finally:
            for line in prompts:
                del self.prompts[line]


@dataclass(eq=False)
class Hand:
    """A worker as this process sees it. opening: ends when it can be asked. left: work of its own
    that comes next; asked: what it is at."""

    actor: Any
    opening: Any
    ready: bool = False
    left: deque[Work] = field(default_factory=deque)
    asked: dict[Any, Work] = field(default_factory=dict)


class Cluster:
    """The machines on which Ray runs, and what a worker gets of them."""

    def __init__(self, ray: Any, workers: int | None, device: str):
        """workers: None for one on each GPU or, where there is none, on each machine. Raises
        ValueError if there is no room for them."""
        self.ray, self.dead = ray, 0
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        self.device = "cuda" if gpus and device.startswith(("auto", "cuda")) else device
        if self.device.startswith("cuda"):
            self.count, self.each = workers or gpus, {"num_cpus": 1, "num_gpus": 1}
            if not 0 < self.count <= gpus:
                wanted = self.count or "the"
                raise ValueError(f"{wanted} workers want a GPU each, and Ray has {gpus}")
        else:
            self.device = choose_device("cpu" if device == "auto" else device)
            cores = [int(machine.get("CPU", 0)) for machine in machines]
            self.count = workers or max(1, sum(number > 0 for number in cores))
            self.each = {"num_cpus": cores_for_each(self.count, cores)}

    def reader(self, args: argparse.Namespace, weights: str) -> Assistant:
        """What turns questions into ids here: an assistant whose network has shapes and no
        numbers."""
        folders = find_folders(
            weights, args.revision, args.vision_tower, args.model_base, args.adapter
        )
        parts = open_parts(folders, args.image_aspect_ratio)
        name = template_of(parts.tokenizer.added) if args.template is None else args.template
        with torch.device("meta"):
            model = Llava(parts.config)
        return Assistant(model, parts.tokenizer, parts.image_processor, find_template(name))

    def answers(
        self, told: tuple, work: Sequence[Work], prompts: dict[int, list[int]]
    ) -> Generator[list[tuple[Question, Answered]], None, None]:
        """The answers as they come, some at a time. told: the fields of `Job`. Raises ValueError if
        a worker cannot open the model, or workers keep dying, and what a worker raised."""
        job = Job(*told)
        waiting = deque(blocks_of(work, job.size))
        # batches of one model are made one after the other, of which the next waits at its worker
        alone = in_batches(job.args)
        most = 2 if alone else 2 * job.size
        start = self._starts(job, 1 if alone else most)
        hands = [start() for _ in range(min(self.count, len(waiting)))]
        while waiting or any(hand.left or hand.asked for hand in hands):
            for hand in hands:
                self._deal(hand, waiting, most, prompts)
            found: list[tuple[Question, Answered]] = []
            for hand, ref in self._ended(hands):
                if hand not in hands:  # it died a moment ago
                    continue
                answers = self._result(ref)
                if answers is not None:
                    found += zip(hand.asked.pop(ref, ()), answers, strict=True)
                    hand.ready = True
                    continue
                hands.remove(hand)
                waiting.extendleft([each] for each in (*hand.left, *hand.asked.values()))
                self.ray.kill(hand.actor)  # where it is only out of reach
                hands.append(start())
            if found:
                self.dead = 0
                yield found

    def _starts(self, job: Job, at_once: int) -> Any:
        """A function that starts a worker."""
        kind = self.ray.remote(max_concurrency=at_once, **self.each)(Worker)
        told, folder = self.ray.put(job), os.getcwd()

        def start() -> Hand:
            actor = kind.remote()
            return Hand(actor, actor.open.remote(told, folder))

        return start

    def _deal(
        self, hand: Hand, waiting: deque[list[Work]], most: int, prompts: dict[int, list[int]]
    ) -> None:
        while hand.ready and len(hand.asked) < most and (hand.left or waiting):
            if not hand.left:
                hand.left.extend(waiting.popleft())
            work = hand.left.popleft()
            ids = {question.line: prompts[question.line] for question in work}
            hand.asked[hand.actor.answer.remote(work, ids)] = work

    def _ended(self, hands: Sequence[Hand]) -> list[tuple[Hand, Any]]:
        """What has ended: a worker, and what it was at."""
        refs = {ref: hand for hand in hands for ref in hand.asked}
        refs |= {hand.opening: hand for hand in hands if not hand.ready}
        # without a timeout, Ctrl-C would wait for an answer
        if not self.ray.wait([*refs], timeout=1)[0]:
            return []
        return [
            (refs[ref], ref) for ref in self.ray.wait([*refs], num_returns=len(refs), timeout=0)[0]
        ]

    def _result(self, ref: Any) -> list[Answered] | None:
        """What a worker returned; None if it has died. Raises what it raised."""
        try:
            return self.ray.get(ref) or []
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            self.dead += 1
            if self.dead < DEATHS:
                return None
            told = f"{DEATHS} workers died one after the other without an answer, the last with:"
            raise ValueError(f"{told} {one_line(error)}") from error


def cores_for_each(workers: int, cores: Sequence[int]) -> int:
    """How many cores each of so many workers gets, where machines have these: as many as there is
    room for. Raises ValueError if there are fewer cores than workers."""
    for each in range(max(cores, default=0), 0, -1):
        if sum(number // each for number in cores) >= workers:
            return each
    raise ValueError(f"{workers} workers want a core each, and Ray has {sum(cores)}")


def blocks_of(work: Sequence[Work], size: int) -> Iterator[list[Work]]:
    """Neighbours on the same pictures, which stay with one worker; up to `size` of them, so that no
    worker waits for another's at the end."""
    for _, alike in groupby(work, key=lambda one: [question.images for question in one]):
        some = list(alike)
        yield from (some[i : i + size] for i in range(0, len(some), size))


@contextmanager
def join(args: argparse.Namespace) -> Iterator[Cluster]:
    """Ray's machines at --address, or this one. Raises ValueError without the extra [ray], or if
    nobody answers at that address."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would be sent to Ray's makers
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ValueError("--on ray needs a package; pip install 'minillava[ray]'") from None
    address = args.address or os.environ.get("RAY_ADDRESS")
    told = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        check_address(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address or "local", **told)  # else it would look for one that runs here
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = f"--address {address}" if address else "this machine"
        told = f"{where}: Ray is not there ({one_line(error)}); check the address, and set "
        told += "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it was started with a token"
        raise ValueError(told) from error
    try:
        yield Cluster(ray, args.workers, args.device)
    finally:
        ray.shutdown()


def check_address(address: str | None) -> None:
    """Raises OSError if nobody listens at HOST:PORT, which Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
