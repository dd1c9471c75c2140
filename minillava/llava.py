"""LLaVA: the vision tower, the projector and the language model, the splice that joins them, and
the loss.

B batch, t tokens of a row before the splice, T after it, n pictures, R their side in pixels, P
patches each, C width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.attention import fused
from minillava.cache import KVCache
from minillava.config import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig
from minillava.files.rows import as_rows, check_ids, check_images, check_lengths, grow_rows
from minillava.llama import LanguageModel, upcast
from minillava.projector import Projector
from minillava.vision import VisionTower


@dataclass
class Spliced:
    """A batch after the splice: one vector per token or patch, rows padded on the left to one
    length."""

    embeds: Tensor  # [B, T, C]
    token_ids: Tensor  # [B, T], config.image_token_id at every patch, -1 where padding
    padding_mask: Tensor | None  # bool [B, T], False where padding; None if nothing is
    labels: Tensor | None  # [B, T]
    image_spans: list[list[tuple[int, int]]]  # per row, (start, end) of each picture in 0..T


@dataclass
class LlavaOutput:
    logits: Tensor  # [B, T, V]
    loss: Tensor | None
    padding_mask: Tensor | None  # bool [B, T], False where padding; None if nothing is
    image_spans: list[list[tuple[int, int]]]


class Llava(nn.Module):
    """LLaVA-1.5 (Liu et al. 2023). `attend` is `eager` or `fused` of attention.py."""

    def __init__(self, config: LlavaConfig, attend: Callable[..., Any] = fused):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config, attend)
        self.projector = Projector(config)
        self.language_model = LanguageModel(config.text, attend)
        self.decoding: Callable[..., Any] | None = None  # None: loop.decode_in_turn, the plain one

    def forward(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        images: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
        cache: KVCache | None = None,
    ) -> LlavaOutput:
        """Logits for every position, and the loss when labels are given.

        input_ids: [B,t] or ragged rows; each -200 stands for the next of `images`, in row order:
        pixels [n,3,R,R], or [n,P,C] as `encode_images` made them, or one [P,C] for each, of which P
        may differ. attention_mask: [B,t], 0 for padding that is in input_ids. labels: like
        input_ids, -100 where ignored. Raises ValueError when the number of -200 differs from the
        number of pictures.
        """
        spliced = self.splice(input_ids, images, attention_mask, labels)
        # [B, T, V]
        logits = self.language_model(spliced.embeds, spliced.padding_mask, cache).logits
        loss = None if spliced.labels is None else next_token_loss(logits, spliced.labels)
        return LlavaOutput(logits, loss, spliced.padding_mask, spliced.image_spans)

    def resize_token_embeddings(self, rows: int) -> None:
        """Grow the vocabulary to `rows` tokens; new ones start as the mean of the old. Raises
        ValueError if it would shrink."""
        language, text = self.language_model, replace(self.config.text, vocab_size=rows)
        with torch.no_grad():
            table = grow_rows(language.embed_tokens.weight, rows)  # [V, C] -> [rows, C]
            language.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
            if not text.tie_word_embeddings:
                language.lm_head.weight = nn.Parameter(grow_rows(language.lm_head.weight, rows))
                language.lm_head.out_features = rows
        language.config, self.config = text, replace(self.config, text=text)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, R, R] -> [n, P, C]: each picture as P vectors of the language model's width."""
        return self.projector(self.vision_tower(pixel_values))

    def splice(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        images: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Sequence[Sequence[int]] | None = None,
    ) -> Spliced:
        """Look up the words, put each picture's patches where its -200 stands, pad the rows.

            input_ids    1  -200  7  8        │  1  9
            embeds       w  p p p p  w  w     │  0 0 0 0 0  w  w      w a word, p a patch
            position     0  1 2 3 4  5  6     │  0 0 0 0 0  0  1      in llama.py
            image_spans  [(1, 5)]             │  []

        Arguments as in `forward`. Padding that comes in input_ids stays where it is; shorter rows
        are padded on the left, so that every row ends where its answer begins.
        """
        device = self.language_model.embed_tokens.weight.device
        rows = as_rows("input_ids", input_ids, device)  # B times [t]
        ones, ignored = ([torch.full_like(r, fill) for r in rows] for fill in (1, IGNORE_INDEX))
        masks = as_rows(
            "attention_mask", ones if attention_mask is None else attention_mask, device
        )
        targets = as_rows("labels", ignored if labels is None else labels, device)
        self._check(rows, masks, targets, images)
        if isinstance(images, Tensor) and images.dim() == 4:
            images = self.encode_images(images.to(device))
        pictures = iter([] if images is None else [patches.to(device) for patches in images])

        spliced = [
            self._splice_row(ids, mask.bool(), target, pictures)
            for ids, mask, target in zip(rows, masks, targets, strict=True)
        ]
        embeds, token_ids, masks, targets, spans = map(list, zip(*spliced, strict=True))
        padding_mask = pad_left(masks, False)  # [B, T]
        pads = [padding_mask.shape[1] - len(row) for row in embeds]
        return Spliced(
            embeds=pad_left(embeds, 0),
            token_ids=pad_left(token_ids, -1),
            padding_mask=None if padding_mask.all() else padding_mask,
            labels=None if labels is None else pad_left(targets, IGNORE_INDEX),
            image_spans=[
                [(a + pad, b + pad) for a, b in row] for row, pad in zip(spans, pads, strict=True)
            ],
        )

    def _splice_row(
        self, ids: Tensor, padding_mask: Tensor, labels: Tensor, pictures: Iterator[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, int]]]:
        """One row: ids, padding mask and labels [t], and the next of `pictures` [P, C] for each
        -200 -> embeds [T, C], token ids, padding mask and labels [T], and each picture's span in
        0..T."""
        is_image = ids == IMAGE_TOKEN_INDEX  # [t]
        words = self.language_model.embed_tokens(ids.masked_fill(is_image, 0))  # [t, C]
        parts = list(words.split(1))  # t times [1, C]
        places = is_image.nonzero().flatten().tolist()
        for at in places:
            parts[at] = next(pictures)  # [P, C] where the -200 stood
        ends = list(accumulate(map(len, parts)))
        spans = [(ends[at] - len(parts[at]), ends[at]) for at in places]

        counts = torch.tensor([len(part) for part in parts], device=ids.device)  # [t]
        padding_mask = padding_mask.repeat_interleave(counts)
        token_ids = ids.masked_fill(is_image, self.config.image_token_id).repeat_interleave(counts)
        labels = labels.masked_fill(is_image, IGNORE_INDEX).repeat_interleave(counts)
        token_ids = token_ids.masked_fill(~padding_mask, -1)
        return torch.cat(parts), token_ids, padding_mask, labels, spans

    def _check(
        self, rows: list[Tensor], masks: list[Tensor], labels: list[Tensor], images: Any
    ) -> None:
        check_lengths(rows, {"attention_mask": masks, "labels": labels})
        placed = sum(int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows)
        check_images(images, self.config.text.hidden_size, placed, IMAGE_TOKEN_INDEX)
        vocabulary = self.config.text.vocab_size
        check_ids("token id", rows, vocabulary, [IMAGE_TOKEN_INDEX])
        check_ids("label", labels, vocabulary, [IGNORE_INDEX, IMAGE_TOKEN_INDEX])


def pad_left(rows: list[Tensor], value: int | bool) -> Tensor:
    """Rows of unequal length, B times [T, ...], as one tensor [B, T, ...]; the shorter ones begin
    with `value`, so that all end together."""
    longest = max(map(len, rows))
    pads = [row.new_full((longest - len(row), *row.shape[1:]), value) for row in rows]
    return torch.stack([torch.cat(pair) for pair in zip(pads, rows, strict=True)])


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, "mean" or "sum", of predicting each label from the position before it. logits
    [B,T,V], labels [B,T].

    In float32, as in transformers, since it sums over the whole vocabulary. Raises ValueError when
    every label is ignored: the mean over nothing is NaN.
    """
    # [B, T]: position t predicts token t + 1
    following = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    if (following == IGNORE_INDEX).all():
        raise ValueError(
            f"every label is ignored ({IGNORE_INDEX}): there is nothing to take a loss of"
        )
    logits, following = upcast(logits).flatten(0, 1), following.flatten()
    return F.cross_entropy(logits, following, ignore_index=IGNORE_INDEX, reduction=reduction)
