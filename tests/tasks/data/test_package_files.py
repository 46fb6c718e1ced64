"""Text of installed packages as a domain: on any machine, by a pattern, without importing the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from configs.data import DataConfig
from configs.errors import UserError
from configs.load import load_config
from tasks.data.domains import open_domains
from tasks.data.package_files import python_files
from tasks.data.sources import find_sources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that must not be imported."""
    folder = tmp_path / "site" / "acme_text"
    for name in ("include/a.h", "include/deep/b.h", "include/notes.txt", "__pycache__/c.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"// {name}\n" * 200)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "site" / "lone_module.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "acme_text"


def names(source: str) -> list[str]:
    return [path for path, _ in find_sources([source], DataConfig(), "data.sources").texts]


def test_pattern_names_files_below_the_package_and_imports_nothing(package: str) -> None:
    assert names(f"python://{package}/include/**/*.h") == ["acme_text/include/a.h", "acme_text/include/deep/b.h"]
    assert names(f"python://{package}/include/*.h") == ["acme_text/include/a.h"]
    assert package not in sys.modules


def test_byte_code_folders_are_left_out(package: str) -> None:
    with pytest.raises(UserError, match=r"'python://acme_text/\*\*/c.h' holds no files"):
        names(f"python://{package}/**/c.h")


def test_names_do_not_depend_on_where_the_package_is_installed(package: str, tmp_path: Path) -> None:
    # A text file's side hangs on its name, so that every machine holds out the same.
    assert all(url.startswith(str(tmp_path)) for _, url in python_files(f"python://{package}/**/*.h"))
    assert not any(name.startswith("/") for name, _ in python_files(f"python://{package}/**/*.h"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("python://no_such_package/*.h", "no package 'no_such_package' is installed here .import name"),
        ("python://lone_module/*.h", "'lone_module' is a single module, not a package with files"),
        ("python://acme_text", "expected python://stdlib or python://PACKAGE/GLOB"),
        ("python://acme_text/", "expected python://stdlib or python://PACKAGE/GLOB"),
        ("python://acme-text/*.h", "expected python://stdlib or python://PACKAGE/GLOB"),
        ("python://acme_text/../lone_module.py", "expected python://stdlib or python://PACKAGE/GLOB"),
        ("python://acme_text//etc/*", "expected python://stdlib or python://PACKAGE/GLOB"),
        ("python://acme_text/a**b", "Invalid pattern"),
        ("python://acme_text/*.cpp", "holds no files"),
        ("python://__main__/*.py", "no package '__main__'"),
    ],
)
@pytest.mark.usefixtures("package")
def test_source_that_names_nothing_is_refused_by_its_own_words(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        find_sources([source], DataConfig(), "data.sources")
    assert source in str(refused.value)


def test_standard_library_is_still_a_source_of_its_own() -> None:
    found = names("python://stdlib")
    assert "json/decoder.py" in found
    assert not any(path.startswith("test/") for path in found)


def test_continued_training_ships_a_domain_that_every_machine_with_the_project_has() -> None:
    config = load_config("continue-tiny").config
    headers, library = open_domains(config.data, "held_out")
    assert (headers.name, library.name) == ("headers", "stdlib")
    assert config.model == load_config("tiny").config.model
    schedule = config.schedule
    assert schedule.warmup_tokens + schedule.decay_tokens == config.training.total_tokens
    # 4.08e-4 to 1.0e-5 (arXiv 2505.12082, section 4.6).
    assert schedule.final_learning_rate_fraction == pytest.approx(1.0e-5 / 4.08e-4, rel=1e-3)
    assert schedule.decay_shape == "cosine"
