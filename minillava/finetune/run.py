"""What `python -m minillava.finetune` does: check the rows, say the plan, learn, save."""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minillava.checkpoint.folders import Folders, find_folders
from minillava.checkpoint.parts import Parts, open_parts
from minillava.checkpoint.place import choose_device
from minillava.checkpoint.write_json import check_original
from minillava.cli.messages import Messages, show
from minillava.config import LlavaConfig
from minillava.files.disk import read_json
from minillava.finetune import processes
from minillava.finetune.flags import read_options
from minillava.finetune.plan import checkpoints, estimate_seconds, make_plan, told, told_time
from minillava.finetune.recipe import Recipe, read_recipe
from minillava.finetune.rows import (
    Example,
    Row,
    as_seen,
    check_template,
    encode_row,
    hold_out,
    read_rows,
    weighted,
)
from minillava.finetune.session import learn, whole_learns
from minillava.finetune.start import begun, settled
from minillava.finetune.tokens import new_ids, tokenizer_with
from minillava.templates import DEFAULT_TEMPLATE, find_template, template_of


def run(args: argparse.Namespace) -> int:
    messages = Messages(args.verbose, args.quiet)
    recipe = read_recipe(args.recipe, {**vars(args), "add_tokens": None})
    found = find_folders(args.model, None, args.vision_tower, args.model_base)
    with begun(found, recipe.seed) as folders, processes.joined(choose_device(args.device)) as here:
        args.device = here
        messages.quiet |= processes.rank() > 0
        files = [_rows(source.path, args, recipe, messages) for source in args.data]
        parts, recipe = _suited(args, recipe, folders, messages)
        if args.add_tokens:
            ids = new_ids(args.add_tokens, parts.tokenizer, folders)
            recipe = dataclasses.replace(recipe, add_tokens=ids)
            parts = parts._replace(tokenizer=tokenizer_with(folders, ids))
        check_template(find_template(recipe.template), parts.tokenizer, parts.config.eos_token_ids)
        if args.check is not None:
            first = islice(chain(*files), args.check)
            shown = [_encode(row, parts, recipe) for row in first]
            return show("".join(f"{as_seen(example, parts.tokenizer)}\n" for example in shown))
        learnt, held = _sides(args, files, recipe, messages)
        examples = _examples(learnt, parts, recipe, messages)
        measured = _examples(held, parts, recipe, messages) if held else []
        recipe = settled(recipe, folders, here, messages)
        if args.layout is None:
            args.layout = "hf" if _is_hub(folders) else "llava"
        _check_layout(args, recipe, parts.config, folders)
        if recipe.aspect == "crop":
            messages.note("pictures are cropped to a square, as in LLaVA's stage 1, not padded")
        plan = make_plan(parts.config, recipe, examples)
        again = checkpoints(args.checkpoint, recipe.learn, plan, here)
        text = told(plan, recipe, examples, again, here)
        if args.plan:
            if recipe.learn != "medusa":
                seconds = estimate_seconds(parts.config, recipe, examples, again, here)
                text += f"\n{told_time(seconds)}"
            return show(f"{text}\n")
        for line in text.splitlines():
            messages.note(line)
        learn(args, recipe, folders, examples, measured, messages, again)
    return 0


def _suited(
    args: argparse.Namespace, recipe: Recipe, folders: Folders, messages: Messages
) -> tuple[Parts, Recipe]:
    """The parts of the model, and the recipe as it fits them: the recipes' template and padding are
    those of LLaVA-1.5's training. A relative that answers in a template of its own, or whose
    pictures are squeezed, learns so, too, unless flags say otherwise."""
    parts = open_parts(folders, recipe.aspect)
    own = parts.config.template or template_of(parts.tokenizer.added)
    if args.template is None and recipe.template != "plain" and own != DEFAULT_TEMPLATE:
        recipe = dataclasses.replace(recipe, template=own)
        messages.note(f"questions and answers are learnt in this model's own template, {own}")
    if args.aspect is None and parts.config.image_aspect_ratio == "squash":
        recipe = dataclasses.replace(recipe, aspect="squash")
        parts = open_parts(folders, recipe.aspect)
    return parts, recipe


def _sides(
    args: argparse.Namespace, files: list[list[Row]], recipe: Recipe, messages: Messages
) -> tuple[list[Row], list[Row]]:
    """The rows to learn, by the weights of their files, and those to measure. Raises ValueError if
    a side has none."""
    learnt: list[Row] = []
    held = _rows(args.val, args, recipe, messages) if args.val else []
    for source, rows in zip(args.data, files, strict=True):
        first, second = hold_out(rows, recipe.hold_out)
        learnt += weighted(first, source.weight, recipe.seed)
        held += second
    rows = sum(map(len, files))
    if recipe.hold_out and not (learnt and held):
        raise ValueError(
            f"--hold-out {recipe.hold_out} of {rows} row(s), by the weights of their files, leaves "
            f"{len(learnt)} to learn and {len(held)} to measure; give another share, or other "
            "weights"
        )
    if not learnt:
        raise ValueError(f"the weights of the files leave none of {rows} row(s); give larger ones")
    if any(source.weight != 1 for source in args.data):
        messages.note(f"{len(learnt):,} rows an epoch, by the weights of the files")
    return learnt, held


def _check_layout(
    args: argparse.Namespace, recipe: Recipe, config: LlavaConfig, folders: Folders
) -> None:
    """Raises ValueError, before hours of learning, if what is learnt would be written in LLaVA's
    own layout, which cannot say what this model is."""
    joined = folders != Folders(folders.weights) and (whole_learns(recipe) or args.merged)
    of_lora = recipe.learn == "lora" and args.layout == "llava"
    if recipe.learn == "projector" or of_lora or joined:
        try:
            check_original(config)
        except ValueError as error:
            told = f"{folders.weights}: {error}, which takes a LoRA or a whole language model"
            raise ValueError(told) from None


def _is_hub(folders: Folders) -> bool:
    return "text_config" in read_json(folders.find("config.json") / "config.json")


def _rows(path: Path, args: argparse.Namespace, recipe: Recipe, messages: Messages) -> list[Row]:
    """The rows of a file. Raises ValueError naming what is wrong with them, unless that is left
    out."""
    found = read_rows(path, args.images, recipe.template == "plain", args.missing_images == "skip")
    several = len(args.data) > 1
    messages.note(f"{path}: {found.counts()}" if several else found.counts())
    if args.skip_bad and found.rows:
        bad = sum(map(len, found.problems.values()))
        if bad:
            messages.note(f"{bad:,} row(s) left out that cannot be learnt")
    else:
        found.refuse(path)
    if several:
        return [row._replace(name=f"{row.name} of {path.name}") for row in found.rows]
    return found.rows


def _encode(row: Row, parts: Parts, recipe: Recipe) -> Example:
    template, longest = find_template(recipe.template), recipe.max_length
    return encode_row(row, parts.tokenizer, template, parts.config.tokens_per_image, longest)


def _examples(
    rows: Sequence[Row], parts: Parts, recipe: Recipe, messages: Messages
) -> list[Example]:
    """The rows as ids. Rows of which the cut left nothing to learn are left out; raises ValueError
    if that is all of them, or the model's context is shorter than the recipe's rows."""
    context = parts.config.text.context
    if recipe.max_length > context:
        recipe = dataclasses.replace(recipe, max_length=context)
        messages.note(f"rows are cut at {context} positions, the model's context")
    examples = [_encode(row, parts, recipe) for row in rows]
    cut, empty = sum(e.cut for e in examples), sum(not e.learnt for e in examples)
    if empty == len(examples):
        raise ValueError(
            f"all {empty} rows are longer than {recipe.max_length} positions, and no answer is "
            "left of them; raise --max-length"
        )
    if cut:
        messages.note(
            f"{cut:,} row(s) cut at {recipe.max_length} positions, {empty:,} of them left out, "
            "since no answer was left"
        )
    return [example for example in examples if example.learnt]


def finetune(model: str | Path, data: str | Path, out: str | Path, **options: Any) -> None:
    """`python -m minillava.finetune` from Python: the flags by their names, and quiet. Raises what
    the command says in one line; ValueError for wrong usage, TypeError for a name that is no
    flag's."""
    quiet = not options.get("verbose")
    run(read_options(model, data, {"quiet": quiet, **options, "out": out}))
