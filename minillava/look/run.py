"""What each word of an answer looked at, as pictures, a page and numbers: `python -m
minillava.look`.

A token is chosen from the logits of the position before it: the first from the last position of the
prompt, each further one from the token chosen last. So the attention that belongs to a token is
that position's row, which led to the choice; the row of the token itself leads to the next one. A
word's map is the mean over its tokens and over the chosen layers and heads. Each number is a
patch's share of all attention, of which the text before gets the rest.

L layers, H heads, P patches, G = √P patches a side, T queries, S keys, C width, V vocabulary.
"""

import argparse
import io
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.assistant import Assistant
from minillava.cli.hooks import Hooks, step_by_step
from minillava.cli.messages import Messages, print_json, significant, write_outputs
from minillava.cli.opening import find_weights, open_assistant, read_question
from minillava.config import VisionConfig
from minillava.files.disk import is_stdout
from minillava.files.pictures import Images, as_list, open_image
from minillava.generate.watch import Watch, patch_span, seen_span
from minillava.image import ImageProcessor
from minillava.llama import LanguageModel
from minillava.llava import Llava, Spliced
from minillava.look import draw as look_draw
from minillava.look import page as look_html
from minillava.loop import Step, steps
from minillava.options import Options
from minillava.prompt import DEFAULT_PROMPT
from minillava.tiles.grid import Size
from minillava.tiles.pictures import TileProcessor
from minillava.tokenizer import TextDecoder, Tokenizer

DEPTH = 0.5, 1.0
"""The layers looked at by default, as fractions of the depth: the upper half. Chosen with
tools/point_shapes.py on the bundled model (README.md here has the figures); that the rule holds
for 7B and 13B is a guess."""


@dataclass
class Word:
    """heat: float32 [G, G], the share of attention of each patch. token_ids: those whose rows the
    map is made of, the ones with letters or digits; in "left." that leaves out the full stop."""

    text: str
    token_ids: list[int]
    heat: np.ndarray


@dataclass
class Lens:
    """What each layer would say if it were the last: its most likely token, and how likely. Layer 0
    is what goes into the first one. patches: per layer P times (text, probability), at the patches.
    tokens: per layer one for each `chosen`, at the positions that chose the answer's tokens."""

    patches: list[list[tuple[str, float]]]
    chosen: list[str]
    tokens: list[list[tuple[str, float]]]


@dataclass
class Look:
    """box: left, top, right, bottom of the square of patches, in pixels of the picture
    (`patch_box`)."""

    picture: Image.Image
    box: tuple[float, float, float, float]
    question: str
    answer: str
    layers: list[int]
    heads: list[int]
    words: list[Word]
    lens: Lens | None


# ---------------------------------------------------------------------------------------- attention
@contextmanager
def _watching(language_model: LanguageModel, watch: Watch) -> Iterator[None]:
    """Inside, every layer's attention is watched, in this thread alone."""
    with Hooks() as hooks:
        for layer in language_model.layers:
            hooks.attention(
                layer.self_attn, lambda context: context._replace(attend=watch.over(context.attend))
            )
        yield


def watch(
    model: Llava,
    spliced: Spliced,
    options: Options,
    tokenizer: Tokenizer,
    record: Sequence[str] = (),
    size: Size | None = None,
) -> Iterator[tuple[Step, Tensor]]:
    """`loop.steps` for one row with one picture: every step, and the attention [L, H, P] that chose
    its token. size: the picture's height and width, if it was cut into tiles, whose attention then
    counts where they lie in it. Raises ValueError where `steps` does, and for another number of
    pictures."""
    pictures = sum(map(len, spliced.image_spans))
    if len(spliced.image_spans) != 1 or pictures != 1:
        raise ValueError(
            f"{len(spliced.image_spans)} row(s) with {pictures} picture(s), expected one with one"
        )
    model, span = step_by_step(model), seen_span(model, spliced, size)
    running = steps(model, spliced, options, tokenizer=tokenizer, record=record)
    while True:
        # For one forward pass at a time, so that other loops can use the model in between.
        seen = Watch(*span)
        with _watching(model.language_model, seen):
            step = next(running, None)
        if step is None:
            return
        yield step, torch.stack(seen.rows)


def default_layers(count: int) -> list[int]:
    """`DEPTH` of `count` layers, at least one."""
    first, end = (round(fraction * count) for fraction in DEPTH)
    return list(range(first, max(end, first + 1)))


def begins_word(before: str, piece: str) -> bool:
    """Whether a piece, not empty, begins a word. before: the last piece that was not empty."""
    is_wide = unicodedata.east_asian_width(piece[0]) in "WF"  # Chinese, Japanese
    return not before or piece[0].isspace() or before[-1].isspace() or is_wide


def join_words(pieces: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The texts of tokens -> words without the space around them, and which tokens each is made of
    (those with letters or digits, where it has any). Half a character ("") belongs to what
    completes it, a Chinese one is a word."""
    words: list[list[tuple[str, list[int]]]] = []  # per word, (text, tokens) of its parts
    waiting = []
    for i, piece in enumerate(pieces):
        waiting.append(i)
        if not piece:
            continue
        if begins_word(words[-1][-1][0] if words else "", piece):
            words.append([])
        words[-1].append((piece, waiting))
        waiting = []
    joined = []
    for parts in words:
        spoken = [part for part in parts if any(c.isalnum() for c in part[0])]
        text = "".join(piece for piece, _ in parts).strip()
        joined.append((text, [i for _, tokens in spoken or parts for i in tokens]))
    return [word for word in joined if word[0]]


def patch_box(
    size: tuple[int, int], processor: ImageProcessor, vision: VisionConfig
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the square of patches, in pixels of a picture of that size. It is
    the square that the model sees, but for what is left over at the right and below where patches
    do not fill a side: SigLIP reads 27 times 14 of 384 pixels."""
    left, top, right, bottom = seen_box(size, processor)
    filled = vision.image_size // vision.patch_size * vision.patch_size / vision.image_size
    return left, top, left + (right - left) * filled, top + (bottom - top) * filled


def seen_box(size: tuple[int, int], processor: ImageProcessor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the square that the model sees, in pixels of a picture of that
    size: larger than the picture where it is padded, smaller where it is cropped, the picture
    itself where it is squeezed. The arithmetic of image.py backwards."""
    width, height = size
    if processor.aspect in ("squash", "anyres"):  # of tiles, the overview
        return 0, 0, width, height
    if processor.aspect == "pad":
        side = max(size)
        left, top = -((side - width) // 2), -((side - height) // 2)
        return left, top, left + side, top + side
    side, short, long = processor.image_size, min(size), max(size)
    box = []
    for length in size:
        new = side if length == short else int(side * long / short)
        box.append([edge * length / new for edge in ((new - side) // 2, (new - side) // 2 + side)])
    return box[0][0], box[1][0], box[0][1], box[1][1]


# --------------------------------------------------------------------------------------- logit lens
class LensReader:
    """What the layers would say (nostalgebraist 2020), read while an answer is made. start, end:
    where the patches are."""

    def __init__(self, assistant: Assistant, start: int, end: int):
        self.model, self.tokenizer = assistant.model.language_model, assistant.tokenizer
        self.start, self.end = start, end
        self.patches: list[list[tuple[str, float]]] = []
        self.states: list[list[Tensor]] = []  # per token of the answer, L + 1 times [C]

    def read(self, states: Sequence[Tensor]) -> None:
        """states: those of a step, L + 1 times [1, T, C]; the first ones have the patches."""
        if not self.states:
            self.patches = self.words([state[0, self.start : self.end] for state in states])
        self.states.append([state[0, -1] for state in states])

    def result(self, chosen: Sequence[int]) -> Lens:
        """chosen: the ids of the answer."""
        by_layer = [torch.stack(layer) for layer in zip(*self.states, strict=True)]
        said = [self.tokenizer.piece(i) for i in chosen]
        return Lens(self.patches, said, self.words(by_layer))

    def words(self, states: Sequence[Tensor]) -> list[list[tuple[str, float]]]:
        """The most likely next token and its probability at some positions, for every layer.
        states: L + 1 times [positions, C]."""
        found = []
        for i, state in enumerate(states):
            # The last one is normalised already.
            normed = state if i == len(states) - 1 else self.model.norm(state)
            likely = self.model.head(normed).float().softmax(-1).max(-1)  # of [positions, V]
            pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
            found.append([(self.tokenizer.piece(token), significant(p)) for token, p in pairs])
        return found


# --------------------------------------------------------------------------------------------- look
@torch.no_grad()
def look(
    assistant: Assistant,
    image: Images,
    question: str = DEFAULT_PROMPT,
    options: Options | None = None,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    system: str | None = None,
    lens: bool = False,
    **settings,
) -> Look:
    """Answer a question, and say where each word looked.

    layers, heads: those averaged over, counted from 0 (default: the upper half, all heads).
    options: an `Options`, or its fields by name. Raises ValueError for a layer or head out of
    range."""
    if len(as_list(image)) != 1:
        raise ValueError(f"look at one picture, found {len(as_list(image))} pictures")
    text, picture = assistant.model.config.text, open_image(*as_list(image))
    layers = default_layers(text.num_hidden_layers) if layers is None else layers
    layers = _check("layer", layers, text.num_hidden_layers)
    heads = range(text.num_attention_heads) if heads is None else heads
    heads = _check("head", heads, text.num_attention_heads)
    spliced = assistant.prepare(picture, assistant.prompt(question, images=1, system=system))
    read = LensReader(assistant, *patch_span(assistant.model, spliced)) if lens else None
    chosen = assistant.options(options, **settings)
    tiled = isinstance(assistant.image_processor, TileProcessor)
    size = (picture.height, picture.width) if tiled else None
    answer, tokens = follow(assistant, spliced, chosen, layers, heads, read, size)
    return Look(
        picture,
        patch_box(picture.size, assistant.image_processor, assistant.model.config.vision),
        question,
        answer,
        layers,
        heads,
        words_of(tokens),
        None if read is None else read.result([token.id for token in tokens]),
    )


@dataclass
class Token:
    """One of an answer: piece is the text that it adds, heat [P] what its choice looked at."""

    id: int
    piece: str
    heat: np.ndarray


def follow(
    assistant: Assistant,
    spliced: Spliced,
    options: Options,
    layers: list[int],
    heads: list[int],
    lens: LensReader | None,
    size: Size | None = None,
) -> tuple[str, list[Token]]:
    """The answer and its tokens, while `lens` reads the states of the layers along. size: as for
    `watch`."""
    decoder, answer, tokens = TextDecoder(assistant.tokenizer), "", []
    record = () if lens is None else ("hidden_states",)
    watched = watch(assistant.model, spliced, options, assistant.tokenizer, record, size)
    for step, rows in watched:
        heat = rows[layers][:, heads].mean((0, 1)).cpu().numpy()  # [P]
        tokens.append(Token(step.ids[0], decoder.feed(step.ids[0]), heat))
        answer += step.text[0]
        if lens is not None:
            lens.read(step.hidden_states)
    cut_pieces(tokens, len(answer))
    return answer, tokens


def cut_pieces(tokens: Sequence[Token], left: int) -> None:
    """Leave of the pieces the first `left` characters, without what a stop text has cut off."""
    for token in tokens:
        token.piece = token.piece[:left]
        left -= len(token.piece)


def words_of(tokens: Sequence[Token]) -> list[Word]:
    """The words of an answer, each with the mean of its tokens' maps."""
    words = []
    for text, parts in join_words([token.piece for token in tokens]):
        heat = np.mean([tokens[i].heat for i in parts], axis=0)  # [P]
        side = math.isqrt(len(heat))
        words.append(Word(text, [tokens[i].id for i in parts], heat.reshape(side, side)))
    return words


def _check(what: str, chosen: Sequence[int], count: int) -> list[int]:
    wrong = [i for i in chosen if not 0 <= i < count]
    if wrong or not chosen:
        raise ValueError(
            f"no {what} {wrong[0] if wrong else 'chosen'}: this model has {what}s 0 to {count - 1}"
        )
    return list(chosen)


# --------------------------------------------------------------------------------------------- door
def _plain(text: str) -> str:
    """A word for comparison: lower case, without the punctuation around it."""
    return re.sub(r"^\W+|\W+$", "", text).casefold()


def choose_words(words: Sequence[Word], wanted: Sequence[str]) -> list[Word]:
    """The wanted words of the answer, in its order; all of them if none is named. Raises ValueError
    for a word that the answer does not contain."""
    return [words[i] for i in find_words([word.text for word in words], wanted)]


def find_words(words: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """As `choose_words`: their numbers in the answer."""
    found = [_plain(word) for word in words]
    for text in wanted:
        if _plain(text) not in found:
            raise ValueError(f"the answer has no word {text!r}; its words: {' '.join(words)}")
    plain = {_plain(text) for text in wanted}
    return [i for i, word in enumerate(found) if not plain or word in plain]


def as_json(found: Look, words: Sequence[Word]) -> dict:
    """Everything as numbers: maps as lists of rows, unrounded."""
    return {
        "question": found.question,
        "answer": found.answer,
        "picture": {"size": found.picture.size, "box": found.box},
        "layers": found.layers,
        "heads": found.heads,
        "words": [
            {
                "text": w.text,
                "token_ids": w.token_ids,
                "share": float(w.heat.sum()),
                "map": w.heat.tolist(),
            }
            for w in words
        ],
    }


def picture_bytes(image: Image.Image, path: str) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[os.path.splitext(path)[1].lower()])
    return file.getvalue()


def run(args: argparse.Namespace, options: dict) -> int:
    messages = Messages(args.verbose, args.quiet)
    question, (picture,) = read_question(args)
    assistant = open_assistant(args, find_weights(args.weights, messages), messages)
    started, layers = time.perf_counter(), args.layers
    if layers is None:  # "all"; () is the default
        layers = range(assistant.model.config.text.num_hidden_layers)
    found = look(
        assistant,
        picture,
        question,
        layers=layers or None,
        heads=args.heads or None,
        system=args.system,
        lens=args.lens is not None,
        **options,
    )
    messages.stage("answer", started, f"{len(found.words)} words")
    words = choose_words(found.words, args.word)
    started = time.perf_counter()
    files = _files(args, assistant, found, words)
    if args.json == "-":
        print_json(as_json(found, words))
    elif not any(map(is_stdout, files)):  # which then has that file alone
        print(found.answer, flush=True)
    status = write_outputs(files)
    messages.stage("write", started, ", ".join(files))
    return status


def _files(
    args: argparse.Namespace, assistant: Assistant, found: Look, words: list[Word]
) -> dict[str, str | bytes]:
    """What the flags ask for: names and contents."""
    square, vision = assistant.image_processor.square(found.picture), assistant.model.config.vision
    side, files = math.isqrt(vision.num_patches), {}
    filled = side * vision.patch_size
    square = square.crop((0, 0, filled, filled))
    if args.out is not None:
        files[args.out] = picture_bytes(_sheet(assistant, found, words), args.out)
    if args.html is not None:
        files[args.html] = look_html.look_page(found.picture, as_json(found, words))
    if args.json not in (None, "-"):
        files[args.json] = json.dumps(as_json(found, words), ensure_ascii=False) + "\n"
    if args.npy is not None:
        file = io.BytesIO()
        np.save(file, np.array([word.heat for word in words], np.float32).reshape(-1, side, side))
        files[args.npy] = file.getvalue()
    if args.grid is not None:
        files[args.grid] = picture_bytes(look_draw.draw_grid(square, side), args.grid)
    if found.lens is not None:
        lens = vars(found.lens)
        files[args.lens] = look_html.lens_page(square, lens, found.question, found.answer)
    return files


def _sheet(assistant: Assistant, found: Look, words: list[Word]) -> Image.Image:
    """The picture of --out: a heat map for each word."""
    text, maps = assistant.model.config.text, [(word.text, word.heat) for word in words]
    used, also = look_draw.listed(found.layers), look_draw.listed(found.heads)
    note = (
        f"Layers {used} of {text.num_hidden_layers}, heads {also} of {text.num_attention_heads}, "
        "averaged, counted from 0. Below each word: how much of its attention went to its hottest "
        "patch, of what went to the whole picture; the rest went to the text before it. "
    ) + look_draw.remarks(maps, found.box, found.picture.size)
    return look_draw.draw_words(found.picture, found.box, maps, found.question, note)
