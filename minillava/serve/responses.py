"""/v1/responses: OpenAI's newer format, read as a chat request, and its answer written as one
response of one message. Nothing is kept, so a request holds its whole conversation."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from minillava.generate.engine import Failed, Token
from minillava.serve.completions import next_event, to_error
from minillava.serve.protocol import (
    NOTHING,
    ApiError,
    ChatRequest,
    Message,
    PicturePart,
    Positive,
    Share,
    TextPart,
    encode,
    refuse,
)
from minillava.serve.service import Chat, Service

LOGPROBS = "message.output_text.logprobs"
"""What a request's `include` names for log-probabilities."""


# --- the request ----------------------------------------------------------------------------------


class InputText(Struct, tag_field="type", tag="input_text", forbid_unknown_fields=True):
    text: str
    prompt_cache_breakpoint: Any = None


class InputImage(Struct, tag_field="type", tag="input_image", forbid_unknown_fields=True):
    image_url: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: str | None = None
    prompt_cache_breakpoint: Any = None


class OutputText(Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    """Of an earlier answer."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class InputItem(Struct, forbid_unknown_fields=True):
    """A message, as a client writes it or as an earlier response had it."""

    role: str
    content: str | list[InputText | InputImage | OutputText]
    type: Literal["message"] | None = None
    id: Any = None
    status: Any = None
    phase: Any = None


class TextField(Struct, forbid_unknown_fields=True):
    format: Any = None
    verbosity: Any = None


class ResponsesRequest(Struct, forbid_unknown_fields=True):
    """POST /v1/responses."""

    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=1000)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    text: TextField | None = None
    # refused, unless they ask for nothing
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    truncation: Any = None
    tools: Any = None
    tool_choice: Any = None
    moderation: Any = None
    image: Any = None
    # ignored, whatever they say
    stream_options: Any = None
    reasoning: Any = None
    store: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    access_programs: Any = None
    max_tool_calls: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


REFUSED = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "truncation": ("disabled",),
    "tools": NOTHING["tools"],
    "tool_choice": NOTHING["tool_choice"],
    "moderation": (),
    "image": (),
}
"""What is refused, and the values, besides null, that ask for nothing."""


def prepare(
    service: Service, asked: ResponsesRequest, put: Callable[[int, Token | Failed], None]
) -> Chat:
    """A request for the engine. Raises ApiError, which names fields as the client wrote them."""
    refuse(asked, REFUSED)
    if asked.text is not None and asked.text.format not in (None, {"type": "text"}):
        told = "text.format is not served but as text; leave it out"
        raise ApiError(400, "unsupported_parameter", told, "text.format")
    with_logprobs = LOGPROBS in (asked.include or [])
    if asked.top_logprobs and not with_logprobs:
        told = f"top_logprobs needs include: [{LOGPROBS!r}]"
        raise ApiError(400, "invalid_value", told, "top_logprobs")
    messages = _messages(asked)
    chat = ChatRequest(
        messages,
        asked.model,
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=with_logprobs,
        top_logprobs=asked.top_logprobs if with_logprobs else None,
    )
    try:
        return service.prepare(chat, put)
    except ApiError as error:
        error.param = error.param and _named(error.param, asked)
        raise


def _messages(asked: ResponsesRequest) -> list[Message]:
    """The conversation as a chat request has it: the instructions, then the input's messages."""
    above = [] if asked.instructions is None else [Message("system", asked.instructions)]
    if isinstance(asked.input, str):
        return [*above, Message("user", asked.input)]
    messages = []
    for i, item in enumerate(asked.input):
        content = item.content
        if not isinstance(content, str):
            parts = [_part(part, f"input[{i}].content[{j}]") for j, part in enumerate(content)]
            content = parts
        messages.append(Message(item.role, content))
    return [*above, *messages]


def _part(part: InputText | InputImage | OutputText, where: str) -> TextPart | PicturePart:
    if not isinstance(part, InputImage):
        return TextPart(part.text)
    if part.file_id is not None:
        told = "no file is kept here; send the picture as a data: URL in image_url"
        raise ApiError(400, "unsupported_value", told, f"{where}.file_id")
    if part.image_url is None:
        told = "image_url is missing"
        raise ApiError(400, "missing_required_parameter", told, f"{where}.image_url")
    return PicturePart(part.image_url)


def _named(param: str, asked: ResponsesRequest) -> str:
    """A field of the chat request by its name in this one."""
    if param == "max_tokens":
        return "max_output_tokens"
    first = int(asked.instructions is not None)

    def item(found: re.Match) -> str:
        number = int(found[1]) - first
        if number < 0:
            return "instructions"
        return "input" if isinstance(asked.input, str) else f"input[{number}]"

    param = re.sub(r"^messages\[(\d+)\]", item, param).removesuffix(".url")
    return "input" if param == "messages" else param


# --- the answer -----------------------------------------------------------------------------------


@dataclass
class Reply:
    """One response as it grows."""

    asked: ResponsesRequest
    chat: Chat
    text: str = ""
    reason: str | None = None
    logprobs: list[dict] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.chat.id.replace("chatcmpl-", "resp_")

    @property
    def item_id(self) -> str:
        return self.chat.id.replace("chatcmpl-", "msg_")

    @property
    def status(self) -> str:
        """Of the response and of its message."""
        if self.reason is None:
            return "in_progress"
        return "incomplete" if self.reason == "length" else "completed"

    def take(self, event: Token) -> list[dict]:
        """Take the answer's next token; returns its log-probabilities."""
        self.chat.note(event)
        self.text += event.text
        self.reason = event.finish_reason
        entries = self.chat.logprobs(0, event)
        self.logprobs += entries
        return entries

    def part(self) -> dict[str, Any]:
        text, logprobs = self.text, self.logprobs
        return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}

    def item(self, begun: bool = True) -> dict[str, Any]:
        content = [self.part()] if begun else []
        told = {"id": self.item_id, "type": "message", "status": self.status}
        return {**told, "role": "assistant", "content": content}

    def body(self, failed: Failed | None = None) -> dict[str, Any]:
        """The response so far."""
        ended = self.reason is not None
        done, cut = ended and self.status == "completed", self.status == "incomplete"
        error = failed and {"code": "server_error", "message": failed.message}
        asked, options = self.asked, self.chat.request.options[0]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.chat.created,
            "status": "failed" if failed else self.status,
            "completed_at": int(time.time()) if done else None,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.chat.model,
            "output": [self.item()] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if options.top_p is None else options.top_p,
            "truncation": "disabled",
            "usage": self.usage() if ended else None,
            **({"minillava": self.chat.timings()} if ended else {}),
        }

    def usage(self) -> dict[str, Any]:
        chat = self.chat
        return {
            "input_tokens": chat.positions,
            "input_tokens_details": {
                "cached_tokens": chat.request.cached,
                "cache_write_tokens": 0,
                "image_tokens": chat.image_positions,
            },
            "output_tokens": chat.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": chat.positions + chat.generated,
        }


async def whole(asked: ResponsesRequest, chat: Chat, events: asyncio.Queue) -> dict[str, Any]:
    """The response in one piece. Raises ApiError if the engine fails."""
    reply = Reply(asked, chat)
    while reply.reason is None:
        _, event = await events.get()
        if isinstance(event, Failed):
            raise to_error(event)
        reply.take(event)
    return reply.body()


async def stream(
    asked: ResponsesRequest, chat: Chat, events: asyncio.Queue
) -> AsyncIterator[bytes]:
    """The response as server-sent events, each with its name and one line of JSON."""
    reply, number = Reply(asked, chat), -1

    def line(kind: str, **told: Any) -> bytes:
        nonlocal number
        number += 1
        told = {"type": f"response.{kind}", "sequence_number": number, **told}
        return f"event: response.{kind}\ndata: ".encode() + encode(told) + b"\n\n"

    part = {"item_id": reply.item_id, "output_index": 0, "content_index": 0}
    yield line("created", response=reply.body())
    yield line("in_progress", response=reply.body())
    yield line("output_item.added", output_index=0, item=reply.item(begun=False))
    yield line("content_part.added", **part, part=reply.part())
    while reply.reason is None:
        found = await next_event(events)
        if found is None:
            yield b": ping\n\n"
        elif isinstance(found[1], Failed):
            yield line("failed", response=reply.body(found[1]))
            return
        else:
            entries, text = reply.take(found[1]), found[1].text
            if entries or text:
                yield line("output_text.delta", **part, delta=text, logprobs=entries)
    yield line("output_text.done", **part, text=reply.text, logprobs=reply.logprobs)
    yield line("content_part.done", **part, part=reply.part())
    yield line("output_item.done", output_index=0, item=reply.item())
    yield line(reply.status, response=reply.body())
