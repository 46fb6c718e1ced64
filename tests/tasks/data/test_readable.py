"""Mistakes in data that are found before any worker starts."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from pipelines.tokenize import tokenize
from tasks.data.readable import require_readable
from tasks.data.stream import open_stream
from tests.bpe_tokenizer import train_bpe
from tests.tasks.data.test_token_files import write_megatron
from tests.token_data import BATCH_SEQUENCES, SEQUENCE_LENGTH, config_of, windows_of, write_text, write_tokens


def quiet(_: str) -> None:
    """Report nothing."""


def test_good_data_of_every_kind_passes(tmp_path: Path) -> None:
    text = write_text(tmp_path / "in")
    train_bpe(tmp_path / "tokenizer.json")
    tokenize([str(text)], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    write_tokens(tmp_path / "a.bin")
    mixture = (
        f"data.mixture=[{{name: a, sources: [{text}], weight: 1}},{{name: b, sources: [{tmp_path}/out], weight: 2}}]"
    )
    for overrides in (
        (f"data.sources=[{text}]",),
        (f"data.sources=[{tmp_path}/a.bin]",),
        (f"data.sources=[{tmp_path}/out]", "data.packing=documents"),
        (mixture, f"data.tokenizer={tmp_path}/tokenizer.json"),
    ):
        require_readable(config_of(*overrides, vocab_size=300))


def test_vocabulary_larger_than_the_model_refused_with_both_sizes(tmp_path: Path) -> None:
    text = write_text(tmp_path / "in")
    bpe = train_bpe(tmp_path / "tokenizer.json")
    size = bpe.get_vocab_size()
    tokenize([str(text)], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"), report=quiet)
    for overrides in (
        (f"data.sources=[{text}]", f"data.tokenizer={tmp_path}/tokenizer.json"),
        (f"data.sources=[{tmp_path}/out]",),
    ):
        with pytest.raises(
            UserError, match=f"model.vocab_size={size - 1} is too small: .* ids up to {size - 1}; .*={size}"
        ):
            require_readable(config_of(*overrides, vocab_size=size - 1))
        require_readable(config_of(*overrides, vocab_size=size))


def test_bare_token_file_with_ids_beyond_the_model_refused_by_place(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "a.bin")
    tokens[123] = 5000
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    with pytest.raises(
        UserError, match=r"a.bin, byte 246: token id 5000 is not below model.vocab_size=256.*token_dtype"
    ):
        require_readable(config_of(f"data.sources=[{tmp_path}/a.bin]"))


def test_bare_file_is_looked_at_even_where_a_tokenizer_is_named(tmp_path: Path) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    write_tokens(tmp_path / "a.bin", top=5000)
    with pytest.raises(UserError, match=r"a.bin, byte \d+: token id \d+ is not below model.vocab_size=300"):
        require_readable(
            config_of(f"data.sources=[{tmp_path}/a.bin]", f"data.tokenizer={tmp_path}/tokenizer.json", vocab_size=300)
        )


def test_bare_file_of_other_integers_is_found_by_its_ids(tmp_path: Path) -> None:
    tokens = np.full(2000, 70_000, dtype="<u4")
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    with pytest.raises(UserError, match=r"token id 4464 .*data.token_dtype"):
        require_readable(config_of(f"data.sources=[{tmp_path}/a.bin]"))
    require_readable(config_of(f"data.sources=[{tmp_path}/a.bin]", "data.token_dtype=uint32", vocab_size=70_001))


@pytest.mark.parametrize("source", ["none", "none.bin", "none/*.jsonl", "none/*.bin"])
def test_missing_files_refused_by_name(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"none"):
        require_readable(config_of(f"data.sources=[{tmp_path}/{source}]"))


def test_too_little_held_out_data_refused_by_domain(tmp_path: Path) -> None:
    write_text(tmp_path / "web", count=60)
    write_tokens(tmp_path / "few.bin", documents=12)
    with pytest.raises(UserError, match=r"need 128 held-out tokens; there are \d+. Lower"):
        require_readable(config_of(f"data.sources=[{tmp_path}/few.bin]", "data.held_out_fraction=0.2"))
    mixture = f"data.mixture=[{{name: web, sources: [{tmp_path}/web], weight: 1}},{{name: few, sources: [{tmp_path}/few.bin], weight: 1}}]"
    with pytest.raises(UserError, match=r"need 128 held-out tokens of the domain 'few'"):
        require_readable(config_of(mixture, f"evaluation.slice_tokens={8 * SEQUENCE_LENGTH}"))
    with pytest.raises(UserError, match=r"are 1 sequences, fewer than the 2 domains"):
        require_readable(config_of(mixture, f"evaluation.slice_tokens={SEQUENCE_LENGTH}"))


def test_no_held_out_tokens_at_all_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"leave no held-out tokens at data.held_out_fraction=1e-05"):
        require_readable(config_of(f"data.sources=[{tmp_path}/a.bin]", "data.held_out_fraction=1e-5"))


def test_megatron_index_is_checked_whole_before_the_run_and_by_its_header_in_workers(tmp_path: Path) -> None:
    sequences = [np.arange(10, 60)] * 40
    write_megatron(tmp_path / "a", sequences, list(range(41)))
    config = config_of(f"data.sources=[{tmp_path}/a]")
    require_readable(config)
    expected = open_stream(config, "train").read(0, 8).tokens_BS1
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<q", index, 34 + 4 * 40 + 8 * 20, 12345)  # where sequence 20 begins
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(UserError, match="sequence 20 does not begin where"):
        require_readable(config)
    assert np.array_equal(open_stream(config, "train").read(0, 8).tokens_BS1, expected)
    (tmp_path / "a.idx").write_bytes(index[:-8])
    with pytest.raises(UserError, match="it is cut off"):
        open_stream(config, "train")


# Epochs


def needed_epochs(windows: int, total_steps: int) -> int:
    return -(-total_steps * BATCH_SEQUENCES // windows)


def test_epochs_too_few_for_the_run_refused_with_numbers(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "a.bin")
    source = f"data.sources=[{tmp_path}/a.bin]"
    windows = len(windows_of(tokens[: len(tokens) - int(len(tokens) * 0.2)].tolist()))
    epochs = needed_epochs(windows, 50)
    assert epochs >= 2
    require_readable(config_of(source))
    require_readable(config_of(source, f"data.epochs={epochs}"))
    with pytest.raises(
        UserError,
        match=rf"reads 400 sequences, but data.epochs={epochs - 1} of {windows} are {(epochs - 1) * windows}; give more data",
    ):
        require_readable(config_of(source, f"data.epochs={epochs - 1}"))


def test_epochs_may_be_used_up_to_the_last_window(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "a.bin")
    windows = len(windows_of(tokens[: len(tokens) - int(len(tokens) * 0.2)].tolist()))
    batch = SEQUENCE_LENGTH * BATCH_SEQUENCES
    # As many epochs as a batch has sequences are as many steps as there are windows.
    settings = (f"data.sources=[{tmp_path}/a.bin]", f"data.epochs={BATCH_SEQUENCES}")
    require_readable(config_of(*settings, f"training.total_tokens={windows * batch}"))
    with pytest.raises(UserError, match=r"data\.epochs"):
        require_readable(config_of(*settings, f"training.total_tokens={(windows + 1) * batch}"))


def test_epochs_are_counted_by_domain(tmp_path: Path) -> None:
    write_tokens(tmp_path / "large.bin", documents=900)
    tokens = write_tokens(tmp_path / "small.bin", documents=60)
    mixture = (
        f"data.mixture=[{{name: large, sources: [{tmp_path}/large.bin], weight: 1}},"
        f"{{name: small, sources: [{tmp_path}/small.bin], weight: 1}}]"
    )
    windows = len(windows_of(tokens[: len(tokens) - int(len(tokens) * 0.2)].tolist()))
    # Half of 400 sequences, in order of the mixture.
    epochs = -(-200 // windows)
    require_readable(config_of(mixture, "data.shuffle=false", f"data.epochs={epochs}"))
    with pytest.raises(UserError, match=rf"reads 200 sequences of the domain 'small', but data.epochs={epochs - 1} of"):
        require_readable(config_of(mixture, "data.shuffle=false", f"data.epochs={epochs - 1}"))
