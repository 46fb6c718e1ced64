"""The Dockerfile: hadolint, and the rules that hadolint does not know. The image itself is not built by the tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from deploy_files import DEPLOY, ROOT

TEXT = (DEPLOY / "Dockerfile").read_text()
IGNORED = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
HADOLINT = str(Path(sys.executable).parent / "hadolint")


def hadolint(text: str) -> set[str]:
    """Rules that a Dockerfile breaks."""
    done = subprocess.run([HADOLINT, "--format", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return {item["code"] for item in json.loads(done.stdout)}


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and rest of every instruction, with its continuation lines joined."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M))
    return [(words[0].upper(), words[1]) for line in joined.splitlines() if len(words := line.split(maxsplit=1)) == 2]


def faults(text: str) -> list[str]:
    """What our own rules find in a Dockerfile."""
    parts = instructions(text)
    values = {name: [rest for part, rest in parts if part == name] for name, _ in parts}
    bases = dict(rest.split("=", 1) for rest in values["ARG"] if "=" in rest)
    base = re.sub(r"\$\{(\w+)\}", lambda found: bases[found[1]], values["FROM"][-1])
    installs = [
        command for rest in values["RUN"] for command in rest.split("&&") if " pip install " in f" {command.strip()} "
    ]
    found = []
    if not re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base):
        found.append(f"base {base} is not a pinned Python 3.11")
    if values["USER"][-1] in ("root", "0"):
        found.append("runs as root")
    if "torch" not in installs[0]:
        found.append("torch is not installed first")
    if not all("--constraint" in command for command in installs):
        found.append("pip install without constraints.txt")
    if any(re.search(r"KEY|SECRET|PASSWORD|TOKEN", rest) for part in ("ARG", "ENV") for rest in values[part]):
        found.append("a secret as ARG or ENV stays in the image")
    if any(source in (".", "./") for rest in values["COPY"] for source in rest.split()[:-1]):
        found.append("copies the whole folder")
    if json.loads(values["ENTRYPOINT"][-1])[-1] != "pma":
        found.append("the entry point is not pma")
    return found


def test_dockerfile_is_clean() -> None:
    assert hadolint(TEXT) == set()
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda text: text.replace("${BASE}", "python:latest"), "not a pinned Python"),
        (lambda text: text.replace("USER 1000", "USER root"), "runs as root"),
        (lambda text: text.replace('"${torch}"', "hatchling").replace("torch=", "x="), "torch is not installed first"),
        (lambda text: text.replace("--constraint constraints.txt", ""), "without constraints.txt"),
        (lambda text: text.replace("ENV RAY_AUTH_MODE=token", "ENV AWS_SECRET_ACCESS_KEY=x"), "stays in the image"),
        (lambda text: text.replace("COPY tasks tasks", "COPY . ."), "copies the whole folder"),
    ],
)
def test_spoilt_dockerfile_is_noticed(spoil: Callable[[str], str], says: str) -> None:
    assert any(says in fault for fault in faults(spoil(TEXT)))


def test_hadolint_notices_what_is_wrong() -> None:
    assert "DL3007" in hadolint(TEXT.replace("${BASE}", "python:latest"))
    assert "DL3002" in hadolint(TEXT.replace("USER 1000", "USER root"))
    assert "DL3013" in hadolint(TEXT.replace("--constraint constraints.txt hatchling", "hatchling"))


def test_build_context_holds_what_is_copied_and_no_more() -> None:
    copied = [
        source.removeprefix("./") for part, rest in instructions(TEXT) if part == "COPY" for source in rest.split()[:-1]
    ]
    assert {line[1:] for line in IGNORED if line.startswith("!")} == set(copied)
    assert "*" in IGNORED
    assert "**/*.env" in IGNORED
    assert all((ROOT / name).exists() for name in copied)


def test_image_holds_all_packages_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*)\]$", project, re.M)
    assert packages is not None
    for name in re.findall(r'"(\w+)"', packages[1]):
        assert ("COPY", f"{name} {name}") in instructions(TEXT)
