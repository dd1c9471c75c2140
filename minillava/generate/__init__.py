"""Ways to choose an answer's tokens, one by one or as beams; `python -m minillava.generate`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "Generation": "generation",
        "generate": "generation",
    },
)
