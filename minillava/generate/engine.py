"""Many requests at once on one model: each answer has a cache of one row, and all of them take
their next token in one step.

What rows share is the reading of the weights, which is nearly all that a step costs; attention is
a row's own matter anyway. So a row joins and leaves when it likes, without padding, and what
stands in a cache is there for the next request that begins alike.

B rows, P patches of a picture, C width, T positions of a prompt, V vocabulary, L layers.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.llama import Context, LanguageModel, rotary_tables, upcast
from minillava.llava import Llava
from minillava.loop import decode
from minillava.options import Options
from minillava.sampling import NOT_FINITE, NOTHING_LEFT, Sampler
from minillava.streaming import Row
from minillava.tokenizer import Tokenizer, common_prefix

Held = int | bytes
"""What stands at a position of a cache: a token id, or P times the digest of a picture."""

FAILURES = 3
"""Steps that fail one after the other, until the engine gives up."""


class Token(NamedTuple):
    """One new token of an answer. text: what can now be shown. logprobs: of the token, and of the
    likeliest in its place, as (id, log-probability)."""

    id: int
    text: str
    finish_reason: str | None
    logprobs: list[tuple[int, float]] | None


class Failed(NamedTuple):
    """An answer that ends without a finish."""

    code: str
    message: str


class Refused(Exception):
    """A request that is not taken. seconds: when to try again, if that can help."""

    def __init__(self, code: str, message: str, seconds: int | None = None):
        super().__init__(message)
        self.code, self.seconds = code, seconds


@dataclass(eq=False)
class Request:
    """A prompt and how it is answered, once for each of `options`.

    ids: with -200 for each picture. pictures: digest and pixels [3,R,R]. put: is given the number
    of an answer and what happens to it, in the engine's thread. logprobs: how many of the
    likeliest tokens are told with each.
    """

    ids: Sequence[int]
    pictures: Sequence[tuple[bytes, Tensor]]
    options: Sequence[Options]
    put: Callable[[int, Token | Failed], None]
    logprobs: int | None = None
    cancelled: bool = False
    cached: int = 0  # positions of the prompt that were not read again
    times: dict[str, float] = field(default_factory=dict)  # when it was taken, begun, read, ended


class Slot:
    """A cache of one row, and what stands in it."""

    def __init__(self, model: Llava, capacity: int):
        weight = model.language_model.embed_tokens.weight
        self.cache = KVCache(
            model.config.text, 1, capacity, dtype=weight.dtype, device=weight.device
        )
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.zero_()  # memory is ours only once it was written
        self.held: list[Held] = []
        self.busy = False
        self.used = 0.0  # when

    def begin(self, positions: Sequence[Held]) -> int:
        """Keep what a prompt begins with, and how much that is. The last position is read in any
        case: its logits choose the first token."""
        kept = common_prefix(self.held, positions[:-1])
        self.keep(kept)
        return kept

    def keep(self, length: int) -> None:
        self.cache.truncate(length)
        self.held = self.held[:length]

    def take_over(self, other: "Slot") -> None:
        """Go on from what another slot has read."""
        length = other.cache.length
        for ours, theirs in (
            (self.cache.keys, other.cache.keys),
            (self.cache.values, other.cache.values),
        ):
            for mine, its in zip(ours, theirs, strict=True):
                mine[:, :, :length] = its[:, :, :length]
        self.cache.length, self.held = length, list(other.held)


@dataclass(eq=False)
class Answer:
    """One answer while it is made. rest: embeddings of the prompt that are still to be read
    [1,T,C]; siblings: answers to the same prompt, which take over what this one has read."""

    request: Request
    number: int
    slot: Slot
    sampler: Sampler
    row: Row
    most: int
    rest: Tensor | None = None
    positions: Sequence[Held] = ()
    siblings: Sequence["Answer"] = ()
    token: Tensor | None = None  # [1], the last one, which is not read yet


class Engine(threading.Thread):
    """The one thread that computes. Others `submit` requests, `cancel` them, and `drain` it.

    slots: how many answers at once. capacity: positions of each, prompt and answer. waiting: how
    many requests may wait. piece: how many positions of a prompt are read between two steps of
    those that answer. pictures: how many encoded ones are kept.
    """

    def __init__(
        self,
        model: Llava,
        tokenizer: Tokenizer,
        *,
        slots: int = 2,
        capacity: int | None = None,
        waiting: int = 32,
        piece: int = 64,
        pictures: int = 32,
        reuse: bool = True,
    ):
        super().__init__(name="minillava-engine", daemon=True)
        context = model.config.text.context
        self.model, self.tokenizer = model, tokenizer
        self.capacity = context if capacity is None else min(capacity, context)
        self.slots = [Slot(model, self.capacity) for _ in range(slots)]
        self.most_waiting, self.piece, self.reuse = waiting, piece, reuse
        self.most_pictures = pictures
        self.features: OrderedDict[bytes, Tensor] = OrderedDict()  # [P, C], oldest first
        # A signal's handler may drain in the middle of what holds the lock: an RLock lets it.
        self.changed = threading.Condition()
        self.waiting: deque[Request] = deque()
        self.beginning = 0  # slots of a request that is neither waiting nor answered yet
        self.answers: list[Answer] = []
        self.state = "ok"  # draining, ended, failed
        self.deadline = float("inf")
        self.failures = 0
        self.last_step = time.monotonic()
        self.mean_seconds = 1.0  # of a request

    # --- of other threads -------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Take a request into the queue. Raises Refused if it is full, if nothing is taken, or if
        the prompt leaves no room for an answer."""
        patches = self.model.config.tokens_per_image
        length = len(request.ids) + len(request.pictures) * (patches - 1)
        if length >= self.capacity or len(request.options) > len(self.slots):
            raise Refused(
                "context_length_exceeded",
                f"the prompt takes {length} positions ({len(request.pictures)} picture(s) of "
                f"{patches} each), a slot holds {self.capacity} with the answer; shorten it"
                if length >= self.capacity
                else f"{len(request.options)} answers at once, there are {len(self.slots)} slots",
            )
        with self.changed:
            if self.state == "failed":
                raise Refused("engine_failed", "the model's thread has ended with an error")
            if self.state != "ok":
                raise Refused("shutting_down", "the server is going down")
            if self.full:
                seconds = len(self.waiting) * self.mean_seconds / len(self.slots)
                raise Refused(
                    "queue_full",
                    f"{len(self.waiting)} requests wait already, the most that may; try again",
                    max(1, min(120, round(seconds))),
                )
            request.times["taken"] = time.monotonic()
            self.waiting.append(request)
            self.changed.notify()

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.most_waiting + len(self.slots) - self.running

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return sum(slot.busy for slot in self.slots) + self.beginning

    def cancel(self, request: Request) -> None:
        """Nobody waits for it any more; its slots are free before the next step."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def drain(self, grace: float) -> None:
        """Take nothing more, and give up what waits; what runs has `grace` seconds."""
        with self.changed:
            if self.state == "ok":
                self.state = "draining"
            self.deadline = min(self.deadline, time.monotonic() + grace)
            self.changed.notify()

    # --- of the engine's own ----------------------------------------------------------------------

    def run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._admit()
                    self._guard(self._decode, [a for a in self.answers if a.token is not None])
                    reading = [a for a in self.answers if a.rest is not None][:1]
                    self._guard(self._read, reading)
                    self.last_step = time.monotonic()
            self.state = "ended"
        except BaseException as error:
            self.state = "failed"
            message = f"the model's thread has ended: {type(error).__name__}"
            with self.changed:
                self._give_up("engine_failed", message, [*self.waiting])
            raise

    def _wait(self) -> bool:
        """Forget the cancelled, and sleep while there is nothing to do; False at the end."""
        with self.changed:
            while True:
                self.waiting = deque(r for r in self.waiting if not r.cancelled)
                for answer in [a for a in self.answers if a.request.cancelled]:
                    self._leave(answer)
                if self.state == "draining":
                    self._give_up("shutting_down", "the server is going down", [*self.waiting], ())
                    self.waiting.clear()
                    if time.monotonic() >= self.deadline:
                        self._give_up("shutting_down", "the server is going down", ())
                    if not self.answers:
                        return False
                if self.answers or self.waiting:
                    return True
                self.last_step = time.monotonic()
                self.changed.wait(1)

    def _give_up(
        self,
        code: str,
        message: str,
        requests: Sequence[Request],
        answers: Sequence[Answer] | None = None,
    ) -> None:
        """Requests that wait, and answers that run (by default all), end with an error."""
        for request in requests:
            for number in range(len(request.options)):
                request.put(number, Failed(code, message))
        for answer in list(self.answers if answers is None else answers):
            for each in (answer, *answer.siblings):
                if each in self.answers and (each is answer or answer.rest is not None):
                    self._leave(each)
                    each.request.put(each.number, Failed(code, message))

    def _guard(self, work: Callable[[list[Answer]], None], answers: list[Answer]) -> None:
        """Work that may fail, for want of memory say: then the answers concerned end with an error.
        Raises what it raised when that happens time after time."""
        if not answers:
            return
        try:
            work(answers)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            for answer in answers:
                answer.slot.keep(0)
            told = f"the model failed ({type(error).__name__}); the request may be sent again"
            self._give_up("engine_failed", told, (), answers)
            if self.failures >= FAILURES:
                raise

    def _admit(self) -> None:
        """First come, first served, while there are slots; nobody overtakes one who needs more."""
        while self.waiting:
            with self.changed:
                request = self.waiting[0]
                free = [slot for slot in self.slots if not slot.busy]
                if len(free) < len(request.options):
                    return
                self.waiting.popleft()
                self.beginning = len(request.options)
            request.times["begun"] = time.monotonic()
            try:
                for key, pixels in request.pictures:
                    self._encode(key, pixels)
                self._begin(request, free)
            except Exception as error:
                told = f"the prompt could not be read ({type(error).__name__})"
                self._give_up("engine_failed", told, [request], ())
            finally:
                self.beginning = 0

    def _encode(self, key: bytes, pixels: Tensor) -> None:
        """A picture's patches, if they are not kept; those that answer take a step before."""
        if key not in self.features:
            self._guard(self._decode, [a for a in self.answers if a.token is not None])
            device = self.model.language_model.embed_tokens.weight.device
            self.features[key] = self.model.encode_images(pixels[None].to(device))[0]
        self.features.move_to_end(key)

    def _begin(self, request: Request, free: list[Slot]) -> None:
        """Slots for a request: the first where most of its prompt stands already."""
        patches = [self.features[key] for key, _ in request.pictures]
        while len(self.features) > self.most_pictures:
            self.features.popitem(last=False)
        spliced = self.model.splice([list(request.ids)], torch.stack(patches) if patches else None)
        positions: list[Held] = spliced.token_ids[0].tolist()
        for (key, _), (start, end) in zip(request.pictures, spliced.image_spans[0], strict=True):
            positions[start:end] = [key] * (end - start)
        free = sorted(free, key=lambda slot: slot.used)
        best = max(free, key=lambda slot: common_prefix(slot.held, positions) * self.reuse)
        free.remove(best)
        answers, config = [], self.model.config
        for number, (slot, options) in enumerate(zip([best, *free], request.options, strict=False)):
            most = min(options.max_new_tokens, self.capacity - len(positions))
            sampler = Sampler(config, spliced.token_ids, options)
            row = Row(config.eos_token_ids, self.tokenizer, options.stop)
            answers.append(Answer(request, number, slot, sampler, row, most))
        first, *others = answers
        with self.changed:
            self.beginning = 0
            for answer in answers:
                answer.slot.busy = True
        if not self.reuse:
            first.slot.keep(0)
        request.cached = first.slot.begin(positions)
        first.rest, first.positions = spliced.embeds[:, request.cached :], positions
        first.siblings = others
        self.answers += answers

    def _read(self, answers: list[Answer]) -> None:
        """A piece of one prompt; after the last, the first token."""
        (answer,) = answers
        slot, piece = answer.slot, answer.rest[:, : self.piece]
        output = self.model.language_model(piece, None, slot.cache, last_only=True)
        slot.held = list(answer.positions[: slot.cache.length])
        answer.rest = answer.rest[:, piece.shape[1] :]
        if answer.rest.shape[1]:
            return
        answer.rest, logits = None, upcast(output.logits[:, -1])
        answer.request.times["read"] = time.monotonic()
        for each in (answer, *answer.siblings):
            if each is not answer:
                each.slot.take_over(slot)
            self._choose(each, logits)

    def _decode(self, answers: list[Answer]) -> None:
        """One token for each of these answers."""
        token_ids = torch.cat([answer.token for answer in answers])  # [B]
        caches = [answer.slot.cache for answer in answers]
        logits = upcast(decode_rows(self.model, token_ids, caches)[:, -1])  # [B, V]
        for answer, token_id, row in zip(answers, token_ids.tolist(), logits, strict=True):
            answer.slot.held.append(token_id)
            self._choose(answer, row[None])

    def _choose(self, answer: Answer, logits: Tensor) -> None:
        """The next token of one answer, by its logits [1, V]."""
        token, _, empty = answer.sampler(logits.where(logits.isfinite().all(), 0))
        if not logits.isfinite().all() or empty.any():
            answer.slot.keep(0)
            told = NOTHING_LEFT if logits.isfinite().all() else NOT_FINITE
            self._give_up("engine_failed", told, (), [answer])
            return
        answer.sampler.remember(token)
        answer.token = token
        text = answer.row.feed(int(token), answer.sampler.chosen == answer.most)
        reason, count = answer.row.finish_reason, answer.request.logprobs
        likely = None if count is None else likeliest(logits[0], int(token), count)
        if reason is not None:
            self._leave(answer)
        answer.request.put(answer.number, Token(int(token), text, reason, likely))

    def _leave(self, answer: Answer) -> None:
        """An answer is over; what stands in its slot stays there."""
        self.answers.remove(answer)
        answer.slot.busy, answer.slot.used = False, time.monotonic()
        if not any(other.request is answer.request for other in self.answers):
            times = answer.request.times
            times["ended"] = time.monotonic()
            self.mean_seconds += 0.2 * (times["ended"] - times["begun"] - self.mean_seconds)


class Rows:
    """Several caches of one row, where the layers expect one of several rows."""

    def __init__(self, caches: Sequence[KVCache]):
        self.caches = caches

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """k, v [B,K,1,D] -> per row, all so far [1,K,S,D]; S differs."""
        both = [
            cache.update(layer, k[i : i + 1], v[i : i + 1]) for i, cache in enumerate(self.caches)
        ]
        return [k for k, _ in both], [v for _, v in both]


def decode_rows(model: Llava, token_ids: Tensor, caches: Sequence[KVCache]) -> Tensor:
    """One new token per row, each at its own position: token_ids [B] -> logits [B,1,V]"""
    language: LanguageModel = model.language_model
    if len(caches) == 1:
        return decode(model, token_ids, caches[0]).logits

    def attend(
        q: Tensor, k: list[Tensor], v: list[Tensor], mask: None, causal: bool
    ) -> tuple[Tensor, None]:
        rows = zip(k, v, strict=True)
        outs = [language.attend(q[i : i + 1], *kv, None, False)[0] for i, kv in enumerate(rows)]
        return torch.cat(outs), None

    for cache in caches:
        cache.reserve(1, 1, None)
    x = language.embed_tokens(token_ids[:, None])  # [B, 1, C]
    positions = torch.tensor([[cache.length] for cache in caches], device=x.device)  # [B, 1]
    tables = rotary_tables(positions, language.config, x.dtype)
    context = Context(*tables, None, False, attend, Rows(caches))  # type: ignore[arg-type]
    for layer in language.layers:
        x, _ = layer(x, context)
    for cache in caches:
        cache.advance(1)
    return language.head(language.norm(x))


def likeliest(logits: Tensor, token_id: int, count: int) -> list[tuple[int, float]]:
    """The token and the `count` likeliest in its place, with their log-probabilities by the logits
    [V]."""
    log_p = logits.log_softmax(-1)
    ids = [token_id, *log_p.topk(min(count, len(log_p))).indices.tolist()]
    return [(i, float(log_p[i])) for i in ids]
