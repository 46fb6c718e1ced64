"""Text that comes with the interpreter: the standard library's own sources, and files of installed packages."""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from configs.data import STDLIB_SOURCE
from configs.errors import UserError

SCHEME = "python://"
_PACKAGE = re.compile(r"[A-Za-z_]\w*")
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


def is_python_source(source: str) -> bool:
    """Whether ``source`` names files that come with the interpreter."""
    return source.startswith(SCHEME)


def python_files(source: str) -> Iterator[tuple[str, str]]:
    """Files of ``python://stdlib`` or ``python://PACKAGE/GLOB`` as (path below the library or package, path).

    ``**`` in GLOB stands for any folders. Which files there are depends on the version installed, so workers need the same.
    Raises :class:`configs.errors.UserError` for a package that is not installed and for what is no such pattern.
    """
    return stdlib_files() if source == STDLIB_SOURCE else _package_files(source)


def _package_files(source: str) -> Iterator[tuple[str, str]]:
    package, _, pattern = source.removeprefix(SCHEME).partition("/")
    if not _PACKAGE.fullmatch(package) or not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        raise UserError(
            f"data source {source!r}: expected {STDLIB_SOURCE} or python://PACKAGE/GLOB, with files below the package, such as "
            "python://torch/include/c10/**/*.h"
        )
    for root in _folders_of(package, source):
        for path in _matching(root, pattern, source):
            relative = path.relative_to(root)
            if path.is_file() and "__pycache__" not in relative.parts:
                yield f"{package}/{relative.as_posix()}", str(path)


def _matching(root: Path, pattern: str, source: str) -> list[Path]:
    try:
        return list(root.glob(pattern))
    except ValueError as error:
        raise UserError(f"data source {source!r}: {error}") from error


def _folders_of(package: str, source: str) -> list[Path]:
    """Folders of ``package``, which is not imported."""
    spec = importlib.util.find_spec(package) if package != "__main__" else None
    if spec is None:
        raise UserError(
            f"data source {source!r}: no package {package!r} is installed here (import name, not the name on PyPI); install it "
            "on the driver and on every worker, or name another source"
        )
    if not spec.submodule_search_locations:
        raise UserError(f"data source {source!r}: {package!r} is a single module, not a package with files")
    return [Path(folder) for folder in spec.submodule_search_locations]


def stdlib_files() -> Iterator[tuple[str, str]]:
    """Sources of the standard library as (path below it, absolute path), without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _NOT_LIBRARY & set(relative.parts) and not relative.parts[0].startswith("config-"):
            yield relative.as_posix(), str(path)
