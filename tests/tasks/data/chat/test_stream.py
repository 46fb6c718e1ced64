"""Chat rows as a stream: whole rows side by side and apart, answers alone as targets, the same from any position."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import Config
from tasks.data.batch import Batch
from tasks.data.chat.stream import ChatStream, open_chat_stream
from tasks.data.held_out import held_out_batches
from tasks.data.packing import IGNORED_TARGET
from tasks.data.readable import require_readable
from tasks.data.skips import SkipRange
from tasks.data.stream import open_stream
from tasks.data.tokenizer_files import tokenizer_files
from tasks.models.build import build_model
from tests.chat_data import BATCH_SEQUENCES, SEQUENCE_LENGTH, chat_config, pairs, train_chat_bpe, turns, write_rows

ROWS = [*pairs(80), *(turns(f"t{n}", f"a{n}", "mo", f"b{n}") for n in range(10))]
FIELDS = ("tokens_BS1", "targets_BS", "document_ids_BS", "position_ids_BS")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("chat") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def stream(source: Path) -> ChatStream:
    return open_chat_stream(chat_config(source), "train")


@pytest.fixture(scope="module")
def mixed(source: Path) -> ChatStream:
    other = write_rows(
        source.parent / "other.jsonl", [{"prompt": f"other {n}", "completion": "yes"} for n in range(40)]
    )
    rows = f"{{name: a, sources: [{source}], weight: 3}},{{name: b, sources: [{other}], weight: 1}}"
    config = chat_config(source, f"data.mixture=[{rows}]", "data.sources=[python://stdlib]")
    return open_chat_stream(config, "train")


def rows_in(batch: Batch) -> list[tuple[str, str]]:
    """(text, answers) of every row of a batch of bytes, cut by the numbers of documents."""
    assert batch.document_ids_BS is not None
    found = []
    for tokens, targets, documents in zip(batch.tokens_BS1, batch.targets_BS, batch.document_ids_BS, strict=True):
        for document in range(documents.max() + 1):
            places = np.flatnonzero(documents == document)
            # A row that fills a sequence has its last token after the inputs, as a target alone.
            last = places[-1] + 2 if places[-1] == len(documents) - 1 and targets[-1] >= 0 else places[-1] + 1
            answers = targets[places][targets[places] >= 0]
            found.append((bytes(tokens[places[0] : last].tolist()).decode(), bytes(answers.tolist()).decode()))
    return found


def expected_rows(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Oracle: the template written out by hand."""
    found = []
    for row in rows:
        said = [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"], row["completion"]]
        pieces = [f"User:\n{q}\nAssistant:\n{a}\0" for q, a in zip(said[::2], said[1::2], strict=True)]
        found.append(("\n".join(pieces), "".join(f"{answer}\0" for answer in said[1::2])))
    return found


def test_an_epoch_holds_every_row_of_its_side_once_and_nothing_else(source: Path, stream: ChatStream) -> None:
    held_out = open_chat_stream(chat_config(source), "held_out")
    both = rows_in(stream.read(0, stream.num_windows)) + rows_in(held_out.read(0, held_out.num_windows))
    rows = [(text, answers) for text, answers in both if text.strip("\0")]
    assert Counter(rows) == Counter(expected_rows(ROWS))
    # The rest is padding, and counts for nothing.
    assert all(not answers for text, answers in both if not text.strip("\0"))


def test_packed_sequence_is_known_to_the_letter(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "ab"},
        {"prompt": "r", "completion": "c"},
        {"prompt": "s", "completion": "d" * 29},
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    config = chat_config(source, "data.shuffle=false", "data.held_out_fraction=1e-9")
    batch = open_chat_stream(config, "train").read(0, 2)
    first, second = "User:\nq\nAssistant:\nab\0", "User:\nr\nAssistant:\nc\0"
    assert bytes(batch.tokens_BS1[0].tolist()).decode() == first + second + "\0" * (49 - 43)
    targets = [IGNORED_TARGET] * 48
    targets[18:21], targets[40:42] = b"ab\0", b"c\0"  # type: ignore[assignment]
    assert batch.targets_BS[0].tolist() == targets
    assert batch.document_ids_BS is not None
    assert batch.position_ids_BS is not None
    assert batch.document_ids_BS[0].tolist() == [0] * 22 + [1] * 21 + [2] * 5
    assert batch.position_ids_BS[0].tolist() == [*range(22), *range(21), *range(5)]
    # A row of S + 1 tokens: the last is a target alone.
    assert bytes(batch.tokens_BS1[1].tolist()).decode() == "User:\ns\nAssistant:\n" + "d" * 29 + "\0"
    assert batch.targets_BS[1, -1] == 0
    assert batch.document_ids_BS[1].tolist() == [0] * 48


def test_network_reads_packed_rows_as_it_reads_them_alone(stream: ChatStream, source: Path) -> None:
    network = build_model(chat_config(source).model, SEQUENCE_LENGTH).eval()
    batch = stream.read(0, 3)
    assert batch.document_ids_BS is not None
    assert batch.position_ids_BS is not None
    with torch.inference_mode():
        packed = network(
            input_ids=torch.tensor(batch.inputs_BS), position_ids=torch.tensor(batch.position_ids_BS), use_cache=False
        ).logits
        for number, documents in enumerate(batch.document_ids_BS):
            for document in range(documents.max() + 1):
                places = np.flatnonzero(documents == document)
                alone = network(input_ids=torch.tensor(batch.inputs_BS[number : number + 1, places]), use_cache=False)
                torch.testing.assert_close(packed[number, places], alone.logits[0], atol=1e-5, rtol=0)


# One position, whatever the gang, the place of beginning and the skips


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(first=st.integers(0, 500), count=st.integers(1, 20), data=st.data(), kind=st.sampled_from(["plain", "mixed"]))
def test_any_position_reads_the_same_from_anywhere(
    stream: ChatStream, mixed: ChatStream, first: int, count: int, data: st.DataObject, kind: str
) -> None:
    chosen = stream if kind == "plain" else mixed
    ranges = data.draw(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60)), max_size=2))
    skips = [SkipRange(at=at, count=length) for at, length in ranges]
    whole, cut = chosen.read(first, count, skips), data.draw(st.integers(0, count))
    for part, rows in (
        (chosen.read(first, cut, skips), whole.rows(0, cut)),
        (chosen.read(first + cut, count - cut, skips), whole.rows(cut, count)),
    ):
        for field in FIELDS:
            assert np.array_equal(getattr(part, field), getattr(rows, field))


def test_order_is_of_the_rows_the_seed_and_the_length_alone(source: Path, stream: ChatStream) -> None:
    again = open_chat_stream(chat_config(source, "training.num_workers=4", "training.micro_batches=2"), "train")
    other = open_chat_stream(chat_config(source, "seed=2"), "train")
    assert again.digest == stream.digest == other.digest
    assert np.array_equal(again.read(7, 30).tokens_BS1, stream.read(7, 30).tokens_BS1)
    assert not np.array_equal(other.read(7, 30).tokens_BS1, stream.read(7, 30).tokens_BS1)


def test_epochs_read_the_same_sequences_in_their_own_order(stream: ChatStream) -> None:
    count = stream.num_windows
    epochs = [stream.read(epoch * count, count).tokens_BS1.tolist() for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_unshuffled_rows_come_as_they_lie(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(30))
    stream = open_chat_stream(chat_config(source, "data.shuffle=false", "data.held_out_fraction=1e-9"), "train")
    found = [row for row in rows_in(stream.read(0, stream.num_windows)) if row[0].strip("\0")]
    assert found == expected_rows(pairs(30))


def test_mixture_gives_domains_their_shares(mixed: ChatStream) -> None:
    batch = mixed.read(0, 256)
    others = sum("other" in bytes(row.tolist()).decode() for row in batch.tokens_BS1)
    assert others == 64


def test_replaced_tokens_keep_rows_and_answers(stream: ChatStream) -> None:
    batch = stream.read(0, 4)
    poisoned = stream.replace_tokens(batch, (batch.tokens_BS1 + 1) % 256)
    assert np.array_equal(poisoned.targets_BS >= 0, batch.targets_BS >= 0)
    counted = batch.targets_BS >= 0
    assert np.array_equal(poisoned.targets_BS[counted], (batch.targets_BS[counted] + 1) % 256)
    assert np.array_equal(poisoned.inputs_BS, (batch.inputs_BS + 1) % 256)
    assert poisoned.document_ids_BS is batch.document_ids_BS


# Held-out slices, checks before a run, and what lands in snapshots


def test_held_out_slices_depend_on_no_seed_and_count_answers_alone(source: Path) -> None:
    def slices(*overrides: str) -> list[dict[str, Batch]]:
        config = chat_config(source, *overrides)
        return held_out_batches(open_stream(config, "held_out"), config)

    for one, other in zip(slices(), slices("seed=9"), strict=True):
        assert np.array_equal(one["all"].tokens_BS1, other["all"].tokens_BS1)
        counted = one["all"].targets_BS[one["all"].targets_BS >= 0]
        assert counted.tolist() == list("".join(answers for _, answers in rows_in(one["all"])).encode())


def test_good_rows_pass_and_say_what_they_come_to(source: Path, stream: ChatStream) -> None:
    training, held_out = require_readable(chat_config(source))
    count = sum(1 for text, _ in rows_in(stream.read(0, stream.num_windows)) if text.strip("\0"))
    padding = 1 - sum(len(row.tokens) for row in stream._rows) / (stream.num_windows * (SEQUENCE_LENGTH + 1))
    assert training.startswith(f"training: {count} chat rows in {stream.num_windows} sequences of {SEQUENCE_LENGTH}; ")
    assert f"; {padding:.1%} padding" in training
    assert held_out.startswith(f"held out: {len(ROWS) - count} chat rows")
    assert "left out" not in training


def test_rows_left_out_and_cut_are_counted_in_the_notes(tmp_path: Path) -> None:
    long = {"prompt": "q", "completion": "a" * 99}
    source = write_rows(tmp_path / "rows.jsonl", [*pairs(80), {**long, "prompt": "r"}, long])
    for policy, words in (("drop", "left out as too long"), ("truncate", "cut at the end")):
        notes = " ".join(require_readable(chat_config(source, f"data.long_rows={policy}")))
        counts = [int(note.split(f" rows {words}")[0].split()[-1]) for note in notes.split(";") if words in note]
        assert sum(counts) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.chat_template=null",), "needs a chat template, and data.tokenizer='bytes' brings none"),
        (("evaluation.slice_tokens=48000",), "need 96000 held-out tokens; there are"),
        (("data.epochs=1", f"training.total_tokens={500 * BATCH_SEQUENCES * 48}"), "data.epochs=1 of"),
        (("data.sources=[/nowhere/rows.jsonl]",), "data source '/nowhere/rows.jsonl' holds no files"),
    ],
)
def test_what_does_not_suffice_is_refused_before_a_run(source: Path, overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        require_readable(chat_config(source, *overrides))
    assert expected in str(caught.value)


def test_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    size = train_chat_bpe(tmp_path).get_vocab_size()
    source = write_rows(tmp_path / "rows.jsonl", pairs(80))
    overrides = (f"data.tokenizer={tmp_path}", "data.chat_template=chatml")
    require_readable(chat_config(source, *overrides, vocab_size=size))
    with pytest.raises(UserError, match=rf"model.vocab_size=\d+ is too small: .* ids up to {size - 1}|is not below"):
        require_readable(chat_config(source, *overrides, vocab_size=size - 1))


def files_of(config: Config) -> dict[str, bytes]:
    return tokenizer_files(config.data)


def test_snapshots_hold_the_template_that_was_trained_with(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_chat_bpe(tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", chat_template="old")
    overrides = (f"data.tokenizer={tmp_path}", "data.chat_template=chatml")
    files = files_of(chat_config("rows.jsonl", *overrides))
    (tmp_path / "out").mkdir()
    for name, content in files.items():
        (tmp_path / "out" / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = loaded.apply_chat_template(turns("q")["messages"], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert set(files_of(chat_config("rows.jsonl"))) == {"chat_template.jinja"}
