"""What a folder of weights holds, and whether the model is well; `python -m minillava.inspect`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "inspect_folder": "report",
        "Report": "report",
        "as_text": "text",
    },
)
