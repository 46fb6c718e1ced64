"""The tokenizer file for models of bytes: transformers gives the ids that training gave."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks.data.byte_tokenizer import byte_tokenizer_files
from tasks.data.vocabulary import ByteLevel, build_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    for name, content in byte_tokenizer_files().items():
        (made / name).write_bytes(content)
    return made


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_ids_are_bytes_and_decode_to_the_text(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["", "a  b\n\n\tc ", "Ā", "<|endoftext|>", "é\u0301 漢字 🦀", "\0", " .", "'s n't ,"])
def test_awkward_text_is_kept(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode()), skip_special_tokens=False) == text


def test_end_of_document_is_end_of_sequence(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (ByteLevel.end_of_document, 256)


def test_file_is_a_vocabulary_that_data_can_name(folder: Path) -> None:
    """With the file as ``data.tokenizer`` a run reads the same ids as with bytes."""
    made = build_vocabulary((folder / "tokenizer.json").read_bytes(), 0, "tokenizer.json")
    assert made.encode("déjà\n").tolist() == ByteLevel().encode("déjà\n").tolist()
