"""Conversation templates as data, to the last space: a changed space is a changed model. The
default is the one of LLaVA's command line; LLaVA-1.5 was trained with `vicuna_v1`.

Source: LLaVA, conversation.py; for `hf`, the chat template of the llava-hf checkpoints.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from minillava.options import expect_one_of, expect_text


@dataclass(frozen=True)
class Template:
    """system_block, user, assistant and first_user are format strings whose `{}` is filled with
    text, system and opening are plain text; in first_user the first `{}` is the finished
    system_block, the second the question.

    stop: text that ends an answer, if the model was not trained to end with its end token.
    separators: text that must not be forged by a user (prompt.Segment, `spelled`).
    """

    system: str
    system_block: str  # not written if there is no system text
    user: str
    assistant: str  # a finished answer
    opening: str  # what the model continues
    # the first turn, if the system text stands inside it; None: block + user
    first_user: str | None = None
    stop: tuple[str, ...] = ()
    separators: tuple[str, ...] = ()
    single_turn: bool = False
    one_line: bool = False  # the pictures of a question share one line before its text


# The one LLaVA's own command line uses for 1.5, and ours.
LLAVA_V1 = Template(
    system=(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    system_block="{} ",
    user="USER: {} ",
    assistant="ASSISTANT: {}</s>",
    opening="ASSISTANT:",
)
LLAVA_LLAMA_2 = Template(
    system=(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    system_block="<<SYS>>\n{}\n<</SYS>>\n\n",
    user="<s>[INST] {} [/INST]",
    assistant=" {} </s>",
    opening="",
    first_user="[INST] {}{} [/INST]",
    separators=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
)

TEMPLATES = {
    "llava_v1": LLAVA_V1,
    # The one LLaVA-1.5 was trained and evaluated with: two words differ ("user" for "human").
    "vicuna_v1": replace(LLAVA_V1, system=LLAVA_V1.system.replace("human", "user")),
    "llava_v0": replace(
        LLAVA_V1,
        system_block="{}###",
        user="Human: {}###",
        assistant="Assistant: {}###",
        opening="Assistant:",
        stop=("###",),
        separators=("###",),
    ),
    "llava_llama_2": LLAVA_LLAMA_2,
    "mistral_instruct": replace(LLAVA_LLAMA_2, system="", user="[INST] {} [/INST]"),
    # Qwen2's ChatML, as the chat template of llava-interleave-qwen writes it. The last separator
    # tells it from a model of chatml_direct.
    "chatml": Template(
        system="",
        system_block="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{}<|im_end|>\n",
        opening="<|im_start|>assistant\n",
        stop=("<|im_end|>", "<|endoftext|>"),
        separators=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        one_line=True,
    ),
    # Unlike standard ChatML there is no newline between <|im_end|> and the next <|im_start|>.
    "chatml_direct": Template(
        system="Answer the questions.",
        system_block="<|im_start|>system\n{}<|im_end|>",
        user="<|im_start|>user\n{}<|im_end|>",
        assistant="<|im_start|>assistant\n{}<|im_end|>",
        opening="<|im_start|>assistant\n",
        stop=("<|im_end|>",),
        separators=("<|im_start|>", "<|im_end|>"),
    ),
    # xtuner's llava-phi-3-mini.
    "phi_3": Template(
        system="",
        system_block="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        assistant="<|assistant|>\n{}<|end|>\n",
        opening="<|assistant|>\n",
        stop=("<|end|>",),
        separators=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # LLaVA on Llama 3.
    "llama_3": Template(
        system="",
        system_block="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop=("<|eot_id|>", "<|end_of_text|>"),
        separators=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # The chat template of the llava-hf checkpoints: no system text, no end token between turns.
    "hf": replace(LLAVA_V1, system="", assistant="ASSISTANT: {} "),
    # The captions of projector pre-training: a picture, its caption, and no question.
    "plain": Template(
        system="",
        system_block="{}",
        user="{}",
        assistant="{}\n",
        opening="",
        single_turn=True,
    ),
}
# LLaVA-OneVision's: each picture has a line of its own.
TEMPLATES["chatml_lines"] = replace(TEMPLATES["chatml"], one_line=False)
DEFAULT_TEMPLATE = "llava_v1"


def template_of(tokens: Collection[str]) -> str:
    """The name of the template whose separators are all among the tokens that were added for a
    model; the default if there is none."""
    fitting = (
        name for name, t in TEMPLATES.items() if t.separators and {*t.separators} <= {*tokens}
    )
    return next(fitting, DEFAULT_TEMPLATE)


def template_name(template: Template) -> str:
    """Under which name a template is found; "" for one that somebody made."""
    return next((name for name, known in TEMPLATES.items() if known == template), "")


def find_template(name: str) -> Template:
    """The template of that name; ValueError with the known names otherwise."""
    expect_one_of("template", name, TEMPLATES)
    return TEMPLATES[name]


def check_turns(
    template: Template, turns: Sequence[tuple[str, str | None]], system: object
) -> None:
    """Raises ValueError unless there are questions that say something, an answer to all but the
    last, and no more turns than the template can hold."""
    if not turns:
        raise ValueError("a conversation needs at least one question")
    if template.single_turn and len(turns) > 1:
        raise ValueError(
            f"this template holds one turn, the conversation has {len(turns)}; choose another "
            "template"
        )
    expect_text(system, "system")
    for i, (question, answer) in enumerate(turns, 1):
        expect_text(question, f"question {i}")
        expect_text("" if answer is None else answer, f"answer {i}")
        if not question.strip():
            raise ValueError(f"question {i} is empty; write what you want to know")
        if answer is None and i < len(turns):
            raise ValueError(f"question {i} has no answer, but question {i + 1} follows it")
