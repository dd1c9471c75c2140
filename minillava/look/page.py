"""The pages of look.py: one file each, with the picture and the numbers inside, nothing loaded from
anywhere."""

import json

import numpy as np
from PIL import Image

from minillava.cli.pages import THEME, data_url
from minillava.look.draw import BLACK_STAYS, SCALE, listed, remarks

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
THEME:root { --scale: linear-gradient(to right, COLOURS); }
@media screen { body { max-width: 1180px; padding: 20px; } }
h1 { font-size: 22px; margin: 0; }
p { margin: 8px 0; }
.faint { color: var(--faint); font-size: 14px; }
main { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); gap: 28px; margin-top: 16px; }
@media (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); gap: 14px; } }
.picture { position: relative; overflow: hidden; touch-action: manipulation; }
.picture img { width: 100%; height: 100%; display: block; }
.patches { position: absolute; display: grid; }
.patch { cursor: crosshair; min-width: 0; overflow: hidden; outline: 0; }
.patch.here { outline: 2px solid #fff; box-shadow: inset 0 0 0 2px #19191e; z-index: 1; }
.key { margin-top: 10px; max-width: 420px; font-size: 14px; }
.key i { display: block; height: 14px; background: var(--scale); border: 1px solid var(--faint); }
.key span { display: flex; justify-content: space-between; }
button { font: inherit; color: inherit; background: none; border: 0; border-radius: 4px; padding: 3px 4px;
  margin: 0 1px; cursor: pointer; }
button.here { outline: 2px solid var(--ink); }
@media print { .picture { max-width: 120mm !important; break-inside: avoid; } }
STYLE</style>
<h1>TITLE</h1>
BODY
<script>
const data = DATA;
const by = id => document.getElementById(id);
const make = (tag, parent, text = "") => { const e = parent.appendChild(document.createElement(tag));
  e.textContent = text; return e; };
const scale = SCALE;
// A number from 0 to 1 as a colour of the scale.
function colour(v) {
  const at = Math.min(Math.max(v, 0), 1) * (scale.length - 1), i = Math.min(at | 0, scale.length - 2);
  return scale[i].map((c, k) => Math.round(c + (scale[i + 1][k] - c) * (at - i)));
}
const paint = (e, v) => Object.assign(e.style,
  {backgroundColor: `rgb(${colour(v)})`, color: v > 0.55 ? "#fff" : "#19191e"});
const percent = v => (100 * v).toFixed(v < 0.01 ? 2 : 1) + " %";
const steps = grid => ({ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid, ArrowDown: grid});
// One element per patch, row by row, over the picture; `act` gets the patch that the pointer or the
// focus is on. Tab reaches one of them, the arrow keys the others; Escape leaves them by `leave`.
function patches(grid, act, leave) {
  const all = [];
  by("patches").style.gridTemplate = `repeat(${grid}, 1fr) / repeat(${grid}, 1fr)`;
  for (let i = 0; i < grid * grid; i++) {
    const e = make("div", by("patches")), row = i / grid | 0, column = i % grid;
    e.className = "patch";
    e.tabIndex = i ? -1 : 0;
    e.role = "button";
    e.ariaLabel = `patch in row ${row}, column ${column}`;
    for (const kind of ["pointerenter", "click", "focus"]) e.addEventListener(kind, () => act(i));
    e.addEventListener("focus", () => all.forEach((other, k) => { other.tabIndex = k === i ? 0 : -1; }));
    e.addEventListener("keydown", event => {
      const step = steps(grid)[event.key], to = i + step;
      if (event.key === "Escape") leave();
      else if (step === undefined) return;
      else if (to >= 0 && to < all.length && (row === (to / grid | 0) || column === to % grid)) all[to].focus();
      event.preventDefault();
    });
    all.push(e);
  }
  return all;
}
SCRIPT
</script>
</html>
"""

LOOK_STYLE = """
.picture.warm img { filter: grayscale(1) contrast(CONTRAST) brightness(BRIGHTNESS); }
.picture.warm .patches { mix-blend-mode: multiply; box-shadow: 0 0 0 2000px #aaa; }
.answer { font-size: 20px; line-height: 1.8; }
td { padding: 1px 14px 1px 0; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
"""

LOOK_BODY = """<p id="question"></p>
<main>
<div>
<div class="picture" id="picture"><img id="img" alt="the picture"><div class="patches" id="patches"></div></div>
<div class="key" id="key"><i></i><span><b>0</b><b id="most"></b></span></div>
</div>
<div>
<p class="answer" id="answer"></p>
<p id="said" aria-live="polite"></p>
<table><tbody id="table"></tbody></table>
<p class="faint" id="hint">Point at a word: what it looked at. Point at a patch: the words that used
it. With keys: Tab to a word or to the picture, arrows from patch to patch, Escape back to the word.
Rows and columns count from 0, from the top left. Numbers are shares of a word's attention; what is
not on the picture went to the text before it.
<span id="averaged"></span></p>
</div>
</main>"""

LOOK_SCRIPT = """
const {words} = data, grid = data.grid, [w, h] = data.picture.size, [left, top_, right, bottom] = data.picture.box;
const flat = words.map(word => word.map.flat());
by("img").src = data.image;
by("question").textContent = data.question;
by("averaged").textContent = data.note;
by("picture").style.aspectRatio = `${w} / ${h}`;
by("picture").style.maxWidth = `calc(78vh * ${w / h})`;
Object.assign(by("patches").style, {left: 100 * left / w + "%", top: 100 * top_ / h + "%",
  width: 100 * (right - left) / w + "%", height: 100 * (bottom - top_) / h + "%"});
const cells = words.length ? patches(grid, showPatch, () => buttons[word].focus()) : [];
const buttons = words.map((word, i) => {
  const e = make("button", by("answer"), word.text);
  for (const kind of ["pointerenter", "focus", "click"]) e.addEventListener(kind, () => showWord(i));
  by("answer").append(" ");
  return e;
});
// The one that used the picture most explains the page best; the first is often "I".
let word = words.reduce((best, one, i) => one.share > words[best].share ? i : best, 0);
function mark(elements, at) { elements.forEach((e, i) => e.classList.toggle("here", i === at)); }
function showWord(i) {
  word = i;
  const most = Math.max(...flat[i], 1e-12);
  by("picture").classList.add("warm");
  cells.forEach((e, p) => paint(e, flat[i][p] / most));
  buttons.forEach(e => { e.style.backgroundColor = e.style.color = ""; });
  mark(cells, -1);
  mark(buttons, i);
  by("table").replaceChildren();
  by("most").textContent = `hottest patch: ${percent(most)}`;
  by("said").textContent = `\\u201c${words[i].text}\\u201d: ${percent(words[i].share)} of its attention on the picture`;
}
function showPatch(p) {
  const uses = flat.map(map => map[p]), most = Math.max(...uses, 1e-12);
  mark(cells, p);
  buttons.forEach((e, i) => paint(e, uses[i] / most));
  by("said").textContent = `Patch in row ${p / grid | 0}, column ${p % grid}, used most by`;
  by("table").replaceChildren();
  [...uses.keys()].sort((a, b) => uses[b] - uses[a]).slice(0, 6).forEach(i => {
    const row = make("tr", by("table"));
    make("td", row, words[i].text);
    make("td", row, percent(uses[i]));
  });
}
by("picture").addEventListener("pointerleave", event => { if (event.pointerType === "mouse") showWord(word); });
if (words.length) showWord(word);
else {
  by("said").textContent = "The answer has no words: there is nothing to point at.";
  by("key").hidden = by("hint").hidden = true;
}
"""

LENS_STYLE = """
main { grid-template-columns: minmax(0, 3fr) minmax(0, 1fr); }
@media (max-width: 760px) { main { grid-template-columns: minmax(0, 1fr); } }
.picture { aspect-ratio: 1; max-width: 88vh; color: #19191e; background: #fff; }
.picture img { opacity: .45; }
.patches { inset: 0; }
.patch { font-size: SIZE; line-height: 1.05; text-align: center; word-break: break-all; display: grid;
  align-content: center; box-shadow: inset 0 0 0 .5px #19191e40; }
.scroll { overflow-x: auto; margin-top: 10px; }
table { border-collapse: collapse; font-size: 14px; }
td, th { padding: 2px 7px; white-space: nowrap; text-align: left; font-weight: normal; }
thead th { font-weight: bold; border-bottom: 2px solid var(--ink); }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
h2 { font-size: 18px; margin: 26px 0 0; }
input { width: min(100%, 420px); }
@media print {
  .scroll { overflow: visible; }
  h2, #question { break-after: avoid; }
  #tokens { break-inside: avoid; table-layout: fixed; width: 100%; font-size: 8px; }
  #tokens td, #tokens th { white-space: normal; overflow-wrap: anywhere; padding: 1px 2px; }
}
"""

LENS_BODY = """<p class="faint">After each layer the state is sent through the last norm and the head, as if no
layer followed: the most likely token, and how likely. Layer 0 is what goes into the first. A patch
was never trained to say anything, so expect noise where the layers have not yet made words of it.
\u2581 is a space: what begins with it begins a word.</p>
<h2>What each patch would decode to</h2>
<main>
<div>
<label><span id="at"></span><br><input type="range" id="layer" min="0"></label>
<div class="picture" id="picture"><img id="img" alt="the picture as the model sees it">
<div class="patches" id="patches"></div></div>
</div>
<div><p id="said">Point at a patch, or go to it with Tab and the arrow keys, for all its layers. Rows and columns count
from 0, from the top left.</p><table><tbody id="patch"></tbody></table></div>
</main>
<h2>What each layer would have answered</h2>
<p id="question" class="faint"></p>
<div class="scroll"><table id="tokens"></table></div>
<div class="key"><i></i><span><b>0</b><b>how likely</b><b>1</b></span></div>"""

LENS_SCRIPT = """
const last = data.patches.length - 1, grid = Math.round(Math.sqrt(data.patches[0].length));
by("img").src = data.image;
by("question").textContent = `${data.question} \\u2013 ${data.answer}`;
const cells = patches(grid, showPatch, () => by("layer").focus());
by("layer").max = by("layer").value = last;
function showLayer(layer) {
  by("at").textContent = `after layer ${layer} of ${last}`;
  cells.forEach((e, p) => { e.textContent = data.patches[layer][p][0]; });
}
function fill(row, [text, likely]) {
  const e = make("td", row, text);
  e.title = `${text} ${percent(likely)}`;
  paint(e, likely);
}
function showPatch(p) {
  cells.forEach((e, i) => e.classList.toggle("here", i === p));
  by("said").textContent = `Row ${p / grid | 0}, column ${p % grid}, layer by layer:`;
  by("patch").replaceChildren();
  data.patches.forEach((layer, i) => {
    const row = make("tr", by("patch"));
    make("th", row, i);
    fill(row, layer[p]);
    make("td", row, percent(layer[p][1]));
  });
}
by("layer").addEventListener("input", () => showLayer(+by("layer").value));
showLayer(last);
const head = make("tr", make("thead", by("tokens")));
make("th", head, "layer");
data.chosen.forEach(text => make("th", head, text));
const body = make("tbody", by("tokens"));
data.tokens.forEach((layer, i) => {
  const row = make("tr", body);
  make("th", row, i);
  layer.forEach(found => fill(row, found));
});
"""


def look_page(picture: Image.Image, found: dict) -> str:
    """The page of `--html`. found: as `look.as_json` makes it."""
    # Greys between BLACK_STAYS and white, as in the drawn maps: contrast shrinks them around the
    # middle.
    kept = 1 - BLACK_STAYS
    contrast, brightness = kept / (1 + BLACK_STAYS), 1 + BLACK_STAYS
    style = LOOK_STYLE.replace("CONTRAST", f"{contrast:.4f}").replace(
        "BRIGHTNESS", f"{brightness:.4f}"
    )
    note = (
        f"Averaged over layers {listed(found['layers'])} and heads {listed(found['heads'])}, "
        "counted from 0. "
    )
    maps = [(word["text"], np.array(word["map"])) for word in found["words"]]
    note += remarks(maps, found["picture"]["box"], found["picture"]["size"])
    grid = len(found["words"][0]["map"]) if found["words"] else 0
    data = found | {"image": data_url(picture), "note": note, "grid": grid}
    return _page("What it looked at", style, LOOK_BODY, data, LOOK_SCRIPT)


def lens_page(square: Image.Image, lens: dict, question: str, answer: str) -> str:
    """The page of `--lens`. square: the picture as the model sees it. lens: the fields of
    `look.Lens`."""
    grid = round(len(lens["patches"][0]) ** 0.5)
    style = LENS_STYLE.replace("SIZE", f"clamp(6px, {18 / grid:.2f}vw, 15px)")
    data = lens | {"image": data_url(square), "question": question, "answer": answer}
    return _page("Logit lens", style, LENS_BODY, data, LENS_SCRIPT)


def _page(title: str, style: str, body: str, data: dict, script: str) -> str:
    # "<" would let a question or an answer end the script.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    colours = ", ".join(f"rgb{colour}" for colour in SCALE)
    parts = {
        "TITLE": title,
        "THEME": THEME,
        "COLOURS": colours,
        "STYLE": style,
        "BODY": body,
        "SCRIPT": script,
    }
    page = PAGE
    for name, part in parts.items():
        page = page.replace(name, part)
    # Last, so that nothing in them is taken for a name.
    return page.replace("SCALE;", json.dumps(SCALE) + ";").replace("DATA", text, 1)
