"""Where the tests find the repository, and what lies beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"  # as tools/make_reference.py writes it
SHARED = ROOT.parent / "shared"  # what is not ours to distribute: tests skip without
PILLOW = "13.0.0"
"""The Pillow of stored pixels: another may round the last grey level otherwise, or read a JPEG so."""
