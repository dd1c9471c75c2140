"""LLaVA-1.6 in small: what its pictures and its config.json are in the tests of tiles."""

import hf
import torch
from PIL import Image

GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
# (height, width); one of each canvas, padding on either side, a rounding, and a sliver of no row
SIZES = [(30, 50), (112, 112), (40, 160), (57, 56), (170, 60), (3, 600)]


def draw(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed + height * width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def config_of(text: str) -> dict:
    """config.json as llava-v1.6-mistral-7b-hf or -vicuna-7b-hf have it."""
    sizes = hf.SIZES["toy"]
    own = {"llama": {}, "mistral": {"num_key_value_heads": 2, "sliding_window": None}}[text]
    config = hf.hub_config(
        {**sizes["text"], "model_type": text, **own}, sizes["vision"], pieces=440
    )
    return {
        **config,
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": GRID,
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
    }
