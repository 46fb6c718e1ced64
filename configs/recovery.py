"""What a run does about loss spikes, and faults that it makes on purpose to try that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.fields import execution, require

PoisonKind = Literal["none", "random-tokens", "wrong-vocabulary", "one-token"]
CorruptionKind = Literal["none", "scale-weights", "flip-bits", "nan-weights", "scale-moments"]


@dataclass(frozen=True, kw_only=True)
class DrillConfig:
    """A fire drill: faults made on purpose. They decide what is trained, so they belong to the run's identity."""

    poison: PoisonKind = "none"
    """What becomes of the tokens of the poisoned stretch of data.

    ``random-tokens`` draws every token anew, ``wrong-vocabulary`` maps all ids by one permutation, as another tokenizer
    would, ``one-token`` repeats one id through a sequence.
    """
    poison_start_sequence: int = 0
    """First poisoned sequence of the run's data stream; a plain rollback meets it again, a data skip avoids it."""
    poison_sequences: int = 0
    """How many sequences are poisoned."""
    corruption: CorruptionKind = "none"
    """What becomes of one rank's weights or moments, once, before a step: a silent data corruption."""
    corruption_step: int = 0
    """The corruption strikes when so many steps are completed, and not again after a recovery."""
    corruption_rank: int = 0
    """The rank it strikes, modulo the number of workers."""
    corruption_scale: float = 100.0
    """Factor of ``scale-weights`` and ``scale-moments``."""
    corruption_fraction: float = 0.01
    """Share of the rank's elements that ``scale-weights``, ``flip-bits`` and ``nan-weights`` strike."""

    def __post_init__(self) -> None:
        for name in ("poison_start_sequence", "poison_sequences", "corruption_step", "corruption_rank"):
            require(getattr(self, name) >= 0, f"drill.{name}", getattr(self, name), "0 or more")
        require(
            (self.poison == "none") == (self.poison_sequences == 0),
            "drill.poison_sequences",
            self.poison_sequences,
            "above 0 with drill.poison, 0 without it",
        )
        scale, fraction = self.corruption_scale, self.corruption_fraction
        require(math.isfinite(scale), "drill.corruption_scale", scale, "a finite factor")
        require(0 < fraction <= 1, "drill.corruption_fraction", fraction, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What a run does about a loss spike; none of it decides bytes before there is one, so all of it may be changed."""

    policy: Literal["pma", "rollback", "rollback-skip", "stop", "ignore"] = execution("pma")
    """``pma``: go on from a merge of the last healthy snapshots, without the data of the spike; ``rollback``: from the
    last healthy snapshot; ``rollback-skip``: the same without the data of the spike; ``stop``: end with an error;
    ``ignore``: do not look for spikes."""
    count: int = execution(3)
    """Snapshots that ``pma`` merges (the paper's N for it); fewer where fewer are healthy."""
    margin_tokens: int | None = execution(None)
    """Tokens before the onset within which a snapshot does not count as healthy; null: half of snapshots.interval_tokens."""
    moments: Literal["merge", "newest", "reset"] = execution("merge")
    """What ``pma`` does with Adam's moments."""
    rewarm_tokens: int | None = execution(None)
    """Tokens over which the learning rate rises from 0 after a recovery; null: half of snapshots.interval_tokens."""
    confirm_tokens: int | None = execution(None)
    """Tokens beyond the alarm after which a recovery has held; null: twice snapshots.interval_tokens."""
    learning_rate_factor: float = execution(0.5)
    """Factor on the learning rate, to the end of the run, at every further try at a spike and at one soon after it."""
    max_attempts: int = execution(3)
    """Tries at one spike before the run stops; each goes back further, and ``pma`` merges two snapshots more."""
    max_recoveries: int = execution(10)
    """Recoveries of a run before it stops."""
    window_steps: int = execution(128)
    """Steps that make the detector's baseline."""
    patience_steps: int = execution(48)
    """Steps that trouble has to last before it is a spike; non-finite values do not wait."""
    threshold: float = execution(6.0)
    """Scales of noise above the baseline at which a loss or gradient norm stands out."""
    lost_progress: float = execution(0.1)
    """Part of the progress since the start that a rise must take back."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "recovery.count", self.count, "at least 1")
        for key in ("margin_tokens", "rewarm_tokens", "confirm_tokens"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"recovery.{key}", value, "0 or more, or null")
        require(
            0 < self.learning_rate_factor <= 1, "recovery.learning_rate_factor", self.learning_rate_factor, "in (0, 1]"
        )
        require(self.max_attempts >= 1, "recovery.max_attempts", self.max_attempts, "at least 1")
        require(self.max_recoveries >= 1, "recovery.max_recoveries", self.max_recoveries, "at least 1")
        require(self.window_steps >= 8, "recovery.window_steps", self.window_steps, "at least 8")
        require(self.patience_steps >= 1, "recovery.patience_steps", self.patience_steps, "at least 1")
        require(0 <= self.lost_progress < math.inf, "recovery.lost_progress", self.lost_progress, "0 or more")
        require(3 <= self.threshold < math.inf, "recovery.threshold", self.threshold, "at least 3")
