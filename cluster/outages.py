"""Clean-up while storage is away: said in the log, so that it hides neither the end nor the error that it follows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.errors import StorageError

logger = logging.getLogger(__name__)


@contextmanager
def outages_logged(what: str) -> Iterator[None]:
    """Log a :class:`cluster.errors.StorageError` of the block as a warning instead of raising it; ``what`` names the block.

    For what may be left undone alone: records of time, requests, and objects that nobody reads or that expire.
    """
    try:
        yield
    except StorageError as error:
        logger.warning("%s is left undone: %s", what, error)
