"""What was found in a folder, as lines for a person."""

import re
from pathlib import Path

from minillava.inspection import doctor
from minillava.inspection.report import FILES, Report, part_of

SHOWN = 8  # lines of each kind of problem; --json has them all


def as_text(report: Report) -> str:
    """The report for a person."""
    lines = [report.folder, f"  is {report.dialect}", ""]
    lacking = {part_of(name) for name in report.missing}
    for part, found in report.parts.items():
        state = "missing" if not found["tensors"] else "incomplete" if part in lacking else "there"
        lines.append(
            f"  {part:<24} {state:<11} {found['parameters']:>14,} parameters in "
            f"{found['tensors']:,} tensors"
        )
    if report.adapted:
        lines.append(
            f"  {'adapter':<24} {'there':<11} changes {report.adapted:,} weights when the model is "
            "opened"
        )
    lines += [
        f"  {name:<24} {'there' if there else f'missing: {FILES[name]}'}"
        for name, there in report.files.items()
    ]
    if report.tokenizer:
        added = (
            ", ".join(f"{token} {i}" for token, i in report.tokenizer["added"].items()) or "none"
        )
        pieces, legacy = report.tokenizer["pieces"], str(report.tokenizer["legacy"]).lower()
        lines.append(
            f"  {'tokenizer':<24} {pieces:,} pieces, legacy {legacy}; added tokens: {added}"
        )
    if report.network:
        network = ", ".join(
            f"{key.replace('_', ' ')} {value:,}" for key, value in report.network.items()
        )
        lines.append(f"  {'network':<24} {network}")
    if report.picture:
        side = report.picture["side"]
        lines.append(
            f"  {'pictures':<24} {side} x {side} pixels, image aspect ratio "
            f"{report.picture['aspect']}"
        )
    default = " (the default; --template chooses another)" if report.template["default"] else ""
    lines.append(
        f"  {'template':<24} {report.template['name']}{default}: {report.template['prompt']!r}"
    )
    for name, kind in report.dtypes.items():
        count = (
            f"{kind['parameters']:,} parameters in {kind['tensors']:,} tensors, "
            f"{doctor.gigabytes(kind['bytes'])}"
        )
        lines.append(f"  {'stored as ' + name:<24} {count}")
    read = [Path(path).name for path in report.read]
    if read:
        more = (
            f" ... {read[-1]}, {len(read)} files" if len(read) > 3 else ", ".join(["", *read[1:]])
        )
        lines.append(f"  {'weights are read from':<24} {read[0]}{more}")
    lines += [f"  {'note':<24} {note}" for note in report.notes]
    unneeded = sorted({re.sub(r"(layers\.\d+)\..*", r"\1.*", name) for name in report.unneeded})
    if unneeded:
        lines.append(f"  {'stored but not needed':<24} {', '.join(unneeded)}")
    if report.memory:
        context = report.network["context"]
        lines += [
            "",
            "  "
            f"{'memory':<10}{'weights':>12}{'cache per 1,000':>18}"
            f"{f'sum at {context:,} positions':>26}",
        ]
        for row, columns in report.memory.items():
            sizes = [doctor.gigabytes(count) for count in columns.values()]
            lines.append(f"  {row:<10}{sizes[0]:>12}{sizes[1]:>18}{sizes[2]:>26}")
    problems = [
        *_cut(report.problems),
        *_cut([f"missing tensor: {name}" for name in report.missing]),
        *_cut(report.misshapen),
        *_cut([f"not a part of this model: {name}" for name in report.unexpected]),
    ]
    verdict = "it can be opened" if report.loadable else "it cannot be opened as it is:"
    return "\n".join([*lines, "", verdict, *[f"  {problem}" for problem in problems]])


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
