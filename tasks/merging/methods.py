"""Merge weights: how much each checkpoint of a window counts. Pure functions in float64.

Inputs are ordered oldest to newest, i = 1..N (arXiv 2505.12082, Eq. 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError
from tasks.curves import DECAY_CURVES

METHODS = ("sma", "wma", "ema", "wsm:linear", "wsm:cosine", "wsm:1-sqrt", "wsm:list", "power-ema")
"""Methods whose weights follow from a rule; beside them ``weights`` takes explicit ones."""
EVALUATED_METHODS = ("greedy", "search")
"""Methods that choose weights by held-out loss; the weights they chose are recorded."""
SUM_TOLERANCE = 1e-6
"""How far explicit weights may be from summing to 1."""
WIDEST_POWER_EMA = 12**-0.5
"""Relative width of a flat average: power 0."""


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """A merge method and its parameters."""

    method: str
    """One of :data:`METHODS`, ``weights``, or one of :data:`EVALUATED_METHODS` with the weights it chose."""
    alpha: float | None = None
    """For ``ema``: weight of the newest in the recursion."""
    decay: tuple[float, ...] | None = None
    """For ``wsm:list``: decay values d_0 = 1 >= d_1 >= ... of the inputs."""
    width: float | None = None
    """For ``power-ema``: relative width of the average."""
    weights: tuple[float, ...] | None = None
    """For ``weights``: explicit ones."""
    allow_unnormalised: bool = False
    """Accept explicit weights that do not sum to 1."""
    trace: dict[str, Any] = field(default_factory=dict)
    """For the evaluated methods: what they tried and found; says nothing about the bytes."""

    @property
    def options(self) -> dict[str, Any]:
        """Parameters beside ``alpha`` and explicit weights, for the manifest."""
        found = {"decay": list(self.decay) if self.decay else None, "width": self.width, "trace": self.trace or None}
        return {key: value for key, value in found.items() if value is not None}

    def check(self) -> None:
        """Refuse an unknown method, and a parameter that it lacks or does not take."""
        if self.method not in (*METHODS, "weights", *EVALUATED_METHODS):
            raise UserError(
                f"merge method {self.method!r} is not known; known: {', '.join(METHODS)}, weights, greedy, search"
            )
        _require_fitting(self)

    def build(self, positions: Sequence[int | None]) -> tuple[float, ...]:
        """Weights of inputs that have seen ``positions`` tokens (None: unknown), oldest first.

        Raises :class:`configs.errors.UserError` where the parameters do not fit the method or the inputs.
        """
        self.check()
        count = len(positions)
        if self.weights is not None:
            return check_weights(self.weights, count, allow_unnormalised=self.allow_unnormalised)
        if self.method == "wsm:list":
            return decay_list_weights(self.decay or (), count)
        if self.method == "power-ema":
            return power_ema_weights(positions, self.width or 0.0)
        return build_weights(self.method, count, self.alpha)


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


def decay_list_weights(decay: Sequence[float], count: int) -> tuple[float, ...]:
    """:func:`decay_weights` of a list that the user wrote, checked: ``count`` values from 1 down to no less than 0."""
    if len(decay) != count:
        raise UserError(f"--decay has {len(decay)} values for {count} inputs")
    if decay[0] != 1 or any(later > earlier for earlier, later in itertools.pairwise(decay)) or decay[-1] < 0:
        raise UserError(f"--decay starts at 1 and never rises or falls below 0, got {list(decay)}")
    return decay_weights(decay)


def power_ema_weights(positions: Sequence[int | None], width: float) -> tuple[float, ...]:
    """Weights of a power-function average of relative ``width``, from snapshots at ``positions`` tokens.

    The profile p(t) ~ t**gamma has, relative to the last position, the standard deviation
    width = sqrt((gamma + 1) / ((gamma + 2)**2 (gamma + 3))) (Karras et al., arXiv 2312.02696, post-hoc EMA). Snapshot i
    stands for training from the one before it to itself, the first for as long as the second does, so
    w_i ~ t_i**(gamma + 1) - t_(i-1)**(gamma + 1). What lies before the window is left out: the weights sum to 1.
    """
    known = [float(position) for position in positions if position is not None]
    if len(known) != len(positions):
        raise UserError(
            "method power-ema needs the tokens seen of every input; plain folders do not say: `pma adopt` them into a run first"
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(known)):
        raise UserError(f"method power-ema needs inputs in the order of training, got positions {positions}")
    if not 0 < width <= WIDEST_POWER_EMA:
        raise UserError(
            f"--width is a relative width in (0, {WIDEST_POWER_EMA:.4f}], got {width}; 0.05 to 0.15 are usual"
        )
    if len(known) == 1:
        return (1.0,)
    gamma = _power_of(width)
    before = max(0.0, 2 * known[0] - known[1])
    edges = [edge / known[-1] for edge in (before, *known)]
    mass = [high ** (gamma + 1) - low ** (gamma + 1) for low, high in itertools.pairwise(edges)]
    total = math.fsum(mass)
    return tuple(value / total for value in mass)


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


def _power_of(width: float) -> float:
    """Gamma of a relative width, by bisection: the width falls as gamma grows."""
    low, high = 0.0, 1.0
    while _width_of(high) > width:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _width_of(middle) > width else (low, middle)
    return high


def _width_of(gamma: float) -> float:
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def _require_fitting(choice: MethodChoice) -> None:
    """Refuse a parameter that the method lacks or does not take."""
    needs = [
        ("ema", "--alpha", choice.alpha, "in (0, 1]; the paper tries 0.1 and 0.2"),
        ("wsm:list", "--decay", choice.decay, "d0,d1,...: one value per input, from 1 downwards"),
        ("power-ema", "--width", choice.width, "relative to the training so far; 0.05 to 0.15 are usual"),
    ]
    for method, option, value, explanation in needs:
        if choice.method == method and value is None:
            raise UserError(f"--method {method} needs {option} {explanation}")
        if choice.method != method and value is not None:
            raise UserError(f"{option} goes with --method {method}, not with {choice.method}")
    if choice.method == "weights" and choice.weights is None:
        raise UserError("--method weights and --weights w1,w2,... go together")
    if choice.weights is not None and choice.method not in ("weights", *EVALUATED_METHODS):
        raise UserError(f"--method weights and --weights go together; --method {choice.method} has weights of its own")
