"""`python -m minillava.trace`: one question and every tensor on its way to the answer; or two runs
and where they part.

t ids of the prompt, T positions after the splice, C width, n pictures, R their side in pixels, V
vocabulary.
"""

import argparse
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from minillava import loop
from minillava.assistant import Assistant
from minillava.checkpoint.config_json import read_config
from minillava.cli.hooks import step_by_step
from minillava.cli.messages import Messages, print_json, significant, write_outputs
from minillava.cli.opening import find_weights, open_assistant, read_question
from minillava.config import LlavaConfig
from minillava.files.disk import is_stdout
from minillava.files.pictures import Images, as_list, open_image
from minillava.generate.drafts import Draftable
from minillava.generate.speculate import Drafts, check, following
from minillava.image import ImageProcessor
from minillava.llava import Llava, Spliced
from minillava.loop import Step
from minillava.options import Options
from minillava.prompt import DEFAULT_PROMPT, place_images, render
from minillava.sampling import Sampler
from minillava.templates import DEFAULT_TEMPLATE, template_name
from minillava.tiles.pictures import TileProcessor, square_maker
from minillava.tokenizer import Tokenizer
from minillava.tracing.compare import Comparison, read_tensors
from minillava.tracing.page import Page
from minillava.tracing.recorder import Consume, Record, Recorder, number_text, source_of, summarise


@torch.no_grad()
def trace(
    assistant: Assistant,
    images: Images,
    question: str = DEFAULT_PROMPT,
    options: Options | None = None,
    consume: Consume | None = None,
    *,
    depth: str = "modules",
    layers: Collection[int] | None = None,
    steps: Collection[int] | None = None,
    traced: Collection[int] = (0, 1),
    system: str | None = None,
    template: str = DEFAULT_TEMPLATE,
    whole: bool = True,
    draft: Draftable = None,
    **settings,
) -> int:
    """Ask one question; each record goes to `consume` (by default: it is printed) as it is made.

    depth, layers, steps: as for Recorder; traced: an older name of steps. options: an `Options`, or
    its fields by name. template: its name. whole: go on to the end of the answer, and record that.
    draft: as for `Assistant.drafts`; a step is then a pass, which may choose several tokens.
    Returns the number of tokens made. Raises ValueError for a layer that does not exist, and where
    `Assistant.ask` does."""
    images = [open_image(image) for image in as_list(images)]
    chosen, drafts = assistant.options(options, **settings), assistant.drafts(draft)
    follow = following(drafts, chosen, images)
    traced = traced if steps is None else steps
    model = step_by_step(assistant.model)
    _check_layers(model.config, layers)
    if drafts is not None:
        drafts.is_exact(model)  # now, so that its trial is not traced
    consume = consume or Printer()
    say = partial(_say, consume)
    _say_configuration(say, model.config)
    style = {"template": template, "system": system}
    ids = _say_question(say, assistant, question, len(images), style, chosen)
    pixels = _say_pictures(say, assistant.image_processor, images)
    with Recorder(model, consume, depth, layers, traced) as recorder:
        spliced = model.splice([ids], pixels)
        _record_splice(recorder, spliced)
        made = follow(recorder.model, spliced, chosen, tokenizer=assistant.tokenizer)
        answer = _record_answer(recorder, spliced, made, drafts, assistant.tokenizer, whole)
    _say_answer(say, answer, chosen)
    return len(answer["ids"])


def _check_layers(config: LlavaConfig, layers: Collection[int] | None) -> None:
    """Raises ValueError for a layer that neither the language model nor the tower has."""
    decoder, tower = config.text.num_hidden_layers, config.vision_layers_needed
    if max(layers or (0,)) >= max(decoder, tower):
        raise ValueError(
            f"there is no layer {max(layers)}: the language model has layers 0 to {decoder - 1}, "
            f"the vision tower runs {tower} layer(s)"
        )


# --- what is recorded before, at and after the model's steps --------------------------------------
Say = Callable[..., None]
"""`_say`, with its `consume`."""


def _say(
    consume: Consume, stage: str, name: str, source: Callable, value=None, tensor=None
) -> None:
    """A record that belongs to no step."""
    found = {} if tensor is None else summarise(tensor)
    consume(Record(None, stage, name, source_of(source), value=value, **found), tensor)


def _say_configuration(say: Say, config: LlavaConfig) -> None:
    own = {k: v for k, v in vars(config).items() if k not in ("vision", "text")}
    computed = ("tokens_per_image", "vision_layers_needed")
    own |= {name: getattr(config, name) for name in computed}
    parts = {"": own, ".vision": vars(config.vision), ".text": vars(config.text)}
    for name, part in parts.items():
        say("configuration", f"config{name}", read_config, part)


def _say_question(
    say: Say, assistant: Assistant, question: str, images: int, style: dict, options: Options
) -> list[int]:
    """The question, its conversation, the prompt and its ids, which are returned. style: template
    and system text."""
    system, tokenizer = style["system"], assistant.tokenizer
    conversation = {
        "template": style["template"],
        "system": assistant.template.system if system is None else system,
        "user": place_images(question, images, assistant.template.one_line),
        "assistant": None,
        "end_tokens": assistant.model.config.eos_token_ids,
        "stop": options.stop,
    }
    prompt = assistant.prompt(question, images=images, system=system)
    ids = assistant.tokenize(prompt)
    say("question", "question", place_images, question)
    say("question", "conversation", render, conversation)
    say("question", "prompt", render, str(prompt))
    pieces = [[i, tokenizer.piece(i)] for i in ids]
    say("question", "input_ids", Tokenizer.encode, pieces, torch.tensor([ids]))
    return ids


def _say_pictures(say: Say, processor: ImageProcessor, images: list[Image.Image]) -> Any:
    """Each picture, the square that is made of it, and the pixels of all, which are returned; of a
    picture that is cut into tiles, these and where each lies in it."""
    maker = square_maker(processor, len(images) > 1)
    for i, image in enumerate(images):
        square = maker.square(image)
        say("picture", f"picture.{i}", open_image, f"{image.width} x {image.height} {image.mode}")
        how = f"{square.width} x {square.height} {square.mode}, {maker.aspect}"
        say("picture", f"picture.{i}.square", ImageProcessor.square, how)
    pixels = processor(images)  # [n, 3, R, R], or n pictures in tiles
    if not isinstance(processor, TileProcessor):
        say("picture", "pixel_values", ImageProcessor.normalise, tensor=pixels)
        return pixels
    for i, tiled in enumerate(pixels):
        if tiled.size is not None:  # None: one of several, a padded square
            canvas, boxes = processor.boxes(tiled.size)
            told = {"canvas": list(canvas), "tiles": boxes}
            say("picture", f"picture.{i}.tiles", TileProcessor.boxes, told)
        say("picture", f"picture.{i}.pixel_values", TileProcessor.tiled, tensor=tiled.pixels)
    return pixels


def _say_answer(say: Say, answer: dict, options: Options) -> None:
    """The answer, if the loop went to its end."""
    if answer["finish_reason"] is not None:
        seed = {"seed": options.seed} if options.temperature else {}
        say("answer", "answer", loop.steps, answer | seed)


def _record_splice(recorder: Recorder, spliced: Spliced) -> None:
    spans = [list(span) for span in spliced.image_spans[0]]
    mask = spliced.padding_mask  # [1, T] or None
    words = "none: nothing is padding" if mask is None else None
    recorder.add("splice", "embeds", spliced.embeds, Llava.splice)  # [1, T, C]
    recorder.add("splice", "image_spans", None, Llava.splice, spans)
    recorder.add("splice", "attention_mask", mask, Llava.splice, words)


def _record_answer(
    recorder: Recorder,
    spliced: Spliced,
    made: Iterator[Step],
    drafts: Drafts | None,
    tokenizer: Tokenizer,
    whole: bool,
) -> dict:
    """The loop, and how each token was chosen; to the last recorded step, or to the end where the
    whole answer is wanted. Returns what is to be said of the answer."""
    last, before, row = max(recorder.steps), -1, 0
    answer = {"text": "", "ids": [], "finish_reason": None}
    answer["prompt_positions"] = spliced.embeds.shape[1]
    for step in made:
        row = row + 1 if recorder.step == before else 0  # of the pass
        before = recorder.step
        if drafts is not None and row == 0:
            if before > last and not whole:
                return answer
            _record_draft(recorder, drafts, tokenizer)
        _record_choice(recorder, step, tokenizer, f".{row}" if row else "")
        answer["ids"] += step.ids
        answer["text"] += step.text[0]
        # with drafts the pass may choose more
        if drafts is None and len(answer["ids"]) > last:
            recorder.close()
            if not whole:
                return answer
        answer["finish_reason"] = step.finish_reason[0]
    return answer


def _record_draft(recorder: Recorder, drafts: Drafts, tokenizer: Tokenizer) -> None:
    """What a pass read after the last token, and which of these guesses were right."""
    report = drafts.report
    if report is None or not report.guesses:
        return
    told = [
        [i, tokenizer.piece(i), "accepted" if at in report.right else "rejected"]
        for at, i in enumerate(report.guesses)
    ]
    recorder.add("choice", "draft", torch.tensor([report.guesses]), check, told)


def _record_choice(recorder: Recorder, step: Step, tokenizer: Tokenizer, row: str = "") -> None:
    """Scores [1, V], where penalties or filters changed the logits; the five likeliest; the token.
    row: what follows their names, for further tokens of one pass."""
    if not torch.equal(step.scores, step.logits):
        recorder.add("choice", f"scores{row}", step.scores, Sampler.scores_of)
    best = step.scores[0].softmax(-1).topk(min(5, step.scores.shape[1]))
    likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = [[i, tokenizer.piece(i), significant(p)] for i, p in likely]
    recorder.add("choice", f"top{row}", None, Sampler.scores_of, top)
    (chosen,) = step.ids
    told = [[chosen, tokenizer.piece(chosen)]]
    recorder.add("choice", f"token{row}", step.token_ids, Sampler.__call__, told)


# --- text -----------------------------------------------------------------------------------------
class Printer:
    """A consumer that prints: name, shape, dtype, source, min, mean, max, first values; `*` where
    the shape changed."""

    def __init__(self):
        self.heading: str | None = None

    def __call__(self, record: Record, tensor: Tensor | None = None) -> None:
        if record.heading != self.heading:
            print(("\n" if self.heading else "") + f"== {record.heading}")
            self.heading = record.heading
        below = record.value_text
        if record.shape is None:
            what, below = (below, "") if len(below) <= 29 else ("", below)
            line = f"{what:<29} {record.source}"
        else:
            shape = f"{'* ' if record.was else ''}{record.shape}"
            numbers = [record.min, record.mean, record.max, *(record.first or ())]
            columns = "".join(f" {number_text(x):>10}" for x in numbers)
            line = f"{shape:<20} {record.dtype:<8} {record.source:<16}{columns}"
        print(f"  {record.short_name:<28} {line}".rstrip())
        if below:
            print(
                textwrap.fill(
                    below,
                    116,
                    initial_indent="    ",
                    subsequent_indent="    ",
                    break_on_hyphens=False,
                )
            )


# --- the door -------------------------------------------------------------------------------------
def _run(
    args: argparse.Namespace, options: dict, asked: tuple, consume: Consume, messages, whole: bool
) -> Assistant:
    """asked: question and pictures."""
    question, images = asked
    traced = range(options["max_new_tokens"]) if args.steps is None else args.steps
    assistant = open_assistant(args, find_weights(args.weights, messages), messages)
    drafts = assistant.drafts(args.draft, args.draft_tokens)
    made = trace(
        assistant,
        images,
        question,
        assistant.options(**options),
        consume,
        depth=args.depth,
        layers=args.layers,
        steps=traced,
        system=args.system,
        template=template_name(assistant.template),
        whole=whole,
        draft=drafts,
    )
    if drafts is not None and drafts.report is not None:
        made = 1 + drafts.report.passes
        messages.detail(f"drafts   {drafts.report.told()}")
    if args.steps and made <= max(args.steps):
        count = f"{made} {'token(s)' if drafts is None else 'pass(es)'}"
        messages.note(f"the answer ended after {count}: there is no step {max(args.steps)}")
    return assistant


def run(args: argparse.Namespace, options: dict, sides: Sequence[Path | argparse.Namespace]) -> int:
    """What `trace` does with its flags; the exit status. sides: the two of --compare, or none."""
    return _compare(args, options, sides) if sides else _trace(args, options)


def _trace(args: argparse.Namespace, options: dict) -> int:
    messages, asked = Messages(args.verbose, args.quiet), read_question(args)
    kept, page = {}, Page()
    files: dict = {path: None for path in (args.html, args.save) if path}
    answer_only = files and (args.html or not args.json)
    show = page.add if answer_only else print_record if args.json else Printer()

    def consume(record: Record, tensor: Tensor | None) -> None:
        show(record, tensor)
        if args.save and tensor is not None:
            kept[record.key] = tensor.detach().to("cpu", copy=True).contiguous()

    assistant = _run(args, options, asked, consume, messages, whole=True)
    if args.html:
        images = asked[1]
        maker = square_maker(assistant.image_processor, len(images) > 1)
        squares = [maker.square(image) for image in images]
        config = assistant.model.config
        before = config.tokens_per_image - config.vision.num_patches
        files[args.html] = page.render(images, squares, config.vision.patch_size, before)
    if answer_only and not any(map(is_stdout, files)):  # which then has the file alone
        print(page.answer, flush=True)
    if args.save:
        files[args.save] = save(kept)
    return write_outputs(files)


def print_record(record: Record, tensor: Tensor | None) -> None:
    print_json(record.json())


def _compare(args: argparse.Namespace, options: dict, sides: list) -> int:
    """The first side is run and kept, or read; the second is held against it while it runs, so that
    no two models are in memory at once."""
    messages, asked = Messages(args.verbose, args.quiet), read_question(args)
    swapped = isinstance(sides[1], Path)
    stored, run = reversed(sides) if swapped else sides
    if isinstance(stored, Path):
        kept = read_tensors(stored)
    else:
        kept = {}

        def keep(record: Record, tensor: Tensor | None) -> None:
            if tensor is not None:
                kept[record.key] = tensor.detach().to("cpu", copy=True)

        _run(stored, options, asked, keep, messages, whole=False)
    comparison = Comparison(kept, swapped, args.tolerance or 0.0, args.json)
    _run(run, options, asked, comparison, messages, whole=False)
    return int(not comparison.finish() and args.exit_code)
