"""The demo's fine-tuning corpus: from what a function's docstring says to its ``def`` line, of the standard library.

``python://stdlib-signatures`` reads it in place; ``python -m tasks.data.chat.signatures > rows.jsonl`` writes it down.
"""

from __future__ import annotations

import ast
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tasks.data.package_files import stdlib_files


def signature_rows() -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of every function with a docstring, with their places; by file, then line, each row once a file.

    ``prompt`` is the module and the first paragraph of the docstring, ``completion`` the ``def`` line as
    :func:`ast.unparse` writes it, without decorators. ``module`` (``json.decoder``) and ``file`` (``json/decoder.py``)
    are for ``data.split_field``: by ``file`` the held-out rows are those of the files that ``python://stdlib`` holds out
    at the same fraction, so that a network pre-trained on it has not seen them. The same interpreter gives the same rows.
    """
    yield from _all_rows()


@functools.cache
def _all_rows() -> tuple[tuple[str, dict[str, str]], ...]:
    """Parsing the library takes seconds; a process that reads both sides does it once."""
    return tuple(_parse_rows())


def _parse_rows() -> Iterator[tuple[str, dict[str, str]]]:
    for file, path in sorted(stdlib_files()):
        seen = set()
        for function, paragraph in _documented_functions(Path(path).read_bytes()):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            row = {
                "prompt": f"{module}\n{paragraph}",
                "completion": _signature(function),
                "module": module,
                "file": file,
            }
            if tuple(row.values()) not in seen:
                seen.add(tuple(row.values()))
                yield f"{path}, line {function.lineno}", row


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _documented_functions(source: bytes) -> list[tuple[_Function, str]]:
    """Functions in order of line, with the first paragraph of their docstrings on one line."""
    found = []
    for statement in _statements(ast.parse(source)):
        if isinstance(statement, _Function) and (text := ast.get_docstring(statement)):
            found.append((statement, " ".join(text.partition("\n\n")[0].split())))
    return found


def _statements(parent: ast.AST) -> Iterator[ast.stmt]:
    """All statements below ``parent`` as they stand; :func:`ast.walk` takes four times as long, through every expression."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(parent, field, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)


def _signature(function: _Function) -> str:
    kind = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{kind} {function.name}({ast.unparse(function.args)}){returns}:"


def main() -> None:
    """Write the rows to standard output as JSON lines."""
    for _, row in signature_rows():
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
