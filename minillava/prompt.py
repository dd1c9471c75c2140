"""Conversation templates: the exact strings each model was trained on. A changed space is a changed
model.

The templates are data; `render` is the only code. Source: LLaVA, conversation.py; for `hf`, the
chat template of the llava-hf checkpoints.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from minillava.options import expect_text

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


@dataclass(frozen=True)
class Template:
    """system and opening are plain text, the others format strings whose `{}` is filled with text;
    in first_user the first `{}` is the finished system_block, the second the question.

    stop: text that ends an answer, where the model was not trained to end with its end token.
    separators: text that must not be forged by a user (Segment, `spelled`).
    """

    system: str
    system_block: str  # not written when there is no system text
    user: str
    assistant: str  # a finished answer
    opening: str  # what the model continues
    # the first turn, where the system text stands inside it; None: block + user
    first_user: str | None = None
    stop: tuple[str, ...] = ()
    separators: tuple[str, ...] = ()
    single_turn: bool = False


_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

TEMPLATES = {
    # The one LLaVA's own command line uses for 1.5, and ours.
    "llava_v1": Template(_HUMAN, "{} ", "USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:"),
    # The one LLaVA-1.5 was trained and evaluated with: two words differ ("user" for "human").
    "vicuna_v1": Template(_USER, "{} ", "USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:"),
    "llava_v0": Template(
        _HUMAN,
        "{}###",
        "Human: {}###",
        "Assistant: {}###",
        "Assistant:",
        stop=("###",),
        separators=("###",),
    ),
    "llava_llama_2": Template(
        _VISION,
        "<<SYS>>\n{}\n<</SYS>>\n\n",
        "<s>[INST] {} [/INST]",
        " {} </s>",
        "",
        first_user="[INST] {}{} [/INST]",
        separators=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    "mistral_instruct": Template(
        "",
        "<<SYS>>\n{}\n<</SYS>>\n\n",
        "[INST] {} [/INST]",
        " {} </s>",
        "",
        first_user="[INST] {}{} [/INST]",
        separators=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
    # Unlike standard ChatML there is no newline between <|im_end|> and the next <|im_start|>.
    "chatml_direct": Template(
        "Answer the questions.",
        "<|im_start|>system\n{}<|im_end|>",
        "<|im_start|>user\n{}<|im_end|>",
        "<|im_start|>assistant\n{}<|im_end|>",
        "<|im_start|>assistant\n",
        stop=("<|im_end|>",),
        separators=("<|im_start|>", "<|im_end|>"),
    ),
    # The chat template of the llava-hf checkpoints: no system text, no end token between turns.
    "hf": Template("", "{} ", "USER: {} ", "ASSISTANT: {} ", "ASSISTANT:"),
    # The captions of projector pre-training.
    "plain": Template("", "{}", "{}\n", "{}\n", "", single_turn=True),
}
DEFAULT_TEMPLATE = "llava_v1"


def find_template(name: str) -> Template:
    """The template of that name; ValueError with the known names otherwise."""
    if name not in list(TEMPLATES):  # a list, which also looks for what has no hash
        raise ValueError(f"unknown template {name!r}, expected one of: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def place_images(question: str, images: int) -> str:
    """A question with one marker per picture: as written, or one line each before the text if none
    is. Raises ValueError for an empty question, or with both numbers when some are written but not
    as many as pictures."""
    expect_text(question, "the question")
    if not question.strip():
        raise ValueError("the question is empty; write what you want to know")
    written = question.count(IMAGE_MARKER)
    if written and written != images:
        raise ValueError(
            f"the prompt places {written} picture(s) with {IMAGE_MARKER} but {images} picture(s) "
            "were given; "
            f"write {IMAGE_MARKER} once per picture, or leave it out to put them before the text"
        )
    return question if written else f"{IMAGE_MARKER}\n" * images + question


def render(
    template: Template, turns: Sequence[tuple[str, str | None]], system: str | None = None
) -> Prompt:
    """The prompt of a conversation: (question, answer) pairs, the last answer None for the one to
    come.

    system: instead of the template's own; "" for none. Raises ValueError for an empty question, a
    missing answer before the last turn, or more turns than the template can hold.
    """
    if not turns:
        raise ValueError("a conversation needs at least one question")
    if template.single_turn and len(turns) > 1:
        raise ValueError(
            f"this template holds one turn, the conversation has {len(turns)}; choose another "
            "template"
        )
    system = template.system if system is None else system
    expect_text(system, "system")
    above = _user_text(system, template, images=False)
    block = _fill(template.system_block, above) if system else []
    segments: list[Segment] = []
    for i, (question, answer) in enumerate(turns):
        expect_text(question, f"question {i + 1}")
        expect_text("" if answer is None else answer, f"answer {i + 1}")
        if not question.strip():
            raise ValueError(f"question {i + 1} is empty; write what you want to know")
        if answer is None and i < len(turns) - 1:
            raise ValueError(f"question {i + 1} has no answer, but question {i + 2} follows it")
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
