"""Pictures of every kind to pixel values. Bit-equality with transformers' processor is in the parity tests."""

import base64
import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from minillava import image as image_module
from minillava.image import CLIP_MEAN, CLIP_STD, ImageProcessor, open_image, pad_to_square, to_rgb

MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "La", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N"]  # fmt: skip


def picture(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", MODES)
def test_any_mode_becomes_rgb(mode):
    image = Image.new(mode, (20, 10))
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (20, 10))


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0, 9, 9, 9, 5, 5, 5, 7, 7, 7])
    assert open_image(png(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_greys_are_scaled_not_clipped(mode):
    values = np.array([[0, 257, 32896, 65535]])
    image = Image.fromarray(values.astype(np.int32 if mode == "I" else ">u2" if mode.endswith("B") else "<u2"))
    assert image.mode == mode
    assert [to_rgb(image).getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_float_greys_are_taken_from_0_to_1_or_from_0_to_255():
    for top in (1.0, 255.0):
        image = Image.fromarray(np.array([[0.0, top / 2, top]], dtype=np.float32))
        assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_sixteen_bit_png_file():
    image = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert open_image(png(image)).getpixel((3, 3)) == (128, 128, 128)


def test_exif_orientation_is_applied():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    assert np.array_equal(open_image(file.getvalue()), image.transpose(Image.Transpose.ROTATE_270))


def test_every_kind_of_source(tmp_path):
    image = picture()
    path = tmp_path / "x.png"
    image.save(path)
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (image, path, str(path), path.read_bytes(), url):
        assert np.array_equal(open_image(source), image)
    process = ImageProcessor(56)
    assert torch.equal(process([path, url]), process([path]).expand(2, -1, -1, -1))
    assert process([]).shape == process(None).shape == (0, 3, 56, 56)
    assert torch.equal(process(path), process([path]))


def test_pad_centres_on_the_mean_colour_and_rounds_to_the_top_left():
    """500 x 334 as in the walk-through: offset 83, and rows 0..53 and 282..335 of 336 are exactly the fill."""
    white = Image.new("RGB", (500, 334), (255, 255, 255))
    square = np.asarray(pad_to_square(white, (122, 116, 104)))
    assert square.shape == (500, 500, 3)
    assert (square[:83] == (122, 116, 104)).all()
    assert (square[83 : 83 + 334] == 255).all()
    assert (square[83 + 334 :] == (122, 116, 104)).all()
    pixels = ImageProcessor(336)([white])[0]  # [3, 336, 336]
    fill = (torch.tensor((122, 116, 104)) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    is_fill = (pixels - fill[:, None, None]).abs().amax(dim=(0, 2)) < 1e-6
    assert is_fill.nonzero().flatten().tolist() == [*range(54), *range(282, 336)]


def test_crop_keeps_the_middle():
    image = Image.new("RGB", (300, 100), (0, 0, 255))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    square = np.asarray(ImageProcessor(100, "crop").square(image))
    assert (square == (255, 0, 0)).all()


def test_unknown_aspect_is_refused():
    with pytest.raises(ValueError, match="'anyres', expected one of: pad, crop"):
        ImageProcessor(336, "anyres")


def test_one_pixel_and_very_flat_pictures():
    process = ImageProcessor(56)
    assert process([Image.new("RGB", (1, 1), (122, 116, 104))]).shape == (1, 3, 56, 56)
    assert process([Image.new("RGB", (3, 1))]).shape == (1, 3, 56, 56)  # HWC, never mistaken for channels first
    assert ImageProcessor(56, "crop")([Image.new("RGB", (1, 500))]).shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (png(picture())[:-600], "damaged"),
        (png(picture())[:40], "not a picture"),
        ("data:image/png,abc", "no ;base64"),
        ("data:image/png;base64,a*b", "not base64"),
        ("https://example.com/x.jpg", "does not download"),
        ("data:image/png;base64,é", "not base64"),
        ("nowhere.png", "no such picture"),
        ("a\nb.png", r"'a\\nb.png': no such picture"),
        ("", "'': no such picture"),
        ("a\0b", r"'a\\x00b': cannot be read \(embedded null byte\)"),
        ("x" * 5000, "cannot be read"),
        (".", "cannot be read"),
        (3, "found int, expected a path"),
        (np.zeros((4, 4, 3)), "found ndarray, expected a path"),
    ],
)
def test_what_is_not_a_picture_gets_one_line(content, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ImageProcessor(56)([content])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_what_is_no_file_is_refused_and_a_pipe_not_waited_for(tmp_path):
    path = tmp_path / "x.png"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read \(a folder, pipe or device\)"):
        open_image(path)
    path.unlink()
    path.symlink_to("x.png")
    with pytest.raises(ValueError, match=r"x\.png: cannot be read \(Too many levels of symbolic links\)"):
        open_image(path)


def test_a_damaged_exif_is_no_matter_for_a_warning():
    """Warnings are errors in these tests."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture().save(file, "JPEG", exif=exif)
    content = bytearray(file.getvalue())
    place = content.index(struct.pack(">HHI", 0x0112, 3, 1))
    content[place + 4] = 0xFF  # so many values that they would lie beyond the end of the file
    assert open_image(bytes(content)).size == (40, 30)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(image_module, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="the picture is 40 x 30, more than 1000 pixels"):
        open_image(picture())
    with pytest.raises(ValueError, match="padded to a square is 40 x 40"):
        ImageProcessor(8)([picture(40, 20)])
    with pytest.raises(ValueError, match="resized for cropping is 1600 x 8"):
        ImageProcessor(8, "crop")([picture(200, 1)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        open_image(png(picture()))
