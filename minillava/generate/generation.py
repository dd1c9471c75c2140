"""`generate`: a batch of prompts answered in one call, in any way of choosing tokens; `python -m
minillava.generate`.

B rows: prompts times num_return_sequences. m new tokens, n pictures, R their side in pixels, P
patches each, C width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillava.config import IMAGE_TOKEN_INDEX
from minillava.files.rows import as_rows
from minillava.generate import beam
from minillava.generate.inputs import join, repeat_rows
from minillava.generate.named import read_options
from minillava.llava import Llava, Spliced
from minillava.loop import Step, steps
from minillava.options import Options, remaining_context
from minillava.sampling import Process
from minillava.tokenizer import Tokenizer


@dataclass
class Generation:
    """What `generate` returns. A field that `record` did not name is None."""

    sequences: Tensor  # [B, m] new ids only, rows padded after their end token
    # per row, without special tokens and stop text; None without a tokenizer
    text: list[str] | None
    finish_reason: list[str]  # per row: "stop" or "length"
    # per row, (start, end) of each picture in the spliced prompt
    image_spans: list[list[tuple[int, int]]]
    seed: int | Sequence[int] | None  # reproduces this sample
    sequences_scores: Tensor | None = None  # [B] with beams, which are ranked by it
    scores: tuple[Tensor, ...] | None = None  # m times [B, V]
    logits: tuple[Tensor, ...] | None = None  # m times [B, V]
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # m times those of Step
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # m times those of Step


def generate(
    model: Llava,
    input_ids: Tensor | Sequence[Sequence[int]],
    images: Any = None,
    *,
    second: tuple[Tensor | Sequence[Sequence[int]], Any] | None = None,
    contrast: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    process: Process | None = None,
    record: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    follow: Callable[..., Iterator[Step]] = steps,
    **options,
) -> Generation:
    """Answer a batch of prompts: ragged rows of ids with -200 for each picture of `images`
    [n,3,R,R] (or [n,P,C], encoded already).

    second, contrast: (input_ids, images) of the rows that see another input, and the function that
    combines two rows of logits into one (`steps`; contrast.py has both). record: any of RECORDABLE
    (shapes as Hugging Face's generate). options: the fields of `Options` by name; any other name is
    a TypeError. process: f(scores [B,V], history [B,S]) -> scores [B,V], after contrast and
    penalties, before temperature and filters; history: the ids of prompt and answer, padding on the
    left as -1. num_beams above 1 is beam search (beam.py), without contrast; stop texts are then
    cut from the finished answers. follow: instead of `loop.steps`, say Drafts.steps. Raises
    ValueError for options out of range or a prompt that does not fit the model's context.
    """
    chosen = read_options(options)
    record = (record,) if isinstance(record, str) else record
    if second is not None or contrast is not None:
        input_ids, images = _add_second(input_ids, images, second, contrast)
    check_room(model, input_ids)
    with torch.no_grad():
        spliced = model.splice(input_ids, images)
    if chosen.num_beams > 1 and contrast is None:
        return _beam_search(model, spliced, chosen, tokenizer, record, process)
    spliced = repeat_rows(spliced, chosen.num_return_sequences)
    made = follow(
        model,
        spliced,
        chosen,
        tokenizer=tokenizer,
        record=record,
        contrast=contrast,
        process=process,
    )
    return _collect(made, spliced, chosen, record, tokenizer is not None)


def _add_second(
    input_ids: Tensor | Sequence[Sequence[int]],
    images: Any,
    second: tuple[Tensor | Sequence[Sequence[int]], Any] | None,
    contrast: Callable[[Tensor, Tensor, int], Tensor] | None,
) -> tuple[list[Sequence[int]], Any]:
    """The ids and pictures of the rows that answer, followed by those of the second rows. Raises
    ValueError if they do not fit together."""
    if isinstance(contrast, str | type):
        raise ValueError(
            f"contrast is {contrast!r}, expected a method such as VCD() with the rows of "
            "`second`; ask() takes names"
        )
    if second is None or contrast is None:
        raise ValueError(
            "second and contrast belong together: what else is seen, and how the two are combined"
        )
    if len(second[0]) != len(input_ids):
        raise ValueError(
            f"{len(input_ids)} rows of input_ids but {len(second[0])} second rows; give one for "
            "each"
        )
    both = [some for some in (images, second[1]) if isinstance(some, Tensor)]
    if len({some.shape[1:] if some.dim() == 4 else some.shape[2:] for some in both}) > 1:
        shapes = " and ".join(str(list(some.shape)) for some in both)
        raise ValueError(
            f"images and those of the second rows are {shapes}; encode both or neither"
        )
    return [*input_ids, *second[0]], join(images, second[1])


def check_room(model: Llava, input_ids: Tensor | Sequence[Sequence[int]]) -> None:
    """Raises ValueError as `remaining_context` does, before any embedding is looked up or picture
    encoded, since that would take gigabytes for a prompt of megabytes. input_ids: rows, with -200
    for each picture."""
    for ids in as_rows("input_ids", input_ids, "cpu"):
        pictures = int((ids == IMAGE_TOKEN_INDEX).sum())
        length = model.config.positions(len(ids), pictures)
        least = f"at least {model.config.tokens_per_image}" if model.config.grid else ""
        remaining_context(model.config, length, pictures, each=least)


def _collect(
    made: Iterator[Step],
    spliced: Spliced,
    chosen: Options,
    record: Sequence[str],
    with_text: bool,
) -> Generation:
    """Put the steps of a loop together into one Generation."""
    token_ids: list[Tensor] = []
    pieces: list[list[str]] = []
    kept: dict[str, list] = {name: [] for name in record}
    for step in made:
        token_ids.append(step.token_ids)
        pieces.append(step.text)
        for name in record:
            kept[name].append(vars(step)[name])
    return Generation(
        sequences=torch.stack(token_ids, dim=1),
        text=["".join(row) for row in zip(*pieces, strict=True)] if with_text else None,
        finish_reason=step.finish_reason,
        image_spans=spliced.image_spans[: len(step.ids)],
        seed=chosen.seed,
        **{name: tuple(values) for name, values in kept.items()},
    )


def _beam_search(
    model: Llava,
    spliced: Spliced,
    chosen: Options,
    tokenizer: Tokenizer | None,
    record: Sequence[str],
    process: Process | None,
) -> Generation:
    found = beam.search(model, spliced, chosen, tokenizer=tokenizer, record=record, process=process)
    return Generation(
        sequences=found.sequences,
        text=None if tokenizer is None else found.text,
        finish_reason=found.finish_reason,
        image_spans=[
            spans for spans in spliced.image_spans for _ in range(chosen.num_return_sequences)
        ],
        seed=chosen.seed,
        sequences_scores=found.scores,
        **found.recorded,
    )
