"""Prove a checkpoint again, as ``pma verify`` does."""

from __future__ import annotations

from typing import Any

from tasks.merging.verify import verify_checkpoint


def verify(url: str, *, load: bool = False) -> dict[str, Any]:
    """The fields of ``pma verify --json``; ``ok`` is False if any check found a problem."""
    found = verify_checkpoint(url, load=load)
    skipped = {name: {"ok": True, "skipped": True, "reason": why} for name, why in found.skipped.items()}
    return {
        "url": url,
        "ok": not found.problems,
        "digest": found.digest,
        "checks": {
            name: {"ok": not problems, "reason": "; ".join(problems) or None} for name, problems in found.checks.items()
        }
        | skipped,
        "problems": found.problems,
    }
