"""Contrastive decoding: a second row of the same batch sees another input, and the two rows of
logits are combined into one.

VCD (Leng et al. 2023, arXiv 2311.16922), RITUAL (Woo et al. 2024, arXiv 2405.17821) and M3ID
(Favero et al. 2024, arXiv 2403.14003, as the code of RITUAL has it). A method of your own is a
subclass of `Contrast` with two functions.

B rows, n pictures, R their side in pixels, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minillava.config import IMAGE_TOKEN_INDEX
from minillava.files.settings import check_number
from minillava.options import NOISE_STEPS, TRANSFORMS

if TYPE_CHECKING:  # flags are checked with these classes before torch is imported
    from PIL import Image
    from torch import Generator, Tensor

    from minillava.image import ImageProcessor
    from minillava.loop import Step
    from minillava.tokenizer import Tokenizer

Rows = Sequence[Sequence[int]]

LARGEST = 1e6
"""Of alpha and rate: with more, float32 logits overflow."""


@dataclass(frozen=True)
class Contrast:
    """A method of contrast. beta: tokens that in the first row are less than beta times as likely
    as its best one are cut, whatever the second row says; 0 cuts none. Raises ValueError for a
    value out of range."""

    beta: float = 0.1

    def __post_init__(self):
        check_number("beta", self.beta, 0, 1)

    def second(
        self,
        input_ids: Rows,
        pictures: Sequence[Image.Image],
        processor: ImageProcessor,
        generator: Generator,
    ) -> tuple[Rows, Tensor | None]:
        """The input of the second rows: their ids, and the pictures [n,3,R,R] for each -200 in
        them."""
        raise NotImplementedError

    def combine(self, logits: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine the logits of the first and the second rows, float32 [B,V], after `step` new
        tokens -> [B,V]"""
        raise NotImplementedError

    def __call__(self, logits: Tensor, other: Tensor, step: int) -> Tensor:
        """Combine, then cut. [B,V] twice -> [B,V]"""
        return self.combine(logits, other, step).masked_fill(self.cut(logits), -math.inf)

    def cut(self, logits: Tensor) -> Tensor:
        """The tokens that are cut, bool [B,V]. The first row's raw logits decide, since a
        combination may make an unlikely token look good, and this is the guard against it."""
        least = math.log(self.beta) if self.beta else -math.inf  # no log-probability is less
        return logits < least + logits.amax(-1, keepdim=True)


@dataclass(frozen=True)
class VCD(Contrast):
    """Moves away from what a noised picture suggests: (1 + alpha) · l - alpha · l'. noise_step: 0
    to 999, how far the picture has diffused into noise."""

    alpha: float = 1.0
    noise_step: int = 500

    def __post_init__(self):
        super().__post_init__()
        check_number("alpha", self.alpha, 0, LARGEST)
        check_number("noise_step", self.noise_step, 0, NOISE_STEPS - 1, whole=True)

    def second(self, input_ids, pictures, processor, generator):
        _need_pictures("vcd", pictures)
        from minillava.generate.transforms import add_noise
        from minillava.tiles.pictures import change_pixels

        def noised(pixels: Tensor) -> Tensor:
            return add_noise(pixels, self.noise_step, generator)

        return input_ids, change_pixels(noised, processor(pictures))

    def combine(self, logits, other, step):
        return (1 + self.alpha) * logits - self.alpha * other


@dataclass(frozen=True)
class RITUAL(Contrast):
    """Adds what a transformed picture suggests: l + alpha · l'. The weights add up to 1 + alpha, so
    the distribution gets sharper as well. transform: one of TRANSFORMS; None draws one for each
    picture."""

    alpha: float = 3.0
    transform: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("alpha", self.alpha, 0, LARGEST)
        if self.transform not in (None, *TRANSFORMS):
            raise ValueError(
                f"transform is {self.transform!r}, expected one of: {', '.join(TRANSFORMS)}"
            )

    def second(self, input_ids, pictures, processor, generator):
        _need_pictures("ritual", pictures)
        return input_ids, processor(
            [self.change(p, processor.image_size, generator) for p in pictures]
        )

    def change(self, picture: Image.Image, side: int, generator: Generator) -> Image.Image:
        """The transformed picture; side: what `crop` scales to, in pixels."""
        from minillava.generate.transforms import transform

        return transform(self.transform, picture.convert("RGB"), side, generator)

    def combine(self, logits, other, step):
        return logits + self.alpha * other


@dataclass(frozen=True)
class M3ID(Contrast):
    """Moves away from what the text alone suggests, the more the longer the answer is: l + (1 - g)
    / g · (l - l'), with g = exp(-rate · step). unsure: contrast only while no token's probability
    reaches this, as in the paper (RITUAL's code leaves it out); None: always."""

    rate: float = 0.02
    unsure: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("rate", self.rate, 0, LARGEST)
        if self.unsure is not None:
            check_number("unsure", self.unsure, 0, 1)

    def second(self, input_ids, pictures, processor, generator):
        _need_pictures("m3id", pictures)
        return without_pictures(input_ids), None

    def combine(self, logits, other, step):
        # (1 - g) / g = 1 / g - 1; The exponent is capped below float32's overflow, far above where
        # l still matters.
        difference = math.expm1(min(self.rate * step, 50)) * (logits - other)
        if self.unsure is not None:
            sure = logits.softmax(-1).amax(-1, keepdim=True) >= self.unsure  # [B, 1]
            difference = difference.masked_fill(sure, 0.0)
        return logits + difference


METHODS = {"vcd": VCD, "ritual": RITUAL, "m3id": M3ID}


def find_method(contrast: Contrast | str | None) -> Contrast | None:
    """The method itself, or the method of this name with its defaults. Raises ValueError for
    anything else."""
    if contrast is None or (hasattr(contrast, "second") and not isinstance(contrast, type)):
        return contrast
    if not isinstance(contrast, str) or contrast not in METHODS:
        names = ", ".join(METHODS)
        raise ValueError(
            f"contrast is {contrast!r}, expected one of: {names}, or a contrast.Contrast such as "
            "VCD()"
        )
    return METHODS[contrast]()


def describe(
    contrast: Contrast, step: Step, number: int, tokenizer: Tokenizer, best: int = 5
) -> dict:
    """What a step with contrast did in one row, for a log: the chosen token; the `best` tokens of
    the first row, of the second and of their combination (before penalties, temperature and
    filters), with probabilities; and how many tokens were cut."""
    streams = {"first": step.logits, "second": step.other_logits}
    streams["combined"] = contrast(step.logits, step.other_logits, number)
    top = {}
    for name, logits in streams.items():
        found = logits[0].softmax(-1).topk(best)
        likely = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        top[name] = [[tokenizer.piece(i), float(f"{p:.6g}")] for p, i in likely if p > 0]
    chosen = step.ids[0]
    return {
        "step": number,
        "id": chosen,
        "text": step.text[0],
        **top,
        "cut": int(contrast.cut(step.logits)[0].sum()),
    }


def without_pictures(input_ids: Rows) -> list[list[int]]:
    """The same ids without any -200, so that only the text is left."""
    return [[int(i) for i in row if i != IMAGE_TOKEN_INDEX] for row in input_ids]


def _need_pictures(method: str, pictures: Sequence) -> None:
    if not pictures:
        raise ValueError(
            f"{method} contrasts two views of a picture, and there is none; give one with the "
            "question"
        )
