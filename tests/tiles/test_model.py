"""LLaVA-1.6 in this process, against Hugging Face transformers and against itself."""

import functools
from functools import partial

import hf
import pytest
import torch
from commands import status_of
from tiled import GRID, SIZES, draw, theirs_of

import minillava
from minillava.cli.doors import enter
from minillava.templates import TEMPLATES
from minillava.tiles.pictures import TileProcessor, positions_of

load = functools.partial(minillava.load, device="cpu", attention="eager")


@pytest.mark.numeric
@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_eager_is_bit_identical_to_transformers(tiled, text, dtype):
    """The order of tiles, the padding taken off, or the vectors that end rows would differ."""
    folder = tiled(text).folder
    ours, theirs = load(folder, dtype=dtype), hf.load(folder, dtype)
    for shown in (*([size] for size in SIZES), SIZES[:2], SIZES[2:5]):
        pictures = ours.image_processor([draw(*size) for size in shown])
        ids = [1, 7, *[hf.IMAGE, 13] * len(shown), 20, 30, 40]
        expected = theirs_of(theirs, ids, pictures)
        found = ours.model([ids], pictures).logits[0]
        assert torch.equal(found, expected), shown
        counts = [positions_of(ours.model.config, each) for each in pictures]
        assert len(found) == len(ids) + sum(counts) - len(shown)


def test_a_batch_is_its_rows_alone(tiled):
    """Pictures of different lengths in one batch: right padding, or one length for all, would move
    every word of the shorter rows."""
    assistant = load(tiled("llama").folder, dtype="float32")
    pictures = [draw(*size) for size in SIZES[:4]]
    questions = ["What is it?", "Which colour is this?", "Why?", "What is it?"]
    together = assistant.ask(pictures, questions, max_new_tokens=6)
    alone = [
        assistant.ask(picture, question, max_new_tokens=6)
        for picture, question in zip(pictures, questions, strict=True)
    ]
    assert together == alone
    both = assistant.ask(pictures[:2], "Compare them.", max_new_tokens=4)
    assert isinstance(both, str)


def test_the_original_layout_reads_its_canvases_as_width_and_height(tiled):
    """A small picture gets another canvas there than on the hub."""
    hub, original = (
        load(tiled("llama", dialect).folder, dtype="float32") for dialect in ("hub", "original")
    )
    assert isinstance(original.image_processor, TileProcessor)
    assert original.model.config.grid == hub.model.config.grid  # stored transposed, read so, too
    assert torch.equal(original.model.image_newline, hub.model.image_newline)


def test_written_anew_it_is_the_same_model(tiled, tmp_path):
    """convert would leave out the canvases, or write the original's pairs in the hub's order; or a
    Mistral would come back with Vicuna's template."""
    source, before = tiled("mistral").folder, tmp_path / "original"
    for folder, to, made in ((source, "original", before), (before, "hf", tmp_path / "hub")):
        assert status_of(partial(enter, "convert"), [folder, made, "--to", to]) == 0
    models = [load(folder, dtype="float32") for folder in (source, before, tmp_path / "hub")]
    picture = draw(30, 50)
    answers = {model.ask(picture, "What is it?", max_new_tokens=5) for model in models}
    assert len(answers) == 1
    assert {model.model.config.grid for model in models} == {tuple(map(tuple, GRID))}
    assert {model.template.user for model in models} == {TEMPLATES["mistral_instruct"].user}
    hf.load(tmp_path / "hub")  # raises where transformers misses something


def test_the_template_is_that_of_the_language_model(tiled):
    """A wrong template gives plausible, worse answers."""
    prompt = load(tiled("mistral").folder, dtype="float32").prompt("Why?")
    assert prompt == "[INST] <image>\nWhy? [/INST]"
    assert load(tiled("llama").folder, dtype="float32").template is TEMPLATES["llava_v1"]
