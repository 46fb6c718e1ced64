"""A stand-in for the Python that has lm-evaluation-harness: it notes how it was called and answers with a real results file.

``lm_eval_results.json`` was written by lm-evaluation-harness 0.4.13 for a checkpoint of ``tiny``; the stand-in puts the tasks
that it was asked for in the place of those.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "lm_eval_results.json"
KNOWN = {"hellaswag", "lambada_openai"}
VERSION = "0.4.13"


def make_stand_in(folder: Path, *, installed: bool = True, fails_on: str = "") -> Path:
    """An executable that stands for a Python; ``fails_on`` is part of a name of a task that it breaks on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    told = json.dumps({"installed": installed, "fails_on": fails_on, "log": str(folder / "calls.jsonl")})
    path.write_text(f"#!{sys.executable}\nimport runpy, sys\nsys.argv[1:1] = [{told!r}]\n"
                    f"runpy.run_path({str(Path(__file__))!r}, run_name='__main__')\n")  # fmt: skip
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def calls(python: Path) -> list[dict[str, Any]]:
    """How it was run as a harness, oldest first."""
    log = python.parent / "calls.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    told, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    if not told["installed"]:
        sys.exit("importlib.metadata.PackageNotFoundError: No package metadata was found for lm_eval")
    if arguments[0] == "-c":
        near = {name: [known for known in sorted(KNOWN) if known[:4] == name[:4]] for name in arguments[2:]}
        unknown = {name: found for name, found in near.items() if name not in KNOWN}
        sys.stdout.write(json.dumps({"version": VERSION, "unknown": unknown}) + "\n")
        return
    assert arguments[:3] == ["-m", "lm_eval", "run"], arguments
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    model = Path(options["--model_args"].partition(",")[0].removeprefix("pretrained="))
    with Path(told["log"]).open("a") as log:
        files = {path.name: path.is_symlink() for path in model.iterdir()}
        offline = os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_DATASETS_CACHE")
        note = {"options": options, "cwd": str(Path.cwd()), "files": files, "offline": offline}
        log.write(json.dumps(note) + "\n")
    names = options["--tasks"].split(",")
    if told["fails_on"] and any(told["fails_on"] in name for name in names):
        sys.exit("Traceback (most recent call last):\n  ...\nRuntimeError: the harness broke")
    folder = Path(options["--output_path"]) / "__model"
    folder.mkdir(parents=True)
    (folder / "results_2026-11-21T18-43-04.992816.json").write_text(json.dumps(results_for(names)))


def results_for(names: list[str]) -> dict[str, Any]:
    """The real file, with its first task under each of ``names``."""
    values: dict[str, Any] = json.loads(RESULTS.read_text())
    for field in ("results", "n-samples", "versions", "n-shot", "higher_is_better", "configs"):
        first = values[field]["stdlib_brackets"]
        values[field] = dict.fromkeys(names, first)
    return values


if __name__ == "__main__":
    main()
