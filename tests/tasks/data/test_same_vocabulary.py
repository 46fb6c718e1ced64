"""Whether ids mean the same in a run's data and in the checkpoint that it begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.data import DataConfig
from tasks.checkpoints.reader import open_checkpoint
from tasks.data.same_vocabulary import vocabulary_misfits
from tests.bpe_tokenizer import train_bpe
from tests.token_data import write_text


@pytest.fixture
def checkpoint(save_folder: Callable[..., str]) -> Path:
    return Path(save_folder("checkpoint", {"a": torch.zeros(1)}))


def data_of(tmp_path: Path, tokenizer: str) -> DataConfig:
    return DataConfig(sources=(str(write_text(tmp_path / "text")),), tokenizer=tokenizer)


def found(tmp_path: Path, tokenizer: str, checkpoint: Path) -> list[str]:
    return vocabulary_misfits(data_of(tmp_path, tokenizer), open_checkpoint(str(checkpoint)))


def test_same_tokenizer_written_otherwise_is_the_same(tmp_path: Path, checkpoint: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (checkpoint / "tokenizer.json").write_text(json.dumps(values, indent=3))
    assert found(tmp_path, str(tmp_path / "tokenizer.json"), checkpoint) == []


def test_tokens_that_only_one_side_has_are_no_difference(tmp_path: Path, checkpoint: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    size = 1 + max(values["model"]["vocab"].values())
    values["model"]["vocab"]["<added>"] = size + 10
    (checkpoint / "tokenizer.json").write_text(json.dumps(values))
    assert found(tmp_path, str(tmp_path / "tokenizer.json"), checkpoint) == []


def test_ids_that_mean_something_else_are_named_with_the_cure(tmp_path: Path, checkpoint: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[60:62]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    values["model"]["merges"] = []
    (checkpoint / "tokenizer.json").write_text(json.dumps(values))
    (line,) = found(tmp_path, str(tmp_path / "tokenizer.json"), checkpoint)
    assert line.startswith("2 token ids mean something else: ")
    assert repr(first) in line
    assert line.endswith(f"give data.tokenizer={checkpoint}/tokenizer.json")


def test_bytes_for_a_checkpoint_with_a_tokenizer_are_a_difference(tmp_path: Path, checkpoint: Path) -> None:
    train_bpe(checkpoint / "tokenizer.json")
    (line,) = found(tmp_path, "bytes", checkpoint)
    assert "the data are read as bytes" in line


def test_checkpoint_without_a_tokenizer_says_nothing(tmp_path: Path, checkpoint: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    assert found(tmp_path, str(tmp_path / "tokenizer.json"), checkpoint) == []
