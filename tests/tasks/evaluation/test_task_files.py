"""Tasks by name and by file, and what their fingerprint covers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from tasks.evaluation.harness import fingerprint_of
from tasks.evaluation.task_files import SHIPPED, find_tasks, shipped_names

TASK = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
process_docs: !function functions.clean
include: common.yaml
"""
GROUP = "group: ours\ntask: [mine, stdlib_words]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "mine.yaml": TASK, "common.yaml": "output_type: multiple_choice\n", "functions.py": "x = 1\n", "rows.jsonl": "{}\n",
        "group.yaml": GROUP, "unrelated.txt": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_shipped_tasks_go_by_name() -> None:
    assert shipped_names() == ["stdlib_brackets", "stdlib_typos", "stdlib_words"]
    (task,) = find_tasks("stdlib_words")
    assert (task.name, task.folder, set(task.files)) == ("stdlib_words", SHIPPED, {"stdlib_words.yaml", "words.jsonl"})


def test_files_folders_and_other_names(folder: Path) -> None:
    assert [task.name for task in find_tasks(f"{folder}/mine.yaml, hellaswag")] == ["mine", "hellaswag"]
    # What is only included is no task.
    assert [task.name for task in find_tasks(str(folder))] == ["ours", "mine"]
    assert find_tasks("hellaswag")[0].folder is None


def test_closure_holds_every_file_that_decides(folder: Path) -> None:
    own = {"mine.yaml", "common.yaml", "functions.py", "rows.jsonl"}
    assert set(find_tasks(f"{folder}/mine.yaml")[0].files) == own
    assert set(find_tasks(f"{folder}/group.yaml")[0].files) == own | {"group.yaml"}


@pytest.mark.parametrize("name", ["mine.yaml", "common.yaml", "functions.py", "rows.jsonl"])
def test_fingerprint_changes_with_every_one_of_them_and_with_nothing_else(folder: Path, name: str) -> None:
    def now() -> str:
        return fingerprint_of(find_tasks(f"{folder}/mine.yaml")[0], "0.4.13", "float32")

    before = now()
    (folder / "unrelated.txt").write_text("changed")
    assert now() == before
    path = folder / name
    path.write_text(path.read_text() + "\n# changed\n")
    assert now() != before


def test_fingerprint_tells_harness_and_dtype_apart() -> None:
    (task,) = find_tasks("stdlib_words")
    seen = {fingerprint_of(task, version, dtype) for version in ("0.4.13", "0.5") for dtype in ("float32", "bfloat16")}
    assert len(seen) == 4


def no_data(folder: Path) -> str:
    (folder / "rows.jsonl").unlink()
    return str(folder / "mine.yaml")


def no_yaml(folder: Path) -> str:
    (folder / "mine.yaml").write_text("task: [")
    return str(folder / "mine.yaml")


def a_list(folder: Path) -> str:
    (folder / "mine.yaml").write_text("- task")
    return str(folder / "mine.yaml")


def two_of_a_name(folder: Path) -> str:
    (folder / "again.yaml").write_text("task: mine\n")
    return str(folder)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (no_data, "the data file 'rows.jsonl' is not beside it"),
        (no_yaml, "not readable as YAML"),
        (a_list, "expected keys and values, got list"),
        (two_of_a_name, "two tasks are called 'mine'"),
        (lambda folder: str(folder / "common.yaml"), "neither task: NAME nor group: NAME"),
        (lambda folder: str(folder / "gone.yaml"), "No such file"),
        (lambda folder: str(folder / "gone"), "there is no such file or folder"),
        (lambda _: " , ", "names no task; shipped: stdlib_brackets"),
    ],
)
def test_bad_requests_are_refused_in_a_line(folder: Path, asked: Callable[[Path], str], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        find_tasks(asked(folder))
    assert "\n" not in str(refused.value)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.yaml file"):
        find_tasks(str(tmp_path))


def test_tags_of_a_file_run_nothing(folder: Path) -> None:
    (folder / "functions.py").write_text("raise SystemExit('imported')")
    (folder / "mine.yaml").write_text("task: mine\nx: !!python/object/apply:os.system ['exit']\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        find_tasks(str(folder / "mine.yaml"))
    (folder / "mine.yaml").write_text("task: mine\nx: !function functions.clean\n")
    assert find_tasks(str(folder / "mine.yaml"))[0].name == "mine"
