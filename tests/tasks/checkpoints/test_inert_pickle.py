"""The pickle reader against the real pickler, and against pickles that mean harm: nothing is ever called."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.checkpoints.inert_pickle import RefusedPickle, read_pickle
from tasks.checkpoints.inert_values import MAX_KEY_ITEMS, Name, PersistentId, Record
from tasks.checkpoints.safetensors_header import CheckpointError

WHERE = "memory://run/.metadata"
HYPOTHESIS = settings(max_examples=300, deadline=None, derandomize=True, database=None)
PROTOCOLS = (2, 3, 4, 5)
DEPTH = 200_000
ORDERED = "collections.OrderedDict"


def read(data: bytes, *allowed: str) -> Any:
    return read_pickle(data, frozenset(allowed), WHERE)


def require_refused(data: bytes, *allowed: str, match: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        read(data, *allowed)
    assert WHERE in str(caught.value)
    return caught.value


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory that was in use at once during ``action``."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def depth_of(value: Any, step: Callable[[Any], Any]) -> int:
    """Number of ``step`` until None."""
    depth = 0
    while (value := step(value)) is not None:
        depth += 1
    return depth


# Round trips

KEYS = st.one_of(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1))
BASIC = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=300)
)


def plain(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=6),
            st.dictionaries(KEYS, inner, max_size=6),
            st.lists(inner, max_size=6).map(tuple),
        ),
        max_leaves=30,
    )


def require_same(value: Any, protocol: int) -> None:
    found = read(pickle.dumps(value, protocol))
    assert found == value
    # True equals 1 and 1.0: the text tells them apart.
    assert repr(found) == repr(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@HYPOTHESIS
@given(value=plain(BASIC))
@example(value=[2**63 - 1, -(2**63), 2**31, -(2**31) - 1, 65535, 65536, 255, 256, -1, 0])
@example(value=[float("inf"), -0.0, 5e-324, "", "ü漢😀", "x" * 300, "y" * 70_000])
@example(value={("a", 1): (), "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))})
@example(value=[list(range(2500)), dict.fromkeys(range(2500), "shared")])
def test_read_pickle_plain_data_equals_the_original(protocol: int, value: Any) -> None:
    require_same(value, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
@HYPOTHESIS
@given(value=plain(st.one_of(BASIC, st.binary(max_size=300))))
@example(value=[b"", b"x" * 255, b"x" * 256, b"x" * 70_000])
def test_read_pickle_data_with_bytes_equals_the_original(protocol: int, value: Any) -> None:
    require_same(value, protocol)


def test_read_pickle_bytes_of_protocol_two_need_a_call_and_are_refused() -> None:
    assert isinstance(require_refused(pickle.dumps(b"\xff", 2), match=r"'_codecs\.encode'"), RefusedPickle)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [set(), {1, 2}, frozenset({1})], ids=repr)
def test_read_pickle_sets_are_refused(protocol: int, value: Any) -> None:
    assert isinstance(require_refused(pickle.dumps([value], protocol)), RefusedPickle)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_one_list_named_twice_stays_one_list(protocol: int) -> None:
    shared = ["shared"]
    first, second = read(pickle.dumps([shared, shared], protocol))
    assert first is second
    assert first == shared


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_list_that_holds_itself_holds_itself(protocol: int) -> None:
    ring: list[Any] = []
    ring.append(ring)
    found = read(pickle.dumps(ring, protocol))
    assert len(found) == 1
    assert found[0] is found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_memo_of_more_than_256_entries_is_the_pickler_s(protocol: int) -> None:
    names = [f"tensor.{index}" for index in range(1000)]
    require_same([names, names[::-1], dict.fromkeys(names, names[500])], protocol)


@pytest.mark.parametrize("protocol", [0, 1])
def test_read_pickle_older_protocols_are_refused(protocol: int) -> None:
    require_refused(pickle.dumps({"a": [1, 2.0, True]}, protocol))


@pytest.mark.parametrize("protocol", [0, 1, 6, 255])
def test_read_pickle_unknown_protocol_number_is_refused(protocol: int) -> None:
    require_refused(bytes([0x80, protocol]) + b"N.", match=f"pickle protocol {protocol}")


# Classes


class Calls:
    """Pickles as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def by_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def by_stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


@pytest.mark.parametrize("named", [by_global, by_stack_global])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections.OrderedDict", "__init__"),
        ("", "OrderedDict"),
        ("Collections", "OrderedDict"),
    ],
)
def test_read_pickle_class_outside_the_list_refused_by_name(
    tmp_path: Path, named: Callable[[str, str], bytes], module: str, name: str
) -> None:
    marker = tmp_path / "executed"
    command = f"touch {marker}".encode()
    call = b"X" + struct.pack("<I", len(command)) + command + b"\x85R."
    error = require_refused(b"\x80\x04" + named(module, name) + call, ORDERED)
    assert isinstance(error, RefusedPickle)
    assert f"{module}.{name}" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "code", "name"),
    [
        (os.system, "touch {}", r"posix\.system"),
        (eval, "open({!r}, 'w')", r"eval"),
        (exec, "open({!r}, 'w')", r"exec"),
        (subprocess.Popen, ["touch", "{}"], r"(subprocess|commands)\.Popen"),  # protocol 2 writes names of Python 2
        (getattr, "{}", r"getattr"),
    ],
)
def test_read_pickle_real_payload_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, function: Any, code: Any, name: str
) -> None:
    marker = str(tmp_path / "executed")
    filled = [part.format(marker) for part in code] if isinstance(code, list) else code.format(marker)
    data = pickle.dumps({"fine": 1, "payload": Calls(function, filled)}, protocol)
    assert isinstance(require_refused(data, ORDERED, match=name), RefusedPickle)
    assert not Path(marker).exists()


def test_read_pickle_endless_class_name_is_cut_in_the_message() -> None:
    error = require_refused(by_global("m" * 100_000, "n") + b".")
    assert len(str(error)) < 1000


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_allowed_function_becomes_a_record_and_is_not_called(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    found = read(pickle.dumps(Calls(os.system, f"touch {marker}"), protocol), "posix.system")
    assert isinstance(found, Record)
    assert (found.name, found.args) == (Name("posix", "system"), (f"touch {marker}",))
    assert (found.state, found.items) == (None, None)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_allowed_class_alone_becomes_its_name(protocol: int) -> None:
    assert read(pickle.dumps(collections.OrderedDict, protocol), ORDERED) == Name("collections", "OrderedDict")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_ordered_dict_becomes_a_record_with_its_pairs(protocol: int) -> None:
    found = read(pickle.dumps(collections.OrderedDict(a=1, b=[2]), protocol), ORDERED)
    assert isinstance(found, Record)
    assert (found.name, found.args, found.items) == (Name("collections", "OrderedDict"), (), [("a", 1), ("b", [2])])


class Stateful:
    """With the default reduction: NEWOBJ and BUILD."""

    def __init__(self) -> None:
        self.size = (1, 2)

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("called")


class Keywords:
    """NEWOBJ_EX."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Keywords:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **kwargs: Any) -> None:
        self.kwargs = kwargs

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (1,), self.kwargs


class Appended(list):  # type: ignore[type-arg]
    """Items of a list."""

    def append(self, _item: Any) -> None:
        raise AssertionError("called")

    def extend(self, _items: Any) -> None:
        raise AssertionError("called")


def dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_instance_becomes_a_record_with_its_state(protocol: int) -> None:
    found = read(pickle.dumps(Stateful(), protocol), dotted(Stateful))
    assert isinstance(found, Record)
    assert (found.name.name, found.args, found.state) == ("Stateful", (), {"size": (1, 2)})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_instance_of_a_list_becomes_a_record_with_its_items(protocol: int) -> None:
    found = read(pickle.dumps(Appended(range(2000)), protocol), dotted(Appended))
    assert isinstance(found, Record)
    assert found.items == list(range(2000))


@pytest.mark.parametrize("protocol", [4, 5])
def test_read_pickle_keyword_arguments_only_if_there_are_none(protocol: int) -> None:
    with_none = by_global("a", "b") + b")}\x92."
    assert read(b"\x80" + bytes([protocol]) + with_none, "a.b").name == Name("a", "b")
    require_refused(pickle.dumps(Keywords(x=1), protocol), dotted(Keywords), match="keyword arguments")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_read_pickle_persistent_id_becomes_its_value(protocol: int, tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", obj.decode(), 7) if isinstance(obj, bytes) else None

    with (tmp_path / "p").open("wb") as file:
        Pickler(file, protocol).dump({"a": b"zero", "b": [b"one"]})
    found = read((tmp_path / "p").read_bytes())
    assert isinstance(found["a"], PersistentId)
    assert isinstance(found["b"][0], PersistentId)
    assert (found["a"].value, found["b"][0].value) == (("storage", "zero", 7), ("storage", "one", 7))


# Hostile: memory


@pytest.mark.parametrize("index", [1, 2**20, 2**31, 2**32 - 1])
def test_read_pickle_huge_memo_index_costs_no_memory(index: int) -> None:
    data = b"]r" + struct.pack("<I", index) + b"."
    assert peak_bytes(lambda: require_refused(data, match="memo entry")) < 50_000_000


@pytest.mark.parametrize(
    ("opcode", "layout", "count"),
    [
        (opcode, layout, count)
        for opcode, layout in [(b"B", "<I"), (b"X", "<I"), (b"\x8e", "<Q"), (b"\x8d", "<Q"), (b"\x8b", "<i")]
        for count in (5, 2**20, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
        if count < 2 ** (8 * struct.calcsize(layout) - layout.endswith("i"))
    ],
)
def test_read_pickle_announcing_more_than_there_is_refused_without_memory(
    opcode: bytes, layout: str, count: int
) -> None:
    data = opcode + struct.pack(layout, count) + b"abc."
    assert peak_bytes(lambda: require_refused(data)) < 50_000_000


@pytest.mark.parametrize("opcode", [b"C", b"\x8c", b"\x8a"])
def test_read_pickle_announcing_more_than_there_is_in_one_byte_refused(opcode: bytes) -> None:
    require_refused(opcode + b"\x10abc.")


@pytest.mark.parametrize("count", [3, 2**20, 2**63, 2**64 - 1])
def test_read_pickle_frame_longer_than_the_file_refused(count: int) -> None:
    require_refused(b"\x80\x04\x95" + struct.pack("<Q", count) + b"N.")


@pytest.mark.parametrize("count", [-1, -(2**31), 17, 1000])
def test_read_pickle_integer_of_negative_or_many_bytes_refused(count: int) -> None:
    require_refused(b"\x8b" + struct.pack("<i", count) + bytes(2000) + b".", match=f"an integer of {count} bytes")


@pytest.mark.parametrize("cycle", [b"]", b"}", b"(", b")\x85", b"]\x94", b"}NNs", b"]Na", b"M\xff\xffM\xfe\xff\x86"])
def test_read_pickle_takes_no_more_than_80_times_its_length(cycle: bytes) -> None:
    data = cycle * (300_000 // len(cycle))

    def refuse() -> None:
        require_refused(data)

    assert peak_bytes(refuse) < 80 * len(data)


# Hostile: depth


def first_of(value: Any) -> Any:
    return value[0] if value else None


def args_of(value: Record) -> Any:
    return value.args[0] if value.args else None


@pytest.mark.parametrize(
    ("data", "step", "depth"),
    [
        (b"]" * (DEPTH + 1) + b"a" * DEPTH + b".", first_of, DEPTH),
        (b")" + b"\x85" * DEPTH + b".", first_of, DEPTH),
        (b"(" * DEPTH + b")" + b"t" * DEPTH + b".", first_of, DEPTH),
        (b"}N" * DEPTH + b"}" + b"s" * DEPTH + b".", lambda value: value.get(None), DEPTH),
        (b"N" + b"Q" * DEPTH + b".", lambda pid: pid.value, DEPTH - 1),
        (b"ca\nb\nq\x00" + b"h\x00" * DEPTH + b")" + b"R\x85" * DEPTH + b"R.", args_of, DEPTH),
        (b"ca\nb\nq\x000" + b"h\x00)R" * (DEPTH + 1) + b"b" * DEPTH + b".", lambda record: record.state, DEPTH),
    ],
    ids=["lists", "tuples", "marked tuples", "dicts", "persistent ids", "arguments", "states"],
)  # fmt: skip
def test_read_pickle_deep_nesting_is_read_and_freed(data: bytes, step: Callable[[Any], Any], depth: int) -> None:
    value = read(data, "a.b")
    found = depth_of(value, step)
    del value
    assert found == depth


@pytest.mark.parametrize("close", [b"", b"a" * (DEPTH // 2)], ids=["open", "half"])
def test_read_pickle_deep_nesting_left_open_refused(close: bytes) -> None:
    require_refused(b"]" * DEPTH + close + b".")


# Hostile: keys


@pytest.mark.parametrize(
    "key",
    [
        b"]",
        b"}",
        b"]\x85",
        b"]\x85\x85",
        b")" + b"\x85" * DEPTH,
        b"(" + b"N" * (MAX_KEY_ITEMS + 1) + b"t",
        b"NQ",
    ],
    ids=["list", "dict", "list in tuple", "deeper list", "deep tuple", "long tuple", "persistent id"],
)
@pytest.mark.parametrize("form", ["setitem", "setitems"])
def test_read_pickle_key_that_cannot_be_one_refused(key: bytes, form: str) -> None:
    require_refused(b"}" + (key + b"Ns." if form == "setitem" else b"(" + key + b"Nu."), match="as a key")


def test_read_pickle_longest_tuple_key_is_read() -> None:
    key = tuple(range(MAX_KEY_ITEMS))
    assert read(pickle.dumps({key: 1}, 4)) == {key: 1}


# Hostile: structure

REAL = {"tensors": [("a", 1, 2.5, None, True)], "storage": collections.OrderedDict(x=b"bytes" * 60), 7: 2**62}


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
def test_read_pickle_truncated_at_every_byte_refused(protocol: int) -> None:
    whole = pickle.dumps(REAL, protocol)
    assert set(read(whole, ORDERED)) == set(REAL)
    for length in range(len(whole)):
        require_refused(whole[:length], ORDERED)


@pytest.mark.parametrize("data", [b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00."])
def test_read_pickle_extension_codes_refused(data: bytes) -> None:
    assert isinstance(require_refused(data, match=f"{data[0]:#04x}"), RefusedPickle)


@pytest.mark.parametrize("code", [b"i", b"o", b"P", b"S", b"V", b"I", b"L", b"F", b"\x8f", b"\x91", b"\x96", b"\xff"])
def test_read_pickle_opcodes_that_data_does_not_need_refused(code: bytes) -> None:
    assert isinstance(require_refused(b"(N" + code + b"1\n1\n.", match="not needed for data"), RefusedPickle)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"NN.",
        b"\x80",
        b"\x80\x04",
        b"(",
        b"(.",
        b"((.",
        b"NNN(.",
        b"t.",
        b"e.",
        b"]e.",
        b"]u.",
        b"}(Nu.",
        b"N(e.",
        b"Na.",
        b"a.",
        b"0.",
        b"s.",
        b"}s.",
        b"}Ns.",
        b"]NNs.",
        b"R.",
        b"NR.",
        b"N)R.",
        b"))\x81.",
        b"ca\nb\nNR.",
        b"ca\nb\n]R.",
        b"NNb.",
        b"]Nb.",
        b"b.",
        b"Q.",
        b"\x85.",
        b"N\x86.",
        b"NN\x87.",
        b"\x94.",
        b"q\x00.",
        b"h\x00.",
        b"Nh\x00.",
        b"j\xff\xff\xff\xff.",
        b"NN\x93.",
        b"KK\x93.",
        b"ca.",
        b"ca\nb.",
        b"c\xff\n\xff\n.",
        b"X\x01\x00\x00\x00\xff.",
        b"\x8c\x03\xed\xa0\x80.",
        b"ca\nb\n)N\x92.",
        b"ca\nb\n)]\x92.",
    ],
)
def test_read_pickle_senseless_structure_refused(data: bytes) -> None:
    require_refused(data, "a.b")


@pytest.mark.parametrize("data", [b"(N.", b"N(.", b"((N.", b"](."])
def test_read_pickle_mark_left_on_the_stack_refused(data: bytes) -> None:
    require_refused(data)


# Whatever the bytes are, the answer is a value or CheckpointError

FRAGMENTS = st.sampled_from(
    [
        bytes([code])
        for code in b"()]}Nabesutq0.RQ\x85\x86\x87\x81\x92\x93\x94\x88\x89hjMJKCXBGc\x8a\x8b\x8c\x8d\x8e\x95"
    ]
    + [b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"K\x07", b"ca\nb\n", b"\x8c\x01a", b"\x8c\x01b", b"X\x01\x00\x00\x00a"]
    + [b"\x80\x02", b"\x82\x01", b"1", b"2", b"l", b"d", b"o"]
)
MUTATED = [pickle.dumps(REAL, protocol) for protocol in PROTOCOLS[1:]] + [pickle.dumps([REAL, REAL, [REAL]], 4)]


def require_read_or_refused(data: bytes) -> None:
    # The value is never printed or compared: it may hold itself.
    message = WHERE
    try:
        read(data, ORDERED, "a.b", "_codecs.encode")
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(WHERE)
    assert len(message) < 2000


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(MUTATED)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(data) - 1))
        new = draw(st.one_of(st.binary(max_size=3), FRAGMENTS))
        data[place : place + draw(st.integers(0, 3))] = new
        data = data or bytearray(b".")
    return bytes(data)


@HYPOTHESIS
@given(st.binary(max_size=200))
def test_read_pickle_random_bytes_raise_nothing_else(data: bytes) -> None:
    require_read_or_refused(data)


@settings(HYPOTHESIS, max_examples=2000)
@given(st.lists(FRAGMENTS, max_size=40))
def test_read_pickle_random_opcodes_raise_nothing_else(parts: list[bytes]) -> None:
    require_read_or_refused(b"".join(parts) + b".")


@settings(HYPOTHESIS, max_examples=1000)
@given(mutations())
def test_read_pickle_random_mutations_raise_nothing_else(data: bytes) -> None:
    require_read_or_refused(data)
