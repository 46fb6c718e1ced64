"""The tree of a run in MLflow: what each of its runs is called and what it is below, so that a person finds things.

MLflow's table shows ten children of a parent; of segments and branches there can be hundreds. The first few of a kind are
children of the run, the others of a run for the rest of their kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

TOP = "run"
"""Key of the run itself."""
SIBLINGS = 3
"""Of a kind, so many are children of the run itself."""
GROUPS = {"segment": "more segments", "anneal": "more annealing branches", "branch": "more branches"}
"""Kind to the name of the run that the others are below."""
_ANNEAL = re.compile(r"branches/anneal-from-step-(\d+)")


def kind_of(key: str) -> str:
    """``run``, ``segment``, ``anneal``, ``branch``, ``merges``, ``evaluations`` or ``group``."""
    if key.startswith("group/"):
        return "group"
    if key.startswith("segment/"):
        return "segment"
    if key.startswith("branches/"):
        return "anneal" if _ANNEAL.fullmatch(key) else "branch"
    return key


def parent_of(key: str, known: Collection[str]) -> str | None:
    """Key of the run that the new run ``key`` is below, ``known`` being those that there are; None for the run itself."""
    if key == TOP:
        return None
    kind = kind_of(key)
    if kind in GROUPS and sum(kind_of(other) == kind for other in known) >= SIBLINGS:
        return f"group/{kind}"
    return TOP


def name_of(key: str, config_name: str, run_url: str) -> str:
    """What people read: ``tiny (runs/first)``, ``segment 2``, ``anneal from step 300``, ``control, seed 2``."""
    if key == TOP:
        folder = urlsplit(run_url).path.rstrip("/").rpartition("/")[2]
        return config_name if folder in ("", config_name) else f"{config_name} ({folder})"
    if key.startswith("group/"):
        return GROUPS[key.removeprefix("group/")]
    if match := _ANNEAL.fullmatch(key):
        return f"anneal from step {int(match[1]):,}"
    name = key.removeprefix("branches/").replace("/", " ")
    arm = re.fullmatch(r"(?:(control)-?)?(?:seed-(\d+))?", name)
    if key.startswith("branches/") and arm and name:
        return ", ".join(part for part in (arm[1], arm[2] and f"seed {arm[2]}") if part)
    return name
