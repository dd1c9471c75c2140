"""A question and its answer as one sequence: how likely each word is, and how likely it becomes
when something is changed.

Every token of the answer is chosen by the position before it. So one pass over prompt and answer
tells the probability of all its tokens, each given those before it, whatever was changed.

T positions of the prompt, m tokens of the answer, S = T + m - 1 positions that are read, P patches,
C width, V vocabulary, B rows.
"""

import math
import time

import numpy as np
import torch
from torch import Tensor

from minillava.assistant import Assistant
from minillava.cli.hooks import step_by_step
from minillava.files.pictures import Images, as_list, open_image
from minillava.look.run import (
    default_layers,
    follow,
    join_words,
    patch_box,
    patch_span,
    words_of,
)
from minillava.options import Options
from minillava.probe.again import Pass
from minillava.prompt import DEFAULT_PROMPT
from minillava.tiles.pictures import TileProcessor

TIMED = 0.3
"""Seconds from which a measured time is one to reckon with."""


class Answered:
    """An answer that was given, ready to be measured.

    embeds [1, S, C]: what the language model read; kept: the pass over it. patches: where the
    picture's patches are in it. picture_end: where the text after the picture begins. first: the
    position that chose the answer's first token. words: text and tokens (by number) of each word.
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
        if isinstance(assistant.image_processor, TileProcessor):
            raise ValueError(
                "probe hides patches of one square, and this model reads tiles; give "
                "--image-aspect-ratio squash, with which it reads the overview alone"
            )
        self.assistant, self.question = assistant, question
        self.model = step_by_step(assistant.model)
        self.picture = open_image(*as_list(image))
        config = self.model.config
        self.box = patch_box(self.picture.size, assistant.image_processor, config.vision)
        text = config.text
        self.layers = default_layers(text.num_hidden_layers)  # of the attention map
        spliced = assistant.prepare(self.picture, assistant.prompt(question, 1, system))
        self.patches = patch_span(self.model, spliced)
        self.picture_start, self.picture_end = spliced.image_spans[0][0]
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
        self.kept = Pass(language, self.embeds)
        self.clean = self.log_probs(self.kept.states[-1])[0]  # [m]

    @property
    def grid(self) -> int:
        """Patches a side."""
        return math.isqrt(self.patches[1] - self.patches[0])

    @torch.no_grad()
    def log_probs(self, last: Tensor, start: int = 0) -> Tensor:
        """Of the answer's tokens, in nats: last states of the positions from `start` [B, T, C] ->
        float64 [B, m]. In float32 a probability near 1 is rounded to 1, and a small loss would be
        an error of rounding."""
        language, ids = self.model.language_model, self.ids
        logits = language.head(language.norm(last[:, self.first - start :]))  # [B, m, V]
        if logits.device.type == "mps":  # has no float64
            logits = logits.cpu()
        return logits.double().log_softmax(-1)[:, torch.arange(len(ids)), ids]

    @torch.no_grad()
    def drops(self, states: Tensor, start: int = 0, layer: int = 0) -> np.ndarray:
        """How much less likely each token became, in nats, if these states [B, T, C] go into a
        layer at the positions from `start`: float64 [B, m]. They go in as one batch, since an
        intervention may differ from row to row; `at_once` says how many fit."""
        lost = self.clean - self.log_probs(self.kept.again(states, start, layer), start)
        return lost.cpu().numpy()

    def at_once(self, start: int = 0) -> int:
        """How many rows are computed at once, if the first changed position is `start`."""
        return self.kept.rows_at_once(self.embeds.shape[1] - start, len(self.ids))

    def pace(self) -> float:
        """Seconds that one position takes in one layer, timed here."""
        rows, took = 1, self.kept.seconds
        while took < TIMED and rows < self.at_once():
            rows *= 2
            started = time.perf_counter()
            self.drops(self.embeds.repeat(rows, 1, 1))
            took = time.perf_counter() - started
        return took / (rows * self.whole())

    def whole(self) -> int:
        """What one row is, all of it, in positions times layers."""
        return self.embeds.shape[1] * len(self.model.language_model.layers)

    def by_word(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens [..., m], summed to those of words [..., words]: a word is as likely as
        its tokens one after the other."""
        return np.stack([tokens[..., parts].sum(-1) for _, parts in self.words], axis=-1)
