"""What `python -m minillava.finetune` does: check the rows, say the plan, learn, save."""

import argparse
import dataclasses
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minillava.assistant import Assistant, load
from minillava.attention import ATTENTION, eager
from minillava.checkpoint.folders import Folders, find_folders
from minillava.checkpoint.parts import Parts, open_parts
from minillava.cli.messages import Messages, show
from minillava.files.disk import write_whole
from minillava.finetune.learning import make_optimiser, prepare
from minillava.finetune.loop import Record, held_out_loss, train
from minillava.finetune.medusa import accuracy, told
from minillava.finetune.recipe import Recipe, read_recipe
from minillava.finetune.rows import (
    Example,
    Row,
    as_seen,
    check_template,
    encode_row,
    hold_out,
    read_rows,
)
from minillava.finetune.save import check_one_folder, count, save_learnt, save_whole
from minillava.finetune.state import STATE_NAME, describe, resume, save_state
from minillava.llava import Llava
from minillava.templates import find_template

LOG_NAME = "log.jsonl"


def run(args: argparse.Namespace) -> int:
    messages = Messages(args.verbose, args.quiet)
    recipe = read_recipe(args.recipe, vars(args))
    folders = find_folders(args.model, None, args.vision_tower, args.model_base)
    rows = _rows(args, recipe, messages)
    parts = open_parts(folders, recipe.aspect)
    check_template(find_template(recipe.template), parts.tokenizer, parts.config.eos_token_ids)
    if args.check is not None:
        shown = [_encode(row, parts, recipe) for row in rows[: args.check]]
        return show("".join(f"{as_seen(example, parts.tokenizer)}\n" for example in shown))
    learnt, held = hold_out(rows, recipe.hold_out)
    if recipe.hold_out and not (learnt and held):
        raise ValueError(
            f"--hold-out {recipe.hold_out} of {len(rows)} row(s) leaves {len(learnt)} to learn and "
            f"{len(held)} to measure; give another share"
        )
    examples = _examples(learnt, parts, recipe, messages)
    measured = _examples(held, parts, recipe, messages) if held else []
    if args.plan:
        return show(_plan(parts, recipe, examples))
    _learn(args, recipe, folders, examples, measured, messages)
    return 0


def _rows(args: argparse.Namespace, recipe: Recipe, messages: Messages) -> list[Row]:
    """The rows of the file. Raises ValueError naming what is wrong with them, unless that is left
    out."""
    found = read_rows(args.data, args.images, recipe.template == "plain")
    messages.note(found.counts())
    if args.skip_bad and found.rows:
        bad = sum(map(len, found.problems.values()))
        if bad:
            messages.note(f"{bad:,} row(s) left out that cannot be learnt")
    else:
        found.refuse(args.data)
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


def _plan(parts: Parts, recipe: Recipe, examples: Sequence[Example]) -> str:
    """What will be learnt, from how many rows, and what it takes."""
    with torch.device("meta"):
        model = Llava(parts.config, eager)
    total = sum(p.numel() for p in model.parameters())
    learning = prepare(model, recipe)
    learnt = count(model, learning)
    rates = {"projector": recipe.projector_rate}
    told = ", ".join(
        f"{part} {numbers / 1e6:.1f} M at {rates.get(part, recipe.rate):g}"
        for part, numbers in learnt.items()
    )
    rows, updates = len(examples), recipe.updates_for(len(examples))
    longest = max(example.positions for example in examples)
    # weights in float32, and of what learns a gradient and AdamW's two moments
    size = 4 * sum(p.numel() for p in model.parameters()) + 12 * sum(learnt.values())
    return (
        f"learn    {sum(learnt.values()) / 1e6:.1f} M of {total / 1e6:.1f} M parameters: {told}\n"
        f"rows     {rows:,}, {updates:,} update(s) of {recipe.batch * recipe.accumulate} rows in "
        f"micro-batches of {recipe.batch}, longest {longest:,} positions\n"
        f"memory   {size / 1e9:.2f} GB for weights, gradients and moments; activations on top\n"
    )


def _learn(
    args: argparse.Namespace,
    recipe: Recipe,
    folders: Folders,
    examples: list[Example],
    held: list[Example],
    messages: Messages,
) -> None:
    _check_whole(args, recipe, folders)
    out = _open_out(args.out, args.resume)
    assistant = _open_model(args, recipe)
    learning = prepare(assistant.model, recipe)
    optimiser = make_optimiser(learning, recipe)
    about = describe(recipe, args.data, folders)
    start, log = resume(out, learning, optimiser, about) if args.resume else (0, [])
    if args.resume:
        messages.note(f"goes on after update {start}" if start else "no state there: starts anew")
    layout = args.layout or ("hf" if _is_hub(folders) else "llava")
    model, updates = assistant.model, recipe.updates_for(len(examples))

    def files() -> None:
        if recipe.learn != "language":
            save_learnt(model, recipe, layout, str(folders.weights), out)
        write_whole(out / LOG_NAME, "".join(log))

    if start == 0:
        log += _measure(0, assistant, held, recipe, messages)
    if start == updates:  # a run that ended right after its last state
        files()
    with _stop_between_updates() as stopped:
        for record in train(model, examples, assistant.image_processor, recipe, optimiser, start):
            log.append(json.dumps(record._asdict()) + "\n")
            _tell(record, updates, messages)
            if stopped or record.update % args.save_every == 0 or record.update == updates:
                log += _measure(record.update, assistant, held, recipe, messages)
                # The state first: a run that is killed here goes on, and writes the others anew.
                save_state(out, record.update, learning, optimiser, about, log)
                files()
            if stopped:
                raise KeyboardInterrupt
    if recipe.learn == "language" or args.merged:
        save_whole(model, folders, out / "model")
    messages.note(_last_line(args, recipe, out, layout, folders))


def _check_whole(args: argparse.Namespace, recipe: Recipe, folders: Folders) -> None:
    """Raises ValueError if a whole model is asked for that could not be written."""
    if args.merged and recipe.learn == "medusa":
        raise ValueError("--merged is for a LoRA: heads are a file of their own; leave it out")
    if args.merged and recipe.quantize:
        raise ValueError(
            "--merged adds a LoRA to the weights it was learnt on, and those in "
            f"{recipe.quantize} are not stored; leave --merged or --quantize out"
        )
    if recipe.learn == "language" or args.merged:
        check_one_folder(folders)


def _measure(
    update: int, assistant: Assistant, held: list[Example], recipe: Recipe, messages: Messages
) -> list[str]:
    """The line of the log about the rows that are not learnt, if there are any."""
    if not held:
        return []
    if recipe.learn == "medusa":
        found = accuracy(assistant.model, held, assistant.image_processor, recipe.batch)
        messages.note(f"after update {update}, on {len(held)} held-out row(s): {told(found)}")
        return [json.dumps({"update": update, "held_out_top_1_and_5": found}) + "\n"]
    loss = held_out_loss(assistant.model, held, assistant.image_processor, recipe.batch)
    messages.note(f"after update {update}: loss {loss:.4f} on {len(held)} held-out row(s)")
    return [json.dumps({"update": update, "held_out_loss": loss}) + "\n"]


def _open_out(out: Path, goes_on: bool) -> Path:
    """The folder of the run. Raises ValueError if it is not empty, unless a run goes on in it."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not goes_on:
        raise ValueError(f"{out}: is not empty; --resume goes on there, or name a new folder")
    if out.exists() and any(out.iterdir()) and not (out / STATE_NAME).exists():
        raise ValueError(
            f"{out}: is not empty, and has no {STATE_NAME} to go on from; name a new one"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def _open_model(args: argparse.Namespace, recipe: Recipe) -> Assistant:
    """The model with its plain layers, since the layers that are fast at inference do not learn."""
    assistant = load(
        args.model,
        device=args.device,
        dtype="float32",
        attention="eager",
        quantize=recipe.quantize,
        vision_tower=args.vision_tower,
        model_base=args.model_base,
        template=recipe.template,
        image_aspect_ratio=recipe.aspect,
    )
    if assistant.model.projector.linear_1.weight.device.type != "cpu":
        assistant.model.language_model.attend = ATTENTION["fused"]
    return assistant


def _is_hub(folders: Folders) -> bool:
    content = json.loads((folders.find("config.json") / "config.json").read_text("utf-8"))
    return "text_config" in content


@contextmanager
def _stop_between_updates() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait until an update is whole and saved: the list is then not empty."""
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in signals]
    try:
        yield came
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _tell(record: Record, updates: int, messages: Messages) -> None:
    text = (
        f"update {record.update} of {updates}: loss {record.loss:.4f} over {record.tokens} tokens, "
        f"norm {record.norm:.3g}, {record.seconds:.2f} s"
    )
    messages.progress("" if record.update == updates else text)
    if messages.verbose:
        messages.note(text)


def _last_line(
    args: argparse.Namespace, recipe: Recipe, out: Path, layout: str, folders: Folders
) -> str:
    """A line that says how to ask the model that was learnt."""
    if recipe.learn == "language" or args.merged:
        return f"learnt; ask it with: python -m minillava.generate --weights {out / 'model'}"
    if recipe.learn == "medusa":
        return (
            "learnt; ask with them: python -m minillava.generate --weights "
            f"{folders.weights} --draft medusa:{out}"
        )
    if recipe.learn == "lora" and layout == "hf":
        return (
            "learnt; ask it with: python -m minillava.generate --weights "
            f"{folders.weights} --adapter {out}"
        )
    return (
        f"learnt; ask it with: python -m minillava.generate --weights {out} --model-base "
        f"{folders.weights}"
    )


def finetune(model: str | Path, data: str | Path, out: str | Path, **options: Any) -> None:
    """`python -m minillava.finetune` from Python: the flags by their names. Raises what the command
    says in one line."""
    flags: dict[str, Any] = {
        "recipe": "lora", "images": None, "resume": False, "save_every": 100, "layout": None,
        "merged": False, "skip_bad": False, "device": "auto", "vision_tower": None,
        "model_base": None, "check": None, "plan": False, "verbose": False, "quiet": True,
    }  # fmt: skip
    known = {*flags, *(field.name for field in dataclasses.fields(Recipe))}
    for name in options:
        if name not in known:
            raise TypeError(f"there is no option {name!r}: expected some of: {', '.join(known)}")
    given = {**flags, **options, "model": model, "data": Path(data), "out": Path(out)}
    run(argparse.Namespace(**given))
