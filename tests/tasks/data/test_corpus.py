"""Reading a corpus: one fixed split, told apart from what is missing or empty."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest
from blake3 import blake3

from cluster.storage import open_store
from configs.data import STDLIB_SOURCE, DataConfig
from configs.errors import UserError
from tasks.data import corpus as corpus_module
from tasks.data.corpus import DOCUMENT_END, Corpus, is_held_out
from tasks.data.package_files import stdlib_files
from tests.plain_text import read_corpus

NUM_FILES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of small files, some of them in subfolders."""
    root = tmp_path / "corpus"
    for number in range(NUM_FILES):
        path = root / f"{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<document {number}>")
    return root


def documents(corpus: Corpus) -> list[bytes]:
    whole = corpus.tokens.tobytes()
    assert whole.endswith(bytes([DOCUMENT_END]))
    return whole.split(bytes([DOCUMENT_END]))[:-1]


def data_of(*sources: object, fraction: float = 0.25) -> DataConfig:
    return DataConfig(sources=tuple(map(str, sources)), held_out_fraction=fraction)


# The split


def test_split_sides_are_disjoint_and_together_everything(folder: Path) -> None:
    train, held_out = read_corpus(data_of(folder), "train"), read_corpus(data_of(folder), "held_out")
    assert set(documents(train)).isdisjoint(documents(held_out))
    everything = sorted(path.read_bytes() for path in folder.rglob("*.txt"))
    assert sorted(documents(train) + documents(held_out)) == everything
    assert (train.num_files, held_out.num_files) == (len(documents(train)), len(documents(held_out)))


def test_split_read_again_is_equal(folder: Path) -> None:
    first, second = read_corpus(data_of(folder), "train"), read_corpus(data_of(folder), "train")
    assert first.tokens.tobytes() == second.tokens.tobytes()
    assert first.digest == second.digest


def test_split_does_not_depend_on_where_the_folder_lies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = read_corpus(data_of(folder), "held_out")
    moved = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder, moved)
    monkeypatch.chdir(tmp_path)
    for source in (moved, f"{moved}/", f"file://{moved}", "elsewhere/deeper"):
        there = read_corpus(data_of(source), "held_out")
        assert (there.digest, there.tokens.tobytes()) == (here.digest, here.tokens.tobytes())


def test_split_does_not_depend_on_where_a_memory_folder_lies() -> None:
    digests = set()
    for _ in range(2):
        store = open_store(f"memory://{uuid.uuid4().hex}")
        for number in range(NUM_FILES):
            store.put(f"{number}.txt", b"<document %d>" % number)
        digests.add(read_corpus(data_of(store.url), "held_out").digest)
    assert len(digests) == 1


def test_split_larger_fraction_only_adds_files() -> None:
    paths = [f"{number}.txt" for number in range(2000)]
    sides = [{path for path in paths if is_held_out(path, fraction)} for fraction in (0.05, 0.1, 0.5)]
    assert sides[0] < sides[1] < sides[2]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_split_share_of_files_is_the_fraction(fraction: float) -> None:
    count = 10_000
    held_out = sum(is_held_out(f"{number}.txt", fraction) for number in range(count))
    # Five standard deviations of a binomial count; the hash is fixed, so this never varies.
    assert abs(held_out - fraction * count) < 5 * (count * fraction * (1 - fraction)) ** 0.5


def test_split_known_value_never_changes() -> None:
    # Another split would show held-out text of old runs to training.
    assert [number for number in range(30) if is_held_out(f"{number}.txt", 0.2)] == [3, 4, 8, 9, 18]


# What is read


def test_read_corpus_documents_are_in_order_of_relative_path(folder: Path) -> None:
    found = documents(read_corpus(data_of(folder), "train"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    assert found == [(folder / name).read_bytes() for name in names if not is_held_out(name, 0.25)]


def test_read_corpus_digest_is_of_paths_and_contents(folder: Path) -> None:
    corpus = read_corpus(data_of(folder), "train")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    lines = "".join(
        f"{name}\0{blake3((folder / name).read_bytes()).hexdigest()}\n" for name in names if not is_held_out(name, 0.25)
    )
    assert corpus.digest == blake3(lines.encode()).hexdigest()


def test_read_corpus_changed_file_changes_the_digest(folder: Path) -> None:
    before = read_corpus(data_of(folder), "train").digest
    name = next(p for p in folder.rglob("*.txt") if not is_held_out(p.relative_to(folder).as_posix(), 0.25))
    name.write_text("changed")
    assert read_corpus(data_of(folder), "train").digest != before


def test_read_corpus_glob_takes_matching_files_only(folder: Path) -> None:
    (folder / "0" / "extra.json").write_text("not this")
    corpora = [read_corpus(data_of(f"{folder}/0/*.txt", fraction=0.5), side) for side in ("train", "held_out")]
    found = [document for corpus in corpora for document in documents(corpus)]
    assert sorted(found) == sorted(path.read_bytes() for path in (folder / "0").glob("*.txt"))


def test_read_corpus_several_sources_are_joined(folder: Path) -> None:
    corpora = [read_corpus(data_of(folder / "0", folder / "1"), side) for side in ("train", "held_out")]
    found = [document for corpus in corpora for document in documents(corpus)]
    expected = [path.read_bytes() for part in ("0", "1") for path in (folder / part).glob("*.txt")]
    assert sorted(found) == sorted(expected)


def test_read_corpus_stdlib_has_both_sides_without_tests_or_packages() -> None:
    files = dict(stdlib_files())
    assert "json/decoder.py" in files
    assert not [name for name in files if "site-packages" in name or name.startswith("test/")]
    sides = {is_held_out(name, DataConfig().held_out_fraction) for name in files}
    assert (DataConfig().sources, sides) == ((STDLIB_SOURCE,), {True, False})


# What is missing


def test_read_corpus_missing_folder_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data source '.*missing' holds no files"):
        read_corpus(data_of(tmp_path / "missing"), "train")


def test_read_corpus_empty_folder_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data source '.*empty' holds no files"):
        read_corpus(data_of(tmp_path / "empty"), "train")


def test_read_corpus_one_missing_source_of_two_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        read_corpus(data_of(folder, tmp_path / "missing"), "train")


def test_read_corpus_glob_without_a_match_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="holds no files"):
        read_corpus(data_of(f"{folder}/*.parquet"), "train")


def test_read_corpus_empty_side_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one document")
    empty = "train" if is_held_out("only.txt", 0.5) else "held_out"
    with pytest.raises(UserError, match=f"leave no {empty.replace('_', '-')} text: 0 of 1 files.*give more files"):
        read_corpus(data_of(tmp_path, fraction=0.5), empty)


def test_read_corpus_files_without_text_refused(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(UserError, match="leave no train text"):
        read_corpus(data_of(tmp_path), "train")


def test_read_corpus_unreadable_file_refused_by_name(folder: Path) -> None:
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    side = "held_out" if is_held_out("dangling.txt", 0.25) else "train"
    with pytest.raises(UserError, match="dangling"):
        read_corpus(data_of(folder), side)


def test_read_corpus_more_text_than_memory_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_CORPUS_BYTES", 100)
    with pytest.raises(UserError, match="kept in memory"):
        read_corpus(data_of(folder), "train")
