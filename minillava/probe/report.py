"""What was found, as numbers for programs and as lines for a person."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillava.cli.messages import significant
from minillava.probe.knockout import Ablation, KnockOut
from minillava.probe.measure import Answered
from minillava.probe.occlude import Occlusion
from minillava.probe.patching import Patching

SHOWN = 8
"""Heads and feed-forward layers that a person is told of, for each word."""

WHO = {
    "answer": "the positions that choose the answer",
    "question": "the text between picture and answer",
}


TOLD = {
    "mean": "the language model reads the mean patch in its place",
    "zero": "the language model reads zeros in its place",
    "grey": "the pixels are grey",
    "blur": "the pixels are blurred",
}


@dataclass
class Findings:
    """words: the numbers of those that were asked about. A measure that was not made is None."""

    answered: Answered
    words: list[int]
    occlusion: Occlusion | None = None
    knock_out: KnockOut | None = None
    ablation: Ablation | None = None
    patching: Patching | None = None

    def texts(self) -> list[str]:
        return [self.answered.words[i][0] for i in self.words]

    def of_words(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of tokens [..., m] -> those of the words that were asked about, first:
        [words, ...]."""
        return np.moveaxis(self.answered.by_word(tokens), -1, 0)[self.words]

    def maps(self) -> np.ndarray:
        """Occlusion's, float64 [words, G, G]."""
        assert self.occlusion is not None
        return self.of_words(np.moveaxis(self.occlusion.drops, 0, -1))

    def heads_and_mlps(self) -> np.ndarray:
        """What each word loses without a head, or without the feed-forward layer, which is the last
        column: [words, L, H + 1]."""
        assert self.ablation is not None
        heads, mlps = self.of_words(self.ablation.heads), self.of_words(self.ablation.mlps)
        return np.concatenate([heads, mlps[..., None]], axis=-1)


def scale_end(found: Findings) -> float:
    """How far the scale of the hidden maps goes to both sides: all words have one, or the rounding
    of a word that nothing changes would look like a finding."""
    return max(0.01, float(np.abs(found.maps()).max()))


def as_json(found: Findings) -> dict:
    """Everything as numbers, in nats; what was not measured is left out."""
    answered = found.answered
    result: dict = {
        "question": answered.question,
        "answer": answered.text,
        "picture": {"size": answered.picture.size, "box": answered.box},
        "words": [
            {
                "text": answered.words[i][0],
                "token_ids": [answered.ids[t] for t in answered.words[i][1]],
                "log_probability": float(answered.clean[answered.words[i][1]].sum()),
                "attention": answered.attention[i].tolist(),
            }
            for i in found.words
        ],
    }
    if (hidden := found.occlusion) is not None:
        about = {"hide": hidden.hiding, "block": hidden.block}
        result["occlusion"] = {**about, "maps": found.maps().tolist()}
    if (cut := found.knock_out) is not None:
        curves = {who: found.of_words(lost).tolist() for who, lost in cut.curves.items()}
        everywhere = {who: found.of_words(lost).tolist() for who, lost in cut.everywhere.items()}
        result["knock_out"] = {"window": cut.window, "curves": curves, "all_layers": everywhere}
    if (out := found.ablation) is not None:
        heads, mlps = found.of_words(out.heads).tolist(), found.of_words(out.mlps).tolist()
        result["ablation"] = {"how": out.how, "heads": heads, "mlps": mlps}
    if (moved := found.patching) is not None:
        result["patching"] = {
            "words": moved.words,
            "before": moved.before,
            "apart": moved.apart,
            "positions": moved.sets,
            "moved": moved.moved.tolist(),
        }
    return result


def as_text(found: Findings) -> str:
    """For a person: the answer, and a table for each measure."""
    lines = [found.answered.text]
    if found.occlusion is not None:
        lines += _occlusion(found, found.occlusion)
    if found.knock_out is not None:
        lines += _knock_out(found, found.knock_out)
    if found.ablation is not None:
        lines += _ablation(found, found.ablation)
    if found.patching is not None:
        lines += _patching(found.patching)
    return "\n".join(lines)


def number(nats: float) -> str:
    """Two decimals; without a minus before zero."""
    return f"{nats + 0.0:.2f}".replace("-0.00", "0.00")


def _width(texts: Sequence[str]) -> int:
    return max(map(len, texts))


def _occlusion(found: Findings, hidden: Occlusion) -> list[str]:
    side, texts = hidden.block, found.texts()
    lines = [
        "",
        f"occlusion, {hidden.hiding}, {side} x {side} patches at a time: what a word loses",
    ]
    wide = _width(texts)
    for text, drop in zip(texts, found.maps(), strict=True):
        row, column = divmod(int(drop.argmax()), len(drop))
        where = f"row {row // side * side}, column {column // side * side}"
        span = f"most {number(drop.max())} ({where}), least {number(drop.min())}"
        lines.append(f"  {text:<{wide}}  {span}")
    return lines


def _knock_out(found: Findings, cut: KnockOut) -> list[str]:
    lines = []
    wide = _width(found.texts())
    for who, curve in cut.curves.items():
        layers = "".join(f"{layer:>7}" for layer in range(len(curve)))
        lines += [
            "",
            f"knock-out, {cut.window} layer(s) at a time: what a word loses when {WHO[who]} may "
            "not attend to the picture",
            f"  {'':<{wide}}{layers}    all",
        ]
        losses, everywhere = found.of_words(curve), found.of_words(cut.everywhere[who])
        for text, one, whole in zip(found.texts(), losses, everywhere, strict=True):
            shown = "".join(f"{number(x):>7}" for x in (*one, whole))
            lines.append(f"  {text:<{wide}}{shown}")
    return lines


def _ablation(found: Findings, out: Ablation) -> list[str]:
    lines = ["", f"ablation, {out.how}: what a word loses without a head or a feed-forward layer"]
    wide = _width(found.texts())
    heads, mlps = found.of_words(out.heads), found.of_words(out.mlps)  # [words, L, H], [words, L]
    for text, by_head, by_layer in zip(found.texts(), heads, mlps, strict=True):
        rows = [(x, f"layer {i} head {h}") for (i, h), x in np.ndenumerate(by_head)]
        rows += [(x, f"layer {i} feed-forward") for i, x in enumerate(by_layer)]
        best = sorted(rows, key=lambda row: -abs(row[0]))[:SHOWN]
        told = [f"{name} {number(x)}" for x, name in best if number(x) != "0.00"]
        lines.append(f"  {text:<{wide}}  {', '.join(told) or 'nothing by itself'}")
    return lines


def _patching(moved: Patching) -> list[str]:
    one, other = moved.words
    columns = [max(14, len(name)) for name in moved.sets]
    names = "".join(f"  {name:>{w}}" for name, w in zip(moved.sets, columns, strict=True))
    lines = [
        "",
        f"patching: how far {moved.before!r} goes on from {one} (0) to {other} (1) with the other "
        "picture's states",
        f"  state{names}",
    ]
    for state, row in enumerate(moved.moved):
        shown = "".join(f"  {number(x):>{w}}" for x, w in zip(row, columns, strict=True))
        lines.append(f"  {state:>5}{shown}")
    apart = " and ".join(str(significant(x)) for x in moved.apart)
    return [*lines, f"  ({other} is ahead of {one} by {apart} logits in the two runs)"]
