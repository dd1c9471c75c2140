"""LLaVA-OneVision: maps of large pictures are made smaller, and each of several pictures is a padded
square; against Hugging Face transformers and against itself."""

import functools
import hashlib
import io
import json
import shutil
from functools import partial
from types import SimpleNamespace

import hf
import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from commands import status_of
from PIL import Image
from tiled import ONEVISION_GRID, ONEVISION_SIZES, draw, onevision_config

import minillava
from minillava.chat.conversation import Conversation
from minillava.checkpoint.config_json import read_config
from minillava.cli.doors import enter
from minillava.config import LlavaConfig, TextConfig, VisionConfig
from minillava.inspection.report import inspect_folder
from minillava.templates import TEMPLATES
from minillava.tiles.grid import best_canvas, kept_patches
from minillava.tiles.pictures import (
    Tiled,
    TileProcessor,
    most_positions,
    positions_of,
    positions_of_size,
)
from minillava.tiles.places import Fold
from minillava.tracing.run import trace

load = functools.partial(minillava.load, device="cpu", attention="eager")

SIDES = range(384, 2305, 384)
GRID = tuple((height, width) for height in SIDES for width in SIDES)
TOWER = VisionConfig(image_size=384, patch_size=14, siglip=True)
RELEASE = LlavaConfig(TOWER, TextConfig(), grid=GRID, most_tiles=9)
HALF = (0.5, 0.5, 0.5)

# width, height: canvas, positions; all computed by transformers 5.23
TABLE = {
    (500, 334): ((384, 768), 1836),
    (672, 672): ((768, 768), 3699),
    (1000, 300): ((384, 1152), 2779),
    (300, 1000): ((1152, 384), 2835),
    (336, 336): ((384, 384), 1485),
    (384, 384): ((384, 384), 1485),
    (1, 1): ((384, 384), 1485),
    (640, 480): ((768, 768), 2929),
    (1920, 1080): ((1152, 1920), 7269),
    (4000, 3000): ((1920, 2304), 7309),
    (5000, 3): ((384, 2304), 892),
    (3, 5000): ((2304, 384), 1053),
}

# Of the pictures of `pattern`: squares, the beginning of the SHA-256 of the pixels; by transformers
PIXELS = {
    (500, 334): (3, "84063ddeb52b071e"),
    (384, 384): (2, "8233dc349505254d"),
    (1, 1): (2, "6501bde837e2b2c5"),
    (300, 1000): (4, "769ba268e04731b8"),
}


def pattern(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = (7 * x + 3 * y, 5 * x + 11 * y, 13 * x + 2 * y)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def command(door: str, *args: object) -> int:
    return status_of(partial(enter, door), list(map(str, args)))


@pytest.mark.parametrize(("width", "height"), TABLE)
def test_canvas_and_positions_are_those_of_transformers(width, height):
    """A map that was not made smaller would take up to 26,000 positions; one of another size moves
    every word after the picture."""
    canvas, positions = TABLE[width, height]
    assert best_canvas((height, width), GRID) == canvas
    assert positions_of_size(RELEASE, (height, width)) == positions


@pytest.mark.parametrize(("width", "height"), PIXELS)
def test_pixels_are_those_of_transformers(width, height):
    """CLIP's mean, or other tiles. Bits are compared with the Pillow that was used."""
    count, digest = PIXELS[width, height]
    (found,) = TileProcessor(384, GRID, HALF, HALF, alone=True)(pattern(width, height))
    assert found.pixels.shape == (count, 3, 384, 384) and found.size == (height, width)
    if PIL.__version__ == "13.0.0":
        assert hashlib.sha256(found.pixels.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parity
def test_pixels_are_those_of_transformers_bit_for_bit():
    """In the same process, with the same Pillow: one picture in tiles, several as padded squares."""
    pytest.importorskip("transformers", minversion="5", reason="live parity needs transformers 5")
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    theirs = LlavaOnevisionImageProcessorPil(image_mean=list(HALF), image_std=list(HALF))
    ours = TileProcessor(384, GRID, HALF, HALF, alone=True)
    pictures = [pattern(*size) for size in ((500, 334), (385, 384), (1500, 120), (3, 50), (60, 60))]
    for picture in pictures:
        given = theirs(picture, return_tensors="pt")
        (found,) = ours(picture)
        assert torch.equal(found.pixels, given["pixel_values"][0]), picture.size
        assert list(found.size) == given["image_sizes"][0].tolist()
    given = theirs([pictures], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack([found.pixels for found in ours(pictures)]), given)


@torch.no_grad()
def theirs_of(model, ids, pictures, sizes) -> torch.Tensor:
    """transformers' logits [T, V] of one prompt; the picture's token is written once for each
    position that the pictures take."""
    most = max(len(each.pixels) for each in pictures)
    pixels = torch.stack(
        [F.pad(each.pixels, (0, 0, 0, 0, 0, 0, 0, most - len(each.pixels))) for each in pictures]
    ).to(model.dtype)
    more = {
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.tensor([len(pictures)]),
    }
    shown = model.model.get_image_features(pixels, **more).pooler_output
    image, counts = model.config.image_token_index, iter(map(len, shown))
    wide = [i for t in ids for i in ([image] * next(counts) if t == hf.IMAGE else [t])]
    return model(
        input_ids=torch.tensor([wide]), pixel_values=pixels, use_cache=False, **more
    ).logits[0]


@pytest.mark.numeric
@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eager_is_bit_identical_to_transformers(tiled, dtype):
    """The map that is made smaller, its order of channels, or squares among several would differ."""
    folder = tiled("onevision").folder
    ours, theirs = load(folder, dtype=dtype), hf.load(folder, dtype)
    whole = small = 0
    for shown in (*([size] for size in ONEVISION_SIZES), ONEVISION_SIZES[:2], ONEVISION_SIZES[2:]):
        pictures = ours.image_processor([draw(*size) for size in shown])
        ids = [1, 7, *[hf.IMAGE, 13] * len(shown), 20, 30, 40]
        found = ours.model([ids], pictures).logits[0]
        assert torch.equal(found, theirs_of(theirs, ids, pictures, shown)), shown
        counts = [positions_of(ours.model.config, each) for each in pictures]
        assert len(found) == len(ids) + sum(counts) - len(shown)
        if len(shown) > 1:
            assert set(counts) == {16 + 1}
            continue
        canvas = best_canvas(shown[0], ours.model.config.grid)
        kept = kept_patches(shown[0], canvas[0] // 58 * 4, canvas[1] // 58 * 4)
        whole += counts[0] == 16 + kept.positions
        small += counts[0] < 16 + kept.positions
    assert whole and small  # both sides of 1.1


@pytest.mark.parity
def test_what_a_file_leaves_out_is_what_transformers_takes_for_it(tmp_path):
    """LLaVA-1.5's defaults would be taken: another tower, another layer, another <image>."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="its own defaults")
    raw = {"model_type": "llava_onevision", "text_config": {"hidden_size": 896}}
    for given in (raw, {**raw, "vision_config": {"image_size": 384, "patch_size": 16}}):
        (tmp_path / "config.json").write_text(json.dumps(given))
        ours = read_config(tmp_path)
        theirs = transformers.LlavaOnevisionConfig(**given)
        assert list(map(list, ours.grid)) == theirs.image_grid_pinpoints and len(ours.grid) == 36
        assert theirs.vision_aspect_ratio == f"anyres_max_{ours.most_tiles}"
        assert ours.image_token_id == theirs.image_token_index
        assert ours.feature_layer == theirs.vision_feature_layer
        assert ours.template == "chatml_lines" and ours.image_aspect_ratio == "anyres"
        for part, known in ((ours.vision, theirs.vision_config), (ours.text, theirs.text_config)):
            for name, value in vars(part).items():
                if name in ("siglip", "qkv_bias", "rope_theta", "rope_factor", "head_dim"):
                    continue
                assert value == getattr(known, name), name


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("vision_aspect_ratio", "anyres", "anyres_max_9"),
        ("vision_aspect_ratio", "anyres_max_0", "anyres_max_9"),
        ("vision_feature_select_strategy", "default", "drop a class token"),
        ("image_grid_pinpoints", [[100, 58]], "image_grid_pinpoints"),
        ("vision_config", {"model_type": "clip_vision_model"}, "siglip_vision_model"),
        ("text_config", {"model_type": "llama"}, "qwen2"),
    ],
)
def test_what_no_release_has_is_refused(tmp_path, field, value, told):
    """It would be read as something else."""
    (tmp_path / "config.json").write_text(json.dumps({**onevision_config(), field: value}))
    with pytest.raises(ValueError, match=told):
        read_config(tmp_path)


def test_the_layout_of_its_authors_is_refused_by_name(tmp_path):
    """Only LLaVA-1.5 was named as what to take instead."""
    raw = {"model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384"}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "image_aspect_ratio": "anyres_max_9"}))
    with pytest.raises(ValueError, match="use the hub's, such as llava-hf/llava-onevision") as told:
        read_config(tmp_path)
    assert "\n" not in str(told.value)


def test_no_size_takes_more_positions_than_is_said():
    """A picture that fills its canvas is made smaller, so it has not the most."""
    most = most_positions(RELEASE)
    assert max(positions for _, positions in TABLE.values()) < most
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 3000, (300, 2), generator=generator).tolist()
    assert max(positions_of_size(RELEASE, tuple(size)) for size in sizes) <= most
    assert positions_of_size(RELEASE, None) == 729 + 1


def test_a_batch_is_its_rows_alone(tiled):
    """A picture of a row that has several would be encoded as one that stands alone, or the other
    way round where two rows show the same picture."""
    assistant = load(tiled("onevision").folder, dtype="float32")
    first, second, third = (draw(*size) for size in ONEVISION_SIZES[1:4])
    rows = [first, [first, second], second, [third, first, second]]
    questions = ["What is it?", "Compare them.", "Which colour is this?", "Why?"]
    together = assistant.ask(rows, questions, max_new_tokens=5)
    alone = [assistant.ask(*asked, max_new_tokens=5) for asked in zip(rows, questions, strict=True)]
    assert together == alone
    ids = assistant.tokenize(assistant.prompt("Compare them.", images=2))
    squares = [assistant.encode(picture, several=True) for picture in rows[1]]
    both = assistant.model.splice([ids], squares).embeds
    assert torch.allclose(both, assistant.embed(ids, rows[1]), atol=1e-5, rtol=0)


def test_a_second_picture_makes_squares_of_both(tiled):
    """A conversation is one prompt: with two pictures in it neither is in tiles, so that an answer
    is that of a fresh start."""
    assistant = load(tiled("onevision").folder, dtype="float32")
    first, second = (draw(*size) for size in ONEVISION_SIZES[1:3])
    chat = Conversation(assistant)
    chat.add_image(first)
    answer = chat.ask("What is it?", max_new_tokens=3)
    assert len(chat.turns[0].pictures[0].patches) == positions_of(
        assistant.model.config, *assistant.image_processor(first)
    )
    assert answer == assistant.ask(first, "What is it?", max_new_tokens=3)
    chat.ask("Why?", max_new_tokens=3)
    assert chat.turns[1].reused > 16  # the picture is still cached
    chat.add_image(second)
    chat.ask("And this?", max_new_tokens=3)
    shown = [picture for turn in chat.turns for picture in turn.pictures]
    assert [len(picture.patches) for picture in shown] == [17, 17]
    assert chat.turns[2].reused <= chat.positions.index(shown[0])  # nothing of it as it was
    fresh = Conversation(assistant)
    fresh.add_image(first)
    fresh.add_image(second)
    assert [len(picture.patches) for picture in fresh.waiting] == [34, 17]
    fresh.ask("And these?", max_new_tokens=1)
    assert torch.equal(fresh.turns[0].pictures[0].patches, shown[0].patches)
    fresh.clear()
    fresh.add_image(first, more=True)  # which does not come
    fresh.ask("What is it?", max_new_tokens=3)
    assert fresh.turns[0].answer == answer


def test_a_question_that_does_not_fit_leaves_the_pictures_as_they_were(tiled):
    """The pictures of earlier turns were already exchanged for squares when the question was
    refused: the next one encoded them anew, and read the whole conversation again."""
    assistant = load(tiled("onevision").folder, dtype="float32")
    first, second = (draw(*size) for size in ONEVISION_SIZES[1:3])
    chat = Conversation(assistant)
    chat.add_image(first)
    chat.ask("What is it?", max_new_tokens=3)
    shown = chat.turns[0].pictures
    chat.add_image(second)
    with pytest.raises(ValueError, match="with this question the conversation takes"):
        chat.ask("? " * (chat.room // 2 + 1), max_new_tokens=3)
    assert len(chat.turns) == 1 and chat.turns[0].pictures is shown
    assert len(chat.waiting) == 1


@pytest.mark.parametrize("beams", [1, 2])
def test_batch_answers_one_picture_and_several(tiled, tmp_path, beams):
    """A picture that two questions share, alone and beside another, has two lengths."""
    names = ["0.png", "1.png"]
    for name, size in zip(names, ONEVISION_SIZES[1:3], strict=True):
        draw(*size).save(tmp_path / name)
    asked = [names[0], names, names[1], None]
    lines = [
        json.dumps({"question_id": i, "image": shown, "text": "What is it?"})
        for i, shown in enumerate(asked)
    ]
    lines.append(json.dumps({"question_id": 4, "video": "a.mp4", "text": "What happens?"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    folder, answers = tiled("onevision").folder, tmp_path / "a.jsonl"
    status = command(
        "batch", "-m", folder, "--questions", tmp_path / "q.jsonl", "--images", tmp_path,
        "--answers", answers, "--max-new-tokens", 3, "--device", "cpu", "--dtype", "float32",
        "--num-beams", beams,
    )  # fmt: skip
    assert status == 1  # of the video
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert "videos are not read" in json.dumps(records[-1])
    assistant = load(folder, dtype="float32")
    for record, shown in zip(records, asked, strict=False):
        opened = [tmp_path / name for name in ([shown] if isinstance(shown, str) else shown or [])]
        found = assistant.ask(opened, "What is it?", max_new_tokens=3, num_beams=beams)
        assert record["text"] == found


def test_a_place_of_a_smaller_map_is_shown_where_its_patches_lie(tiled):
    """Attention would be drawn beside what it fell on: tiles of 58 pixels have four patches of 14,
    and each place of the smaller map is a mean of several."""
    config = load(tiled("onevision").folder, dtype="float32").model.config
    size = (230, 230)
    fold, count = Fold(config, size), config.tokens_per_image
    length = positions_of_size(config, size)
    kept = kept_patches(size, 16, 16)
    small = kept.shrunk(config.most_tiles, 4)
    assert (small.rows, small.columns) == (6, 6)
    # a picture of one bright patch, made smaller: what reads it, and what is shown of that
    for at in ((0, 0), (6, 9), (15, 14), (5, 5)):
        bright = torch.zeros(16, 16)
        bright[at] = 1
        seen = F.interpolate(bright[None, None], (6, 6), mode="bilinear")[0, 0]
        numbers = torch.zeros(6, 7)
        numbers[:, :6] = seen
        found = fold(torch.cat([torch.zeros(count), numbers.flatten()])).view(4, 4)
        assert torch.allclose(found.sum(), seen.sum())
        assert (seen.sum() > 0) == (at != (5, 5))  # which no place is a mean of
        if at != (5, 5):
            peak = divmod(int(found.argmax()), 4)
            assert peak == (at[0] // 4, at[1] // 4)
    ends = torch.zeros(length)
    ends[count + 6 :: 7] = 1
    assert fold(ends).sum() == 0
    # the last pixels of a tile, which no patch has, move the next tile's patches
    numbers = torch.zeros(positions_of_size(config, (58, 116)))
    numbers[count + 4] = 1  # the first patch of the second tile
    found = Fold(config, (58, 116))(numbers).view(4, 4)
    assert found[0, 2] > 0.9


def test_trace_says_the_tiles_of_one_and_the_squares_of_several(tiled):
    """It would name tiles that are not there."""
    assistant = load(tiled("onevision").folder, dtype="float32")
    pictures = [draw(*size) for size in ONEVISION_SIZES[1:3]]
    for given in (pictures[:1], pictures):
        records = {}
        trace(
            assistant, given, "What is it?", max_new_tokens=1,
            consume=lambda record, tensor, into=records: into.setdefault(record.name, record),
        )  # fmt: skip
        assert ("picture.0.tiles" in records) == (len(given) == 1)
        assert ("pad" in str(records["picture.0.square"].value)) == (len(given) > 1)
    assert records["picture.1.pixel_values"].shape == [1, 3, 58, 58]


@pytest.mark.parametrize("aspect", ["squash", "pad"])
def test_one_square_is_the_fast_way(tiled, aspect):
    """A picture of 12 million pixels takes 31 squares; one takes the tower once, and each has the
    end of its line."""
    assistant = load(tiled("onevision").folder, dtype="float32", image_aspect_ratio=aspect)
    picture = draw(*ONEVISION_SIZES[1])
    spliced = assistant.prepare(picture, assistant.prompt("What?"))
    ((start, end),) = spliced.image_spans[0]
    assert end - start == 17
    whole = load(tiled("onevision").folder, dtype="float32").image_processor
    square = assistant.image_processor(picture)
    same = whole(picture)[0].pixels[:1] if aspect == "squash" else whole([picture] * 2)[0].pixels
    assert torch.equal(square, same)


def test_the_prompt_has_a_line_for_each_picture_and_no_video(tiled, capsys, tmp_path):
    """llava-interleave's pictures share one; a <video> would be a token that stands for nothing."""
    assistant = load(tiled("onevision").folder, dtype="float32")
    assert assistant.template is TEMPLATES["chatml_lines"]
    prompt = assistant.prompt("Why?", images=2)
    assert prompt == ("<|im_start|>user\n<image>\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    draw(50, 50).save(tmp_path / "a.png")
    folder = shutil.copytree(tiled("onevision").folder, tmp_path / "model")
    (folder / "added_tokens.json").write_text(json.dumps({"<video>": 442}))
    status = command("generate", "-m", folder, "-i", tmp_path / "a.png", "-p", "<video> What?")
    told = capsys.readouterr().err
    assert status == 1 and "videos are not read" in told and "Traceback" not in told


def test_inspect_and_convert_know_it(tiled, tmp_path):
    """Who plans memory would count 16 positions; a copy would be a LLaVA-1.6."""
    folder = tiled("onevision").folder
    report = inspect_folder(folder)
    assert report.loadable, report.problems
    assert report.network["positions_per_picture"] == 16
    most = most_positions(load(folder, dtype="float32").model.config)
    assert report.network["most_positions_per_picture"] == most
    assert report.template["name"] == "chatml_lines"
    assert command("convert", folder, tmp_path / "hub", "--to", "hf") == 0
    models = [load(each, dtype="float32") for each in (folder, tmp_path / "hub")]
    pictures = [draw(*size) for size in ONEVISION_SIZES[1:3]]
    for shown in (pictures[0], pictures):
        assert len({model.ask(shown, "What is it?", max_new_tokens=5) for model in models}) == 1
    assert models[1].model.config.grid == tuple(map(tuple, ONEVISION_GRID))
    hf.load(tmp_path / "hub")  # raises where transformers misses something
    assert command("convert", folder, tmp_path / "original", "--to", "original") == 1


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_it_answers_in_eight_and_four_bits(tiled, quantize):
    """The heads' width, or a tied head, would not fit the kernels."""
    assistant = load(tiled("onevision").folder, dtype="float32", quantize=quantize)
    assert isinstance(assistant.ask(draw(40, 110), "What is it?", max_new_tokens=2), str)


@pytest.mark.parity
def test_a_served_picture_alone_is_another_one_beside_others(tiled):
    """A client sends each picture again: the features of its tiles would be taken for its square."""
    reading = pytest.importorskip("minillava.serve.reading", reason="needs the extra [serve]")
    from minillava.serve.service import Service

    contents = []
    for size in ONEVISION_SIZES[1:3]:
        draw(*size).save(file := io.BytesIO(), "PNG")
        contents.append(reading.Content(file.getvalue()))
    assistant = load(tiled("onevision").folder, dtype="float32")
    engine, settings = SimpleNamespace(most_pictures=4), SimpleNamespace(max_pixels=10**6)
    service = Service(assistant, engine, settings)
    (alone,), both = service._pictures(contents[:1]), service._pictures(contents)
    assert alone[0] != both[0][0] and both[0][0] != both[1][0]
    config = assistant.model.config
    counts = [positions_of(config, pixels) for _, pixels, _ in (alone, *both)]
    assert counts == [positions_of_size(config, ONEVISION_SIZES[1]), 17, 17]
    assert service._pictures(contents[:1])[0][1] is alone[1]  # kept


def test_a_square_is_told_from_tiles_of_the_same_pixels():
    """The engine keeps features by their contents."""
    from minillava.tiles.pictures import contents_of

    pixels = torch.zeros(1, 3, 2, 2)
    assert contents_of(Tiled(pixels, None)) != contents_of(Tiled(pixels, (2, 2)))
