"""Pieces of the report's page."""

from __future__ import annotations

import html
from collections.abc import Sequence


def section(title: str, body: str) -> str:
    """A section under its heading; ``body`` is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def caption(text: str) -> str:
    """A note under a chart or table."""
    return f'<p class="caption">{html.escape(text)}</p>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, head: bool = True) -> str:
    """A table; cells of ``rows`` are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'
