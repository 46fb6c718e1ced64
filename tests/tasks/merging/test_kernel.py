"""The arithmetic on one chunk against exact oracles, and that cuts do not show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.merging.kernel import (
    FLOAT_DTYPES,
    Bfloat16Sum,
    PlainSum,
    encode,
    first_nonfinite,
    first_nonfinite_stored,
    new_sum,
)
from tasks.merging.methods import build_weights

SIZE = 1000
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
SMALLEST = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def random_inputs(dtype: str, count: int, size: int = SIZE, seed: int = 0) -> list[bytes]:
    """Values of both signs over four orders of magnitude, as they lie in a checkpoint of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        scales = 10 ** (4 * torch.rand(size, generator=generator, dtype=torch.float64) - 2)
        made.append((values * scales).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes())
    return made


def float64_of(data: bytes, dtype: str) -> NDArray[np.float64]:
    return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).double().numpy()


def merge(inputs: Sequence[bytes], weights: Sequence[float], dtype: str, cut: Sequence[int] = (0, SIZE)) -> bytes:
    """Sum of ``inputs`` in chunks cut at ``cut``, stored as ``dtype``."""
    width = WIDTH[dtype]
    chunk = new_sum(max(end - start for start, end in itertools.pairwise(cut)), [dtype], None, accumulator_of(dtype))
    out = b""
    for start, end in itertools.pairwise(cut):
        for index, (data, weight) in enumerate(zip(inputs, weights, strict=True)):
            chunk.add(memoryview(data)[start * width : end * width], dtype, weight, first=index == 0)
        out += bytes(chunk.store(end - start, dtype)[0])
    return out


def accumulator_of(dtype: str) -> str:
    return "F64" if dtype == "F64" else "F32"


def output_rounding(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Half a unit in the last place of ``dtype`` at ``values``."""
    return np.maximum(np.abs(values) * 2.0 ** -SIGNIFICANT_BITS[dtype], SMALLEST[dtype] / 2)


# The weighted sum


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("method", "count"), [("sma", 2), ("sma", 10), ("wma", 15), ("ema", 10), ("ema", 100)])
def test_sum_is_within_the_documented_bound_of_the_float64_mean(dtype: str, method: str, count: int) -> None:
    inputs, weights = random_inputs(dtype, count), build_weights(method, count, 0.2)
    terms = np.stack([w * float64_of(data, dtype) for data, w in zip(inputs, weights, strict=True)])
    exact = terms.sum(axis=0)
    # The bound of the kernel's docstring; what the output dtype adds is rounding of a value that near the exact one.
    bound = (count + 2) * 2.0**-24 * np.abs(terms).sum(axis=0)
    if dtype != "F32":
        bound += output_rounding(np.abs(exact) + bound, dtype)
    error = np.abs(float64_of(merge(inputs, weights, dtype), dtype) - exact)
    assert (error <= bound).all()


def test_sum_of_float64_inputs_accumulates_in_float64() -> None:
    count, size = 7, 60
    inputs, weights = random_inputs("F64", count, size), build_weights("wma", count)
    columns = np.stack([float64_of(data, "F64") for data in inputs], axis=1)
    merged = float64_of(merge(inputs, weights, "F64", (0, size)), "F64")
    for values, got in zip(columns, merged, strict=True):
        terms = [Fraction(w) * Fraction(float(x)) for w, x in zip(weights, values, strict=True)]
        # As for float32, with float64's 2**-53; the weights need no rounding.
        assert abs(Fraction(float(got)) - sum(terms)) <= (count + 2) * Fraction(2) ** -53 * sum(map(abs, terms))


def test_sum_of_low_precision_inputs_keeps_what_their_own_dtype_would_lose() -> None:
    # 1 and 100 times 2**-8: adding one by one in bfloat16 stays at 1.
    inputs = [np.array([x], np.float32).view(np.uint32) >> 16 for x in [1.0] + [2.0**-8] * 100]
    data = [item.astype(np.uint16).tobytes() for item in inputs]
    chunk = new_sum(1, ["BF16"], None, "F32")
    for index, item in enumerate(data):
        chunk.add(memoryview(item), "BF16", 1.0, first=index == 0)
    assert np.frombuffer(chunk.store(1, "F32")[0], np.float32)[0] == 1 + 100 * 2.0**-8


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sum_of_equal_inputs_by_powers_of_two_is_exact(dtype: str) -> None:
    (data,) = random_inputs(dtype, 1)
    assert merge([data] * 4, [0.25] * 4, dtype) == data


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sum_zero_weight_is_a_weight(dtype: str) -> None:
    first, second = random_inputs(dtype, 2)
    assert merge([first, second], [0.0, 1.0], dtype) == second


def test_sum_is_taken_in_input_order() -> None:
    data = [np.array([x], np.float32).tobytes() for x in (2.0**24, 1.0, -(2.0**24))]
    # In float32, 2**24 + 1 is 2**24: the order shows.
    assert np.frombuffer(merge(data, [1.0] * 3, "F32", (0, 1)), np.float32)[0] == 0.0
    assert np.frombuffer(merge([data[0], data[2], data[1]], [1.0] * 3, "F32", (0, 1)), np.float32)[0] == 1.0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 999])
def test_sum_any_chunk_size_gives_the_same_bits(dtype: str, step: int) -> None:
    inputs, weights = random_inputs(dtype, 5), build_weights("ema", 5, 0.1)
    cut = [*range(0, SIZE, step), SIZE]
    assert merge(inputs, weights, dtype, cut) == merge(inputs, weights, dtype)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=12), dtype=st.sampled_from(FLOAT_DTYPES))
def test_sum_any_cut_gives_the_same_bits(cuts: set[int], dtype: str) -> None:
    inputs, weights = random_inputs(dtype, 3), build_weights("wma", 3)
    assert merge(inputs, weights, dtype, [0, *sorted(cuts), SIZE]) == merge(inputs, weights, dtype)


def test_sum_after_a_longer_chunk_starts_anew() -> None:
    chunk = new_sum(4, ["F32"], None, "F32")
    for values, weight, first in ([7.0] * 4, 1.0, True), ([1.0] * 2, 0.5, True), ([3.0] * 2, 0.5, False):
        chunk.add(memoryview(stored(values, "F32")), "F32", weight, first=first)
    assert np.frombuffer(chunk.store(2, "F32")[0], np.float32).tolist() == [2.0, 2.0]


# Rounding to the output dtype


def float32_patterns() -> NDArray[np.float32]:
    """Every upper half of a float32, with the lower halves around the ties of bfloat16."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    return (upper[:, None] | lower[None, :]).reshape(-1).view(np.float32)


def test_encode_bfloat16_is_torchs_rounding_for_every_finite_value() -> None:
    values = float32_patterns()
    finite = values[np.isfinite(values)]
    expected = torch.from_numpy(finite.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(encode(finite, "BF16"), expected)


def test_encode_float16_is_torchs_rounding_for_every_finite_value() -> None:
    values = float32_patterns()
    finite = values[np.isfinite(values)]
    expected = torch.from_numpy(finite.copy()).to(torch.float16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(encode(finite, "F16").view(np.uint16), expected)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_encode_float32_to_itself_or_wider_is_exact(dtype: str) -> None:
    values = np.array([0.1, -1e-40, 3e38, 0.0, -0.0], dtype=np.float32)
    stored = encode(values, dtype)
    assert stored.dtype == {"F32": np.float32, "F64": np.float64}[dtype]
    assert stored.astype(np.float32).tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_encode_float64_is_rounded_once(dtype: str) -> None:
    # Just above a tie of the output dtype, by less than float32 can tell.
    tie = 1 + 2.0 ** -SIGNIFICANT_BITS[dtype]
    stored = encode(np.array([tie + 2.0**-45, tie, tie - 2.0**-45]), dtype)
    assert stored.tolist() == [1 + 2.0 ** (1 - SIGNIFICANT_BITS[dtype]), 1.0, 1.0]


def test_encode_float64_to_bfloat16_is_rounded_once() -> None:
    stored = encode(np.array([1 + 2.0**-8 + 2.0**-40]), "BF16")
    assert float64_of(stored.tobytes(), "BF16").tolist() == [1 + 2.0**-7]


# Values that are not finite

NAN, INFINITY = float("nan"), float("inf")


def stored(values: Sequence[float], dtype: str) -> bytes:
    return torch.tensor(values, dtype=torch.float64).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("index", [0, 1, 4])
def test_first_nonfinite_finds_the_first(dtype: str, bad: float, index: int) -> None:
    values = [1.0, -2.0, 0.0, 1e-7, 3.0]
    values[index] = bad
    assert first_nonfinite_stored(stored([*values, NAN], dtype), dtype) == index


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_first_nonfinite_largest_and_smallest_values_are_finite(dtype: str) -> None:
    largest = torch.finfo(TORCH[dtype]).max
    assert first_nonfinite_stored(stored([largest, -largest, SMALLEST[dtype], -0.0], dtype), dtype) is None
    assert first_nonfinite_stored(b"", dtype) is None


@pytest.mark.parametrize("read", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("write", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_sum_nonfinite_input_shows_in_the_output(read: str, write: str, bad: float, position: int) -> None:
    chunk = new_sum(3, [read], None, accumulator_of(read))
    for index in range(3):
        data = stored([1.0, bad if index == position else 1.0, 1.0], read)
        chunk.add(memoryview(data), read, 1 / 3, first=index == 0)
    assert chunk.store(3, write)[1] == 1


@pytest.mark.parametrize(("write", "value"), [("F16", 65_520.0), ("BF16", 3.4e38), ("F32", 3.5e38)])
def test_encode_value_beyond_the_output_dtype_shows(write: str, value: float) -> None:
    wide = np.array([1.0, value], dtype=np.float64 if write == "F32" else np.float32)
    assert first_nonfinite(encode(wide, write), write) == 1


def test_encode_bfloat16_keeps_every_nonfinite_value_nonfinite() -> None:
    values = float32_patterns()
    bad = values[~np.isfinite(values)]
    kept = (encode(bad, "BF16") & 0x7F80) == 0x7F80
    assert kept.all()


@pytest.mark.parametrize(
    ("values", "weights"),
    [((INFINITY, -INFINITY), (0.5, 0.5)), ((INFINITY, 1.0), (0.0, 1.0)), ((3e38, 3e38), (1.0, 1.0))],
)
def test_sum_that_is_not_finite_is_found_without_a_warning(
    values: tuple[float, float], weights: tuple[float, float]
) -> None:
    chunk = new_sum(1, ["F32"], None, "F32")
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        chunk.add(memoryview(stored([value], "F32")), "F32", weight, first=index == 0)
    assert chunk.store(1, "F32")[1] == 0


@pytest.mark.parametrize("write", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 999])
@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.5), (None, None, None)])
def test_sum_of_bfloat16_in_words_gives_the_bits_of_the_plain_sum(
    size: int, write: str, weights: tuple[float | None, ...]
) -> None:
    inputs = random_inputs("BF16", 3, size)
    results = []
    for chunk in (Bfloat16Sum(size), PlainSum(size, None, "F32")):
        for index, (data, weight) in enumerate(zip(inputs, weights, strict=True)):
            chunk.add(memoryview(data), "BF16", weight, first=index == 0)
        scale = 1 / 3 if weights[0] is None else None
        results.append(bytes(chunk.store(size, write, scale)[0]))
    assert results[0] == results[1]


@pytest.mark.parametrize(("mixed", "accumulate"), [(("BF16", "F32", "F16"), "F32"), (("F64", "BF16"), "F64")])
def test_sum_inputs_of_different_dtypes_are_widened(mixed: tuple[str, ...], accumulate: str) -> None:
    inputs = [random_inputs(dtype, 1, SIZE, seed)[0] for seed, dtype in enumerate(mixed)]
    chunk = new_sum(SIZE, mixed, None, accumulate)
    for index, (data, dtype) in enumerate(zip(inputs, mixed, strict=True)):
        chunk.add(memoryview(data), dtype, 0.5, first=index == 0)
    exact = sum(0.5 * float64_of(data, dtype) for data, dtype in zip(inputs, mixed, strict=True))
    found = np.frombuffer(chunk.store(SIZE, accumulate)[0], np.float32 if accumulate == "F32" else np.float64)
    assert np.abs(found - exact).max() <= 5 * 2.0**-24 * np.abs(exact).max()


def test_sum_read_as_a_shorter_dtype_rounds_every_input_first() -> None:
    inputs = random_inputs("F32", 2)
    chunk = new_sum(SIZE, ["F32"], "BF16", "F32")
    for index, data in enumerate(inputs):
        chunk.add(memoryview(data), "F32", 0.5, first=index == 0)
    expected = sum(0.5 * torch.frombuffer(bytearray(d), dtype=torch.float32).bfloat16().float() for d in inputs)
    assert bytes(chunk.store(SIZE, "F32")[0]) == expected.numpy().tobytes()
