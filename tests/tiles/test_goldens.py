"""Numbers that the processors of transformers 5.23 give for LLaVA's relatives: pixels of SigLIP and of
photographs, the length of prompts."""

import hashlib
import json

import numpy as np
import PIL
import pytest
import torch
from kinds import byte_level
from paths import PILLOW
from PIL import Image

from minillava.config import CLIP_LARGE_336, IMAGE_TOKEN_INDEX, LlavaConfig, TextConfig
from minillava.image import ImageProcessor
from minillava.prompt import place_images, render
from minillava.templates import TEMPLATES
from minillava.tiles.pictures import Tiled, TileProcessor, positions_of
from minillava.tokenizer import Tokenizer

GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SAME_PILLOW = PIL.__version__ == PILLOW

SQUASHED = {
    (500, 334): "fd8104684eac1436",
    (384, 384): "e2bc5b7b73d22128",
    (1, 1): "4ffdde8f93558127",
    (1000, 300): "00c639eb221ccdd7",
    (3, 50): "054be2cb6edd7d96",
}
PHOTOS = {  # pixels in tiles, their number and mean; squashed
    "waterview": ("841f6a652fa0cf28", 5, 0.221642241, "0934660ded226579"),
    "extreme_ironing": ("54fb6bbe6dc7eedd", 5, -0.717043740, "35a06ada97aa7b39"),
}


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = (7 * x + 3 * y, 5 * x + 11 * y, 13 * x + 2 * y)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def squash() -> ImageProcessor:
    return ImageProcessor(384, "squash", mean=[0.5] * 3, std=[0.5] * 3)


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("width", "height"), SQUASHED)
def test_pixels_of_siglip(width, height):
    """Kept proportions, CLIP's mean or another rounding would give plausible, worse answers."""
    found = squash()(pattern(width, height))
    assert found.shape == (1, 3, 384, 384) and found.abs().max() <= 1
    channels = pattern(width, height).resize((384, 384), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(channels).copy()).permute(2, 0, 1).double() / 127.5 - 1
    assert (found[0].double() - expected).abs().max() < 1e-6
    if SAME_PILLOW:
        assert digest(found) == SQUASHED[width, height]


def test_pixels_of_photographs(photos):
    """What is right for drawn pictures may be wrong for the ones that people have."""
    for path in photos:
        tiled, count, mean, squashed = PHOTOS[path.stem]
        (found,) = TileProcessor(336, GRID)(path)
        assert len(found.pixels) == count
        assert abs(found.pixels.double().mean().item() - mean) < 1 / 255 / 0.26  # one grey level
        if SAME_PILLOW:
            assert (digest(found.pixels), digest(squash()(path))) == (tiled, squashed)


def test_the_length_of_transformers_own_example():
    """Its processor counts 1525 where a class token is not told of, one position less than the model
    takes."""
    config = LlavaConfig(CLIP_LARGE_336, TextConfig(), grid=((672, 336),))
    assert positions_of(config, Tiled(torch.empty(0), (503, 316))) == 1526


@pytest.mark.parametrize(
    ("question", "pictures", "length"),
    [
        ("Describe the image briefly.", 1, 743),
        ("Compare the two images briefly.", 2, 1473),
        ("Reply with one short greeting.", 0, 14),
    ],
)
def test_the_length_of_llava_interleaves_prompts(tmp_path, question, pictures, length):
    """Pictures on lines of their own, a begin token or a newline too many would move every word. Each
    word of these prompts is one token of Qwen2, and so it is here."""
    raw = byte_level("interleave")
    model, words = raw["model"], ["user", "assistant", *question.replace(".", "").split()]
    model["merges"] = []
    for i, word in enumerate(words):
        left, *others = f"Ġ{word}" if i > 2 else word
        for letter in others:
            model["merges"].append(f"{left} {letter}")
            left += letter
            model["vocab"].setdefault(left, len(model["vocab"]))
    for i, token in enumerate(raw["added_tokens"]):
        token["id"] = len(model["vocab"]) + i
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer, template = Tokenizer(tmp_path / "tokenizer.model"), TEMPLATES["chatml"]
    asked = place_images(question, pictures, template.one_line)
    ids = tokenizer.encode(render(template, [(asked, None)]))
    assert ids.count(IMAGE_TOKEN_INDEX) == pictures
    assert len(ids) + pictures * (729 - 1) == length
