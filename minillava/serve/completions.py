"""/v1/chat/completions: answers as OpenAI's chat format has them, whole or in chunks."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from minillava.generate.engine import Failed, Token
from minillava.serve.protocol import ApiError, ChatRequest, encode, error_body
from minillava.serve.service import Chat

PING = 15.0
"""Seconds without an event after which a stream says a word: proxies close silent ones."""


async def next_event(events: asyncio.Queue) -> tuple[int, Token | Failed] | None:
    """The number of an answer and what is new of it; None if nothing came for PING seconds."""
    # a timer that puts None; a scope of anyio takes as long as all else that is done for a token
    late = asyncio.get_running_loop().call_later(PING, events.put_nowait, None)
    try:
        return await events.get()
    finally:
        late.cancel()


def to_error(event: Failed) -> ApiError:
    return ApiError(
        503 if event.code == "shutting_down" else 500,
        event.code,
        event.message,
        headers={"x-should-retry": "false"} if event.code == "engine_failed" else None,
    )


async def whole(asked: ChatRequest, chat: Chat, events: asyncio.Queue) -> dict[str, Any]:
    """The answer in one piece. Raises ApiError if the engine fails."""
    count = len(chat.request.options)
    texts, reasons = [""] * count, [""] * count
    entries: list[list[dict]] = [[] for _ in range(count)]
    tokens: list[list[Token]] = [[] for _ in range(count)]
    while not all(reasons):
        number, event = await events.get()
        if isinstance(event, Failed):
            raise to_error(event)
        chat.note(event)
        texts[number] += event.text
        entries[number] += chat.logprobs(number, event)
        tokens[number].append(event)
        chat.extra(number, event)
        reasons[number] = event.finish_reason or ""
    return {
        **chat.head("chat.completion"),
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": texts[i], "refusal": None},
                "logprobs": {"content": entries[i], "refusal": None} if asked.logprobs else None,
                "finish_reason": reasons[i],
                **chat.extras(i, texts[i], tokens[i]),
            }
            for i in range(count)
        ],
        "usage": chat.usage(),
        "minillava": chat.timings(),
    }


async def stream(asked: ChatRequest, chat: Chat, events: asyncio.Queue) -> AsyncIterator[bytes]:
    """The answer as server-sent events: one line of JSON each, and [DONE] after the last."""
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    head = chat.head("chat.completion.chunk")

    def line(choices: list[dict], **more: Any) -> bytes:
        usage = {"usage": None} if with_usage and "usage" not in more else {}
        return b"data: " + encode({**head, "choices": choices, **usage, **more}) + b"\n\n"

    left, begun = len(chat.request.options), set()
    while left:
        found = await next_event(events)
        if found is None:
            yield b": ping\n\n"
            continue
        number, event = found
        if isinstance(event, Failed):
            error = to_error(event)
            yield b"data: " + encode(error_body(500, error.code, str(error))) + b"\n\n"
            return
        chat.note(event)
        if number not in begun:
            begun.add(number)
            first = {} if chat.look is None else {"minillava": chat.look}
            yield line([_choice(number, {"role": "assistant", "content": ""})], **first)
        entries, more = chat.logprobs(number, event), chat.extra(number, event)
        if event.text or entries or any(more.values()):
            told = {"content": entries, "refusal": None} if entries else None
            yield line([{**_choice(number, {"content": event.text}, told), **more}])
        if event.finish_reason is not None:
            left -= 1
            yield line([_choice(number, {}, reason=event.finish_reason)], minillava=chat.timings())
    if with_usage:
        yield line([], usage=chat.usage())
    yield b"data: [DONE]\n\n"


def _choice(
    index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
