"""What each word of an answer looked at: maps, a page, numbers; `python -m minillava.look`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "look": "run",
        "Look": "run",
        "Word": "run",
        "watch": "run",
        "default_layers": "run",
    },
)
