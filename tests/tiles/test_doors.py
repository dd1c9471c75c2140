"""The commands with a LLaVA-1.6: each picture counts by its own positions, and its tiles lie where
they are in it."""

import functools
import json
from functools import partial

import pytest
import torch
from commands import status_of
from tiled import SIZES, draw

import minillava
from minillava.chat.conversation import Conversation
from minillava.cli.doors import enter
from minillava.fast.row_by_row import keep_bits
from minillava.inspection.report import inspect_folder
from minillava.look.run import look
from minillava.tiles.pictures import positions_of
from minillava.tiles.places import Fold, shares
from minillava.tracing.run import trace

load = functools.partial(minillava.load, device="cpu", dtype="float32")
CROP = (170, 60)  # of which each tile row is a third


@pytest.fixture(scope="module")
def assistant(tiled):
    return load(tiled("llama").folder, attention="eager")


def command(door: str, *args: object) -> int:
    return status_of(partial(enter, door), list(map(str, args)))


def test_a_conversation_about_two_pictures_keeps_its_cache(assistant):
    """The cache would be cut at the first picture, or hold one of another length."""
    pictures, chat = [draw(*size) for size in SIZES[:2]], Conversation(assistant)
    for picture in pictures:
        chat.add_image(picture)
    chat.ask("Compare them.", max_new_tokens=3)
    length = len(chat.positions)
    chat.ask("Why?", max_new_tokens=3)
    config = assistant.model.config
    shown = [positions_of(config, each) for each in assistant.image_processor(pictures)]
    assert [len(picture.patches) for picture in chat.turns[0].pictures] == shown
    assert chat.turns[1].reused > sum(shown) and chat.turns[1].prefilled < length - sum(shown)


def test_same_bits_are_kept_for_tiles(tiled):
    """A picture's tiles would share a pass with those of another."""
    model = load(tiled("llama").folder).model
    keep_bits(model)
    pictures = [draw(*size) for size in SIZES[:3]]
    pixels = load(tiled("llama").folder).image_processor(pictures)
    together = model.encode_images(pixels)
    assert all(
        torch.equal(some, model.encode_images([each])[0])
        for some, each in zip(together, pixels, strict=True)
    )


@pytest.mark.parametrize("more", [[], ["--num-beams", "2"]])
def test_batch_answers_pictures_of_different_lengths(tiled, tmp_path, more):
    """The longest prompt is not that of most pictures, and none would have a place to go."""
    lines = []
    for i, size in enumerate(SIZES):
        draw(*size).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"question_id": i, "image": f"{i}.png", "text": "What is it?"}))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    folder, answers = tiled("llama").folder, tmp_path / "a.jsonl"
    status = command(
        "batch", "-m", folder, "--questions", tmp_path / "q.jsonl", "--images", tmp_path,
        "--answers", answers, "--max-new-tokens", 3, "--device", "cpu", *more,
    )  # fmt: skip
    assert status == 0 and len(answers.read_text().splitlines()) == len(SIZES)


def test_what_falls_on_tiles_is_shown_where_they_lie(assistant):
    """A map of the whole picture would show the attention of a tile elsewhere, or lose it."""
    config = assistant.model.config
    (picture,) = assistant.image_processor(draw(*CROP))
    fold, count = Fold(config, picture.size), config.tokens_per_image
    side = fold.side
    length = positions_of(config, picture)
    numbers = torch.zeros(length)
    numbers[count] = 1  # the first patch of the tiles
    found = fold(numbers).view(side, side)
    assert found[0, 0] > 0 and torch.allclose(found.sum(), torch.tensor(1.0))
    numbers = torch.zeros(length)
    numbers[-2] = 1  # the last one, before the end of its row
    assert fold(numbers).view(side, side)[-1, -1] > 0
    numbers = torch.zeros(length)
    numbers[-1] = 1
    assert fold(numbers).sum() == 0
    edges = torch.linspace(0, 1, 9)  # two stretches in each of four parts
    even = shares(edges[:-1], edges[1:], edges[::2])
    assert torch.allclose(even.sum(0), torch.ones(8)) and torch.allclose(
        even.sum(1), 2 * torch.ones(4)
    )


@pytest.mark.parametrize("size", SIZES)
def test_look_shows_a_map_of_the_whole_picture(assistant, size):
    """Its last patches were taken for the picture, which with tiles are the ends of rows."""
    found = look(assistant, draw(*size), "What is it?", max_new_tokens=4)
    side = assistant.model.config.vision.image_size // assistant.model.config.vision.patch_size
    assert found.box == (0, 0, size[1], size[0])
    assert found.words and all(
        word.heat.shape == (side, side) and 0 < word.heat.sum() < 1 for word in found.words
    )


def test_trace_says_the_tiles_and_where_they_are(assistant):
    """Nobody could tell which pixels a tile has."""
    records = {}
    trace(
        assistant, draw(*CROP), "What is it?", max_new_tokens=1,
        consume=lambda record, tensor: records.setdefault(record.name, record),
    )  # fmt: skip
    tiles = records["picture.0.tiles"].value
    assert tiles["canvas"] == [168, 56] and len(tiles["tiles"]) == 3
    assert records["picture.0.pixel_values"].shape == [4, 3, 56, 56]
    tops = [top for _, top, _, _ in tiles["tiles"]]
    assert tops == sorted(tops) and tops[0] <= 0 and tiles["tiles"][-1][3] >= 170


def test_inspect_says_how_many_positions_a_picture_may_take(tiled):
    """Who plans memory would count 576."""
    report = inspect_folder(tiled("mistral").folder)
    assert report.loadable, report.problems
    assert report.network["positions_per_picture"] == 16
    assert report.network["most_positions_per_picture"] == 16 + 8 * 9
    assert report.template["name"] == "mistral_instruct"


def test_what_tiles_do_not_go_with_is_said_in_one_line(tiled, tmp_path, capsys):
    """It would end in a traceback, or train something else."""
    folder = tiled("llama").folder
    draw(30, 50).save(tmp_path / "a.png")
    assert command("probe", "-m", folder, "-i", tmp_path / "a.png", "-p", "What?") == 1
    assert "--image-aspect-ratio squash" in capsys.readouterr().err
    rows = [{"id": "a", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ring."}]}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    status = command(
        "finetune", folder, tmp_path / "rows.json", "--images", tmp_path,
        "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert status == 1 and "is a LLaVA-1.6" in capsys.readouterr().err


def test_the_overview_alone_is_one_square(tiled):
    """--image-aspect-ratio squash is the fast way: the overview and the end of its line. A padded
    square would be one that the model never saw."""
    whole, assistant = (
        load(tiled("llama").folder),
        load(tiled("llama").folder, image_aspect_ratio="squash"),
    )
    (both,), alone = (each.image_processor(draw(30, 50)) for each in (whole, assistant))
    assert torch.equal(both.pixels[:1], alone)
    spliced = assistant.prepare(draw(30, 50), assistant.prompt("What?"))
    ((start, end),) = spliced.image_spans[0]
    assert end - start == 17
    assert isinstance(assistant.ask(draw(30, 50), "What?", max_new_tokens=2), str)
    for method in ("vcd", "ritual", "m3id"):
        assert isinstance(whole.ask(draw(*CROP), "What?", contrast=method, max_new_tokens=2), str)
