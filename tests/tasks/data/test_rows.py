"""Rows of token files: sides, borders, places and identity, against the whole file in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data import rows as rows_module
from tasks.data.rows import (
    RowVocabulary,
    TokenFileRow,
    find_id_beyond,
    first_beyond,
    sample_digest,
    side_of,
)
from tasks.data.token_files import find_token_files
from tests.token_data import END, write_tokens

UNKNOWN = RowVocabulary(size=None, end_of_document=None, digest=None)


def sides(path: Path, fraction: float, end: int | None) -> tuple[list[int], list[int]]:
    """Both sides of one file, read whole."""
    (file,) = find_token_files(str(path)).files
    found = []
    for side in ("train", "held_out"):
        row = TokenFileRow([side_of(file, side, fraction=fraction, end_of_document=end)], UNKNOWN, None)  # type: ignore[arg-type]
        found.append(row.read_windows(np.array([0]), row.num_tokens)[0].tolist() if row.num_tokens else [])
        row.close()
    return found[0], found[1]


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.31, 0.9])
@pytest.mark.parametrize("end", [None, END])
def test_sides_are_the_file_cut_at_a_border(tmp_path: Path, fraction: float, end: int | None) -> None:
    tokens = write_tokens(tmp_path / "a.bin").tolist()
    train, held_out = sides(tmp_path / "a.bin", fraction, end)
    assert train + held_out == tokens
    exact = len(tokens) - int(len(tokens) * fraction)
    # The last border at or before the exact cut; without a known end the cut itself.
    expected = exact if end is None else max(n for n in range(exact + 1) if n == 0 or tokens[n - 1] == END)
    assert len(train) == (expected if exact < len(tokens) else len(tokens))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tokens=st.lists(st.sampled_from([END, 8, 9]), min_size=1, max_size=80), fraction=st.floats(0.01, 0.99))
def test_sides_of_any_file_are_all_of_it(
    tmp_path_factory: pytest.TempPathFactory, tokens: list[int], fraction: float
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.bin"
    path.write_bytes(np.array(tokens, dtype="<u2").tobytes())
    train, held_out = sides(path, fraction, END)
    assert train + held_out == tokens
    assert train
    assert len(held_out) >= int(len(tokens) * fraction)
    if held_out and END in tokens[: len(tokens) - int(len(tokens) * fraction)]:
        assert train[-1] == END


def test_border_far_before_the_cut_is_found_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_LOOKED_AT_ONCE", 16)
    tokens = np.full(1000, 9, dtype="<u2")
    tokens[99] = END
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    assert len(sides(tmp_path / "a.bin", 0.1, END)[0]) == 100
    monkeypatch.setattr(rows_module, "_LOOKED_BACK_TOKENS", 512)
    assert len(sides(tmp_path / "a.bin", 0.1, END)[0]) == 900


def test_windows_cross_files_and_places_name_file_and_byte(tmp_path: Path) -> None:
    tokens = [write_tokens(tmp_path / f"{name}.bin", documents=5, seed=n) for n, name in enumerate("abc")]
    files = find_token_files(f"{tmp_path}/*.bin").files
    row, whole = TokenFileRow(files, UNKNOWN, None), np.concatenate(tokens)
    starts = np.array([0, len(tokens[0]) - 3, len(tokens[0]), len(whole) - 20])
    expected = np.stack([whole[start : start + 20] for start in starts])
    assert np.array_equal(row.read_windows(starts, 20), expected)
    for position in (0, len(tokens[0]) - 1, len(tokens[0]), len(whole) - 1):
        url, byte = row.place_of(position).split(", byte ")
        at = int(byte.replace(",", ""))
        assert np.frombuffer(Path(url).read_bytes()[at : at + 2], "<u2")[0] == whole[position]


def test_place_of_the_held_out_tail_is_in_the_whole_file(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "a.bin")
    (file,) = find_token_files(str(tmp_path / "a.bin")).files
    row = TokenFileRow([side_of(file, "held_out", fraction=0.2, end_of_document=END)], UNKNOWN, None)
    assert row.place_of(0).endswith(f"byte {2 * (len(tokens) - row.num_tokens):,}")


def test_digest_is_of_content_not_of_place(tmp_path: Path) -> None:
    write_tokens(tmp_path / "here" / "a.bin")
    shutil.copytree(tmp_path / "here", tmp_path / "there")

    def digest(name: str, side: str = "train") -> str:
        (file,) = find_token_files(str(tmp_path / name / "a.bin")).files
        return TokenFileRow([side_of(file, side, fraction=0.2, end_of_document=None)], UNKNOWN, None).digest  # type: ignore[arg-type]

    assert digest("here") == digest("there") != digest("here", "held_out")
    changed = bytearray((tmp_path / "there" / "a.bin").read_bytes())
    changed[100] ^= 1
    (tmp_path / "there" / "a.bin").write_bytes(changed)
    assert digest("here") != digest("there")


def test_digest_of_files_with_a_manifest_tells_sides_apart(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin")
    (file,) = find_token_files(str(tmp_path / "a.bin")).files
    pieces = [side_of(file, side, fraction=0.2, end_of_document=None) for side in ("train", "held_out")]  # type: ignore[arg-type]
    assert len({TokenFileRow([piece], UNKNOWN, "content").digest for piece in pieces}) == 2
    assert len({TokenFileRow([pieces[0]], UNKNOWN, content).digest for content in ("one", "other")}) == 2


def test_sample_digest_sees_begin_middle_and_end_of_large_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_SAMPLED_TOKENS", 10)
    tokens = np.zeros(1000, dtype="<u2")
    digests = set()
    for place in (None, 0, 505, 999):
        changed = tokens.copy()
        if place is not None:
            changed[place] = 1
        (tmp_path / "a.bin").write_bytes(changed.tobytes())
        (file,) = find_token_files(str(tmp_path / "a.bin")).files
        digests.add(sample_digest(file))
    assert len(digests) == 4


@pytest.mark.parametrize("wrong", [0, 57, 199])
def test_find_id_beyond_looks_at_all_of_a_small_file(tmp_path: Path, wrong: int) -> None:
    tokens = np.full(200, 5, dtype="<u2")
    tokens[wrong] = 300
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    row = TokenFileRow(find_token_files(str(tmp_path / "a.bin")).files, UNKNOWN, None)
    assert find_id_beyond(row, 256) == wrong
    assert find_id_beyond(row, 301) is None


def test_first_beyond_is_the_first() -> None:
    assert first_beyond(np.array([[1, 2], [9, -1]]), 9) == 2
    assert first_beyond(np.array([[1, -2], [9, -1]]), 9) == 1
    assert first_beyond(np.array([[1, -2]]), 9) == 1
    assert first_beyond(np.array([[1, 8]]), 9) is None
    assert first_beyond(np.array([], dtype=np.int64), 9) is None
