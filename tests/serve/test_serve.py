"""minillava.serve: what OpenAI's clients get, byte by byte, and what nobody gets."""

import asyncio
import base64
import contextlib
import http.client
import json
import logging
import queue
import re
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT
from served import (
    LONG,
    SHAPES,
    Streaming,
    answered,
    application,
    completions,
    hung_up,
    picture,
    raw_request,
    said,
    services,
    serving,
    text,
)
from waiting import PATIENCE, wait_until

import minillava
from minillava.cli.doors import enter
from minillava.fast.parallel import OthersEnded
from minillava.prompt import place_images, render
from minillava.serve import reading
from minillava.serve.flags import make_parser
from minillava.serve.patience import PARTS, Countdown
from minillava.serve.run import EXTRA, listen
from minillava.templates import TEMPLATES

pytestmark = pytest.mark.parity  # the mark of what needs an extra

main = partial(enter, "serve")


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["picture", "text"])
def test_an_answer_is_the_one_that_generate_gives(shared, assistant, first):
    """However the client orders its parts."""
    parts = [picture(1), text("How many shapes are there?")]
    answer = shared.ask(parts if first == "picture" else parts[::-1])
    assert said(answer) == assistant.ask(SHAPES / "example-1.png", "How many shapes are there?")
    assert list(answer) == [
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage", "minillava",
    ]  # fmt: skip
    assert (answer["object"], answer["model"]) == ("chat.completion", "shapes")
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    assert choice["message"]["refusal"] is None
    usage, ids = answer["usage"], assistant.tokenize(assistant.prompt("How many shapes are there?"))
    patches = assistant.model.config.tokens_per_image
    assert usage["prompt_tokens"] == len(ids) + patches - 1
    assert usage["prompt_tokens_details"]["image_tokens"] == patches
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_options_mean_what_they_mean_in_python(shared, assistant):
    """An option of a request would be ignored, or mean another thing than in Python."""
    path, question = SHAPES / "example-2.png", "Describe this image."
    parts, plain = [picture(2), text(question)], assistant.ask(path, question)
    for asked, ours in (
        ({"max_tokens": 4}, {"max_new_tokens": 4}),
        ({"max_completion_tokens": 3, "max_tokens": 9}, {"max_new_tokens": 3}),
        ({"stop": "ring"}, {"stop": ["ring"]}),
        ({"temperature": 1, "seed": 4, "top_p": 0.9}, {"temperature": 1, "seed": 4, "top_p": 0.9}),
        ({"top_p": 0.5, "top_k": 3}, {}),  # at temperature 0 they can remove nothing
        ({"temperature": 1, "top_p": 0}, {}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"user": "me", "store": True, "tools": [], "logit_bias": {}, "n": None}, {}),
        ({"modalities": [], "response_format": {}, "audio": {}, "prediction": {}}, {}),
    ):
        expected = assistant.ask(path, question, **ours) if ours else plain
        assert said(shared.ask(parts, **asked)) == expected, asked
    cut = shared.ask(parts, max_tokens=4)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["completion_tokens"] == 4


def test_several_answers_have_seeds_that_follow_one_another(shared, assistant):
    """n answers would all be the same, or none could be repeated."""
    path, question = SHAPES / "example-1.png", "Describe this image."
    answer = shared.ask([picture(1), text(question)], n=3, temperature=1, seed=7)
    expected = [assistant.ask(path, question, temperature=1, seed=seed) for seed in (7, 8, 9)]
    assert [said(answer, i) for i in range(3)] == expected
    assert answer["minillava"]["seed"] == [7, 8, 9]
    free = shared.ask("What is a ring?", temperature=1)
    (seed,) = free["minillava"]["seed"]
    assert said(shared.ask("What is a ring?", temperature=1, seed=seed)) == said(free)


def test_a_conversation_goes_on_and_its_beginning_is_not_read_again(shared, assistant):
    """Every turn would read the picture anew, or answer otherwise than chat does."""
    from minillava.chat import Conversation

    conversation = Conversation(assistant)
    conversation.add_image(SHAPES / "example-3.png")
    questions, messages = ["Where is the cross?", "Is it small or large?"], []
    for question in questions:
        parts = text(question) if messages else [picture(3), text(question)]
        messages.append({"role": "user", "content": parts if messages == [] else question})
        status, answer = shared.chat(messages)
        assert (status, said(answer)) == (200, conversation.ask(question))
        messages.append({"role": "assistant", "content": said(answer)})
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > assistant.model.config.tokens_per_image


def test_a_system_message_takes_the_templates_place(shared, assistant):
    """A system message would be read as a question, or stand beside the template's own."""
    for role in ("system", "developer"):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
        status, answer = shared.chat(messages)
        assert (status, said(answer)) == (200, assistant.ask(None, "Hello?", system="Be brief."))


def prompt_of(messages, assistant):
    import msgspec

    from minillava.serve.protocol import Message

    return reading.read_messages(msgspec.convert(messages, list[Message]), assistant.template)[:2]


def test_prompts_are_those_that_generate_writes(assistant):
    """The server would put a picture at another place than the command line does."""
    user = partial(dict, role="user")
    question = assistant.prompt("What?")
    for content in ([picture(1), text("What?")], [text("What?"), picture(1)]):
        prompt, pictures = prompt_of([user(content=content)], assistant)
        assert (prompt, prompt.segments) == (question, question.segments)
        assert pictures == [(SHAPES / "example-1.png").read_bytes()]
    between = [text("Is"), picture(1), text("like"), picture(2), text("?")]
    prompt, pictures = prompt_of([user(content=between)], assistant)
    assert prompt == assistant.prompt("Is\n<image>\nlike\n<image>\n?", images=2)
    # neighbours of one role are one message
    prompt, _ = prompt_of([user(content="a"), user(content=[picture(1), text("b")])], assistant)
    assert prompt == assistant.prompt("a\n<image>\nb")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_several_pictures_stand_as_the_template_has_them(name):
    """A model that was trained with all pictures on one line was shown each on its own."""
    template = TEMPLATES[name]
    messages = [{"role": "user", "content": [picture(1), picture(2), text("What?")]}]
    prompt, _ = prompt_of(messages, SimpleNamespace(template=template))
    assert prompt == render(template, [(place_images("What?", 2, template.one_line), None)])


def test_what_a_user_types_is_text_also_where_it_reads_image(shared, assistant):
    """A typed marker was taken for a picture, of which there was none: another server crashed."""
    typed = "What does <image> mean? <typed-0>"
    prompt, pictures = prompt_of([{"role": "user", "content": typed}], assistant)
    assert pictures == [] and typed in prompt
    assert -200 not in assistant.tokenizer.encode(prompt)
    with_one, _ = prompt_of([{"role": "user", "content": [picture(1), text(typed)]}], assistant)
    assert assistant.tokenizer.encode(with_one).count(-200) == 1
    assert said(shared.ask(typed)) is not None


def test_what_a_system_message_says_is_text_also_where_it_looks_like_our_own_mark(assistant):
    """The mark that stands in for a typed <image> was looked for in all texts but the system's, so
    that the model read "Say <image>" there."""
    said_above = {"role": "system", "content": "Say <typed-0>"}
    prompt, _ = prompt_of([said_above, {"role": "user", "content": "hi"}], assistant)
    assert "Say <typed-0>" in prompt and "<image>" not in prompt


def test_log_probabilities_spell_the_answer(shared, assistant):
    """A character of several tokens would come garbled in the log-probabilities."""
    answer = shared.ask([picture(1), text("Describe this image.")], logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == said(answer)
    assert len(entries) == answer["usage"]["completion_tokens"] - 1  # the end token has none
    for entry in entries:
        assert [len(entry["top_logprobs"]), entry["top_logprobs"][0]["logprob"]] == [
            2,
            pytest.approx(entry["logprob"]),  # greedy: the likeliest was taken
        ]
        assert "".join(map(chr, entry["bytes"])) == entry["token"]


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_byte_by_byte(shared, assistant):
    """A client that reads the stream would stumble over a missing or renamed field."""
    *events, last = shared.events([picture(1), text("Is it red?")], max_tokens=3, seed=0)
    assert last == "[DONE]"
    masked = [re.sub(r'"chatcmpl-\w+"', '"ID"', event) for event in events]
    masked = [re.sub(r'"created":\d+', '"created":0', event) for event in masked]
    masked = [re.sub(r'"minillava":\{.*?\}', '"minillava":{}', event) for event in masked]
    version = f"minillava-{minillava.__version__}-float32"
    head = f'{{"id":"ID","object":"chat.completion.chunk","created":0,"model":"shapes","system_fingerprint":"{version}","choices":['
    texts = [
        piece
        for piece in assistant.stream(SHAPES / "example-1.png", "Is it red?", max_new_tokens=3)
        if piece
    ]
    deltas = [
        '{"role":"assistant","content":""}',
        *(f'{{"content":{json.dumps(t)}}}' for t in texts),
    ]
    lines = [
        f'{head}{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":null}}]}}'
        for delta in deltas
    ]
    reason = json.loads(events[-1])["choices"][0]["finish_reason"]
    end = f'{head}{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"{reason}"}}],"minillava":{{}}}}'
    assert masked == [*lines, end]
    assert reason in ("stop", "length")


def test_a_stream_says_what_the_whole_answer_says(shared):
    """A streamed answer would lose text or usage that the whole one has."""
    parts = [picture(2), text("Describe this image.")]
    options = {"n": 2, "temperature": 1, "seed": 3, "logprobs": True}
    whole = shared.ask(parts, **options)
    *events, usage, last = shared.events(parts, stream_options={"include_usage": True}, **options)
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for i in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == said(whole, i)
        reasons = [c["finish_reason"] for c in own if c["finish_reason"]]
        assert reasons == [whole["choices"][i]["finish_reason"]]
        entries = [e for c in own for e in (c["logprobs"] or {"content": []})["content"]]
        assert [e["bytes"] for e in entries] == [
            e["bytes"] for e in whole["choices"][i]["logprobs"]["content"]
        ]
    found = json.loads(usage)
    assert found["choices"] == []
    assert found["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_silent_stream_is_kept_awake(start, monkeypatch):
    """Also while it waits in the queue: proxies close silent streams."""
    monkeypatch.setattr(completions, "PING", 0.01)
    running = start("--slots", "1")
    one = Streaming(running, LONG)
    assert one.read_until(b'"content":')
    two = Streaming(running, {"max_tokens": 2})
    assert two.read_until(b": ping\n\n")
    one.close()
    assert two.read_until(b"data: [DONE]\n\n")
    two.close()


@pytest.mark.parametrize("stream", [True, False])
def test_nobody_computes_for_a_client_that_went_away(start, stream):
    """The answers of clients that left would keep the slots busy."""
    running = start("--slots", "2")
    gone = Streaming(running, {**LONG, "n": 2}, stream)
    if stream:
        assert gone.read_until(b'"content":')
    wait_until(lambda: running.engine.running == 2)
    gone.close()
    wait_until(lambda: running.engine.running == 0)
    assert said(running.ask("What is a ring?", max_tokens=3))
    wait_until(lambda: b"minillava_cancelled_total 1.0" in running.send("GET", "/metrics")[2])


def test_a_full_queue_says_when_to_come_again(start):
    """A full server would let requests wait without end, or not say when to retry."""
    running = start("--slots", "1", "--queue", "1")
    busy = [Streaming(running, LONG) for _ in range(2)]
    wait_until(lambda: running.engine.full)
    body = {"messages": [{"role": "user", "content": "?"}]}
    status, headers, answer = running.send("POST", "/v1/chat/completions", body)
    assert (status, json.loads(answer)["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(headers["retry-after"]) <= 120
    for one in busy:
        one.close()


def test_what_fails_after_the_start_is_an_event_and_a_whole_body(start, assistant):
    """A client would take a broken-off answer for a whole one."""
    running = start("--slots", "1")
    one = Streaming(running, LONG)
    assert one.read_until(b'"content":')
    two = Streaming(running, LONG)
    wait_until(lambda: len(running.engine.waiting) == 1)
    running.engine.drain(0)
    for stream in (one, two):
        assert stream.read_until(b"0\r\n\r\n")  # the last piece of a chunked body
        assert b'"code":"shutting_down"' in stream.got and b"[DONE]" not in stream.got
        stream.close()
    assert running.send("GET", "/health")[0] == 503


# --- /v1/responses --------------------------------------------------------------------------------


def respond(running, input, **fields) -> tuple[int, dict]:
    status, _, body = running.send("POST", "/v1/responses", {"input": input, **fields})
    return status, json.loads(body)


def test_a_response_is_the_answer_of_chat(shared, assistant):
    """Its instructions, options or earlier turns would be lost on the way to the model, or its
    message be where no client looks."""
    status, found = respond(shared, "Hello?", instructions="Be brief.", top_p=0.5)
    expected = assistant.ask(None, "Hello?", system="Be brief.")
    (item,) = found["output"]
    (part,) = item["content"]
    assert (status, part["text"], part["type"]) == (200, expected, "output_text")
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert (found["object"], found["status"], found["store"]) == ("response", "completed", False)
    usage = found["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    url = picture(1)["image_url"]["url"]
    shown = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What?"}]
    turn = {"role": "user", "content": shown}
    status, cut = respond(
        shared, [turn], max_output_tokens=3, include=["message.output_text.logprobs"],
        top_logprobs=2, temperature=1, metadata={"a": "b"}, reasoning={"effort": "low"},
    )  # fmt: skip
    assert (status, cut["status"]) == (200, "incomplete")
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    (part,) = cut["output"][0]["content"]
    assert [len(each["top_logprobs"]) for each in part["logprobs"]] == [2, 2, 2]
    assert (cut["metadata"], cut["temperature"]) == ({"a": "b"}, 1)
    status, answer = respond(shared, [turn, *cut["output"], {"role": "user", "content": "And?"}])
    said_before = [{"role": "assistant", "content": part["text"]}]
    turns = [{"role": "user", "content": [picture(1), text("What?")]}, *said_before]
    _, expected = shared.chat([*turns, {"role": "user", "content": "And?"}])
    assert answer["output"][0]["content"][0]["text"] == said(expected)


def test_the_events_of_a_response(shared):
    """A client would miss the event it waits for: their names, numbers and order are fixed."""
    body = {"input": "What is a ring?", "stream": True}
    status, headers, raw = shared.send("POST", "/v1/responses", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = [block.split("\n") for block in raw.decode().removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [name for name, _ in blocks] == [f"event: response.{kind}" for kind in kinds]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    middle = kinds[len(begin) : -len(end)]
    assert (kinds[: len(begin)], kinds[-len(end) :]) == (begin, end)
    assert set(middle) == {"output_text.delta"} and len(middle) > 3
    text_said = "".join(event.get("delta", "") for event in events)
    done = events[-1]["response"]
    assert done["output"][0]["content"][0]["text"] == events[-4]["text"] == text_said
    assert {each.get("item_id", done["output"][0]["id"]) for each in events} == {
        done["output"][0]["id"]
    }
    assert {events[0]["response"]["id"], events[1]["response"]["id"]} == {done["id"]}


def test_a_response_that_fails_after_its_start_says_so(start):
    """A client would take a broken-off response for a whole one."""
    running = start()

    def fail(answers) -> None:
        raise RuntimeError("broken")

    running.engine._decode = fail
    _, _, raw = running.send("POST", "/v1/responses", {"input": "Hello?", "stream": True})
    last = json.loads(raw.decode().removesuffix("\n\n").rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_parameter", "text.format"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"seed": 3}, "unknown_parameter", "seed"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": " "}, "invalid_value", "input"),
        ({"model": "gpt-9"}, "model_not_found", "model"),
        ({"input": [{"type": "reasoning", "role": "user", "content": ""}]},
         "invalid_value", "input[0].type"),
        ({"instructions": "Be brief.", "input": [{"role": "tool", "content": "x"}]},
         "unsupported_value", "input[0].role"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "http://127.0.0.1:1/x.png"}]}]},
         "image_url_not_supported", "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
         "unsupported_value", "input[0].content[0].file_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         "unsupported_value", "input[0].content[0].type"),
    ],
)  # fmt: skip
def test_what_a_response_may_not_ask_is_refused_by_name(shared, fields, code, param):
    """A field that changes the answer would be ignored, or blamed by a name of another format."""
    status, answer = respond(shared, **{"input": "Hello?", **fields})
    assert status == (404 if code == "model_not_found" else 400), answer
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param), answer
    _, asks_for_nothing = respond(
        shared, "Hello?", max_output_tokens=1, tools=[], background=False, truncation="disabled",
        text={"format": {"type": "text"}, "verbosity": "low"}, store=True, conversation=None,
    )  # fmt: skip
    assert asks_for_nothing["status"] == "incomplete"


def test_the_schema_is_published(shared):
    """A generated client would not know a route, or a field that is taken."""
    status, _, body = shared.send("GET", "/openapi.json")
    found = json.loads(body)
    assert status == 200 and "/v1/responses" in found["paths"]
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "look", "continue_final_message"} <= set(fields)


# --- what is refused ------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello?"}]


def url(text: str) -> list:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]}]


def data(content: bytes) -> list:
    return url(f"data:image/png;base64,{base64.b64encode(content).decode()}")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json", None),
        (b"[" * 100_000, 400, "invalid_value", None),
        (b'{"metadata": ' + b"[" * 100_000, 400, "invalid_json", None),
        (b"[]", 400, "invalid_value", None),
        ({}, 400, "missing_required_parameter", "messages"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": HELLO, "temprature": 1}, 400, "unknown_parameter", "temprature"),
        ({"messages": [{**HELLO[0], "x": 1}]}, 400, "unknown_parameter", "messages[0].x"),
        ({"messages": HELLO, "temperature": 3}, 400, "invalid_value", "temperature"),
        ({"messages": HELLO, "temperature": "hot"}, 400, "invalid_value", "temperature"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"messages": HELLO, "max_tokens": True}, 400, "invalid_value", "max_tokens"),
        ({"messages": HELLO, "n": 5}, 400, "invalid_value", "n"),
        ({"messages": HELLO, "seed": 2**63}, 400, "invalid_value", "seed"),
        ({"messages": HELLO, "stop": [""]}, 400, "invalid_value", "stop"),
        ({"messages": HELLO, "stop": ["a"] * 17}, 400, "invalid_value", "stop"),
        ({"messages": HELLO, "top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
        ({"messages": HELLO, "typical_p": 0.5}, 400, "invalid_value", "typical_p"),
        ({"messages": HELLO, "stream_options": {}}, 400, "invalid_value", "stream_options"),
        ({"messages": HELLO, "tools": [{}]}, 400, "unsupported_parameter", "tools"),
        ({"messages": HELLO, "presence_penalty": 0.1}, 400, "unsupported_parameter", "presence_penalty"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
        ({"messages": HELLO, "web_search_options": {}}, 400, "unsupported_parameter", "web_search_options"),
        ({"messages": [{**HELLO[0], "name": "Ada"}]}, 400, "unsupported_value", "messages[0].name"),
        ({"messages": HELLO, "model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "unsupported_value", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, 400, "invalid_value", "messages[1].role"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "unsupported_value", "messages[0].content[0].type"),
        ({"messages": url("http://127.0.0.1:1/a.png")}, 400, "image_url_not_supported", "messages[0].content[0].image_url.url"),
        ({"messages": url("/etc/passwd")}, 400, "image_url_not_supported", "messages[0].content[0].image_url.url"),
        ({"messages": url("file:///etc/passwd")}, 400, "image_url_not_supported", "messages[0].content[0].image_url.url"),
        ({"messages": url("data:image/png;base64,a b")}, 400, "invalid_image", "messages[0].content[0].image_url.url"),
        ({"messages": data(b"no picture")}, 400, "invalid_image", "messages[0].content[0].image_url.url"),
        ({"messages": data(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")}, 400, "invalid_image", "messages[0].content[0].image_url.url"),
        ({"messages": data((SHAPES / "example-1.png").read_bytes()[:200])}, 400, "invalid_image", "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "user", "content": "a " * 3000}]}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "a" * 2_000_000}]}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": [picture(1)] * 60}]}, 400, "too_many_images", "messages"),
    ],
    ids=lambda value: str(value)[:60] if not isinstance(value, dict) else str(value)[-60:],
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(shared, body, status, code, param):
    """A mistyped parameter would be ignored, or a file of the server's be read as a picture."""
    found, headers, answer = shared.send("POST", "/v1/chat/completions", body)
    error = json.loads(answer)["error"]
    assert (found, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert "Traceback" not in error["message"] and str(ROOT) not in error["message"]
    assert headers["content-type"] == "application/json" and headers["x-request-id"]


def test_a_video_is_refused_as_what_it_is(assistant, monkeypatch):
    """A client was told that its prompt is too long, and would shorten it and ask again."""
    args = make_parser().parse_args([])
    settings = serving.read_settings(args, "shapes", "127.0.0.1", [])
    service = services.Service(assistant, SimpleNamespace(most_pictures=4), settings)
    service._check_text("<video>")  # to a model without them it is text
    monkeypatch.setitem(assistant.tokenizer.added, "<video>", 5)
    with pytest.raises(services.ApiError, match="videos are not read") as told:
        service._check_text("What does <video> show?")
    assert told.value.code == "unsupported_value"


def png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 70_000), (9000, 9000)])
def test_a_picture_that_says_it_is_huge_is_not_decoded(shared, size):
    """A small file could fill the server's memory with its pixels."""
    status, answer = shared.chat(data(png_header(*size)))
    assert (status, answer["error"]["code"]) == (400, "image_too_large")


def test_only_pages_of_named_sites_may_ask(start):
    """--cors would let every page in, or tell a browser that it may send cookies; or the named page
    would be kept out."""
    running = start(cors=["https://mine.example"], keys=[b"k"])
    asks = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization",
    }
    mine = {"origin": "https://mine.example", "sec_fetch_site": "cross-site"}
    status, headers, _ = running.send("OPTIONS", "/v1/chat/completions", **mine, **asks)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://mine.example")
    status, headers, _ = running.send("GET", "/v1/models", authorization="Bearer k", **mine)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://mine.example")
    assert "access-control-allow-credentials" not in headers
    for other in ("https://evil.example", "null"):
        status, headers, _ = running.send(
            "GET", "/v1/models", authorization="Bearer k", origin=other
        )
        assert status == 403 and "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/v1/chat/completions", {}, 405, "method_not_allowed"),
        ("GET", "/v2", {}, 404, "unknown_url"),
        ("GET", "/v1/models/other", {}, 404, "model_not_found"),
        ("GET", "/v1/models", {"origin": "http://evil.example"}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"origin": "null"}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"origin": "http://["}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"sec_fetch_site": "cross-site"}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"host": "evil.example"}, 400, "host_not_allowed"),
        ("GET", "/v1/models", {"host": "127.0.0.1.evil.example"}, 400, "host_not_allowed"),
        ("GET", "/", {"host": "["}, 400, "host_not_allowed"),
    ],
)
def test_who_may_not_ask(shared, method, path, headers, status, code):
    """A page in the user's browser could ask the server on this machine, or its wrong header would
    be a failure of the server, or refused in words that no client reads."""
    found, given, body = shared.send(method, path, **headers)
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert given["x-request-id"]


def test_a_body_that_is_no_json_by_its_name_or_too_large(start):
    """A form of another site, an endless body or a slow one would be accepted."""
    running = start(max_body=1000, body_timeout=0.3)
    form = "application/x-www-form-urlencoded"
    status, _, body = running.send("POST", "/v1/chat/completions", b"{}", content_type=form)
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
    status, _, body = running.send("POST", "/v1/chat/completions", b" " * 1001)
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as slow:
        slow.sendall(raw_request(b"x" * 100)[:-50])
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer


def test_a_body_in_chunks_says_no_length_and_has_the_same_limits(start):
    """Large ones would be read without limit to how many, since their length is not told."""
    running = start(max_body=1000)
    small = {"messages": [{"role": "user", "content": "What is a ring?"}], "max_tokens": 1}
    for body, status in ((small, 200), ({**small, "user": "x" * 1000}, 413)):
        kind = {"content-type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            parts = iter([json.dumps(body).encode()])
            connection.request("POST", "/v1/chat/completions", parts, kind, encode_chunked=True)
            assert connection.getresponse().status == status


@pytest.mark.parametrize("alike", [False, True], ids=["different", "alike"])
def test_few_pictures_are_decoded_at_once(assistant, monkeypatch, alike):
    """Forty files of some kilobytes, each of 64 megapixels, would take 8 GB together. A picture
    that many send at once was decoded for each of them."""
    args = make_parser().parse_args([])
    settings = serving.read_settings(args, "shapes", "127.0.0.1", [])
    service = services.Service(assistant, SimpleNamespace(most_pictures=4), settings)
    decode, at_once, most = services.open_picture, [], []

    def watched(*given):
        at_once.append(None)
        most.append(len(at_once))
        time.sleep(0.01)
        picture = decode(*given)
        at_once.pop()
        return picture

    monkeypatch.setattr(services, "open_picture", watched)
    content = (SHAPES / "example-1.png").read_bytes()
    given = [reading.Content(content + bytes([i * (not alike)])) for i in range(8)]
    threads = [threading.Thread(target=service._picture, args=(each, False)) for each in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert max(most) <= services.DECODING
    assert len(most) <= services.DECODING if alike else len(most) == 8


def test_a_text_full_of_our_own_marks_is_searched_once():
    """For each mark in it the whole text was searched again: a body of 30 MB took hours."""
    texts = ["".join(f"<typed-{i}>" for i in range(200_000)), "<typed-200001>"]
    assert reading._unused(texts) == "<typed-200000>"


def test_a_key_is_needed_everywhere_but_where_nothing_is_told(start):
    """A part of a key would be enough, or one path answer without any."""
    running = start(keys=[b"first", "zw\u00f6lf".encode()])
    for path in ("/v1/models", "/metrics", "/nowhere"):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer fir"},
                      {"authorization": "first"}, {"authorization": "Bearer \u00e4"}):  # fmt: skip
            status, headers, body = running.send("GET", path, **given)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
    assert running.send("GET", "/v1/models", authorization="Bearer first")[0] == 200
    assert running.send("GET", "/health")[0] == running.send("GET", "/livez")[0] == 200


def test_a_silent_peer_is_hung_up_on(start, monkeypatch):
    """It held its connection for ever; an answer may take as long as it takes."""
    monkeypatch.setattr(serving, "HEAD", 0.2)
    running = start()
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE) as silent:
        with contextlib.suppress(ConnectionError):  # where this machine was slow
            silent.sendall(b"GET /health HTT")
        assert hung_up(silent)
    assert answered(running, "What is a ring?", min_tokens=200)


def test_what_is_small_is_sent_at_once(shared):
    """An answer's head went, and its body when the client's system had confirmed the head: 44 ms
    for each request but the first of a connection. asyncio saw no socket of TCP's."""
    with socket.create_connection(("127.0.0.1", shared.port), timeout=PATIENCE) as peer:
        peer.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert peer.recv(100).startswith(b"HTTP/1.1 200")
        (taken,) = (
            protocol.transport.get_extra_info("socket")
            for protocol in shared.server.server_state.connections.copy()
            if protocol.client == peer.getsockname()
        )
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_machine_that_stands_still_costs_a_client_little_of_its_time():
    """After a laptop's sleep every request that was just being sent would be hung up on."""
    ended = []

    async def wait() -> None:
        countdown = Countdown(0.01, lambda: ended.append("ended"))
        time.sleep(0.1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not ended and countdown.left >= PARTS - 2
        while not ended:
            await asyncio.sleep(0.001)
        stopped = Countdown(0.01, lambda: ended.append("cancelled"))
        stopped.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(wait())
    assert ended == ["ended"]


# --- the other routes -----------------------------------------------------------------------------


def test_models_health_and_tokens(shared, assistant):
    """A client would find no list of models, or /tokenize count otherwise than the model."""
    _, _, body = shared.send("GET", "/v1/models")
    listed = json.loads(body)
    assert [model["id"] for model in listed["data"]] == ["shapes", "small"]
    assert json.loads(shared.send("GET", "/v1/models/small")[2]) == listed["data"][1]
    assert shared.ask("?", model="small", max_tokens=1)["model"] == "small"
    health = json.loads(shared.send("GET", "/health")[2])
    assert health == {"status": "ok", "slots": 4, "running": 0, "waiting": 0}
    messages = [{"role": "user", "content": [picture(1), text("What?")]}]
    found = json.loads(shared.send("POST", "/tokenize", {"messages": messages})[2])
    ids = assistant.tokenize(assistant.prompt("What?"))
    patches = assistant.model.config.tokens_per_image
    assert (found["ids"], found["picture_positions"]) == (ids, patches)
    assert found["count"] == len(ids) - 1 + patches and len(found["pieces"]) == len(ids)
    found = json.loads(shared.send("POST", "/tokenize", {"text": "a ring"})[2])
    assert found["ids"] == assistant.tokenizer.encode("a ring")
    assert shared.send("POST", "/tokenize", {})[0] == 400


def test_metrics_count(start):
    """The figures of /metrics would stand still, or count a token twice."""
    running = start()

    def value(name: str) -> float:
        text = running.send("GET", "/metrics")[2].decode()
        return float(re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)[1])

    running.ask("What is a ring?", max_tokens=3)
    assert value("minillava_generated_tokens_total") == 3
    assert value("minillava_engine_up") == 1
    for _ in range(2):
        running.ask([picture(3), text("Is it red?")], max_tokens=4)
    assert value("minillava_generated_tokens_total") == 3 + 2 * 4
    for cached in ("true", "false"):
        assert value(f'minillava_pictures_total{{cached="{cached}"}}') == 1
    # A request and a step are counted after what they send, so the last a moment after the answer;
    # the first token of an answer takes no step.
    route = 'minillava_requests_total{route="/v1/chat/completions",status="200"}'
    for name, count in (
        (route, 3),
        ("minillava_rows_per_step_count", 2 + 2 * 3),
        ("minillava_token_seconds_count", 2 + 2 * 3),
    ):
        wait_until(lambda name=name, count=count: value(name) >= count)
        assert value(name) == count


def test_a_clients_name_of_a_request_is_kept_only_if_it_is_one(shared):
    """A client could write what it likes into the headers and the log."""
    assert shared.send("GET", "/livez", x_request_id="mine-1")[1]["x-request-id"] == "mine-1"
    strange = shared.send("GET", "/livez", x_request_id="mine 1;")[1]["x-request-id"]
    assert strange.startswith("req_")


def test_many_clients_at_once_get_their_own_answers(shared, assistant):
    """A client would get another one's answer, or words of it."""
    questions = ["How many shapes are there?", "Where is the ring?", "Is it red?", "Describe it."]
    cases = [(1 + i % 3, questions[i % 4]) for i in range(12)]
    found: queue.Queue = queue.Queue()

    def ask(case):
        number, question = case
        if number == 2:
            *events, _ = shared.events([picture(number), text(question)])
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
            found.put((case, "".join(delta.get("content", "") for delta in deltas)))
        else:
            found.put((case, said(shared.ask([picture(number), text(question)]))))

    threads = [threading.Thread(target=ask, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    answers = [found.get_nowait() for _ in cases]
    for (number, question), answer in answers:
        assert answer == assistant.ask(SHAPES / f"example-{number}.png", question)


# --- the door -------------------------------------------------------------------------------------


def test_a_server_ends_with_what_ended_its_engine():
    """It said that the error is told above, where nothing is told of an end that is final."""
    nothing = SimpleNamespace(run=lambda sockets: None, should_exit=False)
    engine = SimpleNamespace(
        state="failed", error=OthersEnded(), join=lambda *_: None, drain=lambda _: None
    )
    with pytest.raises(OthersEnded):
        serving._run(nothing, engine, None)


def test_wrong_usage_of_the_door(run_main, tmp_path, monkeypatch):
    """A server open to everybody would start without a key."""
    monkeypatch.delenv("MINILLAVA_API_KEY", raising=False)
    status, out, err = run_main(main, "-m", SHAPES, "--host", "0.0.0.0", "--port", "0")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "lets others in: give --api-key-file" in err
    with contextlib.closing(listen("127.0.0.1", 0)) as taken:
        taken.listen()
        status, out, err = run_main(main, "-m", SHAPES, "--port", taken.getsockname()[1])
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "choose another --port" in err
    (tmp_path / "keys").write_text("\n\n")
    status, out, err = run_main(main, "-m", SHAPES, "--api-key-file", tmp_path / "keys")
    assert (status, err.count("\n")) == (1, 1) and "has no key" in err
    for words in (
        ["--port", "70000"], ["--slots", "0"], ["--cors", "*"], ["--temperature", "nan"], ["--compile"],
    ):  # fmt: skip
        assert run_main(main, *words)[0] == 2


def test_without_the_extra_there_is_one_line_that_names_it(run_main, monkeypatch):
    """Without uvicorn there would be a traceback, and no word of what to install."""
    for name in [name for name in sys.modules if name.startswith("minillava.serve.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys.modules["minillava.serve"], "server", None, raising=False)
    monkeypatch.delattr(sys.modules["minillava.serve"], "server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out, err = run_main(main, "-m", SHAPES)
    assert (status, out) == (1, "")
    assert err == (
        "error: serve needs packages that are not installed (uvicorn); "
        "pip install 'minillava[serve]'\n"
    )


def test_the_extra_names_what_is_imported():
    """`pip install 'minillava[serve]'` would leave out a package that is imported."""
    declared = re.search(r'"serve": \[(.*?)\]', (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    packages = {name.replace("-", "_") for name in re.findall(r'"([a-z0-9-]+)>=', declared)}
    assert packages <= set(EXTRA) and set(EXTRA) - packages == {"anyio"}  # which starlette brings


def test_the_log_has_numbers_and_no_words(shared, caplog):
    """Who reads the log would read what people asked, or not learn how much was computed."""
    caplog.set_level(logging.INFO, logger="minillava.serve")
    asked = {"role": "user", "content": [picture(1), text("Is it red?")]}
    body = {"messages": [asked], "max_tokens": 3}
    # by its name: the line of another test's request may come as late as now
    raw = shared.send("POST", "/v1/chat/completions", body, x_request_id="mine")[2]
    answer = json.loads(raw)
    line = re.compile(r"mine POST /v1/chat/completions 200 \d+ ms (\d+)\+3 tokens")
    wait_until(lambda: any(line.fullmatch(each) for each in caplog.messages))
    (found,) = filter(None, map(line.fullmatch, caplog.messages))
    assert int(found[1]) == answer["usage"]["prompt_tokens"]
    for words in ("Is it red", answer["choices"][0]["message"]["content"]):
        assert words and words not in caplog.text


def test_the_line_about_memory_is_what_is_taken(shared, assistant):
    """Who chooses --slots by it would run out of memory."""
    parameters = sum(each.nbytes for each in assistant.model.parameters())
    told = serving.memory_line(shared.engine)
    slots = 2 * 4 * 2 * 32 * 4 * shared.engine.capacity * len(shared.engine.slots)
    found = re.fullmatch(
        r"(\d+) slots of (\d+) positions take (.+) GiB, pictures up to (.+) MiB, weights (.+) GiB",
        told,
    )
    assert found is not None
    assert [int(found[i]) for i in (1, 2)] == [len(shared.engine.slots), shared.engine.capacity]
    numbers = (slots / 2**30, 32 * 81 * 192 * 4 / 2**20, parameters / 2**30)
    for number, expected in zip(found.groups()[2:], numbers, strict=True):
        assert float(number) == pytest.approx(expected, abs=0.51 if "." not in number else 0.0051)


def test_the_tokens_of_a_step_wake_the_event_loop_once():
    """Each would cost the engine as much as the token itself; or one that comes after the others
    were delivered would lie there until the next."""
    woken: list = []
    loop = SimpleNamespace(is_closed=lambda: False, call_soon_threadsafe=woken.append)
    mail, queues = application.Mail(loop), [asyncio.Queue() for _ in range(3)]
    for number in range(2):
        for events in queues:
            mail.send(events, number, "event")
    assert len(woken) == 1 and all(events.empty() for events in queues)
    woken[0]()
    assert [[events.get_nowait()[0] for _ in range(2)] for events in queues] == [[0, 1]] * 3
    mail.send(queues[0], 2, "event")
    assert len(woken) == 2


def test_no_file_is_written(shared, tmp_path):
    """The server would leave its clients' pictures on the disk."""
    before = sorted(Path(tmp_path).parent.iterdir())
    shared.ask([picture(1), text("Is it red?")], max_tokens=2)
    assert sorted(Path(tmp_path).parent.iterdir()) == before
