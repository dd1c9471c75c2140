"""The first tensor where two runs part, and how far apart they are at every stage."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from minillava.cli.messages import print_json
from minillava.options import dtype_name
from minillava.tracing.recorder import Record


# --- two runs -------------------------------------------------------------------------------------
class Comparison:
    """A consumer that holds each tensor against the one of the same name in `stored`, and prints
    how far apart they are. relative: |difference| / |the larger of both|, as norms; of whole
    numbers, ids and positions, how many differ. After another token was chosen, or read, the runs
    are about different texts, so nothing later is compared."""

    def __init__(
        self, stored: Mapping[str, Tensor], swapped: bool, tolerance: float, as_json: bool
    ):
        self.stored, self.swapped, self.tolerance, self.as_json = (
            stored,
            swapped,
            tolerance,
            as_json,
        )
        self.seen: set[str] = set()
        self.missing: list[str] = []
        self.first: dict | None = None  # the row where they part
        self.parted_at: int | None = None  # the step whose token differs
        self.equal = self.rows = 0
        if not as_json:
            print(f"{'':<42} {'shape':<20} {'A':<8} {'B':<8} {'max |A-B|':>10} {'relative':>9}")

    def __call__(self, record: Record, tensor: Tensor | None) -> None:
        if tensor is None or (self.parted_at is not None and (record.step or 0) > self.parted_at):
            return
        if record.key not in self.stored:
            self.missing.append(record.key)
            return
        self.seen.add(record.key)
        pair = [self.stored[record.key], tensor.detach().cpu()]
        a, b = reversed(pair) if self.swapped else pair
        row = {
            "step": record.step,
            "name": record.name,
            "source": record.source,
            **difference(a, b),
        }
        if record.name == "token" and row["relative"] != 0:
            self.parted_at = record.step
        self.rows += 1
        parted = not isinstance(row["relative"], float) or row["relative"] > self.tolerance
        self.equal += not parted
        first = parted and self.first is None
        if first:
            self.first = row
        if self.as_json:
            print_json(row)
            return
        name = re.sub(r"^(\d+/)?(language_model|vision_tower)\.", r"\1", record.key)
        shape, apart = str(row["shapes"][0]), f"{row['max']!s:>10} {row['relative']!s:>9}"
        if row.get("different"):
            apart = f"{row['different']} of {math.prod(row['shapes'][0])} differ"
        elif row["relative"] is None:
            apart = f"B is {row['shapes'][1]}"
        elif row["relative"] == 0:
            apart = f"{'equal':>10}"
        elif not isinstance(row["relative"], str):
            apart = f"{row['max']:>10.3g} {row['relative']:>9.2g}"
        print(
            f"{name:<42} {shape:<20} {row['dtypes'][0]:<8} {row['dtypes'][1]:<8} "
            f"{apart}{'  <- first' * first}"
        )

    def finish(self) -> bool:
        """The summary, on stdout; whether all is equal, and on both sides. Raises ValueError when
        the two have no tensor in common."""
        if not self.rows:
            alike = "the same --depth, --layers and --steps"
            raise ValueError(f"the two have no tensor in common; compare traces of {alike}")
        unmatched = (
            [key for key in self.stored if key not in self.seen] if self.parted_at is None else []
        )
        same = self.first is None and not self.missing and not unmatched
        if self.as_json:
            counts = {"compared": self.rows, "equal": self.equal}
            alone = {"only_in_run": self.missing, "only_in_reference": unmatched}
            print_json(
                {"first": self.first, **counts, **alone, "other_token_at_step": self.parted_at}
            )
            return same
        print()
        for keys, where in ((self.missing, "run"), (unmatched, "reference")):
            if keys:
                print(
                    f"{len(keys)} tensor(s) only in the {where}, not compared: "
                    f"{', '.join(keys[:3])}, ..."
                )
        if self.parted_at is not None:
            print(
                f"at step {self.parted_at} they choose different tokens, so nothing after it is "
                "compared"
            )
        within = f" within {self.tolerance:g}" if self.tolerance else ""
        print(f"{self.equal} of {self.rows} tensors equal{within}", end="")
        row = self.first
        where = (
            ""
            if row is None
            else f"{row['name']}" + ("" if row["step"] is None else f", step {row['step']}")
        )
        print("" if row is None else f"; they part first at {where} ({row['source']})")
        return same


def difference(a: Tensor, b: Tensor) -> dict:
    """Shapes, dtypes, the largest and the relative difference of two tensors: 0 if they are equal,
    None if their shapes are not, a text if they are not finite. Whole numbers stand for things, so
    of those that are not equal it is `different`, how many; max and relative are None."""
    found = {
        "shapes": [list(a.shape), list(b.shape)],
        "dtypes": [dtype_name(x.dtype) for x in (a, b)],
    }
    if a.shape != b.shape:
        return {**found, "max": None, "relative": None}
    if not (a.is_floating_point() or b.is_floating_point()) and (different := int((a != b).sum())):
        return {**found, "max": None, "relative": None, "different": different}
    a, b = a.double(), b.double()
    if torch.equal(a, b):
        return {**found, "max": 0.0, "relative": 0.0}
    apart = torch.where(a == b, 0, a - b)  # filters make -inf of scores, and -inf - -inf is nan
    size = max(x[x.isfinite()].norm() for x in (a, b))
    largest, relative = float(apart.abs().max()), float(apart.norm() / size)
    finite = bool(apart.isfinite().all())
    return {
        **found,
        "max": largest if finite else str(largest),
        "relative": relative if finite else str(relative),
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What --save wrote. Raises FileNotFoundError, or ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: neither settings such as dtype=float32 nor a file that --save wrote"
        )
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path}: not a safetensors file ({error}); write one with --save"
        ) from None
