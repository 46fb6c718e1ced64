"""Content digests: the documented definition, and what they depend on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
from blake3 import blake3

from tasks.checkpoints.digest import content_digest, digest_bytes, fingerprint
from tasks.checkpoints.safetensors_header import TensorEntry


def tensor(name: str, data: bytes, shape: tuple[int, ...], dtype: str = "F32", offset: int = 0) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=shape, offset=offset, bytes=len(data), digest=digest_bytes(data))


A = tensor("a", bytes(8), (2,))
B = tensor("b", bytes(range(4)), ())
WEIGHTED = tensor('ü"\\', bytes(16), (2, 2), offset=96)


def test_content_digest_is_the_documented_definition() -> None:
    lines = "".join(
        f'["{name}","F32",[{shape}],"{blake3(data).hexdigest()}"]\n'
        for name, shape, data in (("a", "2", bytes(8)), ("b", "", bytes(range(4))), ('ü\\"\\\\', "2,2", bytes(16)))
    )
    assert content_digest([A, B, WEIGHTED]) == blake3(lines.encode()).hexdigest()


def test_content_digest_known_value_never_changes() -> None:
    # Digests lie in manifests for years: a new value here means that no old manifest verifies any more.
    assert content_digest([A, B]) == "737f427bdeef65a9dac6b43209651403e965e6bf3ff61bd759977f72b6504d63"


def test_content_digest_any_order_is_equal() -> None:
    assert len({content_digest(order) for order in itertools.permutations([A, B, WEIGHTED])}) == 1


def test_content_digest_place_in_a_file_does_not_matter() -> None:
    moved = dataclasses.replace(A, offset=4096)
    assert content_digest([moved, B]) == content_digest([A, B])


@pytest.mark.parametrize(
    "changed",
    [
        tensor("A", bytes(8), (2,)),
        tensor("a", bytes(8), (2,), dtype="I32"),
        tensor("a", bytes(8), (2, 1)),
        tensor("a", bytes(8), (1, 2)),
        tensor("a", bytes(7) + b"\1", (2,)),
        tensor("a", b"\1" + bytes(7), (2,)),
    ],
    ids=["name", "dtype", "shape", "shape transposed", "last byte", "first byte"],
)
def test_content_digest_any_change_differs(changed: TensorEntry) -> None:
    assert content_digest([changed, B]) != content_digest([A, B])


def test_content_digest_tensor_more_or_less_differs() -> None:
    assert len({content_digest(tensors) for tensors in ([], [A], [B], [A, B], [A, B, WEIGHTED])}) == 5


def test_content_digest_names_cannot_run_together() -> None:
    first = [tensor("a", b"1111", ()), tensor("bc", b"1111", ())]
    second = [tensor("ab", b"1111", ()), tensor("c", b"1111", ())]
    assert content_digest(first) != content_digest(second)


def test_content_digest_tensor_without_digest_refused() -> None:
    with pytest.raises(AssertionError, match="a has no digest"):
        content_digest([dataclasses.replace(A, digest="")])


def test_digest_bytes_is_blake3(tmp_path: Path) -> None:
    # The empty-input value of the BLAKE3 test vectors.
    assert digest_bytes(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest_bytes(memoryview(b"bytes")) == blake3(b"bytes").hexdigest()


def test_fingerprint_is_blake3_of_canonical_json() -> None:
    value = {"b": [1, 2.5, None, True], "a": "x"}
    assert fingerprint(value) == blake3(b'{"a":"x","b":[1,2.5,null,true]}').hexdigest()


def test_fingerprint_key_order_does_not_matter() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"a": 1, "b": None}, {}])
def test_fingerprint_any_change_differs(other: object) -> None:
    assert fingerprint(other) != fingerprint({"a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1, 2}, object(), Path("x"), {"a": [math.nan]}])
def test_fingerprint_value_that_json_cannot_say_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint(value)


def test_fingerprint_keys_that_are_no_text_refused_or_told_apart() -> None:
    try:
        number = fingerprint({1: "x"})
    except (TypeError, ValueError):
        return
    assert number != fingerprint({"1": "x"})


def test_fingerprint_is_of_the_text_that_json_reads_back() -> None:
    value = {"weights": [0.1, 1 / 3, 5e-324, 1e300]}
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)
