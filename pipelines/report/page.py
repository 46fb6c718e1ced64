"""The page around the sections: one file that fetches nothing, with its style and its script inside."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.report.answers import Answer

HERE = Path(__file__).parent
CSS, SCRIPT = (HERE / "report.css").read_text(), (HERE / "report.js").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever would be fetched."""


def answers_list(answers: Sequence[Answer]) -> str:
    """Questions and answers, the answer in a few words first."""
    rows = "".join(
        f'<dt>{html.escape(a.question)}</dt><dd><strong class="{a.state}">{html.escape(a.verdict)}.</strong> {a.text}</dd>'
        for a in answers
    )
    return f'<dl class="answers">{rows}</dl>'


def full_page(*, title: str, lead: str, sections: Sequence[str]) -> str:
    """The HTML document; ``lead`` is HTML and ``sections`` are of :func:`pipelines.report.tables.section`."""
    body = "".join(sections)
    links = "".join(
        f'<li><a href="#{ident}">{text}</a></li>'
        for ident, text in re.findall(r'<section id="([^"]+)"[^>]*><h2[^>]*>(.*?)</h2>', body)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<style>{CSS}</style></head><body><a class="skip" href="#content">Skip to the answers</a><div class="page">'
        f'<header><div><h1>{html.escape(title)}</h1><p class="lead">{lead}</p></div>'
        '<button type="button" class="theme" hidden>Dark colours</button></header>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main id="content">{body}</main></div>'
        f"<script>{SCRIPT}</script></body></html>"
    )
