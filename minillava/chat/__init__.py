"""A conversation whose cache is kept from question to question; `python -m minillava.chat`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "Conversation": "conversation",
        "Session": "session",
    },
)
