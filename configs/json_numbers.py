"""Numbers that JSON cannot say: what is not finite becomes null before it is written."""

from __future__ import annotations

import math
from typing import Any


def finite_or_none(value: Any) -> Any:
    """``value`` (dicts, lists, tuples and plain values, however deep) with None in place of NaN and infinities.

    Tuples become lists, as JSON has them. The result passes ``json.dumps(..., allow_nan=False)`` wherever ``value`` would
    pass without that.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return value
