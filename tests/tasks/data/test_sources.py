"""What sources name: formats by name, and the mistakes that are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from configs.data import DataConfig
from configs.errors import UserError
from pipelines.tokenize import tokenize
from tasks.data import corpus as corpus_module
from tasks.data.corpus import is_held_out, read_text
from tasks.data.domains import open_domains
from tasks.data.sources import find_sources
from tasks.data.vocabulary import load_vocabulary
from tests.bpe_tokenizer import train_bpe
from tests.token_data import write_text, write_tokens

TEXTS = [f"document number {number}" for number in range(60)]


def quiet(_: str) -> None:
    """Report nothing."""


def data_of(*sources: object, **fields: object) -> DataConfig:
    return DataConfig(sources=tuple(map(str, sources)), held_out_fraction=0.3, **fields)  # type: ignore[arg-type]


def documents_of(data: DataConfig, side: str) -> list[str]:
    """Documents of byte-level text on one side."""
    (domain,) = open_domains(data, side)  # type: ignore[arg-type]
    row = domain.row
    return bytes(row.tokens.tobytes()).decode().split("\0")[:-1]  # type: ignore[attr-defined]


def write_as(kind: str, folder: Path) -> Path:
    lines = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines)
        return folder / "a.jsonl"
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        return folder / "a.jsonl.gz"
    if kind == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
        return folder / "a.jsonl.zst"
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet", row_group_size=7)
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_documents_are_split_by_a_hash_of_their_text(tmp_path: Path, kind: str) -> None:
    source = write_as(kind, tmp_path)
    sides = {side: documents_of(data_of(source), side) for side in ("train", "held_out")}
    held_out = [text for text in TEXTS if is_held_out(f"document/{blake3(text.encode()).hexdigest()}", 0.3)]
    assert sides["held_out"] == held_out
    assert sides["train"] == [text for text in TEXTS if text not in held_out]
    assert 5 < len(held_out) < 35


def test_equal_documents_are_on_one_side_whatever_the_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train, held_out = (documents_of(data_of(tmp_path), side) for side in ("train", "held_out"))
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(TEXTS * 2)


def test_text_and_json_lines_in_one_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "in", count=30)
    (tmp_path / "in" / "z.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    found = documents_of(data_of(tmp_path / "in", text_field="body"), "train")
    names = sorted(path.name for path in (tmp_path / "in").glob("*.txt"))
    files = [(tmp_path / "in" / name).read_text() for name in names if not is_held_out(name, 0.3)]
    assert found[: len(files)] == files
    assert set(found[len(files) :]) < set(TEXTS)


def test_a_format_that_is_asked_for_goes_before_names(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.json").write_text(f'{{"not": "a line"}}\n{number}')
    found = documents_of(data_of(tmp_path, format="txt"), "train")
    assert '{"not": "a line"}\n7' in found + documents_of(data_of(tmp_path, format="txt"), "held_out")


def test_text_file_with_a_tokenizer_is_its_tokens_and_an_end(tmp_path: Path) -> None:
    bpe = train_bpe(tmp_path / "tokenizer.json")
    folder = write_text(tmp_path / "in")
    (domain,) = open_domains(data_of(folder, tokenizer=str(tmp_path / "tokenizer.json")), "held_out")
    expected: list[int] = []
    for name in sorted(path.name for path in folder.iterdir()):
        if is_held_out(name, 0.3):
            expected += [*bpe.encode((folder / name).read_text()).ids, bpe.token_to_id("<|endoftext|>")]
    assert domain.row.tokens.tolist() == expected  # type: ignore[attr-defined]
    assert domain.row.vocabulary.end_of_document == bpe.token_to_id("<|endoftext|>")


def test_tokenizer_is_part_of_the_digest(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "in")
    digests = {open_domains(data_of(folder), "train")[0].row.digest}
    for size in (270, 300):
        train_bpe(tmp_path / f"{size}.json", vocab_size=size)
        digests.add(open_domains(data_of(folder, tokenizer=str(tmp_path / f"{size}.json")), "train")[0].row.digest)
    assert len(digests) == 3


# Token files


def test_folder_of_tokenize_prefix_bin_and_glob_are_tokens(tmp_path: Path) -> None:
    tokenize([str(write_text(tmp_path / "in"))], str(tmp_path / "out"), report=quiet)
    write_tokens(tmp_path / "plain" / "a.bin")
    write_tokens(tmp_path / "plain" / "b.bin")
    stem = str(tmp_path / "out" / "tokens-00000-00000")
    folder = str(tmp_path / "plain")
    for source, expected in (
        (str(tmp_path / "out"), (str(tmp_path / "out"),)),
        (stem, (stem,)),
        (f"{stem}.idx", (f"{stem}.idx",)),
        (f"{folder}/*.bin", (f"{folder}/*.bin",)),
        (folder, (f"{folder}/a.bin", f"{folder}/b.bin")),
    ):
        found = find_sources([source], DataConfig(), "data.sources")
        assert (found.texts, found.tokens) == ((), expected)


def test_unfinished_folder_of_tokenize_refused(tmp_path: Path) -> None:
    tokenize([str(write_text(tmp_path / "in"))], str(tmp_path / "out"), report=quiet)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="it was not finished"):
        open_domains(data_of(tmp_path / "out"), "train")


def test_folder_of_text_with_a_manifest_json_of_its_own_is_text(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "in")
    (folder / "manifest.json").write_text('{"text": "a manifest of something else"}')
    assert len(find_sources([str(folder)], DataConfig(), "data.sources").texts) == 41


def test_text_and_tokens_in_one_domain_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "in")
    write_tokens(tmp_path / "a.bin")
    for sources in ((tmp_path / "in", tmp_path / "a.bin"), (tmp_path,)):
        with pytest.raises(
            UserError, match=r"data.sources=.*hold text \(.*txt\) and token files \(.*a.bin\).*two domains"
        ):
            open_domains(data_of(*sources), "train")


@pytest.mark.parametrize("name", ["a.npy", "a.tar", "a.safetensors"])
def test_files_that_are_neither_refused(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / "in")
    (tmp_path / "in" / name).write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=f"{name} is neither text nor a flat token file"):
        open_domains(data_of(tmp_path / "in"), "train")


def test_too_much_text_for_every_worker_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    folder = write_text(tmp_path / "in")
    monkeypatch.setattr(corpus_module, "MAX_TOKENIZED_BYTES", 1000)
    with pytest.raises(UserError, match=r"every worker would tokenize again.*pma tokenize SOURCES --output URL"):
        open_domains(data_of(folder, tokenizer=str(tmp_path / "tokenizer.json")), "train")


def test_document_with_a_zero_byte_refused_for_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n}\0"}) + "\n" for n in range(20)))
    with pytest.raises(UserError, match=r"a.jsonl, line \d+: it holds a zero byte"):
        open_domains(data_of(tmp_path), "train")


def test_json_lines_without_the_field_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1: has no field 'text' \(fields: 'body'\)"):
        open_domains(data_of(tmp_path), "train")


# Vocabularies


def test_token_folders_of_two_tokenizers_refused(tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "in"))
    for size in (270, 300):
        train_bpe(tmp_path / f"{size}.json", vocab_size=size)
        tokenize([text], str(tmp_path / f"out{size}"), tokenizer=str(tmp_path / f"{size}.json"), report=quiet)
    with pytest.raises(UserError, match="token files of different vocabularies do not go together"):
        open_domains(data_of(tmp_path / "out270", tmp_path / "out300"), "train")
    mixture = tuple({"name": f"a{n}", "sources": [str(tmp_path / f"out{n}")], "weight": 1.0} for n in (270, 300))
    with pytest.raises(UserError, match=r"different vocabularies.*data.mixture\[a270\].sources"):
        open_domains(DataConfig(mixture=mixture), "train")  # type: ignore[arg-type]


def test_token_folder_beside_another_tokenizer_or_bytes_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path / "in")
    train_bpe(tmp_path / "tokenizer.json")
    train_bpe(tmp_path / "other.json", vocab_size=280)
    tokenize([str(text)], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    with pytest.raises(UserError, match=r"data.tokenizer=.*other.json.*is not the one"):
        open_domains(data_of(tmp_path / "out", tokenizer=str(tmp_path / "other.json")), "train")
    same = open_domains(data_of(tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json")), "train")
    assert same[0].row.vocabulary == open_domains(data_of(tmp_path / "out"), "train")[0].row.vocabulary
    mixture = tuple({"name": name, "sources": [str(tmp_path / name)], "weight": 1.0} for name in ("in", "out"))
    with pytest.raises(UserError, match="different vocabularies"):
        open_domains(DataConfig(mixture=mixture), "train")  # type: ignore[arg-type]


def test_text_and_token_folder_of_one_tokenizer_mix(tmp_path: Path) -> None:
    text = write_text(tmp_path / "in")
    train_bpe(tmp_path / "tokenizer.json")
    tokenize([str(text)], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    mixture = tuple({"name": name, "sources": [str(tmp_path / name)], "weight": 1.0} for name in ("in", "out"))
    data = DataConfig(mixture=mixture, tokenizer=str(tmp_path / "tokenizer.json"))  # type: ignore[arg-type]
    assert [domain.name for domain in open_domains(data, "train")] == ["in", "out"]


def test_missing_tokenizer_refused_by_key_and_path(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.tokenizer, data.end_of_document: data file '.*none.json' does not exist"
    ):
        open_domains(data_of(write_text(tmp_path / "in"), tokenizer=str(tmp_path / "none.json")), "train")


def test_end_of_document_of_token_files_is_an_id(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin")
    with pytest.raises(UserError, match="token files know ids only"):
        open_domains(data_of(tmp_path / "a.bin", end_of_document="</s>"), "train")
    tokenize([str(write_text(tmp_path / "in"))], str(tmp_path / "out"), report=quiet)
    with pytest.raises(UserError, match=r"data.end_of_document='9', but .*out ends documents with 0"):
        open_domains(data_of(tmp_path / "out", end_of_document="9"), "train")


def test_read_text_names_its_domain(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.mixture\[web\].sources leave no train text: 0 of 0 files"):
        read_text([], load_vocabulary("bytes"), DataConfig(), "train", key="data.mixture[web].sources")
