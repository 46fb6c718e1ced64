"""The report in a real browser: it complains of nothing, fetches nothing, draws, sorts, prints, in both colour schemes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.report.build import write_report
from tests.browser import HOW_TO_GET_ONE, Page, find_browser, open_browser
from tests.evidence_records import add_records, evaluate
from tests.local_gang import train
from tests.short_run import NAN_AT_45, begin

pytestmark = pytest.mark.slow
CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const shine = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  const under = (e) => {
    const cell = e.closest(".heat-map") && e.previousElementSibling;
    const box = cell && (cell.tagName === "rect" ? cell : cell.previousElementSibling);
    const fill = box && box.tagName === "rect" && e.style.fill.startsWith("rgb") ? getComputedStyle(box).fill : "none";
    return fill === "none" ? behind(e) : parse(fill);
  };
  const weak = [];
  let seen = 0;
  for (const e of document.querySelectorAll("body *:not(script)")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const svg = e.ownerSVGElement;
    if (svg && e.tagName !== "text" && e.tagName !== "tspan") continue;
    const style = getComputedStyle(e);
    const [a, b] = [shine(parse(svg ? style.fill : style.color)), shine(under(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < 4.5) weak.push([e.tagName, e.textContent.slice(0, 40), ratio.toFixed(2)]);
  }
  return { weak, seen };
})()"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real run with a spike, a recovery and held-out losses, and records of everything that it did not do."""
    find_browser()  # before minutes are spent on what nobody will look at
    run, config = begin(tmp_path_factory.mktemp("report") / "run", *NAN_AT_45)
    train(run, config)
    evaluate(run, config)
    add_records(run)
    return Path(write_report(run.url)).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, report: str) -> Page:
    """The report, freshly opened on a wide window in light colours."""
    browser.prefer("light")
    browser.resize(1200, 900)
    browser.open(report)
    return browser


def column(page: Page, table: str, number: int) -> list[str]:
    script = f"[...document.querySelector({json.dumps(table)}).tBodies[0].rows].map((row) => row.cells[{number}].textContent)"
    values = page.run(script)
    assert isinstance(values, list)
    return values


CELLS = "[aria-labelledby=cells-of-the-ablation-caption] table"


def test_page_opens_from_a_file_without_a_complaint_and_asks_for_nothing_else(page: Page, report: str) -> None:
    assert report.startswith("file:///")
    assert page.complaints() == []
    assert page.requests() == [report]
    assert page.run("document.querySelector('h1').textContent") == "pmaflow report: tiny"


def test_complaints_and_requests_are_noticed(browser: Page, tmp_path: Path) -> None:
    """The two tests above could pass on anything if the browser kept silent."""
    (tmp_path / "bad.html").write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); throw 1</script>"
    )
    browser.open((tmp_path / "bad.html").as_uri())
    assert len(browser.complaints()) >= 2
    assert "http://127.0.0.1:9/x.png" in browser.requests()


def test_every_chart_is_drawn_and_says_what_it_shows(page: Page) -> None:
    charts = page.run(
        "[...document.querySelectorAll('svg')].map((svg) => { const box = svg.getBBox(); return {"
        "width: box.width, height: box.height, role: svg.getAttribute('role'), marks: svg.querySelectorAll('path, rect').length,"
        "said: svg.getAttribute('aria-labelledby').split(' ').map((id) => document.getElementById(id).textContent)}; })"
    )
    names = [chart["said"][0] for chart in charts]
    for wanted in ("Held-out loss over", "Training over", "Heat map: SMA", "Heat map: EMA 0.2", "Loss by merge span", "init less control", "recoveries left"):  # fmt: skip
        assert any(wanted in name for name in names), (wanted, names)
    for chart in charts:
        assert chart["role"] == "img" and min(chart["width"], chart["height"]) > 50 and chart["marks"] > 3, chart
        assert all(len(text) > 10 for text in chart["said"])
    assert len(set(names)) == len(names)


def test_identifiers_are_used_once_and_point_somewhere(page: Page) -> None:
    ids = page.run("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    targets = page.run(
        "[...document.querySelectorAll('[aria-labelledby], a[href^=\"#\"], use')].flatMap((e) => e.hasAttribute('aria-labelledby') ?"
        " e.getAttribute('aria-labelledby').split(' ') : [(e.getAttribute('href') ?? e.getAttribute('xlink:href')).slice(1)])"
    )
    assert targets and set(targets) <= set(ids)


def test_headings_and_landmarks_are_in_order(page: Page) -> None:
    levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.run("['header', 'nav', 'main'].map((tag) => document.querySelectorAll(tag).length)") == [1, 1, 1]
    assert page.run("document.querySelector('main h2').textContent") == "In short"
    assert page.run("[...document.querySelectorAll('table')].every((t) => t.caption && t.querySelector('th[scope]'))")


def test_table_sorts_by_click_as_numbers_and_back(page: Page) -> None:
    losses = [float(text) for text in column(page, CELLS, 5)]
    assert losses != sorted(losses)
    page.click(f"{CELLS} thead th:nth-child(6) button")
    assert [float(text) for text in column(page, CELLS, 5)] == sorted(losses)
    head = f"document.querySelector({json.dumps(CELLS)}).tHead.rows[0].cells"
    assert page.run(f"{head}[5].getAttribute('aria-sort')") == "ascending"
    page.click(f"{CELLS} thead th:nth-child(6) button")
    assert [float(text) for text in column(page, CELLS, 5)] == sorted(losses, reverse=True)
    # 2,560 before 12,800 or 1,280 is the order of text, not of numbers.
    page.click(f"{CELLS} thead th:nth-child(3) button")
    intervals = [int(text.replace(",", "")) for text in column(page, CELLS, 2)]
    assert intervals == sorted(intervals)
    assert page.run(f"[...{head}].map((h) => h.getAttribute('aria-sort')).join()").count("ascending") == 1


def test_table_sorts_by_keyboard(page: Page) -> None:
    page.run(f"document.querySelector({json.dumps(CELLS)} + ' thead button').focus({{preventScroll: true}})")
    page.press("Enter", 13, "\r")
    assert column(page, CELLS, 0) == sorted(column(page, CELLS, 0))
    page.press(" ", 32, " ")
    assert column(page, CELLS, 0) == sorted(column(page, CELLS, 0), reverse=True)


def test_missing_numbers_come_last_either_way(page: Page) -> None:
    table = "[aria-labelledby=predictors-and-their-back-test-caption] table"
    for _ in range(2):
        page.click(f"{table} thead th:nth-child(2) button")
        said = column(page, table, 1)
        known = [text for text in said if text != "–"]
        assert 0 < len(known) < len(said) and said[: len(known)] == known


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colour_schemes(page: Page, scheme: str) -> None:
    page.prefer(scheme)
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}[scheme]
    found = page.run(CONTRAST)
    assert found["seen"] > 200 and found["weak"] == []


def test_charts_take_the_colours_of_the_theme_that_is_chosen(page: Page) -> None:
    ink = "getComputedStyle(document.querySelector('svg text')).fill"
    light = page.run(ink)
    page.click(".theme")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert page.run(ink) != light
    page.click(".theme")
    assert page.run(ink) == light


def test_narrow_screen_scrolls_boxes_and_not_the_page(page: Page) -> None:
    page.resize(400, 800)
    assert page.run("document.documentElement.scrollWidth") <= 400
    reach = page.run(
        "[...document.querySelectorAll('.scroll')].filter((b) => b.scrollWidth > b.clientWidth).map((b) => b.tabIndex)"
    )
    assert reach and set(reach) == {0}


def test_page_prints_in_light_colours_with_nothing_cut_off(page: Page) -> None:
    page.prefer("dark")
    pdf = page.print_pdf()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    page.resize(718, 1000)  # A4 less its margins, in CSS pixels
    page.ask("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        wide = page.run(
            "[...document.querySelectorAll('table, svg')].filter((e) => e.getBoundingClientRect().right > 719).map((e) => e.textContent.slice(0, 60))"
        )
        assert wide == []
    finally:
        page.ask("Emulation.setEmulatedMedia", media="")


def test_browser_that_is_missing_skips_or_where_one_is_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CI", "PMA_REQUIRE_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser()
    for name in ("CI", "PMA_REQUIRE_BROWSER"):
        monkeypatch.setenv(name, "1")
        with pytest.raises(pytest.fail.Exception, match="no browser on PATH"):
            find_browser()
        monkeypatch.delenv(name)
    assert "not tested" in HOW_TO_GET_ONE
