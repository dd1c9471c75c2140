"""The page and the sheet of what was found: maps side by side with attention, curves, matrices."""

from collections.abc import Sequence
from functools import partial
from html import escape

import numpy as np
from PIL import Image

from minillava.cli.pages import THEME, data_url
from minillava.look.draw import (
    SCALE,
    SIGNED,
    Panel,
    colourise,
    heat_map,
    lay_out,
    percent,
    whole_picture,
)
from minillava.probe.knockout import Ablation, KnockOut
from minillava.probe.occlude import Occlusion
from minillava.probe.patching import Patching
from minillava.probe.report import WHO, Findings, number

SIDE = 320
"""The longer side of a map on the page, in pixels."""

LINES = "#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#0e7490", "#854d0e"
"""Colours of curves: so many words, those that lose most, are drawn."""

STYLE = f"""{THEME}
@media screen {{ body {{ max-width: 72rem; padding: 1rem; }} }}
h1 {{ font-size: 1.4rem; margin: 0 0 .5rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .25rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 46rem; }} .faint, figcaption {{ color: var(--faint); }}
.maps {{ display: flex; gap: .75rem; margin-bottom: 1rem; }}
figure {{ margin: 0; flex: 0 1 20rem; min-width: 0; }} figcaption {{ font-size: .875rem; }}
figure img {{ width: 100%; height: auto; display: block; }}
.key {{ max-width: 26rem; font-size: .875rem; margin-bottom: 1rem; }}
.key i {{ display: block; height: .9rem; border: 1px solid var(--line); }}
.key span {{ display: flex; justify-content: space-between; gap: .5rem; }}
.key b {{ font-weight: 400; }} .key b + b {{ text-align: center; }} .key b:last-child {{ text-align: right; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15rem .4rem; text-align: right; font-weight: 400; white-space: nowrap; }}
th {{ color: var(--faint); }} tr > :first-child {{ position: sticky; left: 0; background: var(--paper); }}
svg {{ width: 100%; max-width: 46rem; height: auto; }} svg text {{ fill: var(--faint); font-size: 12px; }}
"""

TOLD = {
    "mean": "the language model reads the mean patch in its place",
    "zero": "the language model reads zeros in its place",
    "grey": "the pixels are grey",
    "blur": "the pixels are blurred",
}


def sheet(found: Findings) -> Image.Image:
    """The picture of --out: for each word its attention, and what hiding a block does to it."""
    answered, hidden = found.answered, found.occlusion
    assert hidden is not None
    panels: list[Panel] = []
    ends = scale_end(found)
    for word, drop in zip(found.words, found.maps(), strict=True):
        text, heat = answered.words[word][0], answered.attention[word]
        share = f"{percent(heat.max())} of {percent(heat.sum())}"
        draw = partial(heat_map, answered.picture, answered.box)
        span = f"{number(drop.min())} to {number(drop.max())} nats"
        panels += [
            whole_picture(answered.picture),
            Panel(f"{text} (attention)", share, partial(draw, heat)),
            Panel(f"{text} (hidden)", span, partial(draw, drop, ends=ends)),
        ]
    note = (
        f"Hidden: {hidden.block} x {hidden.block} patches at a time; {TOLD[hidden.hiding]}. Red: "
        "the word became less likely, so this spoke for it. Blue: it became likelier. All words "
        "have this one scale. Attention: the mean of the upper half of the layers, each map on a "
        "scale of its own; below it how much went to its hottest patch, of what went to the picture."
    )
    scales = [
        (SCALE, (("0", 0), ("attention: hottest patch", 1))),
        (
            SIGNED,
            (
                (f"-{number(ends)} nats: likelier", 0),
                ("0", 0.5),
                (f"{number(ends)}: less likely", 1),
            ),
        ),
    ]
    columns = 3 if len(found.words) < 6 else 6
    return lay_out(answered.picture.size, answered.question, panels, note, scales, columns)


def scale_end(found: Findings) -> float:
    """How far the scale of the hidden maps goes to both sides: all words have one, or the rounding
    of a word that nothing changes would look like a finding."""
    return max(0.01, float(np.abs(found.maps()).max()))


def page(found: Findings) -> str:
    """One page that needs nothing else."""
    sections = ""
    if found.occlusion is not None:
        sections += _occlusion(found, found.occlusion)
    if found.knock_out is not None:
        sections += _knock_out(found, found.knock_out)
    if found.ablation is not None:
        sections += _ablation(found, found.ablation)
    if found.patching is not None:
        sections += _patching(found.patching)
    question, answer = escape(found.answered.question), escape(found.answered.text)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minillava: {question}</title><style>{STYLE}</style></head><body>
<h1>Why it answered</h1>
<p class="faint">{question}</p><p>{answer}</p>
<p>Something is changed, and the same answer is read again. Numbers are nats: by how much the
log-probability of a word falls. 0.7 nats halve its probability; below 0, it became likelier.</p>
{sections}</body></html>
"""


def _key(colours: Sequence[tuple[int, int, int]], *labels: str) -> str:
    steps = ", ".join(f"rgb{colour}" for colour in colours)
    words = "".join(f"<b>{escape(label)}</b>" for label in labels)
    bar = f'<i style="background: linear-gradient(to right, {steps})"></i>'
    return f'<div class="key">{bar}<span>{words}</span></div>'


def _occlusion(found: Findings, hidden: Occlusion) -> str:
    answered, side = found.answered, hidden.block
    ratio = SIDE / max(answered.picture.size)
    size = (round(answered.picture.width * ratio) or 1, round(answered.picture.height * ratio) or 1)
    draw = partial(heat_map, answered.picture, answered.box, size=size)
    rows, ends = "", scale_end(found)
    for word, drop in zip(found.words, found.maps(), strict=True):
        text, heat = answered.words[word][0], answered.attention[word]
        about = f"{text} (attention), hottest patch {percent(heat.max())}"
        lost = f"{text} (hidden), {number(drop.min())} to {number(drop.max())} nats"
        rows += f'<div class="maps">{_figure(answered.picture.resize(size), "the picture")}'
        rows += _figure(draw(heat=heat), about) + _figure(draw(heat=drop, ends=ends), lost)
        rows += "</div>\n"
    return f"""<h2>Which part of the picture</h2>
<p>{side} x {side} patches at a time are hidden: {TOLD[hidden.hiding]}. Beside it is the attention
that <code>look</code> shows: each of its maps has a scale of its own, and its hottest patch is framed.</p>
{_key(SCALE, "0", "attention: hottest patch")}
{_key(SIGNED, f"-{number(ends)} nats: likelier", "0", f"{number(ends)}: less likely")}{rows}"""


def _figure(picture: Image.Image, caption: str) -> str:
    image = f'<img alt="" src="{data_url(picture)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _knock_out(found: Findings, cut: KnockOut) -> str:
    told, texts = "", found.texts()
    for who, curve in cut.curves.items():
        losses, everywhere = found.of_words(curve), found.of_words(cut.everywhere[who])
        names = [f"{text} ({number(x)})" for text, x in zip(texts, everywhere, strict=True)]
        strongest = sorted(np.argsort(-np.abs(losses).max(1))[: len(LINES)])
        told += f"<p>{WHO[who].capitalize()} may not attend to the picture; in brackets, in all "
        told += f"layers at once:</p>{_curves(losses[strongest], [names[i] for i in strongest])}"
        rows = [
            (text, [*one, whole])
            for text, one, whole in zip(texts, losses, everywhere, strict=True)
        ]
        told += _table("word", [*map(str, range(losses.shape[1])), "all"], rows)
    around = "One layer" if cut.window == 1 else f"{cut.window} layers around each"
    return f"<h2>In which layers it is read</h2>\n<p>{around} at a time.</p>{told}"


def _curves(lines: np.ndarray, names: Sequence[str]) -> str:
    """Curves over layers, [words, L], as a drawing."""
    wide, high, left, bottom = 640, 200, 44, 24
    low, top = min(0.0, round(float(lines.min()), 2)), max(0.01, float(lines.max()))
    count = lines.shape[1]

    def place(layer: int, value: float) -> tuple[float, float]:
        x = left + (wide - left - 8) * (layer / max(1, count - 1))
        return x, 8 + (high - bottom - 8) * (top - value) / (top - low)

    parts = ""
    for value in (low, top) if low == 0 else (low, 0.0, top):
        _, y = place(0, value)
        parts += f'<path d="M{left} {y:.1f}H{wide}" stroke="#8886"/>'
        parts += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for layer in range(0, count, max(1, count // 8)):
        x, _ = place(layer, 0)
        parts += f'<text x="{x:.1f}" y="{high - 4}" text-anchor="middle">{layer}</text>'
    keys = ""
    for i, (line, name) in enumerate(zip(lines, names, strict=True)):
        colour = LINES[i]
        points = " ".join("{:.1f},{:.1f}".format(*place(j, x)) for j, x in enumerate(line))
        parts += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        keys += f'<span style="color: {colour}">&#9632;</span> {escape(name)} '
    return f'<svg viewBox="0 0 {wide} {high}">{parts}</svg><p class="faint">{keys}</p>'


def _ablation(found: Findings, out: Ablation) -> str:
    heads, mlps = found.of_words(out.heads), found.of_words(out.mlps)
    names = [*map(str, range(heads.shape[2])), "MLP"]
    told = ""
    for text, by_head, by_layer in zip(found.texts(), heads, mlps, strict=True):
        rows = [
            (str(i), [*row, mlp])
            for i, (row, mlp) in enumerate(zip(by_head, by_layer, strict=True))
        ]
        told += f"<p>{escape(text)}</p>{_table('layer', names, rows)}"
    instead = "nothing" if out.how == "zero" else "what it says on average over the prompt"
    return f"""<h2>Which heads and feed-forward layers</h2>
<p>One at a time, each says {instead}. Rows are layers, columns heads; MLP is the feed-forward layer.</p>{told}"""


def _patching(moved: Patching) -> str:
    one, other = map(escape, moved.words)
    rows = [(str(state), list(row)) for state, row in enumerate(moved.moved)]
    return f"""<h2>Where the fact is</h2>
<p>After &#8220;{escape(moved.before)}&#8221;, one picture leads to {one}, the other to {other}. A run
about the first goes on with the other's states at some positions: 0 is the first one's answer, 1 the
other's. State 0 goes into the first layer.</p>{_table("state", list(moved.sets), rows)}"""


def _table(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    """Numbers on their colours, of a scale that goes as far below 0 as above."""
    most = max(0.01, *(abs(x) for _, row in rows for x in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in (corner, *columns))
    body = ""
    for name, row in rows:
        cells = "".join(_cell(x, most) for x in row)
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _cell(x: float, most: float) -> str:
    red, green, blue = colourise(np.array((x / most + 1) / 2), SIGNED).astype(int).tolist()
    ink = "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 128 else "#19191e"
    return f'<td style="background: rgb({red}, {green}, {blue}); color: {ink}">{number(x)}</td>'
