"""The command line: what it prints where, what it accepts, how it exits, and what it says when
something is wrong."""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from bounds import network
from commands import environment, start
from folders import change_config
from models import stored
from paths import REFERENCE, ROOT
from safetensors.torch import load_file, save_file
from waiting import PATIENCE

import minillava
from minillava.cli import messages
from minillava.cli.arguments import Parser, check_outputs, file_name, number_list
from minillava.cli.doors import enter, flags_of
from minillava.cli.flags import GENERATION_FLAGS, SEARCH_FLAGS
from minillava.cli.messages import print_json, write_outputs
from minillava.cli.opening import THREAD_VARIABLES, choose_threads
from minillava.generate.contrast import METHODS
from minillava.generate.flags import make_parser
from minillava.loop import Options
from minillava.options import WEIGHTS_VARIABLE
from minillava.prompt import DEFAULT_PROMPT
from minillava.templates import DEFAULT_TEMPLATE, TEMPLATES

main = partial(enter, "generate")

WEIGHTS = str(REFERENCE / "plain")
PICTURE, OTHER = (
    str(REFERENCE / "pictures" / "square.png"),
    str(REFERENCE / "pictures" / "grey.png"),
)
LENGTH = 6
QUESTION = "What is it?"
BASE = ["--device", "cpu", "--dtype", "float32", "-n", str(LENGTH)]


@pytest.fixture
def run(run_main):
    """`run(*arguments)`: the command in this process -> (exit status, stdout, stderr)."""

    def on_the_toy(
        *arguments: str, base: list[str] = BASE, weights: str | None = WEIGHTS
    ) -> tuple[int, str, str]:
        return run_main(main, *(["-m", weights] if weights else []), *base, *arguments)

    return on_the_toy


@pytest.fixture
def answer(run):
    """`answer(*arguments)`: stdout of a run that must succeed with nothing on stderr."""

    def checked(*arguments: str, **options) -> str:
        status, out, err = run(*arguments, **options)
        assert (status, err) == (0, "")
        return out

    return checked


@pytest.fixture
def result(answer):
    """`result(*arguments)`: the JSON object of a run."""
    return lambda *arguments, **options: json.loads(answer("--json", *arguments, **options))


@pytest.fixture
def stdin(monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return give


# --- the answer -----------------------------------------------------------------------------------


def test_stdout_is_the_answer_and_nothing_else(answer, assistant):
    """A note or a blank line on stdout would become part of the answer in a script."""
    expected = assistant.ask(PICTURE, QUESTION, max_new_tokens=LENGTH)
    assert expected.strip()
    assert answer("-i", PICTURE, "-p", QUESTION) == expected + "\n"


def test_without_a_question_the_picture_is_described(result):
    """A picture alone would be refused, or asked another question than --help promises."""
    assert result("-i", PICTURE) == {
        **result("-i", PICTURE, "-p", DEFAULT_PROMPT),
        "seed": ANY,
        "timings": ANY,
    }


def test_without_a_picture_it_is_a_language_model(answer, assistant):
    """A question without a picture would be refused, or get a picture's mark in its prompt."""
    assert answer("-p", QUESTION) == assistant.ask(None, QUESTION, max_new_tokens=LENGTH) + "\n"


def test_json_agrees_with_the_plain_run(result, answer, assistant):
    """--json would give another answer than the plain run, or lose one of its fields."""
    found = result("-i", PICTURE, "-p", QUESTION)
    first = ["text", "ids", "finish_reason"]
    assert list(found) == [*first, "answers", "prompt", "seed", "timings"]
    assert found["answers"] == [{name: found[name] for name in first}]
    assert found["text"] + "\n" == answer("-i", PICTURE, "-p", QUESTION)
    assert len(found["ids"]) == LENGTH
    assert found["text"] == assistant.tokenizer.decode(found["ids"])
    assert found["finish_reason"] == "length"
    assert found["prompt"] == assistant.prompt(QUESTION)
    assert list(found["timings"]) == ["load", "encode", "prefill", "decode"]
    assert all(type(seconds) is float and seconds > 0 for seconds in found["timings"].values())


def test_json_is_one_line_of_valid_json_whatever_the_model_says(answer):
    """Quotes or newlines would break the JSON, or its letters would be escaped beyond reading."""
    out = answer("--json", "-i", PICTURE, "-p", "Ünïcode “quotes” \\ and \n newlines")
    assert out.count("\n") == 1
    assert "Ünïcode" in out  # readable, not escaped
    assert json.loads(out)["prompt"].count("\n") == 2


def test_the_end_token_ends_the_answer(result, folder):
    """The model's own end token would be ignored, so that it talks on."""
    ids = result("-i", PICTURE, "-p", QUESTION)["ids"]
    end = next(i for i in ids if i != ids[0])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": end}), encoding="utf-8"
    )
    found = result("-i", PICTURE, "-p", QUESTION, weights=str(folder))
    assert found["ids"] == ids[: ids.index(end) + 1]
    assert found["finish_reason"] == "stop"


def test_a_stop_text_ends_the_answer_and_is_cut_from_it(result):
    """The stop text would stay in the answer, or only the last --stop would count."""
    text = result("-i", PICTURE, "-p", QUESTION)["text"]
    found = result("-i", PICTURE, "-p", QUESTION, "--stop", "never said", "--stop", text[2])
    assert (found["text"], found["finish_reason"]) == (text[: text.index(text[2])], "stop")


def test_print_prompt_shows_the_exact_prompt_on_stderr(run, answer, assistant):
    """--print-prompt would mix the prompt into the answer, or show one that was not asked."""
    status, out, err = run("-i", PICTURE, "-p", QUESTION, "--print-prompt")
    assert (status, out) == (0, answer("-i", PICTURE, "-p", QUESTION))
    assert err == assistant.prompt(QUESTION) + "\n"


def test_template_and_system_shape_the_prompt(result):
    """--system "" would be taken for no --system, so that the template's text stays."""
    template = TEMPLATES["vicuna_v1"]
    found = result("-i", PICTURE, "-p", QUESTION, "--template", "vicuna_v1")["prompt"]
    assert found == f"{template.system} USER: <image>\n{QUESTION} ASSISTANT:"
    found = result("-i", PICTURE, "-p", QUESTION, "--system", "Be short.")["prompt"]
    assert found == f"Be short. USER: <image>\n{QUESTION} ASSISTANT:"
    assert (
        result("-i", PICTURE, "-p", QUESTION, "--system", "")["prompt"]
        == f"USER: <image>\n{QUESTION} ASSISTANT:"
    )


def test_the_aspect_ratio_reaches_the_pixels(result, folder):
    """--image-aspect-ratio would be accepted and the picture padded all the same."""
    wide = str(REFERENCE / "pictures" / "landscape.png")
    answers = {
        aspect: result("-i", wide, "-p", QUESTION, "--image-aspect-ratio", aspect)["ids"]
        for aspect in ("pad", "crop")
    }
    assert answers["pad"] != answers["crop"]
    assert result("-i", wide, "-p", QUESTION)["ids"] == answers["pad"]


def test_verbose_tells_every_stage_on_stderr(run, answer):
    """--verbose would change the answer, or leave out a stage that took the time."""
    status, out, err = run("-i", PICTURE, "-p", QUESTION, "--verbose")
    assert (status, out) == (0, answer("-i", PICTURE, "-p", QUESTION))
    stages = [re.match(r"(\w+) +(\d+\.\d{3}) s  (.+)", line) for line in err.splitlines()]
    assert [stage[1] for stage in stages] == ["load", "encode", "prefill", "decode"]
    assert "170,112 parameters, float32 on cpu" in stages[0][3]
    assert "1 picture(s)" in stages[1][3]
    assert f"{LENGTH - 1} more token(s)" in stages[3][3]


# --- where things come from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--weights",
            WEIGHTS,
            "--image",
            PICTURE,
            "--prompt",
            QUESTION,
            "--max-new-tokens",
            str(LENGTH),
        ],
        ["--model", WEIGHTS, "-i", PICTURE, "--query", QUESTION, "--max_new_tokens", str(LENGTH)],
        [
            "--model-path",
            WEIGHTS,
            f"--image={PICTURE}",
            f"--prompt={QUESTION}",
            f"--max_new_tokens={LENGTH}",
        ],
        [
            "--model_path",
            WEIGHTS,
            "-i",
            PICTURE,
            "-p",
            QUESTION,
            f"-n{LENGTH}",
            "--conv_mode",
            DEFAULT_TEMPLATE,
        ],
        [
            "-m",
            WEIGHTS,
            "-i",
            PICTURE,
            "-p",
            QUESTION,
            "-n",
            str(LENGTH),
            "--conv-mode",
            DEFAULT_TEMPLATE,
        ],
        [
            "-m",
            WEIGHTS,
            "-i",
            PICTURE,
            "-p",
            QUESTION,
            "-n",
            str(LENGTH),
            "--image_aspect_ratio",
            "pad",
            "-q",
        ],
        [
            "-m",
            WEIGHTS,
            "-i",
            PICTURE,
            "-p",
            QUESTION,
            "-n",
            str(LENGTH),
            "--attention",
            "eager",
            "--device",
            "auto",
        ],
    ],
)
def test_every_spelling_of_a_flag_means_the_same(answer, arguments):
    """A command copied from LLaVA would be refused for an underscore or an old flag's name."""
    expected = answer("-i", PICTURE, "-p", QUESTION)
    assert (
        answer(*arguments, base=["--device", "cpu", "--dtype", "float32"], weights=None) == expected
    )


@pytest.mark.parametrize("question", ["snake_case", "--what_is this_thing", "a=b_c"])
def test_underscores_are_forgiven_in_flags_and_kept_in_questions(result, question):
    """The underscores of a question would become dashes like those of a flag."""
    assert question in result("-p", question)["prompt"]
    assert question in result(f"--prompt={question}")["prompt"]


def test_a_picture_from_stdin(result, stdin):
    """`-i -` would look for a file named -, or read the picture as text."""
    stdin(Path(PICTURE).read_bytes())
    assert result("-i", "-", "-p", QUESTION)["ids"] == result("-i", PICTURE, "-p", QUESTION)["ids"]


def test_a_picture_from_a_data_url(result):
    """A picture inside a data URL would be taken for a path."""
    url = "data:image/png;base64," + base64.b64encode(Path(PICTURE).read_bytes()).decode()
    assert result("-i", url, "-p", QUESTION)["ids"] == result("-i", PICTURE, "-p", QUESTION)["ids"]


@pytest.mark.parametrize("content", [QUESTION, QUESTION + "\n"])
def test_a_question_from_stdin_without_the_newline_that_ends_its_line(result, stdin, content):
    """The newline that ends a piped question would go into the prompt."""
    stdin(content.encode())
    assert (
        result("-i", PICTURE, "-p", "-")["prompt"]
        == result("-i", PICTURE, "-p", QUESTION)["prompt"]
    )


def test_several_pictures_go_before_the_question_in_order(result, assistant):
    """Of several pictures only the last would be used, or their order turned around."""
    found = result("-i", PICTURE, "--image", OTHER, "-p", QUESTION, "-q")
    assert f"USER: <image>\n<image>\n{QUESTION}" in found["prompt"]
    text = assistant.ask([PICTURE, OTHER], QUESTION, max_new_tokens=LENGTH)
    assert found["text"] == text != assistant.ask([OTHER, PICTURE], QUESTION, max_new_tokens=LENGTH)


def test_pictures_go_where_the_question_places_them(result):
    """Pictures that the question places itself would be put in front of it once more."""
    question = "<image> or <image>: which is brighter?"
    assert (
        f"USER: {question} ASSISTANT:"
        in result("-i", PICTURE, "-i", OTHER, "-p", question, "-q")["prompt"]
    )


def test_several_pictures_get_a_note_once(run):
    """Models of today take several, and LLaVA-1.5 answers as if it did, too."""
    note = (
        "note: several pictures in one prompt: LLaVA-1.5 was trained on one, and may mix them up\n"
    )
    assert run("-i", PICTURE, "-i", OTHER, "-i", OTHER, "-n", "1")[2] == note


def test_an_original_release_with_the_clip_it_needs(result, tmp_path, write_dialect):
    """--vision-tower would not reach the loader, so that an original release cannot be opened."""
    options = write_dialect("original-bare", tmp_path)
    arguments = ["-i", PICTURE, "-p", QUESTION, "--vision_tower", options["vision_tower"]]
    assert (
        result(*arguments, weights=str(options["weights"]))["ids"]
        == result("-i", PICTURE, "-p", QUESTION)["ids"]
    )


def test_weights_from_the_environment_unless_given(result, monkeypatch, tmp_path):
    """The environment's weights would win over those given by hand."""
    expected = result("-i", PICTURE, "-p", QUESTION)["ids"]
    monkeypatch.setenv(WEIGHTS_VARIABLE, WEIGHTS)
    assert result("-i", PICTURE, "-p", QUESTION, weights=None)["ids"] == expected
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path / "nowhere"))
    assert result("-i", PICTURE, "-p", QUESTION)["ids"] == expected


@pytest.mark.parametrize("bundled", [Path(WEIGHTS), None])
def test_without_weights_it_takes_the_bundled_ones_and_says_how_to_get_others(
    run, monkeypatch, bundled
):
    """A user without --weights would take the toy's answer for LLaVA's, or not know what to get."""
    monkeypatch.setattr("minillava.checkpoint.folders.bundled_weights", lambda: bundled)
    status, out, err = run("-i", PICTURE, weights=None)
    assert (status, bool(out)) == ((1, False) if bundled is None else (0, True))
    assert err.count("\n") == 1
    for part in (
        "bundled",
        "--weights",
        WEIGHTS_VARIABLE,
        "hf download llava-hf/llava-interleave-qwen-0.5b-hf",
    ):
        assert part in err
    if bundled is not None:
        assert run("-i", PICTURE, "-q", weights=None) == (0, out, "")


# --- contrastive decoding -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_contrast_says_what_the_library_says(run, method):
    """--contrast would take another beta or seed than the library, so that the answers differ."""
    assistant = minillava.load(WEIGHTS, device="cpu", dtype="float32")
    expected = assistant.ask(
        PICTURE, QUESTION, max_new_tokens=LENGTH, seed=1, contrast=METHODS[method](beta=0.05)
    )
    found = run(
        "-i", PICTURE, "-p", QUESTION, "--contrast", method, "--cd_beta", "0.05", "--seed", "1"
    )
    assert found == (0, expected + "\n", "")


def test_the_contrast_log_tells_what_each_token_was_chosen_from(run, tmp_path):
    """The log would miss a token, or stay torn beside its own temporary file."""
    path = tmp_path / "log.jsonl"
    arguments = [
        "-i",
        PICTURE,
        "-p",
        QUESTION,
        "--contrast",
        "vcd",
        "--cd-alpha",
        "2",
        "--seed",
        "1",
    ]
    _, out, _ = run(*arguments, "--contrast-log", path, "--json")
    result, lines = (
        json.loads(out),
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()],
    )
    assert [line["id"] for line in lines] == result["ids"]
    assert "".join(line["text"] for line in lines) == result["text"]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    tokenizer = minillava.load(WEIGHTS, device="cpu", dtype="float32").tokenizer.sentencepiece
    for line in lines:
        assert [len(line[stream]) for stream in ("first", "second", "combined")] == [5, 5, 5]
        # greedy: the best of the combination
        assert line["combined"][0][0] == tokenizer.id_to_piece(line["id"])
        assert line["cut"] > 0
        assert line["first"] != line["second"]
    assert list(tmp_path.iterdir()) == [path]
    status, _, err = run(*arguments, "--contrast-log", tmp_path / "no" / "log", "--json")
    assert (status, "no such folder" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--cd-alpha", "1"], ["--cd-alpha", "--contrast vcd", "no --contrast"]),
        (["--contrast", "m3id", "--noise-step", "3"], ["--noise-step", "--contrast vcd", "m3id"]),
        (
            ["--contrast", "vcd", "--noise-step", "1000"],
            ["--noise-step: noise_step is 1000", "0 to 999"],
        ),
        (["--contrast", "vcd", "--cd-beta", "5"], ["--cd-beta: beta is 5.0"]),
        (["--contrast", "m3id", "--m3id-rate", "-1"], ["--m3id-rate: rate is -1.0"]),
        (["--contrast", "m3id", "--m3id-unsure", "2"], ["--m3id-unsure: unsure is 2.0"]),
        (
            ["--contrast", "vcd", "--m3id-rate", "1"],
            ["--m3id-rate belongs to --contrast m3id, found vcd"],
        ),
        (["--contrast", "ritual", "--ritual-transform", "turn"], ["'turn'", "upside down, rotate"]),
        (["--contrast", "dola"], ["dola", "vcd"]),
        (["--contrast-log", "x"], ["--contrast-log needs --contrast"]),
    ],
)
def test_wrong_use_of_contrast(run, arguments, parts):
    """A flag of another method would be ignored without a word."""
    status, out, err = run("-i", PICTURE, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in parts)


def test_contrast_needs_a_picture(run):
    """Without a picture, which is what it contrasts with, the answer would be the plain one."""
    status, _, err = run("-p", QUESTION, "--contrast", "m3id")
    assert (status, "--image" in err, err.count("\n")) == (2, True, 1)


# --- sampling -------------------------------------------------------------------------------------


def test_a_seed_makes_samples_reproducible(result):
    """The same seed would give another sample once something else drew random numbers."""
    sample = lambda *more: result("-i", PICTURE, "-p", QUESTION, "--temperature", "1.5", *more)  # noqa: E731
    first = sample("--seed", "1")
    torch.rand(3)  # whatever else draws random numbers in this process
    assert sample("--seed", "1")["ids"] == first["ids"]
    assert first["seed"] == 1
    assert sample("--seed", "2")["ids"] != first["ids"]
    fresh = sample()  # draws a seed, and says which
    assert sample("--seed", str(fresh["seed"]))["ids"] == fresh["ids"]


def test_the_filters_reach_the_choice(result):
    """With one token left to choose from, sampling is greedy."""
    greedy = result("-i", PICTURE, "-p", QUESTION)["ids"]
    for narrow in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert (
            result("-i", PICTURE, "-p", QUESTION, "--temperature", "2", "--seed", "3", *narrow)[
                "ids"
            ]
            == greedy
        )
    assert (
        result("-i", PICTURE, "-p", QUESTION, "--temperature", "2", "--seed", "3")["ids"] != greedy
    )
    assert result("-i", PICTURE, "-p", QUESTION, "--repetition-penalty", "9")["ids"] != greedy


# --- beams, several answers, log-probabilities ----------------------------------------------------


def test_the_other_filters_reach_the_choice(result, assistant):
    """A penalty or filter would be accepted and change nothing."""
    # what was said is likely to be said again
    again = ["-i", PICTURE, "-p", QUESTION, "--repetition-penalty", "0.3"]
    prompt = set(assistant.tokenizer.encode(assistant.prompt(QUESTION)))
    assert prompt & set(result(*again)["ids"])
    assert not prompt & set(result(*again, "--no-repeat-ngram-size", "1")["ids"])
    sample = ["-i", PICTURE, "-p", QUESTION, "--temperature", "2", "--seed", "3"]
    assert result(*sample, "--typical-p", "0.1")["ids"] != result(*sample)["ids"]


def test_min_new_tokens_bars_the_end(result, folder):
    """--min-new-tokens would be ignored where the model ends at once."""
    ids = result("-i", PICTURE, "-p", QUESTION)["ids"]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ids[0]}), encoding="utf-8"
    )
    assert result("-i", PICTURE, "-p", QUESTION, weights=str(folder))["ids"] == ids[:1]
    assert (
        len(
            result("-i", PICTURE, "-p", QUESTION, "--min-new-tokens", "4", weights=str(folder))[
                "ids"
            ]
        )
        >= 4
    )


def test_beams_say_what_the_library_says(result, answer, assistant):
    """--num-beams would search with other settings than the library, or show no score."""
    expected = assistant.ask(
        PICTURE, QUESTION, max_new_tokens=LENGTH, num_beams=3, length_penalty=0.5
    )
    arguments = ["-i", PICTURE, "-p", QUESTION, "--num-beams", "3", "--length-penalty", "0.5"]
    assert answer(*arguments) == expected + "\n"
    found = result(*arguments)
    first = ["text", "ids", "finish_reason", "score"]
    assert list(found) == [*first, "answers", "prompt", "seed", "timings"]
    assert found["answers"] == [{name: found[name] for name in first}]
    assert found["text"] == expected == assistant.tokenizer.decode(found["ids"])
    assert list(found["timings"]) == ["load", "encode", "search"]
    assert result(*arguments, "--early_stopping", "never")["score"] >= found["score"]


@pytest.mark.parametrize("how", [["--num-beams", "4"], ["--temperature", "1.3", "--seed", "5"]])
def test_several_answers_are_printed_with_an_empty_line_between_them(result, answer, how):
    """Several answers would run into one another, or all be the same."""
    arguments = ["-i", PICTURE, "-p", QUESTION, "--num-return-sequences", "3", *how]
    found = result(*arguments)
    assert {name: found[name] for name in found["answers"][0]} == found["answers"][0]
    assert len({tuple(each["ids"]) for each in found["answers"]}) == 3
    assert answer(*arguments) == "\n\n".join(each["text"] for each in found["answers"]) + "\n"
    if "--num-beams" in how:
        scores = [each["score"] for each in found["answers"]]
        assert scores == sorted(scores, reverse=True)


def test_several_answers_end_each_at_its_own_end(result, folder):
    """An answer that ended early would carry on as long as the longest one."""
    arguments = [
        "-i",
        PICTURE,
        "-p",
        QUESTION,
        "--num-return-sequences",
        "3",
        "--temperature",
        "1.3",
        "--seed",
        "5",
    ]
    free = [each["ids"] for each in result(*arguments)["answers"]]
    end = next(i for i in free[1] if i not in free[0] + free[2])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, end]}), encoding="utf-8"
    )
    found = result(*arguments, "--logprobs", "0", weights=str(folder))["answers"]
    assert [each["ids"] for each in found] == [free[0], free[1][: free[1].index(end) + 1], free[2]]
    assert [each["finish_reason"] for each in found] == [
        "length",
        "stop",
        "length" if free[2][-1] != 2 else "stop",
    ]
    assert [len(each["tokens"]) for each in found] == [len(each["ids"]) for each in found]


@pytest.mark.parametrize(
    "how", [[], ["--num-beams", "3"], ["--temperature", "0.5", "--repetition-penalty", "2"]]
)
def test_log_probabilities_are_those_of_the_raw_logits(result, assistant, how):
    """--logprobs would tell what filters and temperature left, not what the model thinks."""
    found = result("-i", PICTURE, "-p", QUESTION, "--logprobs", "3", *how)
    ids = assistant.tokenizer.encode(found["prompt"])
    exact, pixels = stored(dtype="float64").model, assistant.image_processor([PICTURE]).double()

    def run() -> dict[str, torch.Tensor]:
        logits = exact([[*ids, *found["ids"]]], pixels).logits[0]
        return {"log_p": logits[-len(found["ids"]) - 1 : -1].log_softmax(-1)}

    log_p, bound = network(exact, run)["log_p"]
    off = float(bound.max()) + 5e-7  # printed with six decimals
    assert [token["id"] for token in found["tokens"]] == found["ids"]
    for token, expected in zip(found["tokens"], log_p, strict=True):
        best = expected.topk(3)
        assert [other["id"] for other in token["top"]] == best.indices.tolist()
        assert [other["logprob"] for other in token["top"]] == pytest.approx(
            best.values.tolist(), abs=off
        )
        assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=off)
        assert token["piece"] == assistant.tokenizer.sentencepiece.id_to_piece(token["id"])
    if how[:1] == ["--num-beams"]:
        assert found["score"] == pytest.approx(
            sum(token["logprob"] for token in found["tokens"]) / LENGTH, abs=2 * off
        )


def test_an_id_without_a_piece_is_shown_as_its_number(result, assistant):
    """An id that the tokenizer lacks would end --logprobs with an error."""
    everything = result("-i", PICTURE, "-p", QUESTION, "-n", "1", "--logprobs", "99999")["tokens"][
        0
    ]["top"]
    assert len(everything) == assistant.model.config.text.vocab_size
    assert {
        other["piece"] for other in everything if other["id"] >= assistant.tokenizer.vocab_size
    } >= {"<447>"}


@pytest.mark.parametrize(
    ("parameters", "said_by_user", "threads"),
    [(4e6, {}, 1), (4e6, {"OMP_NUM_THREADS": "3"}, 3), (7e9, {}, 3)],
)
def test_a_small_model_takes_one_thread_unless_the_user_says_how_many(
    monkeypatch, parameters, said_by_user, threads
):
    """Two threads of a small model wait for each other: beside another program an answer took 25
    times as long."""
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in said_by_user.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert choose_threads(int(parameters)) == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_verbose_tells_of_the_search(run):
    """A beam search would be reported as the stages of greedy decoding."""
    lines = run("-i", PICTURE, "-p", QUESTION, "--num-beams", "3", "--verbose")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["load", "encode", "search"]
    assert "3 beams" in lines[-1]


# --- help and wrong usage -------------------------------------------------------------------------

FLAGS = {
    "model": [
        "--weights",
        "-m",
        "--model",
        "--model-path",
        "--device",
        "--dtype",
        "--template",
        "--conv-mode",
    ],
    "quantized": ["--quantize"],
    "question": ["--image", "-i", "--image-aspect-ratio", "--prompt", "-p", "--query", "--system"],
    "several": ["--num-return-sequences", "--logprobs"],
    "output": [
        "--json",
        "--print-prompt",
        "--verbose",
        "-v",
        "--quiet",
        "-q",
        "--version",
        "--help",
        "-h",
    ],
}


def test_every_option_has_a_flag_in_help(run):
    """A list by hand did not notice a new setting without a flag."""
    groups = GENERATION_FLAGS + SEARCH_FLAGS
    names = {max(spellings, key=len) for spellings, _ in groups} | {"--num-return-sequences"}
    assert names == {"--" + name.replace("_", "-") for name in Options.__dataclass_fields__}
    shown = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", run("--help")[1].replace(",", " ")))
    assert {spelling for spellings, _ in groups for spelling in spellings} <= shown


def test_help_names_every_flag(run):
    """A flag or one of its choices would be missing from --help."""
    status, out, err = run("--help")
    assert (status, err) == (0, "")
    assert {flag for group in FLAGS.values() for flag in group} <= set(
        re.findall(r"(?<!\S)--?[a-z][a-z-]*", out.replace(",", " "))
    )
    for choices in (
        TEMPLATES,
        ("auto", "cpu", "cuda", "mps"),
        ("float32", "bfloat16", "float16"),
        ("pad", "crop"),
    ):
        assert all(choice in out for choice in choices)
    assert WEIGHTS_VARIABLE in out


def test_every_flag_has_a_help_text():
    """A flag would stand in --help without a word about what it does."""
    for action in make_parser()._actions:
        assert action.help, action.option_strings


def test_the_defaults_are_those_of_options_and_help_shows_them(run):
    """The command's default would drift from the library's, or from the one --help names."""
    arguments = vars(make_parser().parse_args([]))
    defaults = Options()
    for name in Options.__dataclass_fields__:
        assert arguments[name] == vars(Options)[name] or (name == "stop" and not arguments[name]), (
            name
        )
    text = " ".join(run("--help")[1].split())
    assert f"longest answer (default: {defaults.max_new_tokens})" in text
    assert f"samples (default: {defaults.temperature})" in text
    assert f"(default: {DEFAULT_PROMPT!r})" in text
    assert f"(default: {DEFAULT_TEMPLATE})" in text
    assert (defaults.max_new_tokens, defaults.temperature) == (512, 0)
    assert (DEFAULT_PROMPT, DEFAULT_TEMPLATE) == (
        "Please describe this image in detail.",
        "llava_v1",
    )


def test_the_examples_of_help_are_valid_commands(run):
    """An example in --help would be refused by the command itself."""
    lines = [
        line.strip()
        for line in run("--help")[1].splitlines()
        if "python -m minillava.generate -" in line
    ]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.split("python -m minillava.generate")[1])
        arguments = make_parser().parse_args(words)
        Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--max-tokens", "5"], "did you mean --max-new-tokens?"),
        (["--max_tokens=5"], "did you mean --max-new-tokens?"),
        (["--temper", "0.5"], "did you mean --temperature?"),
        (["--tem", "0.5"], "did you mean --template or --temperature?"),
        (
            ["--pictures", "x.jpg", "--topk", "3"],
            "unrecognized arguments: --pictures x.jpg --topk 3",
        ),
        (["-image", "x.jpg"], "-image is read as -i with the value 'mage': did you mean --image?"),
        (["-prompt=What?"], "did you mean --prompt?"),
        (
            ["-i", "x.jpg", "What is it?"],
            "'What is it?': a question goes after --prompt; a picture goes after",
        ),
        (["--two\nlines\x1b[31m"], "--two\\nlines\\x1b[31m"),
    ],
)
def test_wrong_words_get_the_nearest_flag(run, arguments, hint):
    """ "unrecognized arguments: --max-tokens 5" leaves one to read four screens of help; and what was typed is shown
    so that it stays in its line."""
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert hint in err


@pytest.mark.parametrize(("flag", "what"), [("-p", "the question"), ("-i", "a picture's file")])
def test_stdin_at_a_terminal_says_that_it_is_awaited(run, monkeypatch, flag, what):
    """`-p -` waited without a word."""

    class Keyboard(io.TextIOWrapper):
        def isatty(self):
            return True

    content = QUESTION.encode() if flag == "-p" else Path(PICTURE).read_bytes()
    for quiet in ((), ("-q",)):
        monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(content), encoding="utf-8"))
        _, _, err = (
            run("-i", PICTURE, "-p", QUESTION, flag, "-", *quiet)
            if flag == "-p"
            else run(flag, "-", *quiet)
        )
        assert (f"note: - reads {what} from here; " in err) == (not quiet)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", [3]), ("0,31", [0, 31]), ("0,2-4", [0, 2, 3, 4]), ("4-5,0-1,5", [0, 1, 4, 5]), ("2-2", [2]),
        (" 0, 2 - 3 ", [0, 2, 3]), ("all", None),
    ],
)  # fmt: skip
def test_lists_of_numbers(text, numbers):
    """`--layer 0,2-4` would leave out the end of a range, or take a layer twice."""
    assert number_list(text) == numbers


@pytest.mark.parametrize(
    "text", ["", "x", "1,", ",1", "3-2", "-1", "1-2-3", "1.5", "0-99999999", "1;2", "all,1"]
)
def test_what_is_no_list_of_numbers(text):
    """A mistyped list would be taken for another one, or fill the memory."""
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 3 or 0,2-4 or all"):
        number_list(text)


def test_version(run):
    """`--version` would ask for a picture, or name another version than the package."""
    assert run("--version")[:2] == (0, f"minillava {minillava.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "--image"),
        (["--bogus"], "--bogus"),
        (["-p", "x", "--max-new", "3"], "--max-new"),  # no guessing from abbreviations
        (["-p"], "--prompt"),
        (["-p", "x", "-n", "many"], "'many'"),
        (["-p", "x", "-n", "0"], "max_new_tokens is 0"),
        (["-p", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["-p", "x", "--temperature", "nan"], "temperature is nan"),
        (["-p", "x", "--temperature", "1", "--top-p", "1.5"], "top_p is 1.5"),
        (["-p", "x", "--temperature", "1", "--top-k", "-2"], "top_k is -2"),
        (["-p", "x", "--top-p", "0.9"], "temperature"),  # it would do nothing
        (["-p", "x", "--repetition-penalty", "0"], "repetition_penalty"),
        (["-p", "x", "--typical-p", "0.9"], "temperature"),
        (["-p", "x", "--num-return-sequences", "2"], "temperature"),
        (["-p", "x", "--num-beams", "2", "--num-return-sequences", "3"], "num_beams is 2"),
        (["-p", "x", "--num-beams", "2", "--early-stopping", "perhaps"], "'perhaps'"),
        (["-p", "x", "--length-penalty", "2"], "num_beams above 1"),
        (["-p", "x", "--num-beams", "2", "--contrast", "m3id"], "--contrast and --num-beams"),
        (["-p", "x", "--logprobs", "3"], "needs --json"),
        (["-p", "x", "--json", "--logprobs", "-1"], "is below 0"),
        (["-p", "x", "--seed", str(2**64)], "seed is"),
        (["-p", "x", "--dtype", "int4"], "int4"),
        (["-p", "x", "--quantize", "int3"], "int3"),
        (["-p", "x", "--template", "v7"], "v7"),
        (["-p", "x", "--image-aspect-ratio", "anyres"], "anyres"),
        (["-i", "-", "-i", "-"], "stdin"),
        (["-i", "-", "-p", "-"], "stdin"),
        *((["-p", "x", flag, ""], flag) for flag in ("-m", "--adapter", "--model-base")),
        *((["-p", "x", flag, ""], "is empty") for flag in ("-m", "--vision-tower", "--revision")),
        (["-i", "x.png", "--contrast", "vcd", "--contrast-log", "-"], "/dev/stdout"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_wrong_usage_is_one_line_and_status_2(run, arguments, found):
    """A flag that cannot act would be ignored, or its error be a traceback or a screen of usage."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert found in err
    assert "--help" in err


# --- what can go wrong ----------------------------------------------------------------------------
# Each takes the copied folder, damages something and returns further arguments. Beside it: what the one line on
# stderr must name, what it must say was found, and the verb of the next step.


def point_to_nowhere(folder):
    return ["-m", folder / "nowhere", "-i", PICTURE]


def empty_folder(folder):
    (folder / "empty").mkdir()
    return ["-m", folder / "empty", "-i", PICTURE]


def file_for_folder(folder):
    return ["-m", folder / "config.json", "-i", PICTURE]


def shards(folder) -> list[Path]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {}
    for i in (1, 2):
        names = sorted(tensors)[i - 1 :: 2]
        save_file(
            {name: tensors[name] for name in names}, folder / f"model-0000{i}-of-00002.safetensors"
        )
        placed |= dict.fromkeys(names, f"model-0000{i}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": placed}), encoding="utf-8"
    )
    return sorted(folder.glob("model-*"))


def shard_missing(folder):
    shards(folder)[1].unlink()


def shard_truncated(folder):
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-100])


def index_with_an_absent_key(folder):
    first = shards(folder)[0]
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["language_model.model.ghost"] = first.name
    path.write_text(json.dumps(index), encoding="utf-8")


def key_of_the_wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def several_wrong_keys(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensors[name] for name in tensors if "q_proj" not in name},
        folder / "model.safetensors",
    )


def weights_missing(folder):
    (folder / "model.safetensors").unlink()


def config_missing(folder):
    (folder / "config.json").unlink()


def config_not_json(folder):
    (folder / "config.json").write_text("{'model_type': 'llava'}", encoding="utf-8")


def config_of_another_family(folder):
    change_config(folder, model_type="qwen2_vl")


def config_of_another_language_model(folder):
    change_config(folder, text_config={"model_type": "gemma"})


def preprocessor_of_another_size(folder):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 7, "width": 7}})
    )


def tokenizer_missing(folder):
    (folder / "tokenizer.model").unlink()


def tokenizer_corrupt(folder):
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])


def tokenizer_empty(folder):
    (folder / "tokenizer.model").write_bytes(b"")


def tokenizer_of_another_model(folder):
    change_config(folder, text_config={"vocab_size": 300})


def picture_missing(folder):
    return ["-i", folder / "picture.png"]


def not_a_picture(folder):
    (folder / "picture.png").write_text("hello", encoding="utf-8")
    return ["-i", folder / "picture.png"]


def truncated_picture(folder):
    content = Path(PICTURE).read_bytes()
    (folder / "picture.png").write_bytes(content[: len(content) // 2])
    return ["-i", folder / "picture.png"]


def decompression_bomb(folder):
    """A few bytes that claim to be a picture of 60000 x 60000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    (folder / "picture.png").write_bytes(png)
    return ["-i", folder / "picture.png"]


def folder_for_picture(folder):
    return ["-i", folder]


def stdin_not_a_picture(folder):
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"hello"))
    return ["-i", "-"]


def data_url_not_base64(folder):
    return ["-i", "data:image/png;base64,***"]


def two_pictures_one_place(folder):
    return ["-i", PICTURE, "-i", OTHER, "-p", "What is in <image>?"]


def no_picture_one_place(folder):
    return ["-p", "What is in <image>?"]


def empty_question(folder):
    return ["-p", "  "]


def context_too_short(folder):
    change_config(folder, text_config={"max_position_embeddings": 64})
    return ["-i", PICTURE]


def device_missing(folder):
    return ["-i", PICTURE, "--device", "cuda"]


def device_unknown(folder):
    return ["-i", PICTURE, "--device", "tpu"]


def picture_on_the_web(folder):
    return ["-i", "https://example.com/cat.jpg"]


LLAVA, SMALL = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-interleave-qwen-0.5b-hf"
FAILURES = [
    (point_to_nowhere, "nowhere", "no such folder", f"hf download {SMALL}"),
    (empty_folder, "empty", "is empty", f"hf download {SMALL}"),
    (file_for_folder, "config.json", "is a file", "expected the folder it is in"),
    (shard_missing, "model-00002-of-00002.safetensors", "not found", "download"),
    (shard_truncated, "model-00001-of-00002.safetensors", "truncated", "download"),
    (
        index_with_an_absent_key,
        "model.safetensors.index.json",
        "language_model.model.ghost",
        "download",
    ),
    (
        key_of_the_wrong_shape,
        "plain",
        "language_model.model.norm.weight has shape [7]",
        "check that config.json",
    ),
    (several_wrong_keys, "plain", "6 tensor(s)", "check that config.json"),
    (weights_missing, "plain", "no weights, expected model.safetensors", LLAVA),
    (config_missing, "config.json", "not found", "check that"),
    (config_not_json, "config.json", "not valid JSON", "download"),
    (config_of_another_family, "config.json", "model_type is 'qwen2_vl'", LLAVA),
    (
        config_of_another_language_model,
        "config.json",
        "text_config.model_type is 'gemma'",
        "supported: llama",
    ),
    (
        preprocessor_of_another_size,
        "preprocessor_config.json",
        "crop_size is {'height': 7",
        "image_size 56",
    ),
    (tokenizer_missing, "tokenizer.model", "not found", "copy"),
    (tokenizer_corrupt, "tokenizer.model", "not a SentencePiece model", "download"),
    (tokenizer_empty, "tokenizer.model", "not a SentencePiece model", "download"),
    (tokenizer_of_another_model, "tokenizer.model", "440 pieces", "copy"),
    (picture_missing, "picture.png", "no such picture", "check the path"),
    (not_a_picture, "picture.png", "not a picture", "convert"),
    (truncated_picture, "picture.png", "damaged", "download"),
    (decompression_bomb, "picture.png", "3600000000 pixels", "make the picture smaller"),
    (folder_for_picture, "plain", "a folder", "give the path of a picture"),
    (stdin_not_a_picture, "stdin", "not a picture", "convert"),
    (data_url_not_base64, "data: URL", "not base64", "encode"),
    (
        two_pictures_one_place,
        "<image>",
        "1 picture(s) with <image> but 2 picture(s) were given",
        "write <image> once",
    ),
    (
        no_picture_one_place,
        "<image>",
        "1 picture(s) with <image> but 0 picture(s) were given",
        "leave it out",
    ),
    (empty_question, "question", "empty", "write"),
    (context_too_short, "context holds 64", "1 picture(s) of 16 each", "shorten the prompt"),
    (device_missing, "'cuda'", "not available", "--device cpu"),
    (device_unknown, "'tpu'", "unknown device", "cpu, cuda, mps"),
    (picture_on_the_web, "https://example.com/cat.jpg", "does not download", "save the picture"),
]


@pytest.mark.parametrize(
    ("damage", "name", "found", "step"), FAILURES, ids=[row[0].__name__ for row in FAILURES]
)
def test_a_failure_is_one_line_that_names_it_and_the_next_step(
    run, folder, monkeypatch, damage, name, found, step
):
    """A damaged file or picture would end in a traceback that names neither it nor a way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "stdin", sys.stdin)  # some of them replace it
    arguments = damage(folder) or ["-i", PICTURE, "-p", QUESTION]
    status, out, err = run(*arguments, weights=str(folder))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, "one line"
    assert err.endswith("\n")
    assert "Traceback" not in err
    assert "unexpected" not in err
    for part in (name, found, step):
        assert part in err


def test_verbose_shows_where_a_failure_comes_from(run, folder):
    """--verbose would hide the traceback that a report of a bug needs."""
    status, out, err = run("-m", folder, *picture_missing(folder), "--verbose")
    assert (status, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    last = err.splitlines()[-1]
    assert last == f"error: {folder / 'picture.png'}: no such picture; check the path"


def test_one_line_for_many_wrong_tensors_and_verbose_for_all(run, folder):
    """A wrong config would print hundreds of tensors, or hide all but one for good."""
    several_wrong_keys(folder)
    _, _, short = run("-i", PICTURE, weights=str(folder))
    assert "(5 more like it: --verbose lists them)" in short
    _, _, long = run("-i", PICTURE, "--verbose", weights=str(folder))
    for i in (0, 1):
        assert f"language_model.layers.{i}.self_attn.q_proj.weight is missing" in long
        assert f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight is missing" in long


def test_a_bug_says_that_it_is_one(run, monkeypatch):
    """A bug of ours would read like a mistake of the user."""

    def broken(*_, **__):
        raise KeyError("oops")

    monkeypatch.setattr("minillava.assistant.load", broken)
    status, out, err = run("-i", PICTURE)
    assert (status, out) == (1, "")
    assert err == "error: KeyError: 'oops' (unexpected: --verbose shows where)\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_answers_characters_gets_question_marks(run, monkeypatch, encoding):
    """The toy model says U+FFFD; a real one would say é."""
    expected = run("-i", PICTURE, "-p", QUESTION, "-n", "60")[1]
    assert "\ufffd" in expected
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    status = main(["-m", WEIGHTS, *BASE, "-i", PICTURE, "-p", QUESTION, "-n", "60"])
    sys.stdout.flush()
    assert (status, raw.getvalue()) == (0, expected.encode(encoding, "replace"))


# --- streams that are closed, full, or in another encoding ----------------------------------------


@pytest.mark.parametrize("question", [QUESTION, f"{QUESTION}\r", f"\ufeff{QUESTION}"])
def test_a_question_of_windows_is_the_question_typed(result, stdin, question):
    """The carriage return, and a byte order mark, went into the prompt. A shell's $(cat file)
    leaves both."""
    expected = result("-i", PICTURE, "-p", QUESTION)["prompt"]
    assert result("-i", PICTURE, "-p", question)["prompt"] == expected
    for content in (f"{question}\n".encode(), f"{question}\n".lstrip("\ufeff").encode("utf-16")):
        stdin(content)
        assert result("-i", PICTURE, "-p", "-")["prompt"] == expected


@pytest.mark.parametrize("around", ["{}\r", "\ufeff{}", "\ufeff{}\r"])
def test_a_system_text_and_a_stop_text_of_windows_are_those_typed(result, around):
    """`--system "$(cat system.txt)"` put the carriage return into the prompt, and a `--stop` with
    one was never found."""
    ask = lambda system, stop: result("-i", PICTURE, "--system", system, "--stop", stop)  # noqa: E731
    typed = ask("Be brief.\nBe kind.", "e")
    given = ask(around.format("Be brief.\r\nBe kind."), around.format("e"))
    assert typed["finish_reason"] == "stop"
    assert [given[name] for name in ("prompt", "ids", "text")] == [
        typed[name] for name in ("prompt", "ids", "text")
    ]


def test_lines_inside_a_question_end_as_ours_do(result, stdin):
    """Carriage returns inside a piped question would be tokens of their own."""
    expected = result("-i", PICTURE, "-p", "one\ntwo\nthree\n")["prompt"]
    stdin(b"one\r\ntwo\rthree\r\n\r\n")
    assert result("-i", PICTURE, "-p", "-")["prompt"] == expected


@pytest.mark.parametrize(
    "content", [b"What\0?", b"caf\xe9?", "What?".encode("utf-16-le"), b"\xff\xfe?"]
)
def test_stdin_that_is_not_text_is_one_line(run, stdin, content):
    """Bytes that are not UTF-8 would be a traceback, or go garbled into the prompt."""
    stdin(content)
    status, out, err = run("-i", PICTURE, "-p", "-")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: stdin: ")
    assert "save it as UTF-8" in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_json_reads_back_whole_in_every_encoding(monkeypatch, encoding, capsys):
    """Letters that stdout's encoding lacks became question marks."""
    value = {"prompt": "Où est 星?", "name": "not UTF-8: \udcff"}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="replace"))
    print_json(value)
    print_json({"plain": "Où"})
    sys.stdout.flush()
    first, second = raw.getvalue().decode(encoding).splitlines()
    assert json.loads(first) == value
    assert json.loads(second) == {"plain": "Où"}
    assert ("Où" in second) == (encoding != "ascii")


def test_without_stderr_the_answer_is_alone_on_stdout(answer, capsys, monkeypatch):
    """print(file=None) writes to stdout, so that notes went there."""
    expected = answer("-i", PICTURE, "-p", QUESTION)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["-m", WEIGHTS, *BASE, "-i", PICTURE, "-p", QUESTION, "-v"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["-m", WEIGHTS, *BASE, "-i", "nowhere.png"]) == 1
    assert capsys.readouterr().out == ""
    sys.stderr.close()


def test_without_stdout_there_is_one_line_and_no_work(capsys, monkeypatch):
    """With stdout closed the model would work for minutes on an answer that nobody gets."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(
        "minillava.assistant.load", lambda *_, **__: pytest.fail("opened the model")
    )
    assert main(["-m", WEIGHTS, *BASE, "-i", PICTURE]) == 1
    assert capsys.readouterr().err.startswith(
        "error: stdout is closed, so the answer has nowhere to go; "
    )
    with contextlib.suppress(OSError):
        sys.stdout.close()


def test_without_stdin_the_question_is_empty(run, monkeypatch):
    """With stdin closed `-p -` would be a traceback."""
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = run("-i", PICTURE, "-p", "-")
    assert (status, out, "the question is empty" in err) == (1, "", True)
    sys.stdin.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_stderr_costs_nothing_and_under_stdout_the_answer(
    answer, capsys, monkeypatch
):
    """A full disk under the notes would cost the answer; one under the answer would exit with 0."""
    expected = answer("-i", PICTURE, "-p", QUESTION)
    arguments = ["-m", WEIGHTS, *BASE, "-i", PICTURE, "-p", QUESTION, "-v"]
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stderr", full)
        assert main(arguments) == 0
    assert capsys.readouterr().out == expected
    for more in ([], ["--json"]):
        with monkeypatch.context() as patch, open("/dev/full", "w") as full:
            patch.setattr(sys, "stdout", full)
            assert main([*arguments[:-1], *more]) == 1
        assert capsys.readouterr().err.startswith(
            "error: stdout: No space left on device; make room"
        )


@pytest.mark.skipif(os.name != "posix", reason="closes what a shell closes")
def test_closed_streams_are_not_the_numbers_of_the_next_files(tmp_path, answer):
    """What is meant for stderr went into whatever file was opened next."""
    log, code = tmp_path / "log", "import sys, os; from minillava.cli.doors import enter; "
    code += "from minillava.cli.messages import open_streams; open_streams(); "
    code += (
        "file = open(sys.argv.pop(1), 'w'); print('note', file=sys.stderr, flush=True); "
        "os.write(2, b'more'); "
    )
    code += "file.write(str(file.fileno() > 2)); file.close(); sys.exit(enter('generate'))"
    command = [
        sys.executable,
        "-c",
        code,
        str(log),
        "-m",
        WEIGHTS,
        *BASE,
        "-i",
        PICTURE,
        "-p",
        QUESTION,
    ]
    shell = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(command)} <&- 2>&-"],
        cwd=ROOT, env=environment(), capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (shell.returncode, shell.stdout.decode()) == (0, answer("-i", PICTURE, "-p", QUESTION))
    assert log.read_text() == "True"


# --- files to write -------------------------------------------------------------------------------


@pytest.fixture
def check(capsys):
    """`check(outputs, inputs, **arguments)`: (exit status, stderr) of cli.check_outputs; 0 where it
    is content."""

    def checked(outputs: list, inputs: list = (), **arguments) -> tuple[int, str]:
        parser = Parser(prog="test")
        try:
            check_outputs(
                parser, argparse.Namespace(**arguments), [*map(str, outputs), None], inputs
            )
        except SystemExit as exit:
            return exit.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return checked


def test_what_is_written_is_never_what_is_read(check, folder, tmp_path):
    """`look -i mine.png --out mine.png` destroyed the user's picture without a word."""
    picture = tmp_path / "mine.png"
    picture.write_bytes(Path(PICTURE).read_bytes())
    (tmp_path / "link.png").symlink_to(picture)
    os.link(picture, tmp_path / "hard.png")
    spellings = [picture, f"{folder}/../mine.png", tmp_path / "link.png", tmp_path / "hard.png"]
    for output in spellings:
        for given in map(str, spellings):
            status, err = check([tmp_path / "new", output], image=[OTHER, given])
            assert (status, "what is written needs a name of its own" in err) == (2, True)
        assert check([output], [picture])[0] == 2
        assert check([output], image=[OTHER, "data:,x"], weights=str(folder)) == (0, "")
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        assert check([folder / name], weights=str(folder))[0] == 2
        assert check([folder / name], weights=WEIGHTS, adapter=str(folder))[0] == 2
        assert check([folder / name], weights=WEIGHTS) == (0, "")
    assert check([folder / "config.json"], adapter=str(folder), revision="main")[0] == 2
    assert picture.read_bytes() == Path(PICTURE).read_bytes()


def test_nothing_new_is_written_that_would_count_as_a_file_of_the_model(check, folder, tmp_path):
    """`trace -m DIR --save DIR/model.safetensors` ruined a model in shards: the file was new, and
    the next command read it instead of them."""
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "trace.html").symlink_to(folder / "trace.json")
    for output in ("plain/new.safetensors", "plain/../link/generation.json", "trace.html"):
        for named in ({"weights": str(folder)}, {"weights": WEIGHTS, "adapter": str(folder)}):
            status, err = check([tmp_path / output], **named)
            assert (status, "would count as a file of the model" in err) == (2, True)
    for output in ("plain/new.html", "new.safetensors"):
        assert check([tmp_path / output], weights=str(folder)) == (0, "")
    assert check([folder / "new.safetensors"], weights=WEIGHTS) == (0, "")


@pytest.mark.parametrize(
    ("door", "flags"),
    [
        ("look", "--out --html --npy --grid --lens"),
        ("probe", "--out --html --npy"),
        ("trace", "--html --save"),
        ("batch", "--answers"),
        ("generate", "--contrast-log"),
    ],
)
def test_a_minus_is_stdout_or_refused_and_a_tilde_is_home(monkeypatch, tmp_path, door, flags):
    """`--html -` wrote a file named -, and `--html=~/x` one named ~ or an error: behind = the shell
    leaves it alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    parser = flags_of(door).make_parser()
    needed = {
        "look": ["-i", "x.png"],
        "probe": ["-i", "x.png"],
        "batch": ["--questions", "~/q.jsonl"],
    }.get(door, [])
    for flag in flags.split():
        name = flag.strip("-").replace("-", "_")

        def read(text, flag=flag, name=name):
            return str(vars(parser.parse_args([*needed, f"{flag}={text}"]))[name])

        with pytest.raises(SystemExit) as caught:
            read("-")
        assert caught.value.code == 2
        assert read("~/x.png") == str(tmp_path / "x.png")
        assert read("./-") in ("./-", "-")  # pathlib's spelling
    if door == "batch":
        args = parser.parse_args(["--questions=~/q", "--images=~/p", "--answers=a"])
        assert (str(args.questions), args.images) == (f"{tmp_path}/q", f"{tmp_path}/p")
    if door == "look":
        assert parser.parse_args([*needed, "--json"]).json == "-"
        assert parser.parse_args([*needed, "--json=~/x"]).json == str(tmp_path / "x")
        args = parser.parse_args([*needed, "--layer", "0", "--head", "1"])
        assert (args.layers, args.heads) == ([0], [1])
    Path("~").write_text("")
    assert file_name("~") == "~"  # a file that is really named so


def test_two_outputs_are_two_files(check, tmp_path):
    """Two outputs given one file by two names would overwrite each other."""
    (tmp_path / "there").write_text("")
    os.link(tmp_path / "there", tmp_path / "hard")
    (tmp_path / "dangling").symlink_to("absent")
    for one, other in (("there", "hard"), ("absent", "dangling"), ("new", "./new")):
        status, err = check([f"{tmp_path}/{one}", f"{tmp_path}/{other}"])
        assert (status, "is given twice" in err) == (2, True)
    assert check([os.devnull, os.devnull]) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["dangling", "hard", "there"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_that_a_file_can_be_written_is_known_before_the_work(check, tmp_path):
    """A folder without write permission would be noticed after the work."""
    (tmp_path / "closed").mkdir(0o555)
    status, err = check([tmp_path / "closed" / "a.json"])
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {tmp_path}/closed/a.json: Permission denied; ")
    (tmp_path / "closed").chmod(0o755)


def test_an_output_that_fails_keeps_neither_the_answer_nor_the_others(run, tmp_path, monkeypatch):
    """The disk is full when the log is written: the answer is there, the old log too, and the exit
    status is 1."""
    (tmp_path / "log").write_text("old")

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(messages, "write_whole", full)
    log = ["--contrast", "vcd", "--contrast-log", tmp_path / "log"]
    expected = run("-i", PICTURE, "-p", QUESTION, "--contrast", "vcd")[1]
    status, out, err = run("-i", PICTURE, "-p", QUESTION, *log)
    assert (status, out) == (1, expected)
    assert (
        err
        == f"error: {tmp_path}/log: No space left on device; make room there, then repeat the command\n"
    )
    status, out, _ = run("-i", PICTURE, "-p", QUESTION, *log, "--json")
    assert (status, json.loads(out)["text"] + "\n") == (1, expected)
    assert write_outputs({"a": "", "b": ""}) == 1


# --- in a process of its own ----------------------------------------------------------------------


def test_as_a_command_the_answer_is_on_stdout_and_errors_are_on_stderr(answer):
    """In a process of its own the command would print warnings, or errors on stdout."""
    good = start("minillava.generate", "-m", WEIGHTS, *BASE, "-i", PICTURE, "-p", QUESTION)
    # refused by the door, so that the process need not open a model
    bad = start("minillava.pope", "--questions", "nowhere", "--answers", "nowhere")
    out, err = good.communicate(timeout=PATIENCE)
    assert (good.returncode, out.decode(), err) == (0, answer("-i", PICTURE, "-p", QUESTION), b"")
    out, err = bad.communicate(timeout=PATIENCE)
    assert (bad.returncode, out) == (1, b"")
    assert err.startswith(b"error: nowhere") and err.count(b"\n") == 1


@pytest.fixture
def endless(folder) -> list[str]:
    """Arguments of an answer that takes minutes: no end token, all of the context."""
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 447}), encoding="utf-8"
    )
    return [
        "-m",
        str(folder),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "-n",
        "4000",
        "-i",
        PICTURE,
        "-p",
        QUESTION,
    ]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_printed_and_exits_130(endless, answer):
    """Ctrl-C would show a traceback, or take back the words already printed."""
    process = start("minillava.generate", *endless)
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err.strip() == b""
    full = answer(*endless, "-n", "200", base=[], weights=None).encode().removesuffix(b"\n")
    printed = first + rest
    assert full.startswith(printed) or printed.startswith(full)
    assert not printed.endswith(b"\n\n")


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe")
def test_a_closed_pipe_ends_it_quietly(endless):
    """As in `python -m minillava.generate ... | head -c 1`."""
    process = start("minillava.generate", *endless)
    assert os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
