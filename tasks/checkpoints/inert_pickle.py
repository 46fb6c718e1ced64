"""Read a pickle without executing it: opcodes build plain data, and nothing is ever called.

Classes become :class:`Name` tokens and must be in an exact allow-list; their instances become :class:`Record`
values. So a hostile file can at worst be refused. Protocols 2 to 5, the opcodes that checkpoints need (no sets);
a file takes at most 80 times its length in memory.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tasks.checkpoints.inert_values import Name, PersistentId, Record, as_key
from tasks.checkpoints.safetensors_header import CheckpointError

MAX_INTEGER_BYTES = 16


class RefusedPickle(CheckpointError):
    """A pickle names a class outside the allow-list, or is more than plain data; nothing was executed."""


@contextmanager
def collector_paused() -> Iterator[None]:
    """Millions of live values and no garbage: the cyclic collector would look at all of them again and again (1.7x)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@collector_paused()
def read_pickle(data: bytes, allowed: frozenset[str], where: str) -> Any:
    """The value that ``data`` describes; classes as :class:`Name`, instances as :class:`Record`.

    Raises :class:`RefusedPickle` naming ``where`` and the byte position for a class outside ``allowed`` (dotted names)
    and for opcodes that data does not need, :class:`CheckpointError` for damage.

    The value may be a million levels deep, or name one list a million times: never compare, hash or print the whole.
    """
    machine = _Machine(data, allowed, where)
    try:
        return machine.run()
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{where}: damaged pickle at byte {machine.position}: {type(error).__name__}: {error}"
        ) from None


_INT4, _SIZE4, _SIZE8, _FLOAT8 = (struct.Struct(code) for code in ("<i", "<I", "<Q", ">d"))


class _Machine:
    """The stack machine of the pickle format, less everything that calls."""

    def __init__(self, data: bytes, allowed: frozenset[str], where: str) -> None:
        self.data, self.allowed, self.where, self.position = data, allowed, where, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        # Picklers number the memo from 0 upwards, so that a list will do, and no index can make it large.
        self.memo: list[Any] = []
        self.names: dict[tuple[str, str], Name] = {}

    def run(self) -> Any:
        """The most frequent opcodes are handled here, in order of frequency, the others by the table."""
        data, stack, memo, marks, position = self.data, self.stack, self.memo, self.marks, 0
        try:
            while True:
                code = data[position]
                position += 1
                if code == 0x94:  # MEMOIZE
                    memo.append(stack[-1])
                elif code == 0x68:  # BINGET
                    stack.append(memo[data[position]])
                    position += 1
                elif code == 0x4B:  # BININT1
                    stack.append(data[position])
                    position += 1
                elif code == 0x28:  # MARK
                    marks.append(len(stack))
                elif code in (0x52, 0x81):  # REDUCE, NEWOBJ
                    args = stack.pop()
                    stack[-1] = _instance(stack[-1], args)
                elif code == 0x86:  # TUPLE2
                    second = stack.pop()
                    stack[-1] = (stack[-1], second)
                elif code == 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                elif code == 0x7D:  # EMPTY_DICT
                    stack.append({})
                elif code == 0x2E:  # STOP
                    return self.only_value()
                else:
                    self.position = position
                    _HANDLERS[code](self)
                    position = self.position
        finally:
            self.position = position

    def only_value(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values and {len(self.marks)} marks at the end")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, which must be there."""
        end = self.position + count
        if end > len(self.data):
            raise ValueError(f"{count} bytes were announced, {len(self.data) - self.position} are left")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        return self.take(self.data.index(b"\n", self.position) + 1 - self.position)[:-1].decode()

    def integer(self, count: int) -> None:
        if not 0 <= count <= MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def popped_to_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def tuple3(self) -> None:
        first, second, third = self.stack[-3:]
        self.stack[-3:] = [(first, second, third)]

    def put(self, index: int) -> None:
        if index > len(self.memo):
            raise ValueError(f"memo entry {index} after {len(self.memo)} entries")
        self.memo[index : index + 1] = [self.stack[-1]]

    def refer(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a class is no text")
        if f"{module}.{name}" not in self.allowed:
            raise RefusedPickle(
                f"{self.where}: the pickle names {f'{module}.{name}'[:200]!r} at byte {self.position}, which is not among "
                "the classes that a checkpoint needs: refused, nothing was executed"
            )
        self.stack.append(self.names.setdefault((module, name), Name(module, name)))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(target := self.stack[-1], Record):
            raise TypeError(f"state for {type(target).__name__}")
        target.state = state

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items = target.items or []
            target.items += items
        elif isinstance(target, list):
            target += items
        else:
            raise TypeError(f"items for {type(target).__name__}")

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            self.extend(list(zip(flat[::2], flat[1::2], strict=True)))
        elif isinstance(target, dict):
            target.update(zip(map(as_key, flat[::2]), flat[1::2], strict=True))
        else:
            raise TypeError(f"items for {type(target).__name__}")


def _instance(name: Any, args: Any) -> Record:
    if type(name) is not Name or type(args) is not tuple:
        raise TypeError(f"an instance of {type(name).__name__} from {type(args).__name__}")
    return Record(name, args)


def _call_with_keywords(m: _Machine) -> None:
    if m.stack.pop() != {}:
        raise TypeError("keyword arguments")
    args = m.stack.pop()
    m.stack.append(_instance(m.stack.pop(), args))


def _frame(m: _Machine) -> None:
    if m.number(_SIZE8) > len(m.data) - m.position:
        raise ValueError("a frame longer than the file")


def _protocol(m: _Machine) -> None:
    if not 2 <= (version := m.byte()) <= 5:
        raise ValueError(f"pickle protocol {version}")


def _refused(m: _Machine) -> None:
    code = m.data[m.position - 1]
    raise RefusedPickle(
        f"{m.where}: pickle opcode {code:#04x} at byte {m.position - 1} is not needed for data: refused"
    )


_TABLE: dict[bytes, Callable[[_Machine], object]] = {
    b"q": lambda m: m.put(m.byte()),
    b"r": lambda m: m.put(m.number(_SIZE4)),
    b"j": lambda m: m.stack.append(m.memo[m.number(_SIZE4)]),
    b"\x8c": lambda m: m.stack.append(m.take(m.byte()).decode()),
    b"X": lambda m: m.stack.append(m.take(m.number(_SIZE4)).decode()),
    b"\x8d": lambda m: m.stack.append(m.take(m.number(_SIZE8)).decode()),
    b"M": lambda m: m.stack.append(int.from_bytes(m.take(2), "little")),
    b"J": lambda m: m.stack.append(m.number(_INT4)),
    b"\x8a": lambda m: m.integer(m.byte()),
    b"\x8b": lambda m: m.integer(m.number(_INT4)),
    b"G": lambda m: m.stack.append(m.number(_FLOAT8)),
    b"C": lambda m: m.stack.append(m.take(m.byte())),
    b"B": lambda m: m.stack.append(m.take(m.number(_SIZE4))),
    b"\x8e": lambda m: m.stack.append(m.take(m.number(_SIZE8))),
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b")": lambda m: m.stack.append(()),
    b"]": lambda m: m.stack.append([]),
    b"t": lambda m: m.stack.append(tuple(m.popped_to_mark())),
    b"\x87": _Machine.tuple3,
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.popped_to_mark()),
    b"s": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    b"u": lambda m: m.set_items(m.popped_to_mark()),
    b"0": lambda m: m.stack.pop(),
    b"c": lambda m: m.refer(m.line(), m.line()),
    b"\x93": lambda m: m.refer(name=m.stack.pop(), module=m.stack.pop()),
    b"\x92": _call_with_keywords,
    b"b": _Machine.build,
    b"Q": lambda m: m.stack.append(PersistentId(m.stack.pop())),
    b"\x95": _frame,
    b"\x80": _protocol,
}
_HANDLERS = [_TABLE.get(bytes([code]), _refused) for code in range(256)]
