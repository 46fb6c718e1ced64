"""Workers in plain processes, without Ray: exact resume, other world sizes, other families and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.lease import Lease, hold_lease
from configs.load import load_config
from configs.schema import Config
from tasks.checkpoints.run_folder import RUN_LEASE, RunFolder
from tests.plain_gang import end_members, start_members, train_plainly
from tests.token_data import write_text

# Sums over ranks are taken in another order: float32 noise that six steps of AdamW amplify.
WORLD_SIZE_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "fox", count=12, repeats=60)


@pytest.fixture
def config(text: Path) -> Config:
    return load_config(
        "tiny",
        (
            f"data.sources=[{text}]",
            "data.held_out_fraction=0.3",
            "model.hidden_size=32",
            "training.sequence_length=32",
            "training.batch_tokens=384",
            "training.total_tokens=2304",
            "snapshots.interval_tokens=768",
            "schedule.warmup_tokens=768",
            "anneal.tokens=768",
            "evaluation.slice_tokens=64",
            "training.log_interval_steps=1",
        ),
    ).config


@pytest.fixture
def train(tmp_path: Path) -> Callable[[str, Config, int], RunFolder]:
    """Train a run with a gang of plain processes."""

    def run_gang(name: str, config: Config, world_size: int) -> RunFolder:
        run = RunFolder(str(tmp_path / name))
        run.begin(config)
        with hold_lease(run.store, RUN_LEASE) as lease:
            train_plainly(run, config, lease, world_size, tmp_path)
        return RunFolder(run.url)

    return run_gang


def model_of(run: RunFolder) -> dict[str, np.ndarray]:
    folder = Path(run.snapshots()[-1].url)
    return {name: value for path in folder.glob("model-*.safetensors") for name, value in load_file(path).items()}


def until(config: Config, total_tokens: int) -> Config:
    return replace(config, training=replace(config.training, total_tokens=total_tokens))


def drop_after(run: RunFolder, step: int) -> None:
    """Leave the run as if its gang had been killed right after the snapshot at ``step``."""
    for snapshot in run.snapshots():
        if snapshot.step > step:
            (Path(snapshot.url) / "manifest.json").unlink()


def test_gang_resumed_at_the_same_world_size_is_bit_identical(
    train: Callable[[str, Config, int], RunFolder], config: Config
) -> None:
    whole = train("whole", config, 2)
    expected = [(s.step, s.manifest.digest, s.manifest.state_digest) for s in whole.snapshots()]
    assert [step for step, _, _ in expected] == [2, 4, 6]
    drop_after(whole, 2)
    resumed = train("whole", config, 2)
    assert [(s.step, s.manifest.digest, s.manifest.state_digest) for s in resumed.snapshots()] == expected
    # The leftovers of the first attempt were kept apart, not overwritten.
    names = {shard.key for shard in resumed.snapshots()[-1].manifest.shards}
    assert all(len(name.split(".")) == 3 for name in names)


@pytest.mark.parametrize("world_size", [1, 3])
def test_gang_resumed_at_another_world_size_agrees_within_tolerance(
    train: Callable[[str, Config, int], RunFolder], config: Config, world_size: int
) -> None:
    # Three ranks cut 256 rows, 32 rows and 8 experts unevenly.
    expected = model_of(train("two", config, 2))
    run = train("other", config, 2)
    drop_after(run, 2)
    resumed = model_of(
        train("other", replace(config, training=replace(config.training, num_workers=world_size)), world_size)
    )
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(resumed[name], value, atol=WORLD_SIZE_TOLERANCE, rtol=0, err_msg=name)


def test_losses_of_one_and_two_ranks_agree_step_by_step(
    train: Callable[[str, Config, int], RunFolder], config: Config
) -> None:
    from cluster.journal import read_journal

    one = read_journal(train("one", replace(config, training=replace(config.training, num_workers=1)), 1).store)
    two = read_journal(train("two", config, 2).store)
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert a.metrics["train/loss"] == pytest.approx(b.metrics["train/loss"], abs=1e-4)
        assert a.metrics["train/gradient_norm"] == pytest.approx(b.metrics["train/gradient_norm"], rel=1e-3)
    assert one[-1].metrics["train/loss"] < one[0].metrics["train/loss"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_families_train_layer_by_layer_in_bfloat16_with_float32_masters(
    train: Callable[[str, Config, int], RunFolder], config: Config, family: str
) -> None:
    dense = replace(
        config,
        model=replace(config.model, family=family, num_experts=0, tie_embeddings=family == "qwen3"),  # type: ignore[arg-type]
        training=replace(config.training, compute_dtype="bfloat16", fsdp_unit="layer", max_gradient_norm=None),
    )
    run = train(family, dense, 2)
    weights = model_of(run)
    assert ("lm_head.weight" in weights) == (family == "llama")
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    manifest = run.snapshots()[-1].manifest
    assert manifest.loss is not None
    assert manifest.loss.last is not None
    assert manifest.loss.last < 5.6
    assert {t.name for t in manifest.state_tensors()} == {
        f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in weights
    }


def test_worker_without_the_lease_publishes_nothing(
    train: Callable[[str, Config, int], RunFolder], config: Config, tmp_path: Path
) -> None:
    run = train("run", until(config, 768), 1 if config.training.num_workers == 1 else 2)
    own = Lease(run.store, RUN_LEASE)
    own.token = "stale"
    with hold_lease(run.store, RUN_LEASE):
        (member,) = start_members(run, config, own, 1, tmp_path, cause="resume")
        (error,) = end_members([member])
    assert member.returncode != 0
    assert "LeaseLost" in error
    assert [s.step for s in RunFolder(run.url).snapshots()] == [2]
