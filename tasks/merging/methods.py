"""Merge weights: how much each checkpoint of a window counts. Pure functions in float64.

Inputs are ordered oldest to newest, i = 1..N (arXiv 2505.12082, Eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs.errors import UserError
from tasks.curves import DECAY_CURVES

METHODS = ("sma", "wma", "ema", "wsm:linear", "wsm:cosine", "wsm:1-sqrt")
"""Methods whose weights follow from a rule; beside them ``weights`` takes explicit ones."""
SUM_TOLERANCE = 1e-6
"""How far explicit weights may be from summing to 1."""


def build_weights(method: str, count: int, alpha: float | None = None) -> tuple[float, ...]:
    """Weights of ``count`` inputs, oldest first, summing to 1.

    ``sma``: 1/N (Eq. 3). ``wma``: i / (N(N+1)/2) (Eq. 5). ``ema``: the recursion M(1) = M_1,
    M(i) = alpha M_i + (1 - alpha) M(i-1) (Eq. 4), so the oldest weighs (1 - alpha)^(N-1).
    ``wsm:linear|cosine|1-sqrt``: the weights under which a mean of snapshots equals a decay of that
    shape (arXiv 2507.17634, Theorem 3.1), at decay values d_i = f(i / N), i = 0..N-1.
    Raises :class:`configs.errors.UserError` for an unknown method, an empty window or alpha outside (0, 1].
    """
    if count < 1:
        raise UserError(f"a merge needs at least one input, got {count}")
    if method == "sma":
        return (1.0 / count,) * count
    if method == "wma":
        total = count * (count + 1) / 2
        return tuple(i / total for i in range(1, count + 1))
    if method == "ema":
        if alpha is None or not 0 < alpha <= 1:
            raise UserError(f"method ema needs alpha in (0, 1], got {alpha}")
        oldest = (1 - alpha) ** (count - 1)
        return (oldest, *(alpha * (1 - alpha) ** (count - i) for i in range(2, count + 1)))
    if method.startswith("wsm:") and method.removeprefix("wsm:") in DECAY_CURVES:
        decay = DECAY_CURVES[method.removeprefix("wsm:")]
        return decay_weights([decay(i / count) for i in range(count)])
    raise UserError(f"merge method {method!r} is not known; known: {', '.join(METHODS)}, weights")


def decay_weights(decay: Sequence[float]) -> tuple[float, ...]:
    """Merge weights c of N snapshots from decay values d_0 = 1 >= d_1 >= ... >= d_(N-1) >= 0.

    c_(N-1) = d_(N-1); c_i = d_i - d_(i+1) for 0 < i < N-1; c_0 = 1 - d_1: the oldest takes what the
    others leave (arXiv 2507.17634, Theorem 3.1).
    """
    if len(decay) == 1:
        return (1.0,)
    inner = [decay[i] - decay[i + 1] for i in range(1, len(decay) - 1)]
    return (1.0 - decay[1], *inner, decay[-1])


def check_weights(weights: Sequence[float], count: int, *, allow_unnormalised: bool = False) -> tuple[float, ...]:
    """Explicit ``weights`` for ``count`` inputs; zero is a weight, not an omission.

    Raises :class:`configs.errors.UserError` if their number is wrong, one is not finite, or they do not sum to 1
    within :data:`SUM_TOLERANCE` and ``allow_unnormalised`` is not set.
    """
    if len(weights) != count:
        raise UserError(f"--weights has {len(weights)} values for {count} inputs")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights must be finite numbers, got {list(weights)}")
    total = math.fsum(weights)
    if abs(total - 1) > SUM_TOLERANCE and not allow_unnormalised:
        raise UserError(f"--weights sum to {total:.9g}, not 1; correct them or give --allow-unnormalised")
    return tuple(float(weight) for weight in weights)
