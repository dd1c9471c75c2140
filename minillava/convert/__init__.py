"""Weights in another layout, or in 8 or 4 bits; `python -m minillava.convert`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(__name__, {"convert": "run"})
