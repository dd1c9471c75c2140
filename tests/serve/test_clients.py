"""The clients that people have, unchanged, against a server of the bundled model: pictures, several
turns, streams, options, errors."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import environment
from paths import ROOT
from served import LONG, SHAPES, picture, text
from waiting import PATIENCE, wait_until

pytestmark = pytest.mark.clients

QUESTION = "How many shapes are there?"


def expected(assistant, question=QUESTION, number=1, **options) -> str:
    return assistant.ask(SHAPES / f"example-{number}.png", question, **options)


def asked(question=QUESTION, number=1) -> list:
    return [{"role": "user", "content": [text(question), picture(number)]}]


# --- OpenAI's, for Python -------------------------------------------------------------------------


@pytest.fixture
def openai():
    """Its clients are closed: the connections that one keeps would be found open at any later time,
    in another test."""
    yield pytest.importorskip("openai", reason="OpenAI's client is not installed")
    while OPENED:
        OPENED.pop().close()


OPENED: list = []


def client_of(running, kind, **settings):
    given = {"api_key": "any", "max_retries": 0, **settings}
    client = kind(base_url=f"http://127.0.0.1:{running.port}/v1", **given)
    if hasattr(client, "__exit__"):  # who opens one that is asynchronous closes it
        OPENED.append(client)
    return client


def test_openai_asks_and_goes_on(openai, shared, assistant):
    """An answer would have no text or no usage where the client looks for it, or a second turn be
    answered without the first."""
    from minillava.chat import Conversation

    conversation = Conversation(assistant)
    conversation.add_image(SHAPES / "example-1.png")
    client, messages = client_of(shared, openai.OpenAI), asked()
    assert [model.id for model in client.models.list()] == ["shapes", "small"]
    assert client.models.retrieve("small").id == "small"
    for question in (QUESTION, "What color is the first one?"):
        if len(messages) > 1:
            messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model="shapes", messages=messages)
        (choice,) = answer.choices
        assert choice.message.content == conversation.ask(question)
        assert choice.finish_reason == "stop" and answer.usage.completion_tokens > 1
        messages.append(choice.message.model_dump(exclude_none=True))
    assert answer.usage.prompt_tokens_details.cached_tokens > 81


def test_openai_streams(openai, shared, assistant):
    """The client would lose pieces, the usage, or the end of a stream."""
    client = client_of(shared, openai.OpenAI)
    given = {"model": "shapes", "messages": asked(), "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(stream=True, **given))
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == expected(assistant)
    assert chunks[-1].usage.total_tokens == (
        chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    )
    with client.chat.completions.stream(**given) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == said
    cached = {"prompt_tokens_details"}  # how much of the prompt is cached hangs on who asked before
    assert whole.usage.model_dump(exclude=cached) == chunks[-1].usage.model_dump(exclude=cached)


def test_openai_options(openai, shared, assistant):
    """An option that a client sends would be ignored."""
    create = client_of(shared, openai.OpenAI).chat.completions.create
    describe = "Describe this image."
    for theirs, ours in (
        ({"stop": ["a"]}, {"stop": ["a"]}),
        ({"max_completion_tokens": 3}, {"max_new_tokens": 3}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"temperature": 1, "seed": 5, "top_p": 0.9}, {"temperature": 1, "seed": 5, "top_p": 0.9}),
        ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
    ):
        answer = create(model="", messages=asked(describe), **theirs)
        assert answer.choices[0].message.content == expected(assistant, describe, **ours), theirs
    two = create(
        model="", messages=asked(), n=2, temperature=1, seed=3, logprobs=True, top_logprobs=2
    )
    for i, choice in enumerate(two.choices):
        assert choice.message.content == expected(assistant, temperature=1, seed=3 + i)
        entries = choice.logprobs.content
        assert b"".join(bytes(e.bytes) for e in entries).decode() == choice.message.content
        assert {len(entry.top_logprobs) for entry in entries} == {2}


def test_openai_errors(openai, shared, start):
    """A mistake would come as a class that the caller does not catch, or without a sentence."""
    create = client_of(shared, openai.OpenAI).chat.completions.create
    hello = [{"role": "user", "content": "Hello?"}]
    with pytest.raises(openai.BadRequestError, match="temprature is not known here") as found:
        create(model="", messages=hello, extra_body={"temprature": 1})
    assert (found.value.param, found.value.code) == ("temprature", "unknown_parameter")
    with pytest.raises(openai.BadRequestError, match="tools is not served"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        create(model="", messages=hello, tools=[tool])
    with pytest.raises(openai.NotFoundError) as found:
        create(model="gpt-9", messages=hello)
    assert found.value.code == "model_not_found" and found.value.request_id
    guarded = start(keys=[b"secret"])
    with pytest.raises(openai.AuthenticationError):
        client_of(guarded, openai.OpenAI).models.list()
    assert client_of(guarded, openai.OpenAI, api_key="secret").models.list()


def test_openai_waits_for_a_full_queue(openai, start):
    """Clients at a full server would fail instead of trying again when they are told to."""
    running = start("--slots", "1", "--queue", "1")
    client = client_of(running, openai.OpenAI, max_retries=1000)
    hello = [{"role": "user", "content": "What is a ring?"}]
    more = {"min_tokens": 60}
    refused, done = threading.Event(), []
    original = running.engine.check_room  # before a body is read, and again by `submit`
    stepped = running.engine.on_step

    def noted():
        try:
            original()
        except Exception:
            refused.set()
            raise

    def wait(*given):
        """The first answer takes until somebody finds the queue full."""
        stepped(*given)
        refused.wait(PATIENCE)

    running.engine.check_room, running.engine.on_step = noted, wait

    def ask():
        answer = client.chat.completions.create(
            model="", messages=hello, max_tokens=60, extra_body=more
        )
        done.append(answer.usage.completion_tokens)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert done == [60] * 6 and refused.is_set()


def test_openai_hangs_up_in_the_middle(openai, start):
    """A stream that its reader gives up would hold its slot until its last token."""
    running = start("--slots", "1")

    async def give_up() -> None:
        async with client_of(running, openai.AsyncOpenAI) as client:
            hello = [{"role": "user", "content": "What is a ring?"}]
            stream = await client.chat.completions.create(
                model="", messages=hello, stream=True, max_tokens=900, extra_body=LONG
            )
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    await stream.close()
                    return

    asyncio.run(give_up())
    wait_until(lambda: running.engine.running == 0)


def test_openai_responses(openai, shared, assistant):
    """OpenAI's newer call would find no text, no usage or no end of a stream, or a response could
    not be given back as the beginning of the next turn."""
    create = client_of(shared, openai.OpenAI).responses.create
    url = picture(1)["image_url"]["url"]
    parts = [{"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": url}]
    turns = [{"role": "user", "content": parts}]
    first = create(model="shapes", input=turns)
    assert first.output_text == expected(assistant) and first.status == "completed"
    assert first.usage.input_tokens_details.cached_tokens >= 0 and first.usage.output_tokens > 1
    turns += [*first.output, {"role": "user", "content": "What color is the first one?"}]
    second = create(model="shapes", input=turns, store=False)
    assert second.output_text and second.usage.input_tokens_details.cached_tokens > 81
    *events, last = create(model="shapes", input=turns, stream=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == second.output_text == last.response.output_text
    assert last.type == "response.completed" and last.response.usage.output_tokens > 1
    with client_of(shared, openai.OpenAI).responses.stream(model="shapes", input=turns) as stream:
        assert stream.get_final_response().output_text == second.output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id is not served"):
        create(model="shapes", input="And?", previous_response_id=first.id)


# --- others, each in a process of its own ---------------------------------------------------------


def need(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def run_client(command: list, **variables: str) -> str:
    """What a client prints."""
    variables = {**os.environ, "OPENAI_API_KEY": "any", "NO_COLOR": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, env=variables
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_script(script: str, running, **variables: str) -> list:
    """The lines that a script in Python prints, each JSON."""
    script = "import json, sys\nbase, picture = sys.argv[1:3]\n" + textwrap.dedent(script)
    url = picture(1)["image_url"]["url"]
    base = f"http://127.0.0.1:{running.port}/v1"
    out = run_client([sys.executable, "-W", "ignore", "-c", script, base, url], **variables)
    return [json.loads(line) for line in out.splitlines()]


def test_llm(shared, assistant, tmp_path):
    """`llm -m shapes -a picture.png` would show nothing, or an error of its own."""
    need("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: shapes\n  vision: true\n"
        f"  api_base: http://127.0.0.1:{shared.port}/v1\n"
    )
    llm = [sys.executable, "-m", "llm"]
    given = ["-m", "served", "-o", "temperature", "0"]
    shown = ["-a", SHAPES / "example-1.png"]
    home = {"LLM_USER_PATH": str(tmp_path)}
    for more in ([], ["--no-stream"]):
        out = run_client([*llm, QUESTION, *given, *shown, *more], **home)
        assert out.strip() == expected(assistant)
    assert run_client([*llm, "-c", "What color is it?"], **home).strip()


def test_langchain(shared, assistant):
    """A chain would break at the answer, at a stream's usage, or at an error."""
    need("langchain_openai")
    said, streamed, usage, error = run_script(
        f"""
        from langchain_openai import ChatOpenAI
        from langchain_core.messages import HumanMessage
        import openai
        model = ChatOpenAI(model="shapes", base_url=base, temperature=0, stream_usage=True)
        parts = [{{"type": "text", "text": "{QUESTION}"}},
                 {{"type": "image_url", "image_url": {{"url": picture}}}}]
        message = HumanMessage(content=parts)
        print(json.dumps(model.invoke([message]).content))
        chunks = list(model.stream([message]))
        print(json.dumps("".join(chunk.content for chunk in chunks)))
        total = sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
        print(json.dumps(total))
        try:
            ChatOpenAI(model="gpt-9", base_url=base, max_retries=0).invoke("Hello?")
        except openai.NotFoundError as error:
            print(json.dumps(error.code))
        """,
        shared,
    )
    assert said == streamed == expected(assistant)
    assert usage > 1 and error == "model_not_found"


def test_litellm(shared, assistant):
    """A proxy in front of the server would lose the answer, the stream or the error."""
    need("litellm")
    said, streamed, error = run_script(
        f"""
        import litellm
        litellm.suppress_debug_info = True  # it is printed where the answer is
        parts = [{{"type": "text", "text": "{QUESTION}"}},
                 {{"type": "image_url", "image_url": {{"url": picture}}}}]
        given = dict(model="openai/shapes", api_base=base, api_key="any",
                     messages=[{{"role": "user", "content": parts}}])
        print(json.dumps(litellm.completion(**given).choices[0].message.content))
        chunks = litellm.completion(stream=True, stream_options={{"include_usage": True}}, **given)
        print(json.dumps("".join(c.choices[0].delta.content or "" for c in chunks if c.choices)))
        try:
            litellm.completion(**{{**given, "model": "openai/gpt-9"}}, num_retries=0)
        except litellm.exceptions.NotFoundError as error:
            print(json.dumps(str(error)))
        """,
        shared,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert said == streamed == expected(assistant)
    assert "there is no model 'gpt-9'" in error


JAVASCRIPT = """
const { OpenAI } = require("openai");
const [base, picture, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL: base, apiKey: "any", maxRetries: 0 });
const content = [{ type: "text", text: question }, { type: "image_url", image_url: { url: picture } }];
const given = { model: "shapes", messages: [{ role: "user", content }] };
const tell = (value) => console.log(JSON.stringify(value));
(async () => {
  tell((await client.chat.completions.create(given)).choices[0].message.content);
  const stream = await client.chat.completions.create(
    { ...given, stream: true, stream_options: { include_usage: true } });
  let said = "", usage = null;
  for await (const chunk of stream) {
    said += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  tell(said);
  tell(usage.completion_tokens);
  try { await client.chat.completions.create({ ...given, model: "gpt-9" }); }
  catch (error) { tell([error instanceof OpenAI.NotFoundError, error.code]); }
})();
"""


def test_openai_for_javascript(shared, assistant, tmp_path):
    """Its reader of streams is another one than Python's. It is found by NODE_PATH."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if subprocess.run([node, "-e", "require('openai')"], capture_output=True).returncode:
        pytest.skip("OpenAI's client for JavaScript is not installed where NODE_PATH looks")
    (tmp_path / "client.cjs").write_text(JAVASCRIPT)
    base, url = f"http://127.0.0.1:{shared.port}/v1", picture(1)["image_url"]["url"]
    out = run_client([node, tmp_path / "client.cjs", base, url, QUESTION])
    said, streamed, usage, error = map(json.loads, out.splitlines())
    assert said == streamed == expected(assistant)
    assert usage > 1 and error == [True, "model_not_found"]


def test_curl(shared, assistant, tmp_path):
    """A body from a file, a stream unbuffered, and the form that curl sends by itself."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    body = Path(tmp_path / "body.json")
    body.write_text(json.dumps({"messages": asked(), "stream": True}))
    url = f"http://127.0.0.1:{shared.port}/v1/chat/completions"
    as_json = ["-H", "Content-Type: application/json"]
    out = run_client([curl, "-sSN", url, *as_json, "-d", f"@{body}"])
    events = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == expected(assistant)
    form = json.loads(run_client([curl, "-sS", url, "-d", f"@{body}"]))
    assert form["error"]["code"] == "unsupported_media_type"
    assert "expected application/json" in form["error"]["message"]


# --- the page beside the door ---------------------------------------------------------------------


def block(name: str) -> str:
    page = (ROOT / "minillava" / "serve" / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- serve: {name} -->\n```\w+\n(.*?)\n```", page, re.DOTALL)[1]


def test_the_two_commands_of_the_page(tmp_path):
    """What a reader types first would not start a server, or not ask it."""
    install, start = block("start").split(" && ")
    assert re.search(r"-e '\.\[serve\]'", install)
    words = start.replace("--port 8000", "--port 0").split()
    process = subprocess.Popen(
        [sys.executable, *words[1:]], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        if shutil.which("curl"):
            command = block("curl").replace("http://127.0.0.1:8000", address)
            assert json.loads(run_client(["sh", "-c", command]))["choices"][0]["message"]["content"]
        if find_spec("openai"):
            script = block("openai").replace("http://127.0.0.1:8000", address)
            done = subprocess.run(
                [sys.executable, "-c", script],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert (done.stdout, done.stderr) == ("There are three shapes.", "")
            script = block("responses").replace("http://127.0.0.1:8000", address)
            assert run_client([sys.executable, "-c", script]).strip()
    finally:
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0
        process.stdout.close()
