"""An answer's text as it streams, and where it ends: an end token, a stop text, or the budget."""

from collections.abc import Sequence

from minillava.tokenizer import TextDecoder, Tokenizer


class Row:
    """One row's answer as it grows: its text, held back where it might still become a stop text,
    and its end."""

    def __init__(
        self, eos_token_ids: Sequence[int], tokenizer: Tokenizer | None, stop: Sequence[str]
    ):
        self.eos_token_ids, self.stop = eos_token_ids, stop
        self.finish_reason: str | None = None
        self.decoder = None if tokenizer is None else TextDecoder(tokenizer)
        # characters as stop texts see them, and as a reader does: "" for those of special tokens
        self.held: list[tuple[str, str]] = []

    def feed(self, token_id: int, last: bool) -> str:
        """Take the row's next token (`last`: the most ends with it); the text that is now
        certain."""
        if self.finish_reason is not None:
            return ""
        if token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        if self.decoder is not None:
            text = self.decoder.feed(token_id)
            if last or self.finish_reason is not None:
                text += self.decoder.flush()
            self.held += [(char, char) for char in text]
            self.held += [(char, "") for char in self.decoder.hidden(token_id)]
        spelled, sure = "".join(char for char, _ in self.held), len(self.held)
        found = [at for at in map(spelled.find, self.stop) if at >= 0]
        if found:
            sure, self.finish_reason = min(found), "stop"
        elif last and self.finish_reason is None:
            self.finish_reason = "length"
        elif self.finish_reason is None:  # the longest end that may yet become a stop text is held
            ends = ((at, spelled[at:]) for at in range(sure))
            may = (at for at, end in ends if any(stop.startswith(end) for stop in self.stop))
            sure = next(may, sure)
        text, self.held = "".join(shown for _, shown in self.held[:sure]), self.held[sure:]
        return text
