"""Held-out loss of checkpoints: fixed slices, float32, one network for many checkpoints.

A result is a record under the run URL, named by the content digest of the weights and a fingerprint
of the suite, so that nothing is evaluated twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from configs.data import DataConfig
from configs.json_numbers import finite_or_none
from configs.load import config_from_dict
from configs.schema import Config
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.start_point import StartPoint, require_digest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from tasks.data.batch import Batch

FOLDER = "evaluations"
_SUITE_KEYS = (
    "tokenizer", "end_of_document", "format", "text_field", "token_dtype", "packing", "chat_template", "long_rows", "split_field",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss of one set of weights."""

    digest: str
    """Content digest of the weights."""
    suite: str
    """Fingerprint of what was measured on: see :func:`suite_of`."""
    loss: float
    """Mean over slices, nats per token; not finite for weights that are not, or that overflow."""
    slices: tuple[float, ...]
    """Loss of each slice."""
    domains: dict[str, float]
    """Loss per domain of the mixture, mean over slices; ``all`` alone for plain sources."""
    bits_per_byte: float | None
    """The loss in bits per byte of text; None for token files whose tokenizer nobody named."""
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
    start: StartPoint | None = None
    """Of a run that begins with given weights: where ``urls`` name them, they must still be the same."""


def suite_of(config: Config) -> str:
    """Fingerprint of data, split, sequence length and slices: results are comparable if it is equal."""
    values = {
        "sources": list(config.data.sources),
        "held_out_fraction": config.data.held_out_fraction,
        "sequence_length": config.training.sequence_length,
        "slice_tokens": config.evaluation.slice_tokens,
        "num_slices": config.evaluation.num_slices,
    }
    # Only what differs from the default, so that older records keep their names.
    usual = DataConfig()
    values |= {
        key: getattr(config.data, key) for key in _SUITE_KEYS if getattr(config.data, key) != getattr(usual, key)
    }
    if config.data.mixture:
        values["mixture"] = [dataclasses.asdict(domain) for domain in config.data.mixture]
    return fingerprint(values)[:16]


def evaluate_checkpoints(task: EvaluationTask) -> list[Evaluation]:
    """Evaluate every checkpoint of ``task`` and write its record; runs in a worker with one thread."""
    import torch

    torch.set_num_threads(1)
    suite = HeldOutSuite(task.run_url, config_from_dict(task.config))
    return [suite.evaluate(url, task.start) for url in task.urls]


class HeldOutSuite:
    """Held-out sequences and an empty network, kept for many checkpoints of one run."""

    def __init__(self, run_url: str, config: Config) -> None:
        from tasks.data.held_out import held_out_batches
        from tasks.data.stream import open_stream
        from tasks.data.tokenizer_files import run_vocabulary
        from tasks.models.build import build_model

        self._store, self._config = open_store(run_url), config
        stream = open_stream(config, "held_out")
        try:
            self._slices = held_out_batches(stream, config)
        finally:
            stream.close()
        targets = [batch.targets_BS for batches in self._slices for batch in batches.values()]
        self._tokens = sum(int((target_BS >= 0).sum()) for target_BS in targets)
        vocabulary = run_vocabulary(config.data)
        self._bytes = None
        if vocabulary is not None:
            self._bytes = sum(vocabulary.count_bytes(row[row >= 0]) for target_BS in targets for row in target_BS)
        self._network = build_model(config.model, config.training.sequence_length).eval()

    def evaluate(self, url: str, start: StartPoint | None = None) -> Evaluation:
        """Measure the checkpoint at ``url`` and write its record.

        Raises :class:`tasks.checkpoints.start_point.WeightsReplaced` where ``start`` is there and holds other weights by now.
        """
        from tasks.checkpoints.content import digest_of_weights
        from tasks.checkpoints.reader import open_checkpoint
        from tasks.checkpoints.tied import without_tied
        from tasks.models.weights import load_weights

        checkpoint = open_checkpoint(url)
        digest = digest_of_weights(checkpoint)
        if start is not None and url == start.url:
            require_digest(start, digest)
        load_weights(self._network, without_tied(checkpoint))
        size = self._config.evaluation.batch_sequences
        sums = [
            {name: sum_losses(self._network, batch, size) for name, batch in batches.items()}
            for batches in self._slices
        ]
        evaluation = self._record(digest, sums)
        write_evaluation(self._store, evaluation)
        return evaluation

    def _record(self, digest: str, sums: Sequence[dict[str, tuple[float, int]]]) -> Evaluation:
        slices = [
            sum(total for total, _ in found.values()) / sum(count for _, count in found.values()) for found in sums
        ]
        loss = statistics.fmean(slices)
        bits = None if not self._bytes else loss / math.log(2) * (self._tokens / self._bytes)
        return Evaluation(
            digest=digest,
            suite=suite_of(self._config),
            loss=loss,
            slices=tuple(slices),
            domains={name: statistics.fmean(found[name][0] / found[name][1] for found in sums) for name in sums[0]},
            bits_per_byte=bits,
            tokens=self._tokens,
            created=time.time(),
        )


def slice_loss(network: torch.nn.Module, tokens: NDArray[np.int64], batch_sequences: int) -> float:
    """Mean cross-entropy in nats per token of ``tokens [sequences, S + 1]``; token losses are summed in float64."""
    from tasks.data.batch import Batch

    total, count = sum_losses(network, Batch(tokens_BS1=tokens, targets_BS=tokens[:, 1:]), batch_sequences)
    return total / count


def sum_losses(network: torch.nn.Module, batch: Batch, batch_sequences: int) -> tuple[float, int]:
    """Cross-entropy of ``batch`` in nats, summed over its targets in float64, and how many they are.

    Where the batch has document borders, attention and positions keep to them: transformers reads them off
    ``position_ids`` that begin anew.
    """
    import torch

    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(batch.tokens_BS1), batch_sequences):
            part = batch.rows(start, start + batch_sequences)
            positions = part.position_ids_BS
            packed = {} if positions is None else {"position_ids": torch.from_numpy(positions)}
            logits_BSV = network(input_ids=torch.from_numpy(part.inputs_BS), use_cache=False, **packed).logits.float()
            losses_T = torch.nn.functional.cross_entropy(
                logits_BSV.flatten(0, 1), torch.from_numpy(part.targets_BS).flatten(), reduction="none"
            )
            total += float(losses_T.double().sum())
    return total, int((batch.targets_BS >= 0).sum())


def evaluation_key(digest: str, suite: str) -> str:
    """Key of a record below its run."""
    return f"{FOLDER}/{digest}-{suite}.json"


def write_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Write a record; the same weights give the same numbers, so a second writer changes nothing.

    JSON has no number that is not finite: such a loss is null there, and NaN again when it is read.
    """
    data = json.dumps(finite_or_none(dataclasses.asdict(evaluation)), allow_nan=False).encode()
    store.put(evaluation_key(evaluation.digest, evaluation.suite), data)


def read_evaluation(store: Store, digest: str, suite: str) -> Evaluation | None:
    """Record of these weights on this suite, or None."""
    data = store.read_if_present(evaluation_key(digest, suite))
    if data is None:
        return None
    values = json.loads(data)
    return Evaluation(
        **{
            **values,
            "loss": _number(values["loss"]),
            "slices": tuple(_number(loss) for loss in values["slices"]),
            "domains": {name: _number(loss) for name, loss in values["domains"].items()},
        }
    )


def read_loss(data: bytes) -> float | None:
    """The loss of the record ``data`` in nats per token, None if it is not finite."""
    loss = _number(json.loads(data)["loss"])
    return loss if math.isfinite(loss) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def paired_gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Mean and standard error over slices of how much lower ``after`` is than ``before``."""
    gains = [a - b for a, b in zip(before.slices, after.slices, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return statistics.fmean(gains), error
