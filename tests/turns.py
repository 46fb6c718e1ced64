"""Drivers on threads that take turns at storage: a seed decides at every call who goes next, so a race can be repeated."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from cluster.storage import Store

METHODS = ("read", "read_range", "size", "version", "keys", "folders", "put", "create", "replace", "delete")
PATIENCE_SECONDS = 60
RUNS = (5, 50, 10_000)
"""Calls that one program may make before another is asked: a few, many, all that it still has."""
_inside = threading.local()
Watch = Callable[[Store, str, str], None]
"""Looks at a call (store, method, key) right before it takes effect."""


class Turns:
    """Runs programs of which one at a time goes on; at every call to storage the seed chooses which."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._names: dict[int, str] = {}
        self._waiting: set[str] = set()
        self._turn = ""
        self._calls_left = 0
        self.trace: list[str] = []

    def run(self, programs: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
        """What each program returned, or the exception that ended it."""
        results: dict[str, Any] = {}
        self._waiting = set(programs)
        self._turn = self._choose()
        threads = [threading.Thread(target=self._drive, args=(n, p, results)) for n, p in programs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), self.trace[-20:]
        return results

    def step(self, method: str, key: str) -> None:
        """Let the seed choose who goes on; threads that are none of the programs pass."""
        name = self._names.get(threading.get_ident())
        if name is None:
            return
        self._pass_on()
        self._await(name)
        self.trace.append(f"{name}: {method} {key}")

    def _drive(self, name: str, program: Callable[[], object], results: dict[str, Any]) -> None:
        self._names[threading.get_ident()] = name
        self._await(name)
        try:
            results[name] = program()
        except Exception as error:  # noqa: BLE001  the test looks at it
            results[name] = error
        finally:
            del self._names[threading.get_ident()]
            self._waiting.discard(name)
            self._pass_on()

    def _pass_on(self) -> None:
        with self._changed:
            if self._waiting:
                self._turn = self._choose()
            self._changed.notify_all()

    def _choose(self) -> str:
        """Runs of calls of very different lengths: at even chances all would go on abreast, always."""
        if self._turn in self._waiting and self._calls_left:
            self._calls_left -= 1
            return self._turn
        self._calls_left = self._random.randrange(self._random.choice(RUNS))
        return self._random.choice(sorted(self._waiting))

    def _await(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._turn == name, PATIENCE_SECONDS), name


@contextmanager
def watched(kind: type[Store], before: Watch, after: Watch = lambda *_: None) -> Iterator[None]:
    """Call ``before`` and ``after`` around every call to a store of ``kind`` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for method in METHODS:
            patch.setattr(kind, method, _around(getattr(kind, method), method, before, after))
        yield


def _around(inner: Callable[..., Any], method: str, before: Watch, after: Watch) -> Callable[..., Any]:
    def call(self: Store, key: str = "", *arguments: Any, **options: Any) -> Any:
        # What a call asks of its own store is part of it: it may hold a lock.
        if getattr(_inside, "call", False):
            return inner(self, key, *arguments, **options)
        before(self, method, key)
        _inside.call = True
        try:
            return inner(self, key, *arguments, **options)
        finally:
            _inside.call = False
            after(self, method, key)

    return call
