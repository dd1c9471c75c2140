"""LLaVA-1.6 in small: what its pictures and its config.json are in the tests of tiles."""

import hf
import torch
from PIL import Image

GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
# (height, width); one of each canvas, padding on either side, a rounding, and a sliver of no row
SIZES = [(30, 50), (112, 112), (40, 160), (57, 56), (170, 60), (3, 600)]


# LLaVA-OneVision in small, and sizes on both sides of a map of 1.1 times as many patches a side
ONEVISION_GRID = [[58 * a, 58 * b] for a in range(1, 5) for b in range(1, 5)]
ONEVISION_SIZES = [(50, 50), (40, 110), (230, 230), (200, 100), (500, 90), (1, 900)]


def draw(height: int, width: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed + height * width)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def config_of(text: str, pieces: int = 440) -> dict:
    """config.json as llava-v1.6-mistral-7b-hf or -vicuna-7b-hf have it; with qwen2, as a later
    LLaVA-NeXT has it."""
    if text == "onevision":
        return onevision_config()
    sizes = hf.SIZES["toy"]
    grouped = {"num_key_value_heads": 2}
    own = {"llama": {}, "mistral": {**grouped, "sliding_window": None}, "qwen2": grouped}[text]
    config = hf.hub_config(
        {**sizes["text"], "model_type": text, **own}, sizes["vision"], pieces=pieces
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


def onevision_config(pieces: int = 440) -> dict:
    """config.json as llava-onevision-qwen2-0.5b-ov-hf has it."""
    toy = hf.SIZES["toy"]
    text = {**toy["text"], "model_type": "qwen2", "num_key_value_heads": 2, "rope_theta": 1e6}
    vision = {**toy["vision"], **hf.SIGLIP, "image_size": 58}
    return {
        **hf.hub_config(text, vision, pieces=pieces, tie_word_embeddings=True, **hf.OF_SIGLIP),
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": ONEVISION_GRID,
        "model_type": "llava_onevision",
        "use_image_newline_parameter": True,
        "video_token_index": pieces + 1,
        "vision_aspect_ratio": "anyres_max_3",
    }
