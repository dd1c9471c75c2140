"""A run from its first update to its last: measured, logged, saved, stopped and gone on with."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillava.assistant import Assistant
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.write import as_json
from minillava.cli.messages import Messages
from minillava.files.disk import write_whole
from minillava.files.hub import is_repo_id
from minillava.finetune import processes
from minillava.finetune.curve import curve
from minillava.finetune.evaluate import answers, best_of, held_out_loss
from minillava.finetune.learning import learnt_of, make_optimiser, prepare
from minillava.finetune.loop import Batch, summed_loss, train
from minillava.finetune.medusa import accuracy, told
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example
from minillava.finetune.save import (
    check_base,
    grown_files,
    save_learnt,
    save_whole,
    whole_weights,
)
from minillava.finetune.start import open_model
from minillava.finetune.state import (
    BEFORE_NAME,
    NEXT_NAME,
    STATE_NAME,
    describe,
    resume,
    save_state,
)
from minillava.finetune.watch import LOG_NAME, LOGGERS, Log, open_loggers, tell
from minillava.llava import Llava

BEST_NAME, WHOLE_NAME, RECIPE_NAME, CURVE_NAME = "best", "model", "recipe.json", "curve.png"
"""In the folder of a run: what was learnt when the held-out loss was lowest, the whole model,
the settings, and the loss as a picture."""


def learn(
    args: argparse.Namespace,
    recipe: Recipe,
    folders: Folders,
    examples: list[Example],
    held: list[Example],
    messages: Messages,
    again: bool,
) -> None:
    """Learn the examples, into --out. again: blocks are computed again in the backward pass. Raises
    KeyboardInterrupt when it was stopped, and saved."""
    _check_whole(args, recipe, folders)
    messages.quiet |= processes.rank() > 0
    with ExitStack() as stack:
        if not processes.rank():
            _open_out(args.out, args.resume)
        processes.wait()
        data = [*(source.path for source in args.data), *([args.val] if args.val else [])]
        about = {**describe(recipe, data, folders, examples), "processes": processes.count()}
        loggers = {} if processes.rank() else open_loggers(args.log, args.out, about)
        assistant = open_model(recipe, folders, args.device)
        learning = prepare(assistant.model, recipe, again)
        loss_of: Callable[[Llava, Batch], Tensor] = summed_loss
        if processes.count() > 1 and whole_learns(recipe):
            dtype = getattr(torch, recipe.dtype)
            whole_pass = stack.enter_context(processes.cut_up(assistant.model, dtype))
            learning = learnt_of(assistant.model)
            loss_of = lambda model, batch: whole_pass(summed_loss, batch)  # noqa: E731
        optimiser = make_optimiser(learning, recipe)
        done, lines = resume(args.out, learning, optimiser, about) if args.resume else (0, [])
        if args.resume:
            messages.note(f"goes on after update {done}" if done else "no state there: starts anew")
        processes.wait()  # nobody writes before all have read
        log = Log(args.out / LOG_NAME, lines, loggers, messages, writes=not processes.rank())
        run = Session(
            args, recipe, folders, assistant, learning, optimiser, about, log, held, loss_of
        )
        run.from_update(done, examples)


class Session:
    """What a run has while it goes on."""

    def __init__(
        self,
        args: argparse.Namespace,
        recipe: Recipe,
        folders: Folders,
        assistant: Assistant,
        learning: dict[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        about: dict[str, Any],
        log: Log,
        held: list[Example],
        loss_of: Callable[[Llava, Batch], Tensor],
    ):
        self.args, self.recipe, self.folders, self.assistant = args, recipe, folders, assistant
        self.learning, self.optimiser, self.about, self.log = learning, optimiser, about, log
        self.held, self.loss_of, self.messages = held, loss_of, log.messages
        self.out: Path = args.out
        self.evaluate_every = args.evaluate_every or args.save_every

    def from_update(self, done: int, examples: Sequence[Example]) -> None:
        """Go on after so many updates. Raises KeyboardInterrupt when it was stopped, and saved."""
        updates = self.recipe.updates_for(len(examples))
        if not processes.rank():
            write_whole(self.out / RECIPE_NAME, as_json(self.about))
        if done == 0:
            self.measure(0)
        else:  # of a run that was killed between its state and the other files
            self.write(done)
            last = [r["update"] for r in self.log.records if "held_out_loss" in r][-1:]
            if last == [done] and best_of(self.log.records)[1] == 0:
                self.write_learnt(self.out / BEST_NAME)
        if not self.stale():
            self._updates(done, updates, examples)
        self.finish()

    def _updates(self, done: int, updates: int, examples: Sequence[Example]) -> None:
        processor = self.assistant.image_processor
        with stop_between_updates() as came:
            for record in train(
                self.assistant.model, examples, processor, self.recipe, self.optimiser, done,
                self.loss_of,
            ):  # fmt: skip
                self.log.add(record._asdict())
                tell(record._asdict(), updates, self.messages)
                stopped, last = processes.anybody(bool(came)), record.update == updates
                ends = stopped or last
                if last or record.update % self.evaluate_every == 0:
                    self.measure(record.update)
                    ends |= self.stale()
                if ends or record.update % self.args.save_every == 0:
                    self.save(record.update)
                if stopped:
                    self.messages.note(
                        f"stopped and saved after update {record.update}; --resume goes on"
                    )
                    raise KeyboardInterrupt
                if ends:
                    return

    def measure(self, update: int) -> None:
        """Note how well it does on the rows that are not learnt, if there are any; what is best so
        far is kept."""
        if not self.held:
            return
        model, processor = self.assistant.model, self.assistant.image_processor
        before, _ = best_of(self.log.records)
        loss = held_out_loss(model, self.held, processor, self.recipe, self.loss_of)
        noted = f"after update {update}: loss {loss:.4f} on {len(self.held)} held-out row(s)"
        record: dict[str, Any] = {"update": update, "held_out_loss": loss}
        if self.recipe.learn == "medusa":  # whose heads change no answer
            found = accuracy(model, self.held, processor, self.recipe.batch)
            noted += f", {told(found)}"
            record["held_out_top_1_and_5"] = found
        else:
            cut = processes.is_cut()
            record["answers"] = [] if cut else answers(self.assistant, self.held, self.recipe)
        self.messages.note(noted)
        self.log.add(record)
        if loss < before and update:
            self.write_learnt(self.out / BEST_NAME)

    def stale(self) -> bool:
        """Whether so many measurements as --early-stop says came without a lower loss."""
        limit = self.args.early_stop
        return limit is not None and best_of(self.log.records)[1] >= limit

    def save(self, update: int) -> None:
        """The state first: a run that is killed after it goes on, and writes the others anew."""
        save_state(self.out, update, self.learning, self.optimiser, self.about, self.log.lines)
        self.write(update)

    def write(self, update: int) -> None:
        """What was learnt after an update, the log and its curve, as files."""
        if whole_learns(self.recipe):
            self.write_learnt(self.out / WHOLE_NAME)
        else:
            self.write_learnt(self.out)
        self.log.save()
        if self.log.writes:
            write_whole(self.out / CURVE_NAME, curve(self.log.records))

    def write_learnt(self, target: Path) -> None:
        """What was learnt so far, as a folder that minillava.load opens."""
        model = self.assistant.model
        if whole_learns(self.recipe):
            self.write_whole(target)
        elif not processes.rank():
            target.mkdir(exist_ok=True)
            base = base_name(self.args.model, self.folders)
            save_learnt(model, self.recipe, self.args.layout, base, self.folders, target)
        processes.wait()

    def write_whole(self, target: Path) -> None:
        """The whole model as files; all processes must call this."""
        learnt = whole_weights(self.assistant.model, self.folders)
        if not processes.rank():
            grown = grown_files(self.assistant.model, self.recipe, self.folders)
            save_whole(learnt, self.folders, target, grown)

    def finish(self) -> None:
        if self.args.merged:
            self.write_whole(self.out / WHOLE_NAME)
        self.messages.note(last_line(self.args, self.recipe, self.folders))


def whole_learns(recipe: Recipe) -> bool:
    return recipe.learn in ("language", "everything")


def base_name(given: str | Path, folders: Folders) -> str:
    """What the base is called in the files of a LoRA or a projector: a hub id, or its path."""
    if is_repo_id(str(given)):
        return str(given)
    return os.path.abspath(folders.model_base or folders.weights)


def _check_whole(args: argparse.Namespace, recipe: Recipe, folders: Folders) -> None:
    """Raises ValueError if a whole model is asked for that could not be written."""
    if args.merged and recipe.learn == "medusa":
        raise ValueError("--merged is for a LoRA: heads are a file of their own; leave it out")
    if args.merged and recipe.quantize:
        raise ValueError(
            "--merged adds a LoRA to the weights it was learnt on, and those in "
            f"{recipe.quantize} are not stored; leave --merged or --quantize out"
        )
    if whole_learns(recipe) or args.merged:
        check_base(folders)
        if recipe.add_tokens and folders != Folders(folders.weights):
            raise ValueError(
                "--add-tokens writes a whole model only of one in a single folder; join this one "
                "with python -m minillava.convert"
            )


OURS = (STATE_NAME, BEFORE_NAME, NEXT_NAME, LOG_NAME, RECIPE_NAME, CURVE_NAME)


def _open_out(out: Path, goes_on: bool) -> None:
    """Make the folder of the run. Raises ValueError if it is not empty, unless a run goes on in it;
    one that was killed before its first state has left a log, files that are not whole, what was
    best, and the folders of its loggers."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder")
    found = [path.name for path in out.iterdir()] if out.exists() else []
    if found and not goes_on:
        raise ValueError(f"{out}: is not empty; --resume goes on there, or name a new folder")
    # a logger's folder is made before the log, what is best after it
    ours = (*OURS, *LOGGERS, *[BEST_NAME] * (LOG_NAME in found))
    others = [name for name in found if not name.startswith(ours)]
    if others and not {STATE_NAME, BEFORE_NAME} & set(found):
        raise ValueError(
            f"{out}: is not empty, and has no {STATE_NAME} to go on from; name a new one"
        )
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def stop_between_updates() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait until an update is whole and saved: the list is then not empty. A
    second Ctrl-C does not wait."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_line(args: argparse.Namespace, recipe: Recipe, folders: Folders) -> str:
    """A line that says how to ask the model that was learnt."""
    out, base = args.out, folders.model_base or folders.weights
    tower = f" --vision-tower {folders.vision_tower}" if folders.vision_tower else ""
    if whole_learns(recipe) or args.merged:
        return f"learnt; ask it with: python -m minillava.generate --weights {out / WHOLE_NAME}"
    if recipe.learn == "medusa":
        return (
            "learnt; ask with them: python -m minillava.generate --weights "
            f"{folders.weights} --draft medusa:{out}"
        )
    if recipe.learn == "lora" and args.layout == "hf":
        return (
            "learnt; ask it with: python -m minillava.generate --weights "
            f"{folders.weights}{tower} --adapter {out}"
        )
    return (
        f"learnt; ask it with: python -m minillava.generate --weights {out} --model-base "
        f"{base}{tower}"
    )
