"""What the driver asks of a gang at work: one object below the run, which rank 0 looks for beside training."""

from __future__ import annotations

import json
import logging
import threading
from typing import Literal

from cluster.errors import StorageError
from cluster.storage import Store

Request = Literal["stop", "resize"]
"""``stop``: publish a last snapshot and end; ``resize``: end at the next snapshot, a larger gang goes on."""
LOOK_SECONDS = 2.0
logger = logging.getLogger(__name__)


def write_request(store: Store, key: str, request: Request) -> None:
    """Ask the gang that was told ``key`` for something."""
    store.put(key, json.dumps({"request": request}).encode())


class RequestWatch:
    """Looks for a request every :data:`LOOK_SECONDS` on a thread; :attr:`found` costs nothing to ask."""

    def __init__(self, store: Store, key: str) -> None:
        self.found: Request | None = None
        self._store, self._key = store, key
        self._end = threading.Event()
        if key:
            threading.Thread(target=self._look, daemon=True, name="requests").start()

    def end(self) -> None:
        """Look no more."""
        self._end.set()

    def _look(self) -> None:
        while self.found is None and not self._end.wait(LOOK_SECONDS):
            try:
                data = self._store.read_if_present(self._key)
            except StorageError as error:
                logger.info("could not look for requests: %s", error)
                continue
            if data is not None:
                self.found = json.loads(data)["request"]
