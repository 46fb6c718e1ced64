"""Merge weights: how much each checkpoint of a window counts. Pure functions in float64.

Inputs are ordered oldest to newest, i = 1..N (arXiv 2505.12082, Eq. 1).
"""

from __future__ import annotations

from configs.errors import UserError

METHODS = ("sma", "wma", "ema")


def build_weights(method: str, count: int, alpha: float | None = None) -> tuple[float, ...]:
    """Weights of ``count`` inputs, oldest first, summing to 1.

    ``sma``: 1/N (Eq. 3). ``wma``: i / (N(N+1)/2) (Eq. 5). ``ema``: the recursion M(1) = M_1,
    M(i) = alpha M_i + (1 - alpha) M(i-1) (Eq. 4), so the oldest weighs (1 - alpha)^(N-1).
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
    raise UserError(f"merge method {method!r} is not known; known: {', '.join(METHODS)}")
