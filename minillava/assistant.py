"""The assistant: a model plus what it takes to talk to it, opened from a folder by `load`."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from minillava.attention import ATTENTION
from minillava.checkpoint.build import build_model
from minillava.checkpoint.draft import open_small
from minillava.checkpoint.folders import find_folder, find_folders
from minillava.checkpoint.medusa import open_heads
from minillava.checkpoint.parts import open_parts
from minillava.checkpoint.place import choose_device, choose_dtype
from minillava.fast import speed_up
from minillava.fast.ahead import decode_ahead
from minillava.fast.compiled import Captured, compile_decode
from minillava.fast.parallel import Share, join, share_model, together
from minillava.fast.passes import pass_cost
from minillava.files.pictures import Images, ImageSource, as_list
from minillava.generate import beam, inputs
from minillava.generate.contrast import Contrast, find_method
from minillava.generate.draft_model import DraftModel
from minillava.generate.drafts import Draftable, find_drafts
from minillava.generate.generation import Generation, check_room, generate
from minillava.generate.medusa import Medusa
from minillava.generate.named import LOAD_HINTS, check_names, read_options
from minillava.generate.score import score_answers
from minillava.generate.speculate import Drafter, Drafts, following
from minillava.image import ImageProcessor
from minillava.labels import encode_answers
from minillava.llava import Llava, Spliced
from minillava.options import (
    KINDS,
    Options,
    dtype_name,
    expect_one_of,
    expect_text,
    expect_texts,
)
from minillava.prompt import DEFAULT_PROMPT, Prompt, place_images, render
from minillava.sampling import Process
from minillava.templates import Template, find_template, template_of
from minillava.tiles.pictures import change_by_others, one_of
from minillava.tokenizer import Tokenizer


class Assistant:
    """Answers questions about pictures. Its parts (model, tokenizer, image_processor, template)
    work alone, too."""

    def __init__(
        self,
        model: Llava,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        template: Template,
        unused: Sequence[str] = (),
        folder: Path | None = None,
    ):
        """unused: the names of stored tensors that this network does not need. folder: of the
        weights."""
        self.model, self.tokenizer = model, tokenizer
        self.image_processor, self.template = image_processor, template
        self.unused, self.folder = tuple(unused), folder

    @overload
    def ask(self, image: Images, question: str = ..., **options: Any) -> str: ...
    @overload
    def ask(
        self, image: Images | Sequence[Images], question: Sequence[str], **options: Any
    ) -> list[str]: ...
    def ask(
        self,
        image: Images | Sequence[Images],
        question: str | Sequence[str] = DEFAULT_PROMPT,
        *,
        system: str | None = None,
        contrast: Contrast | str | None = None,
        process: Process | None = None,
        draft: Draftable = None,
        **options: Any,
    ) -> str | list[str]:
        """The answer as text. image: a path, a Pillow image, a list of them (one prompt with them
        all, which LLaVA-1.5 was not trained for), or None. system: as for `prompt`. contrast: a
        method of generate/contrast.py, or its name. process: as for `generate`. draft: as for
        `drafts`. options: the fields of `Options` by name; another name is a TypeError.

        question may be a list, answered as one batch, in order: image is then one picture for all,
        or a list with what it may be for each; ValueError where lengths differ. The longest prompt
        decides how much room the context has.
        """
        options.update(system=system, contrast=contrast, process=process, draft=draft)
        if isinstance(question, str):
            return "".join(self.stream(image, question, **options))  # type: ignore[arg-type]
        expect_texts(question, "question")
        return self.ask_each(image, question, **options).text or []

    def stream(
        self,
        image: Images,
        question: str = DEFAULT_PROMPT,
        *,
        system: str | None = None,
        contrast: Contrast | str | None = None,
        process: Process | None = None,
        draft: Draftable = None,
        **options: Any,
    ) -> Iterator[str]:
        """The answer piece by piece, as it is made; with beams whole, once it is known. Arguments
        as for `ask`."""
        chosen, method = self._one_answer(options), find_method(contrast)
        follow = following(self.drafts(draft), chosen, as_list(image))
        prompt = self.prompt(question, images=len(as_list(image)), system=system)
        spliced = self.prepare(image, prompt, method, chosen.seed)
        if chosen.num_beams > 1 and method is None:
            found = beam.search(
                self.model, spliced, chosen, tokenizer=self.tokenizer, process=process
            )
            yield found.text[0]
            return
        for step in follow(
            self.model,
            spliced,
            chosen,
            tokenizer=self.tokenizer,
            contrast=method,
            process=process,
        ):
            if step.text[0]:
                yield step.text[0]

    def ask_each(
        self,
        image: Images | Sequence[Images],
        questions: Sequence[str],
        *,
        system: str | None = None,
        contrast: Contrast | str | None = None,
        process: Process | None = None,
        draft: Draftable = None,
        encode: Callable[[ImageSource], Tensor] | None = None,
        **options: Any,
    ) -> Generation:
        """Several questions as one batch, and how each answer ended. Arguments as for `ask`;
        encode: instead of the method, say one that remembers pictures."""
        expect_texts(questions, "questions", "a list of texts")
        chosen, method = self._one_answer(options), find_method(contrast)
        pictures = inputs.pictures_of_each(image, len(questions))
        if not questions:
            return Generation(torch.empty(0, 0, dtype=torch.long), [], [], [], chosen.seed)
        ids = [
            self.tokenize(self.prompt(question, images=len(own), system=system))
            for question, own in zip(questions, pictures, strict=True)
        ]
        change = change_by_others(self.image_processor)
        patches = inputs.encode_each(pictures, encode or self.encode, change)  # [n, P, C]
        second = None
        if method is not None:
            second = inputs.second_rows(
                self.model, self.image_processor, ids, pictures, method, chosen.seed
            )
        return generate(
            self.model, ids, patches, second=second, contrast=method, process=process,
            follow=following(self.drafts(draft), chosen, pictures[0]), tokenizer=self.tokenizer,
            **vars(chosen),
        )  # fmt: skip

    def drafts(self, draft: Draftable, tokens: int | str | None = None) -> Drafts | None:
        """Guesses, which save passes and change no answer (generate/speculate.py). draft: "lookup",
        "medusa" (heads beside the weights) or "medusa:DIR", a folder of a small model, a drafter,
        or what this returned, whose `report` tells of the last answer. tokens: how many are guessed
        at a time; None or "auto": as many as pay. Raises ValueError or FileNotFoundError if there
        is no such drafter, or the model is compiled."""
        if draft is not None and isinstance(self.model.decoding, Captured):
            raise ValueError("drafts do not go with a compiled step: leave compile or draft out")
        cost = pass_cost(self.model.language_model)
        return find_drafts(draft, tokens, cost, self._open_drafter)

    def _open_drafter(self, name: str, medusa: bool) -> Drafter:
        """A small model that guesses, a Llama or a LLaVA of the same words; or Medusa's heads."""
        large, folder = self.model.language_model, find_folder(name or self.folder, command=None)
        if medusa:
            words = self.tokenizer.sentencepiece.vocab_size()
            return Medusa(*open_heads(folder, large.config, words), large)
        fast = None if large.attend is ATTENTION["eager"] else speed_up
        small, see = open_small(folder, large, self.tokenizer, load, fast)
        return DraftModel(small, large, see)

    def embed(self, ids: list[int], image: Images) -> Tensor:
        """Ids with -200 and their pictures as vectors [1, T, C]."""
        with torch.no_grad():
            return self.model.splice([ids], self.image_processor(as_list(image))).embeds

    def _one_answer(self, options: dict[str, Any]) -> Options:
        chosen = self.options(**options)
        if chosen.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences is {chosen.num_return_sequences}: generate() returns "
                "several answers"
            )
        return chosen

    def score(
        self,
        image: Images,
        question: str,
        answers: Sequence[str],
        *,
        system: str | None = None,
        per_token: bool = False,
    ) -> list[float]:
        """The log-likelihood of each answer and of what the template writes after it (for most,
        the end token), in nats; per_token: their mean over its tokens, which is minus the loss. For
        ranking answers, or "Yes." against "No.". image: as for `ask`. Raises ValueError for an
        answer that does not fit the model's context."""
        expect_texts(answers, "answers", "a list of texts")
        pictures = as_list(image)
        asked = place_images(question, len(pictures), self.template.one_line)
        # what is too long is refused before it is read
        self.tokenize(self.prompt(question, len(pictures), system))
        for answer in answers:
            self.check_text(answer)
        if not answers:
            return []
        rows = [
            encode_answers(self.tokenizer, self.template, [(asked, answer)], system)
            for answer in answers
        ]
        return score_answers(self.model, rows, self.image_processor(pictures), per_token)

    def prompt(self, question: str, images: int = 1, system: str | None = None) -> Prompt:
        """The exact prompt: the question, its pictures placed, in the template. system: instead of
        the template's."""
        placed = place_images(question, images, self.template.one_line)
        return render(self.template, [(placed, None)], system)

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, -200 for each picture. Raises ValueError, before anything is
        computed, if it leaves the model's context no room for an answer."""
        self.check_text(prompt)
        ids = self.tokenizer.encode(prompt)
        check_room(self.model, [ids])
        return ids

    def check_text(self, text: str) -> None:
        """Raises ValueError for what is not a text, or cannot fit the context."""
        expect_text(text, "the prompt")
        inputs.check_readable(text, self.tokenizer, self.model.config.text.context)

    def encode(self, picture: ImageSource, several: bool = False) -> Tensor:
        """A picture as the language model reads it: [P, C]; several: in a prompt with others. By
        itself, so that the last digits do not depend on them."""
        return inputs.encode_picture(self.model, one_of(self.image_processor, picture, several))

    def prepare(
        self,
        image: Images,
        prompt: str,
        contrast: Contrast | None = None,
        seed: inputs.Seed = 0,
    ) -> Spliced:
        """Pictures and prompt as the vectors that the language model reads: a batch of one row, or
        two for `contrast`, the second with what it sees (noise and the like by `seed`). Raises
        ValueError as `tokenize`."""
        ids = self.tokenize(prompt)
        return inputs.splice_one(
            self.model, self.image_processor, ids, as_list(image), contrast, seed
        )

    def options(self, given: Options | None = None, /, **options: Any) -> Options:
        """Options by name, in place of those given; the template's own stop texts are added."""
        chosen = read_options(options, given)
        if set(self.template.stop) <= set(chosen.stop):
            return chosen
        return replace(chosen, stop=(*chosen.stop, *self.template.stop))


def load(
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "fused",
    quantize: str | None = None,
    pack: bool = False,
    compile: bool = False,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    template: str | None = None,
    image_aspect_ratio: str | None = None,
    parallel: bool = False,
    **other: Any,
) -> Assistant:
    """Open LLaVA weights: a folder, or an id in the hub cache (at `revision`); None: the default.

    device: auto, cpu, cuda, mps. dtype: auto (the checkpoint's on a GPU; on a CPU bfloat16 where it
    is fast, else float32) or a name. attention: fused, eager. quantize: int8, int4: the language
    model's linear layers in so many bits a weight. pack: bfloat16 ones in this processor's own
    order (fast/packed.py). compile: its step, for a GPU. vision_tower, model_base, adapter: other
    folders of the model (checkpoint/folders.py). template: a name of TEMPLATES. image_aspect_ratio:
    one of ASPECTS. parallel: over the processes that torchrun started. Warns of unread weights.
    Raises OSError, TypeError, or ValueError with a line for each misfit tensor.
    """
    check_names(other, load.__kwdefaults__ or {}, LOAD_HINTS)
    folders = find_folders(weights, revision, vision_tower, model_base, adapter)
    expect_one_of("attention", attention, ATTENTION)
    expect_one_of("quantize", quantize, (None, *KINDS))
    parts = open_parts(folders, image_aspect_ratio)
    known = parts.config.template or template_of(parts.tokenizer.added)
    style = find_template(known if template is None else template)
    disk, (share, place) = parts.weights, join(choose_device(str(device)), parallel)
    kind = choose_dtype(dtype_name(dtype), place, disk.dtype(), disk.parameters())
    model = together(
        share, build_model, parts.config, disk, ATTENTION[attention], dtype=kind, device=place,
        quantize=quantize, pack=pack, min_rows=parts.rows_needed(),
    )  # fmt: skip
    _by_fast_ways(model, attention, compile, share)
    for note in disk.notes:
        warnings.warn(note, stacklevel=2)
    return Assistant(model, parts.tokenizer, parts.image_processor, style, disk.unused, disk.folder)


def _by_fast_ways(model: Llava, attention: str, compile: bool, share: Share) -> None:
    """The same model by the ways of fast/, of which `eager` takes only that of decoding; and its
    sums over several processes."""
    if attention != "eager":
        speed_up(model, model.language_model)
    model.decoding = decode_ahead
    if compile:
        compile_decode(model)
    share_model(model.language_model, share)
