"""Pictures to tiles: which canvas, which pixels, and how many positions they take."""

import hashlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from minillava.config import CLIP_LARGE_336, LlavaConfig, TextConfig
from minillava.tiles.grid import best_canvas, fitted, kept_patches, map_of
from minillava.tiles.pictures import Tiled, TileProcessor, positions_of

GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SWAPPED = tuple((height, width) for width, height in GRID)  # as the original reads the same list

# width, height: canvas, size that the picture is resized to, rows and columns kept, positions; all
# computed by transformers 5.23
TABLE = {
    (500, 334): ((336, 672), (336, 503), (24, 36), 1464),
    (672, 672): ((672, 672), (672, 672), (48, 48), 2928),
    (1000, 300): ((336, 1008), (303, 1008), (22, 72), 2182),
    (300, 1000): ((1008, 336), (1008, 303), (72, 22), 2232),
    (336, 336): ((336, 672), (336, 336), (24, 24), 1176),
    (1, 1): ((336, 672), (336, 336), (24, 24), 1176),
    (4000, 3000): ((672, 672), (505, 672), (36, 48), 2340),  # the ceiling of a float above 504
    (640, 480): ((672, 672), (504, 672), (36, 48), 2340),
    (480, 640): ((672, 672), (672, 504), (48, 36), 2352),
    (1024, 899): ((672, 672), (590, 672), (42, 48), 2634),
    (300, 200): ((336, 672), (336, 504), (24, 36), 1464),
    (200, 300): ((336, 672), (336, 225), (24, 16), 984),
    (333, 500): ((672, 336), (505, 336), (36, 24), 1476),
    (337, 336): ((336, 672), (336, 337), (24, 24), 1176),
    (336, 337): ((672, 336), (337, 336), (24, 24), 1176),
    (1008, 336): ((336, 1008), (336, 1008), (24, 72), 2328),
    (1344, 336): ((336, 1008), (252, 1008), (18, 72), 1890),
    (672, 336): ((336, 672), (336, 672), (24, 48), 1752),
    (336, 672): ((672, 336), (672, 336), (48, 24), 1776),
    (1920, 1080): ((672, 672), (378, 672), (28, 48), 1948),
    (1080, 1920): ((672, 672), (672, 378), (48, 28), 1968),
    (2000, 100): ((336, 1008), (51, 1008), (4, 72), 868),
    (100, 2000): ((1008, 336), (1008, 51), (72, 4), 936),
    (5000, 3): ((336, 672), (1, 672), (0, 48), 576),  # no row is left: the overview alone
    (3, 5000): ((336, 672), (336, 1), (24, 0), 600),  # rows of nothing, each with its end
    (1, 336): ((336, 672), (336, 1), (24, 0), 600),
    (336, 1): ((336, 672), (2, 672), (0, 48), 576),
    (1000, 667): ((672, 672), (449, 672), (32, 48), 2144),
    (570, 380): ((672, 672), (448, 672), (32, 48), 2144),
}

# Of the pictures of `pattern`: tiles with the overview, the beginning of the SHA-256 of the pixels,
# their mean; computed by transformers' Pillow-based processor.
PIXELS = {
    (500, 334): (3, "3b4bfa0824fc24b9", -0.124432918),
    (672, 672): (5, "8494ae4d319b720a", 0.189808484),
    (1000, 300): (4, "64b9514726eca70d", 0.050492996),
    (300, 1000): (4, "3faf4fb2594e3c2c", 0.050528513),
    (336, 336): (3, "29ccc48ec61b706d", -0.433253843),
    (1, 1): (3, "a150bb50496f0779", -1.674859842),
    (300, 200): (3, "6e698e8968b28c07", -0.123994310),
    (640, 480): (5, "f1c62b7d29ff4f32", -0.184191042),
    (1024, 899): (5, "ecfa8d05a8b74400", 0.005768114),
    (3, 50): (3, "c9be560c8e5ee52e", -1.217894847),
    (50, 3): (3, "22679adfd91ca98b", -0.970436683),
}


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = (7 * x + 3 * y, 5 * x + 11 * y, 13 * x + 2 * y)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def config_of(grid=GRID) -> LlavaConfig:
    return LlavaConfig(CLIP_LARGE_336, TextConfig(), grid=grid, image_aspect_ratio="anyres")


def empty(width: int, height: int) -> Tiled:
    return Tiled(torch.empty(0), (height, width))


@pytest.mark.parametrize(("width", "height"), TABLE)
def test_canvas_and_positions_are_those_of_transformers(width, height):
    """Width and height were swapped in transformers once, and the count of the processor was not
    that of the model; a position too few moves every word after the picture."""
    canvas, resized, kept, positions = TABLE[width, height]
    size = height, width
    assert best_canvas(size, GRID) == canvas
    assert fitted(size, canvas) == resized
    map_ = map_of(size, GRID, 336, 24)
    assert (map_.rows, map_.columns) == kept
    assert positions_of(config_of(), empty(width, height)) == positions


@pytest.mark.parametrize(
    ("size", "positions"),
    [((300, 200), 976), ((200, 300), 1476), ((336, 336), 1176), ((5000, 3), 576), ((3, 5000), 624)],
)
def test_the_original_tries_its_canvases_in_another_order(size, positions):
    """It reads the same list as (width, height): a small picture would get the hub's canvas."""
    assert best_canvas((size[1], size[0]), SWAPPED) == (672, 336)
    assert positions_of(config_of(SWAPPED), empty(*size)) == positions


@pytest.mark.parametrize(
    ("size", "grid", "kept"),
    [
        ((110, 176), (1, 2), (24, 16)),
        ((198, 176), (1, 2), (24, 28)),
        ((376, 799), (3, 1), (52, 24)),
    ],
)
def test_a_rounding_error_takes_no_row_away(size, grid, kept):
    """110 * (24 / 176) is 14.999999999999998 where 15 is meant: two columns would be lost."""
    found = kept_patches((size[1], size[0]), 24 * grid[0], 24 * grid[1])
    assert (found.rows, found.columns) == kept


@pytest.mark.parametrize(("width", "height"), PIXELS)
def test_pixels_are_those_of_transformers(width, height):
    """Another order of tiles, another colour of the padding or another rounding of its place would
    give plausible, worse answers. Pillow's own arithmetic may change in the last grey level, so the
    bits are compared with the version that was used; with others the mean, and the live test."""
    count, digest, mean = PIXELS[width, height]
    (found,) = TileProcessor(336, GRID)(pattern(width, height))
    assert found.pixels.shape == (count, 3, 336, 336) and found.size == (height, width)
    level = 1 / 255 / 0.26  # of one grey level, for the narrowest of the channels
    assert abs(found.pixels.double().mean().item() - mean) < level
    if PIL.__version__ == "13.0.0":
        assert hashlib.sha256(found.pixels.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parity
@pytest.mark.parametrize(("width", "height"), [*PIXELS, (700, 840), (2000, 100), (337, 336)])
def test_pixels_are_those_of_transformers_bit_for_bit(width, height):
    """In the same process, with the same Pillow."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    grid = [list(pair) for pair in GRID]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=grid,
    )(pattern(width, height), return_tensors="pt")
    (ours,) = TileProcessor(336, GRID)(pattern(width, height))
    assert torch.equal(ours.pixels, theirs.pixel_values[0])
    assert list(ours.size) == theirs.image_sizes[0].tolist()


def test_the_overview_is_the_whole_picture_squeezed():
    """A cropped or padded overview would be 1.5's."""
    processor = TileProcessor(336, GRID)
    image = pattern(300, 1000)
    overview = processor.normalise(image.resize((336, 336), Image.Resampling.BICUBIC))
    assert torch.equal(processor(image)[0].pixels[0], overview)
    assert processor.square(image).size == (336, 336)


def test_a_long_sliver_of_black_is_no_crash():
    """A picture that keeps no row would end in a division by zero or an empty resize."""
    for size in ((5000, 3), (3, 5000), (60_000, 1)):
        (found,) = TileProcessor(336, GRID)(Image.new("RGB", size))
        assert found.pixels.isfinite().all()
