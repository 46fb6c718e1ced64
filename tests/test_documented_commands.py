"""Every command line of pma in the README, the docs and the deploy files, parsed by the command line itself."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from deploy_files import DEPLOY, ROOT, documents, job_spec

from configs.load import load_config
from pipelines.__main__ import cli

SOURCES = [
    *sorted(path for path in DEPLOY.rglob("*") if path.is_file()),
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MENTION = re.compile(r"(?<![\w.@/-])(?:\S*/bin/)?(?:pma|python -m pipelines) ([a-z][a-z-]*)(?![\w:.=-])([^`\n]*)")
SHELL = re.compile(r"\s(?:\|\||\||&&|&|;|>>?|2>&1)(?:\s|$)|>>|\s[12]?>")
PLACEHOLDERS = {"STEP": "100", "N": "1000"}
"""What the README writes for numbers."""
ELLIPSIS = "..."
PROSE = {"limits.md", "merging.md", "retention.md"}
"""Pages that speak of a command by the option that matters there."""
COUNTED = {"pretrain", "tick", "watch", "submit", "gc", "status"}
"""Commands that these files are about; each has to be found, so that the search is known to work."""


def code_of(text: str, is_markdown: bool) -> Iterator[str]:
    """Lines and spans that are code: of Markdown its blocks and spans, of other files all but the prose of comments."""
    is_block = False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if is_markdown and line.startswith("```"):
            is_block = not is_block
        elif is_block if is_markdown else not re.match(r"\s*# ?\S|\s*echo ", line):
            yield line
        else:
            yield from re.findall(r"`([^`]+)`", line)


def mentions(text: str, *, is_markdown: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Command and arguments of every mention of pma; what follows ``--`` is a command of its own."""
    for code in code_of(text, is_markdown):
        for found in MENTION.finditer(code.replace("sbatch cluster/deploy/slurm/pretrain.sbatch", "pma pretrain")):
            yield from split(found[1], found[2])


def split(name: str, rest: str) -> Iterator[tuple[str, list[str]]]:
    """One command line, cut where the shell's own words begin."""
    rest = SHELL.split(f"{rest} ", maxsplit=1)[0]
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:  # the end of an outer quotation
        words = shlex.split(rest.rstrip(" '\"}"))
    yield name, words
    if "--" in words:
        inner = words[words.index("--") + 1 :]
        if inner[0].islower():  # not the COMMAND of a description
            yield inner[0], inner[1:]


def complaint(name: str, words: list[str], *, is_fragment: bool = False) -> str:
    """What the command line says of a mention; a bare name, or one with the caller's own arguments, only has to exist."""
    command = cli.commands.get(name)
    if command is None:
        return f"no command {name}"
    words = [PLACEHOLDERS.get(word.strip("[]"), word.strip("[]")) for word in words]
    if not words or words == ["$@"]:
        return ""
    try:
        command.make_context(name, list(words))
    except click.exceptions.Exit:
        return ""
    except click.MissingParameter as error:
        return "" if ELLIPSIS in words or is_fragment else error.format_message()
    except click.ClickException as error:
        return error.format_message()
    return ""


def all_mentions() -> list[tuple[str, str, list[str]]]:
    """File, command and arguments."""
    found = [
        (path.name, *mention)
        for path in SOURCES
        for mention in mentions(path.read_text(), is_markdown=path.suffix == ".md")
    ]
    # An entry point may be folded over several lines of YAML.
    jobs = {name: job for name, document in documents().items() if (job := job_spec(document))}
    found += [(name, *mention) for name, job in jobs.items() for mention in mentions(job["entrypoint"])]
    # The first line of a folded entry point is no command; all of its lines were read from the parsed document.
    return [item for item in found if item[0] != "rayjob-pretrain.yaml"]


MENTIONS = all_mentions()


@pytest.mark.parametrize(("where", "name", "words"), MENTIONS, ids=[f"{where}: {name}" for where, name, _ in MENTIONS])
def test_command_line_is_understood(where: str, name: str, words: list[str]) -> None:
    assert complaint(name, words, is_fragment=where in PROSE) == "", f"{where}: pma {name} {' '.join(words)}"


def test_search_finds_the_commands() -> None:
    assert {name for _, name, _ in MENTIONS} >= COUNTED


def test_wrong_command_lines_are_noticed() -> None:
    assert complaint("prune", []) == "no command prune"
    assert "No such option" in complaint("pretrain", ["--config", "tiny", "--url", "s3://bucket/run"])
    assert "Missing option" in complaint("pretrain", ["--run", "s3://bucket/run"])
    assert list(mentions("Say `pma gone now`, not pma here.", is_markdown=True)) == [("gone", ["now"])]
    assert list(mentions("# prose of pma here\n#   pma gone --now")) == [("gone", ["--now"])]
    assert list(mentions("x && pma pretrain --config tiny >log 2>&1 || true")) == [("pretrain", ["--config", "tiny"])]


def test_settings_on_command_lines_are_known() -> None:
    overrides = {
        (words[words.index("--config") + 1], word)
        for _, name, words in MENTIONS
        if name == "pretrain" and "--config" in words
        for word in words
        if re.match(r"[a-z_]+\.[a-z_]+=", word)
    }
    assert overrides
    for config, override in overrides:
        load_config(config, (override,))
