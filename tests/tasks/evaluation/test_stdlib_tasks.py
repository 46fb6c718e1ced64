"""The tasks that ship: what their rows are, and that the builder makes them."""

from __future__ import annotations

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from configs.load import load_config
from tasks.data.corpus import is_held_out
from tasks.evaluation import stdlib_tasks
from tasks.evaluation.stdlib_tasks import CHOICE_BYTES, TASKS, TEXT_BYTES, _before, held_out_files, write_tasks
from tasks.evaluation.task_files import SHIPPED

BUILT_WITH = "3.11.7"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.skipif(platform.python_version() != BUILT_WITH, reason=f"another library than that of Python {BUILT_WITH}")
def test_builder_makes_what_ships(tmp_path: Path) -> None:
    assert write_tasks(tmp_path, held_out_files()) == dict.fromkeys(TASKS, 240)
    for name in TASKS:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (SHIPPED / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_of_held_out_files_of_the_demo_and_fit_its_sequence(name: str) -> None:
    config = load_config("tiny").config
    for row in rows_of(name):
        assert is_held_out(row["place"].partition(":")[0], config.data.held_out_fraction)
        assert row["text"].isascii()
        assert len(row["text"]) <= TEXT_BYTES
        assert all(len(choice) <= CHOICE_BYTES for choice in row["choices"])
        assert len(row["text"]) + max(map(len, row["choices"])) <= config.training.sequence_length
        assert len(set(row["choices"])) == 2
    assert len({(row["text"], *row["choices"]) for row in rows_of(name)}) == 240


@pytest.mark.parametrize("name", TASKS)
def test_guessing_scores_a_half(name: str) -> None:
    answers = Counter(row["answer"] for row in rows_of(name))
    # Within three standard deviations of a fair coin; the brackets are balanced by construction.
    assert abs(answers[0] - 120) <= (0 if name == "brackets" else 24)


def test_right_choices_stand_in_the_library_and_wrong_ones_do_not_follow() -> None:
    texts = dict(held_out_files())
    for name in TASKS:
        for row in rows_of(name):
            source = texts[row["place"].partition(":")[0]]
            found = [row["text"] + choice in source for choice in row["choices"]]
            assert found == [place == row["answer"] for place in range(2)]


def test_brackets_close_what_is_open() -> None:
    for row in rows_of("brackets"):
        depth, closing = 0, row["choices"][row["answer"]]
        opening = {")": "(", "]": "["}[closing]
        for char in reversed(row["text"]):
            depth += {closing: 1, opening: -1}.get(char, 0)
            if depth < 0:
                break
        assert depth == -1, row


@pytest.mark.parametrize("name", TASKS)
def test_yaml_asks_the_rows_of_its_file(name: str) -> None:
    values = yaml.safe_load((SHIPPED / f"stdlib_{name}.yaml").read_text())
    assert values["task"] == f"stdlib_{name}"
    assert values["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
    assert {values["doc_to_text"], values["doc_to_choice"], values["doc_to_target"]} <= rows_of(name)[0].keys()


def test_files_too_small_to_ask_anything_give_no_rows() -> None:
    assert [list(build([("a.py", "x = 1\n")])) for build in TASKS.values()] == [[], [], []]


@settings(deadline=None)
@given(lines=st.lists(st.text("ab ", max_size=60), min_size=1), data=st.data())
def test_text_before_ends_there_and_begins_with_a_line_where_it_can(lines: list[str], data: st.DataObject) -> None:
    source = "\n".join(lines)
    end = data.draw(st.integers(0, len(source)))
    text = _before(source, end)
    assert source[:end].endswith(text)
    assert len(text) <= TEXT_BYTES
    start = end - len(text)
    if "\n" in source[max(0, end - TEXT_BYTES) : end - 1] or end <= TEXT_BYTES:
        assert start == 0 or source[start - 1] == "\n"


def test_held_out_fraction_is_the_default_of_runs() -> None:
    assert DataConfig().held_out_fraction == stdlib_tasks.HELD_OUT_FRACTION
