"""Every tensor on the way to an answer, and where two runs part; `python -m minillava.trace`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "trace": "run",
        "Comparison": "compare",
        "read_tensors": "compare",
        "Recorder": "recorder",
    },
)
