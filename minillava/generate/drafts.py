"""Which drafter a word means (see speculate.py). A new one gets its line here."""

from collections.abc import Callable
from pathlib import Path

from minillava.generate.lookup import Lookup
from minillava.generate.speculate import Drafter, Drafts
from minillava.llava import Llava

Draftable = Drafts | Drafter | str | Path | None


def find_drafts(
    draft: Draftable,
    tokens: int | str | None,
    model: Llava,
    pass_cost: Callable[[int], float],
) -> Drafts | None:
    """What `Assistant.drafts` returns. pass_cost: of so many rows, in steps of one."""
    if draft is None or isinstance(draft, Drafts):
        return draft
    if getattr(model.decoding, "is_captured", False):
        raise ValueError("drafts do not go with a compiled step: leave compile or draft out")
    drafter = find_drafter(str(draft)) if isinstance(draft, (str, Path)) else draft
    return Drafts(drafter, None if tokens == "auto" else tokens, pass_cost)


def find_drafter(name: str) -> Drafter:
    """Raises ValueError if there is none of this name."""
    if name == "lookup":
        return Lookup()
    raise ValueError(f"draft is {name!r}, expected lookup")
