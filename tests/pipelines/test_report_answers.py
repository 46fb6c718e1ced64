"""What the top of the report says, of runs that were made for it, and the heat map's numbers, marks and contrast."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.report.answers import answer_all, what_annealing_gives, which_window
from pipelines.report.data import ReportData, gather
from pipelines.report.evidence import Evidence, tracking_url
from pipelines.report.heat_map import Scale, heat_map, heat_maps, luminance, scale_of
from tasks.checkpoints.run_folder import RunFolder
from tests.evidence_records import ablation, cells
from tests.short_run import begin


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    """A run that has not begun."""
    run, _ = begin(tmp_path / "run")
    return gather(run.url)


def with_evidence(data: ReportData, **fields: object) -> ReportData:
    evidence: Evidence = replace(data.evidence, **fields)  # type: ignore[arg-type]
    return replace(data, evidence=evidence)


def test_run_that_has_not_begun_claims_nothing(data: ReportData) -> None:
    verdicts = [answer.verdict for answer in answer_all(data)]
    assert verdicts[:4] == ["It has not trained a step", "Not measured yet", "Cannot say yet", "Not tried yet"]
    assert all(answer.state == "open" for answer in answer_all(data))


def test_spike_that_nobody_answered_is_said_first(data: ReportData) -> None:
    health, *_, following = answer_all(replace(data, given_up="tried twice"))
    assert health.state == "bad" and "gave up" in health.verdict and "tried twice" in health.text
    assert "pma recover" in following.text


def test_window_is_the_chosen_one_and_not_the_lowest(data: ReportData) -> None:
    answer = which_window(with_evidence(data, ablation=ablation()))
    assert answer.verdict == "SMA, N 3, V 1,280 tokens"
    assert "the lowest of the grid is 3.2500 (SMA, N 6, V 1,280 tokens); 1 of 5 others is" in answer.text


def test_forecast_without_two_anneals_has_no_interval_and_says_so(data: ReportData) -> None:
    said = {
        "forecast_loss": 1.15, "interval": None, "interval_level": 0.95, "back_test": {}, "predictor": "merged", "anneals": [],
        "anneal_tokens": 1280, "step": 80,
    }  # fmt: skip
    answer = what_annealing_gives(with_evidence(data, forecast=said))
    assert answer.verdict == "About 1.1500" and "(no interval)" in answer.text and "nobody knows" in answer.text


@pytest.mark.parametrize(
    ("uri", "link"), [("http://mlflow:5000/", "http://mlflow:5000/#/runs/abc"), ("sqlite:///x.db", ""), (None, "")]
)
def test_page_links_to_mlflow_where_a_browser_can_open_it(tmp_path: Path, uri: str | None, link: str) -> None:
    run, config = begin(tmp_path / "run")
    config = replace(config, tracking=replace(config.tracking, uri=uri))
    assert tracking_url(run.store, config) == ""  # it was never sent there
    RunFolder(run.url).store.put("tracking/cursor.json", b'{"%s": {"runs": {"run": "abc"}}}' % str(uri).encode())
    assert tracking_url(run.store, config) == link


def test_heat_map_says_every_loss_marks_in_words_and_shows_what_is_missing() -> None:
    found = cells()
    svg = heat_map(found, title="SMA", scale=scale_of(found), marks={found[1]["name"]: "lowest"})
    texts = re.findall(r"<text[^>]*>(.*?)</text>", svg)
    assert {"3.3100", "3.2500", "3.4200", "N 3", "N 6", "1,280", "2,560"} <= set(texts)
    assert texts.count("not made") == 1 and texts.count("lowest") == 1
    assert "lowest: N 6, V 1,280" in svg


def test_heat_maps_of_one_record_share_a_scale_and_are_one_per_method() -> None:
    record = ablation()
    maps = heat_maps(record["cells"], record["ends"])
    assert [title.partition(",")[0] for title in maps] == ["SMA", "EMA 0.2"]
    fills = [re.findall(r'fill="(rgb[^"]*)"', svg) for svg in maps.values()]
    # The lowest of EMA is not the lowest of all, and must not look like it.
    assert "rgb(232, 241, 250)" in fills[0] and "rgb(232, 241, 250)" not in fills[1]


@given(loss=st.floats(1, 2))
def test_number_on_a_cell_stands_out_whatever_its_fill(loss: float) -> None:
    shine = luminance(Scale(low=1.0, high=2.0).fill(loss))
    svg = heat_map([{**cells()[0], "loss": loss}], title="x", scale=Scale(low=1.0, high=2.0), marks={})
    ink = 0.0 if "fill: #000000" in svg else 1.0
    assert (max(shine, ink) + 0.05) / (min(shine, ink) + 0.05) >= 4.5
