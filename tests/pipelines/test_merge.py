"""``pma merge`` on plain folders: any way of running it gives the same bits, and mistakes are named first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.errors import UserError
from pipelines.merge_request import parse_bytes


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    urls = []
    for number in range(3):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        tensors = {
            "model.embed_tokens.weight": random.standard_normal((300, 101), dtype=np.float32),
            "model.layers.0.mlp.gate.weight": random.standard_normal((8, 101), dtype=np.float32),
            "model.norm.weight": random.standard_normal(101, dtype=np.float32),
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        urls.append(str(folder))
    return urls


def test_merge_threads_processes_and_budgets_give_the_same_digest(
    pma: Callable[..., Any], inputs: list[str], tmp_path: Path
) -> None:
    answers = []
    for number, options in enumerate([(), ("--workers", "2"), ("--memory-budget", "128KiB"), ("--workers", "1")]):
        output = str(tmp_path / f"out{number}")
        answers.append(pma("merge", "--output", output, "--method", "wma", "--json", *options, "--inputs", *inputs))
    assert [answer.code for answer in answers] == [0] * 4, [answer.stderr for answer in answers]
    assert len({answer.json["digest"] for answer in answers}) == 1
    assert answers[0].json["inputs"][0]["step"] is None
    assert len({item["digest"] for item in answers[0].json["inputs"]}) == 3
    assert answers[0].json["bytes_read"] == 3 * 4 * (300 * 101 + 8 * 101 + 101)
    assert answers[0].json["peak_memory_bytes"] > 0
    assert pma("verify", str(tmp_path / "out1")).code == 0
    files = sorted(path.name for path in (tmp_path / "out1").rglob("*") if path.is_file())
    assert files == ["manifest.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    again = pma("merge", "--output", str(tmp_path / "out1"), "--method", "wma", "--json", "--inputs", *inputs)
    assert (again.code, again.json["bytes_read"]) == (0, 0)
    assert again.json["digest"] == answers[0].json["digest"]


def test_merge_explicit_weights_count_zero_as_a_weight(
    pma: Callable[..., Any], inputs: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    answer = pma(
        "merge", "--output", str(output), "--method", "weights", "--weights", "0,0,1", "--json", "--inputs", *inputs
    )
    assert answer.code == 0, answer.stderr
    assert answer.json["weights"] == [0.0, 0.0, 1.0]
    merged, newest = (
        load_file(p / "model.safetensors") if (p / "model.safetensors").exists() else _shards(p)
        for p in (output, Path(inputs[2]))
    )
    assert merged.keys() == newest.keys()
    for name, value in newest.items():
        np.testing.assert_array_equal(merged[name], value)


def _shards(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for path in folder.glob("model-*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "weights", "--weights", "0.5,0.6,0.1"), "--allow-unnormalised"),
        (("--method", "weights", "--weights", "a,b,c"), "expected numbers"),
        (("--method", "weights"), "go together"),
        (("--weights", "0.5,0.25,0.25"), "go together"),
        (("--method", "wsm:cubic"), "'wsm:cubic' is not known"),
        (("--memory-budget", "1KiB"), "too small"),
        (("--memory-budget", "lots"), "32MiB"),
        (("--workers", "0"), "--workers '0'"),
        (("--dtype", "int4"), "'int4' is not known"),
    ],
)
def test_merge_mistake_exits_2_and_writes_nothing(
    pma: Callable[..., Any], inputs: list[str], tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    answer = pma("merge", "--output", str(tmp_path / "out"), "--json", *options, "--inputs", *inputs)
    assert answer.code == 2, answer.stderr
    assert expected in answer.json["message"]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_merge_into_a_folder_with_files_of_someone_else_touches_nothing(
    pma: Callable[..., Any], inputs: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("mine")
    answer = pma("merge", "--output", str(output), "--json", "--inputs", *inputs)
    assert answer.code == 2
    assert "config.json" in answer.json["message"]
    assert [path.name for path in output.rglob("*")] == ["config.json"]
    assert (output / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "expected"), [("17", 17), ("32MiB", 32 << 20), ("1GiB", 1 << 30), ("1.5 KiB", 1536), ("64MB", 64_000_000)]
)
def test_parse_bytes_reads_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1 PiB", "MiB", "1e9"])
def test_parse_bytes_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError):
        parse_bytes(text)
