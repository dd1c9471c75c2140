"""What `python -m minillava.generate` does: one question, its answer as it is made, or as one JSON
object."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minillava.assistant import Assistant
from minillava.cli.messages import Messages, coloured, has_colours, print_json, write_outputs
from minillava.cli.opening import find_weights, note_several, open_assistant, read_question
from minillava.generate import beam
from minillava.generate.contrast import Contrast, describe
from minillava.generate.inputs import repeat_rows
from minillava.generate.speculate import Drafts, following
from minillava.llava import Spliced
from minillava.loop import Step
from minillava.options import Options
from minillava.tokenizer import Tokenizer


@dataclass
class Answer:
    """One answer, to print or for --json. ids: of the new tokens. score: of a beam. tokens: with
    --logprobs, each id with the most likely ones in its place."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    score: float | None = None
    tokens: list[dict] | None = None

    def add(self, step: Step, row: int, logprobs: int | None, tokenizer: Tokenizer) -> None:
        """Add what row `row` of a step says; nothing after the answer's end."""
        if self.finish_reason is not None:
            return
        self.ids.append(step.ids[row])
        self.text += step.text[row]
        self.finish_reason = step.finish_reason[row]
        if logprobs is not None:
            self.tokens = [] if self.tokens is None else self.tokens
            self.tokens.append(_logprobs(self.ids[-1], step.logits[row], logprobs, tokenizer))

    def record(self) -> dict[str, Any]:
        """The answer's fields, for --json."""
        return {name: value for name, value in vars(self).items() if value is not None}


def as_json(answers: Sequence[Answer], **rest: Any) -> dict[str, Any]:
    """The one form of --json: the first answer's fields, the list of all answers, and the rest."""
    records = [answer.record() for answer in answers]
    return {**records[0], "answers": records, **rest}


def _logprobs(token_id: int, logits: Tensor, count: int, tokenizer: Tokenizer) -> dict:
    """A token and the `count` most likely ones in its place, with their log-probabilities by the
    logits [V]."""
    log_p = logits.log_softmax(-1)

    def described(i: int) -> dict:
        return {"id": i, "piece": tokenizer.piece(i), "logprob": round(float(log_p[i]), 6)}

    return described(token_id) | {
        "top": [described(i) for i in log_p.topk(min(count, len(log_p))).indices.tolist()]
    }


def _follow(
    args: argparse.Namespace,
    assistant: Assistant,
    spliced: Spliced,
    chosen: Options,
    contrast: Contrast | None,
    follow: Callable[..., Iterator[Step]],
    shown: Drafts | None,
    messages: Messages,
) -> tuple[list[Answer], str]:
    """Generate token after token; a single answer is printed as it is made, unless --json is given.
    shown: drafts whose right guesses are coloured. Returns the answers, and the records of
    --contrast-log."""
    answers = [Answer() for _ in range(chosen.num_return_sequences)]
    streamed = not args.json and len(answers) == 1
    length, started = spliced.embeds.shape[1], time.perf_counter()
    spliced, tokenizer = repeat_rows(spliced, len(answers)), assistant.tokenizer
    log, made = [], 0
    for step in follow(assistant.model, spliced, chosen, tokenizer=tokenizer, contrast=contrast):
        if not made:
            messages.stage("prefill", started, f"{length} positions, first token")
            started = time.perf_counter()
        if args.contrast_log:
            told = describe(contrast, step, made, tokenizer)
            log.append(json.dumps(told, ensure_ascii=False) + "\n")
        made += 1
        for row, answer in enumerate(answers):
            answer.add(step, row, args.logprobs, tokenizer)
        if streamed:
            right = shown is not None and shown.right(made - 1)
            print(coloured(step.text[0]) if right else step.text[0], end="", flush=True)
    if streamed:
        print(flush=True)
    elif not args.json:
        print_answers(answers)
    reasons = ", ".join(str(answer.finish_reason) for answer in answers)
    messages.decoded(started, made - 1, f"{reasons}, seed {chosen.seed}")
    return answers, "".join(log)


def print_answers(answers: Sequence[Answer]) -> None:
    """Print answers as text, with an empty line between two."""
    print("\n\n".join(answer.text for answer in answers), flush=True)


def _search(
    args: argparse.Namespace,
    assistant: Assistant,
    spliced: Spliced,
    chosen: Options,
    messages: Messages,
) -> list[Answer]:
    """Answer by beam search, and print the answers as text unless --json is given."""
    started, tokenizer = time.perf_counter(), assistant.tokenizer
    record = () if args.logprobs is None else ("logits",)
    found = beam.search(assistant.model, spliced, chosen, tokenizer=tokenizer, record=record)
    answers = []
    for row, length in enumerate(found.lengths):
        ids, score = found.sequences[row, :length].tolist(), round(float(found.scores[row]), 6)
        answer = Answer(found.text[row], ids, found.finish_reason[row], score)
        if record:
            logits = (step[row] for step in found.recorded["logits"][:length])
            answer.tokens = [
                _logprobs(i, x, args.logprobs, tokenizer) for i, x in zip(ids, logits, strict=True)
            ]
        answers.append(answer)
    if not args.json:
        print_answers(answers)
    messages.stage("search", started, f"{chosen.num_beams} beams, best score {answers[0].score}")
    return answers


def answer(args: argparse.Namespace, options: dict, contrast: Contrast | None) -> int:
    """Run `generate` with its flags; returns the exit status."""
    messages = Messages(args.verbose, args.quiet)
    weights = find_weights(args.weights, messages)
    question, images = read_question(args)
    note_several(len(images), messages)
    assistant = open_assistant(args, weights, messages)
    prompt = assistant.prompt(question, images=len(images), system=args.system)
    if args.print_prompt:
        print(prompt, file=sys.stderr)
    chosen = assistant.options(**options)
    drafts = assistant.drafts(args.draft, args.draft_tokens)
    follow = following(drafts, chosen, images)
    started = time.perf_counter()
    spliced = assistant.prepare(images, prompt, contrast, chosen.seed)
    length = spliced.embeds.shape[1]
    words = length - sum(end - start - 1 for start, end in spliced.image_spans[0])
    messages.stage(
        "encode", started, f"{len(images)} picture(s), {words} ids -> {length} positions"
    )

    if chosen.num_beams > 1:
        answers, log = _search(args, assistant, spliced, chosen, messages), ""
    else:
        shown = drafts if args.show_drafts and has_colours(sys.stdout) else None
        answers, log = _follow(args, assistant, spliced, chosen, contrast, follow, shown, messages)
    if drafts is not None:
        messages.detail(f"drafts   {drafts.report.told()}")
    if args.json:
        timings = {name: round(seconds, 6) for name, seconds in messages.timings.items()}
        draft = {} if drafts is None else {"draft": drafts.report.record()}
        print_json(as_json(answers, prompt=prompt, seed=chosen.seed, **draft, timings=timings))
    return write_outputs({args.contrast_log: log} if args.contrast_log else {})
