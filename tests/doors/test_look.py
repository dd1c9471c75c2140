"""What each word looked at: whose row it is, that looking changes nothing, where it lies on the
picture, the files."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import zip_longest

import numpy as np
import point_shapes
import pytest
import shapes
import torch
from bounds import assert_same_in_float64, gamma
from models import stored
from paths import ROOT
from PIL import Image
from waiting import PATIENCE

import minillava
from minillava.cli.doors import enter
from minillava.cli.messages import significant
from minillava.config import VisionConfig
from minillava.image import ImageProcessor
from minillava.look import draw as look_draw
from minillava.look import page as look_html
from minillava.look import run as look
from minillava.loop import Options, steps

LOOK = partial(enter, "look")

WEIGHTS = ROOT / "weights" / "shapes"
QUESTION = "What is it?"
SHORT = Options(max_new_tokens=7)


@pytest.fixture(scope="module", params=["eager", "fused"])
def toy(request, reference):
    """Two query heads share a key/value head."""
    return stored("grouped", dtype="float64", attention=request.param)


@pytest.fixture(scope="module")
def plain(reference):
    return stored()


@pytest.fixture(scope="module")
def picture(reference):
    return Image.open(reference / "pictures" / "landscape.png").convert("RGB")


def prepare(assistant, picture, question=QUESTION):
    return assistant.prepare(picture, assistant.prompt(question))


# --- the row that chose a token -------------------------------------------------------------------


@pytest.mark.numeric
@torch.no_grad()
def test_a_tokens_row_is_that_of_the_position_before_it(toy, picture):
    """Against one uncached pass over prompt and answer, which has the rows of all positions."""
    spliced = prepare(toy, picture)
    watched = list(look.watch(toy.model, spliced, SHORT, toy.tokenizer))
    ids = torch.stack([step.token_ids for step, _ in watched], dim=1)  # [1, n]
    language = toy.model.language_model
    all_at_once = language(
        torch.cat([spliced.embeds, language.embed_tokens(ids)], dim=1), attentions=True
    ).attentions
    (start, end), length = spliced.image_spans[0][0], spliced.embeds.shape[1]
    for i, (_, rows) in enumerate(watched):
        # [L, H, P]
        expected = torch.stack([layer[0, :, length - 1 + i, start:end] for layer in all_at_once])
        assert_same_in_float64(rows.double(), expected.double())
        other = torch.stack([layer[0, :, length + i, start:end] for layer in all_at_once])
        assert (rows - other).abs().max() > 1e-3, "the rows are too alike to tell them apart"


def test_the_rows_are_those_that_the_loop_records(toy, picture):
    """The maps would show other attention than the model's own."""
    spliced = prepare(toy, picture)
    start, end = spliced.image_spans[0][0]
    recorded = steps(toy.model, spliced, SHORT, tokenizer=toy.tokenizer, record=("attentions",))
    watched = look.watch(toy.model, spliced, SHORT, toy.tokenizer)
    for step, (_, rows) in zip(recorded, watched, strict=True):
        expected = torch.stack([layer[0, :, -1, start:end] for layer in step.attentions])
        assert_same_in_float64(rows.double(), expected.double())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_looking_leaves_the_logits_bit_identical(reference, picture, attention, dtype):
    """Looking at an answer would change it, or leave the model changed between two steps."""
    toy = stored("grouped", dtype=dtype, attention=attention)
    spliced = prepare(toy, picture)
    alone = [step.logits for step in steps(toy.model, spliced, SHORT)]
    attend = toy.model.language_model.attend
    watched = []
    for step, rows in look.watch(
        toy.model, spliced, SHORT, toy.tokenizer, record=("hidden_states",)
    ):
        watched.append(step.logits)
        assert toy.model.language_model.attend is attend  # between two steps the model is as it was
        assert rows.dtype == torch.float32
    assert len(alone) == len(watched) == SHORT.max_new_tokens
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


@pytest.mark.numeric
@torch.no_grad()
def test_padding_changes_no_row(toy, picture):
    """The padding of a batch would shift the maps or take a share of the attention."""
    ids, pixels = toy.tokenizer.encode(toy.prompt(QUESTION)), toy.image_processor([picture])
    alone = toy.model.splice([ids], pixels)
    padded = toy.model.splice([[0, 0, 0, *ids]], pixels, [[0] * 3 + [1] * len(ids)])
    both = (look.watch(toy.model, spliced, SHORT, toy.tokenizer) for spliced in (alone, padded))
    for (_, expected), (_, rows) in zip(*both, strict=True):
        assert_same_in_float64(rows.double(), expected.double())


def test_two_can_be_watched_in_turn(toy, picture):
    """Two generators that take turns would record each other's rows."""
    prompts = [
        prepare(toy, picture, question) for question in (QUESTION, "And what colour does it have?")
    ]
    alone = [[rows for _, rows in look.watch(toy.model, p, SHORT, toy.tokenizer)] for p in prompts]
    both = zip_longest(*(look.watch(toy.model, p, SHORT, toy.tokenizer) for p in prompts))
    for i, pair in enumerate(both):
        assert all(
            torch.equal(found[1], expected[i]) for found, expected in zip(pair, alone, strict=True)
        )


def test_an_error_leaves_the_model_as_it_was(toy, picture):
    """After an error the model would go on recording."""
    attend = toy.model.language_model.attend
    spliced = prepare(toy, picture)
    spliced.embeds = spliced.embeds * float("nan")
    with pytest.raises(ValueError, match="not finite"):
        next(look.watch(toy.model, spliced, SHORT, toy.tokenizer))
    assert toy.model.language_model.attend is attend


def test_a_kept_class_token_is_no_patch(reference, tmp_path, picture):
    """The class token would be drawn as the first patch, and shift all the others by one."""
    folder = shutil.copytree(reference / "plain", tmp_path / "full")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"vision_feature_select_strategy": "full"})
    )
    toy = minillava.load(folder, device="cpu", dtype="float32")
    spliced = prepare(toy, picture)
    (start, end), patches = spliced.image_spans[0][0], toy.model.config.vision.num_patches
    assert end - start == patches + 1
    assert look.patch_span(toy.model, spliced) == (start + 1, end)
    found = look.look(toy, picture, QUESTION, max_new_tokens=4, lens=True)
    assert {word.heat.size for word in found.words} == {len(found.lens.patches[0])} == {patches}


@pytest.mark.parametrize("pictures", [0, 2])
def test_one_picture_is_looked_at(plain, picture, pictures):
    """With two pictures the map of one would be drawn over the other."""
    spliced = plain.prepare([picture] * pictures, plain.prompt(QUESTION, images=pictures))
    with pytest.raises(
        ValueError, match=rf"1 row\(s\) with {pictures} picture\(s\), expected one with one"
    ):
        next(look.watch(plain.model, spliced, SHORT, plain.tokenizer))


# --- words, layers and heads ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (
            ["I", " see", " a", " tri", "angle", "."],
            [("I", [0]), ("see", [1]), ("a", [2]), ("triangle.", [3, 4])],
        ),
        ([" left", ",", " don", "'", "t"], [("left,", [0]), ("don't", [2, 4])]),
        (["a", " ", "...", "\n", "b"], [("a", [0]), ("...", [2]), ("b", [4])]),
        (["", "", "星", "", "", "円", "。"], [("星", [0, 1, 2]), ("円", [3, 4, 5]), ("。", [6])]),
        (["Gr", "", "ö", "ße", ""], [("Größe", [0, 1, 2, 3])]),
        (["", ""], []),
        ([], []),
    ],
)
def test_tokens_are_joined_to_words(pieces, words):
    """A word of several tokens would get several maps, or a full stop one of its own."""
    assert look.join_words(pieces) == words


def test_a_word_is_the_mean_over_its_tokens_layers_and_heads(plain, picture):
    """A word's map would be that of its first token, or of layers that were not chosen."""
    spliced, options = (
        prepare(plain, picture),
        {"max_new_tokens": 30, "temperature": 2.0, "seed": 1},
    )
    watched = list(look.watch(plain.model, spliced, plain.options(**options), plain.tokenizer))
    found = look.look(plain, picture, QUESTION, layers=[1], heads=[0, 2], **options)
    assert found.answer == plain.ask(picture, QUESTION, **options)
    assert " ".join(word.text for word in found.words) == " ".join(found.answer.split())
    joined = max(found.words, key=lambda word: len(word.token_ids))
    assert len(joined.token_ids) > 1
    ids = [int(step.token_ids[0]) for step, _ in watched]
    for word in found.words:
        rows = [
            rows[1][[0, 2]].mean(0)
            for (_, rows), i in zip(watched, ids, strict=True)
            if i in word.token_ids
        ]
        if len(rows) == len(word.token_ids):  # none of its tokens is used twice
            # means of two heads, and of the word's tokens, in any order
            off = 2 * gamma(2 * len(rows) + 2, torch.float32)
            expected = torch.stack(rows).mean(0).numpy()
            np.testing.assert_allclose(word.heat.flatten(), expected, rtol=off)
        assert 0 < word.heat.sum() < 1


def test_what_a_stop_text_cuts_off_is_no_word(plain, picture):
    """The page would have maps for words that the answer does not hold."""
    whole = look.look(plain, picture, QUESTION, max_new_tokens=12)
    stop = whole.words[-1].text[-1]
    cut = look.look(plain, picture, QUESTION, max_new_tokens=12, stop=[stop])
    assert stop not in cut.answer
    assert "".join(word.text for word in cut.words).startswith("".join(cut.answer.split()))
    assert len("".join(word.text for word in cut.words)) < len(
        "".join(word.text for word in whole.words)
    )


def test_words_hold_no_more_than_the_answer(plain, picture):
    """A stop text inside a word would leave the whole word on the page."""
    whole = look.look(plain, picture, QUESTION, max_new_tokens=12).answer
    for start in range(len(whole)):
        for stop in (whole[start : start + 2], whole[start : start + 5]):
            cut = look.look(plain, picture, QUESTION, max_new_tokens=12, stop=[stop])
            assert [word.text for word in cut.words] == cut.answer.split()
        if start == 0:
            assert cut.words == []


def test_the_default_is_the_upper_half():
    """A model of one layer would have no layer to look at."""
    assert [look.default_layers(n) for n in (1, 2, 4, 5)] == [[0], [1], [2, 3], [2, 3, 4]]
    assert look.default_layers(32) == list(range(16, 32))


def test_layers_and_heads_must_exist(plain, picture):
    """A layer or head that the model lacks would be left out of the mean without a word."""
    with pytest.raises(ValueError, match="no layer 2: this model has layers 0 to 1"):
        look.look(plain, picture, QUESTION, layers=[0, 2])
    with pytest.raises(ValueError, match="no head 9: this model has heads 0 to 3"):
        look.look(plain, picture, QUESTION, heads=[9])


# --- logit lens -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_last_layer_of_the_lens_is_the_models_own_answer(toy, picture):
    """The lens would leave out the last norm, or take it twice, and show words nobody chose."""
    found = look.look(toy, picture, QUESTION, max_new_tokens=6, lens=True).lens
    assert [text for text, _ in found.tokens[-1]] == found.chosen
    spliced = prepare(toy, picture)
    start, end = spliced.image_spans[0][0]
    logits = toy.model.language_model(spliced.embeds).logits[0, start:end]
    expected = [toy.tokenizer.piece(i) for i in logits.argmax(-1).tolist()]
    assert [text for text, _ in found.patches[-1]] == expected
    layers = toy.model.config.text.num_hidden_layers
    assert len(found.patches) == len(found.tokens) == layers + 1
    # layer 0: the patches themselves
    first = toy.model.language_model.norm(spliced.embeds[0, start:end])
    first = toy.model.language_model.head(first).softmax(-1).max(-1)
    assert [p for _, p in found.patches[0]] == [significant(p) for p in first.values.tolist()]


# --- back to the picture --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(300, 300), (301, 200), (200, 333), (97, 640), (640, 351), (40, 31)]
)
@pytest.mark.parametrize(("aspect", "side"), [("pad", 96), ("crop", 96), ("squash", 110)])
def test_a_patch_lies_on_the_picture_where_the_model_saw_it(size, aspect, side):
    """What is painted over a patch's place in the picture is what that patch becomes in the
    processor's square, also where patches do not fill it."""
    processor, grid, vision = (
        ImageProcessor(side, aspect),
        6,
        VisionConfig(image_size=side, patch_size=16),
    )
    left, top, right, bottom = look.patch_box(size, processor, vision)
    for row, column in ((0, 0), (2, 3), (3, 2), (5, 5)):
        wide, high = (right - left) / grid, (bottom - top) / grid
        place = [
            left + column * wide,
            top + row * high,
            left + (column + 1) * wide,
            top + (row + 1) * high,
        ]
        inside = max(0, place[0]), max(0, place[1]), min(size[0], place[2]), min(size[1], place[3])
        if inside[2] - inside[0] < wide / 2 or inside[3] - inside[1] < high / 2:
            continue  # in the padding
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), [round(x) for x in inside])
        light = np.asarray(processor.square(image).convert("L"), dtype=float)
        if aspect == "pad":
            light -= np.asarray(processor.square(Image.new("RGB", size)).convert("L"))
        patches = light[:96, :96].reshape(grid, 16, grid, 16).mean((1, 3))
        assert np.unravel_index(patches.argmax(), patches.shape) == (row, column)
        assert patches.max() > 0.4 * patches.sum()


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_the_drawn_map_is_hot_where_the_patch_lies(aspect):
    """The map would lie beside what the model saw wherever a picture is not square."""
    size, processor = (300, 180), ImageProcessor(96, aspect)
    box = left, top, right, bottom = look.seen_box(size, processor)
    heat = np.zeros((6, 6), np.float32)
    heat[2, 4] = 0.3
    drawn = np.asarray(
        look_draw.heat_map(Image.new("RGB", size, (255, 255, 255)), box, heat, (600, 360)),
        dtype=int,
    )
    hot = np.abs(drawn - look_draw.SCALE[-1]).sum(-1) < 40
    rows, columns = np.nonzero(hot)
    assert rows.mean() == pytest.approx(2 * (top + (bottom - top) * 2.5 / 6), abs=2)
    assert columns.mean() == pytest.approx(2 * (left + (right - left) * 4.5 / 6), abs=2)
    framed = (drawn == look_draw.INK).all(-1)
    rows, columns = np.nonzero(framed)
    edges = 4 / 6, 2 / 6, 5 / 6, 3 / 6
    expected = [2 * (low + (high - low) * edge)
                for (low, high), edge in zip([(left, right), (top, bottom)] * 2, edges, strict=True)]  # fmt: skip
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == pytest.approx(expected, abs=1)
    hatched = drawn[:, :10].std() > 30  # what was cropped off, at the left edge
    assert hatched == (aspect == "crop")


def test_each_map_stands_above_its_word(monkeypatch):
    """A word would stand under another word's map."""
    texts, write = {}, look_draw.ImageDraw.ImageDraw.text

    def note(pen, place, text, *args, **options):
        texts[text] = place
        write(pen, place, text, *args, **options)

    monkeypatch.setattr(look_draw.ImageDraw.ImageDraw, "text", note)
    heats = np.zeros((3, 2, 2), np.float32)
    # hot at the left, the right, below
    heats[0, 0, 0], heats[1, 0, 1], heats[2, 1, 0] = 0.25, 0.5, 0.125
    heats += 0.01
    picture = Image.new("RGB", (200, 200), "white")
    words = list(zip(("left", "right", "below"), heats, strict=True))
    sheet = look_draw.draw_words(picture, (0, 0, 200, 200), words, "why", "note")
    pixels = np.asarray(sheet, dtype=int)
    for word, row, column in (("left", 0, 0), ("right", 0, 1), ("below", 1, 0)):
        middle, bottom = map(int, texts[word])
        side = (look_draw.WIDTH - 2 * look_draw.MARGIN - 3 * look_draw.GAP) // 4
        panel = pixels[
            bottom - 4 - side : bottom - 4, middle - side // 2 : middle - side // 2 + side
        ]
        dark = 765 - panel.sum(-1)
        halves = (
            dark[: side // 2 * 2, : side // 2 * 2].reshape(2, side // 2, 2, side // 2).sum((1, 3))
        )
        assert np.unravel_index(halves.argmax(), (2, 2)) == (row, column)
    order = ("the picture", "left", "right", "below")
    assert sorted(order, key=lambda word: texts[word][0]) == list(order)
    assert {"26.0% of 29.0%", "51.0% of 54.0%", "13.5% of 16.5%"} <= set(texts)


def test_the_grid_shows_each_patch_at_its_row_and_column():
    """The grid would count columns as rows, or number its lines beside the patches."""
    square = Image.new("RGB", (40, 40), "white")
    square.paste((255, 0, 0), (30, 0, 40, 10))  # row 0, column 3
    sheet = np.asarray(look_draw.draw_grid(square, 4), dtype=int)
    red = (sheet == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (rows.mean(), columns.mean()) == pytest.approx((34 + 125, 34 + 875), abs=2)
    assert red.sum() == pytest.approx(250**2, rel=0.05)
    for i in range(5):
        line = 34 + 250 * i
        assert (sheet[34 + 125, line] == look_draw.INK).all()
        assert (sheet[line, 34 + 125] == look_draw.INK).all()


def test_a_long_answer_becomes_more_rows_and_no_text_is_too_wide(picture):
    """The words of a long answer would run off the sheet."""
    heat = np.random.default_rng(0).random((4, 4), np.float32) / 16
    sheets = [
        look_draw.draw_words(
            picture, (0, 0, *picture.size), [("w" * 60, heat)] * count, "why " * 100, "note " * 60
        )
        for count in (0, 1, 30, 120)
    ]
    assert {sheet.width for sheet in sheets} == {look_draw.WIDTH}
    heights = [sheet.height for sheet in sheets]
    assert heights == sorted(heights)
    assert heights[-1] > 1500
    for sheet in sheets:
        edge = np.asarray(sheet)[:, -8:]
        assert (edge == 255).all()


def test_what_to_know_about_the_maps_is_said(tmp_path, run):
    """A map whose hottest patch is padding would seem to point at the picture's edge."""

    def heat(row, column):
        heat = np.zeros((4, 4), np.float32)
        heat[row, column] = 1
        return heat

    words = [("up", heat(0, 1)), ("in", heat(1, 1)), ("down", heat(3, 3)), ("up", heat(0, 3))]
    wide = look_draw.remarks(words, (0, -50, 200, 150), (200, 100))
    assert "scale of its own" in wide
    assert "of the whole padded picture" in wide
    assert "lies in the padding, beside what is shown, for: up, down." in wide
    high = look_draw.remarks(
        [("left", heat(1, 0)), ("in", heat(0, 2))], (-50, 0, 150, 200), (100, 200)
    )
    assert high.endswith("for: left.")
    square = look_draw.remarks(words, (0, 0, 200, 200), (200, 200))
    assert "scale of its own" in square
    assert "padd" not in square
    run("--html", tmp_path / "a.html")
    assert (
        "scale of its own" in page_data((tmp_path / "a.html").read_text(encoding="utf-8"))["note"]
    )


def test_the_sheet_says_what_to_know_about_the_maps(tmp_path, run, monkeypatch):
    """The sheet would leave out the remarks that the page makes."""
    notes, draw = [], look_draw.draw_words
    monkeypatch.setattr(
        look_draw, "draw_words", lambda *given: notes.append(given[-1]) or draw(*given)
    )
    assert run("--out", tmp_path / "a.png")[0] == 0
    assert "scale of its own" in notes[0]
    assert "of the whole padded picture" in notes[0]


def test_numbers_are_listed_shortly():
    """The layers of a large model would fill the title."""
    assert look_draw.listed([0, 2, 3, 4, 9]) == "0, 2-4, 9"


# --- the pages ------------------------------------------------------------------------------------


def page_data(page: str) -> dict:
    return json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])


def test_the_page_holds_the_numbers_and_loads_nothing(plain, picture):
    """An answer with a script in it would run, or the page would load something from the net."""
    found = look.look(plain, picture, "</script><b>DATA TITLE", max_new_tokens=8, lens=True)
    found.answer = found.words[0].text = "</script><img src=x onerror=alert(1)>"
    page = look_html.look_page(picture, look.as_json(found, found.words))
    lens = look_html.lens_page(picture, vars(found.lens), found.question, found.answer)
    data = page_data(page)
    assert data["question"] == page_data(lens)["question"] == found.question
    assert data["words"][0]["text"] == found.answer
    np.testing.assert_array_equal([w["map"] for w in data["words"]], [w.heat for w in found.words])
    assert page_data(lens)["tokens"] == [
        [list(pair) for pair in layer] for layer in found.lens.tokens
    ]
    for text in (page, lens):
        assert text.count("</script>") == 1
        assert not re.search(r"https?://|src=\"(?!data:)|@import|\burl\(", text)
        assert not re.search(
            r"\b(TITLE|THEME|COLOURS|STYLE|BODY|SCRIPT|SIZE|CONTRAST)\b",
            text.replace("DATA TITLE", ""),
        )


DOCUMENT = """
const elements = {};
let focus = null;
const element = () => { const e = {style: {}, children: [], on: {}, append() {}};
  e.classList = {add() {}, toggle() {}};
  e.addEventListener = (kind, act) => { const old = e.on[kind]; e.on[kind] = old ? x => { old(x); act(x); } : act; };
  e.appendChild = child => { e.children.push(child); return child; };
  e.replaceChildren = () => { e.children = []; };
  e.focus = () => { focus = e; e.on.focus?.(); };
  return e; };
globalThis.document = {getElementById: id => elements[id] ??= element(), createElement: element};
"""


def in_page(page: str, script: str):
    """What `script` prints as JSON behind the page's own, on a document of its own."""
    own = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    given = f"{DOCUMENT}\n{own}\n{script}"
    ran = subprocess.run(
        ["node", "-"],
        input=given,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def made_page(words: dict[str, np.ndarray], size=(100, 100), box=(0, 0, 100, 100)) -> str:
    words = [look.Word(text, [1], heat) for text, heat in words.items()]
    found = look.Look(
        Image.new("RGB", size), box, "why", " ".join(w.text for w in words), [0], [0], words, None
    )
    return look_html.look_page(found.picture, look.as_json(found, words))


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")


@needs_node
@pytest.mark.parametrize(
    ("size", "box", "place"),
    [
        ((200, 100), (0, -50, 200, 150), [0, -50, 100, 200]),
        ((100, 200), (-50, 0, 150, 200), [-50, 0, 200, 100]),
    ],
)
def test_the_page_paints_a_patch_where_it_lies(size, box, place):
    """The page would paint the patches of a padded picture beside their place."""
    heat = np.zeros((4, 4))
    heat[2, 0], heat[1, 3] = 0.5, 0.25  # patches 8 and 7
    script = """
const painted = cells.map(e => e.style.backgroundColor);
cells[8].on.click();
const {left: l, top: t, width, height} = elements.patches.style;
console.log(JSON.stringify({place: [l, t, width, height], painted, said: elements.said.textContent}));
"""
    said = in_page(made_page({"so": heat}, size, box), script)
    assert [float(x.removesuffix("%")) for x in said["place"]] == place
    colours = ["rgb({},{},{})".format(*look_draw.SCALE[i]) for i in (-1, 2, 0)]
    assert [said["painted"].index(colour) for colour in colours] == [8, 7, 0]
    assert said["said"].startswith("Patch in row 2, column 0,")


@needs_node
def test_the_page_opens_on_the_word_that_used_the_picture_most():
    """It opened on the first, whose map says little: an answer begins with "I"."""
    page = made_page(
        {"I": np.full((2, 2), 0.01), "see": np.full((2, 2), 0.2), "it": np.full((2, 2), 0.1)}
    )
    assert in_page(page, "console.log(JSON.stringify(elements.said.textContent));") == (
        "\u201csee\u201d: 80.0 % of its attention on the picture"
    )


@needs_node
def test_the_patches_can_be_reached_with_keys():
    """They listened to the pointer alone. Tab reaches one, arrows the others, Escape leaves for the
    word."""
    page = made_page({"a": np.eye(3) / 10, "b": np.eye(3) / 5})
    script = """
const reached = () => cells.map((e, i) => e.tabIndex === 0 ? i : -1).filter(i => i >= 0);
const found = [reached()];
cells[0].focus();
for (const key of ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown",
  "ArrowDown", "a", "Tab", "ArrowLeft"]) {
  let kept = true;
  focus.on.keydown({key, preventDefault() { kept = false; }});
  found.push([...reached(), cells.indexOf(focus), kept]);
}
const said = elements.said.textContent, name = focus.ariaLabel;
focus.on.keydown({key: "Escape", preventDefault() {}});
console.log(JSON.stringify({found, said, name, back: buttons.indexOf(focus), word: elements.said.textContent}));
"""
    said = in_page(page, script)
    path = [(0, False), (0, False), (1, False), (4, False), (5, False), (5, False), (8, False), (8, False),
            (8, True), (8, True), (7, False)]  # fmt: skip
    assert said["found"] == [[0], *([at, at, kept] for at, kept in path)]
    assert said["said"] == "Patch in row 2, column 1, used most by"
    assert said["name"] == "patch in row 2, column 1"
    assert (said["back"], said["word"].startswith("\u201cb\u201d: 60.0 %")) == (1, True)


@needs_node
def test_a_page_without_words_says_so():
    """It had one patch, an empty list, and a hint to point at words."""
    script = """
const {said, key, hint} = elements;
console.log(JSON.stringify([cells.length, said.textContent, key.hidden, hint.hidden]));
"""
    said = "The answer has no words: there is nothing to point at."
    assert in_page(made_page({}), script) == [0, said, True, True]


@needs_node
def test_the_lens_shows_pieces_whole_and_has_keys(plain, picture):
    """A piece inside a word, "ass" of "assistant", stood there like a word."""
    found = look.look(plain, picture, QUESTION, max_new_tokens=4, lens=True)
    found.lens.patches[-1][0] = ("\u2581star", 1e-9)
    page = look_html.lens_page(
        plain.image_processor.square(picture), vars(found.lens), found.question, found.answer
    )
    script = """
cells[0].focus();
const text = cells[0].textContent;
cells[0].on.keydown({key: "Escape", preventDefault() {}});
console.log(JSON.stringify([text, elements.said.textContent, focus === elements.layer]));
"""
    assert in_page(page, script) == ["\u2581star", "Row 0, column 0, layer by layer:", True]


@pytest.mark.parametrize("page", ["look", "lens"])
def test_pages_keep_their_colours_on_paper_and_in_the_dark(plain, picture, page):
    """Printed, the map was grey and the lens white on white; both stayed bright in a dark room."""
    if page == "look":
        text = made_page({"a": np.eye(2)})
    else:
        found = look.look(plain, picture, QUESTION, max_new_tokens=2, lens=True)
        text = look_html.lens_page(picture, vars(found.lens), found.question, found.answer)
    assert "print-color-adjust: exact" in text
    assert re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root", text)
    fixed = re.findall(
        r"(?<!-)\b(?:color|background(?:-color)?): *(#\w+)",
        text.replace("color: #19191e; background: #fff;", ""),
    )
    assert fixed == []  # but for the text on the lens's picture, every colour is one of the theme's


def test_small_probabilities_are_not_rounded_to_nothing():
    """A probability of 1e-9 would be shown as 0."""
    assert [significant(x) for x in (0.123456, 1.23456e-9, 0.0, 1.0)] == [
        0.1235,
        1.235e-9,
        0.0,
        1.0,
    ]


def test_each_page_has_its_own_picture(run, tmp_path, plain, picture):
    """The lens would show the user's picture, although its patches are those of the square."""
    assert (
        run(
            "--html",
            tmp_path / "a.html",
            "--lens",
            tmp_path / "b.html",
            "--grid",
            tmp_path / "c.png",
        )[0]
        == 0
    )
    sizes = []
    for name in ("a.html", "b.html"):
        image = page_data((tmp_path / name).read_text(encoding="utf-8"))["image"]
        sizes.append(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size)
    side = plain.model.config.vision.image_size
    assert sizes == [picture.size, (side, side)]
    with Image.open(tmp_path / "c.png") as grid:
        assert grid.width == grid.height


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(run_main, reference):
    base = ["-m", str(reference / "plain"), "--device", "cpu", "--dtype", "float32", "-n", "8"]
    base += ["-p", QUESTION]
    image = ["-i", str(reference / "pictures" / "landscape.png")]

    def in_process(*arguments, main=LOOK):
        return run_main(main, *base, *([] if "-i" in arguments else image), *arguments)

    return in_process


def test_everything_is_written_and_the_answer_printed(run, tmp_path):
    """One of the files would be left out, or disagree with the printed answer."""
    names = {flag: tmp_path / f"{flag}{suffix}" for flag, suffix in (
        ("out", ".png"), ("html", ".html"), ("json", ".json"), ("npy", ".npy"), ("grid", ".jpg"), ("lens", ".html"),
    )}  # fmt: skip
    flags = [part for flag, path in names.items() for part in (f"--{flag}", path)]
    status, out, err = run(*flags)
    assert (status, err) == (0, "")
    assert (status, out, err) == run(main=partial(enter, "generate"))
    assert sorted(tmp_path.iterdir()) == sorted(names.values())
    raw = json.loads(names["json"].read_text(encoding="utf-8"))
    assert raw["answer"] + "\n" == out
    array = np.load(names["npy"])
    assert array.dtype == np.float32
    np.testing.assert_array_equal(
        array, np.array([word["map"] for word in raw["words"]], np.float32)
    )
    assert [word["share"] for word in raw["words"]] == pytest.approx(array.sum((1, 2)).tolist())
    assert (raw["layers"], raw["heads"]) == ([1], [0, 1, 2, 3])
    for flag in ("out", "grid"):
        Image.open(names[flag]).verify()


def test_picture_and_question_come_from_stdin_too(run, reference, monkeypatch, tmp_path):
    """`-i -` would look for a file named -, though generate reads stdin."""
    expected, path = run("--json", tmp_path / "a.json"), tmp_path / "b.json"
    for flag, content in (
        ("-p", QUESTION.encode() + b"\n"),
        ("-i", (reference / "pictures" / "landscape.png").read_bytes()),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert run("--json", path, flag, "-") == expected
        assert path.read_bytes() == (tmp_path / "a.json").read_bytes()


def test_json_without_a_file_goes_to_stdout(run, tmp_path):
    """As in every other command; the answer is in it, so that stdout is one JSON object."""
    path = tmp_path / "a.json"
    assert run("--json", path)[0] == 0
    status, out, _ = run("--json")
    assert (status, out) == (0, path.read_text(encoding="utf-8"))
    # a flag behind it is no file
    assert run("--json", "-") == run("--json", "--layers", "all", "--layers", "1")


def test_one_word_of_chosen_layers_and_heads(run, tmp_path):
    """--word would miss a word for its case, or --heads change nothing."""
    path = tmp_path / "look.json"
    assert run("--json", path)[0] == 0
    everything = json.loads(path.read_text(encoding="utf-8"))
    word = everything["words"][0]["text"]
    assert run("--json", path, "--word", word.upper(), "--layers", "all", "--heads", "1-2")[0] == 0
    some = json.loads(path.read_text(encoding="utf-8"))
    assert (some["layers"], some["heads"]) == ([0, 1], [1, 2])
    assert some["words"][0]["text"] == word
    assert some["words"][0]["map"] != everything["words"][0]["map"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "nothing to write: give --out"),
        (["--out", "nowhere/look.png"], 2, "nowhere/look.png: no such folder"),
        (["--out", "look.txt"], 2, "--out look.txt: the name must end in .png"),
        (["--html", "a.html", "--lens", "a.html"], 2, "a.html is given twice"),
        (["--json", "a.json", "--layers", "2-"], 2, "'2-' is not like 3 or 0,2-4 or all"),
        (["--json", "a.json", "--layers", "5-1"], 2, "'5-1' is not like 3 or 0,2-4 or all"),
        (["--json", "a.json", "--heads", "1-2-3"], 2, "'1-2-3' is not like 3 or 0,2-4 or all"),
        (["--json", "a.json", "--layers", "7"], 1, "no layer 7: this model has layers 0 to 1"),
        (["--json", "a.json", "--heads", "0,4"], 1, "no head 4: this model has heads 0 to 3"),
        (
            ["--json", "a.json", "--word", "giraffe"],
            1,
            "the answer has no word 'giraffe'; its words: ",
        ),
        (["--json", "a.json", "-i", "nowhere.png"], 1, "nowhere.png: no such picture"),
        (
            ["--json", "a.json", "-i", "a.png", "-i", "b.png"],
            2,
            "--image is given 2 times: it looks at one picture",
        ),
        (
            ["--json", "a.json", "-i", "-", "-p", "-"],
            2,
            "only one of --image and --prompt can read stdin",
        ),
        (["--json", "a.json", "--out", "./a.json"], 2, "is given twice"),
        (["--out", "."], 2, ".: is a folder"),
        (["--html", ""], 2, "an empty name"),
        (["--grid", "a.png", "--word", "a"], 2, "--word is about the maps: give --out"),
        (["--lens", "a.html", "--layers", "all"], 2, "--layers is about the maps"),
        (["--lens", "a.html", "--heads", "all"], 2, "--heads is about the maps"),
        (["--json", "a.json", "-p", "<image> or <image>?"], 1, "2"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    run, tmp_path, monkeypatch, arguments, status, message
):
    """A mistyped flag would be ignored or be a traceback, and leave half of the files."""
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*arguments)
    assert (found, out) == (status, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- pointing -------------------------------------------------------------------------------------


def test_words_about_a_thing_are_found_in_a_description():
    """The score would count a word that is said about another thing."""
    thing = shapes.Thing("star", "red", "large", 1)
    text = (
        "I see a large red star at the top left, a large red star at the top and a small blue ring "
        "on the left."
    )
    words = [word.strip(".,") for word in text.split()]
    assert point_shapes.words_about(thing, words) == {
        "size": 11,
        "colour": 12,
        "shape": 13,
        "place": 16,
    }
    assert point_shapes.words_about(shapes.Thing("star", "red", "small", 1), words) == {}
    assert (
        point_shapes.words_about(shapes.Thing("ring", "blue", "small", 3), words)["place"]
        == len(words) - 1
    )


@pytest.mark.parametrize(("width", "height"), [(200, 200), (250, 200), (160, 200)])
def test_cells_are_where_things_are_drawn(plain, width, height):
    """By colour: the patches of a thing's ninth hold its colour, the others hardly any."""
    side = 30
    for place in range(9):
        thing = shapes.Thing("square", "red", "large", place)
        image = shapes.draw(shapes.Scene(width, height, (thing,), place)).convert("HSV")
        saturated = Image.fromarray(
            (np.asarray(image)[..., 1] > 150).astype(np.uint8) * 255
        ).convert("RGB")
        square = np.asarray(
            ImageProcessor(300, "pad", mean=(0, 0, 0)).square(saturated), dtype=float
        )[..., 0]
        patches = square.reshape(side, 10, side, 10).mean((1, 3)).flatten()
        cell = point_shapes.cells(
            shapes.Scene(width, height, (thing,), 0), plain, side * side
        ).numpy()
        assert patches[cell == place].sum() > 0.9 * patches.sum()
        assert len(set(cell)) == (9 if width == height else 10)


def test_pointing_counts_the_hottest_patches():
    """The score would count a head or layer other than the one it names."""
    inside = torch.tensor([False, True, False, False])
    right, wrong = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    right[1, :, 1] = right[0, 1, 1] = wrong[1, :, 2] = wrong[0, 0, 1] = 1
    right[0, 0, 0] = 0.5
    found = [(right, inside), (right, inside), (wrong, inside), (wrong, inside)]
    assert point_shapes.hits(found, slice(1, 2)) == 50
    assert point_shapes.hits(found, slice(0, 1), head=0) == 50
    assert point_shapes.hits(found[:2], slice(0, 1), head=0) == 0
    table = point_shapes.report(dict.fromkeys(point_shapes.KINDS, found), objects=5, scenes=2)
    assert "2 scenes, 5 objects, 4 of them described exactly right." in table
    assert "| layer 1 (default) | 50.0 | 50.0 | 50.0 |" in table
    assert "| shape word | 50.0 |" in table


@pytest.mark.slow
def test_the_bundled_model_points_at_what_it_names():
    """The maps would no longer point at what the model names."""
    if not (WEIGHTS / "config.json").exists():
        pytest.skip("weights/shapes is not there yet")
    assistant = minillava.load(WEIGHTS, device="cpu", dtype="float32")
    found, objects = point_shapes.measure(assistant, 20)
    layers = look.default_layers(assistant.model.config.text.num_hidden_layers)
    assert len(found["shape"]) > 0.8 * objects
    assert point_shapes.hits(found["shape"], slice(layers[0], layers[-1] + 1)) >= 90
