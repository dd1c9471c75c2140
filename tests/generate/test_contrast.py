"""Contrastive decoding: the formulas, what the second row sees, and that two rows of a batch are
two separate runs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bounds import assert_same_in_float64, gamma
from models import stored
from PIL import Image, ImageEnhance

from minillava.generate import transforms
from minillava.generate.contrast import M3ID, METHODS, RITUAL, VCD, Contrast, describe
from minillava.generate.generation import generate
from minillava.generate.transforms import add_noise, noise_scales
from minillava.loop import Options, steps
from minillava.options import TRANSFORMS
from minillava.sampling import top_p

INF = float("inf")
# One row of logits and what the other stream says, over four tokens.
FIRST, SECOND = torch.tensor([[2.0, 1, 0, -3]]), torch.tensor([[1.0, 1.5, 0, -3]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["eager", "fused"])
def toy(request, reference):
    return stored(dtype="float64", attention=request.param)


@pytest.fixture(scope="module")
def picture(reference):
    return Image.open(reference / "pictures" / "landscape.png").convert("RGB")


def inputs(toy, picture, question="What is it?"):
    return [toy.tokenizer.encode(toy.prompt(question))], toy.image_processor([picture])


HALF_A_DIGIT = 5e-7  # of numbers that are written with six decimals

# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "other", "step", "expected"),
    [
        (VCD(), SECOND, 0, [3, 0.5, 0, -INF]),
        # the cut is by the first row
        (RITUAL(), torch.tensor([[0.0, 3, 0, 9]]), 0, [2, 10, 0, -INF]),
        (M3ID(), SECOND, 0, [2, 1, 0, -INF]),
        (M3ID(), SECOND, 35, [3.013753, 0.493124, 0, -INF]),
        (VCD(beta=0), SECOND, 0, [3, 0.5, 0, -3]),
        (VCD(beta=1), SECOND, 0, [3, -INF, -INF, -INF]),
        (M3ID(unsure=0.9), SECOND, 35, [3.013753, 0.493124, 0, -INF]),  # its best token has 0.66
        (M3ID(unsure=0.6), SECOND, 35, [2, 1, 0, -INF]),
    ],
)
def test_formulas(method, other, step, expected):
    """A wrong factor or sign, or a cut by the wrong row, still answers fluently and is not the
    method."""
    torch.testing.assert_close(
        method(FIRST, other, step), torch.tensor([expected], dtype=torch.float32)
    )


def test_m3id_is_sure_from_the_very_probability():
    """At exactly `unsure`, M3ID would contrast a token of which it is sure enough."""
    logits = torch.zeros(1, 4)  # each exactly 0.25
    assert torch.equal(M3ID(unsure=0.25).combine(logits, SECOND, 35), logits)
    assert not torch.equal(M3ID(unsure=0.26).combine(logits, SECOND, 35), logits)


def test_vcd_as_probabilities():
    """What VCD gives would sum up to other probabilities than those computed by hand."""
    found = VCD()(FIRST, SECOND, 0).softmax(-1)
    torch.testing.assert_close(
        found, torch.tensor([[0.8835, 0.0725, 0.0440, 0]]), atol=5e-5, rtol=0
    )


@pytest.mark.parametrize("method", [VCD(), RITUAL(), M3ID(rate=0.1)])
def test_a_row_that_says_the_same_only_cuts(method):
    """Where both rows agree, contrast would still change the order of the tokens that are left."""
    logits = torch.randn(3, 50, generator=generator())
    found = method(logits, logits.clone(), 7)
    kept = logits.softmax(-1) >= method.beta * logits.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(found > -INF, kept)
    assert 3 <= kept.sum() < 150
    weight = 1 + method.alpha if isinstance(method, RITUAL) else 1
    torch.testing.assert_close(found[kept], weight * logits[kept])


def test_m3ids_factor_grows_with_the_answer():
    """M3ID would count the steps from another number, or weigh late tokens like early ones."""
    other = FIRST - 1
    for step, factor in (
        (0, 0),
        (1, 0.020201),
        (10, 0.221403),
        (35, 1.013753),
        (64, 2.596640),
        (200, 53.598150),
    ):
        added = M3ID(beta=0).combine(FIRST.double(), other.double(), step) - FIRST
        expected = torch.full((1, 4), float(factor), dtype=torch.float64)
        torch.testing.assert_close(added, expected, rtol=0, atol=HALF_A_DIGIT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VCD(noise_step=1000), "noise_step is 1000"),
        (lambda: VCD(noise_step=-1), "noise_step is -1"),
        (lambda: VCD(noise_step=2.5), "noise_step is 2.5"),
        (lambda: VCD(beta=1.5), "beta is 1.5"),
        (lambda: RITUAL(alpha=-1), "alpha is -1"),
        (lambda: RITUAL(transform="shear"), "transform is 'shear'"),
        (lambda: M3ID(unsure=2), "unsure is 2"),
        (lambda: VCD(alpha=INF), "alpha is inf"),
        (lambda: VCD(alpha=float("nan")), "alpha is nan"),
        (lambda: RITUAL(alpha=INF), "alpha is inf"),
        (lambda: M3ID(rate=INF), "rate is inf"),
    ],
)
def test_values_out_of_range(make, message):
    """A strength of NaN or a noise step past the last would answer nonsense instead of being
    named."""
    with pytest.raises(ValueError, match=message):
        make()


# --- what the second row sees ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "picture", "noise"),
    [
        (0, 0.999989, 0.004728), (10, 0.999873, 0.015944), (100, 0.998293, 0.058408), (250, 0.989134, 0.147018),
        (499, 0.864103, 0.503314), (500, 0.863017, 0.505175), (700, 0.592677, 0.805440), (900, 0.364888, 0.931051),
        (999, 0.285043, 0.958515),
    ],
)  # fmt: skip
def test_noise_scales_are_those_of_vcds_code(step, picture, noise):
    """Its code multiplies step by step in float32, and ours in float64."""
    kept = picture**2
    off = gamma(step + 3, torch.float32) * kept  # of 1 - noise ** 2 as well
    found = noise_scales(step)
    assert abs(found[0] - picture) <= HALF_A_DIGIT + off / (2 * picture)
    assert abs(found[1] - noise) <= HALF_A_DIGIT + off / (2 * noise)


def test_noise_is_added_to_normalised_pixels_by_a_seed():
    """Noise would be of the wrong strength, the same for all pictures, or another at each run."""
    pixels = torch.randn(2, 3, 60, 60, generator=generator(1))
    noised = add_noise(pixels, 500, generator(2))
    assert torch.equal(noised, add_noise(pixels, 500, generator(2)))
    assert not torch.equal(noised, add_noise(pixels, 500, generator(3)))
    noise = (noised - 0.863017 * pixels) / 0.505175
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5  # four standard errors, of each
    assert abs(noise.std() - 1) < 4 / (2 * count) ** 0.5
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("size", [(90, 60), (20, 300)])
def test_transforms_keep_mode_and_size_and_follow_the_seed(name, size):
    """A transform would change the picture's size, do nothing, or differ between two runs of one
    seed."""
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )
    change = lambda seed: RITUAL(transform=name).change(picture, 56, generator(seed))  # noqa: E731
    made = change(1)
    assert (made.mode, made.size) == ("RGB", (56, 56) if name == "crop" else size)
    assert made.tobytes() == change(1).tobytes() != picture.tobytes()
    # A strip holds no part of the shapes that `crop` draws: it takes the middle.
    if name not in ("flip", "upside down") and (name, size) != ("crop", (20, 300)):
        assert made.tobytes() != change(2).tobytes()


def test_flips_are_their_own_inverse(picture):
    """A flip would turn the picture instead of mirroring it, or mirror the wrong axis."""
    for name in ("flip", "upside down"):
        flip = lambda p: RITUAL(transform=name).change(p, 56, generator())  # noqa: B023, E731
        assert flip(flip(picture)).tobytes() == picture.tobytes()
    first, last = (
        np.asarray(RITUAL(transform="flip").change(picture, 56, generator()))[:, 0],
        np.asarray(picture)[:, -1],
    )
    assert np.array_equal(first, last)


def test_transforms_do_what_they_are_called():
    """A transform would hardly change the picture, or as another would: RITUAL then contrasts
    nothing."""
    spot = np.zeros((31, 31, 3), np.uint8)
    spot[15, 15] = 255
    blurred = np.asarray(RITUAL(transform="blur").change(Image.fromarray(spot), 56, generator()))[
        ..., 0
    ].astype(float)
    assert np.array_equal(blurred, blurred.T)
    assert blurred[15, 15] == blurred.max()
    assert not blurred[:9].any()  # it reaches six pixels
    assert 200 < blurred.sum() < 310  # 255, each pixel rounded
    sigma = math.sqrt((blurred.sum(0) * (np.arange(31) - 15) ** 2).sum() / blurred.sum())
    assert 1.3 < sigma < 2.1

    plain = Image.new("RGB", (40, 40), (200, 100, 50))
    turned = np.asarray(RITUAL(transform="rotate").change(plain, 56, generator(1)))
    assert (turned == (200, 100, 50)).all(-1).any()
    assert (turned == 0).all(-1).any()  # the corners are filled with black

    # has no hue and no saturation, and is its own mean
    grey = Image.new("RGB", (9, 9), (100, 100, 100))
    shades = {
        RITUAL(transform="jitter").change(grey, 56, generator(seed)).getpixel((4, 4))
        for seed in range(40)
    }
    assert all(max(s) == min(s) for s in shades)
    assert min(s[0] for s in shades) < 40
    assert max(s[0] for s in shades) > 160  # brightness from 0 to 2
    hues = {RITUAL(transform="jitter").change(plain, 56, generator(seed)).convert("HSV").getpixel((4, 4))[0]
            for seed in range(40)}  # fmt: skip
    assert len(hues) > 15

    gradient = Image.fromarray(
        np.arange(100, dtype=np.uint8)[None, :, None].repeat(80, 0).repeat(3, 2)
    )
    areas = []
    for seed in range(60):
        columns = np.asarray(RITUAL(transform="crop").change(gradient, 56, generator(seed)))[
            28, :, 0
        ]
        areas.append((int(columns[-1]) - int(columns[0]) + 1) / 100)
    assert min(areas) < 0.45
    assert max(areas) > 0.8


@pytest.fixture
def uniform(monkeypatch):
    """`uniform(*values)`: what is drawn from now on, one after the other; the ranges asked for."""

    def draw(*values: float) -> list[tuple[float, float]]:
        given, asked = iter(values), []

        def drawn(low, high, generator):
            asked.append((low, high))
            return next(given)

        monkeypatch.setattr(transforms, "_uniform", drawn)
        return asked

    return draw


def transformed(name: str, picture: Image.Image, seed: int = 0) -> Image.Image:
    return RITUAL(transform=name).change(picture, 56, generator(seed))


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((0.5, 1, 1, 0), lambda p: ImageEnhance.Brightness(p).enhance(0.5)),
        ((1, 0.5, 1, 0), lambda p: ImageEnhance.Contrast(p).enhance(0.5)),
        ((1, 1, 0, 0), lambda p: p.convert("L").convert("RGB")),
        ((1, 1, 1.5, 0), lambda p: ImageEnhance.Color(p).enhance(1.5)),
    ],
)
def test_jitter_draws_brightness_contrast_saturation_and_hue(uniform, factors, expected):
    """One of jitter's four factors would be drawn from another range, or be applied as another."""
    coloured = Image.new("RGB", (9, 9), (200, 100, 50))
    coloured.paste((60, 90, 120), (0, 0, 4, 9))
    asked = uniform(*factors)
    found = np.asarray(transformed("jitter", coloured)).astype(int)
    assert asked == [(0, 2), (0, 2), (0, 2), (-0.5, 0.5)]
    assert abs(found - np.asarray(expected(coloured))).max() <= 2  # there and back through HSV


@pytest.mark.parametrize(
    ("turn", "colour"), [(-0.5, (0, 255, 255)), (1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255))]
)
def test_jitter_turns_the_hue(uniform, turn, colour):
    """Jitter would turn the hue the wrong way or by the wrong part of the circle."""
    uniform(1, 1, 1, turn)
    found = transformed("jitter", Image.new("RGB", (9, 9), (255, 0, 0))).getpixel((0, 0))
    # a little more than a 255th of the circle
    assert np.abs(np.subtract(found, colour)).max() <= 10


def test_jitter_is_in_random_order(monkeypatch):
    """Jitter would always apply its four changes in one order, or leave one out."""
    done = []
    for i, kind in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        monkeypatch.setattr(kind, "enhance", lambda self, factor, i=i: done.append(i) or self.image)
    monkeypatch.setattr(transforms, "_turn_hue", lambda picture, turn: done.append(3) or picture)
    for seed in range(100):
        transformed("jitter", Image.new("RGB", (9, 9)), seed)
    orders = {tuple(done[i : i + 4]) for i in range(0, 400, 4)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 18  # of 24


def test_rotate_draws_any_angle(uniform):
    """A picture would be rotated by a few degrees only, or the wrong way."""
    corner = Image.new("RGB", (9, 9))
    corner.putpixel((8, 0), (255, 255, 255))
    asked = uniform(90)
    assert transformed("rotate", corner).getpixel((0, 0)) == (255, 255, 255)
    assert asked == [(-180, 180)]


def test_a_long_picture_is_blurred_in_strips_to_the_same_bits(monkeypatch):
    """At once, a screenshot of 1080 x 20000 took five gigabytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 20, 3), dtype=np.uint8)
    at_once = np.asarray(transformed("blur", Image.fromarray(pixels)))
    monkeypatch.setattr(transforms, "STRIP", 20 * 7)
    assert np.array_equal(transformed("blur", Image.fromarray(pixels)), at_once)


def test_blur_reflects_the_edges(uniform):
    """Blur would darken the edges, which shows a frame that the picture does not have."""
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, 3), np.uint8)
    asked = uniform(1.7)
    found = np.asarray(transformed("blur", Image.fromarray(pixels))).astype(float)
    assert asked == [(1.5, 2.0)]
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 1.7) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(pixels.astype(float), ((6, 6), (6, 6), (0, 0)), mode="reflect")
    rows = sum(weight * padded[i : i + 14] for i, weight in enumerate(kernel))
    expected = sum(weight * rows[:, i : i + 20] for i, weight in enumerate(kernel))
    assert np.abs(found - expected).max() < 0.51


def test_crop_draws_area_and_shape(uniform):
    """A quarter of the area, four by three: 57.7 x 43.3 of 100 x 100, anywhere."""
    x, y = np.meshgrid(np.arange(100, dtype=np.uint8), np.arange(100, dtype=np.uint8))
    where = Image.fromarray(np.stack([x, y, x], -1))
    corners = []
    for seed in range(40):
        asked = uniform(0.25, math.log(4 / 3))
        found = np.asarray(transformed("crop", where, seed)).astype(int)
        assert asked == [(0.08, 1), pytest.approx((math.log(3 / 4), math.log(4 / 3)))]
        assert np.ptp(found[..., 0]) == pytest.approx(57.7, abs=2)
        assert np.ptp(found[..., 1]) == pytest.approx(43.3, abs=2)
        corners.append(found[0, 0, :2])
    lowest, highest = np.min(corners, 0), np.max(corners, 0)
    assert (lowest < 10).all()
    assert highest[0] > 33  # up to 42
    assert highest[1] > 47  # up to 57


@pytest.mark.parametrize(
    ("size", "box"),
    [((20, 300), (0, 136, 20, 163)), ((300, 20), (136, 0, 163, 20)), ((5, 90), (0, 41, 5, 48))],
)
def test_crop_takes_the_middle_of_a_strip(size, box):
    """A picture too narrow for any shape that crop draws would be an error, or be distorted."""
    strip = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    )
    expected = strip.resize((56, 56), Image.Resampling.BILINEAR, box=box)
    assert transformed("crop", strip).tobytes() == expected.tobytes()


def test_every_transform_is_drawn(picture):
    """RITUAL by chance would never draw one of its transforms, or leave the picture as it is."""
    seen = {RITUAL().change(picture, 56, generator(seed)).tobytes() for seed in range(40)}
    assert picture.tobytes() not in seen
    flips = {
        RITUAL(transform=name).change(picture, 56, generator()).tobytes()
        for name in ("flip", "upside down")
    }
    assert flips < seen


def test_a_photograph_is_needed(toy):
    """Contrast without a picture would compare a prompt with itself and say nothing of it."""
    for method in METHODS.values():
        with pytest.raises(ValueError, match="there is none"):
            toy.ask(None, "What is it?", contrast=method())


def test_m3ids_second_row_is_the_text_alone(toy, picture):
    """M3ID's second row would still see the picture, so that there is nothing to contrast."""
    ids, _ = inputs(toy, picture)
    rows, images = M3ID().second(ids, [picture], toy.image_processor, generator())
    assert images is None
    assert rows == [[i for i in ids[0] if i != -200]]
    assert len(rows[0]) == len(ids[0]) - 1


def test_only_the_pixels_differ_for_the_others(toy, picture):
    """The second row would have another text, or the very same pixels, and contrast would be of
    that."""
    ids, pixels = inputs(toy, picture)
    for method in (VCD(), RITUAL()):
        rows, images = method.second(ids, [picture], toy.image_processor, generator())
        assert rows == ids
        assert images.shape == pixels.shape
        assert not torch.equal(images, pixels)
        assert (
            not toy.model.splice([*ids, *rows], torch.cat([pixels, images])).padding_mask
            is not None
        )


# --- two rows of one batch ------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize(
    "method", [VCD(beta=0), RITUAL(beta=0), M3ID(beta=0, rate=0.3)], ids=METHODS
)
def test_two_rows_equal_two_separate_runs_without_a_cache(toy, picture, method):
    """At every step both streams' logits are those of a fresh run over everything so far, and the
    choice is the best of what the formula makes of them."""
    ids, pixels = inputs(toy, picture)
    rows, images = method.second(ids, [picture], toy.image_processor, generator(5))
    result = []
    both = pixels if images is None else torch.cat([pixels, images])
    spliced = toy.model.splice([*ids, *rows], both)
    for step in steps(toy.model, spliced, Options(max_new_tokens=6), contrast=method):
        result.append(step)
    said: list[int] = []
    for number, step in enumerate(result):
        with torch.no_grad():
            first = toy.model([ids[0] + said], pixels).logits[:, -1]
            second = toy.model([rows[0] + said], images).logits[:, -1]
        assert_same_in_float64(step.logits, first)
        assert_same_in_float64(step.other_logits, second)
        assert int(step.token_ids[0]) == int(method(first, second, number).argmax())
        said.append(int(step.token_ids[0]))


@pytest.mark.numeric
def test_a_batch_of_two_questions_equals_each_alone(toy, picture):
    """In a batch, an answer would be contrasted with another question's second row."""
    flipped = picture.rotate(90, expand=True)
    questions = "What is it?", "What is there in this picture, and where?"
    ids = [toy.tokenizer.encode(toy.prompt(q)) for q in questions]
    method = M3ID(rate=0.5)

    def run(ids, pictures):
        second = method.second(ids, pictures, toy.image_processor, generator())
        return generate(
            toy.model, ids, toy.image_processor(pictures), second=second, contrast=method, max_new_tokens=6,
            record=("logits", "attentions"),
        )  # fmt: skip

    together = run(ids, [picture, flipped])
    for row, (some, shown) in enumerate(zip(ids, (picture, flipped), strict=True)):
        alone = run([some], [shown])
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert_same_in_float64(together.logits[0][row], alone.logits[0][0])
    assert (
        len(together.finish_reason)
        == len(together.image_spans)
        == len(together.attentions[0][0])
        == 2
    )


def test_nothing_contrasted_is_plain_decoding(toy, picture):
    """Contrast of strength 0 would change the answer or the random numbers that are drawn."""
    plain = toy.ask(picture, "What is it?", max_new_tokens=12, temperature=1.0, seed=3)
    assert (
        toy.ask(
            picture,
            "What is it?",
            max_new_tokens=12,
            temperature=1.0,
            seed=3,
            contrast=VCD(alpha=0, beta=0),
        )
        == plain
    )


def test_contrast_changes_the_answer_greedily_too_and_the_seed_repeats_it(toy, picture):
    """The contrast would be computed and not used, or its noise be drawn without the seed."""
    ask = lambda **options: toy.ask(picture, "What is it?", max_new_tokens=12, **options)  # noqa: E731
    assert ask(contrast=VCD(alpha=5, beta=0), seed=1) != ask()
    sampled = ask(contrast=RITUAL(), temperature=1.0, seed=4)
    torch.rand(3)
    assert ask(contrast=RITUAL(), temperature=1.0, seed=4) == sampled
    assert ask(contrast=RITUAL(), temperature=1.0, seed=5) != sampled


def test_the_cut_comes_before_the_temperature(toy, picture):
    """A higher temperature would let more tokens past the cut, which judges the plain
    probabilities."""
    ids, pixels = inputs(toy, picture)
    method = VCD(beta=0.9)
    survivors = []
    for temperature in (1.0, 10.0):
        second = method.second(ids, [picture], toy.image_processor, generator())
        result = generate(
            toy.model, ids, pixels, second=second, contrast=method, temperature=temperature, seed=0, max_new_tokens=1,
            record=("scores",),
        )  # fmt: skip
        survivors.append(result.scores[0] > -INF)
    assert torch.equal(*survivors)
    assert 0 < survivors[0].sum() < survivors[0].numel()


def test_filters_see_the_combination(toy, picture):
    """top_p would be taken of the first row, and keep tokens that the contrast rules out."""
    ids, pixels = inputs(toy, picture)
    second = VCD().second(ids, [picture], toy.image_processor, generator())
    spliced = toy.model.splice([*ids, *second[0]], torch.cat([pixels, second[1]]))
    step = next(
        steps(
            toy.model,
            spliced,
            Options(temperature=1.0, top_p=0.5, max_new_tokens=1),
            contrast=VCD(),
        )
    )
    assert torch.equal(step.scores, top_p(VCD()(step.logits, step.other_logits, 0), 0.5))


def test_the_log_names_each_stream_by_what_it_says(toy, picture):
    """The log would show one stream's probabilities under the name of another."""
    ids, pixels = inputs(toy, picture)
    second = VCD().second(ids, [picture], toy.image_processor, generator())
    spliced = toy.model.splice([*ids, *second[0]], torch.cat([pixels, second[1]]))
    step = next(
        steps(
            toy.model, spliced, Options(max_new_tokens=1), tokenizer=toy.tokenizer, contrast=VCD()
        )
    )
    described = describe(VCD(), step, 0, toy.tokenizer, best=3)
    combined = VCD()(step.logits, step.other_logits, 0)
    for name, logits in (
        ("first", step.logits),
        ("second", step.other_logits),
        ("combined", combined),
    ):
        likely, which = logits[0].softmax(-1).topk(3)
        assert [probability for _, probability in described[name]] == pytest.approx(
            likely.tolist(), rel=5e-6, abs=0
        )
        assert described[name][0][0] in (
            toy.tokenizer.sentencepiece.id_to_piece(int(which[0])),
            f"<{int(which[0])}>",
        )
    assert described["first"] != described["second"]


def test_second_and_contrast_belong_together(toy, picture):
    """A method without second rows would be ignored, or fail far from its cause."""
    ids, pixels = inputs(toy, picture)
    with pytest.raises(ValueError, match="belong together"):
        generate(toy.model, ids, pixels, contrast=VCD(), max_new_tokens=1)


def test_a_method_of_ones_own(toy, picture):
    """Classifier-free guidance (Sanchez et al. 2023), without touching a file of ours."""

    class Guidance(Contrast):
        def second(self, input_ids, pictures, processor, generator):
            return [[i for i in row if i != -200] for row in input_ids], None

        def combine(self, logits, other, step):
            return other + 3 * (logits - other)

    assert isinstance(
        toy.ask(picture, "What is it?", contrast=Guidance(beta=0), max_new_tokens=4), str
    )


def test_m3id_stays_a_number_in_long_answers():
    """M3ID's factor grows exponentially: it would overflow to infinity late in a long answer."""
    assert M3ID(rate=10.0).combine(100 * FIRST, -100 * FIRST, 4000).isfinite().all()
    assert M3ID(rate=0.2).combine(FIRST, SECOND, 500).isfinite().all()


def test_cut_and_minimum_length_can_leave_nothing(toy, picture):
    """The one token that the cut leaves is the end, which min_new_tokens bars: an error, not id
    0."""
    ids, pixels = inputs(toy, picture)
    best = int(generate(toy.model, ids, pixels, max_new_tokens=1).sequences[0, 0])
    original = toy.model.config
    toy.model.config = replace(original, eos_token_ids=(best,))
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="no token is left"):
                generate(
                    toy.model, ids, pixels, second=(ids, pixels), contrast=VCD(beta=1), min_new_tokens=2,
                    max_new_tokens=3, temperature=temperature,
                )  # fmt: skip
    finally:
        toy.model.config = original


def test_second_rows_must_match_the_first(toy, picture):
    """Too few second rows would contrast a row with another's, and mixed pictures fail inside
    torch."""
    ids, pixels = inputs(toy, picture)
    two = {"images": pixels.repeat(2, 1, 1, 1), "contrast": VCD(), "max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"2 rows of input_ids but 1 second"):
        generate(toy.model, ids * 2, second=(ids, pixels), **two)
    with pytest.raises(ValueError, match="encode both or neither"):
        generate(
            toy.model,
            ids,
            toy.model.encode_images(pixels),
            second=(ids, pixels),
            contrast=VCD(),
            max_new_tokens=1,
        )
