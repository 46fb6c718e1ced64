"""Loss and gradient are means over the targets of the global batch, however unevenly ranks and micro batches hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.journal import read_journal
from cluster.lease import hold_lease
from configs.schema import Config
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tasks.data.batch import Batch
from tasks.data.stream import open_stream
from tasks.models.build import build_model
from tasks.models.weights import load_weights
from tests.chat_data import BATCH_SEQUENCES, chat_config, write_rows
from tests.plain_gang import train_plainly

# Sums are taken in another order: float32 noise.
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-5, 2e-4
STEPS = 3


def uneven_config(folder: Path, num_workers: int, micro_batches: int) -> Config:
    """Rows that fill a sequence each, nearly all answer or nearly all question; no load-balance loss, which micro batches cut."""
    rows = [
        {"prompt": "q" * (3 if n % 2 else 21), "completion": f"{n:02}" + "the cat "[: 8 if n % 2 else 1] * 2}
        for n in range(60)
    ]
    source = write_rows(folder / "rows.jsonl", rows)
    batch = 48 * BATCH_SEQUENCES
    return chat_config(
        source, f"training.num_workers={num_workers}", f"training.micro_batches={micro_batches}", "data.shuffle=false",
        "model.router_loss_coefficient=0", f"training.total_tokens={STEPS * batch}", f"snapshots.interval_tokens={batch}",
        "training.max_gradient_norm=null",
    )  # fmt: skip


def mean_and_norm(config: Config, weights: str, batch: Batch) -> tuple[float, float]:
    """Oracle: one process, one pass, every target alike."""
    network = build_model(config.model, config.training.sequence_length)
    load_weights(network, open_checkpoint(weights))
    assert batch.position_ids_BS is not None
    logits = network(
        input_ids=torch.tensor(batch.inputs_BS), position_ids=torch.tensor(batch.position_ids_BS), use_cache=False
    ).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), torch.tensor(batch.targets_BS).flatten(), reduction="none"
    )
    mean = losses.sum() / int((batch.targets_BS >= 0).sum())
    mean.backward()
    norms = [parameter.grad.norm() for parameter in network.parameters() if parameter.grad is not None]
    return float(mean.detach()), float(torch.stack(norms).norm())


@pytest.mark.parametrize(("num_workers", "micro_batches"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_loss_and_gradient_are_means_over_the_targets_of_the_global_batch(
    tmp_path: Path, num_workers: int, micro_batches: int
) -> None:
    config = uneven_config(tmp_path, num_workers, micro_batches)
    run = RunFolder(str(tmp_path / "run"))
    run.begin(config)
    with hold_lease(run.store, RUN_LEASE) as lease:
        train_plainly(run, config, lease, num_workers, tmp_path)
    rows = read_journal(run.store)
    stream = open_stream(config, "train")
    for step in range(1, STEPS):
        batch = stream.read(step * BATCH_SEQUENCES, BATCH_SEQUENCES)
        counts = (batch.targets_BS >= 0).sum(axis=1)
        assert counts.max() > 3 * counts.min() > 0
        loss, norm = mean_and_norm(config, run.snapshots()[step - 1].url, batch)
        assert rows[step].metrics["train/loss"] == pytest.approx(loss, abs=LOSS_TOLERANCE)
        assert rows[step].metrics["train/gradient_norm"] == pytest.approx(norm, rel=NORM_TOLERANCE)
        # A mean of means of the sequences is another number, so that the test can tell.
        means = [
            mean_and_norm(config, run.snapshots()[step - 1].url, batch.rows(n, n + 1))[0] for n in range(len(counts))
        ]
        assert abs(float(np.mean(means)) - loss) > 10 * LOSS_TOLERANCE
