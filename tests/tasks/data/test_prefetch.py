"""Reading ahead: the same rows in the same order, errors where they belong, nothing left behind."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import StorageError
from cluster.storage import open_store
from tasks.data.batch import Batch
from tasks.data.prefetch import Prefetcher
from tasks.data.skips import SkipRange
from tasks.data.stream import TokenStream, open_stream
from tests.token_data import BATCH_SEQUENCES, config_of, write_tokens

PATIENCE_SECONDS = 30


class Watched(TokenStream):
    """A stream that notes its reads, and waits or fails where a test says so."""

    def __init__(self, stream: TokenStream) -> None:
        self.inner = stream
        self.reads: list[int] = []
        self.fail_at: int | None = None
        self.began = threading.Semaphore(0)
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, first_sequence: int, count: int, skips: object = ()) -> Batch:
        self.reads.append(first_sequence)
        self.began.release()
        assert self.may_read.wait(PATIENCE_SECONDS)
        if first_sequence == self.fail_at:
            raise StorageError("s3://bucket/a.bin: failed on purpose")
        return self.inner.read(first_sequence, count, skips)  # type: ignore[arg-type]


@pytest.fixture
def stream(tmp_path: Path) -> Watched:
    write_tokens(tmp_path / "a.bin")
    return Watched(open_stream(config_of(f"data.sources=[{tmp_path}/a.bin]"), "train"))


def start(stream: TokenStream, first_step: int = 0, **options: object) -> Prefetcher:
    defaults = {"batch_sequences": BATCH_SEQUENCES, "rank": 0, "world_size": 1}
    return Prefetcher(stream, first_step=first_step, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 4])
def test_ranks_take_the_rows_of_the_stream(stream: Watched, depth: int, world_size: int) -> None:
    skips = (SkipRange(at=30, count=16),)
    share = BATCH_SEQUENCES // world_size
    for rank in range(world_size):
        with start(stream, 2, rank=rank, world_size=world_size, depth=depth, skips=skips) as prefetcher:
            for step in range(2, 12):
                expected = stream.inner.read(step * BATCH_SEQUENCES + rank * share, share, skips)
                assert np.array_equal(prefetcher.take(step).tokens_BS1, expected.tokens_BS1)


def test_next_steps_are_read_while_one_is_used(stream: Watched) -> None:
    with start(stream, depth=3) as prefetcher:
        prefetcher.take(0)
        # Nobody asks for the steps 1 to 3.
        for _ in range(4):
            assert stream.began.acquire(timeout=PATIENCE_SECONDS)
    assert stream.reads == [0, 8, 16, 24]


def test_depth_is_how_far_ahead_it_reads(stream: Watched) -> None:
    stream.may_read.clear()
    prefetcher = start(stream, depth=2)
    assert len(prefetcher._running) == 2
    stream.may_read.set()
    prefetcher.take(0)
    assert len(prefetcher._running) == 2
    prefetcher.close()
    assert stream.reads in ([0, 8], [0, 8, 16])


def test_nothing_is_read_beyond_the_last_step(stream: Watched) -> None:
    with start(stream, depth=4, end_step=2) as prefetcher:
        prefetcher.take(0)
        prefetcher.take(1)
    assert stream.reads == [0, 8]


def test_a_step_beyond_the_last_can_still_be_asked_for(stream: Watched) -> None:
    with start(stream, depth=2, end_step=1) as prefetcher:
        prefetcher.take(0)
        assert np.array_equal(prefetcher.take(1).tokens_BS1, stream.inner.read(8, 8).tokens_BS1)


def test_error_comes_where_its_step_is_taken_and_the_step_can_be_tried_again(stream: Watched) -> None:
    stream.fail_at = 16
    with start(stream, depth=3) as prefetcher:
        prefetcher.take(0)
        prefetcher.take(1)
        with pytest.raises(StorageError, match=r"s3://bucket/a.bin"):
            prefetcher.take(2)
        stream.fail_at = None
        for step in (2, 3, 4):
            expected = stream.inner.read(step * 8, 8).tokens_BS1
            assert np.array_equal(prefetcher.take(step).tokens_BS1, expected)


def test_steps_out_of_turn_refused(stream: Watched) -> None:
    with start(stream, 3) as prefetcher:
        with pytest.raises(ValueError, match="step 4 was asked for, 3 is next"):
            prefetcher.take(4)
        prefetcher.take(3)


def test_close_leaves_no_thread_and_starts_no_read(stream: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    stream.may_read.clear()
    prefetcher = start(stream, depth=5)
    assert stream.began.acquire(timeout=PATIENCE_SECONDS)
    wait_for_threads = prefetcher._pool.shutdown

    def let_the_read_end() -> None:
        stream.may_read.set()
        wait_for_threads()

    monkeypatch.setattr(prefetcher._pool, "shutdown", let_the_read_end)
    prefetcher.close()
    assert stream.reads == [0]
    assert threading.active_count() == before


def test_ranks_that_do_not_share_a_batch_refused(stream: Watched) -> None:
    with pytest.raises(ValueError, match="8 sequences cannot be shared by 3 ranks"):
        start(stream, world_size=3)
    with pytest.raises(ValueError, match="at least one step"):
        start(stream, depth=0)


# Object storage


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return "s3://runs/prefetch"


def test_token_files_on_s3_are_read_by_range_and_ahead(s3: str, tmp_path: Path) -> None:
    overrides = ("data.packing=documents", "data.end_of_document=7")
    store = open_store(s3)
    for number, name in enumerate(("a.bin", "b.bin")):
        write_tokens(tmp_path / name, seed=number)
        store.put(name, (tmp_path / name).read_bytes())
    here = open_stream(config_of(f"data.sources=[{tmp_path}/*.bin]", *overrides), "train")
    there = open_stream(config_of(f"data.sources=[{s3}/*.bin]", *overrides), "train")
    assert there.digest == here.digest
    with start(there, 5, rank=1, world_size=2) as prefetcher:
        for step in range(5, 20):
            batch, expected = prefetcher.take(step), here.read(step * 8 + 4, 4)
            assert np.array_equal(batch.tokens_BS1, expected.tokens_BS1)
            assert np.array_equal(batch.targets_BS, expected.targets_BS)
    with start(there, 20) as prefetcher:
        for name in ("a.bin", "b.bin"):
            store.put(name, b"")
        with pytest.raises(StorageError, match=r"s3://runs/prefetch/[ab].bin"):  # noqa: PT012  some steps were read before
            for step in range(20, 30):
                prefetcher.take(step)
    there.close()
