"""Checkpoints loaded one after the other, each while the one before is being computed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cluster.errors import StorageError
from configs.errors import UserError
from tasks.checkpoints.content import digest_of_weights
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.start_point import StartPoint, require_digest
from tasks.checkpoints.tied import without_tied
from tasks.models.weights import load_weights

FAILURES = (CheckpointError, UserError, StorageError)
"""What one checkpoint may fail of: damaged, of other shapes, gone, or not to be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A checkpoint in a network."""

    url: str
    """Where it was read."""
    network: torch.nn.Module
    """Its weights, unless ``error`` says that they are not."""
    digest: str
    """Content digest by its manifest; of a plain folder, a fingerprint of its URL."""
    error: Exception | None = None
    """One of :data:`FAILURES`."""


def load_ahead(
    networks: Sequence[torch.nn.Module], urls: Sequence[str], start: StartPoint | None = None
) -> Iterator[Loaded]:
    """Yield ``urls`` in order, loaded into ``networks`` in turn: while one is in use, the next is read on a thread.

    With two networks there is one copy of the weights beside the one in use, never more, and a read never waits for more
    than one forward. With a single network nothing is read ahead. What is yielded is valid until the next is asked for.
    The checkpoint of ``start`` must hold the weights that it names.
    """
    assert networks, "a checkpoint needs a network"
    running: deque[Future[Loaded]] = deque()
    waiting = iter(zip(itertools.cycle(networks), urls, strict=False))
    # One thread: loads never overtake each other, and each begins when its network is free.
    with ThreadPoolExecutor(1, thread_name_prefix="load-ahead") as pool:
        try:
            for _ in urls:
                for network, url in itertools.islice(waiting, len(networks) - len(running)):
                    running.append(pool.submit(_load, network, url, start))
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _load(network: torch.nn.Module, url: str, start: StartPoint | None) -> Loaded:
    try:
        checkpoint = open_checkpoint(url)
        digest = digest_of_weights(checkpoint)
        if start is not None and url == start.url:
            require_digest(start, digest)
        load_weights(network, without_tied(checkpoint))
    except FAILURES as error:
        return Loaded(url=url, network=network, digest="", error=error)
    return Loaded(url=url, network=network, digest=digest)
