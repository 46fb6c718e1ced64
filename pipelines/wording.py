"""Numbers and events as people read them; imported by every ``--help``, so nothing heavy comes with it."""

from __future__ import annotations

from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_seconds(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_bytes(count: int) -> str:
    """``512 B``, ``3.4 MiB``."""
    power = 0 if count < 1 else min(len(UNITS) - 1, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:,.{1 if power else 0}f} {UNITS[power]}"


def format_loss(loss: float | None) -> str:
    """``1.2345``; None stands for a loss that is not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def describe_event(event: dict[str, Any]) -> str:
    """One line about an event: its kind and its short fields."""
    details = {
        k: v for k, v in event.items() if k not in ("key", "kind", "time") and isinstance(v, (str, int, float, bool))
    }
    shown = ", ".join(f"{k} {round(v, 3) if isinstance(v, float) else v}" for k, v in details.items())
    return f"{event['kind']}: {shown[:200]}"
