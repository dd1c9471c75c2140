"""The drafter that a name means (see speculate.py). A new drafter gets a line in this file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillava.generate.lookup import Lookup
from minillava.generate.medusa import Medusa
from minillava.generate.speculate import Drafter, Drafts

Draftable = Drafts | Drafter | str | Path | None


def find_drafts(
    draft: Draftable,
    tokens: int | str | None,
    pass_cost: Callable[[int], float],
    open_drafter: Callable[[str, bool], Drafter],
) -> Drafts | None:
    """The Drafts that `Assistant.drafts` returns. pass_cost: number of rows -> cost of a pass, in
    steps of one row. open_drafter: opens the small model of a folder, or, if it is told so, the
    heads of Medusa in a folder, "" being that of the weights."""
    if draft is None or isinstance(draft, Drafts):
        return draft
    drafter: Any = draft
    if draft in ("", f"{Medusa.kind}:"):
        raise ValueError(
            f"draft is {draft!r}, which names no folder; expected lookup, a folder, medusa (heads "
            "beside the weights) or medusa:DIR"
        )
    if draft == "lookup":
        drafter = Lookup()
    elif isinstance(draft, str) and draft.partition(":")[0] == Medusa.kind:
        drafter = open_drafter(draft.partition(":")[2], True)
    elif isinstance(draft, (str, Path)):
        drafter = open_drafter(str(draft), False)
    return Drafts(drafter, None if tokens == "auto" else tokens, pass_cost)
