"""The report: what it says of spikes, of what snapshots cost, and of a run that has hardly begun."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.journal import Measurement, read_journals
from pipelines.report.build import write_report
from pipelines.report.data import gather, split_journals
from pipelines.report.timeline import step_times, uploads
from tasks.checkpoints.run_folder import RunFolder
from tasks.recovery.policy import SpikeUnanswered
from tests.local_gang import train
from tests.short_run import NAN_AT_45, begin


def page_of(run: RunFolder) -> str:
    write_report(run.url)
    return run.store.read("report.html").decode()


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run, config = begin(tmp_path_factory.mktemp("run") / "nan", *NAN_AT_45)
    train(run, config)
    return run


def test_recovery_is_told_with_its_outcome_and_phases(recovered: RunFolder) -> None:
    page = page_of(recovered)
    section = page[page.index('<section id="loss-spikes-and-recoveries"') :]
    section = section[: section.index("</section>")]
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", section[section.index("<tbody>") :])
    assert cells[:4] == ["1", "1, try 1: pma", "46, 46", "mean of 3 up to step 40"]
    assert cells[7] == "held"
    assert "<svg" in section and "alarm to first step" in section
    # Six steps of 128 tokens.
    assert "0.00 M tokens trained in vain" in section


def test_phases_add_up_to_the_time_between_the_two_measurements(recovered: RunFolder) -> None:
    (phases,) = gather(recovered.url).phases
    journals = read_journals(recovered.store)
    alarm = next(m.time for m in journals[1] if m.step == 46)
    assert phases.total == pytest.approx(journals[2][0].time - alarm, abs=1e-6)
    parts = (phases.stop, phases.decide, phases.merge, phases.restart, phases.first_step)
    assert all(part >= 0 for part in parts) and phases.merge > 0


def steps_of(rows: Sequence[Measurement]) -> list[int]:
    """Steps that were trained: an upload that ends after the last one is noted as of the next."""
    return [row.step for row in rows if "train/loss" in row.metrics]


def test_every_step_of_the_way_counts_once_and_the_rest_is_left_behind(recovered: RunFolder) -> None:
    data = gather(recovered.url)
    assert [m.step for m in data.journal] == list(range(1, 81))
    assert [steps_of(rows) for rows in data.left_behind] == [list(range(41, 47))]


def test_tail_that_nothing_measured_again_is_not_on_the_way(recovered: RunFolder) -> None:
    journals, run = read_journals(recovered.store), recovered
    begun = {1: journals[1], 2: journals[2][:2]}
    kept, cut_off = split_journals(begun, run.segments(), run.recoveries())
    assert [m.step for m in kept] == list(range(1, 43))
    assert steps_of(cut_off[0]) == list(range(41, 47))


def test_run_that_gave_up_says_what_was_tried(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "run", *NAN_AT_45, "recovery.policy=stop")
    with pytest.raises(SpikeUnanswered):
        train(run, config)
    page = page_of(run)
    assert "Given up." in page and "recovery.policy" in page


def test_run_that_has_not_trained_a_step_has_a_report(tmp_path: Path) -> None:
    run, _ = begin(tmp_path / "run")
    page = page_of(run)
    assert "It has not trained a step" in page and "Loss spikes" not in page and "A snapshot beside" not in page


def test_run_without_spikes_has_no_section_of_them(tmp_path: Path) -> None:
    run, config = begin(tmp_path / "run", "training.total_tokens=3840")
    train(run, config)
    page = page_of(run)
    assert "Loss spikes" not in page and "A snapshot beside training" in page
    assert "imports" in page and "data and model" in page


def test_uploads_are_placed_beside_the_steps_they_ran_with() -> None:
    """Ten steps of 0.1 s from 100.0; the third begins with a copy of 0.02 s, committed 0.25 s later, told by the sixth."""
    rows = []
    for number in range(10):
        metrics = {"train/tokens_per_second": 1000.0}
        if number == 2:
            metrics["snapshot/stall_seconds"] = 0.02
        if number == 5:
            metrics |= {"snapshot/upload_seconds": 0.2, "snapshot/publish_seconds": 0.25}
        rows.append(Measurement(step=number + 1, tokens=100 * number, time=100.1 + 0.1 * number, metrics=metrics))
    times = step_times(rows, batch_tokens=100)
    assert (times[2].start, times[2].stall, times[2].end) == pytest.approx((100.2, 0.02, 100.3))
    (upload,) = uploads(rows, times)
    assert upload.step == 2
    assert (upload.uploaded, upload.committed) == pytest.approx((100.42, 100.47))


def test_snapshot_that_begins_where_another_is_told_is_not_mixed_up_with_it() -> None:
    rows = []
    for number in range(6):
        metrics = {"train/tokens_per_second": 1000.0}
        if number in (1, 3):
            metrics["snapshot/stall_seconds"] = 0.01 * number
        if number in (3, 5):
            metrics |= {"snapshot/upload_seconds": 0.1, "snapshot/publish_seconds": 0.1}
        rows.append(Measurement(step=number + 1, tokens=0, time=100.1 + 0.1 * number, metrics=metrics))
    assert [upload.step for upload in uploads(rows, step_times(rows, batch_tokens=100))] == [1, 3]
