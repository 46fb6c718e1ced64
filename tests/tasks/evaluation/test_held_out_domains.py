"""Held-out loss by domain, with borders, and in bits per byte, against logits taken one sequence at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from cluster.storage import open_store
from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.reader import open_checkpoint
from tasks.data.held_out import held_out_batches
from tasks.data.stream import open_stream
from tasks.data.tokenizer_files import run_vocabulary
from tasks.evaluation.held_out import HeldOutSuite, build_network, evaluation_key, read_evaluation, suite_of
from tasks.models.build import build_model
from tasks.models.weights import load_weights
from tests.bpe_tokenizer import train_bpe
from tests.chat_data import chat_config, pairs, train_chat_bpe, write_rows
from tests.token_data import END, SEQUENCE_LENGTH, config_of, write_text, write_tokens

# Float32 logits, summed in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_text(folder / "web", count=60)
    write_text(folder / "code", count=60, word="cat")
    write_tokens(folder / "a.bin", documents=200, top=250)
    return folder


def mixed(root: Path, *overrides: str) -> Config:
    rows = f"{{name: web, sources: [{root / 'web'}], weight: 3}},{{name: code, sources: [{root / 'code'}], weight: 1}}"
    return config_of(f"data.mixture=[{rows}]", "model.hidden_size=32", *overrides)


def save_network(config: Config, save_folder: Callable[..., str]) -> str:
    """Random weights as a Hugging Face folder."""
    network = build_model(config.model, SEQUENCE_LENGTH, seed=3)
    folder = Path(save_folder("network", {"unused": torch.zeros(1)}))
    network.save_pretrained(folder)
    return str(folder)


def losses_one_by_one(network: torch.nn.Module, batch: object) -> list[float]:
    """Loss of every target that counts, from one document at a time."""
    losses: list[float] = []
    for number in range(len(batch.tokens_BS1)):  # type: ignore[attr-defined]
        row = batch.rows(number, number + 1)  # type: ignore[attr-defined]
        inputs_S, targets_S = torch.tensor(row.inputs_BS[0]), torch.tensor(row.targets_BS[0])
        documents_S = np.zeros(SEQUENCE_LENGTH, int) if row.document_ids_BS is None else row.document_ids_BS[0]
        for document in np.unique(documents_S):
            chosen = torch.tensor(documents_S == document)
            with torch.inference_mode():
                logits_SV = network(input_ids=inputs_S[chosen][None], use_cache=False).logits[0].double()
            for logits_V, target in zip(logits_SV, targets_S[chosen].tolist(), strict=True):
                if target >= 0:
                    losses.append(float(torch.logsumexp(logits_V, 0) - logits_V[target]))
    return losses


@pytest.mark.parametrize("kind", ["plain", "mixture", "packed mixture", "packed tokens"])
def test_loss_is_that_of_each_document_alone(
    root: Path, kind: str, save_folder: Callable[..., str], tmp_path: Path
) -> None:
    config = {
        "plain": config_of(f"data.sources=[{root / 'web'}]", "model.hidden_size=32"),
        "mixture": mixed(root),
        "packed mixture": mixed(root, "data.packing=documents"),
        "packed tokens": config_of(
            f"data.sources=[{root}/a.bin]",
            "data.packing=documents",
            f"data.end_of_document={END}",
            "model.hidden_size=32",
        ),
    }[kind]
    url = save_network(config, save_folder)
    found = HeldOutSuite(str(tmp_path / "run"), config).evaluate(url)

    network = build_model(config.model, SEQUENCE_LENGTH).eval()
    load_weights(network, open_checkpoint(url))
    slices = held_out_batches(open_stream(config, "held_out"), config)
    losses = [{name: losses_one_by_one(network, batch) for name, batch in each.items()} for each in slices]
    expected = [np.mean([loss for found in each.values() for loss in found]) for each in losses]
    assert found.slices == pytest.approx(expected, abs=TOLERANCE)
    assert found.loss == pytest.approx(np.mean(expected), abs=TOLERANCE)
    assert found.tokens == sum(len(found) for each in losses for found in each.values())
    for name in slices[0]:
        assert found.domains[name] == pytest.approx(np.mean([np.mean(each[name]) for each in losses]), abs=TOLERANCE)
    assert set(found.domains) == ({"web", "code"} if "mixture" in kind else {"all"})
    if kind == "plain":
        assert found.bits_per_byte == found.loss / math.log(2)
    if kind == "packed tokens":
        assert found.bits_per_byte is None
    record = read_evaluation(open_store(str(tmp_path / "run")), found.digest, suite_of(config))
    assert record == found


def test_slices_hold_domains_by_weight_and_disjoint(root: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "b.bin", documents=200, seed=9)  # no two windows are alike
    rows = f"{{name: web, sources: [{root}/a.bin], weight: 3}},{{name: code, sources: [{tmp_path}/b.bin], weight: 1}}"
    config = config_of(f"data.mixture=[{rows}]", f"evaluation.slice_tokens={9 * SEQUENCE_LENGTH}")
    slices = held_out_batches(open_stream(config, "held_out"), config)
    # One each, then 3/4 and 1/4 of the other 7: 5.25 and 1.75.
    assert [{name: len(batch.tokens_BS1) for name, batch in each.items()} for each in slices] == [
        {"web": 6, "code": 3}
    ] * 2
    found = [row.tobytes() for each in slices for batch in each.values() for row in batch.tokens_BS1]
    assert len(set(found)) == 18


def test_bits_per_byte_of_a_tokenizer_counts_bytes_of_the_text(
    root: Path, save_folder: Callable[..., str], tmp_path: Path
) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    config = config_of(
        f"data.sources=[{root / 'web'}]",
        f"data.tokenizer={tmp_path}/tokenizer.json",
        "model.hidden_size=32",
        vocab_size=300,
    )
    found = HeldOutSuite(str(tmp_path / "run"), config).evaluate(save_network(config, save_folder))
    vocabulary = run_vocabulary(config.data)
    assert vocabulary is not None
    targets = [
        batch.targets_BS
        for each in held_out_batches(open_stream(config, "held_out"), config)
        for batch in each.values()
    ]
    text_bytes = sum(vocabulary.count_bytes(row) for rows in targets for row in rows)
    assert text_bytes > 1.2 * found.tokens  # more than letters
    # All slices have as many tokens, so the mean over slices is the mean over tokens.
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / text_bytes, rel=1e-12)


def test_loss_of_chat_rows_is_that_of_their_answers_alone(save_folder: Callable[..., str], tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs(80))
    config = chat_config(source)
    network = build_model(config.model, config.training.sequence_length, seed=3).eval()
    folder = Path(save_folder("network", {"unused": torch.zeros(1)}))
    network.save_pretrained(folder)
    found = HeldOutSuite(str(tmp_path / "run"), config).evaluate(str(folder))
    held_out = held_out_batches(open_stream(config, "held_out"), config)
    texts = [bytes(row.tolist()).decode() for each in held_out for row in each["all"].tokens_BS1]
    expected: list[list[float]] = [[], []]
    for number, text in enumerate(texts):
        # Oracle: each row by itself, cut out of the text by hand.
        for row in [f"User:\n{part}" for part in text.rstrip("\0").split("User:\n")[1:]]:
            tokens = torch.tensor(list(f"{row.rstrip(chr(0))}\0".encode()))
            with torch.inference_mode():
                logits_SV = network(input_ids=tokens[None, :-1], use_cache=False).logits[0].double()
            losses_S = torch.nn.functional.cross_entropy(logits_SV, tokens[1:], reduction="none")
            answer = row.index("Assistant:\n") + len("Assistant:\n")
            expected[number // (len(texts) // 2)] += losses_S[answer - 1 :].tolist()
    assert found.slices == pytest.approx([np.mean(losses) for losses in expected], abs=TOLERANCE)
    assert found.tokens == sum(map(len, expected))
    # A byte a token, the zero that ends an answer too.
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_bits_per_byte_of_chat_rows_are_over_bytes_of_answers(save_folder: Callable[..., str], tmp_path: Path) -> None:
    size = train_chat_bpe(tmp_path).get_vocab_size()
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{n}", "completion": f"{n}"} for n in range(80)])
    config = chat_config(source, f"data.tokenizer={tmp_path}", "data.chat_template=chatml", vocab_size=size)
    folder = Path(save_folder("network", {"unused": torch.zeros(1)}))
    build_model(config.model, config.training.sequence_length, seed=3).save_pretrained(folder)
    found = HeldOutSuite(str(tmp_path / "run"), config).evaluate(str(folder))
    rows = [batch for each in held_out_batches(open_stream(config, "held_out"), config) for batch in each.values()]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    answers = [tokenizer.decode(row[row >= 0].tolist()) for batch in rows for row in batch.targets_BS]
    # The token that ends a turn is predicted, and is no text.
    assert all(answer.isdigit() for answer in answers)
    assert found.bits_per_byte == pytest.approx(
        found.loss / math.log(2) * found.tokens / sum(len(answer) for answer in answers)
    )


def test_suite_of_older_configurations_is_what_it_was() -> None:
    assert suite_of(load_config("tiny").config) == "00a4d5a985086db2"
    # How training reads is nothing to what is measured.
    for override in ("data.shuffle=false", "data.epochs=3"):
        assert suite_of(load_config("tiny", (override,)).config) == "00a4d5a985086db2"


def test_suite_tells_apart_what_is_measured() -> None:
    row = "data.mixture=[{name: a, sources: [x], weight: 1}]"
    heavier = "data.mixture=[{name: a, sources: [x], weight: 2}]"
    overrides = (
        "data.held_out_fraction=0.3", "data.packing=documents", "data.tokenizer=t.json", "data.format=txt", row, heavier,
        "data.text_field=body", "data.end_of_document=3", "data.token_dtype=uint32",
    )  # fmt: skip
    chat = ("data.format=chat", "data.sources=[x]")
    rows = ("data.chat_template=plain", "data.chat_template=chatml", "data.long_rows=drop", "data.split_field=module")
    suites = {suite_of(load_config("tiny", (override,)).config) for override in overrides}
    suites |= {suite_of(load_config("tiny", (*chat, *more)).config) for more in ((), *((row,) for row in rows))}
    suites.add(suite_of(load_config("tiny", ("data.sources=[x]",)).config))
    assert len(suites) == len(overrides) + len(rows) + 2
    assert "00a4d5a985086db2" not in suites


def test_bits_per_byte_of_each_domain_is_its_loss_over_its_own_bytes(
    root: Path, save_folder: Callable[..., str], tmp_path: Path
) -> None:
    train_bpe(tmp_path / "tokenizer.json")
    tokenizer = f"data.tokenizer={tmp_path}/tokenizer.json"
    rows = f"{{name: web, sources: [{root / 'web'}], weight: 3}},{{name: code, sources: [{root / 'code'}], weight: 1}}"
    config = config_of(f"data.mixture=[{rows}]", tokenizer, "model.hidden_size=32", vocab_size=300)
    found = HeldOutSuite(str(tmp_path / "run"), config).evaluate(save_network(config, save_folder))
    vocabulary = run_vocabulary(config.data)
    assert vocabulary is not None
    slices = held_out_batches(open_stream(config, "held_out"), config)
    for name, loss in found.domains.items():
        targets = [row for each in slices for row in each[name].targets_BS]
        tokens, text_bytes = sum(map(len, targets)), sum(vocabulary.count_bytes(row) for row in targets)
        expected = loss * tokens / math.log(2) / text_bytes
        assert found.domain_bits_per_byte[name] == pytest.approx(expected, rel=1e-12)
    assert found.domain_bits_per_byte["web"] != pytest.approx(found.domain_bits_per_byte["code"], rel=1e-3)


def test_record_of_before_domains_had_bits_per_byte_is_read(
    root: Path, save_folder: Callable[..., str], tmp_path: Path
) -> None:
    config, store = mixed(root), open_store(str(tmp_path / "run"))
    found = HeldOutSuite(store.url, config).evaluate(save_network(config, save_folder))
    key = evaluation_key(found.digest, found.suite)
    values = json.loads(store.read(key))
    del values["domain_bits_per_byte"]
    store.put(key, json.dumps(values).encode())
    assert read_evaluation(store, found.digest, found.suite) == replace(found, domain_bits_per_byte={})


def test_bfloat16_is_another_suite_near_float32(root: Path, save_folder: Callable[..., str], tmp_path: Path) -> None:
    config = mixed(root)
    half = mixed(root, "evaluation.dtype=bfloat16")
    assert suite_of(mixed(root, "evaluation.dtype=float32")) == suite_of(config) != suite_of(half)
    url = save_network(config, save_folder)
    exact = HeldOutSuite(str(tmp_path / "run"), config).evaluate(url)
    network = build_network(half)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in {b.dtype for b in network.buffers()}
    rounded = HeldOutSuite(str(tmp_path / "run"), half).evaluate(url)
    # Weights of random networks are small and logits near 0, so that 8 bits of mantissa move the loss in its third digit at most.
    assert 0 < abs(rounded.loss - exact.loss) < 0.01
