"""Make the pictures on README and the pages of look, probe and trace.

    python tools/screenshots.py

Asks the bundled model: look draws minillava/look/heatmap.png, probe minillava/probe/why.png, and
Chromium shows the pages that look, probe and trace write: page.png in the folder of each. Needs
Chromium (on Debian: apt-get install chromium).
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
QUESTION = ["-m", "weights/shapes", "-i", "weights/shapes/example-1.png"]
WORDS = ["--word", "star", "--word", "circle", "--word", "square"]
WHY = ["-p", "What colour is the circle?", "--dtype", "float32", "--word", "blue"]
# where a page's picture goes: the command that writes it, and the part of it that is shown
PAGES = {
    ROOT / "minillava" / "look" / "page.png": (["look"], (1000, 680)),
    ROOT / "minillava" / "probe" / "page.png": (
        ["probe", *WHY],
        (1000, 1290),
    ),
    ROOT / "minillava" / "tracing" / "page.png": (["trace", "--depth", "outline"], (1000, 1700)),
}
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


def ask(*arguments: str) -> None:
    command = [sys.executable, "-m", "minillava." + arguments[0], *QUESTION, *arguments[1:]]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def shoot(browser: str, page: Path, size: tuple[int, int], target: Path) -> None:
    """The top of a page, in 256 colours, which is a third of the bytes."""
    # Chromium refuses its sandbox to root; these pages are our own and load nothing
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    flags += ["--window-size={},{}".format(*size), f"--screenshot={target}"]
    command = [browser, *flags, page.as_uri()]
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
    shrink(target)


def shrink(target: Path) -> None:
    with Image.open(target) as picture:
        few = picture.convert("RGB").quantize(256)
    few.save(target, optimize=True)


@contextmanager
def serving() -> Iterator[str]:
    """A server of the bundled model; its address."""
    command = [sys.executable, "-m", "minillava.serve", *QUESTION[:2], "-q", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("listening on "):
            sys.exit("error: the server did not start; its message is above")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def talk(browser: str, size: tuple[int, int], target: Path) -> None:
    """The page of serve: a question is asked, and the word clicked that names a shape. Needs pip
    install -e '.[serve,browser]'."""
    from playwright.sync_api import sync_playwright

    with serving() as address, sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": size[0], "height": size[1]})
        page.goto(address)
        page.set_input_files("#file", ROOT / QUESTION[-1])
        page.locator("#picture").wait_for()
        page.fill("#question", "Describe this image.")
        page.click("#send")
        page.locator("#send").wait_for()
        page.locator(".word", has_text="star").click()
        page.locator("#panel").wait_for()
        page.screenshot(path=target)
        opened.close()
    shrink(target)


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(
            f"error: found none of {', '.join(BROWSERS)}; install Chromium, which shows the pages"
        )
    served = ROOT / "minillava" / "serve" / "page.png"
    talk(browser, (1280, 800), served)
    print(f"{served.relative_to(ROOT)}: {served.stat().st_size:,} bytes")
    heat_map = ROOT / "minillava" / "look" / "heatmap.png"
    ask("look", *WORDS, "--out", str(heat_map))
    why = ROOT / "minillava" / "probe" / "why.png"
    ask("probe", *WHY, "--out", str(why))
    with tempfile.TemporaryDirectory() as folder:
        for target, (command, size) in PAGES.items():
            page = Path(folder) / f"{command[0]}.html"
            ask(*command, "--html", str(page))
            shoot(browser, page, size, target)
    for target in (heat_map, why, *PAGES):
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
