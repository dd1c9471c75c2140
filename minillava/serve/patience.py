"""How long a client is waited for."""

import asyncio
from collections.abc import Callable

PARTS = 10


class Countdown:
    """Calls `end` after so many seconds, unless it is cancelled. They are counted in PARTS, so that
    a machine that stood still meanwhile, as a laptop that sleeps or a container that is paused,
    loses one part: a client that stood still with it has the rest of its time."""

    def __init__(self, seconds: float, end: Callable[[], None]):
        self.each, self.left, self.end = seconds / PARTS, PARTS, end
        self.loop = asyncio.get_running_loop()
        self.timer = self.loop.call_later(self.each, self._count)

    def _count(self) -> None:
        self.left -= 1
        if self.left:
            self.timer = self.loop.call_later(self.each, self._count)
        else:
            self.end()

    def cancel(self) -> None:
        self.timer.cancel()
