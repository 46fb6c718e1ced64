"""Node labels as users write them."""

from __future__ import annotations


def label_selector(nodes: str | None) -> dict[str, str] | None:
    """Ray's selector of the nodes labelled ``key=value``; None selects any."""
    if nodes is None:
        return None
    key, _, value = nodes.partition("=")
    return {key: value}
