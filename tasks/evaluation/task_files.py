"""Tasks of lm-evaluation-harness by name or file: which there are, and a fingerprint of all that decides what they ask.

A task that ships (``stdlib_brackets``, ...) goes by its name, one of the user's by the path of its YAML file or of a folder
of them, and anything else is taken for a name that the harness itself knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from tasks.checkpoints.digest import digest_bytes

SHIPPED = Path(__file__).parent / "lm_eval_tasks"


@dataclass(frozen=True, kw_only=True)
class AskedTask:
    """A task or group that was asked for."""

    name: str
    """As the harness calls it."""
    folder: Path | None
    """Where its file lies; None for the harness's own."""
    files: dict[str, str]
    """Path below ``folder`` to BLAKE3 of every local file that decides what is asked; empty for the harness's own."""


def find_tasks(asked: str) -> list[AskedTask]:
    """Look up a comma-separated list of names, YAML files and folders.

    Raises :class:`configs.errors.UserError` for a file that is missing, that is no task, or that names data which are missing.
    """
    found: dict[str, AskedTask] = {}
    for item in filter(None, (part.strip() for part in asked.split(","))):
        for task in _find(item):
            if task.name in found and found[task.name] != task:
                raise UserError(f"--tasks: two tasks are called {task.name!r}; give them names of their own")
            found[task.name] = task
    if not found:
        raise UserError(f"--tasks {asked!r} names no task; shipped: {', '.join(shipped_names())}")
    return list(found.values())


def shipped_names() -> list[str]:
    """Names of the tasks that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _find(item: str) -> Iterator[AskedTask]:
    path = Path(item)
    if path.is_dir():
        files = sorted(path.glob("*.yaml"))
        if not files:
            raise UserError(f"--tasks {item}: the folder holds no .yaml file")
        # Files that others include are no tasks of their own.
        yield from (_task_of(file) for file in files if _name_of(_read(file)))
    elif path.suffix in (".yaml", ".yml"):
        yield _task_of(path)
    elif item in shipped_names():
        yield _task_of(SHIPPED / f"{item}.yaml")
    elif "/" in item:
        raise UserError(f"--tasks {item}: there is no such file or folder")
    else:
        yield AskedTask(name=item, folder=None, files={})


def _task_of(path: Path) -> AskedTask:
    values = _read(path)
    name = _name_of(values)
    if name is None:
        raise UserError(f"--tasks {path}: no task of lm-evaluation-harness: it has neither task: NAME nor group: NAME")
    folder = path.absolute().parent
    return AskedTask(name=name, folder=folder, files=dict(sorted(_closure(folder, path.name, {}).items())))


def _name_of(values: dict[str, Any]) -> str | None:
    name = values.get("group") or values.get("task")
    return name if isinstance(name, str) else None


def _closure(folder: Path, name: str, known: dict[str, str]) -> dict[str, str]:
    """Digests of a file and of every file below ``folder`` that it names: data, included YAML, functions, tasks of a group."""
    if name in known:
        return known
    path = folder / name
    known[name] = digest_bytes(path.read_bytes())
    if path.suffix not in (".yaml", ".yml"):
        return known
    values = _read(path)
    _require_data(path, values)
    for text in _strings(values):
        module = text.removeprefix(_FUNCTION).rpartition(".")[0].replace(".", "/") if text.startswith(_FUNCTION) else ""
        for candidate in (text, f"{text}.yaml", f"{module}.py"):
            if len(candidate) < _LONGEST_NAME and "\0" not in candidate and (folder / candidate).is_file():
                _closure(folder, candidate, known)
    return known


def _require_data(path: Path, values: dict[str, Any]) -> None:
    """The harness would say so after half a minute, in many lines."""
    arguments = values.get("dataset_kwargs")
    files = arguments.get("data_files") if isinstance(arguments, dict) else None
    for name in _strings(files):
        is_pattern = "://" in name or any(mark in name for mark in "*?[")
        if not is_pattern and not (path.parent / name).is_file():
            raise UserError(f"--tasks {path}: the data file {name!r} is not beside it")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


_FUNCTION = "!function "
_LONGEST_NAME = 200


class _Loader(yaml.SafeLoader):
    """Reads ``!function module.name`` and other tags as text: nothing is imported."""


def _as_text(_: yaml.SafeLoader, tag: str, node: yaml.Node) -> str:
    return f"!{tag} {node.value}" if isinstance(node, yaml.ScalarNode) else f"!{tag}"


_Loader.add_multi_constructor("!", _as_text)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise UserError(f"--tasks {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--tasks {path} is not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--tasks {path}: expected keys and values, got {type(values).__name__}")
    return values


def names_of(tasks: Sequence[AskedTask]) -> list[str]:
    """Names of those tasks that the harness is to know by itself."""
    return [task.name for task in tasks if task.folder is None]
