"""Added tokens in a text: where they stand, and what their flags do to the text around them."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from minillava.files.tokenizer_files import AddedToken


class TokenFinder:
    """Cuts text at `tokens` (by their text), as transformers does: from left to right, and every
    text that reads like a token is taken for one."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        lengths: dict[str, set[int]] = {}  # first character -> the lengths of its tokens
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile("[" + re.escape("".join(lengths)) + "]")

    def cut(self, stretches: Sequence[tuple[str, bool]]) -> list[str | AddedToken]:
        """Returns the tokens of neighbouring stretches (each a text, and whether the template wrote
        it) and the text between the tokens. That text is joined, since a word may cross from one
        stretch to the next: "a ", "sta" and "r" is "a star", whose ids are not those of its
        parts."""
        texts: list[str] = []
        ours: list[int] = []  # where the template's text begins, ends, begins ...
        length = 0
        for text, is_ours in stretches:
            if is_ours != len(ours) % 2:
                ours.append(length)
            texts.append(text)
            length += len(text)
        return self._cut("".join(texts), ours)

    def _cut(self, text: str, ours: list[int]) -> list[str | AddedToken]:
        texts, controls, end = [], [], 0
        for at, added in self._find(text, ours):
            texts += [text[end:at], added.text]
            controls += [None, added if added.control else None]
            end = at + len(added.text)
        both = zip([*texts, text[end:]], [*controls, None], strict=True)
        pairs = [(t, control) for t, control in both if t]
        texts = [t for t, _ in pairs]

        def token_at(i: int) -> AddedToken | None:
            token = self.tokens.get(texts[i])
            return token if token is None or not token.control else pairs[i][1]

        for i in range(len(texts)):
            token = token_at(i)
            if token is None:
                continue
            left, right = texts[i - 1] if i else "", texts[i + 1] if i + 1 < len(texts) else ""
            if token.rstrip and right:
                texts[i + 1] = right.lstrip()
            if token.lstrip and left:
                texts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                texts[i - 1], texts[i] = texts[i - 1] + token.text, ""
            elif token.single_word and right and right[0] != " ":
                texts[i], texts[i + 1] = "", token.text + texts[i + 1]
        return [token_at(i) or t for i, t in enumerate(texts) if t]

    def _find(self, text: str, ours: list[int]) -> Iterator[tuple[int, AddedToken]]:
        """Yields the tokens in a text and where they begin, from left to right; of several at one
        place, the longest. Control tokens are found only within what the template wrote."""
        at = 0
        while found := self._first.search(text, at):
            start = found.start()
            at = start + 1
            for length in self._lengths[text[start]]:
                token = self.tokens.get(text[start : start + length])
                if token and (not token.control or _within(start, start + length, ours)):
                    yield start, token
                    at = start + length
                    break


def _within(start: int, end: int, ours: list[int]) -> bool:
    place = bisect_right(ours, start)
    return place % 2 == 1 and (place == len(ours) or end <= ours[place])
