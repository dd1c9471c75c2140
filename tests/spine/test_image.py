"""Pictures of every kind to pixel values. Bit-equality with transformers' processor is in the
parity tests."""

import base64
import io
import os
import random
import re
import struct
import zlib
from collections import UserList, deque

import numpy as np
import pytest
import torch
from bounds import gamma
from PIL import Image

from minillava.files import pictures, resize
from minillava.files.pictures import open_image, to_rgb
from minillava.files.resize import pad_and_resize
from minillava.image import (
    CLIP_MEAN,
    CLIP_STD,
    ImageProcessor,
    pad_to_square,
    resize_and_crop,
)

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
    """A picture of a rarer kind, such as CMYK or one bit, would end in a traceback."""
    image = Image.new(mode, (20, 10))
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (20, 10))


def test_transparency_is_composited_on_white():
    """A logo on a transparent ground would become black on black."""
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0, 9, 9, 9, 5, 5, 5, 7, 7, 7])
    assert open_image(png(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", MODES)
def test_a_large_picture_is_made_rgb_in_strips_to_the_same_bits(monkeypatch, mode):
    """Copies of the whole took several times the picture's memory."""
    image = Image.new(mode, (8, 9))
    image.frombytes(random.Random(1).randbytes(len(image.tobytes())))
    if mode == "F":
        image = Image.fromarray(np.random.default_rng(1).random((9, 8), np.float32))
    if mode == "P":
        image.putpalette(random.Random(2).randbytes(768))
        image.info["transparency"] = image.getpixel((3, 5))
    whole = to_rgb(image)
    monkeypatch.setattr(pictures, "STRIP", 8 * 2)
    assert np.array_equal(to_rgb(image), whole)


def test_a_picture_that_is_rgb_is_not_copied(tmp_path):
    """A large picture would be held in memory twice, or the caller's own object be changed."""
    image = picture()
    assert to_rgb(image) is image
    opened = open_image(image)
    assert opened is not image  # which is the caller's, and gets no name of ours
    assert not hasattr(image, "filename")
    assert open_image(opened) is opened


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_greys_are_scaled_not_clipped(mode):
    """A 16-bit scan would come out almost all white."""
    values = np.array([[0, 257, 32896, 65535]])
    image = Image.fromarray(
        values.astype(np.int32 if mode == "I" else ">u2" if mode.endswith("B") else "<u2")
    )
    assert image.mode == mode
    assert [to_rgb(image).getpixel((x, 0)) for x in range(4)] == [
        (v, v, v) for v in (0, 1, 128, 255)
    ]


def test_float_greys_are_taken_from_0_to_1_or_from_0_to_255():
    """A picture of floats from 0 to 1 would come out black."""
    for top in (1.0, 255.0):
        image = Image.fromarray(np.array([[0.0, top / 2, top]], dtype=np.float32))
        assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_sixteen_bit_png_file():
    """A 16-bit PNG read from a file would come out white, though the same picture in memory does
    not."""
    image = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert open_image(png(image)).getpixel((3, 3)) == (128, 128, 128)


def test_exif_orientation_is_applied():
    """A photo taken upright with a phone would be seen lying on its side."""
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    assert np.array_equal(open_image(file.getvalue()), image.transpose(Image.Transpose.ROTATE_270))


def test_every_kind_of_source(tmp_path):
    """One picture would give different pixels as a path, as bytes and as a data URL."""
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
    """500 x 334 as in the walk-through: offset 83, and rows 0..53 and 282..335 of 336 are exactly
    the fill."""
    white = Image.new("RGB", (500, 334), (255, 255, 255))
    square = np.asarray(pad_to_square(white, (122, 116, 104)))
    assert square.shape == (500, 500, 3)
    assert (square[:83] == (122, 116, 104)).all()
    assert (square[83 : 83 + 334] == 255).all()
    assert (square[83 + 334 :] == (122, 116, 104)).all()
    pixels = ImageProcessor(336)([white])[0]  # [3, 336, 336]
    fill = (torch.tensor((122, 116, 104)) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    # a division by 255, a difference of numbers below 1, a division; there and here
    off = 2 * gamma(3, torch.float32) / min(CLIP_STD)
    is_fill = (pixels - fill[:, None, None]).abs().amax(dim=(0, 2)) <= off
    assert is_fill.nonzero().flatten().tolist() == [*range(54), *range(282, 336)]


def test_crop_keeps_the_middle():
    """A crop would keep a corner, and what the picture shows be cut off."""
    image = Image.new("RGB", (300, 100), (0, 0, 255))
    image.paste((255, 0, 0), (100, 0, 200, 100))
    square = np.asarray(ImageProcessor(100, "crop").square(image))
    assert (square == (255, 0, 0)).all()


def test_unknown_aspect_is_refused():
    """An aspect that we do not know would be treated as one of those that we do."""
    with pytest.raises(ValueError, match="'anyres', expected one of: pad, crop"):
        ImageProcessor(336, "anyres")


def test_one_pixel_and_very_flat_pictures():
    """A side rounded to zero would end in a traceback, and a picture three pixels wide be taken for
    one with channels first."""
    process = ImageProcessor(56)
    assert process([Image.new("RGB", (1, 1), (122, 116, 104))]).shape == (1, 3, 56, 56)
    # HWC, never mistaken for channels first
    assert process([Image.new("RGB", (3, 1))]).shape == (1, 3, 56, 56)
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
        ("data:image/png;base64,\udc80", "not base64"),
        ("data:image/png;base64,A", "not base64"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png,%89PNG%0D", "data: URL: not a picture"),
        ("nowhere.png", "no such picture"),
        ("a\nb.png", r"'a\\nb.png': no such picture"),
        ("", "'': no such picture"),
        ("a\0b", r"'a\\x00b': cannot be read \(embedded null byte\)"),
        ("x" * 5000, "cannot be read"),
        (".", "cannot be read"),
        (3, "found int, expected a path"),
        (np.zeros((4, 4, 3)), "picture: found ndarray, expected a path.*Image.fromarray"),
        (torch.zeros(3, 4, 4), "picture: found Tensor, expected a path"),
    ],
)
def test_what_is_not_a_picture_gets_one_line(content, message):
    """A damaged file, a mistyped path or an array in the place of a picture would end in a
    traceback."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ImageProcessor(56)([content])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_what_is_no_file_is_refused_and_a_pipe_not_waited_for(tmp_path):
    """A named pipe in the place of a picture would hang the command for ever."""
    path = tmp_path / "x.png"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read \(a folder, pipe or device\)"):
        open_image(path)
    path.unlink()
    path.symlink_to("x.png")
    for given, found in (
        (path, "Too many levels of symbolic links); its links lead in a circle"),
        (tmp_path / ("x." * 150), "File name too long); choose a shorter name"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"cannot be read ({found}")):
            open_image(given)


def test_a_picture_without_rights_names_the_command_that_gives_them(tmp_path, monkeypatch):
    """It was told as a wrong path. Root may read everything, so the system is played."""
    path = tmp_path / "x.png"
    path.write_bytes(b"")

    def refuse(file, *_):
        raise PermissionError(13, "Permission denied", os.fspath(file))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(PermissionError) as caught:
        open_image(path)
    assert str(caught.value) == (
        f"{path}: may not be read (Permission denied); its owner can allow it with: "
        f"chmod u+r {path}"
    )


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
    """A small file that unpacks to gigabytes would use up the memory of the machine."""
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="the picture is 40 x 30, more than 1000 pixels"):
        open_image(picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb DOS attack; make the picture smaller"):
        open_image(png(picture()))


# --- long pictures --------------------------------------------------------------------------------

COLOUR = (122, 116, 104)


def test_padding_around_the_resize_gives_the_bits_of_the_whole_square(monkeypatch):
    """A margin needs no memory, but both passes of Pillow's resize round: the order of the work
    decides the last bit. Extreme values overshoot at every edge, also at that of the margin."""
    dice, rng = random.Random(0), np.random.default_rng(0)
    for number in range(60):
        longest = dice.choice([3, 20, 100, 500])
        width, height, size = (
            dice.randint(1, longest),
            dice.randint(1, longest),
            dice.choice([1, 14, 56, 99, 336]),
        )
        pixels = (
            rng.integers(0, 256, (height, width, 3))
            if number % 2
            else 255 * rng.integers(0, 2, (height, width, 3))
        )
        image = Image.fromarray(pixels.astype(np.uint8))
        # strips of few rows, or of all
        monkeypatch.setattr(resize, "WHOLE_SQUARE", (30, 2048)[number % 2])
        square = resize_and_crop(pad_to_square(image, COLOUR), size)
        assert np.array_equal(pad_and_resize(image, size, COLOUR), square), (width, height, size)


def test_a_very_tall_picture_is_a_very_wide_one_turned(monkeypatch):
    """Tall and wide pictures take paths of their own: one of them would be resized otherwise."""
    monkeypatch.setattr(resize, "EXACT_SIDE", 50)
    image = picture(9, 60)
    turned = pad_and_resize(image.transpose(Image.Transpose.TRANSPOSE), 14, COLOUR)
    assert np.array_equal(
        pad_and_resize(image, 14, COLOUR).transpose(Image.Transpose.TRANSPOSE), turned
    )


@pytest.mark.parametrize(
    "size", [(13_400, 100), (100, 2_100), (60_000, 30), (30, 60_000), (1, 65_535)]
)
def test_panoramas_and_long_screenshots_are_opened(size):
    """The limit is on a picture's own pixels: padded to a square, these would have up to 4
    billion."""
    image = Image.new("RGB", size, (10, 200, 30))
    assert (
        np.asarray(ImageProcessor(56, "crop").square(image)).tolist() == [[[10, 200, 30]] * 56] * 56
    )
    padded = np.asarray(ImageProcessor(56).square(image))
    assert (padded[0, 0] == COLOUR).all()
    # one pixel in 65,535 is nothing, after rounding
    assert (padded[28, 28] == COLOUR).all() == (1 in size)


def test_an_opened_picture_keeps_its_name(tmp_path, monkeypatch):
    """A command opens pictures before the model; what is said of them later must say which one."""
    picture().save(tmp_path / "x.png")
    opened = open_image(open_image(tmp_path / "x.png"))
    monkeypatch.setattr(pictures, "MAX_SIDE", 39)
    with pytest.raises(
        ValueError, match=r"x\.png: the picture is 40 x 30, with a side of more than 39 pixels"
    ):
        ImageProcessor(56)([opened])


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    """`--image=~/x.png` reaches us as it is written, since a shell expands only a `~` at a word's
    beginning."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    picture().save(tmp_path / "x.png")
    assert open_image("~/x.png").size == (40, 30)
    (tmp_path / "~").mkdir()
    picture(5, 6).save(tmp_path / "~" / "x.png")  # really called so
    assert open_image("~/x.png").size == (5, 6)
    with pytest.raises(FileNotFoundError, match=r"^~/y.png: no such picture"):
        open_image("~/y.png")


# --- data: URLs -----------------------------------------------------------------------------------


def test_a_data_url_as_people_and_programs_write_it():
    """A data URL copied from a page, with line breaks, quotes or escapes, would be refused."""
    image = picture()
    content = png(image)
    good = base64.b64encode(content).decode()
    for url in (
        "data:image/png;base64," + base64.encodebytes(content).decode(),  # lines of 76 letters
        "data:image/png;base64," + base64.encodebytes(content).decode().replace("\n", "\r\n\t "),
        f"  data:image/png;base64, {good}\n",
        "DATA:Image/PNG;BASE64," + good,
        "data:image/png;charset=utf-8;name=x.png;base64," + good,
        "data:;base64," + good.rstrip("="),
        "data:image/png; base64,"
        + good.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
        + "%0A",
        "data:image/png;base64," + base64.urlsafe_b64encode(content).decode(),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
        "data:image/png;base64," + "".join(f"%{ord(letter):02X}" for letter in good),
        "\ufeffdata:image/png;base64," + good,
        f'"data:image/png;base64,{good}"',
        f" 'data:image/png;base64,{good}'\n",
        f"data:image/png;base64,{good}#page=1",
        f"data:image/png;base64,\u00a0{good[:20]}\u200b\u3000{good[20:]}",
        f'data:image/png;name="a,b.png";base64,{good}',
    ):
        assert np.array_equal(open_image(url), image), url[:60]


def test_a_file_url(tmp_path):
    """A file: URL, which browsers and file managers copy, would be refused or lose its spaces."""
    picture().save(tmp_path / "a b.png")
    url = (tmp_path / "a b.png").as_uri()
    for spelled in url, url.replace("file:", "FILE:"), url.replace("///", "//localhost/"):
        assert np.array_equal(open_image(spelled), picture())
    with pytest.raises(FileNotFoundError, match=r"^file:///no%20where.png: no such picture"):
        open_image("file:///no%20where.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (base64.b64encode(png(picture())).decode(), "base64; write data:image/png;base64, before"),
        ("/9j/4AAQSkZJRg", "base64; write data:image/png;base64, before it"),
        ("ab" * 100_000, "base64; write data:image/png;base64, before it"),
        ("/home/me/" + "a b." * 100_000, "cannot be read"),
        ("https://example.com/" + "x" * 100_000, "does not download"),
        ("data:image/png;base64," + "*" * 100_000, "not base64"),
    ],
)
def test_a_message_does_not_carry_the_picture(source, message):
    """It was as long as the source: megabytes."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_image(source)
    assert len(str(caught.value)) < 400


# --- metadata -------------------------------------------------------------------------------------


def directory(*entries, order="<", extra=b""):
    """EXIF data of one directory: entries are (tag, kind, count, the value's four bytes)."""
    packed = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return head + struct.pack(f"{order}H", len(entries)) + packed + bytes(4) + extra


UPRIGHT = (0x112, 3, 1, b"\6\0\0\0")
BEYOND = (0x10F, 2, 5000, b"\0\1\0\0")  # a camera's name that would lie behind the end
MINUS = (0x11A, 10, 1, struct.pack("<I", 8 + 2 + 2 * 12 + 4))  # a resolution of -1/0
EXIF = {
    "sound": (directory(UPRIGHT), True),
    "big endian": (directory((0x112, 3, 1, b"\0\6\0\0"), order=">"), True),
    "a resolution out of range": (directory(UPRIGHT, MINUS, extra=struct.pack("<ii", -1, 0)), True),
    "a damaged tag before it": (directory(BEYOND, UPRIGHT), True),
    "a damaged tag after it": (directory(UPRIGHT, BEYOND), True),
    "cut after it": (directory(UPRIGHT, BEYOND)[:24], True),
    "cut before it": (directory(BEYOND, UPRIGHT)[:28], False),
    "a kind that does not exist": (directory((0x10F, 99, 1, bytes(4)), UPRIGHT), True),
    "a long number": (directory((0x112, 4, 1, b"\6\0\0\0")), True),
    "written twice": (b"Exif\0\0" + directory(UPRIGHT), True),
    "value 0": (directory((0x112, 3, 1, bytes(4))), False),
    "value 9": (directory((0x112, 3, 1, b"\x09\0\0\0")), False),
    "a text": (directory((0x112, 2, 2, b"6\0\0\0")), False),
    "bytes": (directory((0x112, 1, 1, b"\6\0\0\0")), False),
    "no values": (directory((0x112, 3, 0, b"\6\0\0\0")), False),
    "four billion values": (directory((0x112, 3, 2**32 - 1, b"\6\0\0\0")), False),
    "a directory beyond the end": (b"II*\0\xff\xff\0\0" + directory(UPRIGHT)[8:], False),
    "a directory that says it is long": (
        directory(UPRIGHT).replace(b"\1\0\x12\1", b"\xff\xff\x12\1", 1),
        True,
    ),
    "no byte order": (b"??" + directory(UPRIGHT)[2:], False),
    "nothing": (b"", False),
    "something else": (bytes(range(200)), False),
}


def jpeg(*segments):
    """picture() as a JPEG with these (marker, payload)."""
    file = io.BytesIO()
    picture().save(file, "JPEG", quality=95)
    content = file.getvalue()
    return (
        content[:2]
        + b"".join(bytes([0xFF, m]) + struct.pack(">H", len(p) + 2) + p for m, p in segments)
        + content[2:]
    )


def with_chunks(*chunks):
    """picture() as a PNG with these (kind, payload, sound) before its pixels."""
    content = png(picture())
    made = [
        struct.pack(">I", len(payload))
        + kind
        + payload
        + struct.pack(">I", zlib.crc32(kind + payload) ^ (not sound))
        for kind, payload, sound in chunks
    ]
    return content[:33] + b"".join(made) + content[33:]


@pytest.mark.parametrize("name", EXIF)
def test_malformed_exif_hides_no_pixels(name):
    """Upright where the orientation can be read, as it is stored where it cannot: Pillow's
    exif_transpose refuses the picture, or loses the orientation, for one malformed tag beside
    it."""
    exif, readable = EXIF[name]
    image = picture()
    webp = io.BytesIO()
    image.save(webp, "WEBP", lossless=True, exif=exif)
    contents = {
        "JPEG": jpeg((0xE1, b"Exif\0\0" + exif)),
        "PNG": with_chunks((b"eXIf", exif, True)),
        "PNG with a damaged text": with_chunks((b"tEXt", b"a\0b", False), (b"eXIf", exif, True)),
        "ImageMagick's PNG": with_chunks(
            (
                b"tEXt",
                b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode()),
                True,
            )
        ),
        "WebP": webp.getvalue(),
    }
    for kind, content in contents.items():
        stored = open_image(jpeg() if kind == "JPEG" else image)
        expected = stored.transpose(Image.Transpose.ROTATE_270) if readable else stored
        opened = open_image(content)
        assert np.array_equal(opened, expected), kind
        # commands open twice; it must not turn twice
        assert np.array_equal(open_image(opened), expected), kind


def test_a_tiff_is_turned_once():
    """Pillow turns it as it loads, and takes the orientation out of its metadata; XMP still has it
    in other words."""
    image, file = picture(), io.BytesIO()
    exif = Image.Exif()
    exif[0x112], exif[700] = 6, b"<x tiff:Orientation = '6'/>"
    image.save(file, "TIFF", exif=exif)
    assert np.array_equal(open_image(file.getvalue()), image.transpose(Image.Transpose.ROTATE_270))
    memory = picture()
    memory.getexif()[0x112] = 3
    assert np.array_equal(open_image(memory), image.transpose(Image.Transpose.ROTATE_180))


def test_orientation_in_xmp():
    """Read when EXIF has none, as Pillow does, which writes a digit without looking whether it is
    one of eight."""
    stored = open_image(jpeg())
    for text, turn in (
        (b'tiff:Orientation="6"', True),
        (b"<tiff:Orientation>6</tiff:Orientation>", True),
        (b"tiff:Orientation = '6'", True),
        (b'tiff:Orientation="66"', False),
        (b'tiff:Orientation="0"', False),
        (b"\xff\0 no XML <", False),
    ):
        content = jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text))
        assert open_image(content).size == ((30, 40) if turn else (40, 30)), text
        itxt = b"XML:com.adobe.xmp\0\0\0\0\0" + text
        for other in ((), ((b"tIME", b"x", False),)):
            assert open_image(with_chunks((b"iTXt", itxt, True), *other)).size == (
                (30, 40) if turn else (40, 30)
            ), text
    wins = jpeg(
        (0xE1, b"Exif\0\0" + directory((0x112, 3, 1, b"\1\0\0\0"))),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text),
    )
    assert np.array_equal(open_image(wins), stored)


def test_metadata_that_pillow_refuses_hides_no_pixels():
    """A picture whose pixels are sound would be refused for its metadata."""
    image = picture()
    bomb = zlib.compress(bytes(100 << 20))
    for name, chunk in {
        "a checksum": (b"tEXt", b"Author\0Me", False),
        "an ICC profile": (b"iCCP", b"sRGB\0\0" + b"no zlib", True),
        "an ICC profile of nothing": (b"iCCP", b"", True),
        "a text of 100 MB": (b"zTXt", b"Comment\0\0" + bomb, True),
        "an international text": (b"iTXt", b"a\0\1\0\0\0\xff", True),
        "a time": (b"tIME", b"1", True),
        "a resolution": (b"pHYs", b"1", True),
        "a gamma": (b"gAMA", b"1", True),
        "colours": (b"cHRM", b"123", True),
        "EXIF": (b"eXIf", directory(UPRIGHT), False),
        "where it is from": (b"caBX", b"x" * 50, False),
        "a size of the page": (b"vpAg", bytes(9), False),
        "something private": (b"abCd", b"zzz", False),
        "an animation of nothing": (b"acTL", b"1", True),
        "a frame without an animation": (b"fcTL", bytes(26), True),
    }.items():
        assert np.array_equal(open_image(with_chunks(chunk)), image), name
    assert np.array_equal(open_image(png(image) + b"trailing bytes"), image)
    assert np.array_equal(open_image(jpeg() + bytes(99)), open_image(jpeg()))
    for segment in (
        (0xE2, b"ICC_PROFILE\0\x09\1no profile"),
        (0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        (0xE2, b"MPF\0" + directory((0xB001, 2, 4, b"many"))),
        (0xED, b"Photoshop 3.0\x008BIM\4\4\xff"),
        (0xE0, b"JFIF"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff\xfe"),
    ):
        assert np.array_equal(open_image(jpeg(segment)), open_image(jpeg())), segment


def test_webp_and_avif_with_damaged_metadata():
    """A WebP or AVIF picture would be refused, or lie on its side, because its metadata is
    damaged."""
    file = io.BytesIO()
    picture().save(file, "WEBP", lossless=True, exif=directory(UPRIGHT), xmp=b"x" * 100)
    content = file.getvalue()
    expected = picture().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(open_image(content[:-60]), expected)  # cut in its XMP
    # cut behind the value
    assert np.array_equal(open_image(content[: content.index(b"EXIF") + 8 + 24]), expected)
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow has no AVIF; the rest of the test has passed")
    file = io.BytesIO()
    picture().save(file, "AVIF", exif=b"Exif\0\0" + directory((0x10F, 2, 4, b"abc\0")))
    content = file.getvalue()
    damaged = content.replace(b"II*\0", b"????")
    assert damaged != content
    assert np.array_equal(open_image(damaged), open_image(content))


def test_damage_to_pixels_stays_an_error():
    """What helps metadata must not let through a picture with other pixels: half of them, or
    without its palette or its transparency."""
    palette = png(picture().convert("P", palette=Image.Palette.ADAPTIVE), transparency=3)
    for content in (
        png(picture())[:-600],
        with_chunks((b"tEXt", b"a\0b", False))[:-600],
        palette.replace(b"PLTE", b"pLTE"),
        palette.replace(b"tRNS", b"tRNS\1", 1),
        png(picture()).replace(b"IDAT", b"iDAT"),
        with_chunks((b"ABCD", b"zzz", False)),  # which no decoder may skip
        jpeg((0xE2, b"ICC_PROFILE\0\x09\1"))[:-600],
    ):
        with pytest.raises(ValueError, match=r"damaged|not a picture"):
            open_image(content)


def test_several_pictures_may_come_in_any_sequence():
    """A deque, which the annotation allows, was taken for one picture and refused."""
    process = ImageProcessor(8)
    several = [picture(seed=1), picture(seed=2)]
    for sequence in (several, tuple(several), deque(several), UserList(several)):
        assert torch.equal(process(sequence), process(several))
    for one in (png(several[0]), several[0], io.BytesIO(png(several[0]))):
        assert torch.equal(process(one), process(several[:1]))
    with pytest.raises(ValueError, match="found bytearray, expected a path"):
        process(bytearray(png(several[0])))
