"""Held-out loss of checkpoints: fixed slices, float32, one network for many checkpoints.

A result is a record under the run URL, named by the content digest of the weights and a fingerprint
of the suite, so that nothing is evaluated twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from configs.load import config_from_dict
from configs.schema import Config
from tasks.checkpoints.digest import fingerprint

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

FOLDER = "evaluations"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss of one set of weights."""

    digest: str
    """Content digest of the weights."""
    suite: str
    """Fingerprint of what was measured on: see :func:`suite_of`."""
    loss: float
    """Mean over slices, nats per token."""
    slices: tuple[float, ...]
    """Loss of each slice."""
    domains: dict[str, float]
    """Loss per domain of the corpus."""
    bits_per_byte: float
    """The loss in bits per byte of text."""
    tokens: int
    """Tokens predicted."""
    created: float = 0.0
    """Unix seconds."""

    @property
    def spread(self) -> float:
        """Largest minus smallest slice."""
        return max(self.slices) - min(self.slices)


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """Checkpoints to evaluate in one worker, as names."""

    run_url: str
    """Where records go."""
    config: dict[str, Any]
    """Resolved configuration of the run."""
    urls: tuple[str, ...]
    """Checkpoints."""


def suite_of(config: Config) -> str:
    """Fingerprint of data, split, sequence length and slices: results are comparable if it is equal."""
    return fingerprint(
        {
            "sources": list(config.data.sources),
            "held_out_fraction": config.data.held_out_fraction,
            "sequence_length": config.training.sequence_length,
            "slice_tokens": config.evaluation.slice_tokens,
            "num_slices": config.evaluation.num_slices,
        }
    )[:16]


def evaluate_checkpoints(task: EvaluationTask) -> list[Evaluation]:
    """Evaluate every checkpoint of ``task`` and write its record; runs in a worker with one thread."""
    import torch

    torch.set_num_threads(1)
    suite = HeldOutSuite(task.run_url, config_from_dict(task.config))
    return [suite.evaluate(url) for url in task.urls]


class HeldOutSuite:
    """Held-out text and an empty network, kept for many checkpoints of one run."""

    def __init__(self, run_url: str, config: Config) -> None:
        from tasks.data.corpus import read_corpus
        from tasks.data.held_out import held_out_slices
        from tasks.models.build import build_model

        self._store, self._config = open_store(run_url), config
        self._slices = held_out_slices(read_corpus(config.data, "held_out"), config)
        self._network = build_model(config.model, config.training.sequence_length).eval()

    def evaluate(self, url: str) -> Evaluation:
        """Measure the checkpoint at ``url`` and write its record."""
        from tasks.checkpoints.reader import open_checkpoint
        from tasks.models.weights import load_weights

        checkpoint = open_checkpoint(url)
        load_weights(self._network, checkpoint)
        batch = self._config.evaluation.batch_sequences
        losses = tuple(slice_loss(self._network, tokens, batch) for tokens in self._slices)
        digest = checkpoint.manifest.digest if checkpoint.manifest else fingerprint({"url": checkpoint.url})
        evaluation = _record(digest, self._config, losses, sum(tokens[:, 1:].size for tokens in self._slices))
        write_evaluation(self._store, evaluation)
        return evaluation


def slice_loss(network: torch.nn.Module, tokens: NDArray[np.int64], batch_sequences: int) -> float:
    """Mean cross-entropy in nats per token of ``tokens [sequences, S + 1]``; token losses are summed in float64."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens), batch_sequences):
            batch_BS = torch.from_numpy(tokens[start : start + batch_sequences])
            logits_BSV = network(input_ids=batch_BS[:, :-1], use_cache=False).logits.float()
            losses_T = torch.nn.functional.cross_entropy(
                logits_BSV.flatten(0, 1), batch_BS[:, 1:].flatten(), reduction="none"
            )
            total += float(losses_T.double().sum())
    return total / tokens[:, 1:].size


def evaluation_key(digest: str, suite: str) -> str:
    """Key of a record below its run."""
    return f"{FOLDER}/{digest}-{suite}.json"


def write_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Write a record; the same weights give the same numbers, so a second writer changes nothing."""
    data = json.dumps(dataclasses.asdict(evaluation)).encode()
    store.put(evaluation_key(evaluation.digest, evaluation.suite), data)


def read_evaluation(store: Store, digest: str, suite: str) -> Evaluation | None:
    """Record of these weights on this suite, or None."""
    data = store.read_if_present(evaluation_key(digest, suite))
    if data is None:
        return None
    values = json.loads(data)
    return Evaluation(**{**values, "slices": tuple(values["slices"])})


def paired_gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Mean and standard error over slices of how much lower ``after`` is than ``before``."""
    gains = [a - b for a, b in zip(before.slices, after.slices, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return statistics.fmean(gains), error


def _record(digest: str, config: Config, losses: Sequence[float], tokens: int) -> Evaluation:
    import time

    loss = statistics.fmean(losses)
    return Evaluation(
        digest=digest,
        suite=suite_of(config),
        loss=loss,
        slices=tuple(losses),
        domains={"all": loss},
        bits_per_byte=loss / math.log(2),
        tokens=tokens,
        created=time.time(),
    )
