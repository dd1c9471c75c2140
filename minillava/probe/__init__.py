"""Why it answered: parts of a picture, of the attention and of the network are changed, and what
the answer loses by it is measured; `python -m minillava.probe`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "intervene": "intervene",
        "Attention": "intervene",
        "Heads": "intervene",
        "MLPs": "intervene",
        "States": "intervene",
        "Keep": "intervene",
        "put": "intervene",
        "zero": "intervene",
        "Answered": "measure",
        "knock_out": "knockout",
        "ablate": "knockout",
        "patch": "patching",
    },
)
