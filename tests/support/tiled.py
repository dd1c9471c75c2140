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
    """config.json as llava-v1.6-mistral-7b-hf or -vicuna-7b-hf have it; with qwen2, as a later
    LLaVA-NeXT has it."""
    sizes = hf.SIZES["toy"]
    grouped = {"num_key_value_heads": 2}
    own = {"llama": {}, "mistral": {**grouped, "sliding_window": None}, "qwen2": grouped}[text]
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


@torch.no_grad()
def theirs_of(model, ids, pictures) -> torch.Tensor:
    """transformers' logits [T, V] of one prompt; the picture's token is written once for each
    position that the pictures take."""
    config = model.config
    most = max(len(each.pixels) for each in pictures)
    pixels = torch.stack(
        [
            torch.cat([each.pixels, torch.zeros(most - len(each.pixels), *each.pixels.shape[1:])])
            for each in pictures
        ]
    ).to(model.device, model.dtype)
    sizes = torch.tensor([each.size for each in pictures], device=model.device)
    counts = iter(map(len, model.model.get_image_features(pixels, sizes).pooler_output))
    wide = [
        i
        for t in ids
        for i in ([config.image_token_index] * next(counts) if t == hf.IMAGE else [t])
    ]
    ids = torch.tensor([wide], device=model.device)
    return model(input_ids=ids, pixel_values=pixels, image_sizes=sizes, use_cache=False).logits[0]
