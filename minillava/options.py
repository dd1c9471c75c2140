"""The settings of an answer, and the words that flags and arguments may be: read before anything
large is imported."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from minillava.files.settings import check_beams, check_range, check_sampling

if TYPE_CHECKING:
    from minillava.config import LlavaConfig

WEIGHTS_VARIABLE = "MINILLAVA_WEIGHTS"
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("int8", "int4")  # of quantised weights
ATTENTION = ("eager", "fused")
ASPECTS = ("pad", "crop", "squash")  # how a picture becomes a square
DEPTHS = ("outline", "modules", "everything")  # of a trace
TRANSFORMS = ("flip", "upside down", "rotate", "jitter", "blur", "crop")  # of RITUAL
NOISE_STEPS = 1000  # of VCD
DRAFT_TOKENS = 64  # that are guessed at a time, at most
RECORDABLE = ("scores", "logits", "hidden_states", "attentions")


def setting(default: Any, low: float, high: float = math.inf) -> Any:
    """A field of Options that is a number, with its range."""
    return field(default=default, metadata={"range": (low, high)})


def dtype_name(dtype: object) -> str:
    """A torch.dtype as one of DTYPES says it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Options:
    """How the next token is chosen and when to stop. These are the defaults, everywhere.

    temperature 0 is greedy: the most likely token; the filters top_k, top_p, min_p and typical_p
    need a temperature. min_new_tokens bars the end tokens until then, as in transformers; a stop
    text still ends an answer. num_beams above 1 is beam search (generate/beam.py); length_penalty
    and early_stopping belong to it. stop: texts that end an answer and are cut from it. seed: if
    None, 0 for greedy and a fresh one for samples, stored in this field; several, one per prompt,
    make each sample independent of the prompts beside it. num_return_sequences: answers per prompt,
    in adjacent rows. Raises ValueError for a value out of range.
    """

    max_new_tokens: int = setting(512, 1)
    min_new_tokens: int = setting(0, 0)
    temperature: float = setting(0.0, 0, 1e6)
    top_k: int | None = setting(None, 0)
    top_p: float | None = setting(None, 0, 1)
    min_p: float | None = setting(None, 0, 1)
    typical_p: float | None = setting(None, 0, 1)
    repetition_penalty: float | None = setting(None, 0.01, 100)
    no_repeat_ngram_size: int | None = setting(None, 0)
    seed: int | Sequence[int] | None = setting(None, -(2**63), 2**64 - 1)
    stop: Sequence[str] = ()
    num_return_sequences: int = setting(1, 1)
    num_beams: int = setting(1, 1)
    # a float32 score divided by 4096**10 is still a number
    length_penalty: float = setting(1.0, -10, 10)
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if isinstance(self.seed, list):
            object.__setattr__(self, "seed", tuple(self.seed))
        for each in fields(self):
            check_range(each, vars(self)[each.name])
        check_sampling(self)
        check_beams(self)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = () if stop is None else stop
        expect_texts(stop, "stop")
        # an empty text would match everywhere
        object.__setattr__(self, "stop", tuple(s for s in stop if s))
        if self.seed is None:
            # Greedy decoding draws nothing, but contrast may: the same question gets the same
            # answer.
            seed = 0 if self.temperature == 0 else secrets.randbelow(2**32)
            object.__setattr__(self, "seed", seed)


def remaining_context(
    config: LlavaConfig,
    length: int,
    pictures: int = 0,
    taken: str = "the prompt takes {length} positions ({pictures} picture(s) of {each} each)",
    advice: str = "shorten the prompt or give fewer pictures",
    each: str = "",
) -> int:
    """How many tokens an answer may have after `length` positions. each: how many a picture takes,
    where that differs. Raises ValueError with the numbers if they fill the context."""
    context = config.text.context
    if length >= context:
        told = taken.format(length=length, pictures=pictures, each=each or config.tokens_per_image)
        raise ValueError(f"{told}, the model's context holds {context} with the answer; {advice}")
    return context - length


def expect_text(text: object, name: str) -> None:
    """Raises ValueError, with the argument's name, for what is not a text."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}, expected a text")


def expect_utf8(text: str, name: str) -> None:
    """Raises ValueError for halves of characters, which a text in Python can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text at character {error.start}; write it as UTF-8"
        ) from None


def expect_texts(texts: object, name: str, wanted: str = "a text or a list of texts") -> None:
    """Raises ValueError for what is not several texts: a generator could be read only once."""
    if isinstance(texts, str) or not isinstance(texts, Collection):
        raise ValueError(f"{name} is {texts!r}, expected {wanted}")
    for text in texts:
        expect_text(text, f"one of {name}")


def expect_one_of(name: str, value: object, known: Collection[object]) -> None:
    """Raises ValueError, with the argument's name, for a value that is not known."""
    if value not in list(known):  # a list compares what has no hash, too
        words = ", ".join(str(word) for word in known if word is not None)
        raise ValueError(f"unknown {name} {value!r}, expected one of: {words}")
