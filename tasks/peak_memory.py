"""Peak resident memory of this process."""

from __future__ import annotations

import re
import resource
from pathlib import Path


def peak_resident_bytes() -> int:
    """Largest resident size of this process since it began, mapped pages included.

    From ``/proc``: what ``getrusage`` calls the peak begins at the size of the process that started this one.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    kibibytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024
