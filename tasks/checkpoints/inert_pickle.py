"""Read a pickle without executing it: opcodes build plain data, and nothing is ever called.

Classes become :class:`Name` tokens and must be in an exact allow-list; their instances become :class:`Record`
values. So a hostile file can at worst be refused. Protocols 2 to 5, the opcodes that data needs; memory is bounded
by the length of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tasks.checkpoints.safetensors_header import CheckpointError

MAX_INTEGER_BYTES = 16


class RefusedPickle(CheckpointError):
    """A pickle names a class outside the allow-list, or is more than plain data; nothing was executed."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle refers to, by name only."""

    module: str
    """Module."""
    name: str
    """Name in it."""

    @property
    def dotted(self) -> str:
        """``module.name``."""
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """What would have been an instance: the class, its arguments, its state. Hashed by identity."""

    name: Name
    """Class or function."""
    args: tuple[Any, ...]
    """Arguments it would have been called with."""
    state: Any = None
    """State it would have been given."""
    items: list[Any] = field(default_factory=list)
    """Items that would have been appended or set."""


@dataclass(frozen=True, slots=True)
class PersistentId:
    """A reference to an object outside the pickle."""

    value: Any
    """What the pickle says of it."""


def read_pickle(data: bytes, allowed: frozenset[str], where: str) -> Any:
    """The value that ``data`` describes; classes as :class:`Name`, instances as :class:`Record`.

    Raises :class:`RefusedPickle` naming ``where`` and the byte position for a class outside ``allowed`` (dotted names)
    and for opcodes that data does not need, :class:`CheckpointError` for damage.
    """
    machine = _Machine(data, allowed, where)
    try:
        return machine.run()
    except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: damaged pickle at byte {machine.position}: {type(error).__name__}: {error}"
        ) from None


_MARK = object()
_INT4, _LONG8, _FLOAT8 = struct.Struct("<i"), struct.Struct("<Q"), struct.Struct(">d")


class _Machine:
    """The stack machine of the pickle format, less everything that calls."""

    def __init__(self, data: bytes, allowed: frozenset[str], where: str) -> None:
        self.data, self.allowed, self.where = data, allowed, where
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Name] = {}

    def run(self) -> Any:
        data, handlers = self.data, _HANDLERS
        while True:
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                (value,) = self.stack
                if value is _MARK:
                    raise ValueError("a mark instead of a value")
                return value
            handler = handlers[code]
            if handler is None:
                raise RefusedPickle(
                    f"{self.where}: pickle opcode {bytes([code])!r} at byte {self.position - 1} is not needed for data: refused"
                )
            handler(self)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, which must be there."""
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise ValueError(f"{count} bytes were announced, {len(self.data) - self.position} are left")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def byte(self) -> int:
        value = self.data[self.position]
        self.position += 1
        return value

    def int4(self) -> int:
        return int(_INT4.unpack(self.take(4))[0])

    def size8(self) -> int:
        return int(_LONG8.unpack(self.take(8))[0])

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode("utf-8")
        self.position = end + 1
        return text

    def text(self, count: int) -> None:
        self.stack.append(self.take(count).decode("utf-8"))

    def integer(self, count: int) -> None:
        if count > MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def popped_to_mark(self) -> list[Any]:
        stack = self.stack
        index = len(stack) - 1
        while stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise IndexError("no mark on the stack")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or f"{module}.{name}" not in self.allowed:
            raise RefusedPickle(
                f"{self.where}: the pickle names {module}.{name} at byte {self.position}, which is not among the classes "
                "that a checkpoint needs: refused, nothing was executed"
            )
        key = (module, name)
        self.stack.append(self.names.setdefault(key, Name(module, name)))

    def instance(self, args: Any, name: Any) -> None:
        if not isinstance(name, Name) or not isinstance(args, tuple):
            raise TypeError(f"an instance of {type(name).__name__}")
        self.stack.append(Record(name, args))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Record):
            raise TypeError(f"state for {type(target).__name__}")
        target.state = state

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items += items
        elif isinstance(target, list):
            target += items
        else:
            raise TypeError(f"items for {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise TypeError(f"members for {type(target).__name__}")
        target.update(hashable(item) for item in items)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items += zip(flat[::2], flat[1::2], strict=True)
        elif isinstance(target, dict):
            target.update(zip(map(hashable, flat[::2]), flat[1::2], strict=True))
        else:
            raise TypeError(f"items for {type(target).__name__}")

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count or any(item is _MARK for item in self.stack[-count:]):
            raise IndexError("too few values for a tuple")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def memoize(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark in the memo")
        self.memo[index] = self.stack[-1]

    def pop2(self) -> tuple[Any, Any]:
        second = self.stack.pop()
        return self.stack.pop(), second


def hashable(value: Any) -> Any:
    """``value`` if it may be a key: hashing a tuple of a million levels would overflow the C stack."""
    if value is None or isinstance(value, (str, int, float, bytes, Record, Name)):
        return value
    if isinstance(value, tuple) and all(isinstance(item, (str, int, float, bytes)) for item in value):
        return value
    raise TypeError(f"{type(value).__name__} as a key")


def _global(m: _Machine) -> None:
    module = m.line()
    m.name(module, m.line())


def _stack_global(m: _Machine) -> None:
    m.name(*m.pop2())


def _call(m: _Machine) -> None:
    name, args = m.pop2()
    m.instance(args, name)


def _call_with_keywords(m: _Machine) -> None:
    keywords = m.stack.pop()
    name, args = m.pop2()
    if keywords:
        raise TypeError("keyword arguments")
    m.instance(args, name)


def _frame(m: _Machine) -> None:
    if m.size8() > len(m.data) - m.position:
        raise ValueError("a frame longer than the file")


def _protocol(m: _Machine) -> None:
    if not 2 <= (version := m.byte()) <= 5:
        raise ValueError(f"pickle protocol {version}")


def _add_from_mark(m: _Machine) -> None:
    items = m.popped_to_mark()
    m.add(items)


_STOP = ord(".")
_TABLE: dict[bytes, Callable[[_Machine], object]] = {
    b"\x94": lambda m: m.memoize(len(m.memo)),
    b"q": lambda m: m.memoize(m.byte()),
    b"r": lambda m: m.memoize(m.int4()),
    b"h": lambda m: m.stack.append(m.memo[m.byte()]),
    b"j": lambda m: m.stack.append(m.memo[m.int4()]),
    b"\x8c": lambda m: m.text(m.byte()),
    b"X": lambda m: m.text(m.int4()),
    b"\x8d": lambda m: m.text(m.size8()),
    b"K": lambda m: m.stack.append(m.byte()),
    b"M": lambda m: m.stack.append(int.from_bytes(m.take(2), "little")),
    b"J": lambda m: m.stack.append(m.int4()),
    b"\x8a": lambda m: m.integer(m.byte()),
    b"\x8b": lambda m: m.integer(m.int4()),
    b"G": lambda m: m.stack.append(_FLOAT8.unpack(m.take(8))[0]),
    b"C": lambda m: m.stack.append(m.take(m.byte())),
    b"B": lambda m: m.stack.append(m.take(m.int4())),
    b"\x8e": lambda m: m.stack.append(m.take(m.size8())),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b")": lambda m: m.stack.append(()),
    b"]": lambda m: m.stack.append([]),
    b"}": lambda m: m.stack.append({}),
    b"\x8f": lambda m: m.stack.append(set()),
    b"(": lambda m: m.stack.append(_MARK),
    b"t": lambda m: m.stack.append(tuple(m.popped_to_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.popped_to_mark()),
    b"s": lambda m: m.set_items(list(m.pop2())),
    b"u": lambda m: m.set_items(m.popped_to_mark()),
    b"\x90": _add_from_mark,
    b"\x91": lambda m: m.stack.append(frozenset(map(hashable, m.popped_to_mark()))),
    b"0": lambda m: m.stack.pop(),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _call,
    b"\x92": _call_with_keywords,
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.stack.append(PersistentId(m.stack.pop())),
    b"\x95": _frame,
    b"\x80": _protocol,
}
_HANDLERS: list[Callable[[_Machine], object] | None] = [_TABLE.get(bytes([code])) for code in range(256)]
