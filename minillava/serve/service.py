"""From a request that was read to one that the engine takes, and from its tokens to answers."""

import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minillava import __version__
from minillava.assistant import Assistant
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.fast.parallel import SharedLanguageModel
from minillava.generate.contrast import Contrast
from minillava.generate.engine import Engine, Failed, Refused, Request, Token
from minillava.generate.inputs import VIDEO_MARKER
from minillava.options import Options, dtype_name
from minillava.serve import extensions
from minillava.serve.protocol import ApiError, ChatRequest, Entries, TokenizeRequest
from minillava.serve.reading import open_picture, read_messages
from minillava.tiles.pictures import Tiled, key_of, one_of, positions_of
from minillava.tokenizer import common_prefix

Opened = tuple[bytes, Tensor | Tiled, tuple[int, int]]

STATUS = {"queue_full": 429, "context_length_exceeded": 400}
"""Of a request that the engine refuses; 503 for all else."""

DECODING = 2
"""Requests whose pictures are decoded at once: a file of some kilobytes may have --max-pixels."""


@dataclass
class Settings:
    """What the door's flags say, in bytes, pixels and seconds."""

    names: Sequence[str]  # of the model; the first is its own
    keys: Sequence[bytes]  # of which a client sends one, if there are any
    hosts: Sequence[str]  # the names by which clients reach it
    cors: Sequence[str]  # sites whose pages may ask
    page: bool
    max_tokens: int
    temperature: float
    system: str | None
    max_body: int
    body_timeout: float
    max_pixels: int
    stall: float


@dataclass
class Chat:
    """A request to the engine, and what is needed to write its answers."""

    asked: ChatRequest
    request: Request
    id: str
    created: int
    model: str
    fingerprint: str
    positions: int
    image_positions: int
    entries: list[Entries]
    drafts: bool = False  # whether tokens are guessed
    look: dict[str, Any] | None = None  # how the maps are to be read
    seen: list[extensions.Seen] = field(default_factory=list)  # of each answer, with `look`
    generated: int = 0
    first: float | None = None  # when its first token came
    last: dict[int, float] = field(default_factory=dict)  # when each answer's last token was chosen

    def head(self, kind: str) -> dict[str, Any]:
        """The first fields of every answer and every chunk."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def note(self, event: Token) -> None:
        self.generated += 1
        self.first = time.monotonic() if self.first is None else self.first

    def logprobs(self, number: int, event: Token) -> list[dict]:
        return (
            [] if event.logprobs is None else self.entries[number].entry(event.id, event.logprobs)
        )

    def extra(self, number: int, event: Token) -> dict[str, Any]:
        """Of one token, the fields of a chunk's choice that are our own."""
        ids: dict[str, Any] = {}
        if self.asked.token_ids:
            before = self.last.get(number, self.request.times["begun"])
            ids = {"token_ids": [event.id], "token_ms": round(1e3 * (event.at - before), 2)}
            self.last[number] = event.at
            ids |= {"guessed": event.guessed} if self.drafts else {}
        if self.look is None:
            return ids
        return {**ids, "look": self.seen[number].entry(event)}

    def extras(self, number: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Of a whole answer, the fields of its choice that are our own."""
        own: dict[str, Any] = {}
        if self.asked.token_ids:
            own["token_ids"] = [token.id for token in tokens]
            own |= {"guessed": [token.guessed for token in tokens]} if self.drafts else {}
        if self.look is None:
            return own
        return {**own, "look": {**self.look, "words": self.seen[number].words(text)}}

    def usage(self) -> dict[str, Any]:
        details = {"reasoning_tokens": 0}
        if self.drafts:
            right, wrong = self.request.accepted, self.request.drafted - self.request.accepted
            details["accepted_prediction_tokens"] = right
            details["rejected_prediction_tokens"] = wrong
        return {
            "prompt_tokens": self.positions,
            "completion_tokens": self.generated,
            "total_tokens": self.positions + self.generated,
            "prompt_tokens_details": {
                "cached_tokens": self.request.cached,
                "image_tokens": self.image_positions,
            },
            "completion_tokens_details": details,
        }

    def counts(self) -> str:
        """For the log."""
        request = self.request
        right = f", {request.accepted} of {request.drafted} guesses right" if self.drafts else ""
        return f" {self.positions}+{self.generated} tokens{right}"

    def timings(self) -> dict[str, Any]:
        """The fields of an answer that are our own: the seeds, how long each stage took, and what
        was guessed."""
        times, now = self.request.times, time.monotonic()
        begun, read = times.get("begun", now), times.get("read", now)
        pictured = times.get("pictured", begun)
        more = self.generated - len(self.request.options)
        spent = max(now - read, 1e-9)
        return {
            "seed": [options.seed for options in self.request.options],
            "queue_ms": round(1e3 * (begun - times["taken"]), 1),
            "picture_ms": round(1e3 * (pictured - begun), 1),
            "prefill_ms": round(1e3 * (read - pictured), 1),
            "prefill_tokens": self.positions - self.request.cached,
            "decode_ms": round(1e3 * spent, 1),
            "tokens_per_second": round(more / spent, 1) if more > 0 else None,
            **(self.guesses() if self.drafts else {}),
        }

    def guesses(self) -> dict[str, int]:
        """How many passes there were after the prompt's, and how many guesses they checked."""
        return {name: vars(self.request)[name] for name in ("passes", "drafted", "accepted")}


@dataclass
class Service:
    """A model that is served: what the HTTP side asks, in any thread."""

    assistant: Assistant
    engine: Engine
    settings: Settings
    created: int = field(default_factory=lambda: int(time.time()))
    # [3, R, R] or tiles, and the picture's own width and height
    _pixels: OrderedDict[bytes, tuple[Tensor | Tiled, tuple[int, int]]] = field(
        default_factory=OrderedDict
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _decoding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(DECODING))

    def models(self) -> list[dict[str, Any]]:
        return [
            {"id": name, "object": "model", "created": self.created, "owned_by": "minillava"}
            for name in self.settings.names
        ]

    def model(self, name: str | None) -> str:
        """The name of the model that is asked for. Raises ApiError if it is another one."""
        if name and name not in self.settings.names:
            known = ", ".join(self.settings.names)
            told = f"there is no model {name[:100]!r}; this server has: {known}"
            raise ApiError(404, "model_not_found", told, "model")
        return name or self.settings.names[0]

    def health(self) -> tuple[int, dict[str, Any]]:
        """The HTTP status, and the body."""
        engine = self.engine
        if engine.state == "draining":
            return 503, {"status": "draining"}
        if not engine.is_alive():
            return 503, {"status": "failed", "reason": "ended"}
        if time.monotonic() - engine.last_step > self.settings.stall:
            return 503, {"status": "failed", "reason": "stalled"}
        running, waiting = len(engine.answers), len(engine.waiting)
        slots = len(engine.slots)
        return 200, {"status": "ok", "slots": slots, "running": running, "waiting": waiting}

    def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        """The ids of a text or of a conversation, and how many positions they take."""
        if (asked.text is None) == (asked.messages is None):
            raise ApiError(400, "invalid_value", "give text or messages, one of the two", "text")
        tokenizer = self.assistant.tokenizer
        if asked.messages is None:
            self._check_text(str(asked.text))
            ids, contents = tokenizer.encode(str(asked.text)), []
        else:
            template = self.assistant.template
            prompt, contents, _ = read_messages(asked.messages, template, self.settings.system)
            self._check_text(prompt)
            ids = tokenizer.encode(prompt)
        self._check_pictures(len(contents))
        config = self.assistant.model.config
        positions = len(contents) * config.tokens_per_image
        if config.grid:  # each takes its own
            positions = sum(positions_of(config, each) for _, each, _ in self._pictures(contents))
        return {
            "ids": ids,
            "pieces": ["<image>" if i == IMAGE_TOKEN_INDEX else tokenizer.piece(i) for i in ids],
            "count": len(ids) - len(contents) + positions,
            "picture_positions": positions,
        }

    def prepare(self, asked: ChatRequest, put: Callable[[int, Token | Failed], None]) -> Chat:
        """A request for the engine. Raises ApiError for whatever is wrong with it."""
        model, assistant = self.model(asked.model), self.assistant
        config, tokenizer = assistant.model.config, assistant.tokenizer
        contrast, count = extensions.read_contrast(asked), asked.n or 1
        self._check_slots(count, 1 if contrast is None else 2)
        prompt, contents, begun = read_messages(
            asked.messages, assistant.template, self.settings.system, asked.continue_final_message
        )
        self._check_pictures(len(contents))
        self._check_text(begun)
        look = self._look(asked, len(contents))
        whole, prefix = tokenizer.encode(begun), []
        if asked.continue_final_message:
            prefix = whole[common_prefix(whole, tokenizer.encode(prompt)) :]
        prefix += extensions.read_prefix(asked, config)
        ids = [*whole, *(asked.prefix_ids or ())]
        options = [extensions.count_from(prefix, each) for each in self._options(asked, count)]
        opened = self._pictures(contents)
        pictures = [(key, pixels) for key, pixels, _ in opened]
        patches = sum(positions_of(config, pixels) for _, pixels in pictures)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        request = Request(ids, pictures, options, put, top, prefix, look, contrast)
        request.images = self._images(contents)
        if contrast is not None:
            self._check_together([size for _, _, size in opened])
            request.second_rows = self._seconds(contrast, ids, contents, options)
        shown, ends = bool(prefix), config.eos_token_ids
        return Chat(
            asked,
            request,
            f"chatcmpl-{secrets.token_hex(12)}",
            int(time.time()),
            model,
            f"minillava-{__version__}-{self._dtype()}",
            len(ids) - len(pictures) + patches,
            patches,
            [Entries(tokenizer, ends, shown, bool(asked.token_ids)) for _ in range(count)],
            self.engine.drafts is not None,
            look and extensions.look_head(assistant, opened[0][2], look),
            [extensions.Seen(tokenizer, prefix) for _ in range(count) if look],
        )

    def _look(self, asked: ChatRequest, pictures: int) -> tuple[list[int], list[int]] | None:
        model = self.assistant.model
        look = extensions.read_look(asked, model.config, pictures)
        if look is not None and isinstance(model.language_model, SharedLanguageModel):
            told = "no process has the attention of all heads; start the server without torchrun"
            raise ApiError(400, "unsupported_value", told, "look")
        return look

    def _check_slots(self, count: int, each: int) -> None:
        slots = len(self.engine.slots)
        if each > slots:
            told = f"contrast takes two slots for each answer, this server has {slots} (--slots)"
            raise ApiError(400, "invalid_value", told, "contrast")
        if count * each > slots:
            told = f"n is {count}, this server makes {slots // each} answers at once (--slots)"
            raise ApiError(400, "invalid_value", told, "n")

    def _check_pictures(self, count: int) -> None:
        patches = self.assistant.model.config.tokens_per_image
        if count * patches >= self.engine.capacity:
            told = (
                f"{count} pictures take {patches} positions each, a conversation has "
                f"{self.engine.capacity}; give fewer"
            )
            raise ApiError(400, "too_many_images", told, "messages")

    def _check_together(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raises ApiError if the pictures of a request are too large to be open at once."""
        pixels, most = sum(width * height for width, height in sizes), self.settings.max_pixels
        if pixels > most:
            told = (
                f"contrast opens all pictures at once, and they have {pixels:,} pixels together; "
                f"at most {most:,} are taken"
            )
            raise ApiError(400, "image_too_large", told, "messages")

    def _seconds(
        self,
        contrast: Contrast,
        ids: Sequence[int],
        contents: Sequence[bytes],
        options: Sequence[Options],
    ) -> list[tuple[Sequence[int], list[tuple[bytes, Tensor | Tiled]]]]:
        """What the second row of each answer reads."""
        processor = self.assistant.image_processor
        with self._decoding, torch.no_grad():
            pictures = self._open(contents)
            return [
                extensions.second_prompt(contrast, ids, pictures, processor, each)
                for each in options
            ]

    def _images(self, contents: Sequence[bytes]) -> Callable[[], list[Image.Image]]:
        """What opens the pictures for a drafter, if it sees them: else their bytes are not kept."""
        drafts = self.engine.drafts
        return partial(self._open, contents if drafts is not None and drafts.sees else ())

    def _open(self, contents: Sequence[bytes]) -> list[Image.Image]:
        return [open_picture(content, self.settings.max_pixels) for content in contents]

    def submit(self, chat: Chat) -> None:
        """Put a request into the engine's queue. Raises ApiError."""
        self._accepted(self.engine.submit, chat.request)

    def check_room(self) -> None:
        """Raises ApiError if the engine would take no request now."""
        self._accepted(self.engine.check_room)

    def _accepted(self, ask: Callable[..., None], *given: Request) -> None:
        try:
            ask(*given)
        except Refused as error:
            headers = {} if error.seconds is None else {"retry-after": str(error.seconds)}
            if error.code == "engine_failed":
                headers["x-should-retry"] = "false"
            status = STATUS.get(error.code, 503)
            param = "messages" if status == 400 else None
            raise ApiError(status, error.code, str(error), param, headers) from None

    def _dtype(self) -> str:
        return dtype_name(self.assistant.model.language_model.embed_tokens.weight.dtype)

    def _check_text(self, text: str) -> None:
        try:
            self.assistant.check_text(text)
        except ValueError as error:
            video = VIDEO_MARKER in text and VIDEO_MARKER in self.assistant.tokenizer.added
            code = "unsupported_value" if video else "context_length_exceeded"
            raise ApiError(400, code, str(error), "messages") from None

    def _options(self, asked: ChatRequest, count: int) -> list[Options]:
        """The options of each answer; their seeds follow one another. Raises ApiError."""
        temperature = self.settings.temperature if asked.temperature is None else asked.temperature
        if asked.top_p == 0:
            temperature = 0.0
        given: dict[str, Any] = {
            "max_new_tokens": asked.max_completion_tokens
            or asked.max_tokens
            or self.settings.max_tokens,
            "temperature": temperature,
            "typical_p": asked.typical_p,
            "repetition_penalty": asked.repetition_penalty,
            "min_new_tokens": asked.min_tokens or 0,
            "no_repeat_ngram_size": asked.no_repeat_ngram_size,
            "stop": asked.stop or (),
        }
        # at 0 filters cannot remove the best token, and clients always send them
        if temperature > 0:
            given |= {"top_p": asked.top_p, "top_k": asked.top_k, "min_p": asked.min_p}
        first = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        seeds = [first + i if asked.seed is not None or temperature else None for i in range(count)]
        try:
            return [self.assistant.options(**given, seed=seed) for seed in seeds]
        except ValueError as error:
            named = (word for word in re.findall(r"\w+", str(error)) if given.get(word) is not None)
            name = next(named, None)  # the first that the sentence is about
            param = {"min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens"}.get(name, name)
            raise ApiError(400, "invalid_value", str(error), param) from None

    def _pictures(self, contents: Sequence[bytes]) -> list[Opened]:
        several = len(contents) > 1
        return [self._picture(content, several) for content in contents]

    def _picture(self, content: bytes, several: bool) -> Opened:
        """A picture's digest, pixels [3,R,R], and width and height, which are kept: a client sends
        every picture again with every question."""
        processor = self.assistant.image_processor
        key = key_of(processor, content, several)
        if (kept := self._kept(key)) is not None:
            return kept
        with self._decoding, torch.no_grad():
            if (kept := self._kept(key)) is not None:  # by another request, while this one waited
                return kept
            picture = open_picture(content, self.settings.max_pixels)
            pixels = one_of(processor, picture, several)
            with self._lock:
                self._pixels[key] = pixels, picture.size
                while len(self._pixels) > self.engine.most_pictures:
                    self._pixels.popitem(last=False)
        return key, pixels, picture.size

    def _kept(self, key: bytes) -> Opened | None:
        with self._lock:
            if key not in self._pixels:
                return None
            self._pixels.move_to_end(key)
            return key, *self._pixels[key]
