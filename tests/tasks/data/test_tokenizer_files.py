"""The tokenizer in a snapshot, as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from configs.data import DataConfig
from configs.errors import UserError
from configs.model import ModelConfig
from pipelines.tokenize import tokenize
from tasks.data.tokenizer_files import run_vocabulary, tokenizer_files
from tasks.models.build import build_model_config
from tests.bpe_tokenizer import train_bpe
from tests.token_data import write_text, write_tokens

TEXTS = ("the cat sat on the mat", "größte 東京; def f(x):\n    return x\n", " leading, trailing  ")


def quiet(_: str) -> None:
    """Report nothing."""


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    """A snapshot's folder with these files beside its config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(build_model_config(ModelConfig(), 16).to_json_string(use_diff=False))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_byte_level_data_has_no_files() -> None:
    assert tokenizer_files(DataConfig()) == {}
    vocabulary = run_vocabulary(DataConfig())
    assert vocabulary is not None
    assert vocabulary.kind == "bytes"


@pytest.mark.parametrize("given", ["file", "folder", "token files"])
def test_transformers_loads_them_and_encodes_alike(tmp_path: Path, given: str) -> None:
    bpe = train_bpe(tmp_path / "tokenizer.json", specials=("<|endoftext|>", "<|pad|>"))
    data = {
        "file": DataConfig(tokenizer=str(tmp_path / "tokenizer.json")),
        "folder": DataConfig(tokenizer=str(tmp_path)),
        "token files": DataConfig(sources=(str(tmp_path / "out"),)),
    }[given]
    if given == "token files":
        source = str(write_text(tmp_path / "in", count=3))
        tokenize([source], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    loaded = AutoTokenizer.from_pretrained(lay_out(tmp_path / "snapshot", tokenizer_files(data)))
    assert loaded.eos_token == "<|endoftext|>"
    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert ids == bpe.encode(text).ids
        assert loaded.decode(ids) == text
    vocabulary = run_vocabulary(data)
    assert vocabulary is not None
    assert vocabulary.encode(TEXTS[0]).tolist() == [*bpe.encode(TEXTS[0]).ids, loaded.eos_token_id]


def test_what_lies_beside_the_tokenizer_is_taken_along(tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 77}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "notes.txt").write_text("not this")
    files = tokenizer_files(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    loaded = AutoTokenizer.from_pretrained(lay_out(tmp_path / "snapshot", files))
    assert loaded.model_max_length == 77
    assert loaded.chat_template == "{{ messages }}"


def test_relative_path_finds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    monkeypatch.chdir(tmp_path)
    for given in ("tokenizer.json", "."):
        files = tokenizer_files(DataConfig(tokenizer=given))
        assert files["tokenizer_config.json"] == b'{"model_max_length": 5}'


def test_bare_token_files_have_none(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin")
    data = DataConfig(sources=(str(tmp_path / "a.bin"),))
    assert tokenizer_files(data) == {}
    assert run_vocabulary(data) is None


def test_tokenizer_missing_from_the_token_files_refused(tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    source = str(write_text(tmp_path / "in", count=3))
    tokenize([source], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"out/tokenizer.json is missing; give the tokenizer as data.tokenizer"):
        tokenizer_files(DataConfig(sources=(str(tmp_path / "out"),)))


def test_bytes_of_ids_are_bytes_of_their_text(tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    vocabulary = run_vocabulary(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert vocabulary is not None
    for text in TEXTS:
        # The end of the document is no text.
        assert vocabulary.count_bytes(vocabulary.encode(text).astype(np.int64)) == len(text.encode())
    level = run_vocabulary(DataConfig())
    assert level is not None
    assert level.count_bytes(level.encode("größte").astype(np.int64)) == len("größte".encode()) + 1
