"""A conversation whose cache is kept from one question to the next; `python -m minillava.chat`."""

from minillava.files.modules import on_first_use

__getattr__ = on_first_use(
    __name__,
    {
        "Conversation": "conversation",
        "Session": "session",
    },
)
