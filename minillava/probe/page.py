"""The page of what was found: for each word attention, occlusion, knock-out and heads together."""

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

import numpy as np
from PIL import Image

from minillava.cli.pages import THEME, data_url
from minillava.look.draw import SCALE, SIGNED, colourise, heat_map, percent
from minillava.probe.patching import Patching
from minillava.probe.report import TOLD, WHO, Findings, number, scale_end
from minillava.probe.sheet import LINES, ends_of, span

SIDE = 320
"""The longer side of a map on the page, in pixels."""

STYLE = f"""{THEME}
:root {{ {"; ".join("--{}: rgb({}, {}, {})".format(who, *colour) for who, colour in LINES.items())}; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ --answer: #fb8c4a; --question: #7aa7ff; }} }}
@media screen {{ body {{ max-width: 72rem; padding: 1rem; }} }}
h1 {{ font-size: 1.4rem; margin: 0 0 .5rem; }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 0 0 .25rem; }}
p {{ margin: .25rem 0 .75rem; max-width: 46rem; }} .faint, figcaption {{ color: var(--faint); }}
.answer {{ font-size: 1.15rem; }} a {{ color: inherit; }} ul {{ padding-left: 1.1rem; max-width: 46rem; }}
section {{ border-top: 1px solid var(--line); margin-top: 1.5rem; }} section h2 {{ margin-top: .75rem; }}
.maps {{ display: grid; gap: .75rem; margin-bottom: 1rem;
  max-width: 62rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)); }}
.why {{ display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }}
.why > div {{ min-width: 0; }}
figure {{ margin: 0; min-width: 0; }} figcaption {{ font-size: .875rem; overflow-wrap: anywhere; }}
figure img {{ width: 100%; height: auto; display: block; }}
.key {{ max-width: 26rem; font-size: .875rem; margin-bottom: 1rem; }}
.key i {{ display: block; height: .9rem; border: 1px solid var(--line); }}
.key span {{ display: flex; justify-content: space-between; gap: .5rem; }}
.key b {{ font-weight: 400; }} .key b + b {{ text-align: center; }} .key b:last-child {{ text-align: right; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15rem .4rem; text-align: right; font-weight: 400; white-space: nowrap; }}
th {{ color: var(--faint); }} tr > :first-child {{ position: sticky; left: 0; background: var(--paper); }}
svg {{ width: 100%; max-width: 40rem; height: auto; }} svg text {{ fill: var(--faint); font-size: 13px; }}
@media print {{
  section {{ break-inside: avoid; }} .maps {{ grid-template-columns: repeat(3, 1fr); max-width: 150mm; }}
  .scroll {{ overflow: visible; }} tr > :first-child {{ position: static; }} svg {{ max-width: 90mm; }}
}}
"""


def page(found: Findings) -> str:
    """One page that needs nothing else."""
    answered = found.answered
    links = {
        word: f'<a href="#word-{word}">{escape(answered.words[word][0])}</a>'
        for word in found.words
    }
    answer = " ".join(links.get(i, escape(text)) for i, (text, _) in enumerate(answered.words))
    words = "".join(_word(found, place) for place in range(len(found.words)))
    patching = "" if found.patching is None else _patching(found.patching)
    question = escape(answered.question)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minillava: {question}</title><style>{STYLE}</style></head><body>
<h1>Why it answered</h1>
<p class="faint">{question}</p><p class="answer">{answer}</p>
<p>Something is changed, and the same answer is read again. Numbers are nats: by how much the
log-probability of a word falls. 0.7 nats halve its probability; below 0, it became likelier.</p>
{_how_to_read(found)}
{words}{patching}</body></html>
"""


def _how_to_read(found: Findings) -> str:
    """What each part of a word's section is, and the colours."""
    told = [
        "<b>attention</b>: what <code>look</code> shows, each map on a scale of its own, its hottest "
        "patch framed"
    ]
    keys = _key(SCALE, "0", "attention: hottest patch")
    if (hidden := found.occlusion) is not None:
        told.append(
            f"<b>hidden</b>: {hidden.block} x {hidden.block} patches at a time, "
            f"{TOLD[hidden.hiding]}; all words have one scale"
        )
        ends = number(scale_end(found))
        keys += _key(SIGNED, f"-{ends} nats: likelier", "0", f"{ends}: less likely")
    if (cut := found.knock_out) is not None:
        around = "one layer" if cut.window == 1 else f"{cut.window} layers around each"
        told.append(
            f"<b>cut off</b>: in {around} at a time, the answer, or the text between, may not attend "
            "to the picture"
        )
    if (out := found.ablation) is not None:
        instead = "nothing" if out.how == "zero" else "what it says on average over the prompt"
        told.append(
            f"<b>taken out</b>: one head at a time says {instead}; rows are layers, columns heads, "
            "MLP is the feed-forward layer"
        )
    return f"<ul>{''.join(f'<li>{each}</li>' for each in told)}</ul>{keys}"


def _word(found: Findings, place: int) -> str:
    """All that was found of one word; place: its number among those that were asked about."""
    answered, word = found.answered, found.words[place]
    text, heat = answered.words[word][0], answered.attention[word]
    ratio = SIDE / max(answered.picture.size)
    size = (round(answered.picture.width * ratio) or 1, round(answered.picture.height * ratio) or 1)
    draw = partial(heat_map, answered.picture, answered.box, size=size)
    maps = _figure(answered.picture.resize(size), "the picture")
    maps += _figure(draw(heat=heat), f"attention, hottest patch {percent(heat.max())}")
    if found.occlusion is not None:
        drop = found.maps()[place]
        hidden = draw(heat=drop, ends=scale_end(found))
        maps += _figure(hidden, f"hidden, {span(drop)} nats")
    why = ""
    if (cut := found.knock_out) is not None:
        lines = {who: found.of_words(x)[place] for who, x in cut.curves.items()}
        whole = {who: float(found.of_words(x)[place]) for who, x in cut.everywhere.items()}
        rows = [(who, [*line, whole[who]]) for who, line in lines.items()]
        numbers = _table("cut off", [*map(str, range(len(lines["answer"]))), "all"], rows)
        why += f"<div><h3>cut off, layer by layer</h3>{_curves(lines)}{numbers}</div>"
    if found.ablation is not None:
        table = found.heads_and_mlps()[place]  # [L, H + 1]
        names = [*map(str, range(table.shape[1] - 1)), "MLP"]
        rows = [(str(i), row.tolist()) for i, row in enumerate(table)]
        why += f"<div><h3>taken out</h3>{_table('layer', names, rows)}</div>"
    body = f'<div class="maps">{maps}</div><div class="why">{why}</div>'
    return f'<section id="word-{word}"><h2>{escape(text)}</h2>{body}</section>\n'


def _key(colours: Sequence[tuple[int, int, int]], *labels: str) -> str:
    steps = ", ".join(f"rgb{colour}" for colour in colours)
    words = "".join(f"<b>{escape(label)}</b>" for label in labels)
    bar = f'<i style="background: linear-gradient(to right, {steps})"></i>'
    return f'<div class="key">{bar}<span>{words}</span></div>'


def _figure(picture: Image.Image, caption: str) -> str:
    image = f'<img alt="" src="{data_url(picture)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _curves(lines: Mapping[str, np.ndarray]) -> str:
    """Numbers of layers [L] by who was cut off, as a drawing."""
    wide, high, left, bottom = 640, 200, 48, 24
    every = np.stack(list(lines.values()))
    low, top = ends_of(every)
    count = every.shape[1]

    def place(layer: int, value: float) -> tuple[float, float]:
        x = left + (wide - left - 8) * (layer / max(1, count - 1))
        return x, 8 + (high - bottom - 8) * (top - value) / (top - low)

    parts, keys = "", ""
    for value in (low, top) if low == 0 else (low, 0.0, top):
        _, y = place(0, value)
        parts += f'<path d="M{left} {y:.1f}H{wide}" stroke="#8886"/>'
        parts += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for layer in range(0, count, max(1, count // 8)):
        x, _ = place(layer, 0)
        parts += f'<text x="{x:.1f}" y="{high - 4}" text-anchor="middle">{layer}</text>'
    for who, line in lines.items():
        points = " ".join("{:.1f},{:.1f}".format(*place(j, x)) for j, x in enumerate(line))
        parts += f'<polyline points="{points}" fill="none" stroke="var(--{who})" stroke-width="2"/>'
        keys += f'<span style="color: var(--{who})">&#9632;</span> {who}: {WHO[who]}. '
    label = "nats that the word loses, by layer"
    drawing = f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{label}">{parts}</svg>'
    return f'{drawing}<p class="faint">{keys}</p>'


def _patching(moved: Patching) -> str:
    one, other = map(escape, moved.words)
    rows = [(str(state), list(row)) for state, row in enumerate(moved.moved)]
    return f"""<section><h2>Where the fact is</h2>
<p>After &#8220;{escape(moved.before)}&#8221;, one picture leads to {one}, the other to {other}. A run
about the first goes on with the other's states at some positions: 0 is the first one's answer, 1 the
other's. State 0 goes into the first layer.</p>{_table("state", list(moved.sets), rows)}</section>"""


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
