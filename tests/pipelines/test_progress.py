"""Progress: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cluster.journal import JournalWriter
from configs.load import load_config
from pipelines.progress import CLEAR_LINE, Progress
from pipelines.wording import format_seconds
from tasks.checkpoints.run_folder import RunFolder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path))
    writer = JournalWriter(folder.store, 1)
    for step, speed in ((1, 1000.0), (2, 2000.0), (3, 90_000.0)):
        writer.log(step, step * 2048, {"train/loss": 4.0 - step, "train/tokens_per_second": speed})
    writer.flush()
    return folder


def test_progress_in_a_log_is_one_plain_line_with_step_loss_speed_eta_and_merges(run: RunFolder) -> None:
    out = io.StringIO()
    with Progress(run, load_config("tiny").config, "tiny", lambda: ["merging x"], out):
        pass
    (line,) = out.getvalue().splitlines()
    for part in (
        "tiny",
        "step 3/4,000",
        "0.01 of 8.19 M tokens",
        "loss 1.000",
        "2.0 k tokens/s",
        "ETA 1 h 08 min",
        "merging x",
    ):
        assert part in line
    assert "\x1b" not in line


def test_progress_on_a_terminal_rewrites_one_line(run: RunFolder) -> None:
    out = Terminal()
    with Progress(run, load_config("tiny").config, "tiny", list, out):
        pass
    assert out.getvalue().startswith(CLEAR_LINE)
    assert out.getvalue().count("\n") == 1


def test_progress_before_the_first_step_says_that_workers_start(tmp_path: Path) -> None:
    out = io.StringIO()
    progress = Progress(RunFolder(str(tmp_path)), load_config("tiny").config, "tiny", list, out)
    assert progress.line() == "tiny · starting workers"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")]
)
def test_format_seconds_uses_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
