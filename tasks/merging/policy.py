"""What becomes of each tensor of a merge: its method, its dtypes, and what is never averaged.

A policy file is YAML with the fields of :class:`MergePolicy`; everything has a default, so that no file means the
contract's rules.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.groups import group_of

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KEEP_DTYPE_PATTERNS = ("*e_score_correction_bias",)
"""Tensors whose dtype an override never touches: router correction biases decide by tiny differences."""
BUFFER_PATTERNS = (
    "*e_score_correction_bias", "*expert_bias", "*running_mean", "*running_var", "*num_batches_tracked", "*inv_freq",
)  # fmt: skip
"""Tensors that training updates outside the optimizer."""
NEWEST = "newest"


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """What is different for the tensors whose name or parameter group matches a pattern."""

    tensors: str
    """Shell pattern of tensor names or of parameter groups, such as ``*.mlp.gate.weight`` or ``layers.*.router``."""
    method: str | None = None
    """Merge method of their own, ``newest`` for the newest input's values; None means the merge's."""
    alpha: float | None = None
    """For ``ema``."""
    weights: tuple[float, ...] | None = None
    """For method ``weights``."""
    read: str | None = None
    """Dtype that every input is rounded or widened to before it is added; inputs may then differ in dtype."""
    accumulate: str | None = None
    """``float32`` or ``float64``."""
    write: str | None = None
    """Dtype of the output."""

    def __post_init__(self) -> None:
        for label, value in (("read", self.read), ("write", self.write)):
            if value is not None and value not in DTYPE_NAMES:
                raise UserError(
                    f"policy rule {self.tensors!r}: {label} {value!r} is not known; known: {', '.join(DTYPE_NAMES)}"
                )
        if self.accumulate not in (None, "float32", "float64"):
            raise UserError(
                f"policy rule {self.tensors!r}: accumulate is float32 or float64, got {self.accumulate!r}: "
                "sums in a shorter format lose what an average gains"
            )
        if (self.method == "weights") != (self.weights is not None):
            raise UserError(f"policy rule {self.tensors!r}: method weights and a list of weights go together")

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the tensor ``name``."""
        return fnmatch.fnmatchcase(name, self.tensors) or fnmatch.fnmatchcase(group_of(name), self.tensors)


@dataclass(frozen=True, kw_only=True)
class MergePolicy:
    """Rules of one merge."""

    rules: tuple[TensorRule, ...] = ()
    """The first that matches a tensor holds."""
    keep_dtype: tuple[str, ...] = ()
    """Patterns of tensors whose dtype ``--dtype`` does not touch, beside :data:`KEEP_DTYPE_PATTERNS`."""
    integers: Literal["equal", "newest"] = "equal"
    """Integer and bool tensors: must be equal in all inputs, or the newest's are taken."""
    buffers: Literal["merge", "newest"] = "merge"
    """Tensors of :data:`BUFFER_PATTERNS`: averaged like weights, or the newest's are taken."""
    moments: Literal["merge", "newest", "reset"] = "reset"
    """Adam moments: averaged with the merge's weights, the newest's, or left out so that training starts them at zero."""

    def rule_for(self, name: str) -> TensorRule | None:
        """The first rule that matches."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def keeps_dtype(self, name: str) -> bool:
        """Whether ``--dtype`` leaves the tensor's dtype alone."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*KEEP_DTYPE_PATTERNS, *self.keep_dtype))

    def takes_newest(self, name: str) -> bool:
        """Whether the buffer policy takes the newest input's values."""
        return self.buffers == "newest" and any(fnmatch.fnmatchcase(name, pattern) for pattern in BUFFER_PATTERNS)

    def describe(self) -> dict[str, Any]:
        """The policy as manifests and identities have it."""
        values: dict[str, Any] = {
            "weights": "method",
            "optimizer_moments": self.moments,
            "integers": self.integers,
            "buffers": self.buffers,
            "keep_dtype": ", ".join((*KEEP_DTYPE_PATTERNS, *self.keep_dtype)),
        }
        if self.rules:
            values["rules"] = [
                {
                    key: list(value) if isinstance(value, tuple) else value
                    for key, value in rule.items()
                    if value is not None
                }
                for rule in map(dataclasses.asdict, self.rules)
            ]
        return values


def policy_of(described: Mapping[str, Any], where: str) -> MergePolicy:
    """The policy that :meth:`MergePolicy.describe` gave ``described`` for; :class:`configs.errors.UserError` if there is none."""
    kept = [pattern for pattern in str(described.get("keep_dtype", "")).split(", ") if pattern]
    values = {
        "rules": described.get("rules", []),
        "keep_dtype": kept[len(KEEP_DTYPE_PATTERNS) :],
        **{key: described[key] for key in ("integers", "buffers") if key in described},
        **({"moments": described["optimizer_moments"]} if "optimizer_moments" in described else {}),
    }
    try:
        policy = parse_record(MergePolicy, values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the merge policy is not one that this version knows: {error}") from None
    if policy.describe() != dict(described):
        raise UserError(f"{where}: this version of pmaflow cannot follow the merge policy {dict(described)}")
    return policy


def parse_policy(text: str, where: str) -> MergePolicy:
    """Policy from YAML; :class:`configs.errors.UserError` names ``where``, the key, and the nearest one that is known."""
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None
    _require_known(values, MergePolicy, where)
    for rule in values.get("rules") or []:
        _require_known(rule, TensorRule, f"{where}: a rule")
    try:
        return parse_record(MergePolicy, values)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {error}") from None


def _require_known(values: Any, kind: type, where: str) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, got {values!r}; keys are {', '.join(known)}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: key {key!r} is not known{hint} (known: {', '.join(known)})")
