from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bpe_tokenizer import TEXT, train_bpe
from tokenizers import Tokenizer, models, processors

from configs.errors import UserError
from tasks.data.vocabulary import dtype_of, load_vocabulary


def test_byte_level_is_utf8_and_a_zero() -> None:
    vocabulary = load_vocabulary("bytes")
    ids = vocabulary.encode("aé")
    assert (vocabulary.size, vocabulary.end_of_document) == (256, 0)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [97, 0xC3, 0xA9, 0]


def test_byte_level_knows_text_that_would_end_early() -> None:
    vocabulary = load_vocabulary("bytes")
    assert vocabulary.problem_of("a\0b")
    assert vocabulary.problem_of("ab") is None


def test_byte_level_ends_with_zero_alone() -> None:
    assert load_vocabulary("bytes", "0").end_of_document == 0
    with pytest.raises(UserError, match="end with token 0, not '<eos>'"):
        load_vocabulary("bytes", "<eos>")


def test_tokenizer_file_encodes_as_the_library_and_adds_the_end(tmp_path: Path) -> None:
    trained = train_bpe(tmp_path / "tokenizer.json")
    vocabulary = load_vocabulary(str(tmp_path))
    assert vocabulary.size == trained.get_vocab_size()
    for text in TEXT:
        ids = vocabulary.encode(text)
        assert ids.dtype == np.dtype("<u2")
        assert ids[-1] == vocabulary.end_of_document == trained.token_to_id("<|endoftext|>")
        assert ids[:-1].tolist() == trained.encode(text).ids
        assert trained.decode(ids[:-1].tolist()) == text


def test_text_that_spells_the_end_does_not_end(tmp_path: Path) -> None:
    trained = train_bpe(tmp_path / "tokenizer.json")
    vocabulary = load_vocabulary(str(tmp_path / "tokenizer.json"))
    text = "one<|endoftext|>two"
    ids = vocabulary.encode(text).tolist()
    assert ids.count(vocabulary.end_of_document) == 1
    assert trained.decode(ids[:-1]) == text
    # The library alone would have made the special token of it.
    assert vocabulary.end_of_document in trained.encode(text).ids


def test_truncation_padding_and_templates_of_the_file_are_off(tmp_path: Path) -> None:
    trained = train_bpe(tmp_path / "plain.json")
    expected = trained.encode(TEXT[0]).ids
    trained.enable_truncation(4)
    trained.enable_padding(length=64)
    end = trained.token_to_id("<|endoftext|>")
    trained.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(str(tmp_path)).encode(TEXT[0]).tolist() == [*expected, end]


def test_end_of_document_by_name_and_id(tmp_path: Path) -> None:
    trained = train_bpe(tmp_path / "tokenizer.json", specials=("<eos>", "</s>", "<stop>"))
    with pytest.raises(UserError, match=r"which token ends a document.*'</s>', '<eos>'"):
        load_vocabulary(str(tmp_path))
    number = trained.token_to_id("<stop>")
    assert load_vocabulary(str(tmp_path), "<stop>").end_of_document == number
    assert load_vocabulary(str(tmp_path), number).end_of_document == number
    assert load_vocabulary(str(tmp_path), str(number)).end_of_document == number
    for wrong in ("<none>", 1 << 20, "99999"):
        with pytest.raises(UserError, match="has no token"):
            load_vocabulary(str(tmp_path), wrong)


def test_without_a_usual_end_one_must_be_named(tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json", specials=())
    with pytest.raises(UserError, match="none of the usual names"):
        load_vocabulary(str(tmp_path))


def test_digest_tells_file_and_end_apart(tmp_path: Path) -> None:
    for name, size in (("a", 300), ("b", 310)):
        train_bpe(tmp_path / f"{name}.json", specials=("<eos>", "</s>"), vocab_size=size)
    digests = {
        load_vocabulary(str(tmp_path / f"{name}.json"), end).digest for name in "ab" for end in ("<eos>", "</s>")
    }
    assert len(digests | {load_vocabulary("bytes").digest}) == 5
    assert load_vocabulary(str(tmp_path / "a.json"), "<eos>").digest in digests


def test_size_counts_gaps_between_ids(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<eos>": 70_000}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(str(tmp_path))
    assert vocabulary.size == 70_001
    assert vocabulary.encode("a").tolist() == [0, 70_000]


@pytest.mark.parametrize(
    ("size", "name"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (1 << 32, "uint32")]
)
def test_dtype_holds_the_vocabulary(size: int, name: str) -> None:
    assert dtype_of(size) == np.dtype(name)


def test_a_vocabulary_past_32_bits_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit"):
        dtype_of((1 << 32) + 1)


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "{}", json.dumps({"model": {"type": "?"}})])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_vocabulary(str(tmp_path))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json' does not exist"):
        load_vocabulary(str(tmp_path))
