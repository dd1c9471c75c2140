"""The pictures of the second row in contrastive decoding (contrast.py): VCD's noised picture, and
RITUAL's transforms.

n pictures, R their side in pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Generator, Tensor

from minillava.options import NOISE_STEPS, TRANSFORMS


# -------------------------------------------------------------------------------------- VCD's noise
def noise_scales(step: int) -> tuple[float, float]:
    """The weights of picture and noise after `step` (from 0) of 1,000 diffusion steps, as in VCD's
    code."""
    betas = (
        torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64).sigmoid() * (0.005 - 0.00001)
        + 0.00001
    )
    kept = float((1 - betas).cumprod(0)[step])
    return kept**0.5, (1 - kept) ** 0.5


def add_noise(pixels: Tensor, step: int, generator: Generator) -> Tensor:
    """Normalised pixels float32 [n,3,R,R] diffused `step` steps; the same shape."""
    picture, noise = noise_scales(step)
    return picture * pixels + noise * torch.randn(pixels.shape, generator=generator)


STRIP = 1 << 22
"""Pixels that `blur` reads at a time."""


# ------------------------------------------------------------------------------ RITUAL's transforms
# Those of its evaluation scripts, with torchvision's parameters and Pillow's operations: each takes
# the picture
# (RGB), the side of the pictures that the model reads, and a generator.
def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def flip(picture, side, generator):
    return ImageOps.mirror(picture)


def turn_upside_down(picture, side, generator):
    return ImageOps.flip(picture)


def rotate(picture, side, generator):
    return picture.rotate(
        _uniform(-180, 180, generator), Image.Resampling.NEAREST, fillcolor=(0, 0, 0)
    )


def jitter(picture, side, generator):
    """Brightness, contrast, saturation and hue, in random order."""
    enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    factors = [_uniform(0, 2, generator) for _ in enhancers]
    turn = _uniform(-0.5, 0.5, generator)  # of the colour circle
    for i in torch.randperm(4, generator=generator).tolist():
        picture = enhancers[i](picture).enhance(factors[i]) if i < 3 else _turn_hue(picture, turn)
    return picture


def _turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(i + int(turn * 255)) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def blur(picture, side, generator):
    """A 13 x 13 Gaussian, the edges reflected."""
    sigma, reach = _uniform(1.5, 2.0, generator), 6
    if min(picture.size) <= reach:
        raise ValueError(
            f"the picture is {picture.width} x {picture.height}, blur needs more than {reach} "
            "pixels a side"
        )
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None, None]  # [1, 1, 1, 13]
    around = (reach, reach)
    # [height + 12, width + 12, 3], bytes: as floats, a long picture would take gigabytes at once
    padded = np.pad(np.asarray(picture), (around, around, (0, 0)), mode="reflect")
    blurred, rows = np.empty((picture.height, picture.width, 3), np.uint8), STRIP // picture.width
    for top in range(0, picture.height, rows):
        # [3, 1, at most rows + 12, width + 12]
        x = torch.from_numpy(padded[top : top + rows + 2 * reach]).permute(2, 0, 1)[:, None].float()
        x = F.conv2d(F.conv2d(x, kernel), kernel.transpose(2, 3))
        blurred[top : top + rows] = x[:, 0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(blurred)


def crop(picture, side, generator):
    """A part of 8 to 100 % of the area, its shape between 3:4 and 4:3, scaled to side x side."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * _uniform(0.08, 1, generator)
        aspect = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3), generator))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            top = int(torch.randint(height - h + 1, (), generator=generator))
            break
    else:  # of a long strip the middle, as wide as the shapes above allow
        w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
        left, top = (width - w) // 2, (height - h) // 2
    return picture.resize(
        (side, side), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )


FUNCTIONS = dict(zip(TRANSFORMS, (flip, turn_upside_down, rotate, jitter, blur, crop), strict=True))


def transform(
    name: str | None, picture: Image.Image, side: int, generator: Generator
) -> Image.Image:
    """The picture (RGB) changed by one of TRANSFORMS; None draws one. side: what `crop` scales to,
    in pixels. Raises ValueError if the picture is too small to blur."""
    if name is None:
        name = TRANSFORMS[int(torch.randint(len(TRANSFORMS), (), generator=generator))]
    return FUNCTIONS[name](picture, side, generator)
