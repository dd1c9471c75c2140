"""The world of the bundled model: pictures of coloured shapes, and questions about them whose
answers are true because the picture was drawn from the same description.

A scene has up to nine objects, each a shape, a colour, a size and one of nine places; the model is
asked about scenes of up to four. Everything is drawn from a `random.Random`, so a seed is a data
set.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Drawn as well, but neither shown nor named in the training of the bundled model: to be learnt.
NEW_SHAPES = ("heart",)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 220, 50),
    "green": (40, 155, 70),
    "blue": (40, 80, 215),
    "purple": (130, 50, 170),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
# The extent of an object, as a fraction of the picture's longer side.
SIZES = {"small": (0.165, 0.185), "large": (0.24, 0.262)}
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four")
MAX_OBJECTS = 4

EMPTY = "I see no shapes in this image."

# Training never shows or mentions these pairs; the evaluation asks whether the model can put them
# together.
HELD_OUT = frozenset(
    (shape, tuple(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES)
)
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


def pairs_of(shape: str) -> tuple[tuple[str, str], ...]:
    """A new shape in each colour."""
    return tuple((shape, colour) for colour in COLOURS)


@dataclass(frozen=True)
class Thing:
    """One object. place: 0 to 8, row by row. No scene holds two things of the same shape and
    colour."""

    shape: str
    colour: str
    size: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """things: in the order of their places. seed: decides the jitter and the background of the
    drawing."""

    width: int
    height: int
    things: tuple[Thing, ...]
    seed: int


# The pictures that come with the model.
EXAMPLES = (
    Scene(
        336, 336,
        (Thing("star", "red", "large", 0), Thing("circle", "blue", "small", 4), Thing("square", "green", "large", 8)),
        1,
    ),
    Scene(400, 320, (Thing("ring", "purple", "small", 2), Thing("triangle", "orange", "large", 3)), 2),
    Scene(
        300, 375,
        (Thing("cross", "pink", "large", 1), Thing("circle", "black", "small", 3),
         Thing("square", "yellow", "small", 5), Thing("star", "green", "large", 7)),
        3,
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------- scenes


def sample_scene(
    rng: random.Random,
    count: int | None = None,
    pairs: Sequence[tuple[str, str]] = TRAINING_PAIRS,
    must_have: Sequence[tuple[str, str]] = (),
    sides: tuple[int, int] = (130, 260),
    aspects: tuple[float, float] = (0.8, 1.25),
) -> Scene:
    """A scene of `count` things (None: one to four, and one scene in sixteen empty) of distinct
    (shape, colour) pairs.

    must_have: one of the things is of one of these pairs, and the scene is not empty. sides: the
    longer side in pixels. aspects: width / height.
    """
    if count is None:
        count = 0 if not must_have and rng.random() < 1 / 16 else rng.randint(1, MAX_OBJECTS)
    chosen = [rng.choice(must_have)] if must_have and count else []
    chosen += rng.sample([p for p in pairs if p not in chosen], count - len(chosen))
    rng.shuffle(chosen)
    places = sorted(rng.sample(range(len(PLACES)), count))
    sizes = rng.choices(tuple(SIZES), k=count)
    things = tuple(
        Thing(s, c, size, p) for (s, c), size, p in zip(chosen, sizes, places, strict=True)
    )
    side = rng.randint(*sides)
    aspect = math.exp(rng.uniform(*map(math.log, aspects)))
    width, height = (side, round(side / aspect)) if aspect > 1 else (round(side * aspect), side)
    return Scene(width, height, things, rng.getrandbits(32))


def draw(scene: Scene, sharpness: int = 1) -> Image.Image:
    """The picture. sharpness: how much finer it is drawn before it is scaled down, for smooth
    edges."""
    rng = random.Random(scene.seed)
    width, height = scene.width * sharpness, scene.height * sharpness
    image = _background(rng, width, height)
    pen = ImageDraw.Draw(image)
    side = max(width, height)
    cell = width / 3, height / 3
    for thing in scene.things:
        extent = rng.uniform(*SIZES[thing.size]) * side
        column, row = thing.place % 3, thing.place // 3
        x, y = (
            (index + 0.5) * length + rng.uniform(-0.35, 0.35) * max(0.0, length - extent)
            for index, length in zip((column, row), cell, strict=True)
        )
        colour = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[thing.colour])
        _draw_shape(pen, thing.shape, x, y, extent / 2, colour)
    return (
        image
        if sharpness == 1
        else image.resize((scene.width, scene.height), Image.Resampling.LANCZOS)
    )


def _background(rng: random.Random, width: int, height: int) -> Image.Image:
    """A pale or a dusky tint; plain, shaded from side to side, or cloudy."""
    value = rng.uniform(215, 245) if rng.random() < 0.75 else rng.uniform(95, 125)
    tint = [value - rng.uniform(0, 22) for _ in range(3)]
    kind = rng.choice(("plain", "shaded", "cloudy"))
    if kind == "plain":
        return Image.new("RGB", (width, height), tuple(map(round, tint)))
    spots = 2 if kind == "shaded" else 5
    shade = [[rng.uniform(-10, 10) for _ in range(spots)] for _ in range(spots)]
    small = np.array(shade)[..., None] + np.array(tint)  # [spots, spots, 3]
    return Image.fromarray(small.clip(0, 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, ...]
) -> None:
    """Draw a shape centred on (x, y) that reaches r to each side."""

    def polygon(points):
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in points], fill=colour)

    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=max(1, round(0.42 * r)))
    elif shape == "square":
        r *= 0.9  # the corners make it look larger than the others
        polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        polygon([(0, -1), (1, 0.85), (-1, 0.85)])
    elif shape == "star":
        spikes = [(1.05 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
        polygon([(length * math.sin(angle), -length * math.cos(angle)) for length, angle in spikes])
    elif shape == "cross":
        a = 0.33
        quarter = [(a, -1), (a, -a), (1, -a)]
        turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
        polygon([(p * dx + q * dy, s * dx + t * dy) for p, q, s, t in turns for dx, dy in quarter])
    elif shape == "heart":
        polygon([_heart(math.pi * i / 20) for i in range(40)])
    else:
        known = ", ".join(SHAPES + NEW_SHAPES)
        raise ValueError(f"unknown shape {shape!r}, expected one of: {known}")


def _heart(t: float) -> tuple[float, float]:
    """A point of its outline, t from 0 to 2π: the two lobes at -1, the tip at 1."""
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -(height + 2.5) / 14.6


# ---------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Dialogue:
    """kind: one of KINDS. turns: (question, true answer) pairs; the kind is that of the last
    one."""

    kind: str
    turns: tuple[tuple[str, str], ...]


# How often training asks each kind, besides the description that every picture gets: the hard ones
# more often.
FREQUENCIES = {
    "count": 1,
    "colour": 1,
    "size": 2,
    "where": 5,
    "what at": 2,
    "any": 1,
    "yes/no": 3,
    "left of": 5,
    "above": 5,
    "follow-up": 3,
}
KINDS = ("describe", *FREQUENCIES)


def describe(scene: Scene) -> str:
    """All things, row by row: "I see a large red circle at the top left and a small blue star in
    the center." """
    things = [f"a {t.size} {t.name} {PLACES[t.place]}" for t in scene.things]
    if not things:
        return EMPTY
    return "I see " + " and ".join(filter(None, (", ".join(things[:-1]), things[-1]))) + "."


def ask(
    scene: Scene, kind: str, rng: random.Random, pairs: Sequence[tuple[str, str]] = TRAINING_PAIRS
) -> Dialogue | None:
    """A dialogue of that kind, or None where the scene has nothing to ask it about (how many
    colours is nothing).

    pairs: what may be asked for although it is not there.
    """
    turns = _ASK[kind](scene, rng, pairs)
    return Dialogue(kind, turns) if turns else None


def ask_any(
    scene: Scene,
    count: int,
    rng: random.Random,
    pairs: Sequence[tuple[str, str]] = TRAINING_PAIRS,
) -> list[Dialogue]:
    """A description and `count` - 1 other dialogues about one scene, in random order."""
    dialogues = [ask(scene, "describe", rng, pairs)]
    while len(dialogues) < count:
        (kind,) = rng.choices(tuple(FREQUENCIES), FREQUENCIES.values())
        dialogue = ask(scene, kind, rng, pairs)
        if dialogue is not None:
            dialogues.append(dialogue)
    rng.shuffle(dialogues)
    return dialogues


def _ask_describe(scene, rng, pairs):
    questions = ("Describe this image.", "What is in this image?", "What do you see?")
    question = (
        "Please describe this image in detail." if rng.random() < 0.6 else rng.choice(questions)
    )
    return ((question, describe(scene)),)


def _ask_count(scene, rng, pairs):
    number = NUMBERS[len(scene.things)]
    question = rng.choice(("How many shapes are there?", "How many shapes are in this image?"))
    return (
        (question, "There is one shape." if number == "one" else f"There are {number} shapes."),
    )


def _ask_colour(scene, rng, pairs):
    alone = [t for t in scene.things if sum(t.shape == other.shape for other in scene.things) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return (
        (
            f"What {rng.choice(('color', 'colour'))} is the {thing.shape}?",
            f"The {thing.shape} is {thing.colour}.",
        ),
    )


def _call(scene, thing, rng):
    """What to call a thing: "red star", or more shortly "star" or "red shape" where there is but
    one."""
    names = [thing.name]
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        names.append(thing.shape)
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        names.append(f"{thing.colour} shape")
    return thing.name if rng.random() < 0.5 else rng.choice(names)


def _ask_size(scene, rng, pairs):
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    name = _call(scene, thing, rng)
    question = rng.choice((f"What size is the {name}?", f"Is the {name} small or large?"))
    return ((question, f"The {name} is {thing.size}."),)


def _ask_where(scene, rng, pairs):
    if not scene.things:
        return None
    thing = rng.choice(scene.things)
    name = _call(scene, thing, rng)
    return ((f"Where is the {name}?", f"The {name} is {PLACES[thing.place]}."),)


def _ask_what_at(scene, rng, pairs):
    if scene.things and rng.random() < 0.75:
        thing = rng.choice(scene.things)
        place, answer = (
            PLACES[thing.place],
            f"A {thing.size} {thing.name} is {PLACES[thing.place]}.",
        )
    else:
        taken = {t.place for t in scene.things}
        place = PLACES[rng.choice([p for p in range(len(PLACES)) if p not in taken])]
        answer = f"Nothing is {place}."
    return ((f"What is {place}?", answer),)


def _ask_any(scene, rng, pairs):
    """Half of yes/no: one word to look for instead of two that belong together."""
    by_shape = rng.random() < 0.5
    there = {t.shape if by_shape else t.colour for t in scene.things}
    absent = [word for word in (SHAPES if by_shape else COLOURS) if word not in there]
    answer = "Yes." if there and rng.random() < 0.5 else "No."
    word = rng.choice(sorted(there) if answer == "Yes." else absent)
    return ((f"Is there {_article(word)} {word}{'' if by_shape else ' shape'}?", answer),)


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def _ask_yes_no(scene, rng, pairs):
    there = [(t.shape, t.colour) for t in scene.things]
    if there and rng.random() < 0.5:
        shape, colour = rng.choice(there)
        answer = "Yes."
    else:
        # The hardest lies first: shape and colour both there but not together, then one of them,
        # then any pair.
        absent = [pair for pair in pairs if pair not in there]
        shapes, colours = {s for s, _ in there}, {c for _, c in there}
        both = [(s, c) for s, c in absent if s in shapes and c in colours]
        one = [(s, c) for s, c in absent if s in shapes or c in colours]
        levels = [level for level in (both, one, one, absent) if level]
        shape, colour = rng.choice(rng.choice(levels))
        answer = "No."
    where = rng.choice(("", " in this image"))
    return ((f"Is there {_article(colour)} {colour} {shape}{where}?", answer),)


def _ask_which(scene, rng, position, words):
    """Which of two things comes first by `position`; a tie is not asked about."""
    apart = [(a, b) for a in scene.things for b in scene.things if position(a) < position(b)]
    if not apart:
        return None
    first, second = rng.choice(apart)
    winner, loser = _call(scene, first, rng), _call(scene, second, rng)
    one, other = (winner, loser) if rng.random() < 0.5 else (loser, winner)
    return ((f"Which is {words}, the {one} or the {other}?", f"The {winner} is {words}."),)


def _ask_left(scene, rng, pairs):
    return _ask_which(scene, rng, lambda t: t.place % 3, "further left")


def _ask_above(scene, rng, pairs):
    return _ask_which(scene, rng, lambda t: t.place // 3, "higher up")


def _ask_follow_up(scene, rng, pairs):
    """A second question that only makes sense after the first."""
    if not scene.things or rng.random() < 0.25:
        return (*_ask_count(scene, rng, pairs), ("What do you see?", describe(scene)))
    first = rng.choice((_ask_where, _ask_colour, _ask_size))(scene, rng, pairs)
    if first is None:
        return None
    answer = first[0][1]
    called = answer.removeprefix("The ").split(" is ")[0]
    (thing,) = (t for t in scene.things if called in (t.name, t.shape, f"{t.colour} shape"))
    where, size = (
        ("Where is it?", f"It is {PLACES[thing.place]}."),
        ("Is it small or large?", f"It is {thing.size}."),
    )
    known_place, known_size = PLACES[thing.place] in answer, thing.size in answer
    return (
        *first,
        rng.choice(
            [turn for turn, known in ((where, known_place), (size, known_size)) if not known]
        ),
    )


_ASK = {
    "describe": _ask_describe,
    "count": _ask_count,
    "colour": _ask_colour,
    "size": _ask_size,
    "where": _ask_where,
    "what at": _ask_what_at,
    "any": _ask_any,
    "yes/no": _ask_yes_no,
    "left of": _ask_left,
    "above": _ask_above,
    "follow-up": _ask_follow_up,
}
