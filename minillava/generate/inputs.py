"""Questions and pictures as the model's input, and the second input of contrast.

n pictures, R their side in pixels, P patches each, C width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillava.files.byte_json import BytePieces
from minillava.files.pictures import Images, ImageSource, are_several, as_list, open_image
from minillava.generate.contrast import Contrast
from minillava.image import ImageProcessor
from minillava.llava import Llava, Spliced
from minillava.prompt import IMAGE_MARKER
from minillava.tiles.pictures import Tiled
from minillava.tokenizer import Tokenizer

Rows = list[list[int]]

Pixels = Tensor | Sequence[Tiled]
"""Pictures as an image processor makes them."""

Seed = int | Sequence[int] | None
"""As `Options` has it: one for all rows, or one each; None as 0."""


VIDEO_MARKER = "<video>"
"""A token of LLaVA-OneVision, for what is not read here."""


def check_readable(text: str, tokenizer: Tokenizer, context: int) -> None:
    """Raises ValueError for a text that places a video, or that cannot fit into the context,
    whatever its tokens are: to cut tens of megabytes into tokens only to count them would take
    gigabytes."""
    if VIDEO_MARKER in text and VIDEO_MARKER in tokenizer.added:
        raise ValueError(
            f"the prompt has {VIDEO_MARKER}, but videos are not read; give some frames as pictures"
        )
    if len(text) <= context:  # a token has a character at least
        return
    fewest = fewest_tokens(text, tokenizer)
    if fewest > context:
        raise ValueError(
            f"the prompt has {len(text)} characters, at least {fewest} tokens; the model's context "
            f"holds {context} with the answer; shorten the prompt"
        )


def fewest_tokens(text: str, tokenizer: Tokenizer) -> int:
    """How many a text becomes at least, told without cutting it."""
    takers = (t.text for t in tokenizer.by_id.values() if t.lstrip or t.rstrip)
    taken = sum(map(str.isspace, text)) if any(taker in text for taker in takers) else 0
    return -(-(len(text) - taken) // longest_piece(tokenizer))


def longest_piece(tokenizer: Tokenizer) -> int:
    """The most characters that one token stands for, without whitespace that it may take."""
    model = tokenizer.sentencepiece
    pieces = map(model.id_to_piece, range(tokenizer.vocab_size))
    added = (token.text for token in tokenizer.by_id.values())
    longest = max(map(len, (*pieces, *added, IMAGE_MARKER)))
    # bytes are counted after NFC, which may join an a and two accents (ǟ) into two bytes
    return 2 * longest if isinstance(model, BytePieces) else longest


def pictures_of_each(image: Images | Sequence[Images], questions: int) -> list[list[ImageSource]]:
    """The pictures of each question: the same for all, or a list with those of each. Raises
    ValueError if there are not as many as questions."""
    given = list(image) if are_several(image) else [image] * questions
    if len(given) != questions:
        raise ValueError(
            f"{questions} question(s) but {len(given)} picture(s); give one per question, or one"
        )
    return [as_list(images) for images in given]


def encode_each(
    pictures: Sequence[Sequence[ImageSource]],
    encode: Callable[..., Tensor],
    change: bool = False,
) -> Tensor | None:
    """The pictures of all questions in order, [n, P, C]; a picture that occurs twice is encoded
    once. None if there are none. change: with others it is another one, encode(picture, True)."""
    flat = [(picture, change and len(own) > 1) for own in pictures for picture in own]
    names = [(str(p) if isinstance(p, (str, Path)) else id(p), among) for p, among in flat]
    encoded = {
        name: encode(picture, True) if among else encode(picture)
        for name, (picture, among) in dict(zip(names, flat, strict=True)).items()
    }
    return together([encoded[name] for name in names])


@torch.no_grad()
def encode_pixels(model: Llava, pixels: Pixels) -> Any:
    """[n, 3, R, R] -> [n, P, C], or pictures in tiles -> n times [positions, C]"""
    if isinstance(pixels, Tensor):
        pixels = pixels.to(model.language_model.embed_tokens.weight.device)
    return model.encode_images(pixels)  # type: ignore[arg-type]


def encode_picture(model: Llava, pixels: Tensor | Tiled) -> Tensor:
    """One picture, [3, R, R] or in tiles -> [positions, C]"""
    one = pixels[None] if isinstance(pixels, Tensor) else [pixels]
    return encode_pixels(model, one)[0]


def together(patches: Sequence[Tensor]) -> Any:
    """Encoded pictures as the splice takes them: [n, P, C], or a list where their lengths
    differ."""
    alike = len({len(each) for each in patches}) == 1
    return torch.stack(list(patches)) if alike else list(patches) or None


def join(some: Any, more: Any) -> Any:
    """Pictures followed by others of the same kind: tensors or lists; None is none."""
    if some is None or more is None:
        return more if some is None else some
    if isinstance(some, Tensor) and isinstance(more, Tensor) and some.shape[1:] == more.shape[1:]:
        return torch.cat([some, more.to(some.device)])
    return [*some, *more]


@torch.no_grad()
def splice_one(
    model: Llava,
    processor: ImageProcessor,
    ids: list[int],
    pictures: list[ImageSource],
    contrast: Contrast | None,
    seed: Seed,
) -> Spliced:
    """One prompt and its pictures as the vectors that the language model reads: one row, and a
    second row if there is a `contrast`."""
    if contrast is None:
        return model.splice([ids], processor(pictures))
    opened = [open_image(picture) for picture in pictures]
    pixels = processor(opened)  # [n, 3, R, R]
    others, changed = contrast.second([ids], opened, processor, _generators(seed, 1)[0])
    return model.splice([ids, *others], join(pixels, changed))


def second_rows(
    model: Llava,
    processor: ImageProcessor,
    ids: Rows,
    pictures: Sequence[Sequence[ImageSource]],
    contrast: Contrast,
    seed: Seed,
) -> tuple[Rows, Tensor | None]:
    """The second input of `contrast` for each prompt: ids, and encoded pictures [n, P, C]."""
    others: Rows = []
    changed: list[Tensor] = []
    for row, own, generator in zip(ids, pictures, _generators(seed, len(ids)), strict=True):
        opened = [open_image(picture) for picture in own]
        more, pixels = contrast.second([row], opened, processor, generator)
        others += more
        changed += [] if pixels is None else encode_pixels(model, pixels)
    return others, together(changed)


def _generators(seed: Seed, rows: int) -> list[torch.Generator]:
    """For each row the generator of random numbers for its second input. If each row has a seed,
    each has its own generator; with one seed for all, the rows share one generator."""
    if seed is None or isinstance(seed, int):
        return [torch.Generator().manual_seed(seed or 0)] * rows
    return [torch.Generator().manual_seed(each) for each in seed]


def repeat_rows(spliced: Spliced, times: int) -> Spliced:
    """Repeat every row `times` times, in adjacent rows."""
    if times == 1:
        return spliced

    def again(value: Any) -> Any:
        if isinstance(value, list):
            return [item for item in value for _ in range(times)]
        return None if value is None else value.repeat_interleave(times, dim=0)

    return Spliced(*(again(value) for value in vars(spliced).values()))
