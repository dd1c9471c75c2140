"""What a word loses: each measure in float64 against a run that was made by other means."""

import argparse
import copy
import json
import re
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from bounds import assert_same_in_float64
from commands import status_of
from paths import ROOT
from PIL import Image, ImageDraw

import minillava
from minillava.attention import ATTENTION
from minillava.cli.doors import enter
from minillava.cli.messages import Messages
from minillava.fast.compiled import Captured
from minillava.look import draw as look_draw
from minillava.look.run import look
from minillava.probe import again, patching
from minillava.probe import run as probing
from minillava.probe import sheet as sheets
from minillava.probe.again import MOST_ROWS, UNKNOWN_ROWS
from minillava.probe.intervene import Attention, Heads, Keep, States, intervene, zero
from minillava.probe.knockout import (
    ablate,
    blind,
    default_window,
    knock_out,
    means,
    window_around,
)
from minillava.probe.measure import Answered
from minillava.probe.occlude import blocks, hidden_embeddings, hidden_pixels, occlude
from minillava.probe.page import page
from minillava.probe.patching import differing, patch, with_neighbours
from minillava.probe.report import Findings, as_json, as_text, number, scale_end
from minillava.probe.sheet import BELOW, LEFT, LINES, curves, matrix, sheet

QUESTION = "What is it?"
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module", params=list(ATTENTION))
def toy(request, reference):
    """Two query heads share a key/value head."""
    return minillava.load(
        reference / "grouped", device="cpu", dtype="float64", attention=request.param
    )


@pytest.fixture(scope="module")
def picture(reference):
    return Image.open(reference / "pictures" / "landscape.png").convert("RGB")


@pytest.fixture(scope="module")
def answered(toy, picture):
    return Answered(toy, picture, QUESTION, **SHORT)


@pytest.fixture(scope="module")
def demo():
    return minillava.load(ROOT / "weights" / "shapes", device="cpu", dtype="float32")


def likely(answered, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the answer's tokens from logits [1, S, V] of the whole sequence."""
    rows = logits[0, answered.first :].double().log_softmax(-1)
    return rows[torch.arange(len(answered.ids)), answered.ids]


# --- the answer -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_likelihood_is_that_of_one_plain_pass(toy, answered, picture):
    """Every measured drop would be against a wrong baseline."""
    ids = toy.tokenizer.encode(toy.prompt(QUESTION)) + answered.ids[:-1]
    logits = toy.model([ids], toy.image_processor([picture])).logits
    assert_same_in_float64(answered.clean, likely(answered, logits))


def test_answer_words_and_maps_are_those_of_look(toy, answered, picture):
    """probe and look would tell different words or maps of one answer."""
    seen = look(toy, picture, QUESTION, **SHORT)
    assert answered.text == seen.answer
    assert [text for text, _ in answered.words] == [word.text for word in seen.words]
    for heat, word in zip(answered.attention, seen.words, strict=True):
        np.testing.assert_array_equal(heat, word.heat)


def test_a_word_is_as_likely_as_its_tokens_together(answered):
    """A word would count as its first token alone."""
    words = answered.by_word(np.arange(2.0 * len(answered.ids)).reshape(2, -1))
    for i, (_, tokens) in enumerate(answered.words):
        assert words[0, i] == sum(tokens)


@pytest.mark.parametrize("count", [0, 2])
def test_one_picture_is_needed(toy, picture, count):
    """Without a picture, or with two, it would measure nothing or the wrong one."""
    with pytest.raises(ValueError, match=f"needs one picture with patches, found {count}"):
        Answered(toy, [picture] * count, QUESTION, **SHORT)


# --- what is computed again -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 7, -1])
def test_what_a_change_can_reach_is_computed_as_in_a_whole_pass(toy, answered, start, layer):
    """A change would reach less than it does, or stand at another position or layer."""
    length, language = answered.embeds.shape[1], toy.model.language_model
    start %= length
    keep = Keep()
    with (
        intervene(toy.model, States([layer], [start]), lambda x, at: x * 0.5),
        intervene(toy.model, States([2]), keep),
    ):
        language(answered.embeds)
    expected = language.norm(keep[2])
    states = answered.kept.states[layer][:, start:].clone()
    states[:, 0] *= 0.5
    found = language.norm(answered.kept.again(states.repeat(3, 1, 1), start, layer))
    assert_same_in_float64(found, expected[:, start:].expand(3, -1, -1))
    assert (expected - language.norm(answered.kept.states[-1])).abs().max() > 1e-6


def test_a_window_in_its_row_is_the_window_alone(answered):
    """In one batch, the window of one row would be cut off in another row too."""
    curves = knock_out(answered, 1).curves
    picture = range(answered.picture_start, answered.picture_end)
    for who, queries in blind(answered).items():
        for layer, lost in enumerate(curves[who]):
            with intervene(answered.model, Attention([layer], queries, picture), zero):
                alone = answered.drops(answered.embeds)[0]
            np.testing.assert_allclose(lost, alone, rtol=0, atol=1e-12)
    # the question's states after the last layer are read by nobody
    assert np.abs(curves["answer"]).max(1).min() > 1e-9 < np.abs(curves["question"][0]).max()


@pytest.mark.parametrize(
    ("measure", "flags"),
    [
        ("occlusion", ["--window", 1]),
        ("occlusion", ["--ablate", "zero"]),
        ("knockout", ["--block", 2]),
        ("ablation", ["--hide", "grey"]),
    ],
)
def test_a_flag_of_what_is_not_measured_is_wrong_usage(run_main, measure, flags):
    """It would do nothing, without a word."""
    asked = ("-i", "x.png", "--measure", measure, *flags)
    status, _, errors = run_main(partial(enter, "probe"), *asked)
    assert status == 2
    assert f"{flags[0]} is about " in errors


@pytest.mark.parametrize(("free", "most"), [(None, UNKNOWN_ROWS), (1, 1), (10**12, MOST_ROWS)])
def test_batches_are_as_large_as_memory_allows(answered, monkeypatch, free, most):
    """A laptop would run out of memory, or a batch of another size measure something else."""
    expected = occlude(answered, "mean").drops, ablate(answered).heads
    monkeypatch.setattr(again, "available_memory", lambda device: free)
    assert answered.at_once() == most
    found = occlude(answered, "mean").drops, ablate(answered).heads
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_a_batch_stays_one_while_memory_goes(answered, monkeypatch):
    """A batch was divided again by what memory was left beside it, and the changes of its rows met
    other rows."""
    expected = knock_out(answered, 1).curves["answer"], ablate(answered).heads
    left = cycle([5, 2])
    monkeypatch.setattr(answered.kept, "rows_at_once", lambda *_: next(left))
    found = knock_out(answered, 1).curves["answer"], ablate(answered).heads
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_fewer_rows_fit_where_more_is_computed(answered, monkeypatch):
    """The estimate of a row's memory would leave out what grows with its length."""
    monkeypatch.setattr(again, "available_memory", lambda device: 10**8)
    assert 1 < answered.kept.rows_at_once(20, 5) < MOST_ROWS
    assert answered.kept.rows_at_once(10, 5) > answered.kept.rows_at_once(20, 5)
    assert answered.kept.rows_at_once(20, 1) > answered.kept.rows_at_once(20, 500)


# --- occlusion ------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_patch_hidden_is_a_prompt_with_the_mean_patch(toy, answered, picture):
    """Hiding all patches would leave some of the picture to be seen."""
    found = occlude(answered, "mean", answered.grid).drops
    patches = toy.encode(picture)  # [P, C]
    mean = patches.mean(0).expand_as(patches)[None]
    ids = toy.tokenizer.encode(toy.prompt(QUESTION)) + answered.ids[:-1]
    expected = answered.clean - likely(answered, toy.model([ids], mean).logits)
    assert_same_in_float64(torch.from_numpy(found[:, 0, 0]), expected)
    assert (found == found[:, :1, :1]).all(), "one block has one drop"
    assert np.abs(found).max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("hiding", ["grey", "blur"])
def test_pixels_are_hidden_where_the_patch_is(toy, answered, picture, hiding):
    """The language model reads what the tower makes of the picture with the hole."""
    grid, side = answered.grid, toy.model.config.vision.patch_size
    square = toy.image_processor.square(picture)
    pixels = toy.image_processor.normalise(square)
    rows = hidden_pixels(answered, hiding, [[(1, 2)], [(0, 0), (0, 1)]])
    if hiding == "grey":
        pixels[:, side : 2 * side, 2 * side : 3 * side] = 0
        spliced = toy.model.splice([toy.tokenizer.encode(toy.prompt(QUESTION))], pixels[None])
        assert_same_in_float64(rows[:1, : answered.first + 1], spliced.embeds)
    start, end = answered.patches
    assert end - start == grid**2
    assert torch.equal(rows[:, end:], answered.embeds[:, end:].expand(2, -1, -1))
    assert not torch.equal(rows[0, start:end], rows[1, start:end])


@torch.no_grad()
def test_one_block_is_replaced_in_the_embeddings(answered):
    """A hidden block would lie at the mirrored place, or cover its neighbours."""
    start, _ = answered.patches
    rows = hidden_embeddings(answered, "zero", [[(0, 1), (1, 0)], []])
    changed = (rows[0] != answered.embeds[0]).any(-1).nonzero().flatten().tolist()
    assert changed == [start + 1, start + answered.grid]
    assert torch.equal(rows[1], answered.embeds[0])


def test_blocks_cover_every_patch_once():
    """The last row and column would not be hidden where blocks do not divide the grid."""
    assert blocks(4, 3) == [
        [(r, c) for r in range(3) for c in range(3)],
        [(0, 3), (1, 3), (2, 3)],
        [(3, 0), (3, 1), (3, 2)],
        [(3, 3)],
    ]
    for size in (1, 2, 5):
        assert sorted(p for block in blocks(5, size) for p in block) == [
            (r, c) for r in range(5) for c in range(5)
        ]
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"a block of {size} x {size} patches does not fit"):
            blocks(5, size)


def test_many_rows_are_read_as_one_by_one(answered):
    """They are read a few at a time."""
    lost = answered.drops(answered.embeds.repeat(19, 1, 1))
    assert lost.shape == (19, len(answered.ids))
    assert np.abs(lost).max() < 1e-9


def test_an_unknown_hiding_is_refused(answered):
    """A mistyped way of hiding would be taken for another."""
    with pytest.raises(ValueError, match="unknown hiding 'black', expected one of: mean, zero"):
        occlude(answered, "black")


# --- knock-out and ablation -----------------------------------------------------------------------


def test_nobody_may_look_is_a_mask_of_every_layer(toy, answered):
    """A layer or a position could still see the picture that is knocked out."""
    found = knock_out(answered).everywhere["answer"]
    language, length = toy.model.language_model, answered.embeds.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[answered.first :, answered.picture_start : answered.picture_end] = False
    tables = minillava.llama.rotary_tables(
        torch.arange(length)[None], language.config, torch.float64
    )
    context = minillava.llama.Context(*tables, mask[None, None], False, language.attend, None)
    with torch.no_grad():
        x = answered.embeds
        for layer in language.layers:
            x, _ = layer(x, context)
        expected = answered.clean - likely(answered, language.head(language.norm(x)))
    assert_same_in_float64(torch.from_numpy(found), expected)


def test_a_window_of_all_layers_is_everywhere(toy, answered):
    """A window at the edge would run past the last layer, or a window of 0 measure nothing."""
    layers = toy.model.config.text.num_hidden_layers
    one = knock_out(answered, 1)
    assert one.curves["answer"].shape == (layers, len(answered.ids))
    assert not np.allclose(one.curves["answer"][0], one.curves["answer"][1])
    assert [list(window_around(i, 3, 5)) for i in range(5)] == [
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4],
    ]
    assert [default_window(n) for n in (2, 4, 32, 40)] == [1, 1, 6, 8]
    for window in (0, layers + 1):
        with pytest.raises(ValueError, match=f"window is {window}, expected 1 to {layers} layers"):
            knock_out(answered, window)


def test_an_ablated_head_is_one_that_o_proj_does_not_read(toy, answered):
    """The table would name another head than the one that was ablated."""
    found = ablate(answered, "zero")
    width = toy.model.config.text.head_dim
    for layer, head in ((0, 3), (1, 0)):
        other = copy.deepcopy(toy.model.language_model)
        other.layers[layer].self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
        with torch.no_grad():
            expected = answered.clean - likely(answered, other(answered.embeds).logits)
        assert_same_in_float64(torch.from_numpy(found.heads[layer, head]), expected)
    other = copy.deepcopy(toy.model.language_model)
    other.layers[1].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        expected = answered.clean - likely(answered, other(answered.embeds).logits)
    assert_same_in_float64(torch.from_numpy(found.mlps[1]), expected)


def test_a_mean_head_says_the_same_everywhere(toy, answered):
    """As a bias in the place of what o_proj made of it."""
    layer, head, width = 1, 2, toy.model.config.text.head_dim
    mean = means(answered, Heads([layer]))[layer][0, 0, head]  # [D]
    other = copy.deepcopy(toy.model.language_model)
    proj = other.layers[layer].self_attn.o_proj
    columns = slice(head * width, (head + 1) * width)
    proj.bias = torch.nn.Parameter(proj.weight.data[:, columns] @ mean)
    proj.weight.data[:, columns] = 0
    with torch.no_grad():
        expected = answered.clean - likely(answered, other(answered.embeds).logits)
    assert_same_in_float64(torch.from_numpy(ablate(answered).heads[layer, head]), expected)


def test_measuring_leaves_the_model_as_it_was(toy, picture, answered):
    """After measuring the model would answer otherwise."""
    knock_out(answered)
    ablate(answered)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in toy.model.modules())
    assert Answered(toy, picture, QUESTION, **SHORT).ids == answered.ids


# --- patching -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(demo):
    """A blue circle, and a red one in its place."""
    found = []
    for colour in ("#2050d0", "#e02030"):
        image = Image.new("RGB", (200, 200), "#dfe8e2")
        pen = ImageDraw.Draw(image)
        pen.ellipse((75, 75, 125, 125), fill=colour)
        pen.rectangle((150, 150, 190, 190), fill="#20a040")
        found.append(Answered(demo, image, "What colour is the circle?"))
    return found


def test_the_fact_moves_from_its_patches_to_the_last_position(pair):
    """On the model that can see: B's patches turn the answer as they come in, the last position
    once it has read them, and then the patches no more."""
    found = patch(*pair)
    assert (pair[0].text, pair[1].text) == ("The circle is blue.", "The circle is red.")
    assert (found.words, found.before) == (("\u2581blue", "\u2581red"), "The circle is")
    names = list(found.sets)
    patches, last = names.index("object's patches"), names.index("last position")
    assert found.apart[0] < 0 < found.apart[1]
    assert found.moved[0, patches] > 0.5 > found.moved[0, last]
    assert found.moved[-1].tolist() == pytest.approx([0] * (len(names) - 1) + [1], abs=1e-6)
    a, end = pair[0], found.sets["last position"][0]
    assert set(found.sets["object's patches"]) < set(found.sets["with neighbours"])
    together = sorted(i for name in names[1:] for i in found.sets[name])
    assert together == list(range(a.patches[0], end + 1))


@torch.no_grad()
@pytest.mark.parametrize("state", [0, 2, 4])
def test_everything_patched_is_the_other_run(pair, monkeypatch, state):
    """From there on: the whole way from A's answer to B's, whatever the state."""
    monkeypatch.setattr(patching, "position_sets", lambda a, b, end: {"all": list(range(end))})
    assert patch(*pair).moved[state].tolist() == [1]


def test_the_patches_that_differ_are_found(pair):
    """Patching would replace patches that are the same in both pictures."""
    grid = pair[0].grid
    differ = {divmod(i, grid) for i in differing(*pair)}
    assert differ == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert differing(pair[0], pair[0]) == []
    around = {divmod(i, grid) for i in with_neighbours(differing(*pair), grid)}
    assert around == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert with_neighbours([0, 15], 4) == [0, 1, 4, 5, 10, 11, 14, 15], (
        "no neighbour in another row"
    )


def test_nothing_to_patch_is_said(pair, demo):
    """Two equal answers would be compared, although no word differs between them."""
    with pytest.raises(ValueError, match=r"both pictures lead to .The circle is blue\.."):
        patch(pair[0], pair[0])
    other = Answered(demo, pair[0].picture, "What size is the circle?")
    with pytest.raises(ValueError, match="two answers to one question"):
        patch(pair[0], other)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, reference):
    base = ["-q", "-m", reference / "plain", "--device", "cpu", "--dtype", "float32", "-n", "6"]
    base += ["-p", QUESTION]

    def in_process(*arguments, picture=reference / "pictures" / "landscape.png"):
        capsys.readouterr()
        return (
            status_of(partial(enter, "probe"), [*base, "-i", picture, *arguments]),
            *capsys.readouterr(),
        )

    return in_process


def test_everything_is_written_and_agrees(run, tmp_path):
    """One of the files would be left out, or disagree with the printed tables."""
    names = {"out": "a.png", "html": "a.html", "json": "a.json", "npy": "a.npy"}
    files = {flag: tmp_path / name for flag, name in names.items()}
    status, out, err = run(*(part for flag, path in files.items() for part in (f"--{flag}", path)))
    assert (status, err) == (0, "")
    raw = json.loads(files["json"].read_text(encoding="utf-8"))
    assert out.startswith(raw["answer"] + "\n")
    for title in ("occlusion, mean, 3 x 3", "knock-out, 1 layer(s)", "ablation, mean"):
        assert title in out
    maps = np.load(files["npy"])
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps, np.array(raw["occlusion"]["maps"], np.float32))
    assert maps.shape == (len(raw["words"]), *np.array(raw["words"][0]["attention"]).shape)
    layers, heads = np.array(raw["ablation"]["heads"]).shape[1:]
    assert np.array(raw["ablation"]["mlps"]).shape == (len(raw["words"]), layers)
    assert np.array(raw["knock_out"]["curves"]["answer"]).shape == (len(raw["words"]), layers)
    assert (layers, heads) == (2, 4)
    Image.open(files["out"]).verify()
    page = files["html"].read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=\"(?!data:)|@import|\burl\(|<script", page)
    assert page.count("<img") == 3 * len(raw["words"])
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_numbers_alone(run):
    """--json would print the tables too, or measures that nobody asked for."""
    status, out, _ = run("--json", "--measure", "knockout", "--window", "2")
    raw = json.loads(out)
    assert status == 0
    assert set(raw) == {"question", "answer", "picture", "words", "knock_out"}
    assert raw["knock_out"]["window"] == 2


def test_one_word_of_the_answer(run):
    """--word would be accepted and all words be measured."""
    words = [
        word["text"] for word in json.loads(run("--json", "--measure", "knockout")[1])["words"]
    ]
    status, out, _ = run("--json", "--measure", "occlusion", "--word", words[-1], "--block", "2")
    raw = json.loads(out)
    assert status == 0
    assert {word["text"] for word in raw["words"]} == {words[-1]}
    assert len(raw["occlusion"]["maps"]) == len(raw["words"])


def test_a_plan_measures_nothing(run, monkeypatch):
    """--plan would spend the minutes that it is meant to estimate."""
    monkeypatch.setattr(probing, "measure", None)
    status, out, _ = run("--plan", "--block", "2")
    assert status == 0
    assert re.search(r"^one row is \d+ positions in 2 layers, .* s here", out)
    assert re.search(r"^occlusion: 4 rows, \d+% of them computed, about", out, re.MULTILINE)
    assert re.search(r"^--block 3: 4 rows", out, re.MULTILINE)
    assert re.search(r"^knockout: 6 rows", out, re.MULTILINE)
    assert re.search(r"^ablation: 12 rows", out, re.MULTILINE)


@pytest.mark.parametrize("hiding", ["mean", "grey"])
def test_the_plan_is_what_is_done(pair, hiding):
    """--plan and the progress would count other work than what is done, and be minutes off."""
    args = argparse.Namespace(
        measure=["occlusion", "knockout", "ablation"],
        hide=hiding, block=3, window=2, ablate="mean",
    )  # fmt: skip
    for task in probing.all_tasks(args, *pair):
        computed = []
        pair[0].kept.done = computed.append
        task.measure()
        assert sum(computed) == task.work, task.name
        assert task.work < task.rows * pair[0].whole()
    del pair[0].kept.done


def test_progress_and_what_takes_long_are_told(pair, capsys, monkeypatch):
    """Hours would pass without a word."""
    said = []
    monkeypatch.setattr(probing, "LONG", 0)
    monkeypatch.setattr(Messages, "progress", lambda self, text: said.append(text))
    found = Findings(pair[0], [3])
    args = argparse.Namespace(measure=["occlusion"], hide="mean", block=3)
    probing.measure(found, probing.all_tasks(args, pair[0], None), Messages(False, False))
    assert found.occlusion.drops.shape == (len(pair[0].ids), 9, 9)
    assert said[0] == "occlusion ..." and said[-2:] == ["occlusion: 100%, about 0 s left", ""]
    assert len(said) == 2 + 3, "a batch for each of three heights"
    assert re.match(
        "note: this takes about .* here; --plan tells the parts", capsys.readouterr().err
    )
    del pair[0].kept.done


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--word", "nosuchword"], 1, "the answer has no word 'nosuchword'; its words: "),
        (["--block", "99"], 1, "a block of 99 x 99 patches does not fit 4 x 4"),
        (["--window", "3"], 1, "window is 3, expected 1 to 2 layers"),
        (["--other", "nosuch.png"], 1, "nosuch.png"),
        (["--block", "0"], 2, "--block is 0, expected at least 1"),
        (["--window", "-1"], 2, "--window is -1, expected at least 1"),
        (["--hide", "black"], 2, "--hide"),
        (["--plan", "--html", "a.html"], 2, "--plan measures nothing"),
        (["--npy", "a.npy", "--measure", "knockout"], 2, "--npy is about occlusion"),
        (["--out", "a.txt"], 2, "the name must end in .png"),
        (["-i", "b.png"], 2, "--image is given 2 times: probe needs one picture"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(run, arguments, status, said):
    """A setting that cannot be would be a traceback, or be noticed after minutes."""
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_two_pictures_that_are_alike_are_refused(run, reference):
    """The same picture twice would be measured, although there is nothing to find."""
    status, _, err = run("--other", reference / "pictures" / "landscape.png")
    assert (status, err.count("\n")) == (1, 1)
    assert "both pictures lead to" in err


def test_tables_and_page_show_the_patching(pair):
    """The page would leave the patching out, or not escape its words."""
    found = Findings(pair[0], [3], patching=patch(*pair))
    text = as_text(found)
    assert "'The circle is' goes on from \u2581blue (0) to \u2581red (1)" in text
    assert text.splitlines()[-2].split()[-1] == "1.00"
    assert "object&#x27;s patches" in page(found)
    assert as_json(found)["patching"]["words"] == ("\u2581blue", "\u2581red")


def test_the_circle_is_what_blue_was_said_of(pair):
    """Hiding its nine patches costs the word, and nothing else does; red is what speaks for it."""
    found = Findings(pair[0], [3], occlusion=occlude(pair[0], "mean", 3))
    (drop,) = found.maps()
    assert drop[3:6, 3:6].min() > 2
    drop[3:6, 3:6] = 0
    assert np.abs(drop).max() < 0.1


def test_a_signed_map_goes_as_far_below_zero_as_above():
    """Zero is the middle colour, and each patch is as it was measured, up to its edge."""
    heat = np.zeros((4, 4))
    heat[0, 0], heat[2, 2] = 3, -1
    picture = Image.new("RGB", (400, 400), "white")
    drawn = np.asarray(look_draw.heat_map(picture, (0, 0, 400, 400), heat, (400, 400), ends=3))
    least, _, middle, _, most = (np.array(colour) for colour in look_draw.SIGNED)
    assert np.abs(drawn[390, 390].astype(int) - middle).max() <= 1
    assert np.abs(drawn[[2, 97], [2, 97]].astype(int) - most).max() <= 1
    red, _, blue = drawn[250, 250].astype(int)
    assert blue > red + 20
    assert (drawn[202:298, 202:298] == drawn[250, 250]).all()
    other = look_draw.heat_map(picture, (0, 0, 400, 400), -heat, (400, 400), ends=3)
    assert np.abs(np.asarray(other)[50, 50].astype(int) - least).max() <= 1


def test_words_share_the_scale_of_what_is_hidden(pair):
    """On a scale of its own, the rounding of a word that nothing changes was as red as a finding."""
    found = Findings(pair[0], [0, 3], occlusion=occlude(pair[0], "mean", 3))
    dull, strong = found.maps()
    assert np.abs(dull).max() < 0.01 < scale_end(found) == np.abs(strong).max()
    assert f"-{number(scale_end(found))} nats: likelier" in page(found)
    assert sheet(found).width == look_draw.WIDTH


def test_the_picture_shows_all_that_was_measured(pair, monkeypatch):
    """--out had the maps of occlusion alone."""
    a, b = pair
    laid = []
    real = sheets.lay_out
    monkeypatch.setattr(
        sheets, "lay_out", lambda *given: (laid.append([p.text for p in given[2]]), real(*given))[1]
    )
    every = Findings(a, [2, 3], occlude(a, "mean", 3), knock_out(a), ablate(a), patch(a, b))
    assert sheet(every).width == look_draw.WIDTH
    of_each = "attention", "hidden", "cut off", "heads"
    expected = ["the picture", *(f"blue. ({part})" for part in of_each), "from blue to red"]
    assert laid[0][5:] == expected
    sheet(Findings(a, [3], knock_out=every.knock_out))
    assert laid[1] == ["the picture", "blue. (attention)", "blue. (cut off)"]


def test_a_matrix_has_its_numbers_where_they_belong():
    """Rows and columns of a table of heads would be swapped or mirrored."""
    values = np.zeros((4, 7))
    values[1, 5], values[3, 0] = 2, -2
    drawn = np.asarray(matrix(values, (330, 218), 2, [*"012345", "MLP"]))
    inside = drawn[: 218 - BELOW, LEFT:]
    high, wide = inside.shape[0] / 4, inside.shape[1] / 7
    middles = inside[[int((i + 0.5) * high) for i in range(4)]][
        :, [int((i + 0.5) * wide) for i in range(7)]
    ]
    least, _, middle, _, most = look_draw.SIGNED
    expected = np.tile(np.array(middle), (4, 7, 1))
    expected[1, 5], expected[3, 0] = most, least
    assert (middles == expected).all()


def test_a_curve_rises_where_a_word_loses():
    """A curve would be upside down, or run from the last layer to the first."""
    lines = {"answer": np.array([0.0, 0.0, 3.0, 0.0]), "question": np.zeros(4)}
    drawn = np.asarray(curves(lines, (330, 218))).astype(int)
    orange = (np.abs(drawn - LINES["answer"]).sum(-1) < 30).nonzero()
    top = orange[0].argmin()
    assert orange[0][top] < 20
    third = LEFT + (330 - LEFT) * 2 / 3
    assert abs(orange[1][top] - third) < 10


def test_numbers_have_no_minus_before_nothing():
    """A rounded zero would be shown as -0.00, as if it were a loss."""
    assert [number(x) for x in (-0.001, 0.0, -0.0, -0.006, 8.875)] == [
        "0.00",
        "0.00",
        "0.00",
        "-0.01",
        "8.88",
    ]


def test_a_compiled_model_is_measured_by_its_layers(toy, picture, answered):
    """Its compiled step calls no hooks; the passes that are measured are not that step."""
    compiled = copy.copy(toy.model)
    compiled.decoding = Captured(lambda *_: pytest.fail("the compiled step ran"))
    other = copy.copy(toy)
    other.model = compiled
    found = Answered(other, picture, QUESTION, **SHORT)
    assert found.ids == answered.ids
    np.testing.assert_array_equal(
        knock_out(found).everywhere["answer"], knock_out(answered).everywhere["answer"]
    )


def test_files_are_written_though_nobody_reads_the_tables(run, tmp_path, monkeypatch):
    """`probe --html a.html | head -1` measured for minutes, and wrote nothing."""

    def gone(found):
        raise BrokenPipeError

    monkeypatch.setattr(probing, "as_text", gone)
    assert run("--measure", "knockout", "--html", tmp_path / "a.html")[0] == 0
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
