"""What a request may ask beyond OpenAI's fields: `look`, `contrast` and `prefix_ids`.

P patches of a picture, R its side in pixels for the model.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.assistant import Assistant
from minillava.config import LlavaConfig
from minillava.generate.contrast import METHODS, Contrast
from minillava.generate.engine import Token
from minillava.image import ImageProcessor
from minillava.look import run as looking
from minillava.options import Options
from minillava.serve.protocol import ApiError, ChatRequest, LookField
from minillava.tiles.pictures import Tiled, contents_of
from minillava.tokenizer import TextDecoder, Tokenizer


def invalid(told: str, param: str) -> ApiError:
    return ApiError(400, "invalid_value", told, param)


# --- contrast -------------------------------------------------------------------------------------


def read_contrast(asked: ChatRequest) -> Contrast | None:
    """The method that is asked for. Raises ApiError."""
    if asked.contrast is None:
        return None
    fields = {name: getattr(asked.contrast, name) for name in asked.contrast.__struct_fields__}
    given = {name: value for name, value in fields.items() if value is not None}
    kind = METHODS[given.pop("method")]
    for name in given:
        if name not in kind.__dataclass_fields__:
            known = ", ".join(kind.__dataclass_fields__)
            told = f"{name} does not belong to {asked.contrast.method}, whose fields are: {known}"
            raise invalid(told, f"contrast.{name}")
    try:
        return kind(**given)
    except ValueError as error:
        raise invalid(str(error), f"contrast.{str(error).partition(' is ')[0]}") from None


def second_prompt(
    method: Contrast,
    ids: Sequence[int],
    pictures: Sequence[Image.Image],
    processor: ImageProcessor,
    options: Options,
) -> tuple[Sequence[int], list[tuple[bytes, Tensor | Tiled]]]:
    """What the second row of an answer reads, by its seed, as `Assistant.ask` makes it: ids, and
    for each picture a name for its content and pixels [3,R,R]. Raises ApiError."""
    generator = torch.Generator().manual_seed(int(options.seed or 0))  # type: ignore[arg-type]
    try:
        (row,), pixels = method.second([ids], pictures, processor, generator)
    except ValueError as error:
        raise invalid(str(error), "contrast") from None
    changed = [] if pixels is None else list(pixels)
    # The same noise of the same picture is encoded once, so its name is its content's.
    return row, [(hashlib.sha256(contents_of(each)).digest(), each) for each in changed]


# --- prefix_ids -----------------------------------------------------------------------------------


def read_prefix(asked: ChatRequest, config: LlavaConfig) -> list[int]:
    """The ids with which the answer begins. Raises ApiError for ids that no answer has."""
    prefix = asked.prefix_ids or []
    for i, token_id in enumerate(prefix):
        if token_id >= config.text.vocab_size or token_id == config.image_token_id:
            told = f"there is no token {token_id}; the vocabulary has {config.text.vocab_size}"
            raise invalid(told, f"prefix_ids[{i}]")
        if token_id in config.eos_token_ids:
            told = f"{token_id} ends an answer, so nothing can follow it; leave it out"
            raise invalid(told, f"prefix_ids[{i}]")
    return prefix


def count_from(prefix: Sequence[int], options: Options) -> Options:
    """For the engine a prefix is a part of the answer, but a request counts what is new."""
    least = options.min_new_tokens
    return replace(
        options,
        max_new_tokens=options.max_new_tokens + len(prefix),
        min_new_tokens=least + len(prefix) if least else 0,
    )


# --- look -----------------------------------------------------------------------------------------


def read_look(
    asked: ChatRequest, config: LlavaConfig, pictures: int
) -> tuple[list[int], list[int]] | None:
    """The layers and heads over which maps are averaged. Raises ApiError."""
    if not asked.look:
        return None
    if pictures != 1:
        raise invalid(f"look needs a conversation with one picture, found {pictures}", "look")
    given, text = asked.look, config.text
    chosen = given if isinstance(given, LookField) else LookField()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    counts = {"layers": layers, "heads": heads}
    for name, count in counts.items():
        numbers = getattr(chosen, name)
        if numbers is not None and (not numbers or max(numbers) >= count):
            told = f"{name} is {numbers}, expected some of 0 to {count - 1}"
            raise invalid(told, f"look.{name}")
    return (
        looking.default_layers(layers) if chosen.layers is None else chosen.layers,
        list(range(heads)) if chosen.heads is None else chosen.heads,
    )


def look_head(
    assistant: Assistant, size: tuple[int, int], look: tuple[list[int], list[int]]
) -> dict[str, Any]:
    """What maps are to be read with. size: width and height of the picture in pixels; box: the
    square of patches in it."""
    vision = assistant.model.config.vision
    box = looking.patch_box(size, assistant.image_processor, vision)
    side = math.isqrt(vision.num_patches)
    picture = {"size": size, "box": box, "side": side}
    return {"picture": picture, "layers": look[0], "heads": look[1]}


class Seen:
    """The maps of one answer's tokens. prefix: the ids with which it began; words are counted from
    its first one on."""

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int]):
        self.decoder, self.before, self.word = TextDecoder(tokenizer), "", -1
        self.held: list[tuple[int, np.ndarray]] = []  # half a character's ids and maps
        self.tokens: list[looking.Token] = []
        for token_id in prefix:
            if piece := self.decoder.feed(token_id):
                self._number(piece)

    def _number(self, piece: str) -> int | None:
        """The number of the word that a piece is of; None for a space between words."""
        if not piece.strip():
            self.before = piece
            return None
        if looking.begins_word(self.before, piece):
            self.word += 1
        self.before = piece
        return self.word

    def entry(self, event: Token) -> list[dict[str, Any]]:
        """One entry for a token, with those before it that had not completed a character; none for
        half a character, and for the end token."""
        piece, heat = self.decoder.feed(event.id), event.heat.numpy()  # type: ignore[union-attr]
        self.tokens.append(looking.Token(event.id, piece, heat))
        self.held.append((event.id, heat))
        if not piece:
            return []
        ids, heats = zip(*self.held, strict=True)
        self.held, mean = [], np.mean(heats, axis=0)  # [P]
        peak = float(mean.max())
        levels = np.round(255 * mean / max(peak, 1e-12)).astype(np.uint8)
        found = {"text": piece, "ids": ids, "word": self._number(piece)}
        shares = {"share": float(mean.sum()), "peak": peak}
        return [found | shares | {"map": base64.b64encode(levels.tobytes()).decode()}]

    def words(self, text: str) -> list[dict[str, Any]]:
        """The words of the whole answer `text`, as `look --json` has them, with the maps in base64:
        float32, little-endian, row by row."""
        looking.cut_pieces(self.tokens, len(text))
        return [
            {
                "text": word.text,
                "token_ids": word.token_ids,
                "share": float(word.heat.sum()),
                "map": base64.b64encode(word.heat.astype("<f4").tobytes()).decode(),
            }
            for word in looking.words_of(self.tokens)
        ]
