"""What ``pma submit`` prints for people; the job's own output has been shown by then."""

from __future__ import annotations

from typing import Any


def render_submission(result: dict[str, Any]) -> str:
    """One line: which job, and how it stands."""
    name = result["submission_id"]
    if "status" in result:
        return (
            f"job {name} {result['status'].lower()}; what was committed is safe, run the same command again to continue"
        )
    if "exit_code" in result:
        return f"job {name} done"
    return f"job {name} is running; the same command without --no-wait follows it"
