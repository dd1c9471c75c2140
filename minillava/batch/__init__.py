"""A file of questions, answered in batches; an interrupted run goes on where it was. `python -m
minillava.batch`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "Question": "questions",
        "read_questions": "questions",
        "plan": "run",
        "ask": "run",
        "Journal": "journal",
    },
)
