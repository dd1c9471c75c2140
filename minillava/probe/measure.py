"""A question and its answer as one sequence: how likely each word is, and how likely it becomes
when something is changed.

Every token of the answer is chosen by the position before it. So one pass over prompt and answer
tells the probability of all its tokens, each given those before it, whatever was changed.

T positions of the prompt, m tokens of the answer, S = T + m - 1 positions that are read, P patches,
C width, V vocabulary, B rows.
"""

import math

import numpy as np
import torch
from torch import Tensor

from minillava.assistant import Assistant
from minillava.cli.hooks import Hooks, uncompiled
from minillava.files.pictures import Images, as_list, open_image
from minillava.look.run import (
    default_layers,
    follow,
    join_words,
    patch_span,
    seen_box,
    words_of,
)
from minillava.options import Options
from minillava.prompt import DEFAULT_PROMPT

ROWS = 8
"""Changed copies of the sequence that are read at once."""


class Answered:
    """An answer that was given, ready to be measured.

    embeds [1, S, C]: what the language model read. patches: where the picture's patches are in it.
    picture_end: where the text after the picture begins. first: the position that chose the
    answer's first token. words: text and tokens (by number) of each word.
    """

    @torch.no_grad()
    def __init__(
        self,
        assistant: Assistant,
        image: Images,
        question: str = DEFAULT_PROMPT,
        options: Options | None = None,
        *,
        system: str | None = None,
        **settings,
    ):
        """Ask. Arguments as for `look`. Raises ValueError for another number of pictures than one,
        and for an answer without words."""
        if len(as_list(image)) != 1:
            raise ValueError(f"probe needs one picture with patches, found {len(as_list(image))}")
        self.assistant, self.question = assistant, question
        self.model = uncompiled(assistant.model)
        self.picture = open_image(*as_list(image))
        self.box = seen_box(self.picture.size, assistant.image_processor)
        text = self.model.config.text
        self.layers = default_layers(text.num_hidden_layers)  # of the attention map
        spliced = assistant.prepare(self.picture, assistant.prompt(question, 1, system))
        self.patches, self.picture_end = (
            patch_span(self.model, spliced),
            spliced.image_spans[0][0][1],
        )
        self.picture_start = spliced.image_spans[0][0][0]
        chosen = assistant.options(options, **settings)
        heads = list(range(text.num_attention_heads))
        self.text, tokens = follow(assistant, spliced, chosen, self.layers, heads, None)
        self.ids = [token.id for token in tokens]
        self.words = join_words([token.piece for token in tokens])
        if not self.words:
            raise ValueError("the answer has no words: there is nothing to measure")
        self.attention = [word.heat for word in words_of(tokens)]  # [G, G] each
        language = self.model.language_model
        ids = torch.tensor([self.ids[:-1]], dtype=torch.long, device=spliced.embeds.device)
        self.embeds = torch.cat([spliced.embeds, language.embed_tokens(ids)], dim=1)
        self.first = spliced.embeds.shape[1] - 1
        self.clean = self.log_probs(self.embeds)[0]  # [m]

    @property
    def grid(self) -> int:
        """Patches a side."""
        return math.isqrt(self.patches[1] - self.patches[0])

    def logits(self, embeds: Tensor) -> Tensor:
        """Of each token of the answer, by the position before it: [B, S, C] -> [B, m, V] in float32
        or better."""
        return logits(self.model.language_model, embeds, self.first)

    @torch.no_grad()
    def log_probs(self, embeds: Tensor) -> Tensor:
        """Of the answer's tokens, in nats, when this is read: [B, S, C] -> [B, m]."""
        ids = torch.tensor(self.ids, device=embeds.device)
        likely = self.logits(embeds).log_softmax(-1)  # [B, m, V]
        return likely[:, torch.arange(len(ids)), ids]

    @torch.no_grad()
    def drops(self, embeds: Tensor) -> np.ndarray:
        """How much less likely each token became, in nats: [B, S, C] -> float64 [B, m]. Read a few
        rows at a time."""
        lost = [self.clean - self.log_probs(rows) for rows in embeds.split(ROWS)]
        return torch.cat(lost).cpu().double().numpy()

    def by_word(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens [..., m], summed to those of words [..., words]: a word is as likely as
        its tokens one after the other."""
        return np.stack([tokens[..., parts].sum(-1) for _, parts in self.words], axis=-1)


def logits(language, embeds: Tensor, first: int) -> Tensor:  # type: ignore[no-untyped-def]
    """Those of position `first` and all after it, [B, m, V] in float32 or better; the head is not
    run on the others."""
    kept = []
    with Hooks() as hooks:
        hooks.after(language.norm, lambda module, given, output: kept.append(output[:, first:]))
        language(embeds, last_only=True)
    found = language.head(kept[0])
    return found.to(torch.promote_types(found.dtype, torch.float32))
