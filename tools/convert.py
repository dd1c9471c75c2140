#!/usr/bin/env python3
"""`python -m minillava.convert` by the name that it had before."""

import sys
from collections.abc import Sequence
from pathlib import Path

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minillava.cli.doors import begin, enter


def main(argv: Sequence[str] | None = None) -> int:
    return enter("convert", None if argv is None else list(argv))


if __name__ == "__main__":
    begin("convert")
