"""What is asked to look all the time, and looks now and then."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throttle:
    """Lets pass not more often than every ``seconds``, the first time that long after it was made; ``inf`` never."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._passed_at = clock()

    def passes(self) -> bool:
        """Whether it is time; if so, ``seconds`` count from now."""
        now = self._clock()
        if now - self._passed_at < self.seconds:
            return False
        self._passed_at = now
        return True
