"""Pieces of the report's page: sections, notes and tables."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.drawing import slug

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Number:
    """A cell that is sorted as a number."""

    value: float | None
    """What it is sorted by; None comes last."""
    text: str
    """What is shown; HTML."""


def number(value: float | None, form: str = ",.4f", more: str = "") -> Number:
    """A number as ``form`` says, ``more`` text after it; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return Number(value=None, text=NONE)
    return Number(value=value, text=html.escape(f"{value:{form}}{more}"))


def section(title: str, body: str) -> str:
    """A section under its heading; ``body`` is HTML."""
    name = slug(title)
    return (
        f'<section id="{name}" aria-labelledby="{name}-heading">'
        f'<h2 id="{name}-heading">{html.escape(title)}</h2>{body}</section>'
    )


def chart(svg: str, note: str = "", *, wide: bool = True) -> str:
    """A chart with the note under it, in a box that scrolls where the screen is narrow; one that is not wide keeps its size."""
    below = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f'<figure><div class="scroll chart{"" if wide else " own-size"}">{svg}</div>{below}</figure>'


def caption(text: str) -> str:
    """A note under a table."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(name: str, header: Sequence[str], rows: Sequence[Sequence[str | Number]]) -> str:
    """A table called ``name``, which the page's script makes sortable; cells are HTML, the first of a row is its head."""
    ident = slug(name)
    numeric = {i for row in rows for i, cell in enumerate(row) if isinstance(cell, Number)}
    top = "".join(
        f'<th scope="col"{_class(i in numeric)} aria-sort="none">{html.escape(text)}</th>'
        for i, text in enumerate(header)
    )
    body = "".join(f"<tr>{''.join(_cell(i, cell) for i, cell in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" aria-labelledby="{ident}-caption">'
        f'<table class="sortable"><caption id="{ident}-caption">{html.escape(name)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(name: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, the values HTML: a table that nobody sorts."""
    body = "".join(f'<tr><th scope="row">{html.escape(key)}</th><td>{value}</td></tr>' for key, value in rows)
    ident = slug(name)
    return (
        f'<div class="scroll" role="region" aria-labelledby="{ident}-caption"><table>'
        f'<caption id="{ident}-caption">{html.escape(name)}</caption><tbody>{body}</tbody></table></div>'
    )


def _cell(place: int, cell: str | Number) -> str:
    tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
    if isinstance(cell, Number):
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        return f"<{tag}{scope}{_class(True)}{value}>{cell.text}</{tag}>"
    return f"<{tag}{scope}>{cell}</{tag}>"


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
