"""The stream: which tokens stand where, for every kind of data, gang and skip."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from tasks.data.batches import permute
from tasks.data.held_out import held_out_batches
from tasks.data.packing import IGNORED_TARGET
from tasks.data.skips import SkipRange
from tasks.data.stream import TokenStream, open_stream
from tests.plain_text import held_out_slices, rank_batch, read_corpus
from tests.token_data import BATCH_SEQUENCES, END, SEQUENCE_LENGTH, config_of, windows_of, write_text, write_tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of text and two token files."""
    folder = tmp_path_factory.mktemp("stream")
    write_text(folder / "web")
    write_text(folder / "code", count=30, word="cat")
    write_tokens(folder / "a.bin", seed=1)
    write_tokens(folder / "b.bin", seed=2)
    return folder


def mixed(root: Path, *overrides: str) -> Config:
    rows = f"{{name: web, sources: [{root / 'web'}], weight: 3}},{{name: code, sources: [{root / 'code'}], weight: 1}}"
    return config_of(f"data.mixture=[{rows}]", *overrides)


def rows_of(stream: TokenStream, first: int, count: int, *skips: SkipRange) -> list[list[int]]:
    return stream.read(first, count, skips).tokens_BS1.tolist()


def names_of(stream: TokenStream, count: int) -> list[str]:
    """Domains of the first ``count`` sequences."""
    return [stream.domains[number].name for number in stream.mixture.assign(np.arange(count)).domains]


# What runs without any of the new settings always read


def test_stream_of_plain_text_is_what_rank_batch_reads(root: Path) -> None:
    config = config_of(f"data.sources=[{root / 'web'}]")
    stream, corpus = open_stream(config, "train"), read_corpus(config.data, "train")
    assert stream.digest == corpus.digest
    for step in (0, 1, 40, 10_000):
        for world_size in (1, 2, 4, 8):
            share = BATCH_SEQUENCES // world_size
            for rank in range(world_size):
                expected = rank_batch(corpus, config, step=step, rank=rank, world_size=world_size)
                batch = stream.read(step * BATCH_SEQUENCES + rank * share, share)
                assert np.array_equal(batch.tokens_BS1, expected)
                assert np.array_equal(batch.targets_BS, expected[:, 1:])
                assert np.array_equal(batch.inputs_BS, expected[:, :-1])
                assert (batch.tokens_BS1.dtype, batch.document_ids_BS, batch.position_ids_BS) == (np.int64, None, None)


def test_stream_known_values_never_change(tmp_path: Path) -> None:
    # Taken before there was a stream: a run that began then must go on with the same tokens.
    text = write_text(tmp_path / "text", repeats=30)
    config = load_config(
        "tiny",
        (
            f"data.sources=[{text}]", "data.held_out_fraction=0.3", "training.sequence_length=32",
            "training.batch_tokens=384", "training.total_tokens=2304", "snapshots.interval_tokens=768",
            "evaluation.slice_tokens=1024", "anneal.tokens=768", "schedule.warmup_tokens=768",
        ),
    ).config  # fmt: skip
    stream = open_stream(config, "train")
    assert stream.digest == "8d76f99318451260f2b7f555570aac5f0d0b45d7d5666b6f80525bbee0d44321"
    steps = [stream.read(step * 12 + 6, 6).tokens_BS1 for step in (0, 1, 5, 77, 1000)]
    found = hashlib.sha256(b"".join(np.ascontiguousarray(step).tobytes() for step in steps)).hexdigest()
    assert found == "61773ab926140ed1e8a1a9d6f77a57b5cab8f16c11073f48727ae40c59f8e240"
    slices = held_out_batches(open_stream(config, "held_out"), config)
    found = hashlib.sha256(b"".join(np.ascontiguousarray(each["all"].tokens_BS1).tobytes() for each in slices))
    assert found.hexdigest() == "0b42df2f0daf0cd556a6e1a17e836adecff05b780bc0f276fcb90de8a51406a8"
    for old, new in zip(held_out_slices(config), slices, strict=True):
        assert np.array_equal(old, new["all"].tokens_BS1)


def test_stream_of_the_embedded_default_is_what_rank_batch_reads() -> None:
    config = load_config("tiny").config
    stream, corpus = open_stream(config, "train"), read_corpus(config.data, "train")
    expected = rank_batch(corpus, config, step=4321, rank=1, world_size=2)
    assert np.array_equal(stream.read(4321 * 16 + 8, 8).tokens_BS1, expected)


# One position, whatever the gang, the place of beginning and the skips


@pytest.mark.parametrize("kind", ["plain", "mixture", "packed", "ordered", "tokens"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_of_any_world_size_read_one_global_batch(root: Path, kind: str, world_size: int) -> None:
    config = {
        "plain": config_of(f"data.sources=[{root / 'web'}]"),
        "mixture": mixed(root),
        "packed": mixed(root, "data.packing=documents"),
        "ordered": mixed(root, "data.shuffle=false"),
        "tokens": config_of(f"data.sources=[{root}/*.bin]"),
    }[kind]
    stream = open_stream(config, "train")
    for step in (0, 3, 500):
        whole, share = stream.read(step * BATCH_SEQUENCES, BATCH_SEQUENCES), BATCH_SEQUENCES // world_size
        for rank in range(world_size):
            mine = stream.read(step * BATCH_SEQUENCES + rank * share, share)
            wanted = whole.rows(rank * share, (rank + 1) * share)
            for field in ("tokens_BS1", "targets_BS", "document_ids_BS", "position_ids_BS"):
                assert np.array_equal(getattr(mine, field), getattr(wanted, field))


@pytest.fixture(scope="module")
def mixed_stream(root: Path) -> TokenStream:
    return open_stream(mixed(root), "train")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(first=st.integers(0, 5000), count=st.integers(1, 40), data=st.data())
def test_any_position_reads_the_same_from_anywhere(
    mixed_stream: TokenStream, first: int, count: int, data: st.DataObject
) -> None:
    ranges = data.draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 300)), max_size=3))
    skips = [SkipRange(at=at, count=length) for at, length in ranges]
    whole = rows_of(mixed_stream, first, count, *skips)
    cut = data.draw(st.integers(0, count))
    parts = rows_of(mixed_stream, first, cut, *skips), rows_of(mixed_stream, first + cut, count - cut, *skips)
    assert parts[0] + parts[1] == whole
    assert [rows_of(mixed_stream, first + n, 1, *skips)[0] for n in range(count)] == whole


def test_skips_leave_out_exactly_their_positions(root: Path) -> None:
    stream = open_stream(mixed(root), "train")
    unskipped = rows_of(stream, 0, 200)
    skips = (SkipRange(at=16, count=24), SkipRange(at=80, count=8))
    left = [row for position, row in enumerate(unskipped) if not 16 <= position < 40 and not 80 <= position < 88]
    assert rows_of(stream, 0, len(left), *skips) == left
    assert rows_of(stream, 30, 20, *skips) == left[30:50]


# Epochs and orders


def test_epochs_read_every_window_once_in_their_own_order(root: Path) -> None:
    stream = open_stream(config_of(f"data.sources=[{root / 'code'}]"), "train")
    windows = stream.num_windows
    corpus = read_corpus(config_of(f"data.sources=[{root / 'code'}]").data, "train")
    expected = sorted(windows_of(corpus.tokens.tolist()))
    epochs = [rows_of(stream, epoch * windows, windows) for epoch in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_and_seeds_read_other_batches(root: Path) -> None:
    streams = [open_stream(config_of(f"data.sources=[{root / 'web'}]", f"seed={seed}"), "train") for seed in (1, 2)]
    batches = [rows_of(streams[0], first, BATCH_SEQUENCES) for first in (0, BATCH_SEQUENCES)]
    assert batches[0] != batches[1]
    assert rows_of(streams[1], 0, BATCH_SEQUENCES) not in batches


def test_without_shuffling_windows_come_as_they_lie(root: Path) -> None:
    config = config_of(f"data.sources=[{root / 'code'}]", "data.shuffle=false")
    stream, corpus = open_stream(config, "train"), read_corpus(config.data, "train")
    expected = windows_of(corpus.tokens.tolist())
    assert rows_of(stream, 0, len(expected)) == expected
    assert rows_of(stream, len(expected), 3) == expected[:3]


# Mixtures


def test_mixture_is_its_domains_streams_dealt_by_the_weights(root: Path) -> None:
    """Oracle: walk the mixture from its begin, and each domain's windows by its own epochs and keys."""
    config = mixed(root)
    stream, seed = open_stream(config, "train"), config.seed
    texts = {}
    for name in ("web", "code"):
        corpus = read_corpus(config_of(f"data.sources=[{root / name}]").data, "train")
        texts[name] = windows_of(corpus.tokens.tolist())
    names, taken = names_of(stream, 1024), Counter[str]()
    by_stretch: dict[tuple[int, str], list[list[int]]] = {}
    for position, (name, row) in enumerate(zip(names, rows_of(stream, 0, 1024), strict=True)):
        by_stretch.setdefault((position // 256, name), []).append(row)
    for stretch in range(4):
        for name, windows in texts.items():
            rows = by_stretch[stretch, name]
            counters = range(taken[name], taken[name] + len(rows))
            expected = []
            for counter in counters:
                epoch, place = divmod(counter, len(windows))
                order = permute(np.array([place], dtype=np.int64), len(windows), f"{seed}/domain/{name}/{epoch}")
                expected.append(windows[int(order[0])])
            # Within a stretch of 256 the order is shuffled.
            assert sorted(rows) == sorted(expected)
            taken[name] += len(rows)
    assert taken == {"web": 768, "code": 256}


def test_mixture_without_shuffling_reads_each_domain_as_it_lies(root: Path) -> None:
    stream = open_stream(mixed(root, "data.shuffle=false"), "train")
    names, rows = names_of(stream, 40), rows_of(stream, 0, 40)
    assert [name == "code" for name in names] == [n % 4 == 2 for n in range(40)]
    for name in ("web", "code"):
        corpus = read_corpus(config_of(f"data.sources=[{root / name}]").data, "train")
        mine = [row for row, of in zip(rows, names, strict=True) if of == name]
        assert mine == windows_of(corpus.tokens.tolist())[: len(mine)]


def test_mixture_digest_tells_contents_and_weights_apart(root: Path) -> None:
    digests = {open_stream(mixed(root), "train").digest, open_stream(mixed(root), "held_out").digest}
    digests.add(open_stream(config_of(f"data.sources=[{root / 'web'}]"), "train").digest)
    other = f"data.mixture=[{{name: web, sources: [{root / 'web'}], weight: 2}},{{name: code, sources: [{root / 'code'}], weight: 1}}]"
    digests.add(open_stream(config_of(other), "train").digest)
    assert len(digests) == 4
    assert open_stream(mixed(root), "train").digest in digests


# Packing


def test_packed_batches_name_the_borders(root: Path) -> None:
    packed = open_stream(
        config_of(f"data.sources=[{root}/*.bin]", "data.packing=documents", f"data.end_of_document={END}"), "train"
    ).read(5, 30)
    if packed.document_ids_BS is None or packed.position_ids_BS is None:
        raise AssertionError("a packed batch has borders")
    assert (packed.document_ids_BS.max(axis=1) > 0).any()
    for tokens, targets, documents, positions in zip(
        packed.tokens_BS1.tolist(), packed.targets_BS.tolist(), packed.document_ids_BS.tolist(),
        packed.position_ids_BS.tolist(), strict=True,
    ):  # fmt: skip
        document = position = 0
        for place in range(SEQUENCE_LENGTH):
            assert (documents[place], positions[place]) == (document, position)
            is_end = tokens[place] == END
            assert targets[place] == (IGNORED_TARGET if is_end else tokens[place + 1])
            document, position = (document + 1, 0) if is_end else (document, position + 1)


def test_packing_of_text_takes_the_byte_between_documents(root: Path) -> None:
    config = config_of(f"data.sources=[{root / 'web'}]", "data.packing=documents", "data.shuffle=false")
    stream = open_stream(config, "train")
    plain = open_stream(config_of(f"data.sources=[{root / 'web'}]", "data.shuffle=false"), "train")
    batch = stream.read(0, stream.num_windows)
    assert np.array_equal(batch.tokens_BS1, plain.read(0, stream.num_windows).tokens_BS1)
    assert (batch.targets_BS == IGNORED_TARGET).sum() == (batch.inputs_BS == 0).sum() > 10


def test_packing_without_a_known_border_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"data.packing=documents: nothing says.*50256"):
        open_stream(config_of(f"data.sources=[{root}/a.bin]", "data.packing=documents"), "train")


# Too little, too large


def test_less_than_a_sequence_refused_by_domain(root: Path, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("a")
    with pytest.raises(UserError, match=r"data.sources hold \d+ training tokens, fewer than one sequence"):
        open_stream(config_of(f"data.sources=[{tmp_path}]"), "train")
    rows = f"{{name: web, sources: [{root / 'web'}], weight: 1}},{{name: small, sources: [{tmp_path}], weight: 1}}"
    with pytest.raises(UserError, match=r"data.mixture\[small\].sources hold"):
        open_stream(config_of(f"data.mixture=[{rows}]"), "train")


@pytest.mark.parametrize("position", [0, 300, 700])
def test_id_beyond_the_vocabulary_is_found_as_it_is_read_by_file_and_byte(tmp_path: Path, position: int) -> None:
    tokens = write_tokens(tmp_path / "a.bin")
    tokens[position] = 999
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    stream = open_stream(config_of(f"data.sources=[{tmp_path}/a.bin]", "data.shuffle=false"), "train")
    window = position // SEQUENCE_LENGTH
    if window:
        stream.read(0, window - 1)
    with pytest.raises(
        UserError, match=rf"a.bin, byte {2 * position:,}: token id 999 is not below model.vocab_size=256"
    ):
        stream.read(0, window + 1)


def test_negative_id_refused(tmp_path: Path) -> None:
    from tests.tasks.data.test_token_files import write_megatron

    write_megatron(tmp_path / "a", [np.array([1, 2, -3, 4] * 40)], [0, 1], "<i4")
    stream = open_stream(config_of(f"data.sources=[{tmp_path}/a]"), "train")
    with pytest.raises(UserError, match="token id -3 is not below"):
        stream.read(0, 1)
