"""Many requests at once on one model: each answer has a cache of one row, and all of them take
their next token in one step. One that is alone may be given several by a pass that checks guesses
(speculate.py).

The rows share the reading of the weights, which is nearly the whole cost of a step; attention is
computed per row anyway. So a row can join and leave at any step, without padding, and the next
request that begins alike reuses what is cached.

B rows, P patches of a picture, C width, T positions of a prompt, V vocabulary, L layers.
"""

import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.cache import KVCache
from minillava.files.pictures import ImageSource
from minillava.generate.inputs import encode_picture, together
from minillava.generate.speculate import Drafts, Guessing, Report, check, follow, settle
from minillava.generate.watch import Watch, seen_span
from minillava.llama import Context, LanguageModel, rotary_tables, upcast
from minillava.llava import Llava, Spliced
from minillava.options import Options
from minillava.sampling import NOT_FINITE, NOTHING_LEFT, Sampler
from minillava.streaming import Row
from minillava.tiles.pictures import Tiled, positions_of, size_of
from minillava.tokenizer import Tokenizer, common_prefix

Held = int | bytes
"""What stands at a position of a cache: a token id, or P times the digest of a picture."""

FAILURES = 3
"""Steps that fail one after the other, until the engine gives up."""


def is_final(error: BaseException) -> bool:
    """Whether an error says of itself that the model cannot go on. Only fast/parallel.py has one,
    and generate/ imports nothing of fast/ (tests/project/test_layout.py)."""
    return getattr(error, "final", False)


class Token(NamedTuple):
    """One new token of an answer. text: the text that can now be shown. logprobs: (id,
    log-probability) of the token and of the most likely ones in its place. heat: [P], what its
    choice looked at, if that was asked. at: when it was chosen. guessed: whether it had been
    guessed; None where nothing ever is."""

    id: int
    text: str
    finish_reason: str | None
    logprobs: list[tuple[int, float]] | None
    heat: Tensor | None = None
    at: float = 0.0
    guessed: bool | None = None


class Failed(NamedTuple):
    """An answer that an error ended. cause: what was raised, if it was not about the request."""

    code: str
    message: str
    cause: BaseException | None = None


class Refused(Exception):
    """The error for a request that is not accepted. seconds: after which trying again may help, if
    it can."""

    def __init__(self, code: str, message: str, seconds: int | None = None):
        super().__init__(message)
        self.code, self.seconds = code, seconds


@dataclass(eq=False)
class Request:
    """A prompt and how it is to be answered, once for each of `options`.

    ids: with -200 for each picture. pictures: digest and pixels [3,R,R]. put: is called in the
    engine's thread with the number of an answer and its next Token or Failed. logprobs: how many of
    the most likely tokens are reported with each token. prefix: the last of `ids`, with which the
    answer begins: chosen already, and counted as such. look: layers and heads whose attention on
    the one picture is reported with each token. contrast: f(logits, other, step) -> [1, V], which
    compares two rows. second_rows: for each answer the ids and pictures that its second row reads;
    such an answer takes two slots. images: opens the pictures, for a drafter that sees them.
    """

    ids: Sequence[int]
    pictures: Sequence[tuple[bytes, Tensor | Tiled]]
    options: Sequence[Options]
    put: Callable[[int, Token | Failed], None]
    logprobs: int | None = None
    prefix: Sequence[int] = ()
    look: tuple[Sequence[int], Sequence[int]] | None = None
    contrast: Callable[[Tensor, Tensor, int], Tensor] | None = None
    second_rows: Sequence[tuple[Sequence[int], Sequence[tuple[bytes, Tensor | Tiled]]]] = ()
    images: Callable[[], Sequence[ImageSource]] = tuple
    cancelled: bool = False
    cached: int = 0  # positions of the prompt that were cached already
    encoded: int = 0  # pictures whose patches were not kept
    # of its answers, after the prompt: passes, tokens that they checked guesses for, and right ones
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    # when it was taken, begun, its pictures encoded (pictured), read, ended
    times: dict[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many slots it takes."""
        return len(self.options) + len(self.second_rows)


class Slot:
    """A cache of one row, and the ids and pictures whose positions it has. cuts: the positions at
    which a piece of its prompt ended. Another prompt that begins so is cut at the same ones, so
    that an exact engine may reuse what is cached up to one of them."""

    def __init__(self, model: Llava, capacity: int):
        weight = model.language_model.embed_tokens.weight
        self.cache = KVCache(
            model.config.text, 1, capacity, dtype=weight.dtype, device=weight.device
        )
        self.held: list[Held] = []
        self.cuts: list[int] = []
        self.busy = False
        self.used = 0.0  # when

    def keep(self, length: int) -> None:
        self.cache.truncate(length)
        self.held = self.held[:length]
        self.cuts = [cut for cut in self.cuts if cut <= length]

    def take_over(self, other: "Slot", length: int) -> None:
        """Copy the first `length` positions that another slot has cached."""
        other.cache.copy_to(self.cache, length)
        self.held = other.held[:length]
        self.cuts = [cut for cut in other.cuts if cut <= length]


@dataclass(eq=False)
class Side:
    """One row of an answer. rest: embeddings [1,T,C] of its prompt that are still to be prefilled,
    of the whole prompt until it is `begun`. cuts: where pieces end, if bits are to be the same.
    span: where the patches of its picture stand, if they are watched."""

    slot: Slot
    positions: Sequence[Held]
    rest: Tensor | None = None
    cuts: Sequence[int] = ()
    begun: bool = False
    span: tuple[int, int] | None = None
    logits: Tensor | None = None  # [1, V], of the last position that was read
    watch: Watch | None = None  # of the last pass

    def watched(self) -> Watch | None:
        self.watch = None if self.span is None else Watch(*self.span)
        return self.watch


@dataclass(eq=False)
class Running:
    """One answer while it is made. sides: its row, and with contrast a second one. siblings:
    answers to the same prompt, which copy what this one has cached. hidden [C]: the state from
    which the last token was chosen, if no other answer was there; None otherwise."""

    request: Request
    number: int
    sides: Sequence[Side]
    sampler: Sampler
    row: Row
    most: int
    siblings: Sequence["Running"] = ()
    told: int = 0  # how many ids of its history a drafter knows, or will know once it begins
    token: Tensor | None = None  # [1], the last one, not cached yet
    guesses: Guessing | None = None  # since it was alone for the first time
    may_guess: bool = True  # until its drafter fails
    hidden: Tensor | None = None

    @property
    def reading(self) -> bool:
        """Whether a prompt of its own is still to be prefilled."""
        return any(side.rest is not None for side in self.sides)

    def empty(self) -> None:
        """Forget what its slots have cached."""
        for side in self.sides:
            side.slot.keep(0)


class Engine(threading.Thread):
    """The one thread that computes. Others `submit` requests, `cancel` them, and `drain` it.

    slots: how many answers are made at once. waiting: how many requests may wait. piece: how many
    positions of a prompt are prefilled between two steps of the running answers; its last piece may
    have half as many more. pictures: how many encoded pictures are kept. capacity: positions of a
    slot, prompt and answer; None for the model's context. reuse: whether what is cached of a prompt
    is not read again. exact: an answer has the same bits whoever is there: a prompt that begins
    like a cached one is read in the same pieces, and a step has as many rows as there are slots. A
    model that keeps bits by itself (fast/row_by_row.py) does so anyway. drafts: guess what an
    answer says while no other is decoded, unless it has contrast: rows of a pass are worth more to
    answers than to guesses, which may be wrong. Raises ValueError for drafts with `exact`.
    """

    def __init__(
        self,
        model: Llava,
        tokenizer: Tokenizer,
        *,
        slots: int,
        waiting: int,
        piece: int,
        pictures: int,
        capacity: int | None = None,
        reuse: bool = True,
        exact: bool = False,
        drafts: Drafts | None = None,
    ):
        if exact and drafts is not None:
            raise ValueError("an exact engine's steps have a fixed number of rows: no drafts")
        super().__init__(name="minillava-engine", daemon=True)
        context = model.config.text.context
        self.model, self.tokenizer = model, tokenizer
        self.capacity = context if capacity is None else min(capacity, context)
        self.slots = [Slot(model, self.capacity) for _ in range(slots)]
        self.most_waiting, self.piece, self.reuse = waiting, piece, reuse
        language: Any = model.language_model
        self.exact, self.together, self.rows = exact, slots, slots * exact
        if language.one_by_one:
            self.exact, self.piece, self.together, self.rows = (
                True,
                language.grid,
                language.together,
                0,
            )
        self.drafts, self.most_pictures = drafts, pictures
        self.features: OrderedDict[bytes, Tensor] = OrderedDict()  # [P, C], oldest first
        # A signal handler may call drain while its own thread has the lock; an RLock allows that.
        self.changed = threading.Condition()
        self.waiting: deque[Request] = deque()
        self.beginning = 0  # slots of a request that is neither waiting nor answered yet
        self.answers: list[Running] = []
        self.state = "ok"  # draining, ended, failed
        self.deadline = float("inf")
        self.failures = 0
        self.error: BaseException | None = None  # that ended the engine
        self.last_step = time.monotonic()
        self.mean_seconds = 1.0  # of a request
        self.on_step: Callable[[int, float], None] = lambda rows, seconds: None  # of each decoding

    # --- of other threads -------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Put a request into the queue. Raises Refused if the queue is full, if the engine accepts
        no more, or if the prompt leaves no room for an answer."""
        patches = [positions_of(self.model.config, pixels) for _, pixels in request.pictures]
        length = len(request.ids) - len(patches) + sum(patches)
        if length >= self.capacity or request.rows > len(self.slots):
            each = dict.fromkeys(patches or [self.model.config.tokens_per_image])
            raise Refused(
                "context_length_exceeded",
                f"the prompt takes {length} positions ({len(patches)} picture(s) of "
                f"{', '.join(map(str, each))} each), a slot holds {self.capacity} with the answer; "
                "shorten it"
                if length >= self.capacity
                else f"{request.rows} answers at once, there are {len(self.slots)} slots",
            )
        with self.changed:
            self.check_room()
            request.times["taken"] = time.monotonic()
            self.waiting.append(request)
            self.changed.notify()

    def check_room(self) -> None:
        """Raises Refused if no request would be accepted now."""
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

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.most_waiting + len(self.slots) - self.running

    @property
    def running(self) -> int:
        """The number of slots in use."""
        with self.changed:  # a request that gets its slots counts once, and always
            return sum(slot.busy for slot in self.slots) + self.beginning

    def cancel(self, request: Request) -> None:
        """Give up a request for which nobody waits any more; its slots are free before the next
        step."""
        with self.changed:
            request.cancelled = True
            self.changed.notify()

    def drain(self, grace: float) -> None:
        """Accept nothing more, and give up the waiting requests; running answers have `grace`
        seconds."""
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
                    reading = [a for a in self.answers if a.reading][:1]
                    self._guard(self._read, reading)
                    self.last_step = time.monotonic()
            self.state = "ended"
        except BaseException as error:
            self.error, self.state = error, "failed"
            message = f"the model's thread has ended: {type(error).__name__}"
            message = str(error) if is_final(error) else message
            with self.changed:
                self._give_up("engine_failed", message, [*self.waiting], cause=error)
            if not is_final(error):  # which says everything, to who asked
                raise

    def _wait(self) -> bool:
        """Remove cancelled requests, and sleep while there is nothing to do; returns False at the
        end."""
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
        answers: Sequence[Running] | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """End waiting requests and running answers (by default all) with an error."""
        failed = Failed(code, message, cause)
        for request in requests:
            for number in range(len(request.options)):
                request.put(number, failed)
        for answer in list(self.answers if answers is None else answers):
            for each in (answer, *answer.siblings):
                if each in self.answers and (each is answer or answer.reading):
                    self._leave(each)
                    each.request.put(each.number, failed)

    def _guard(self, work: Callable[[list[Running]], None], answers: list[Running]) -> None:
        """Do work that may fail, for example for lack of memory; the answers concerned then end
        with an error. Raises the work's own error if it fails time after time."""
        if not answers:
            return
        try:
            work(answers)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            for answer in answers:
                answer.empty()
            told = f"the model failed ({type(error).__name__}); the request may be sent again"
            told = str(error) if is_final(error) else told
            self._give_up("engine_failed", told, (), answers, error)
            if self.failures >= FAILURES or is_final(error):
                raise

    def _admit(self) -> None:
        """Start waiting requests, first come, first served, while there are slots. No request
        overtakes one that needs more slots."""
        while self.waiting:
            with self.changed:
                request = self.waiting[0]
                free = [slot for slot in self.slots if not slot.busy]
                if len(free) < request.rows:
                    return
                self.waiting.popleft()
                self.beginning = request.rows
            request.times["begun"] = time.monotonic()
            try:
                for _, pictures in (((), request.pictures), *request.second_rows):
                    for key, pixels in pictures:
                        request.encoded += self._encode(key, pixels)
                request.times["pictured"] = time.monotonic()
                self._begin(request, free)
            except Exception as error:
                if self.failures >= FAILURES or is_final(error):  # of a step, in `_encode`
                    self.waiting.appendleft(request)  # is told why with all who wait
                    raise
                told = f"the prompt could not be read ({type(error).__name__})"
                self._give_up("engine_failed", told, [request], (), error)
            finally:
                self.beginning = 0

    def _encode(self, key: bytes, pixels: Tensor | Tiled) -> bool:
        """Encode a picture if its patches are not kept, and tell whether it was; running answers
        take a step first."""
        if new := key not in self.features:
            self._guard(self._decode, [a for a in self.answers if a.token is not None])
            self.features[key] = encode_picture(self.model, pixels)
        self.features.move_to_end(key)
        return new

    def _begin(self, request: Request, free: list[Slot]) -> None:
        """Give a request its slots. With contrast each answer prefills its own rows; without, the
        first prefills for all."""
        free = sorted(free, key=lambda slot: slot.used)
        first, spliced = self._side(request.ids, request.pictures, free)
        if request.look is not None:
            first.span = seen_span(self.model, spliced, size_of(request.pictures[0][1]))
        answers = []
        for number, options in enumerate(request.options):
            sides = [first]
            if number and request.second_rows:
                sides = [self._side(request.ids, request.pictures, free)[0]]
            elif number:
                sides = [Side(free.pop(0), first.positions)]
            sides[0].span = first.span
            if request.second_rows:
                sides.append(self._side(*request.second_rows[number], free)[0])
            answers.append(self._answer(request, number, options, sides, spliced.token_ids))
        if not request.second_rows:
            answers[0].siblings = answers[1:]
        while len(self.features) > self.most_pictures:
            self.features.popitem(last=False)
        with self.changed:
            self.beginning = 0
            for answer in answers:
                for side in answer.sides:
                    side.slot.busy = True
        self.answers += answers

    def _side(
        self,
        ids: Sequence[int],
        pictures: Sequence[tuple[bytes, Tensor | Tiled]],
        free: list[Slot],
    ) -> tuple[Side, Spliced]:
        """A row for a prompt, in the free slot that has most of it cached, which is taken out of
        `free`."""
        patches = [self.features[key] for key, _ in pictures]
        spliced = self.model.splice([list(ids)], together(patches))
        positions: list[Held] = spliced.token_ids[0].tolist()
        for (key, _), (start, end) in zip(pictures, spliced.image_spans[0], strict=True):
            positions[start:end] = [key] * (end - start)
        slot = max(free, key=lambda slot: self._alike(slot, positions))
        free.remove(slot)
        ends = [] if self.model.language_model.one_by_one else spliced.image_spans[0]
        cuts = {*range(self.piece, len(positions), self.piece), *(end for _, end in ends)}
        return Side(slot, positions, spliced.embeds, sorted(cuts)), spliced

    def _alike(self, slot: Slot, positions: Sequence[Held]) -> int:
        """How many positions of a prompt a slot has. The last one does not count: it is computed in
        any case, since its logits choose the first token."""
        if not self.reuse:
            return 0
        alike = common_prefix(slot.held, positions[:-1])
        return max((cut for cut in slot.cuts if cut <= alike), default=0) if self.exact else alike

    def _start(self, side: Side) -> int:
        """Keep the cached positions with which a prompt begins, or copy them from the slot that has
        most of them, be it in use or not; returns how many."""
        slot, positions = side.slot, side.positions
        best = max([slot, *self.slots], key=lambda each: self._alike(each, positions))
        kept = self._alike(best, positions)
        if best is not slot:
            slot.take_over(best, kept)
        slot.keep(kept)
        side.begun, side.rest = True, side.rest[:, kept:]  # type: ignore[index]
        return kept

    def _answer(
        self,
        request: Request,
        number: int,
        options: Options,
        sides: Sequence[Side],
        token_ids: Tensor,
    ) -> Running:
        """An answer that begins with the request's prefix. token_ids [1, T]: of the prompt, and of
        the prefix at its end."""
        config, begun = self.model.config, len(request.prefix)
        length = max(len(side.positions) for side in sides) - begun
        most = min(options.max_new_tokens, self.capacity - length)
        sampler = Sampler(config, token_ids[:, : token_ids.shape[1] - begun], options)
        sampler.history = token_ids
        row = Row(config.eos_token_ids, self.tokenizer, options.stop)
        for token_id in request.prefix:
            row.decoder.feed(token_id)  # type: ignore[union-attr]
        return Running(request, number, sides, sampler, row, most, told=token_ids.shape[1])

    def _read(self, answers: list[Running]) -> None:
        """Prefill a piece of one prompt; after the last piece, choose the first token."""
        (answer,) = answers
        side = next(side for side in answer.sides if side.rest is not None)
        language, slot, attend = self.model.language_model, side.slot, None
        if not side.begun:
            kept = self._start(side)
            if side is answer.sides[0] and answer.number == 0:
                answer.request.cached = kept
        start, left = slot.cache.length, side.rest.shape[1]  # type: ignore[union-attr]
        # a short rest would take a pass of its own, which reads all weights for a few positions
        length = self.piece if left > 1.5 * self.piece else left
        if self.exact:
            ends = (cut for cut in side.cuts if cut > start)
            length = next(ends, len(side.positions)) - start
        piece, rest = side.rest[:, :length], side.rest[:, length:]  # type: ignore[index]
        if not rest.shape[1] and (watch := side.watched()):
            attend = watch.over(language.attend)
        output = language(piece, None, slot.cache, last_only=True, attend=attend)
        slot.held = list(side.positions[: slot.cache.length])
        slot.cuts += [slot.cache.length] * (slot.cache.length in side.cuts)
        side.rest = rest
        if rest.shape[1]:
            return
        side.rest, side.logits = None, upcast(output.logits[:, -1])
        answer.hidden = output.hidden[0, -1]  # type: ignore[index]
        if answer.reading:  # the other side
            return
        answer.request.times.setdefault("read", time.monotonic())
        for each in answer.siblings:
            each.sides[0].slot.take_over(slot, slot.cache.length)
        self._choose([(each, answer.sides) for each in (answer, *answer.siblings)])

    def _decode(self, answers: list[Running]) -> None:
        """Decode one token for each of these answers; for one that is alone as many as are guessed
        right, and one more."""
        started = time.monotonic()
        rows = [(answer, side) for answer in answers for side in answer.sides]
        for answer in answers:
            answer.request.passes += 1
        guesses = None
        if self.drafts is not None and len(rows) == 1 and answers[0].may_guess:
            guesses = self._guess(*rows[0], self.drafts)
        if guesses is not None:
            self._check(*rows[0], guesses)
        else:
            self._step(rows)
            self._choose([(answer, answer.sides) for answer in answers])
        self.on_step(len(rows), time.monotonic() - started)

    def _step(self, rows: Sequence[tuple[Running, Side]]) -> None:
        """Read the last token of each row."""
        for first in range(0, len(rows), self.together):
            some = rows[first : first + self.together]
            token_ids = torch.cat([answer.token for answer, _ in some])  # [B]
            caches = [side.slot.cache for _, side in some]
            watches = [side.watched() for _, side in some]
            logits = decode_rows(self.model, token_ids, caches, watches, self.rows)
            numbers = zip(some, token_ids.tolist(), upcast(logits[:, -1]), strict=True)
            for (answer, side), token_id, row in numbers:
                side.slot.held.append(token_id)
                side.logits, answer.hidden = row[None], None

    def _guess(self, answer: Running, side: Side, drafts: Drafts) -> Guessing | None:
        """Guess what an answer that is alone says next; None if the drafter fails, without which
        the answer goes on, since guesses decide nothing."""
        try:
            return self._propose(answer, side, drafts)
        except Exception as error:
            if is_final(error):
                raise
            answer.may_guess = False
            warnings.warn(f"an answer goes on without guesses: {error!r}", stacklevel=2)
            return None

    def _propose(self, answer: Running, side: Side, drafts: Drafts) -> Guessing:
        """The guesses for the next pass. None after a step that others shared: it keeps no hidden
        state, from which some drafters guess."""
        request, sampler, cache = answer.request, answer.sampler, side.slot.cache
        guesses = answer.guesses
        if guesses is None:
            drafter = drafts.drafter
            draft = drafter.begin(list(request.ids), sampler, request.images())
            report = Report(drafter.kind, tokens=1)
            guesses = answer.guesses = Guessing(drafts, self.model, report, draft)
        if answer.hidden is None:
            guesses.skip()
            return guesses
        new = sampler.history[0, answer.told :].tolist()
        answer.told += len(new)
        guesses.draft.accept(new, answer.hidden)
        most = min(answer.most - sampler.chosen, cache.capacity - cache.length) - 1
        guesses.guess(most, as_chain=side.span is not None)
        return guesses

    def _check(self, answer: Running, side: Side, guesses: Guessing) -> None:
        """Read the last token of an answer that is alone, and the guesses. Each token is chosen as
        in a step of its own, as long as the guess before it was right."""
        tree, request, slot = guesses.tree, answer.request, side.slot
        last, made = int(answer.token), list[Token | Failed]()  # type: ignore[arg-type]
        request.drafted += len(tree.tokens)
        watches = [watch for _ in (last, *tree.tokens) if (watch := side.watched())]
        rows = check(self.model, last, tree, slot.cache, watches=watches)

        def choose(row: int) -> tuple[int, bool]:
            side.logits = upcast(rows[row].logits[:, -1])
            side.watch = watches[row] if watches else None
            event = self._next(answer, answer.sides)
            if isinstance(event, Failed):
                made.append(event)
                return -1, True  # no token, and the last
            right = tree.child(row, event.id) is not None
            request.accepted += right
            made.append(event._replace(guessed=right))
            return event.id, event.finish_reason is not None

        try:
            path = follow(tree, choose)
            ids = [event.id for event in made if isinstance(event, Token)]
            if len(ids) == len(made):  # else a Failed has emptied the slot
                guesses.note(path, ids)
                settle(slot.cache, tree, path, len(ids))
                slot.held += [last, *ids[:-1]]
                answer.hidden = rows[path[len(ids) - 1]].hidden[0, -1]  # type: ignore[index]
        finally:  # an answer that has ended is no longer there for `_guard` to tell of an error
            for event in made:
                request.put(answer.number, event)

    def _choose(self, answers: Sequence[tuple[Running, Sequence[Side]]]) -> None:
        """Choose the next token of each answer by the logits of its sides, or of those it copies.
        They are told one right after the other: who hears of the first runs next, and then finds
        all of them."""
        made = []
        try:
            for answer, sides in answers:
                made.append((answer, self._next(answer, sides)))
        finally:
            for answer, event in made:
                answer.request.put(answer.number, event)

    def _next(self, answer: Running, sides: Sequence[Side]) -> Token | Failed:
        """The next token of one answer, or why there is none."""
        request, rows = answer.request, torch.cat([side.logits for side in sides])  # [1 or 2, V]
        finite, logits = rows.isfinite().all(), rows
        if request.contrast is not None:
            logits = request.contrast(*rows.split(1), answer.sampler.chosen)
        token, _, empty = answer.sampler(logits.where(finite, 0))
        if not finite or empty.any():
            answer.empty()
            self._leave(answer)
            return Failed("engine_failed", NOTHING_LEFT if finite else NOT_FINITE)
        answer.sampler.remember(token)
        answer.token = token
        text = answer.row.feed(int(token), answer.sampler.chosen == answer.most)
        reason, count = answer.row.finish_reason, request.logprobs
        likely = None if count is None else likeliest(logits[0], int(token), count)
        heat = None
        if request.look is not None and sides[0].watch is not None:
            heat = sides[0].watch.mean(*request.look)
        if reason is not None:
            self._leave(answer)
        guessed = None if self.drafts is None else False
        return Token(int(token), text, reason, likely, heat, time.monotonic(), guessed)

    def _leave(self, answer: Running) -> None:
        """Free the slot of an answer that is over; what is cached in it stays."""
        self.answers.remove(answer)
        for side in answer.sides:
            side.slot.busy, side.slot.used = False, time.monotonic()
        if not any(other.request is answer.request for other in self.answers):
            times = answer.request.times
            times["ended"] = time.monotonic()
            self.mean_seconds += 0.2 * (times["ended"] - times["begun"] - self.mean_seconds)


class Rows:
    """Several caches of one row, used where the layers expect one cache of several rows."""

    def __init__(self, caches: Sequence[KVCache]):
        self.caches = caches

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """k, v [B,K,1,D] -> for each row all keys and values so far [1,K,S,D]; S differs by row."""
        both = [
            cache.update(layer, k[i : i + 1], v[i : i + 1]) for i, cache in enumerate(self.caches)
        ]
        return [k for k, _ in both], [v for _, v in both]


def decode_rows(
    model: Llava,
    token_ids: Tensor,
    caches: Sequence[KVCache],
    watches: Sequence[Watch | None] | None = None,
    least: int = 0,
) -> Tensor:
    """One new token per row, each at its own position: token_ids [B] -> logits [B,1,V]. watches: of
    the rows whose attention is noted. least: to fewer rows than this, padding is added. A library
    chooses the order of its sums by the number of rows, so a fixed number keeps the bits."""
    language: LanguageModel = model.language_model
    attends = [
        language.attend if watch is None else watch.over(language.attend)
        for watch in watches or [None] * len(caches)
    ]
    if len(caches) == 1 and least <= 1:
        return language(token_ids[:, None], None, caches[0], attend=attends[0]).logits
    padded = F.pad(token_ids, (0, max(0, least - len(caches))))  # [B or least]
    return language.run(pass_rows, language.embed_tokens(padded[:, None]), list(caches), attends)


def pass_rows(
    language: LanguageModel,
    x: Tensor,
    caches: Sequence[KVCache],
    attends: Sequence[Callable[..., Any]],
) -> Tensor:
    """The pass of `decode_rows`, over embeddings, of which those after the B rows are padding:
    [B or more,1,C] -> logits [B,1,V]. attends: the attention function of each row."""

    def attend(
        q: Tensor, k: list[Tensor], v: list[Tensor], mask: None, causal: bool
    ) -> tuple[Tensor, None]:
        asked, outs = q[:count], None
        if not watched and language.each_alone is not None:
            outs = language.each_alone(asked, k, v)
        if outs is None:
            rows = zip(attends, asked.split(1), k, v, strict=True)
            outs = torch.cat([one(*qkv, None, False)[0] for one, *qkv in rows])
        return torch.cat([outs, torch.zeros_like(q[count:])]) if q.shape[0] > count else outs, None

    count, watched = len(caches), any(each is not language.attend for each in attends)
    for cache in caches:
        cache.reserve(1, 1, None)
    lengths = [*(cache.length for cache in caches), *[0] * (len(x) - count)]
    positions = torch.tensor(lengths, device=x.device)[:, None]
    tables = rotary_tables(positions, language.config, x.dtype)
    context = Context(*tables, None, False, attend, Rows(caches))  # type: ignore[arg-type]
    for layer in language.layers:
        x, _ = layer(x, context)
    for cache in caches:
        cache.advance(1)
    return language.head(language.norm(x))[:count]


def likeliest(logits: Tensor, token_id: int, count: int) -> list[tuple[int, float]]:
    """The token and the `count` most likely ones in its place, with their log-probabilities from
    the logits [V]."""
    log_p = logits.log_softmax(-1)
    ids = [token_id, *log_p.topk(min(count, len(log_p))).indices.tolist()]
    return [(i, float(log_p[i])) for i in ids]
