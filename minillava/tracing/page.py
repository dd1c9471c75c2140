"""A trace as one page that needs nothing else: the pictures with the patch grid, and a folding
section per stage."""

import re
from html import escape
from itertools import groupby

from PIL import Image
from torch import Tensor

from minillava.cli.pages import THEME, data_url
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.tracing.recorder import Record, number_text

OPEN = ("question", "picture", "splice", "choice", "answer")
"""Stages that are not folded at first."""

STYLE = (
    f"""{THEME}
:root {{ --soft: #8881; --mark: #d9480f; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ --mark: #ff922b; }} }}
@media screen {{ body {{ max-width: 80rem; padding: 1rem; }} }}
"""
    + """
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
dl { margin: 0; } dt { color: var(--faint); } dd { margin: 0 0 .75rem; }
figure { margin: 0; flex: 1 1 18rem; max-width: 32rem; } figcaption { color: var(--faint); }
figure img, svg { width: 100%; height: auto; display: block; }
svg rect { fill: transparent; stroke: #fff9; stroke-width: .4; } svg rect:hover { fill: #fff6; stroke: #000; }
.pictures, .ids { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.ids { gap: .25rem; } .ids span { background: var(--soft); padding: 0 .4em; border-radius: .25em; }
.ids small { color: var(--faint); } .ids .image { outline: 2px solid var(--mark); }
details { border-top: 1px solid var(--line); } summary { padding: .5rem 0; cursor: pointer; font-weight: 600; }
summary small { font-weight: 400; color: var(--faint); }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin-bottom: 1rem; font-size: .875rem; }
th { text-align: left; color: var(--faint); font-weight: 400; }
td, th { padding: .2rem .5rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
td { border-top: 1px solid var(--line); } td.n, td.s, td.w { font-family: ui-monospace, monospace; }
th { width: 9%; } th:nth-child(1) { width: 16%; } th:nth-child(2) { width: 13%; } th:nth-child(3) { width: 7%; }
th:nth-child(7) { width: 23%; } th:nth-child(8) { width: 14%; }
td.s, td.o { overflow-wrap: break-word; }
td.v { border: 0; white-space: pre-wrap; } td.w b { color: var(--mark); }
@media (max-width: 60rem) {
  thead { display: none; } table, tbody, tr, td { display: block; border: 0; }
  tr { border-top: 1px solid var(--line); padding: .3rem 0; } tr.below { border: 0; padding-top: 0; }
  td { padding: 0; display: inline-block; margin-right: .75rem; } td:empty { display: none; }
  td.s { display: block; font-weight: 600; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--faint); font-family: system-ui; }
}
"""
)

COLUMNS = ("name", "shape", "dtype", "min", "mean", "max", "first values", "source")


class Page:
    """A consumer of records (`add`) that becomes a page (`render`)."""

    def __init__(self):
        self.records: list[Record] = []

    def add(self, record: Record, tensor: Tensor | None) -> None:
        self.records.append(record)

    @property
    def answer(self) -> str:
        return next(
            record.value["text"] for record in reversed(self.records) if record.name == "answer"
        )

    def render(
        self,
        images: list[Image.Image],
        squares: list[Image.Image],
        patch_size: int,
        before: int = 0,
    ) -> str:
        """images: upright; squares: as the model sees them, R x R, of one that is cut into tiles
        the overview; before: positions of a picture before its patches, for a class token."""
        named = {record.name: record for record in self.records}
        spans = (
            named["image_spans"].value if "image_spans" in named else [[None, None]] * len(images)
        )
        figures = ""
        for i, (image, square, (first, _)) in enumerate(zip(images, squares, spans, strict=True)):
            side = square.width // patch_size
            start = None if first is None else first + before
            where = "" if start is None else f", at positions {start} to {start + side * side - 1}"
            seen = f"what the model sees: {side} x {side} patches{where}"
            figures += _figure(
                f'<img alt="" src="{data_url(image, "JPEG")}">', f"picture {i}: {_size(image)}"
            )
            figures += _figure(_grid(square, patch_size, start), seen)
        sections = "".join(
            _section(heading, list(records))
            for heading, records in groupby(self.records, key=lambda r: r.heading)
        )
        question, answer = escape(named["question"].value), escape(self.answer)
        return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minillava: {question}</title><style>{STYLE}</style></head><body>
<h1>What happens between a picture and an answer</h1>
<dl><dt>question</dt><dd>{question}</dd><dt>answer</dt><dd>{answer}</dd></dl>
<div class="pictures">{figures}</div>
<p>The prompt's ids; a picture stands for one id, and the splice puts its patches there:</p>
{_ids(named["input_ids"])}
<p>Every tensor in order, with the source line that made it; <b style="color:var(--mark)">shapes in this colour</b>
are not what they were at the step before. Rows and columns of patches count from 0, from the top left.</p>
{sections}</body></html>
"""


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"


def _grid(square: Image.Image, patch: int, start: int | None) -> str:
    """The picture under its patches; each says its number, and its position after the splice."""
    size, side, rects = square.width, square.width // patch, ""
    for number in range(side * side):
        row, column = divmod(number, side)
        position = "" if start is None else f", position {start + number}"
        title = f"<title>patch {number}: row {row}, column {column}{position}</title>"
        rects += f'<rect x="{column * patch}" y="{row * patch}" width="{patch}" height="{patch}">{title}</rect>'
    picture = f'<image href="{data_url(square, "PNG")}" width="{size}" height="{size}"/>'
    return f'<svg viewBox="0 0 {size} {size}">{picture}{rects}</svg>'


def _ids(record: Record) -> str:
    spans = ""
    for token_id, piece in record.value:
        kind = ' class="image"' if token_id == IMAGE_TOKEN_INDEX else ""
        spans += f"<span{kind}>{escape(piece)} <small>{token_id}</small></span>"
    return f'<div class="ids">{spans}</div>'


def _section(heading: str, records: list[Record]) -> str:
    unfolded = " open" if records[0].stage in OPEN else ""
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(map(_row, records))
    return (
        f"<details{unfolded}><summary>{escape(heading)} <small>{len(records)}</small></summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>\n"
    )


def _row(record: Record) -> str:
    shape = "" if record.shape is None else escape(str(record.shape))
    if record.was:
        shape = f'<b title="was {record.was}">{shape}</b>'
    values = [number_text(x) for x in (record.min, record.mean, record.max)]
    first = " ".join(number_text(x) for x in record.first or ())
    cells = f'<td class="s">{_breakable(record.short_name)}</td><td class="w">{shape}</td><td>{record.dtype or ""}</td>'
    for label, cell in zip(COLUMNS[3:-1], (*values, first), strict=True):
        cells += f'<td class="n" data-label="{label}">{escape(cell)}</td>'
    row = f'<tr>{cells}<td class="o">{_breakable(record.source)}</td></tr>'
    if record.value is None or record.name == "input_ids":  # which is above, in colour
        return row
    return f'{row}<tr class="below"><td class="v" colspan="{len(COLUMNS)}">{escape(record.value_text)}</td></tr>'


def _breakable(name: str) -> str:
    """A name that a narrow column breaks between its parts, `files/` and `pictures.py:146`, instead
    of inside a number."""
    return re.sub(r"(/|\.(?!py\b))", r"\1<wbr>", escape(name))
