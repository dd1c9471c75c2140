"""What `python -m minillava.generate` does: one question, its answer as it is made, or as one JSON
object."""

import argparse
import json
import sys
import time

from torch import Tensor

from minillava.assistant import Assistant
from minillava.cli.messages import Messages, print_json, write_outputs
from minillava.cli.opening import find_weights, note_several, open_assistant, read_question
from minillava.generate import beam
from minillava.generate.contrast import Contrast, describe
from minillava.llava import Spliced
from minillava.loop import steps
from minillava.options import Options
from minillava.tokenizer import Tokenizer


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
    messages: Messages,
) -> tuple[list[dict], str]:
    """Token after token; printed as text unless --json, a single answer as it is made. Returns the
    answers, and what --contrast-log asks for."""
    count, length, started = (
        chosen.num_return_sequences,
        spliced.embeds.shape[1],
        time.perf_counter(),
    )
    answers = [{"text": "", "ids": [], "finish_reason": None} for _ in range(count)]
    spliced, tokenizer, log, made = spliced.repeat_rows(count), assistant.tokenizer, [], 0
    for step in steps(assistant.model, spliced, chosen, tokenizer=tokenizer, contrast=contrast):
        if not made:
            messages.stage("prefill", started, f"{length} positions, first token")
            started = time.perf_counter()
        if args.contrast_log:
            log.append(
                json.dumps(describe(contrast, step, made, tokenizer), ensure_ascii=False) + "\n"
            )
        made += 1
        for row, answer in enumerate(answers):
            if answer["finish_reason"] is None:
                answer["ids"].append(step.ids[row])
                answer["text"] += step.text[row]
                answer["finish_reason"] = step.finish_reason[row]
                if args.logprobs is not None:
                    token = _logprobs(answer["ids"][-1], step.logits[row], args.logprobs, tokenizer)
                    answer.setdefault("tokens", []).append(token)
        if not args.json and count == 1:
            print(step.text[0], end="", flush=True)
    if not args.json:
        print("" if count == 1 else "\n\n".join(answer["text"] for answer in answers), flush=True)
    more, reasons = made - 1, ", ".join(answer["finish_reason"] for answer in answers)
    speed = f", {more / (time.perf_counter() - started):.1f} per second" if more else ""
    messages.stage(
        "decode", started, f"{more} more token(s){speed}; ended by {reasons}, seed {chosen.seed}"
    )
    return answers, "".join(log)


def _search(
    args: argparse.Namespace,
    assistant: Assistant,
    spliced: Spliced,
    chosen: Options,
    messages: Messages,
) -> list[dict]:
    """Beam search; printed as text unless --json."""
    started, tokenizer = time.perf_counter(), assistant.tokenizer
    record = () if args.logprobs is None else ("logits",)
    found = beam.search(assistant.model, spliced, chosen, tokenizer=tokenizer, record=record)
    answers = []
    for row, length in enumerate(found.lengths):
        ids, score = found.sequences[row, :length].tolist(), round(float(found.scores[row]), 6)
        answer = {
            "text": found.text[row],
            "ids": ids,
            "finish_reason": found.finish_reason[row],
            "score": score,
        }
        if record:
            logits = (step[row] for step in found.recorded["logits"][:length])
            answer["tokens"] = [
                _logprobs(i, x, args.logprobs, tokenizer) for i, x in zip(ids, logits, strict=True)
            ]
        answers.append(answer)
    if not args.json:
        print("\n\n".join(found.text), flush=True)
    messages.stage("search", started, f"{chosen.num_beams} beams, best score {answers[0]['score']}")
    return answers


def answer(args: argparse.Namespace, options: dict, contrast: Contrast | None) -> int:
    """What `generate` does with its flags; the exit status."""
    messages = Messages(args.verbose, args.quiet)
    weights = find_weights(args.weights, messages)
    question, images = read_question(args)
    note_several(len(images), messages)
    assistant = open_assistant(args, weights, messages)
    prompt = assistant.prompt(question, images=len(images), system=args.system)
    if args.print_prompt:
        print(prompt, file=sys.stderr)
    chosen = assistant.options(**options)
    started = time.perf_counter()
    spliced = assistant.prepare(images, prompt, contrast, chosen.seed)
    length, words = spliced.embeds.shape[1], len(spliced.input_ids[0])
    messages.stage(
        "encode", started, f"{len(images)} picture(s), {words} ids -> {length} positions"
    )

    if chosen.num_beams > 1:
        answers, log = _search(args, assistant, spliced, chosen, messages), ""
    else:
        answers, log = _follow(args, assistant, spliced, chosen, contrast, messages)
    if args.json:
        result = {
            **(answers[0] if len(answers) == 1 else {"answers": answers}),
            "prompt": prompt,
            "seed": chosen.seed,
            "timings": {name: round(seconds, 6) for name, seconds in messages.timings.items()},
        }
        print_json(result)
    return write_outputs({args.contrast_log: log} if args.contrast_log else {})
