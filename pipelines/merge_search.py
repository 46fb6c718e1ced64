"""Methods that evaluate: make trial merges of a run's snapshots, measure them, keep the weights that did best."""

from __future__ import annotations

import dataclasses
import logging
import statistics

from cluster.storage import Store, open_store
from configs.errors import UserError
from pipelines.evaluate import run_of
from pipelines.merge_request import Chosen, MergeRequest
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.manifest import MANIFEST_KEY
from tasks.checkpoints.run_folder import RunFolder
from tasks.evaluation.held_out import HeldOutSuite, read_evaluation, suite_of
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.search import Found, Loss, Weights, greedy, search

TRIALS = "trials"
MIN_SLICES = 2
SEARCH_TRIALS_PER_INPUT = 8
logger = logging.getLogger(__name__)


def choose_by_evaluation(request: MergeRequest, chosen: Chosen, *, dry_run: bool) -> Chosen:
    """``chosen`` with the weights that method ``greedy`` or ``search`` finds; a dry run only checks that it could.

    The last held-out slice chooses nothing and is reported; the others tune. Trial merges lie below ``<run>/trials`` until
    the weights are found, so that a search that was killed goes on.
    """
    run = RunFolder(request.run or run_of(chosen.inputs[0].url))
    config = run.identity().config
    if config.evaluation.num_slices < MIN_SLICES:
        raise UserError(
            f"--method {request.method} tunes on some held-out slices and reports another: it needs at least {MIN_SLICES} "
            f"(evaluation.num_slices of {run.url} is {config.evaluation.num_slices})"
        )
    count = len(chosen.inputs)
    if dry_run:
        found = Found(weights=(1 / count,) * count, trace={})
    else:
        trials = _Trials(run, chosen)
        found = (
            greedy(count, trials.measure)
            if request.method == "greedy"
            else search(count, trials.measure, max_trials=SEARCH_TRIALS_PER_INPUT * count)
        )
        trials.clear()
    choice = MethodChoice(method=request.method, weights=found.weights, trace=found.trace)
    return dataclasses.replace(
        chosen, recipes=[dataclasses.replace(recipe, choice=choice) for recipe in chosen.recipes]
    )


class _Trials:
    """Makes and measures trial merges; equal weights are measured once."""

    def __init__(self, run: RunFolder, chosen: Chosen) -> None:
        self._run, self._config, self._inputs = run, run.identity().config, chosen.inputs
        self._suite: HeldOutSuite | None = None
        self._known: dict[Weights, Loss] = {}
        name = fingerprint([item.manifest.digest if item.manifest else item.url for item in chosen.inputs])[:16]
        self._folder = run.store.child(f"{TRIALS}/{name}")

    def measure(self, weights: Weights) -> Loss:
        """Loss of the merge with ``weights``."""
        if weights not in self._known:
            self._known[weights] = self._measure(weights)
            loss = self._known[weights]
            logger.info("trial %d: tuning loss %.5f", len(self._known), loss.tuning)
        return self._known[weights]

    def clear(self) -> None:
        """Remove the trial merges, manifests first."""
        _remove(self._folder)

    def _measure(self, weights: Weights) -> Loss:
        from pipelines.merge import carry_out

        output = self._folder.child(fingerprint(list(weights))[:16])
        choice = MethodChoice(method="weights", weights=weights)
        (report,) = carry_out("local", [plan_merge(self._inputs, choice, output_url=output.url)])
        evaluation = read_evaluation(self._run.store, report.manifest.digest, suite_of(self._config))
        if evaluation is None:
            self._suite = self._suite or HeldOutSuite(self._run.url, self._config)
            evaluation = self._suite.evaluate(output.url)
        *tuning, hold_out = evaluation.slices
        return Loss(tuning=statistics.fmean(tuning), hold_out=hold_out)


def _remove(folder: Store) -> None:
    store = open_store(folder.url)
    keys = store.keys("")
    for key in sorted(keys, key=lambda key: not key.endswith(MANIFEST_KEY)):
        store.delete(key)
