"""What the commands that look after a run print for people."""

from __future__ import annotations

from typing import Any


def render_gc(result: dict[str, Any]) -> str:
    """A plan of retention, or what it did, as a table."""
    rows = result["rows"]
    names = [row["url"].removeprefix(f"{result['run']}/") for row in rows]
    width = max((len(name) for name in names), default=0)
    lines = [
        f"{row['action']:<6}  {name:<{width}}  {_size(row['bytes']):>9}  {'; '.join(row['reasons'])}"
        for name, row in zip(names, rows, strict=True)
    ]
    lines += [f"note: {note}" for note in result["notes"]]
    freed, kept = _size(result["freed_bytes"]), _size(result["kept_bytes"])
    if result["apply"]:
        lines.append(f"{result['run']}: {len(result['deleted'])} taken away, {freed} freed, {kept} kept")
    else:
        going = sum(row["action"] == "delete" for row in rows)
        lines.append(f"{result['run']}: would free {freed} of {going} checkpoint(s) and keep {kept}; --apply does it")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
