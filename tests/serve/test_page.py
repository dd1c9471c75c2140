"""The page at `/`, in a real browser: what a person sees, points at, clicks, and cannot break."""

import base64
import json
import re
import shutil
import threading
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from browser import open_browser
from paths import ROOT
from served import SHAPES, Running, picture, text
from waiting import PATIENCE, wait_until

from minillava.look.draw import SCALE
from minillava.serve import static

pytestmark = pytest.mark.parity  # the mark of what needs an extra

FOLDER = ROOT / "minillava" / "serve" / "page"
QUESTION = "Describe this image."
PICTURE = SHAPES / "example-1.png"


# --- without a browser ----------------------------------------------------------------------------


def test_every_file_of_the_page_is_sent_with_its_policy(shared):
    """A browser would run a script that somebody has put into the page, or frame it."""
    paths = ["/", "/page/scale.js"]
    names = {each.name for each in FOLDER.iterdir() if each.suffix in static.KINDS}
    paths += [f"/page/{name}" for name in names - {"index.html"}]
    for path in paths:
        status, headers, body = shared.send("GET", path)
        assert (status, len(body) > 50) == (200, True), path
        policy = dict(
            part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert (
        shared.send("GET", "/page/index.html")[0] == shared.send("GET", "/page/../app.py")[0] == 404
    )
    scale = shared.send("GET", "/page/scale.js")[2].decode()
    assert json.loads(re.search(r"= (.*);", scale)[1]) == [list(colour) for colour in SCALE]


def test_what_is_no_file_of_the_page_is_not_read(tmp_path, monkeypatch):
    """A file that a system or an editor has left beside the page would stop the server."""
    expected = static.read_page()
    folder = shutil.copytree(FOLDER, tmp_path / "page")
    for name in (".DS_Store", "page.js~"):
        (folder / name).write_bytes(b"left here")
    monkeypatch.setattr(static, "FOLDER", folder)
    assert static.read_page() == expected


def test_the_page_has_no_script_inside_and_builds_no_html_of_text():
    """What a model says, or a file's name, would become a part of the page."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"\s(?:on\w+|style)=", html) == []
    addresses = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert addresses and all(address.startswith("/page/") for address in addresses)
    for path in FOLDER.glob("*.js"):
        script = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in script, path.name
        assert re.findall(r"https?://", script) == []


def test_the_page_is_open_to_links_and_the_rest_is_not(assistant):
    """A bookmark or a link elsewhere would end in an error; or the page's own rights would be
    everybody's."""
    running = Running(assistant, keys=[b"secret"])
    try:
        assert running.send("GET", "/", sec_fetch_site="cross-site")[0] == 200
        assert running.send("GET", "/v1/models", sec_fetch_site="cross-site")[0] == 403
        assert running.send("GET", "/v1/models")[0] == 401
        assert running.send("GET", "/", host="evil.example")[0] == 400
    finally:
        running.close()
    running = Running(assistant, "--no-page")
    try:
        assert running.send("GET", "/")[0] == running.send("GET", "/page/page.js")[0] == 404
    finally:
        running.close()


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def visit(browser, shared):
    """`visit(width=..., ...)`: the page in a browser that has never seen it; that nothing goes
    wrong on its console is seen at the end."""
    contexts, wrong, expected = [], [], []

    def begin(running=shared, width=1280, height=800, scheme="light", path="/", allow=None, **more):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **more
        )
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("request", lambda r: foreign(r.url, running.port) and wrong.append(r.url))
        if allow:
            expected.append(allow)
        page.goto(f"http://127.0.0.1:{running.port}{path}")
        return page

    yield begin
    for context in contexts:
        context.close()
    assert [told for told in wrong if not any(each in told for each in expected)] == []


def foreign(url: str, port: int) -> bool:
    return not url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:"))


def ask(page, question=QUESTION, image=PICTURE):
    """Ask, and wait until the answer is there."""
    if image is not None:
        page.set_input_files("#file", image)
        page.locator("#picture").wait_for()
    page.fill("#question", question)
    page.click("#send")
    answered(page)


def answered(page):
    """The page shows at once that it asks; only a question that waits for its picture, of which
    there is one at most in these tests, is still where it was written."""
    wait_until(lambda: page.input_value("#question") == "")
    page.locator("article.assistant").last.wait_for()
    page.locator("#send").wait_for()


def said(page, i=-1) -> str:
    answers = page.locator(".words")
    return answers.nth(i if i >= 0 else answers.count() + i).inner_text()


def word(page, said):
    return page.locator(".word", has_text=re.compile(f"^{said}[.,]?$")).first


def test_pointing_at_a_word_shows_what_it_looked_at(visit, shared):
    """The map of another word, mirrored, or none would lie over the picture."""
    page = visit(allow="Canvas2D: Multiple readback")  # which only this test does
    ask(page)
    look = shared.ask([picture(1), text(QUESTION)], look=True)["choices"][0]["look"]
    side = look["picture"]["side"]
    for name in ("star", "circle", "square"):
        (found,) = (each for each in look["words"] if each["text"] == name)
        heat = np.frombuffer(base64.b64decode(found["map"]), "<f4")
        word(page, name).hover()
        drawn = np.array(pixels(page)).reshape(side * side, 4)[:, :3].sum(1)
        assert drawn.argmin() == heat.argmax()  # darker is hotter
        assert f"“{name}”: {100 * found['share']:.1f} %" in page.inner_text("#said")
    # and the other way round: a patch, and the words that used it
    box = page.locator("#over").bounding_box()
    row, column = divmod(int(heat.argmax()), side)
    page.mouse.move(
        box["x"] + (column + 0.5) * box["width"] / side,
        box["y"] + (row + 0.5) * box["height"] / side,
    )
    assert f"Patch in row {row}, column {column}" in page.inner_text("#said")
    colours = page.evaluate(
        "[...document.querySelectorAll('.word')].map(e => [e.textContent, getComputedStyle(e).backgroundColor])"
    )
    uses = [np.frombuffer(base64.b64decode(w["map"]), "<f4")[heat.argmax()] for w in look["words"]]
    best = look["words"][int(np.argmax(uses))]["text"]
    assert dict(colours)[best] == f"rgb({', '.join(map(str, SCALE[-1]))})"


def pixels(page) -> list[int]:
    return page.evaluate(
        "(() => { const c = document.getElementById('heat');"
        " return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )


def test_a_padded_picture_has_its_map_where_the_model_saw_it(visit, tmp_path):
    """The map of a picture that is not square would be squeezed into it."""
    from PIL import Image

    Image.open(PICTURE).convert("RGB").resize((300, 150)).save(tmp_path / "wide.png")
    page = visit()
    ask(page, image=tmp_path / "wide.png")
    word(page, "see").hover()
    over, image = (page.locator(each).bounding_box() for each in ("#over", "#image"))
    assert over["width"] == pytest.approx(image["width"], abs=1)
    assert over["height"] == pytest.approx(image["width"], abs=1)  # a square
    middle = over["y"] + over["height"] / 2
    assert middle == pytest.approx(image["y"] + image["height"] / 2, abs=1)


def test_going_on_from_another_word(visit, shared):
    """The answer would begin otherwise than with the word that was chosen."""
    page = visit()
    ask(page)
    first = said(page)
    word(page, "red").click()
    options = page.locator("#panel li button")
    assert options.count() == 8 and "100.0 %" in options.nth(0).inner_text()
    assert options.nth(0).is_disabled()  # the model's own
    name = options.nth(1).inner_text().split()[0].lstrip("␣")
    options.nth(1).click()
    answered(page)
    page.get_by_text("2 / 2").wait_for()
    (before, _), now = first.split(" red "), said(page)
    assert now.startswith(f"{before} {name} ")
    # the server says the same to anybody
    asked = {"logprobs": True, "top_logprobs": 2, "token_ids": True}
    (choice,) = shared.ask([picture(1), text(QUESTION)], **asked)["choices"]
    at = [entry["token"] for entry in choice["logprobs"]["content"]].index(" red")
    other = choice["logprobs"]["content"][at]["top_logprobs"][1]["id"]
    prefix = [*choice["token_ids"][:at], other]
    (rest,) = shared.ask([picture(1), text(QUESTION)], prefix_ids=prefix)["choices"]
    assert now == f"{before} {name}{rest['message']['content']}"
    word(page, "circle").hover()  # maps also of what was read before and after
    assert "of its attention on the picture" in page.inner_text("#said")
    page.get_by_label("The one before").click()
    assert said(page) == first


@contextmanager
def changed(page, **fields):
    """Requests get further fields on their way."""

    def change(route):
        body = {**json.loads(route.request.post_data), **fields}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", change)
    yield
    page.unroute("**/v1/chat/completions")


@contextmanager
def held(engine, steps=30):
    """After so many steps the engine waits until this ends, however slow the browser is."""
    go, taken, stepped = threading.Event(), count(1), engine.on_step

    def wait(rows, seconds):
        stepped(rows, seconds)
        if next(taken) >= steps:
            go.wait(PATIENCE)

    engine.on_step = wait
    try:
        yield
    finally:
        engine.on_step = stepped
        go.set()


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stopping_keeps_what_was_said_and_frees_the_slot(visit, shared, by):
    """The server would go on for nobody, or the words vanish."""
    page = visit()
    page.set_input_files("#file", PICTURE)
    with changed(page, min_tokens=700, max_tokens=700), held(shared.engine):
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.locator(".word").nth(5).wait_for()
        if by == "button":
            page.click("#stop")
        else:
            page.keyboard.press("Escape")
        page.get_by_text("Stopped.").wait_for()
    wait_until(lambda: shared.engine.running == 0)
    assert len(said(page).split()) > 5
    word(page, "see").hover()
    assert "of its attention on the picture" in page.inner_text("#said")
    ask(page, "Is it red?", image=None)
    assert page.locator("article.assistant").count() == 2 and said(page)


# Opening a picture lasts until `window.open_it()` is called, as it may on a slow machine.
SLOW_TO_OPEN = """() => {
  const decode = HTMLImageElement.prototype.decode;
  const opened = new Promise(resolve => { window.open_it = resolve; });
  HTMLImageElement.prototype.decode = async function () { await opened; return decode.call(this); };
}"""


def test_a_question_waits_for_the_picture_that_was_given_before_it(visit, shared):
    """It would be asked without the picture, and its answer vanish when the picture is there."""
    page = visit()
    page.evaluate(SLOW_TO_OPEN)
    page.set_input_files("#file", PICTURE)
    page.fill("#question", QUESTION)
    for _ in range(2):  # who sends it twice asks once
        page.press("#question", "Enter")
    assert page.input_value("#question") == QUESTION and page.locator("article").count() == 0
    page.evaluate("open_it()")
    answered(page)
    (choice,) = shared.ask([picture(1), text(QUESTION)])["choices"]
    assert said(page) == choice["message"]["content"]
    assert page.locator("article.user").count() == 1 and page.input_value("#question") == ""


def test_a_picture_that_cannot_be_opened_is_not_asked_about(visit, tmp_path):
    """The question would be asked without it, and the answer be about nothing."""
    (tmp_path / "no.png").write_bytes(b"not a picture")
    page = visit()
    page.evaluate(SLOW_TO_OPEN)
    page.set_input_files("#file", tmp_path / "no.png")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.evaluate("open_it()")
    page.get_by_text("no.png is not a picture that this browser can open.").wait_for()
    assert page.input_value("#question") == QUESTION and page.locator("article").count() == 0
    page.press("#question", "Enter")  # without a picture, then
    answered(page)


def test_a_picture_that_cannot_be_kept_is_no_end_of_the_page(visit):
    """No picture could be given, and no question asked, until a reload."""
    page = visit()
    page.evaluate("() => { crypto.subtle.digest = () => Promise.reject(new Error('no hash')); }")
    page.set_input_files("#file", PICTURE)
    page.get_by_text("no hash").wait_for()
    ask(page, image=None)
    assert said(page)


def test_a_picture_given_during_an_answer_does_not_take_it_away(visit, shared):
    """A new picture begins a new conversation, and the answer would be gone."""
    page = visit()
    ask(page)
    page.evaluate(SLOW_TO_OPEN)
    page.set_input_files("#file", SHAPES / "example-2.png")
    with changed(page, min_tokens=700, max_tokens=700), held(shared.engine):
        page.get_by_role("button", name="Another answer").click()
        page.locator(".word").nth(5).wait_for()
        page.evaluate("open_it()")
        page.get_by_text("An answer is being written.").wait_for()
        page.click("#stop")
        page.get_by_text("Stopped.").wait_for()
    assert len(said(page).split()) > 5 and page.locator("article.user").count() == 1


def test_a_reload_brings_everything_back(visit):
    """A conversation would be lost, or its maps be those of another answer."""
    page = visit()
    ask(page)
    first = said(page)
    ask(page, "Where is the star?", image=None)
    second = said(page)
    word(page, "star").hover()
    before = pixels(page), page.inner_text("#said")
    page.reload()
    page.locator("#image[src^=blob]").wait_for()
    assert (said(page, 0), said(page, 1)) == (first, second)
    word(page, "star").hover()
    assert not page.locator("#heat").is_visible()  # maps are not kept
    page.click("#again-maps")
    page.locator("#heat").wait_for()
    word(page, "star").hover()
    told = re.sub(r"took .*", "", page.inner_text("#said"))
    assert (pixels(page), told) == (before[0], re.sub(r"took .*", "", before[1]))


@pytest.mark.parametrize("height", [844, 600])
def test_390_pixels(visit, height):
    """On a telephone one would have to scroll sideways, or see nothing but the picture."""
    page = visit(width=390, height=height, has_touch=True)
    ask(page)
    word(page, "star").tap()
    panel = page.locator("#panel")
    panel.wait_for()
    assert "star" in panel.inner_text()
    assert page.locator("#picture").bounding_box()["height"] <= 0.4 * height
    for button in ("#open-options", "#open-history"):
        page.click(button)
        widest = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate(widest) <= 390
    page.locator("#panel button:enabled").first.tap()
    page.get_by_text("2 / 2").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_axe_finds_nothing(visit, width, scheme):
    """Somebody who does not see, or not well, or has no mouse could not use the page."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="the extra [browser] is not installed"
    ).Axe()
    page = visit(width=width, scheme=scheme)
    check(axe, page)
    page.click("#open-options")
    page.select_option("#contrast", "m3id")
    ask(page)
    word(page, "star").click()
    check(axe, page)
    page.get_by_role("button", name="Edit").click()
    check(axe, page)


def check(axe, page):
    found = axe.run(page).response["violations"]
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found] == []


def test_contrast_stands_beside_the_plain_answer(visit, assistant):
    """Only one of the two would be shown, or both be the same request."""
    page = visit()
    page.click("#open-options")
    page.select_option("#contrast", "m3id")
    with changed_contrast(page, rate=0.3):
        ask(page, "Where is the ring?")
    from minillava.generate.contrast import M3ID

    question = "Where is the ring?"
    expected = [assistant.ask(PICTURE, question, contrast=c) for c in (None, M3ID(rate=0.3))]
    assert expected[0] != expected[1]
    assert [said(page, 0), said(page, 1)] == expected
    assert page.locator(".answer h3").all_inner_texts() == [
        "without contrast",
        "with contrast (m3id)",
    ]
    differs = page.locator(".word.differs").all_inner_texts()
    own = set(expected[0].split()) ^ set(expected[1].split())
    assert set(differs) == own


@contextmanager
def changed_contrast(page, **fields):
    def change(route):
        body = json.loads(route.request.post_data)
        if "contrast" in body:
            body["contrast"].update(fields)
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", change)
    yield
    page.unroute("**/v1/chat/completions")


@pytest.mark.parametrize("width", [1280, 390])
def test_what_was_guessed_is_counted_and_marked(visit, assistant, width):
    """Who uses drafts could not see whether they are good for anything; or it would be told by a
    colour alone."""
    running = Running(assistant, "--draft", "lookup", "--draft-tokens", "3")
    try:
        page = visit(running, width=width)
        ask(page)
        first = said(page)
        ask(page, "Please describe this image in detail.", image=None)
        asked = [{"role": "user", "content": [picture(1), text(QUESTION)]}]
        asked += [{"role": "assistant", "content": first}]
        asked += [{"role": "user", "content": "Please describe this image in detail."}]
        answer = running.chat(asked, logprobs=True, token_ids=True)[1]
    finally:
        running.close()
    (choice,), own = answer["choices"], answer["minillava"]
    speed = (answer["usage"]["completion_tokens"] - 1) / own["passes"]
    told = f"{own['accepted']} of {own['drafted']} guesses right (dotted above), {speed:.1f} tokens a pass"
    assert told in page.locator(".note").last.inner_text() and own["accepted"] > 10
    words: list[tuple[str, bool]] = []
    for entry, right in zip(choice["logprobs"]["content"], choice["guessed"], strict=False):
        begins = entry["token"].startswith(" ") or not words
        before, all_right = ("", True) if begins else words.pop()
        words.append((before + entry["token"].strip(), all_right and right))
    shown = page.locator(".words").last.locator(".word")
    line = "each => [each.textContent, getComputedStyle(each).borderTopWidth !== '0px']"
    assert shown.evaluate_all(f"all => all.map({line})") == [list(each) for each in words]
    for right in (True, False):
        shown.nth([guessed for _, guessed in words].index(right)).focus()
        assert (", guessed, took" in page.inner_text("#said")) == right
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_another_answer_and_an_edited_question_keep_the_old_ones(visit):
    """What was said before would be overwritten."""
    page = visit()
    page.click("#open-options")
    page.fill("#seed", "5")
    ask(page)
    first = said(page)
    page.get_by_role("button", name="Another answer").click()
    page.get_by_text("2 / 2").wait_for()
    answered(page)
    note = page.locator(".note").inner_text()
    assert "temperature 1, seed 5" in note and "guess" not in note  # which this server does not
    page.get_by_label("The one before").click()
    assert said(page) == first
    page.get_by_role("button", name="Edit").click()
    page.locator("article textarea").fill("How many shapes are there?")
    page.locator("article textarea").press("Enter")
    answered(page)
    assert page.locator(".question").inner_text() == "How many shapes are there?"
    assert "three" in said(page)
    page.get_by_label("The one before").click()
    assert (page.locator(".question").inner_text(), said(page)) == (QUESTION, first)


def test_keys(visit):
    """Enter would send a half-composed word; the words could not be reached without a mouse."""
    page = visit()
    page.set_input_files("#file", PICTURE)
    page.locator("#picture").wait_for()
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.evaluate(
        "document.getElementById('question').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.locator("article").count() == 0
    ask(page, image=None)
    page.press("#question", "ArrowUp")
    assert page.locator("article textarea").input_value() == QUESTION
    page.keyboard.press("Escape")
    page.locator(".word[tabindex='0']").focus()
    focused = "document.activeElement.textContent"
    assert page.locator(".word[tabindex='0']").count() == 1
    start = page.evaluate(focused)
    page.keyboard.press("End")
    assert page.evaluate(focused) == said(page).split()[-1]
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == said(page).split()[-2] != start
    assert page.locator("#heat").is_visible()
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()
    assert page.evaluate("document.activeElement.closest('#panel') !== null")
    page.keyboard.press("Escape")
    assert not page.locator("#panel").is_visible()
    assert page.evaluate(focused) == said(page).split()[-2]
    page.locator("#picture").focus()
    page.keyboard.press("ArrowRight")
    assert "Patch in row 0, column 1" in page.inner_text("#said")
    assert said(page) in page.locator("#live").inner_text()  # a screen reader heard it


STREAM = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {
        "choices": [
            {
                "index": 0,
                "delta": {"content": "<img src=x onerror=alert(1)>"},
                "token_ids": [5],
                "token_ms": 1,
                "logprobs": {
                    "content": [
                        {
                            "id": 5,
                            "token": "<img src=x onerror=alert(1)>",
                            "logprob": -0.1,
                            "bytes": list(b"<img src=x onerror=alert(1)>"),
                            "top_logprobs": [
                                {"id": 6, "token": "<b>bold</b>", "logprob": -1, "bytes": []}
                            ],
                        }
                    ]
                },
            }
        ]
    },
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
]


def test_what_looks_like_html_is_text(visit):
    """A model's answer would run a script in the reader's browser."""
    page = visit()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in STREAM) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
    question = "<script>alert(2)</script><b>?</b>"
    ask(page, question, image=None)
    assert page.locator(".question").inner_text() == question
    assert said(page) == "<img src=x onerror=alert(1)>"
    page.locator(".word").first.click()
    assert "<b>bold</b>" in page.inner_text("#panel")
    assert page.locator("article img, article b, #panel b").count() == 0


def test_errors_are_sentences_with_a_way_on(visit):
    """Where the server is gone, full, or refuses, the page would stay blank."""
    page = visit(allow="Failed to load resource")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    assert "The server does not answer" in page.locator(".note.error").inner_text()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("I see a large red star").first.wait_for()
    answered(page)
    error = {"error": {"message": "2 requests wait already; try again", "code": "queue_full"}}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json=error, headers={"retry-after": "600"}),
    )
    ask(page, "Again?", image=None)
    assert "2 requests wait already" in page.locator(".note.error").inner_text()
    page.get_by_role("button", name=re.compile(r"Try again in \d+ s")).wait_for()
    page.unroute("**/v1/chat/completions")
    page.evaluate("(now => { Date.now = () => now() + 600000; })(Date.now)")  # ten minutes later
    page.get_by_role("button", name="Try again", exact=True).click()
    answered(page)
    assert page.locator(".note.error").count() == 0
    # what the server refuses it refuses in its own words
    page.click("#open-options")
    page.fill("#layers", "99")
    ask(page, "Is it red?", image=None)
    assert "layers is [99], expected some of 0 to 3" in page.locator(".note.error").inner_text()


def test_a_key_is_asked_for_and_kept_for_the_tab(visit, assistant):
    """With a key the page would be of no use, or show it to everybody at this machine."""
    running = Running(assistant, keys=[b"secret"])
    try:
        page = visit(running, allow="401")
        page.fill("#api-key", "secret")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("ready").wait_for()
        ask(page)
        assert "star" in said(page)
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0
    finally:
        running.close()


def test_pictures_are_pasted_dropped_and_made_smaller(visit, shared, tmp_path):
    """A photograph of 30 MB would be sent whole, every time; what is no picture would be taken."""
    from PIL import Image

    Image.open(PICTURE).convert("RGB").resize((3000, 2000)).save(tmp_path / "large.png")
    page = visit()
    page.set_input_files("#file", tmp_path / "large.png")
    page.locator("#picture").wait_for()
    page.locator("#image").evaluate("image => image.decode()")
    size = page.locator("#image").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [2048, 1365]
    content = base64.b64encode(PICTURE.read_bytes()).decode()
    for kind, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.click("#new")
        page.evaluate(
            """([kind, field, content]) => {
                const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0)), data = new DataTransfer();
                data.items.add(new File([bytes], "x.png", {type: "image/png"}));
                const event = new Event(kind, {bubbles: true, cancelable: true});
                Object.defineProperty(event, field, {value: data});
                document.body.dispatchEvent(event);
            }""",
            [kind, field, content],
        )
        page.locator("#picture").wait_for()
        ask(page, image=None)
        assert "red star" in said(page)
    page.click("#new")
    (tmp_path / "x.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "x.png")
    page.get_by_text("x.png is not a picture that this browser can open").wait_for()


def test_conversations_are_listed_exported_and_cleared(visit, tmp_path):
    """A conversation could neither be found again nor be got rid of."""
    page = visit()
    page.on("dialog", lambda dialog: dialog.accept())
    ask(page)
    first = said(page)
    page.click("#new")
    ask(page, "What is a ring?", image=None)
    titles = page.locator("#conversations .open")
    assert titles.all_inner_texts() == ["What is a ring?", QUESTION]
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "all.json")
    page.click("#clear")
    wait_until(lambda: titles.count() == 0)
    assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('talk')).length") == 0
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(tmp_path / "all.json")
    titles.nth(1).click()
    page.locator("#image[src^=blob]").wait_for()
    assert said(page) == first


def test_a_full_browser_is_told_of(visit):
    """The conversation would be lost at the next reload, without a word."""
    page = visit()
    page.evaluate(
        "() => { Storage.prototype.setItem ="
        " () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    page.fill("#question", "What is a ring?")
    page.press("#question", "Enter")
    page.get_by_text("This browser has no room for the conversation").wait_for()
    answered(page)


def test_the_colours_follow_the_system_and_the_switch(visit):
    """A bright page at night, or a switch that a reload forgets."""
    page = visit(scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(22, 22, 26)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_copied_text_is_the_answer_and_the_command_asks_the_same(visit, shared):
    """The command would not run, or ask something else."""
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "What is a ring?", image=None)
    # the page says it for a moment only, which may be over before it is looked for
    page.evaluate("window.setTimeout = () => 0")
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == said(page)
    page.get_by_role("button", name="Copy as curl").click()
    page.get_by_text("Copied").nth(1).wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith(f"curl -N http://127.0.0.1:{shared.port}/v1/chat/completions")
    body = json.loads(re.search(r"<<'END'\n(.*)\nEND", command, re.DOTALL)[1])
    status, _, raw = shared.send(
        "POST", "/v1/chat/completions", {**body, "stream_options": None, "stream": False}
    )
    assert (status, json.loads(raw)["choices"][0]["message"]["content"]) == (200, said(page))
