"""Held-out loss of checkpoints: fixed slices, fixed batches, float32 unless asked otherwise.

A result is a record under the run URL, named by the content digest of the weights and a fingerprint
of the suite, so that nothing is evaluated twice.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.storage import Store, open_store
from configs.data import DataConfig
from configs.errors import UserError
from configs.json_numbers import finite_or_none
from configs.load import config_from_dict
from configs.schema import Config
from configs.sections import EvaluationConfig
from tasks.checkpoints.digest import fingerprint
from tasks.checkpoints.start_point import StartPoint
from tasks.data.batch import Batch
from tasks.evaluation.held_out_text import HeldOutText, Size, sum_losses
from tasks.workload import Slice, open_workload

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

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
    domain_bits_per_byte: dict[str, float | None] = field(default_factory=dict)
    """``bits_per_byte`` of each of ``domains``; empty in records of before it was measured."""

    @property
    def spread(self) -> float:
        """Largest minus smallest slice."""
        return max(self.slices) - min(self.slices)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one checkpoint."""

    url: str
    """The checkpoint."""
    evaluation: Evaluation | None
    """What was measured and written; None if it could not be."""
    error: Exception | None = None
    """Why not: a :class:`CheckpointError`, a ``UserError`` or a ``StorageError``."""


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
    """Fingerprint of data, split, sequence length, slices and dtype: results are comparable if it is equal."""
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
    if config.evaluation.dtype != EvaluationConfig().dtype:
        values["dtype"] = config.evaluation.dtype
    if not config.workload.is_language_model:
        values["workload"] = dataclasses.asdict(config.workload)
    if config.data.mixture:
        values["mixture"] = [dataclasses.asdict(domain) for domain in config.data.mixture]
    return fingerprint(values)[:16]


def evaluate_checkpoints(task: EvaluationTask) -> list[Evaluation]:
    """:func:`try_checkpoints` where each is expected to be sound: the first failure is raised once the others are on record."""
    outcomes = try_checkpoints(task)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.evaluation for outcome in outcomes if outcome.evaluation is not None]


def try_checkpoints(task: EvaluationTask) -> list[Outcome]:
    """Evaluate every checkpoint of ``task`` and write its record; runs in a worker with one thread for arithmetic.

    One that fails does not stop the others.
    """
    import torch

    torch.set_num_threads(1)
    return list(HeldOutSuite(task.run_url, config_from_dict(task.config)).evaluate_each(task.urls, task.start))


class HeldOutSuite:
    """The held-out measurement and an empty network or two, kept for many checkpoints of one run."""

    def __init__(self, run_url: str, config: Config) -> None:
        self._store, self._config = open_store(run_url), config
        self._measure = open_workload(config).evaluate(config)
        self._networks: list[torch.nn.Module] = []

    def evaluate(self, url: str) -> Evaluation:
        """Measure the checkpoint at ``url`` and write its record; raises what is wrong with it."""
        (outcome,) = self.evaluate_each([url])
        if outcome.error is not None:
            raise outcome.error
        assert outcome.evaluation is not None
        return outcome.evaluation

    def evaluate_each(self, urls: Sequence[str], start: StartPoint | None = None) -> Iterator[Outcome]:
        """Measure ``urls`` in order and write their records; one that fails is told and the others go on.

        Where ``start`` is there and one of ``urls`` is its, other weights there fail as
        :class:`tasks.checkpoints.start_point.WeightsReplaced`.

        While one is computed, the next is read (:func:`tasks.evaluation.load_ahead.load_ahead`): two copies of the weights are
        held, one if there is a single checkpoint.
        """
        from tasks.evaluation.load_ahead import FAILURES, load_ahead

        while len(self._networks) < min(2, len(urls)):
            self._networks.append(build_network(self._config))
        for loaded in load_ahead(self._networks, urls, start):
            if loaded.error is not None:
                yield Outcome(url=loaded.url, evaluation=None, error=loaded.error)
                continue
            evaluation = self._record(loaded.digest, self.measure(loaded.network))
            try:
                write_evaluation(self._store, evaluation)
            except FAILURES as error:
                yield Outcome(url=loaded.url, evaluation=None, error=error)
            else:
                yield Outcome(url=loaded.url, evaluation=evaluation)

    def measure(self, network: torch.nn.Module) -> Sequence[Slice]:
        """For each slice, losses summed and their number, by domain."""
        import torch

        with torch.no_grad():
            found = self._measure(network)
        wanted = self._config.evaluation.num_slices
        if len(found) != wanted or not all(sum(count for _, count in one.values()) > 0 for one in found):
            raise UserError(
                f"workload.entry={self._config.workload.entry!r}: evaluate measured {[dict(one) for one in found]}; expected "
                f"evaluation.num_slices={wanted} slices, each with domains as name: (sum of losses, how many)"
            )
        return found

    def _record(self, digest: str, sums: Sequence[Slice]) -> Evaluation:
        slices = [
            sum(total for total, _ in found.values()) / sum(count for _, count in found.values()) for found in sums
        ]
        domains = {name: statistics.fmean(found[name][0] / found[name][1] for found in sums) for name in sums[0]}
        loss = statistics.fmean(slices)
        # Bits per byte are of text alone.
        sizes = self._measure.sizes if isinstance(self._measure, HeldOutText) else {}
        return Evaluation(
            digest=digest,
            suite=suite_of(self._config),
            loss=loss,
            slices=tuple(slices),
            domains=domains,
            bits_per_byte=_bits_per_byte(loss, list(sizes.values())),
            tokens=sum(count for found in sums for _, count in found.values()),
            created=time.time(),
            domain_bits_per_byte={
                name: _bits_per_byte(domains[name], [sizes[name]] if sizes else []) for name in domains
            },
        )


def build_network(config: Config) -> torch.nn.Module:
    """The network of ``config`` for forward passes alone, its weights still to be loaded, in ``evaluation.dtype``.

    For bfloat16 the parameters are, as in training; buffers (router biases, rotary frequencies) keep their float32.
    """
    import torch

    network = open_workload(config).build(config).eval().requires_grad_(False)
    if config.evaluation.dtype == "bfloat16":
        for parameter in network.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return network


def _bits_per_byte(loss: float, sizes: Sequence[Size]) -> float | None:
    """``loss`` in nats per token as bits per byte of the text that ``sizes`` are of."""
    tokens, text_bytes = sum(size.tokens for size in sizes), sum(size.bytes or 0 for size in sizes)
    return loss / math.log(2) * (tokens / text_bytes) if text_bytes else None


def slice_loss(network: torch.nn.Module, tokens: NDArray[np.int64], batch_sequences: int) -> float:
    """Mean cross-entropy in nats per token of ``tokens [sequences, S + 1]``; token losses are summed in float64."""
    total, count = sum_losses(network, Batch(tokens_BS1=tokens, targets_BS=tokens[:, 1:]), batch_sequences)
    return total / count


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
    """The loss of the record ``data`` in nats per token, None if it is not finite or of tasks, which have none."""
    loss = _number(json.loads(data).get("loss"))
    return loss if math.isfinite(loss) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def paired_gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Mean and standard error over slices of how much lower ``after`` is than ``before``."""
    gains = [a - b for a, b in zip(before.slices, after.slices, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return statistics.fmean(gains), error
