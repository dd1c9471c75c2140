"""From messages to the prompt that `generate` writes, and from `data:` URLs to pictures.

Nothing is ever fetched, and no string of a client is taken for a path.
"""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from minillava.files.pictures import open_image
from minillava.prompt import IMAGE_MARKER, Prompt, Segment, place_images, render
from minillava.serve.protocol import ApiError, Message, Picture, TextPart
from minillava.templates import Template

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What a picture may be, by its content: rarer decoders are where accidents happen."""

DATA_URL = re.compile(r"data:[^,;]*(?:;[^,;=]+=[^,;]*)*;base64,", re.IGNORECASE)

ROLES = ("system", "developer", "user", "assistant")

Part = str | bytes
"""Of a user's message: text, or the bytes of a picture."""


class Read(NamedTuple):
    """prompt: up to where an answer begins. pictures: in order. begun: the prompt with the answer
    that the last message began, if there is one."""

    prompt: Prompt
    pictures: list[bytes]
    begun: Prompt


def read_messages(
    messages: Sequence[Message],
    template: Template,
    system: str | None = None,
    go_on: bool | None = False,
) -> Read:
    """The prompt of a conversation. system: the system text if no message has one. go_on: the last
    message is the beginning of the answer. Raises ApiError."""
    above, said = _gather(messages)
    begun = _take_begun(said) if go_on else ""
    if not said or said[0][0] != "user" or said[-1][0] != "user":
        at = 0 if not said or said[0][0] != "user" else len(messages) - 1
        told = "the first message after the system's, and the last one, are a user's"
        raise ApiError(400, "invalid_value", told, f"messages[{at}].role")
    written = [part for _, parts in said for part in parts if isinstance(part, str)]
    system = "\n".join(above) if above else system
    marker = _unused([system or "", *written, begun])
    texts, pictures = [], []
    for role, parts in said:
        if role == "user":
            pictures += [part for part in parts if isinstance(part, bytes)]
            texts.append(_lay_out(parts, marker, template.one_line))
        else:
            texts.append("\n".join(str(part) for part in parts))
    for text in texts[::2]:
        if not text.strip():
            told = "a user's message is empty; write what you want to know"
            raise ApiError(400, "invalid_value", told, "messages")
    turns = [*zip(texts[::2], [*texts[1::2], None], strict=True)]
    try:
        prompt = render(template, turns, system)
        finished = render(template, [*turns[:-1], (texts[-1], begun)], system) if begun else prompt
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), "messages") from None
    closed = begun and not template.assistant.endswith("{}")  # by what ends a finished answer
    end = -1 if closed else None
    whole = _typed(finished.segments[:end], marker)
    return Read(_typed(prompt.segments, marker), pictures, whole)


def _gather(messages: Sequence[Message]) -> tuple[list[str], list[tuple[str, list[Part]]]]:
    """The system's texts, and what was said: roles in turn, each with its parts. Raises
    ApiError."""
    above: list[str] = []
    said: list[tuple[str, list[Part]]] = []
    for i, message in enumerate(messages):
        parts = _parts(message, f"messages[{i}]")
        if message.role in ("system", "developer"):
            if said:
                told = "system messages come first; put it before all others"
                raise ApiError(400, "invalid_value", told, f"messages[{i}].role")
            above.append("\n".join(str(part) for part in parts))
        elif said and said[-1][0] == message.role:
            said[-1][1].extend(parts)
        else:
            said.append((message.role, parts))
    return above, said


def _take_begun(said: list[tuple[str, list[Part]]]) -> str:
    """The text of the last message, which is an assistant's and begins the answer. Raises
    ApiError."""
    if not said or said[-1][0] != "assistant":
        told = "continue_final_message needs a last message of the assistant's"
        raise ApiError(400, "invalid_value", told, "continue_final_message")
    return "\n".join(str(part) for part in said.pop()[1])


def _typed(segments: Sequence[Segment], marker: str) -> Prompt:
    """A prompt in which what a user typed is text, even if it is <image>."""
    return Prompt([Segment(s.text.replace(marker, IMAGE_MARKER), s.kind) for s in segments])


def _unused(texts: Sequence[str]) -> str:
    """A stand-in for an <image> that a user typed, which no text contains. Each text is searched
    once: one that is full of such names would otherwise be searched for each of them."""
    used = {name for text in texts for name in re.findall(r"<typed-[0-9]+>", text)}
    return next(name for name in map("<typed-{}>".format, count()) if name not in used)


def _lay_out(parts: Sequence[Part], marker: str, one_line: bool) -> str:
    """One user's message as a question: the pictures first, on lines as the template has them, and
    then the text, however the client ordered them; only a picture between two texts stays where it
    is."""
    shown = [
        IMAGE_MARKER if isinstance(part, bytes) else part.replace(IMAGE_MARKER, marker)
        for part in parts
    ]
    kinds = [isinstance(part, bytes) for part in parts]
    if kinds in (sorted(kinds), sorted(kinds, reverse=True)):
        # as before any text, since there may be none
        pictures = place_images("?", sum(kinds), one_line).removesuffix("?")
        texts = [text for text, is_picture in zip(shown, kinds, strict=True) if not is_picture]
        return pictures + "\n".join(texts)
    return "\n".join(shown)


def _parts(message: Message, where: str) -> list[Part]:
    """Texts, and pictures as bytes. Raises ApiError."""
    if message.role not in ROLES:
        told = f"role is {message.role[:40]!r}, expected one of: {', '.join(ROLES)}"
        raise ApiError(400, "unsupported_value", told, f"{where}.role")
    for name in ("name", "refusal", "audio", "tool_calls"):
        if getattr(message, name):
            raise ApiError(400, "unsupported_value", f"{name} is not served", f"{where}.{name}")
    if message.content is None and message.role != "assistant":
        raise ApiError(400, "invalid_value", "content is null", f"{where}.content")
    if message.content is None or isinstance(message.content, str):
        return [message.content or ""]
    parts: list[Part] = []
    for i, part in enumerate(message.content):
        at = f"{where}.content[{i}]"
        if isinstance(part, TextPart):
            parts.append(part.text)
        elif message.role != "user":
            told = "only a user's message has pictures"
            raise ApiError(400, "unsupported_value", told, at)
        else:
            url = part.image_url.url if isinstance(part.image_url, Picture) else part.image_url
            parts.append(read_data_url(url, f"{at}.image_url.url"))
    return parts


class Content(bytes):
    """The bytes of a picture, and the place in the request where they were."""

    where = "messages"


def read_data_url(url: str, where: str) -> Content:
    """The bytes of a `data:` URL in base64; its stated type is ignored. Raises ApiError."""
    head = DATA_URL.match(url[:1000])
    if head is None:
        told = "a picture is a data: URL in base64; nothing is fetched, and no file is read"
        raise ApiError(400, "image_url_not_supported", told, where)
    try:
        content = Content(base64.b64decode(url[head.end() :], validate=True))
    except (binascii.Error, ValueError) as error:
        told = f"the data: URL is not base64 ({error})"
        raise ApiError(400, "invalid_image", told, where) from None
    content.where = where
    return content


def open_picture(content: Content, most_pixels: int) -> Image.Image:
    """A picture, upright and RGB. Its size is checked by the header before its pixels are decoded.
    Raises ApiError."""
    where = content.where
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError):
        told = f"not a picture, or none of: {', '.join(FORMATS)}"
        raise ApiError(400, "invalid_image", told, where) from None
    width, height = picture.size
    if width * height > most_pixels or max(picture.size) > 65535:
        told = f"the picture has {width} x {height} pixels, at most {most_pixels:,} are taken"
        raise ApiError(400, "image_too_large", told, where)
    try:
        return open_image(picture)
    except (ValueError, OSError) as error:
        told = str(error).partition(": ")[2] or "the picture is damaged"
        raise ApiError(400, "invalid_image", told, where) from None
