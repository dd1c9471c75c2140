"""The settings of an answer, and the words that flags and arguments may be: read before anything
large is imported."""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

WEIGHTS_VARIABLE = "MINILLAVA_WEIGHTS"
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("int8", "int4")  # of quantised weights
ATTENTION = ("eager", "fused")
ASPECTS = ("pad", "crop")  # how a picture becomes a square
DEPTHS = ("outline", "modules", "everything")  # of a trace
TRANSFORMS = ("flip", "upside down", "rotate", "jitter", "blur", "crop")  # of RITUAL
NOISE_STEPS = 1000  # of VCD


def dtype_name(dtype: object) -> str:
    """A torch.dtype as one of DTYPES says it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Options:
    """How the next token is chosen and when to stop. These are the defaults, everywhere.

    temperature 0 is greedy: the most likely token; the filters top_k, top_p, min_p and typical_p
    need a temperature. min_new_tokens bars the end tokens until then, as in transformers; a stop
    text still ends an answer. num_beams above 1 is beam search (generate/beam.py); length_penalty
    and early_stopping (False, True, "never") belong to it. stop: texts that end an answer and are
    cut from it. seed: if None, 0 for greedy and a fresh one for samples, kept here; several, one
    per prompt, make each sample independent of the prompts beside it. num_return_sequences: answers
    per prompt, in adjacent rows. Raises ValueError for a value out of range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | Sequence[int] | None = None
    stop: Sequence[str] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        ranges = (  # name, smallest, largest, whether a whole number
            ("max_new_tokens", 1, math.inf, True),
            ("min_new_tokens", 0, math.inf, True),
            ("temperature", 0, 1e6, False),
            ("top_k", 0, math.inf, True),
            ("top_p", 0, 1, False),
            ("min_p", 0, 1, False),
            ("typical_p", 0, 1, False),
            ("repetition_penalty", 0.01, 100, False),
            ("no_repeat_ngram_size", 0, math.inf, True),
            ("num_return_sequences", 1, math.inf, True),
            ("num_beams", 1, math.inf, True),
            # a float32 score divided by 4096**10 is still a number
            ("length_penalty", -10, 10, False),
        )
        if isinstance(self.seed, list):
            object.__setattr__(self, "seed", tuple(self.seed))
        values = [(vars(self)[row[0]], *row) for row in ranges]
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        values += [(seed, "seed", -(2**63), 2**64 - 1, True) for seed in seeds]
        for value, name, low, high, whole in values:
            if vars(self)[name] is getattr(Options, name) is None:  # not set
                continue
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not fits or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                limit = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
                raise ValueError(f"{name} is {value!r}, expected {kind} {limit}")
        for name in ("top_p", "typical_p"):
            if vars(self)[name] == 0:
                raise ValueError(f"{name} is 0, expected a number above 0: no token would be left")
        if 0 < self.temperature < 1e-6:
            raise ValueError(
                f"temperature is {self.temperature}, expected 0 (greedy) or at least 1e-6"
            )
        filters = self.top_k or self.min_p or {self.top_p, self.typical_p} - {None, 1}
        if self.temperature == 0 and (
            filters or (self.num_return_sequences > 1 and self.num_beams == 1)
        ):
            raise ValueError(
                "top_k, top_p, min_p, typical_p and num_return_sequences (without beams) are about "
                "samples: set a temperature above 0 (1.0 changes nothing)"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(
                f'early_stopping is {self.early_stopping!r}, expected False, True or "never"'
            )
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            raise ValueError(
                "length_penalty and early_stopping are about beams: set num_beams above 1"
            )
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but num_beams is "
                f"{self.num_beams}: beams return no more answers than there are beams"
            )
        stop = () if self.stop is None else self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        expect_texts(stop, "stop")
        # an empty text would match everywhere
        object.__setattr__(self, "stop", tuple(s for s in stop if s))
        if self.seed is None:
            # Greedy decoding draws nothing, but contrast may: the same question gets the same
            # answer.
            seed = 0 if self.temperature == 0 else secrets.randbelow(2**32)
            object.__setattr__(self, "seed", seed)


def expect_text(text: object, name: str) -> None:
    """Raises ValueError, with the argument's name, for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r}, expected a text")


def expect_texts(texts: object, name: str, wanted: str = "a text or a list of texts") -> None:
    """Raises ValueError for what is not several texts: a generator could be read only once."""
    if isinstance(texts, str) or not isinstance(texts, Collection):
        raise ValueError(f"{name} is {texts!r}, expected {wanted}")
    for text in texts:
        expect_text(text, f"one of {name}")


OTHER_NAMES = {
    "do_sample": "set temperature above 0 to sample (1.0 changes nothing)",
    "max_length": "max_new_tokens counts the answer's tokens alone",
    "record": "minillava.generate.generate records",
    "return_dict_in_generate": "minillava.generate.generate has record=",
    "output_scores": "minillava.generate.generate has record=",
    "output_attentions": "minillava.generate.generate has record=",
    "output_hidden_states": "minillava.generate.generate has record=",
    "logits_processor": "process=f changes scores",
    "stop_strings": "stop takes texts",
    "contrast": "ask and stream of an Assistant contrast, and generate() with second=",
    "second": "ask and stream make the second row themselves; minillava.generate.generate takes it",
    "n": "num_return_sequences is how many answers generate() returns",
    "images": "pictures come before the question",
}
"""What people who know other libraries ask for, and what does it here."""


def check_names(given: Mapping[str, Any], known: Collection[str], other: Mapping[str, str]) -> None:
    """Raises TypeError for a name that is not known, with what `other` says, or the nearest."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.5)
            hint = other.get(name) or (
                f"did you mean {near[0]}?" if near else f"expected some of: {', '.join(known)}"
            )
            raise TypeError(f"there is no option {name!r}: {hint}")


def read_options(given: Mapping[str, Any], others: Options | None = None) -> Options:
    """Options by name, the rest as in `others`. Raises as `check_names` and Options do."""
    check_names(given, Options.__dataclass_fields__, OTHER_NAMES)
    return Options(**given) if others is None else replace(others, **given)
