"""Records of an ablation, of arms and of task scores as the commands write them, for a run that made none."""

from __future__ import annotations

import json
from typing import Any

from configs.load import config_to_dict
from configs.schema import Config
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import EvaluationTask, evaluate_checkpoints
from tasks.evaluation.task_scores import TaskScores, write_scores

LOSSES = {(3, 1280): 3.31, (6, 1280): 3.25, (3, 2560): 3.42}
"""By N and V; N 6 with V 2560 could not be made."""


def cells(
    method: str = "sma", end: int = 80, losses: dict[tuple[int, int], float] | None = None
) -> list[dict[str, Any]]:
    """Cells of one method and end point."""
    return [
        {
            "name": f"{method}-n{count}-v{interval}-step-{end:09d}", "method": method,
            "alpha": 0.2 if method == "ema" else None, "count": count, "interval_tokens": interval,
            "span_tokens": (count - 1) * interval, "end_step": end, "digest": f"{count}", "loss": loss,
            "gain": 3.5 - loss, "gain_error": 0.01,
        }
        for (count, interval), loss in (losses or LOSSES).items()
    ]  # fmt: skip


def ablation(end: int = 80, **fields: Any) -> dict[str, Any]:
    """A record of ``pma ablate``: SMA and EMA."""
    found = [*cells("sma", end), *cells("ema", end, {key: loss + 0.1 for key, loss in LOSSES.items()})]
    best, chosen = found[1], found[0]
    return {
        "run": "", "grid": {}, "cells": found, "lacking": [{"name": "sma-n6-v2560", "reason": "too few snapshots"}],
        "ends": [{
            "step": end, "raw_loss": 3.5, "best": best["name"], "chosen": chosen["name"],
            "recommended": {"method": "sma", "count": 3, "interval_tokens": 1280},
            "not_told_apart": [best["name"], chosen["name"]],
            "spans": [{"span_tokens": span, "loss": 3.4, "cells": 2} for span in (2560, 5120, 6400)],
        }], "created": 1.0, **fields,
    }  # fmt: skip


def comparison() -> dict[str, Any]:
    """A record of a stage with two seeds."""

    def difference(mean: float, over: str = "slices", **fields: Any) -> dict[str, Any]:
        low, high = mean - 0.01, mean + 0.01
        sign = -1 if high < 0 else 1 if low > 0 else 0
        return {
            "mean": mean,
            "low": low,
            "high": high,
            "num": 3,
            "over": over,
            "is_ratio": False,
            "sign": sign,
            **fields,
        }

    arm = {
        "initial_loss": 3.0, "held_out": [[1280, 2.9]], "final_loss": 2.8, "final_domains": {"all": 2.8},
        "final_bits_per_byte": 4.0, "training_loss": 2.7, "gradient_norm": 0.5, "gradient_variance": 0.01,
        "num_spikes": 0, "num_excursions": 2,
    }  # fmt: skip
    curve = [{"tokens": 1280 * i, **difference(-0.08 / (i + 1))} for i in range(4)]
    differences = {
        "initial_loss": difference(-0.08),
        "final_loss": difference(-0.005),
        "gradient_norm": difference(1.1, "blocks", is_ratio=True),
    }
    seeds = [{"seed": n, "init": arm, "control": arm, "differences": differences, "curve": curve} for n in (1, 2)]
    over_seeds = {name: {**item, "over": "seeds"} for name, item in differences.items()}
    return {"confidence": 0.95, "seeds": seeds, "over_seeds": over_seeds, "time": 1.8e9}  # fmt: skip


def add_records(run: RunFolder) -> None:
    """An ablation, a comparison of arms and a task's scores, put on record in ``run``."""
    newest = run.glances()[-1]
    run.store.put("ablations/0123456789abcdef.json", json.dumps(ablation(newest.step or 0)).encode())
    run.store.put("comparisons/0123456789abcdef.json", json.dumps(comparison()).encode())
    scores = TaskScores(
        digest=newest.digest, task="brackets", fingerprint="f", harness="0.4.13",
        scores={"brackets": {"acc": 0.625, "acc_stderr": 0.05}}, samples={"brackets": 80}, step=newest.step,
        tokens_seen=newest.tokens_seen, created=1.0,
    )  # fmt: skip
    write_scores(run.store, scores)


def evaluate(run: RunFolder, config: Config) -> None:
    """Held-out losses of all snapshots, in this process."""
    urls = tuple(glance.url for glance in run.glances())
    evaluate_checkpoints(EvaluationTask(run_url=run.url, config=config_to_dict(config), urls=urls))
