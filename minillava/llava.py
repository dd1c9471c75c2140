"""LLaVA: the vision tower, the projector and the language model, and the splice that joins them.

B batch, t tokens of a row before the splice, T after it, n pictures, R their side in pixels, P
patches each, C width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.attention import fused
from minillava.cache import KVCache
from minillava.config import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig
from minillava.llama import LanguageModel
from minillava.projector import Projector
from minillava.vision import VisionTower


@dataclass
class Spliced:
    """A batch after the splice: one vector per token or patch, rows padded on the left to one
    length."""

    embeds: Tensor  # [B, T, C]
    attention_mask: Tensor | None  # bool [B, T], False where padding; None when nothing is padding
    labels: Tensor | None  # [B, T]
    image_spans: list[list[tuple[int, int]]]  # per row, (start, end) of each picture in 0..T
    input_ids: list[Tensor]  # per row, the ids before the splice, without padding

    def repeat_rows(self, times: int) -> "Spliced":
        """Every row `times` times, in adjacent rows."""
        if times == 1:
            return self

        def again(value: Any) -> Any:
            if isinstance(value, list):
                return [item for item in value for _ in range(times)]
            return None if value is None else value.repeat_interleave(times, dim=0)

        return Spliced(*(again(value) for value in vars(self).values()))


@dataclass
class LlavaOutput:
    logits: Tensor  # [B, T, V]
    loss: Tensor | None
    attention_mask: Tensor | None  # bool [B, T]
    image_spans: list[list[tuple[int, int]]]


class Llava(nn.Module):
    """LLaVA-1.5 (Liu et al. 2023). `attend` is `eager` or `fused` of attention.py."""

    def __init__(self, config: LlavaConfig, attend: Callable[..., Any] = fused):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config, attend)
        self.projector = Projector(config)
        self.language_model = LanguageModel(config.text, attend)
        self.decoding: Callable[..., Any] | None = None  # of fast/; None: loop.decode_in_turn

    def forward(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
        cache: KVCache | None = None,
    ) -> LlavaOutput:
        """Logits for every position, and the loss when labels are given.

        input_ids: [B,t] or ragged rows; each -200 stands for the next of `images`, in row order:
        pixels [n,3,R,R], or [n,P,C] as `encode_images` made them. attention_mask: [B,t], 0 for
        padding that is in input_ids. labels: like input_ids, -100 where ignored. Raises ValueError
        when the number of -200 differs from the number of pictures.
        """
        spliced = self.splice(input_ids, images, attention_mask, labels)
        # [B, T, V]
        logits = self.language_model(spliced.embeds, spliced.attention_mask, cache).logits
        loss = None if spliced.labels is None else next_token_loss(logits, spliced.labels)
        return LlavaOutput(logits, loss, spliced.attention_mask, spliced.image_spans)

    def resize_token_embeddings(self, rows: int) -> None:
        """Grow the vocabulary to `rows` tokens; new ones start as the mean of the old. Raises
        ValueError when it would shrink."""
        self.language_model.resize_token_embeddings(rows)
        self.config = replace(self.config, text=self.language_model.config)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, R, R] -> [n, P, C]: each picture as P vectors of the language model's width."""
        return self.projector(self.vision_tower(pixel_values))

    def splice(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        images: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Spliced:
        """Look up the words, encode the pictures, and put each picture's patches where its -200
        stands.

        Arguments as in `forward`. Padding that comes in input_ids stays where it is; rows of
        unequal length are padded on the left, so that every row ends where its answer begins.
        """
        device = self.language_model.embed_tokens.weight.device
        rows = as_rows("input_ids", input_ids, device)
        masks = as_rows(
            "attention_mask",
            [[1] * len(r) for r in rows] if attention_mask is None else attention_mask,
            device,
        )
        targets = as_rows(
            "labels", [[IGNORE_INDEX] * len(r) for r in rows] if labels is None else labels, device
        )
        self._check(rows, masks, targets, images)
        if images is not None and images.dim() == 4:
            images = self.encode_images(images.to(device))
        features = iter(() if images is None else images.to(device))  # n times [P, C]

        embeds, kept, targeted, spans = [], [], [], []  # per row, what Spliced holds per batch
        for ids, mask, target in zip(rows, masks, targets, strict=True):
            is_image = ids == IMAGE_TOKEN_INDEX  # [t]
            # [t, C], unused where is_image
            words = self.language_model.embed_tokens(ids.masked_fill(is_image, 0))
            parts, row_spans = [], []
            start, length = 0, 0  # the next token to take, and how long the row has become
            for at in is_image.nonzero().flatten().tolist():
                patches = next(features)  # [P, C]
                length += at - start
                row_spans.append((length, length + len(patches)))
                length += len(patches)
                parts += [words[start:at], patches]
                start = at + 1
            embeds.append(torch.cat([*parts, words[start:]]))
            repeats = torch.where(is_image, self.config.tokens_per_image, 1)  # [t]
            kept.append(mask.bool().repeat_interleave(repeats))
            targeted.append(target.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(repeats))
            spans.append(row_spans)

        longest = max(map(len, embeds))
        pads = [longest - len(e) for e in embeds]
        real = torch.stack([F.pad(m, (p, 0), value=False) for m, p in zip(kept, pads, strict=True)])
        wanted = torch.stack(
            [F.pad(t, (p, 0), value=IGNORE_INDEX) for t, p in zip(targeted, pads, strict=True)]
        )
        return Spliced(
            embeds=torch.stack([F.pad(e, (0, 0, p, 0)) for e, p in zip(embeds, pads, strict=True)]),
            attention_mask=None if real.all() else real,
            labels=None if labels is None else wanted,
            image_spans=[
                [(a + p, b + p) for a, b in row] for row, p in zip(spans, pads, strict=True)
            ],
            input_ids=[ids[mask.bool()] for ids, mask in zip(rows, masks, strict=True)],
        )

    def _check(
        self, rows: list[Tensor], masks: list[Tensor], labels: list[Tensor], images: Tensor | None
    ) -> None:
        if not rows or not all(len(r) for r in rows):
            raise ValueError(
                "input_ids has no row or an empty row: every row needs at least one token"
            )
        lengths = [len(r) for r in rows]
        for name, other in (("attention_mask", masks), ("labels", labels)):
            if (found := [len(r) for r in other]) != lengths:
                raise ValueError(f"{name} has rows of {found} tokens, input_ids of {lengths}")
        placed = sum(int((r == IMAGE_TOKEN_INDEX).sum()) for r in rows)
        encoded = [self.config.tokens_per_image, self.config.text.hidden_size]
        if images is not None and (
            not isinstance(images, Tensor)
            or not (images.dim() == 4 or list(images.shape[1:]) == encoded)
        ):
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"images are {found}, expected a tensor [n, 3, R, R] as image_processor makes it, "
                f"or {['n', *encoded]} as encode_images does".replace("'", "")
            )
        if placed != (given := 0 if images is None else len(images)):
            raise ValueError(
                f"input_ids place {placed} picture(s) with {IMAGE_TOKEN_INDEX}, but {given} were "
                "given"
            )
        vocabulary = self.config.text.vocab_size
        for name, values, besides in (
            ("token id", rows, IMAGE_TOKEN_INDEX),
            ("label", labels, IGNORE_INDEX),
        ):
            for row in values:
                wrong = row[
                    ((row < 0) & (row != besides) & (row != IMAGE_TOKEN_INDEX))
                    | (row >= vocabulary)
                ]
                if len(wrong):
                    raise ValueError(
                        f"{name} {int(wrong[0])} is outside this model's vocabulary of {vocabulary}"
                    )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each label from the position before it. logits [B,T,V],
    labels [B,T].

    In float32, as in transformers, since it sums over the whole vocabulary. Raises ValueError when
    every label is ignored: the mean over nothing is NaN.
    """
    # [B, T]: position t predicts token t + 1
    following = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    if (following == IGNORE_INDEX).all():
        raise ValueError(
            f"every label is ignored ({IGNORE_INDEX}): there is nothing to take a loss of"
        )
    logits = upcast(logits)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE_INDEX)


def upcast(logits: Tensor) -> Tensor:
    """Float32 or better. What follows divides, exponentiates and sums over the whole vocabulary; in
    half precision it would round tokens into ties that the model did not mean. transformers copies
    to float32 at the same place."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_rows(name: str, ids: Tensor | Sequence[Sequence[int]], device: Any) -> list[Tensor]:
    """A batch as a list of 1-D tensors; one flat row is taken as a batch of one. Raises ValueError
    for other shapes."""
    rows = [torch.as_tensor(r, dtype=torch.long, device=device) for r in ids]
    if rows and all(r.dim() == 0 for r in rows):
        rows = [torch.stack(rows)]
    if any(r.dim() != 1 for r in rows):
        raise ValueError(
            f"{name} has rows of shape {[list(r.shape) for r in rows]}, expected rows of numbers"
        )
    return rows
