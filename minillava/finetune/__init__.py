"""Learning from rows of pictures and conversations; `python -m minillava.finetune`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(__name__, {"finetune": "run"})
