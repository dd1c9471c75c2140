"""What was found in a folder, as lines for a person."""

import re
from pathlib import Path

from minillava.inspection.memory import gigabytes
from minillava.inspection.report import FILES, Report, part_of

SHOWN = 8  # lines of each kind of problem; --json has them all


def as_text(report: Report) -> str:
    """The report for a person."""
    problems = [
        *_cut(report.problems),
        *_cut([f"missing tensor: {name}" for name in report.missing]),
        *_cut(report.misshapen),
        *_cut([f"not a part of this model: {name}" for name in report.unexpected]),
    ]
    verdict = "it can be opened" if report.loadable else "it cannot be opened as it is:"
    return "\n".join(
        [
            report.folder,
            f"  is {report.dialect}",
            "",
            *_parts(report),
            *_settings(report),
            *_weights(report),
            *_memory(report),
            "",
            verdict,
            *[f"  {problem}" for problem in problems],
        ]
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<24} {text}"


def _parts(report: Report) -> list[str]:
    """What is there and what is missing: parts of the network, and files beside them."""
    lines, lacking = [], {part_of(name) for name in report.missing}
    for part, found in report.parts.items():
        state = "missing" if not found["tensors"] else "incomplete" if part in lacking else "there"
        count = f"{found['parameters']:>14,} parameters in {found['tensors']:,} tensors"
        lines.append(_line(part, f"{state:<11} {count}"))
    if report.adapted:
        change = f"changes {report.adapted:,} weights when the model is opened"
        lines.append(_line("adapter", f"{'there':<11} {change}"))
    for name, there in report.files.items():
        lines.append(_line(name, "there" if there else f"missing: {FILES[name]}"))
    return lines


def _settings(report: Report) -> list[str]:
    """Tokenizer, network, pictures and template."""
    lines = []
    if report.tokenizer:
        added = ", ".join(f"{token} {i}" for token, i in report.tokenizer["added"].items())
        pieces, legacy = report.tokenizer["pieces"], str(report.tokenizer["legacy"]).lower()
        about = f"{pieces:,} pieces, legacy {legacy}; added tokens: {added or 'none'}"
        lines.append(_line("tokenizer", about))
    if report.network:
        numbers = (f"{key.replace('_', ' ')} {n:,}" for key, n in report.network.items())
        lines.append(_line("network", ", ".join(numbers)))
    if report.picture:
        side, aspect = report.picture["side"], report.picture["aspect"]
        lines.append(_line("pictures", f"{side} x {side} pixels, image aspect ratio {aspect}"))
    default = " (the default; --template chooses another)" if report.template["default"] else ""
    shown = f"{report.template['name']}{default}: {report.template['prompt']!r}"
    return [*lines, _line("template", shown)]


def _weights(report: Report) -> list[str]:
    """How the weights are stored, in which files, and what of them is not needed."""
    lines = []
    for name, kind in report.dtypes.items():
        count = f"{kind['parameters']:,} parameters in {kind['tensors']:,} tensors"
        lines.append(_line(f"stored as {name}", f"{count}, {gigabytes(kind['bytes'])}"))
    read = [Path(path).name for path in report.read]
    if len(read) > 3:
        read = [f"{read[0]} ... {read[-1]}", f"{len(read)} files"]
    if read:
        lines.append(_line("weights are read from", ", ".join(read)))
    lines += [_line("note", note) for note in report.notes]
    unneeded = sorted({re.sub(r"(layers\.\d+)\..*", r"\1.*", name) for name in report.unneeded})
    if unneeded:
        lines.append(_line("stored but not needed", ", ".join(unneeded)))
    return lines


def _memory(report: Report) -> list[str]:
    """A table: for each dtype, what weights and cache take."""
    if not report.memory:
        return []
    total = f"sum at {report.network['context']:,} positions"
    lines = ["", f"  {'memory':<10}{'weights':>12}{'cache per 1,000':>18}{total:>26}"]
    for row, columns in report.memory.items():
        weights, cache, full = map(gigabytes, columns.values())
        lines.append(f"  {row:<10}{weights:>12}{cache:>18}{full:>26}")
    return lines


def _cut(lines: list[str]) -> list[str]:
    """The first ones and how many there are more."""
    return [
        *lines[:SHOWN],
        *[f"and {len(lines) - SHOWN:,} more like it: --json has them all"][: len(lines) > SHOWN],
    ]


def keys_text(report: Report) -> str:
    """Every tensor in a line: our name, stored name, shape, dtype, file; those that are not needed
    by name alone."""
    rows = [
        (
            tensor["name"],
            tensor["stored"],
            str(tensor["shape"]),
            tensor["dtype"],
            Path(tensor["file"]).name,
        )
        for tensor in report.tensors
    ]
    rows += [("(not needed)", name, "", "", "") for name in report.unneeded]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
