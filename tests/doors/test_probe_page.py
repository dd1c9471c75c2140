"""The page of probe in a real browser: wide, narrow, dark and printed."""

import shutil

import pytest
import screenshots
from paths import ROOT
from PIL import Image, ImageDraw
from waiting import PATIENCE

import minillava
from minillava.probe.knockout import ablate, knock_out
from minillava.probe.measure import Answered
from minillava.probe.occlude import occlude
from minillava.probe.page import page
from minillava.probe.patching import patch
from minillava.probe.report import Findings

pytestmark = [pytest.mark.parity, pytest.mark.slow]

COLOUR = "getComputedStyle(document.body).backgroundColor"
WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of all measures, of the answer's last two words."""
    assistant, found = (
        minillava.load(ROOT / "weights" / "shapes", device="cpu", dtype="float32"),
        [],
    )
    for colour in ("#2050d0", "#e02030"):
        image = Image.new("RGB", (240, 160), "#dfe8e2")
        ImageDraw.Draw(image).ellipse((95, 55, 145, 105), fill=colour)
        found.append(Answered(assistant, image, "What colour is the circle?"))
    a, b = found
    findings = Findings(a, [2, 3], occlude(a, "mean", 3), knock_out(a), ablate(a), patch(a, b))
    path = tmp_path_factory.mktemp("probe") / "a.html"
    path.write_text(page(findings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    path = next(filter(None, map(shutil.which, screenshots.BROWSERS)), None)
    if path is None:
        pytest.skip(f"found none of {', '.join(screenshots.BROWSERS)}")
    with playwright.sync_playwright() as running:
        # Chromium refuses its sandbox to root; the page is our own
        given = {"args": ["--no-sandbox"], "timeout": 1000 * PATIENCE}
        opened = running.chromium.launch(executable_path=path, **given)
        yield opened
        opened.close()


@pytest.fixture
def shown(browser, written, request):
    """The page as it is shown, and what was complained of or asked for meanwhile."""
    width, scheme = request.param
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.set_default_timeout(1000 * PATIENCE)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    yield tab, said, asked
    tab.close()


@pytest.mark.parametrize("shown", [(1280, "light"), (390, "dark")], indirect=True)
def test_it_fits_the_window_and_loads_nothing(shown, written):
    """A wide table would make the whole page slide sideways on a telephone."""
    tab, said, asked = shown
    wide, window = tab.evaluate(WIDTHS)
    assert wide <= window
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # of each of two words: the picture, its attention and what hiding does, side by side
    tops = tab.evaluate("[...document.images].map(i => Math.round(i.getBoundingClientRect().top))")
    assert len(tops) == 6
    assert tops[0] == tops[1] and (tops[1] == tops[2]) == (window == 1280)
    assert tab.locator("section#word-3 svg polyline").count() == 2
    assert tab.locator("section").count() == 3


@pytest.mark.parametrize("shown", [(390, "light")], indirect=True)
def test_a_word_of_the_answer_leads_to_what_was_found_of_it(shown):
    """The answer's words would be links to nothing."""
    tab, *_ = shown
    tab.get_by_role("link", name="blue.").click()
    tab.wait_for_url("**#word-3")
    tab.wait_for_function("scrollY > 0")
    assert abs(tab.locator("#word-3").bounding_box()["y"]) < 900


@pytest.mark.parametrize("shown", [(1280, "dark")], indirect=True)
def test_it_is_dark_as_the_reader_is_and_bright_on_paper(shown):
    """Printed, it would be a page of ink, and a word's section be cut in two."""
    tab, *_ = shown
    assert max(map(int, tab.evaluate(COLOUR)[4:-1].split(","))) < 60
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate(COLOUR) == "rgb(255, 255, 255)"
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert tab.evaluate(style.format("section", "breakInside")) == "avoid"
    assert tab.evaluate(style.format(".scroll", "overflowX")) == "visible"
    assert tab.pdf().startswith(b"%PDF")
