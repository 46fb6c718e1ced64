"""The spike detector on labelled curves: precision, recall, false alarms and delay.

``python -m benchmarks.spikes [--seeds 40] [--first-seed 1000] [--rule '{"window_points": 64}']``

Default thresholds were chosen on seeds below 1000; the figures in docs/spikes.md are for seeds from 1000 on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.recovery.curves import AMBIGUOUS, BENIGN, DIVERGING, generate_curve
from tasks.recovery.detector import find_spike
from tasks.recovery.rule import SpikeRule

HELD_OUT_SEED = 1000
"""Smaller seeds are for choosing thresholds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the rule said to one curve."""

    kind: str
    """Kind of the curve."""
    num_steps: int
    """Measured steps of the curve."""
    onset_step: int | None
    """First step of its divergence, if it has one."""
    found_onset_step: int | None
    """Onset that the alarm names."""
    alarm_step: int | None
    """When the alarm came, if it came."""

    @property
    def is_found(self) -> bool:
        """Whether a divergence was reported, and not before it began."""
        return self.alarm_step is not None and self.onset_step is not None and self.alarm_step >= self.onset_step

    @property
    def is_false(self) -> bool:
        """Whether the alarm was about nothing."""
        return self.alarm_step is not None and not self.is_found


def main() -> None:
    """Print one JSON line a kind, and then one for all that count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=40, help="curves of every kind")
    parser.add_argument("--first-seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--rule", type=json.loads, default={}, help="fields of SpikeRule, as JSON")
    options = parser.parse_args()
    rule, seeds = SpikeRule(**options.rule), range(options.first_seed, options.first_seed + options.seeds)
    counted: list[Outcome] = []
    for group in (BENIGN, DIVERGING, AMBIGUOUS):
        for kind in group:
            outcomes = judge(kind, seeds, rule)
            print(json.dumps({"kind": kind, **summarise(outcomes)}), flush=True)
            counted += outcomes if group is not AMBIGUOUS else []
    print(json.dumps({"kind": "all but the ambiguous", **summarise(counted)}))


def judge(kind: str, seeds: Iterable[int], rule: SpikeRule) -> list[Outcome]:
    """Outcomes of ``rule`` on curves of ``kind``."""
    outcomes = []
    for seed in seeds:
        curve = generate_curve(kind, seed)
        alarm = find_spike(curve.points(), rule)
        outcomes.append(
            Outcome(
                kind=kind,
                num_steps=len(curve.loss),
                onset_step=curve.onset_step,
                found_onset_step=alarm.onset_step if alarm else None,
                alarm_step=alarm.alarm_step if alarm else None,
            )
        )
    return outcomes


def summarise(outcomes: Sequence[Outcome]) -> dict[str, float | int | None]:
    """Precision, recall, false alarms per million healthy steps, delay and error of the onset in steps."""
    diverging = [outcome for outcome in outcomes if outcome.onset_step is not None]
    found = [outcome for outcome in diverging if outcome.is_found]
    num_false = sum(outcome.is_false for outcome in outcomes)
    healthy_steps = sum(outcome.onset_step or outcome.num_steps for outcome in outcomes)
    delays = [outcome.alarm_step - outcome.onset_step for outcome in found]  # type: ignore[operator]
    late = [outcome.found_onset_step - outcome.onset_step for outcome in found]  # type: ignore[operator]
    return {
        "curves": len(outcomes),
        "steps": sum(outcome.num_steps for outcome in outcomes),
        "diverging": len(diverging),
        "found": len(found),
        "false_alarms": num_false,
        "precision": round(len(found) / (len(found) + num_false), 4) if found or num_false else None,
        "recall": round(len(found) / len(diverging), 4) if diverging else None,
        "false_alarms_per_million_healthy_steps": round(1e6 * num_false / healthy_steps, 2),
        "delay_steps_median": _quantile(delays, 0.5),
        "delay_steps_p90": _quantile(delays, 0.9),
        "onset_late_steps_median": _quantile(late, 0.5),
        "onset_late_steps_p90": _quantile(late, 0.9),
    }


def _quantile(values: Sequence[int], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 1) if values else None


if __name__ == "__main__":
    main()
