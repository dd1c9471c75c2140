"""A conversation that keeps its cache, so that each question costs only its own positions.

P patches of a picture, C width, T positions of the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from minillava.assistant import Assistant
from minillava.cache import KVCache
from minillava.fast.row_by_row import reusable
from minillava.files.pictures import ImageSource, open_image
from minillava.generate.speculate import following
from minillava.llava import Spliced
from minillava.loop import Process
from minillava.options import Options, remaining_context
from minillava.prompt import place_images, render
from minillava.tiles.pictures import change_by_others
from minillava.tokenizer import common_prefix

GROWTH = 512
"""The cache grows by this many positions: all of a 7B's context would be 2 GB, most conversations
are short."""


# Compared by identity: the picture in the cache is this one or another one.
@dataclass(eq=False)
class Picture:
    name: str
    patches: Tensor  # [P, C]
    image: Image.Image | None  # kept where others change how it is read
    several: bool  # read beside others


@dataclass
class Turn:
    question: str  # with one `<image>` for each picture
    pictures: tuple[Picture, ...]
    options: Options  # with the seed that was used
    answer: str = ""
    finish_reason: str | None = None  # None while it goes on, "stop", "length", "interrupted"
    reused: int = 0  # positions of its prompt that were cached already
    prefilled: int = 0  # positions of its prompt that had to be computed


class Conversation:
    """Questions and answers in turn, about any number of pictures, each encoded once.

    At every question the whole conversation is rendered to ids. The cache is cut back to the first
    position at which these ids differ from the cached ones (a finished answer may be written, or
    cut into tokens, in another way than it was generated), and the rest is prefilled. So the answer
    is that of a fresh start with the same ids.
    """

    def __init__(self, assistant: Assistant, system: str | None = None):
        """system: the system text, instead of the template's own; "" for none."""
        self.assistant, self.system = assistant, system
        self.clear()

    def clear(self) -> None:
        """Forget everything: turns, pictures, cache."""
        self.turns: list[Turn] = []
        self.waiting: list[Picture] = []  # for the next question
        self.cache: KVCache | None = None
        self.prompt_length = 0  # cached positions of a prompt, not of an answer being made
        # What is, or will be, at each position: an id, or a Picture P times; the first cache.length
        # are cached. A stream goes on only as long as this is its own list.
        self.positions: list[int | Picture] = []

    @property
    def room(self) -> int:
        """How many more positions fit into the model's context."""
        return self.assistant.model.config.text.context - len(self.positions)

    def add_image(
        self, source: ImageSource, name: str | None = None, more: bool = False
    ) -> Picture:
        """Encode a picture, for the next question. name: for `record`. more: others follow. Raises
        ValueError or OSError if it cannot be opened (see open_image)."""
        several = more or bool(self.waiting) or any(turn.pictures for turn in self.turns)
        self.waiting.append(self._read(name or str(source), open_image(source), several))
        return self.waiting[-1]

    def _read(self, name: str, image: Image.Image, several: bool) -> Picture:
        kept = image if change_by_others(self.assistant.image_processor) else None
        return Picture(name, self.assistant.encode(image, several), kept, several)

    def _read_again(self, turns: Sequence[Turn]) -> list[tuple[Picture, ...]]:
        """The pictures of each turn, read anew where they are beside others now, or not any more,
        and that changes them; to the cache such a one is another one."""
        several = sum(len(turn.pictures) for turn in turns) > 1
        return [
            tuple(
                old
                if old.image is None or old.several == several
                else self._read(old.name, old.image, several)
                for old in turn.pictures
            )
            for turn in turns
        ]

    def ask(self, question: str, *, process: Process | None = None, **options) -> str:
        """The answer to the next question. process: as for `generate`. options: the fields of
        `options.Options` by name, and `draft`, as for `Assistant.drafts`."""
        return "".join(self.stream(question, process=process, **options))

    def stream(self, question: str, *, process: Process | None = None, **options) -> Iterator[str]:
        """The answer as it is made, one piece of text per token; some pieces are empty. Arguments
        as for `ask`.

        If the stream is left early (closed, Ctrl-C, another question asked), the text so far is the
        answer; without any text, the question counts as not asked. Raises ValueError, and leaves
        the conversation as it was, if the context is full. Raises ValueError as well if the stream
        is continued after another question was asked or the conversation was cleared.
        """
        self._leave()
        assistant = self.assistant
        drafts = assistant.drafts(options.pop("draft", None))
        chosen = assistant.options(**options)
        if chosen.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences is {chosen.num_return_sequences}, a conversation goes on "
                "from one"
            )
        assistant.check_text(question)
        placed = place_images(question, len(self.waiting), assistant.template.one_line)
        turn = Turn(placed, tuple(self.waiting), chosen)
        rest = self._begin(turn)
        positions = self.positions
        try:
            for step in following(drafts, chosen, ())(
                assistant.model,
                rest,
                chosen,
                tokenizer=assistant.tokenizer,
                process=process,
                cache=self.cache,
            ):
                positions.append(step.ids[0])
                turn.answer += step.text[0]
                turn.finish_reason = step.finish_reason[0]
                # a GPU computes the next token before this generator is resumed
                self._make_room(len(positions) + 1)
                yield step.text[0]
                if self.positions is not positions and step.finish_reason[0] is None:
                    raise ValueError(
                        f"the conversation went on without the answer to {question!r}; ask again"
                    )
        finally:
            if self.positions is positions:
                self._leave()

    def _begin(self, turn: Turn) -> Spliced:
        """Make `turn` the last one, and keep as much of its prompt in the cache as is there
        already; returns the rest of the prompt, which is to be prefilled. Raises ValueError, and
        changes nothing, if the context is full."""
        assistant, model = self.assistant, self.assistant.model
        read = self._read_again([*self.turns, turn])
        said = [(before.question, before.answer) for before in self.turns]
        prompt = render(assistant.template, [*said, (turn.question, None)], self.system)
        ids = assistant.tokenizer.encode(prompt)
        pictures = [picture for each in read for picture in each]
        length = len(ids) + sum(len(picture.patches) - 1 for picture in pictures)
        remaining_context(
            model.config,
            length,
            taken="with this question the conversation takes {length} positions",
            advice="ask something shorter, or start anew with /clear",
        )
        with torch.no_grad():
            spliced = model.splice([ids], [picture.patches for picture in pictures])
        positions: list[int | Picture] = spliced.token_ids[0].tolist()
        for (start, end), picture in zip(spliced.image_spans[0], pictures, strict=True):
            positions[start:end] = [picture] * (end - start)
        if self.cache is None:
            like = spliced.embeds
            self.cache = KVCache(model.config.text, 1, 0, dtype=like.dtype, device=like.device)
        # The last position is computed in any case: its logits choose the first token.
        turn.reused = common_prefix(self.positions[: self.cache.length], positions[:-1])
        turn.reused = reusable(model.language_model, turn.reused, self.prompt_length)
        self.prompt_length = len(positions)
        turn.prefilled = len(positions) - turn.reused
        self.cache.truncate(turn.reused)
        self.positions = positions
        self._make_room(len(positions) + 1)
        self.turns.append(turn)
        for each, shown in zip(self.turns, read, strict=True):
            each.pictures = shown
        self.waiting = []
        # [1, T, C] -> [1, T - reused, C]
        return replace(spliced, embeds=spliced.embeds[:, turn.reused :])

    def _leave(self) -> None:
        """End the last turn: if its answer is not finished, the text so far is the answer, and no
        stream goes on with it."""
        if not self.turns or self.turns[-1].finish_reason is not None:
            return
        turn = self.turns[-1]
        self.positions = list(self.positions)
        if turn.answer:
            turn.finish_reason = "interrupted"
        else:
            self.turns.pop()
            self.waiting = [*turn.pictures, *self.waiting]

    def record(self) -> dict:
        """The conversation as values that JSON can write; of the options, only those that are not
        the default."""
        defaults = vars(Options())
        turns = [
            {
                "question": turn.question,
                "images": [picture.name for picture in turn.pictures],
                "answer": turn.answer,
                "finish_reason": turn.finish_reason,
                "options": {
                    name: value
                    for name, value in vars(turn.options).items()
                    if name == "seed" or value != defaults[name]
                },
            }
            for turn in self.turns
        ]
        return {
            "system": self.assistant.template.system if self.system is None else self.system,
            "turns": turns,
        }

    def _make_room(self, length: int) -> None:
        context = self.assistant.model.config.text.context
        if min(length, context) > self.cache.capacity:
            self.cache.grow(min(-(-length // GROWTH) * GROWTH, context))
