"""The assistant: a model plus what it takes to talk to it, opened from a folder by `load`."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minillava.attention import ATTENTION
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import check_base, find_folder, find_others, open_checkpoint
from minillava.checkpoint.place import OTHER_NAMES, choose_device, choose_dtype
from minillava.checkpoint.side_json import read_image_processor
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.fast import speed_up
from minillava.fast.ahead import decode_ahead
from minillava.fast.compiled import compile_decode
from minillava.files.disk import read_json
from minillava.files.pictures import Images, ImageSource, are_several, as_list, open_image
from minillava.generate import beam
from minillava.generate.contrast import Contrast, find_method
from minillava.generate.generation import Generation, check_room, generate
from minillava.generate.named import check_names, read_options
from minillava.generate.score import score_answers
from minillava.image import ImageProcessor
from minillava.llava import Llava, Spliced
from minillava.loop import Process, steps
from minillava.options import KINDS, Options, dtype_name, expect_text, expect_texts
from minillava.prompt import (
    DEFAULT_PROMPT,
    DEFAULT_TEMPLATE,
    Prompt,
    Template,
    find_template,
    place_images,
    render,
)
from minillava.tokenizer import Tokenizer, encode_answers, open_tokenizer


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
    ):
        """unused: the names of stored tensors that this network does not need."""
        self.model, self.tokenizer = model, tokenizer
        self.image_processor, self.template = image_processor, template
        self.unused = tuple(unused)

    def ask(
        self,
        image: Images | Sequence[Images],
        question: str | Sequence[str] = DEFAULT_PROMPT,
        *,
        system: str | None = None,
        contrast: Contrast | str | None = None,
        process: Process | None = None,
        **options,
    ) -> str | list[str]:
        """The answer as text. image: a path, a Pillow image, a list of them (one prompt with them
        all, which LLaVA-1.5 was not trained for), or None. system: as for `prompt`. contrast: a
        method of generate/contrast.py, or its name. process: as for `generate`. options: the fields
        of `Options` by name; another name is a TypeError.

        question may be a list, answered as one batch, in order: image is then one picture for all,
        or a list with what it may be for each; ValueError where lengths differ. The longest prompt
        decides how much room the context has.
        """
        options.update(system=system, contrast=contrast, process=process)
        if not isinstance(question, str):
            expect_texts(question, "question")
            return self.ask_each(image, question, **options).text
        return "".join(self.stream(image, question, **options))

    def stream(
        self,
        image: Images,
        question: str = DEFAULT_PROMPT,
        *,
        system: str | None = None,
        contrast: Contrast | str | None = None,
        process: Process | None = None,
        **options,
    ) -> Iterator[str]:
        """The answer piece by piece, as it is made; with beams whole, once it is known. Arguments
        as for `ask`."""
        chosen, contrast = self._one_answer(options), find_method(contrast)
        prompt = self.prompt(question, images=len(as_list(image)), system=system)
        spliced = self.prepare(image, prompt, contrast, chosen.seed)
        if chosen.num_beams > 1 and contrast is None:
            yield beam.search(
                self.model, spliced, chosen, tokenizer=self.tokenizer, process=process
            ).text[0]
            return
        for step in steps(
            self.model,
            spliced,
            chosen,
            tokenizer=self.tokenizer,
            contrast=contrast,
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
        encode: Callable[[ImageSource], Tensor] | None = None,
        **options,
    ) -> Generation:
        """Several questions as one batch, and how each answer ended. Arguments as for `ask`;
        encode: instead of the method, say one that remembers pictures."""
        expect_texts(questions, "questions", "a list of texts")
        chosen, contrast = self._one_answer(options), find_method(contrast)
        given = list(image) if are_several(image) else [image] * len(questions)
        if len(given) != len(questions):
            raise ValueError(
                f"{len(questions)} question(s) but {len(given)} picture(s); give one per question, "
                "or one"
            )
        if not questions:
            return Generation(torch.empty(0, 0, dtype=torch.long), [], [], [], chosen.seed)
        pictures = [as_list(images) for images in given]
        ids = [
            self.tokenize(self.prompt(question, images=len(own), system=system))
            for question, own in zip(questions, pictures, strict=True)
        ]
        flat = [picture for own in pictures for picture in own]
        names = [str(p) if isinstance(p, (str, Path)) else id(p) for p in flat]
        encoded = {
            name: (encode or self.encode)(picture)
            for name, picture in dict(zip(names, flat, strict=True)).items()
        }
        patches = [encoded[name] for name in names]
        second = None
        if contrast is not None:
            others, changed = [], []
            for row, own, generator in zip(
                ids, pictures, _generators(chosen.seed, len(questions)), strict=True
            ):
                opened = [open_image(picture) for picture in own]
                more, pixels = contrast.second([row], opened, self.image_processor, generator)
                others += more
                changed += [] if pixels is None else self._encode(pixels)
            second = others, torch.stack(changed) if changed else None
        patches = torch.stack(patches) if patches else None  # [n, P, C]
        return generate(
            self.model, ids, patches, second=second, contrast=contrast, process=process,
            tokenizer=self.tokenizer,
            **vars(chosen),
        )  # fmt: skip

    def _one_answer(self, options: dict) -> Options:
        chosen = self.options(**options)
        if chosen.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences is {chosen.num_return_sequences}: generate() returns "
                "several answers"
            )
        return chosen

    def encode(self, picture: ImageSource) -> Tensor:
        """A picture as the language model reads it: [P, C]. Alone, so that the last digits do not
        depend on others."""
        return self._encode(self.image_processor(picture))[0]

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(
            pixels.to(self.model.language_model.embed_tokens.weight.device)
        )

    def score(
        self,
        image: Images,
        question: str,
        answers: Sequence[str],
        *,
        system: str | None = None,
        per_token: bool = False,
    ) -> list[float]:
        """The log-likelihood of each answer and of what the template writes behind it (for most,
        the end token), in nats; per_token: their mean over its tokens, which is minus the loss. For
        ranking answers, or "Yes." against "No.". image: as for `ask`. Raises ValueError for an
        answer that does not fit the model's context."""
        expect_texts(answers, "answers", "a list of texts")
        pictures = as_list(image)
        asked = place_images(question, len(pictures))
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
        return render(self.template, [(place_images(question, images), None)], system)

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, -200 for each picture. Raises ValueError, before anything is
        computed, if it leaves the model's context no room for an answer."""
        self.check_text(prompt)
        ids = self.tokenizer.encode(prompt)
        check_room(self.model, [ids])
        return ids

    def check_text(self, text: str) -> None:
        """Raises ValueError for a text that cannot fit the context, whatever its tokens are: to cut
        tens of megabytes into tokens, only to count them, would take gigabytes."""
        expect_text(text, "the prompt")
        context, fewest = self.model.config.text.context, self.tokenizer.fewest_tokens(text)
        if fewest > context:
            raise ValueError(
                f"the prompt has {len(text)} characters, at least {fewest} tokens; the model's "
                f"context holds {context} with the answer; shorten the prompt"
            )

    def prepare(
        self,
        image: Images,
        prompt: str,
        contrast: Contrast | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Spliced:
        """Pictures and prompt as the vectors that the language model reads: a batch of one row, or
        two for `contrast`, the second with what it sees (noise and the like by `seed`). Raises
        ValueError as `tokenize`."""
        rows, pictures = [self.tokenize(prompt)], as_list(image)
        if contrast is not None:
            pictures = [open_image(picture) for picture in pictures]
        pixels = self.image_processor(pictures)  # [n, 3, R, R], R their side
        if contrast is not None:
            others, changed = contrast.second(
                rows, pictures, self.image_processor, *_generators(seed, 1)
            )
            rows, pixels = (
                [*rows, *others],
                pixels if changed is None else torch.cat([pixels, changed]),
            )
        with torch.no_grad():
            return self.model.splice(rows, pixels)

    def options(self, given: Options | None = None, /, **options) -> Options:
        """Options by name, in place of those given; the template's own stop texts are added."""
        chosen = read_options(options, given)
        if set(self.template.stop) <= set(chosen.stop):
            return chosen
        return replace(chosen, stop=(*chosen.stop, *self.template.stop))


def _generators(seed: int | Sequence[int], rows: int) -> list[torch.Generator]:
    """For each row the random numbers of what contrast shows it: its own for a seed each, the same
    ones, one row after the other, for a seed of them all."""
    if isinstance(seed, int):
        return [torch.Generator().manual_seed(seed)] * rows
    return [torch.Generator().manual_seed(each) for each in seed]


def load(
    weights: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "fused",
    quantize: str | None = None,
    compile: bool = False,
    vision_tower: str | Path | None = None,
    model_base: str | Path | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    template: str | None = None,
    image_aspect_ratio: str | None = None,
    **other,
) -> Assistant:
    """Open LLaVA weights in any of their layouts: a folder, or an id in the local hub cache (at
    `revision`); None as `default_weights`.

    device: auto, cpu, cuda, mps. dtype: auto (the checkpoint's on a GPU; on a CPU bfloat16 where it
    is fast, else float32) or a name. attention: fused, eager. quantize: int8, int4: the language
    model's linear layers in so many bits a weight, made as they are read. compile: the decoding
    step by torch.compile, for a GPU (fast/compiled.py). vision_tower: a CLIP folder, for releases
    that hold none. model_base: the language model that a projector or a LoRA in `weights` was
    trained on. adapter: a LoRA to merge. template: a name of prompt.TEMPLATES (default llava_v1).
    image_aspect_ratio: pad or crop, instead of config.json's. Warns where a folder holds other
    weights than those that are read. Raises FileNotFoundError, OSError or ValueError in one line:
    file, finding, next step; for another name TypeError, with the nearest one.
    """
    check_names(other, load.__kwdefaults__, OTHER_NAMES)
    folder = find_folder(weights, revision)
    vision_tower, model_base, adapter = find_others(vision_tower, model_base, adapter)
    if attention not in list(ATTENTION):
        raise ValueError(
            f"unknown attention {attention!r}, expected one of: {', '.join(ATTENTION)}"
        )
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"unknown quantize {quantize!r}, expected one of: {', '.join(KINDS)}")
    template = find_template(DEFAULT_TEMPLATE if template is None else template)
    check_base(folder, model_base)

    def home(name: str) -> Path:
        """The folder of a file that a fine-tune may leave to its base."""
        return folder if model_base is None or (folder / name).exists() else model_base

    if (
        home("config.json") != folder
        and read_json(model_base / "config.json").get("model_type") == "llama"
    ):
        raise FileNotFoundError(
            f"{folder}: holds no config.json, and its base {model_base} is no LLaVA; copy the "
            "config.json that the finished training saved"
        )
    config = read_config(home("config.json"), vision_tower)
    checkpoint, config = open_checkpoint(folder, config, vision_tower, model_base, adapter)
    tokenizer = open_tokenizer([f for f in (adapter, folder, model_base) if f is not None], config)
    if tokenizer.written_as(config.image_token_id):
        # LLaVA's own config.json names no id for pictures, and 32000 may be a word: penalties must
        # tell them apart.
        config = replace(config, image_token_id=IMAGE_TOKEN_INDEX)
    processor = read_image_processor(
        vision_tower or home("preprocessor_config.json"), config, image_aspect_ratio
    )
    device = choose_device(str(device))
    dtype = choose_dtype(dtype_name(dtype), device, checkpoint.dtype(), checkpoint.parameters())
    tokens = max((tokenizer.added[token] + 1 for token in config.added_tokens), default=0)
    model = build_model(
        config,
        checkpoint,
        ATTENTION[attention],
        dtype=dtype,
        device=device,
        quantize=quantize,
        tokens=tokens,
    )
    if attention != "eager":
        speed_up(model)
    model.decoding = decode_ahead
    if compile:
        compile_decode(model)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=2)
    return Assistant(model, tokenizer, processor, template, checkpoint.unused)
