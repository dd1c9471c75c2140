"""From a question to the exact prompt, which remembers what in it is the template's and what a
user wrote."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from minillava.options import expect_text

# Two of these are used here; the others are for those who look for them here.
from minillava.templates import DEFAULT_TEMPLATE, TEMPLATES, Template, check_turns, find_template

IMAGE_MARKER = "<image>"
"""Where it stands in a question, a picture goes."""

DEFAULT_PROMPT = "Please describe this image in detail."


class Segment(NamedTuple):
    """A stretch of a prompt and how the tokenizer must read it.

    template: ours; `<image>`, `<s>` and `</s>` in it are tokens. text: the user's; nothing in it is
    special. spelled: a separator of the template that a user typed; encoded letter by letter, so
    that the model reads the same characters but not the token that ends a turn.
    """

    text: str
    kind: Literal["template", "text", "spelled"]


class Prompt(str):
    """The exact prompt, which remembers which of its stretches came from a user."""

    segments: tuple[Segment, ...]

    def __new__(cls, segments: Sequence[Segment]) -> "Prompt":
        prompt = super().__new__(cls, "".join(s.text for s in segments))
        prompt.segments = tuple(s for s in segments if s.text)
        return prompt

    def __add__(self, text: str) -> "Prompt":
        """The prompt and the beginning of an answer, which is text like a user's."""
        more = text.segments if isinstance(text, Prompt) else [Segment(text, "text")]
        return Prompt([*self.segments, *more])

    def __getnewargs__(self) -> tuple[Any]:
        return (self.segments,)  # what copy and pickle make it from


def place_images(question: str, images: int, one_line: bool = False) -> str:
    """A question with one marker per picture: as written, or one line each (one_line: one for all)
    before the text if none is. Raises ValueError for an empty question, or with both numbers if
    some are written but not as many as pictures."""
    expect_text(question, "the question")
    if not question.strip():
        raise ValueError("the question is empty; write what you want to know")
    written = question.count(IMAGE_MARKER)
    if written and written != images:
        raise ValueError(
            f"the prompt places {written} picture(s) with {IMAGE_MARKER} but {images} picture(s) "
            f"were given; write {IMAGE_MARKER} once per picture, or leave it out to put them "
            "before the text"
        )
    lines = f"{IMAGE_MARKER * images}\n" if images and one_line else f"{IMAGE_MARKER}\n" * images
    return question if written else lines + question


def render(
    template: Template, turns: Sequence[tuple[str, str | None]], system: str | None = None
) -> Prompt:
    """The prompt of a conversation: (question, answer) pairs, the last answer None for the one to
    come.

    system: instead of the template's own; "" for none. Raises ValueError for an empty question, a
    missing answer before the last turn, or more turns than the template can hold.
    """
    system = template.system if system is None else system
    check_turns(template, turns, system)
    above = _user_text(system, template, images=False)
    block = _fill(template.system_block, above) if system else []
    segments: list[Segment] = []
    for i, (question, answer) in enumerate(turns):
        asked = _user_text(question, template, images=True)
        if i == 0 and template.first_user is not None:
            segments += _fill(template.first_user, block, asked)
        else:
            segments += (block if i == 0 else []) + _fill(template.user, asked)
        # An empty answer is an answer; only None leaves the turn open (the original mixes the two
        # up).
        if answer is None:
            segments.append(Segment(template.opening, "template"))
        else:
            segments += _fill(template.assistant, _user_text(answer, template, images=False))
    return Prompt(segments)


def _user_text(text: str, template: Template, images: bool) -> list[Segment]:
    """What a person wrote, cut into plain stretches, picture markers and forged separators."""
    special = (IMAGE_MARKER,) * images + template.separators
    if not special:
        return [Segment(text, "text")]
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return [
        Segment(part, "text" if i % 2 == 0 else "template" if part == IMAGE_MARKER else "spelled")
        for i, part in enumerate(parts)
    ]


def _fill(form: str, *contents: list[Segment]) -> list[Segment]:
    """A format string with each `{}` replaced by segments."""
    pieces = form.split("{}")
    segments = [Segment(pieces[0], "template")]
    for content, piece in zip(contents, pieces[1:], strict=True):
        segments += [*content, Segment(piece, "template")]
    return segments
