"""Answers to POPE, scored in the three ways that papers do; `python -m minillava.pope`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__, {"SCORERS": "scores", "evaluate": "run", "report": "run", "same_question": "files"}
)
