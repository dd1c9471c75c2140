"""minillava.serve beyond OpenAI: maps of what each token looked at, contrast, and going on from a
prefix; each as README.md beside the door says it."""

import base64
import json
import logging
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from commands import environment
from paths import ROOT
from served import SHAPES, Running, picture, said, serving, text
from waiting import PATIENCE, wait_until

from minillava.cli.doors import enter
from minillava.look import run as looking
from minillava.prompt import render
from minillava.serve.protocol import Message
from minillava.serve.reading import read_messages
from minillava.templates import TEMPLATES

pytestmark = pytest.mark.parity  # the mark of what needs an extra

QUESTION = "Please describe this image in detail."


def refused(running, content=None, **options) -> tuple[str, str]:
    """The field that is to blame, and what is said about it."""
    content = content or [picture(1), text(QUESTION)]
    status, answer = running.chat([{"role": "user", "content": content}], **options)
    assert status == 400, answer
    return answer["error"]["param"], answer["error"]["message"]


# --- look -----------------------------------------------------------------------------------------


def test_the_maps_of_a_whole_answer_are_those_of_look(shared, assistant):
    """The server would send maps of other layers, of another row, or words of its own."""
    asked = {"layers": [1, 2], "heads": [3]}
    (choice,) = shared.ask([picture(2), text(QUESTION)], look=asked)["choices"]
    expected = looking.look(assistant, SHAPES / "example-2.png", QUESTION, **asked)
    found = choice["look"]
    assert (found["layers"], found["heads"]) == ([1, 2], [3])
    size = list(expected.picture.size)
    side = len(expected.words[0].heat)
    assert found["picture"] == {"size": size, "box": list(expected.box), "side": side}
    assert [word["text"] for word in found["words"]] == [word.text for word in expected.words]
    for word, ours in zip(found["words"], expected.words, strict=True):
        assert word["token_ids"] == ours.token_ids
        heat = np.frombuffer(base64.b64decode(word["map"]), "<f4").reshape(side, side)
        np.testing.assert_allclose(heat, ours.heat, rtol=1e-4, atol=1e-6)
        assert word["share"] == pytest.approx(float(ours.heat.sum()), rel=1e-4)


@pytest.mark.parametrize("stop", [[], [" the"]])
def test_the_maps_of_a_stream_make_the_words_of_look(shared, assistant, stop):
    """The page would show a word the map of another: entries carry the number of their word."""
    *events, last = shared.events([picture(3), text(QUESTION)], look=True, stop=stop)
    chunks = [json.loads(event) for event in events]
    head, expected = chunks[0]["minillava"], looking.look(
        assistant, SHAPES / "example-3.png", QUESTION, stop=stop
    )  # fmt: skip
    assert head["layers"] == expected.layers and head["picture"]["box"] == list(expected.box)
    words: dict[int, list] = {}
    for entry in (e for c in chunks for e in c["choices"][0].get("look", [])):
        assert set(entry) == {"text", "ids", "word", "share", "peak", "map"}
        levels = np.frombuffer(base64.b64decode(entry["map"]), np.uint8)
        heat = levels / 255 * entry["peak"]
        assert abs(heat.sum() - entry["share"]) <= len(heat) * entry["peak"] / 510
        if entry["word"] is not None:
            words.setdefault(entry["word"], []).append((entry["text"], entry["peak"], heat))
    assert list(words) == list(range(len(words)))
    assert (last, len(words) >= len(expected.words)) == ("[DONE]", True)
    for own, ours in zip(words.values(), expected.words, strict=False):
        joined = "".join(piece for piece, _, _ in own).strip()
        if joined != ours.text:  # a stop text has cut it
            assert stop and joined.startswith(ours.text)
            continue
        spoken = [one for one in own if any(c.isalnum() for c in one[0])] or own
        mean = np.mean([heat for _, _, heat in spoken], axis=0)
        error = max(peak for _, peak, _ in spoken) / 510 + 1e-6
        assert np.abs(mean - ours.heat.ravel()).max() <= error


def test_a_character_of_several_tokens_has_one_map(assistant):
    """Bytes of a character have no text of their own; the page would show words without any."""
    import torch

    from minillava.generate.engine import Token
    from minillava.serve.extensions import Seen

    ids = [
        assistant.tokenizer.sentencepiece.piece_to_id(f"<0x{byte:02X}>") for byte in "é".encode()
    ]
    space = assistant.tokenizer.sentencepiece.piece_to_id("▁")
    seen = Seen(assistant.tokenizer, ())
    maps = [torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.5]), torch.tensor([0.5, 0.5])]
    made = [
        seen.entry(Token(i, "", None, None, heat))
        for i, heat in zip([*ids, space], maps, strict=True)
    ]
    first, (second,), (blank,) = made
    assert (first, second["text"], second["ids"], second["word"]) == ([], "é", tuple(ids), 0)
    assert second["share"] == pytest.approx(0.6) and second["peak"] == pytest.approx(0.4)
    assert list(base64.b64decode(second["map"])) == [128, 255]
    assert (blank["text"], blank["word"]) == (" ", None)


def test_look_is_refused_where_it_cannot_be(shared):
    """A request with two pictures would get maps of one of them, and a wrong layer none at all."""
    two = [picture(1), picture(2), text(QUESTION)]
    assert refused(shared, two, look=True) == (
        "look",
        "look needs a conversation with one picture, found 2",
    )
    assert refused(shared, "Hello?", look={})[0] == "look"
    assert refused(shared, look={"layers": [4]}) == (
        "look.layers",
        "layers is [4], expected some of 0 to 3",
    )
    assert refused(shared, look={"heads": []})[0] == "look.heads"
    assert refused(shared, look={"head": [1]})[0] == "look.head"


# --- contrast -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "vcd", "noise_step": 700, "alpha": 0.5},
        {"method": "ritual", "transform": "blur"},
        {"method": "m3id", "rate": 0.1, "beta": 0.2},
    ],
)
def test_contrast_is_that_of_python(shared, assistant, asked):
    """A method's field would be ignored, or the noise another than that of the seed."""
    from minillava.generate.contrast import METHODS

    method = METHODS[asked["method"]](**{k: v for k, v in asked.items() if k != "method"})
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        answer = shared.ask([picture(1), text(QUESTION)], contrast=asked, **options)
        expected = assistant.ask(SHAPES / "example-1.png", QUESTION, contrast=method, **options)
        assert said(answer) == expected


def test_contrast_is_refused_where_it_cannot_be(shared, assistant):
    """A misspelt or foreign field would be ignored; an answer for which there are too few slots
    would wait for ever."""
    assert refused(shared, contrast={"method": "vcd", "rate": 1}) == (
        "contrast.rate",
        "rate does not belong to vcd, whose fields are: beta, alpha, noise_step",
    )
    assert refused(shared, contrast={"method": "vcd", "alpha": -1})[0] == "contrast.alpha"
    assert refused(shared, contrast={"method": "dola"})[0] == "contrast.method"
    assert refused(shared, "Hello?", contrast={"method": "m3id"})[0] == "contrast"
    assert refused(shared, contrast={"method": "vcd"}, n=3) == (
        "n",
        "n is 3, this server makes 2 answers at once (--slots)",
    )
    running = Running(assistant, "--slots", "1")
    try:
        found = refused(running, contrast={"method": "vcd"})
    finally:
        running.close()
    assert found == (
        "contrast",
        "contrast takes two slots for each answer, this server has 1 (--slots)",
    )


def test_contrast_opens_no_more_pixels_than_one_picture_may_have(assistant):
    """It opens all pictures of a request at once, each of which alone may be of the largest."""
    running = Running(assistant, max_pixels=400 * 320)
    pictures = [picture(1), picture(2), text(QUESTION)]
    try:
        assert running.ask([picture(1), text(QUESTION)], contrast={"method": "vcd"}, max_tokens=1)
        assert running.ask(pictures, max_tokens=1)
        param, told = refused(running, pictures, contrast={"method": "vcd"})
    finally:
        running.close()
    assert param == "messages" and "they have 240,896 pixels together" in told


# --- prefix_ids -----------------------------------------------------------------------------------


def test_an_answer_goes_on_from_an_alternative(shared, assistant):
    """The page chooses another token by its id: the answer that begins with it would repeat it,
    count it as new, or say something else than the model does after it."""
    content = [picture(1), text(QUESTION)]
    options = {"logprobs": True, "top_logprobs": 5, "token_ids": True}
    (choice,) = shared.ask(content, **options)["choices"]
    entries = choice["logprobs"]["content"]
    ids = [entry["id"] for entry in entries]
    assert choice["token_ids"][:-1] == ids
    assert choice["token_ids"][-1] in assistant.model.config.eos_token_ids
    for at in (0, 3):
        other = entries[at]["top_logprobs"][1]
        prefix = [*ids[:at], other["id"]]
        (expected,) = naive(assistant, prefix)
        for more in ({}, {"max_tokens": 2}):
            answer = shared.ask(content, prefix_ids=prefix, **more, **options)
            (rest,) = answer["choices"]
            assert rest["token_ids"] == expected[: more.get("max_tokens", len(expected))]
            assert answer["usage"]["completion_tokens"] == len(rest["token_ids"])
            new = rest["logprobs"]["content"]
            assert b"".join(bytes(e["bytes"]) for e in new).decode() == said(answer)
            whole = assistant.tokenizer.decode([*prefix, *rest["token_ids"]])
            assert whole.endswith(said(answer)) and len(said(answer)) < len(whole)
    # also in a stream, with the numbers of words going on
    *events, _ = shared.events(content, prefix_ids=ids[:4], look=True, token_ids=True)
    choices = [json.loads(event)["choices"][0] for event in events]
    assert [i for c in choices for i in c.get("token_ids", [])] == choice["token_ids"][4:]
    numbers = [e["word"] for c in choices for e in c.get("look", [])]
    pieces = [assistant.tokenizer.piece(i) for i in ids]
    assert numbers[0] == sum(piece.startswith("▁") for piece in pieces[:5]) - 1


def test_a_stream_tells_what_ends_an_answer_and_how_long_each_token_took(shared, assistant):
    """The page would offer to go on from an end token, or show the time of the network."""
    content, ends = [picture(1), text(QUESTION)], assistant.model.config.eos_token_ids
    asked = {"logprobs": True, "top_logprobs": 20, "token_ids": True}
    *events, _ = shared.events(content, **asked)
    chunks = [json.loads(event) for event in events]
    choices = [chunk["choices"][0] for chunk in chunks]
    entries = [e for c in choices for e in (c["logprobs"] or {"content": []})["content"]]
    likely = [each for entry in entries for each in entry["top_logprobs"]]
    assert {each["id"] for each in likely if each.get("end")} == set(ends)
    assert all(each["id"] not in ends for each in likely if "end" not in each)
    took = [choice["token_ms"] for choice in choices if "token_ids" in choice]
    times = chunks[-1]["minillava"]
    assert len(took) == len(entries) + 1 and min(took) >= 0
    # the first one's is that of the prompt, and together they are not longer than all of it
    read = times["picture_ms"] + times["prefill_ms"]
    assert took[0] >= read - 0.2
    assert sum(took) <= read + times["decode_ms"] + 0.1 * len(took)


def naive(assistant, prefix) -> list[list[int]]:
    """Greedy, without a cache: the ids after the prefix, the end token last."""
    import torch

    ids = assistant.tokenize(assistant.prompt(QUESTION))
    pixels = assistant.image_processor(SHAPES / "example-1.png")
    new: list[int] = []
    with torch.no_grad():
        while not new or new[-1] not in assistant.model.config.eos_token_ids:
            logits = assistant.model([[*ids, *prefix, *new]], pixels).logits
            new.append(int(logits[0, -1].argmax()))
    return [new]


def test_the_least_of_tokens_is_of_new_ones(shared):
    """min_tokens would be over before the answer begins."""
    content = [picture(1), text(QUESTION)]
    ids = shared.ask(content, token_ids=True)["choices"][0]["token_ids"][:-1]
    answer = shared.ask(content, prefix_ids=ids, min_tokens=3, max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3


def test_a_prefix_that_no_answer_has_is_refused(shared, assistant):
    """An id outside of the table would end the engine, and an end token be gone on from."""
    config = assistant.model.config
    size = config.text.vocab_size
    assert refused(shared, prefix_ids=[1, size]) == (
        "prefix_ids[1]",
        f"there is no token {size}; the vocabulary has {size}",
    )
    param, told = refused(shared, prefix_ids=[config.eos_token_ids[0]])
    assert param == "prefix_ids[0]" and "ends an answer" in told
    assert refused(shared, prefix_ids=[-200])[0] == "prefix_ids[0]"
    assert refused(shared, prefix_ids=[4] * 3000)[0] == "messages"


# --- drafts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guessing(assistant):
    """A server with drafts."""
    running = Running(assistant, "--draft", "lookup", "--draft-tokens", "3")
    yield running
    running.close()


def counted(running, name: str) -> float:
    metrics = running.send("GET", "/metrics")[2].decode()
    return float(re.search(rf"^minillava_{name}_tokens_total (.*)$", metrics, re.MULTILINE)[1])


def twice(running, **options) -> dict:
    """A request whose answer repeats what was said before: a second question on a picture."""
    asked = [{"role": "user", "content": [picture(1), text("Describe this image.")]}]
    said_before = said(running.chat(asked)[1])
    again = [{"role": "assistant", "content": said_before}, {"role": "user", "content": QUESTION}]
    return {"messages": asked + again, **options}


@pytest.mark.parametrize("look", [False, True])
def test_an_answer_says_what_was_guessed(guessing, shared, look):
    """Who asks could not tell whether drafts are good for anything, or the figures not add up; or
    the page, which asks for maps, would never get a guess."""
    body = twice(guessing, token_ids=True, look=look)
    before = [counted(guessing, name) for name in ("drafted", "accepted")]
    answer = guessing.chat(**body)[1]
    usage, (choice,) = answer["usage"], answer["choices"]
    details, own = usage["completion_tokens_details"], answer["minillava"]
    right, wrong = (details[f"{name}_prediction_tokens"] for name in ("accepted", "rejected"))
    assert right > 10 and wrong > 0
    assert (own["drafted"], own["accepted"]) == (right + wrong, right)
    # the prompt's pass makes one, each other one more than was guessed right
    assert usage["completion_tokens"] == 1 + own["passes"] + right == len(choice["token_ids"])
    assert len(choice["guessed"]) == usage["completion_tokens"]
    assert (choice["guessed"].count(True), choice["guessed"][0]) == (right, False)
    plain = shared.chat(**body)[1]
    assert plain["choices"][0]["message"] == choice["message"]
    assert "passes" not in plain["minillava"] and "guessed" not in plain["choices"][0]
    assert plain["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    # a stream says the same token by token
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = guessing.send("POST", "/v1/chat/completions", body)[2].decode()
    chunks = [json.loads(each[6:]) for each in raw.split("\n\n") if each.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    tokens = [each for each in choices if "token_ids" in each]
    assert [i for each in tokens for i in each["token_ids"]] == choice["token_ids"]
    assert [each["guessed"] for each in tokens] == choice["guessed"]
    assert all(len(each["look"]) <= 1 for each in tokens if look)
    assert chunks[-1]["usage"]["completion_tokens_details"] == details
    assert chunks[-2]["minillava"]["passes"] == own["passes"]
    expected = [before[0] + 2 * own["drafted"], before[1] + 2 * right]
    wait_until(lambda: [counted(guessing, name) for name in ("drafted", "accepted")] == expected)


def test_the_log_and_the_other_format_say_it_too(guessing, caplog):
    """Who runs the server could not see whether drafts are good for anything."""
    caplog.set_level(logging.INFO, logger="minillava.serve")
    body = {"input": "What is a ring?"}
    raw = guessing.send("POST", "/v1/responses", body, x_request_id="guessed")[2]
    own = json.loads(raw)["minillava"]
    told = f" tokens, {own['accepted']} of {own['drafted']} guesses right"
    wait_until(lambda: any(each.startswith("guessed ") for each in caplog.messages))
    (line,) = (each for each in caplog.messages if each.startswith("guessed "))
    assert line.endswith(told) and own["passes"] > 0


def test_the_door_says_by_what_it_guesses(guessing, run_main, tmp_path):
    """A mistyped folder would end in a traceback, or in a server without drafts."""
    told = serving.drafts_line(guessing.engine)
    assert re.fullmatch("guesses by lookup, exact (on this machine|up to rounding)", told)
    missing = tmp_path / "nothing"
    status, out, err = run_main(
        partial(enter, "serve"), "-m", SHAPES, "--port", 0, "--draft", missing
    )
    assert (status, out, err.count("\n"), str(missing) in err) == (1, "", 1, True)
    for words in (["--draft-tokens", "3"], ["--draft", "lookup", "--compile"]):
        assert run_main(partial(enter, "serve"), *words)[0] == 2


# --- README ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["look", "contrast", "prefix_ids", "drafts"])
def test_the_examples_of_the_readme_run_and_say_what_it_says(shared, guessing, name):
    """An example that nobody runs would go on asking for a field that is gone."""
    running = guessing if name == "drafts" else shared
    page = (ROOT / "minillava" / "serve" / "README.md").read_text(encoding="utf-8")
    found = re.search(
        rf"<!-- extension: {name} -->\n```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL
    )
    start = re.search(r"<!-- extension: start -->\n```python\n(.*?)```", page, re.DOTALL)[1]
    script = start.replace(":8000", f":{running.port}") + found[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == found[2]


# --- continue_final_message -----------------------------------------------------------------------


def test_an_answer_that_was_begun_is_gone_on_with(shared, assistant):
    """The beginning would be closed as a finished turn, said again, or lose the space after it."""
    user = {"role": "user", "content": [picture(1), text(QUESTION)]}
    whole = assistant.ask(SHAPES / "example-1.png", QUESTION)
    words = whole.split(" ")
    for count in (1, 4, 10):
        begun = " ".join(words[:count])
        messages = [user, {"role": "assistant", "content": begun}]
        status, answer = shared.chat(messages, continue_final_message=True)
        assert status == 200, answer
        assert begun + said(answer) == whole
    empty = [user, {"role": "assistant", "content": ""}]
    assert said(shared.chat(empty, continue_final_message=True)[1]) == whole
    status, answer = shared.chat([user], continue_final_message=True)
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_was_begun_stands_where_a_finished_answer_does(name):
    """A template's own end of a turn would be left in, or its space before the answer be lost."""
    template, messages = TEMPLATES[name], [Message("user", "What?"), Message("assistant", "I see")]
    read = read_messages(messages, template, go_on=True)
    finished = render(template, [("What?", "I see")])
    assert finished == read.begun + template.assistant.partition("{}")[2]
    assert read.begun.startswith(read.prompt) and read.begun.endswith("I see")
