"""Draw README's chart of speed, tools/speed.svg, from the tables of tools/MEASUREMENTS.md.

    python tools/bench_chart.py

Tokens per second, in panels with a scale of their own: one for each kind of machine. Of what was
measured twice, the later run is drawn; rows with one thread, and those that died, are not.
"""

from html import escape
from itertools import pairwise
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
MEASURED = TOOLS / "MEASUREMENTS.md"
CHART = TOOLS / "speed.svg"
# a panel's title: the heading its rows stand below, and what the text before its table says
PANELS = {
    "1B on two CPU cores with AVX-512 and bfloat16": (
        "## Two CPU cores",
        "AVX-512 with bfloat16, torch 2.13.0+cpu; 1.2 billion",
    ),
    "7B on two CPU cores with AVX2": ("## Two CPU cores", "--size 7b"),
    "7B on one H100": ("## GPU: one H100", "7B with random weights"),
    "7B on one H200": ("## GPU: one H200", "7B with random weights"),
}
WIDTH, LEFT, ROW = 860, 320, 24  # pixels
OURS, OTHERS = "#b4461f", "#8a939c"


def speeds(text: str, heading: str, said: str) -> dict[str, str]:
    """name -> tokens per second, as printed, of every table with such a column that follows `said`
    in a section whose heading begins with `heading`."""
    found = {}
    for section in ("\n" + text).split("\n## ")[1:]:
        if not ("## " + section).startswith(heading):
            continue
        for before, table in tables(section):
            if said in before and "tokens/s" in table[0]:
                column, names = table[0].index("tokens/s"), 1 + ("dtype" in table[0])
                found |= {
                    " ".join(row[:names]).removesuffix(" !"): row[column]
                    for row in table[2:]
                    if row[column] and "1 thread" not in row[0]
                }
    return found


def tables(section: str) -> list[tuple[str, list[list[str]]]]:
    """Every table as rows of cells, with the paragraph before it."""
    blocks = [block.strip() for block in section.split("\n\n")]
    return [
        (
            before,
            [[cell.strip() for cell in row.strip("|").split("|")] for row in block.split("\n")],
        )
        for before, block in pairwise(blocks)
        if block.startswith("|")
    ]


def draw(text: str) -> str:
    lines, y = [], 30
    for title, place in PANELS.items():
        rows = speeds(text, *place)
        scale = (WIDTH - LEFT - 80) / max(map(float, rows.values()))
        lines.append(
            f'<text x="16" y="{y}" font-weight="bold">{escape(title)}: tokens per second</text>'
        )
        for name, speed in sorted(rows.items(), key=lambda row: -float(row[1])):
            y += ROW
            colour, length = OURS if name.startswith("minillava") else OTHERS, float(speed) * scale
            lines += [
                f'<text x="{LEFT - 10}" y="{y}" text-anchor="end">{escape(name)}</text>',
                f'<rect x="{LEFT}" y="{y - 13}" width="{length:.1f}" height="17" fill="{colour}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y}">{escape(speed)}</text>',
            ]
        y += 2 * ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y - ROW}" font-family="sans-serif" font-size="14">'
    return "\n".join(
        [head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""]
    )


if __name__ == "__main__":
    CHART.write_text(draw(MEASURED.read_text(encoding="utf-8")), encoding="utf-8")
