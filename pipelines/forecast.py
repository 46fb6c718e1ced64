"""What annealing would give now, without annealing: the paper's use of merging as a simulator.

The forecast is the held-out loss of the scheduled merge (constant learning rate plus PMA approaches
the annealed model, arXiv 2505.12082 section 4.2). Its stated error is the standard error over
held-out slices; that of the claim itself is unknown until a real annealing branch is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import Config
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import Evaluation, paired_gain, read_evaluation, suite_of
from tasks.merging.schedule import scheduled_rule


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A forecast of the annealed held-out loss."""

    step: int
    """Step it stands on."""
    loss: float
    """Forecast, nats per token."""
    gain: float
    """How much lower than the raw snapshot at the same step."""
    gain_error: float
    """Standard error of ``gain`` over held-out slices."""
    merged: str
    """Merged checkpoint it comes from."""


def forecast_at(run: RunFolder, config: Config, step: int) -> Forecast | None:
    """Forecast from the scheduled merge that ends at ``step``; None if that was not merged and evaluated."""
    raw = next((s for s in run.snapshots() if s.step == step), None)
    if raw is None:
        return None
    name = scheduled_rule(config).name_at(raw.manifest)
    manifest = run.merged().get(name)
    if manifest is None:
        return None
    merged, before = evaluation_of(run, config, manifest.digest), evaluation_of(run, config, raw.manifest.digest)
    if merged is None or before is None:
        return None
    gain, error = paired_gain(before, merged)
    return Forecast(step=step, loss=merged.loss, gain=gain, gain_error=error, merged=f"{run.url}/merged/{name}")


def evaluation_of(run: RunFolder, config: Config, digest: str) -> Evaluation | None:
    """Held-out loss of the weights ``digest``, if it was measured."""
    return read_evaluation(run.store, digest, suite_of(config))
