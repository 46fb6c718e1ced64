"""The pipelines on a workload that is not a language model: snapshots, resume, merge, evaluation and all that looks at them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from configs.errors import UserError
from configs.schema import Config
from examples.qssm.network import ScatteringCircuit
from pipelines.evaluate import evaluate
from pipelines.evaluate_tasks import Harness
from pipelines.export import export
from pipelines.merge import merge
from pipelines.merge_request import MergeRequest
from pipelines.plan import plan
from pipelines.pretrain import prepare_run, require_forkable
from pipelines.report.build import write_report
from pipelines.status import status
from pipelines.verify import verify
from tasks.checkpoints.run_folder import RunFolder
from tests.examples.qssm.tiny import tiny
from tests.local_gang import train

# One swap of the order of two float32 sums in each of thirty steps.
RANKS_TOLERANCE = 1e-4
FIDELITY_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run."""
    return trained(tmp_path_factory.mktemp("made") / "run", tiny())


def trained(folder: Path, config: Config) -> RunFolder:
    run = prepare_run(str(folder), config)
    train(run, config)
    return RunFolder(run.url)


def weights(folder: str) -> dict[str, np.ndarray]:
    return {name: value for path in Path(folder).glob("model-*.safetensors") for name, value in load_file(path).items()}


def drop_after(run: RunFolder, step: int) -> None:
    """Leave the run as if its gang had been killed right after the snapshot at ``step``."""
    for snapshot in run.snapshots():
        if snapshot.step > step:
            (Path(snapshot.url) / "manifest.json").unlink()


def infidelity(tensors: dict[str, np.ndarray]) -> float:
    """By the circuit itself, filled by hand."""
    circuit = ScatteringCircuit(torch.zeros(2, 2, 2, 2, dtype=torch.complex64), bond=1)
    circuit.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    with torch.no_grad():
        state = circuit.prepared().reshape(-1)
    return 1 - float((0.5**0.5 * (state[0] + state[-1])).abs() ** 2)


def test_snapshots_hold_float32_angles_by_layer_and_say_what_they_are(made: RunFolder) -> None:
    snapshots = made.snapshots()
    assert [s.step for s in snapshots] == [5, 10, 15, 20, 25, 30]
    manifest = snapshots[-1].manifest
    assert {(t.name, t.dtype, t.shape) for t in manifest.model_tensors()} == {
        (f"layers.{k}.angles", "F32", (15,)) for k in range(3)
    }
    assert list(manifest.parameter_groups) == [f"layers.{k}.angles" for k in range(3)]
    keys = {item.key for item in manifest.files}
    assert "workload.json" in keys
    assert "config.json" not in keys
    stated = json.loads((Path(snapshots[-1].url) / "workload.json").read_text())
    assert stated["entry"] == "examples.qssm.workload:QSSM"
    assert stated["options"]["target"] == "ghz"


def test_layers_move_in_turn_and_frozen_ones_not_at_all(made: RunFolder) -> None:
    by_step = {s.step: weights(s.url) for s in made.snapshots()}
    # 21 steps layer by layer, 7 each; then all at once.
    first, second, third = (f"layers.{k}.angles" for k in range(3))
    assert not np.array_equal(by_step[5][first], by_step[10][first])
    assert np.array_equal(by_step[10][first], by_step[20][first])
    assert np.array_equal(by_step[5][second], weights_at_start()[second])
    assert not np.array_equal(by_step[10][second], by_step[15][second])
    assert np.array_equal(by_step[10][third], weights_at_start()[third])
    assert not np.array_equal(by_step[20][first], by_step[25][first])


def weights_at_start() -> dict[str, np.ndarray]:
    torch.manual_seed(tiny().seed)
    circuit = ScatteringCircuit(torch.zeros(2, 2, 2, 2, dtype=torch.complex64), bond=1)
    return {name: p.detach().numpy() for name, p in circuit.named_parameters()}


@pytest.mark.parametrize("kept", [5, 10, 20])
def test_run_resumed_within_or_between_layers_is_bit_identical(made: RunFolder, tmp_path: Path, kept: int) -> None:
    expected = [(s.step, s.manifest.digest, s.manifest.state_digest) for s in made.snapshots()]
    run = trained(tmp_path / "run", tiny())
    drop_after(run, kept)
    train(run, tiny())
    assert [(s.step, s.manifest.digest, s.manifest.state_digest) for s in RunFolder(run.url).snapshots()] == expected


def test_adam_counters_of_layers_that_waited_are_on_record(made: RunFolder) -> None:
    def behind(step: int) -> dict[str, int]:
        folder = next(s.url for s in made.snapshots() if s.step == step)
        return dict(json.loads((Path(folder) / "state.json").read_text())["optimizer"]["parameter_steps"])

    assert behind(10) == {"layers.0.angles": 7, "layers.1.angles": 3, "layers.2.angles": 0}
    assert behind(30) == {f"layers.{k}.angles": 7 + 9 for k in range(3)}


def test_micro_batches_give_the_same_run(made: RunFolder, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", tiny("training.micro_batches=2"))
    found, expected = weights(run.snapshots()[-1].url), weights(made.snapshots()[-1].url)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=RANKS_TOLERANCE, rtol=0)


def test_merge_is_the_mean_is_verified_and_evaluated_as_the_circuit_says(made: RunFolder, tmp_path: Path) -> None:
    output = f"{made.url}/merged/by-hand"
    answer = merge(MergeRequest(run=made.url, count=2, output=output), dry_run=False, moe_report=False)
    inputs = [weights(item["url"]) for item in answer["inputs"]]
    mean = {name: np.mean([one[name].astype(np.float64) for one in inputs], axis=0) for name in inputs[0]}
    merged = weights(output)
    for name, value in mean.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-7)
    assert json.loads((Path(output) / "workload.json").read_text())["entry"] == "examples.qssm.workload:QSSM"
    checked = verify(output)
    assert checked["ok"], checked["problems"]
    last = made.snapshots()[-1].url
    rows = evaluate([last, output], None)["results"]
    for row, tensors in zip(rows, (weights(last), merged), strict=True):
        assert row["loss"] == pytest.approx(infidelity(tensors), abs=FIDELITY_TOLERANCE)
        assert row["bits_per_byte"] is None
        assert row["domain_bits_per_byte"] == {"all": None}
    assert evaluate([last], None)["results"][0]["reused"] is True


def test_looking_at_the_run_works_without_a_language_model(made: RunFolder, tmp_path: Path) -> None:
    found = status(made.url)
    assert [row["step"] for row in found["snapshots"]] == [5, 10, 15, 20, 25, 30]
    assert plan("pretrain", tiny(), made.url)["run"] == made.url
    assert plan("pretrain", tiny(), str(tmp_path / "new"))["run"]


def test_report_names_the_workload_and_no_language_model(made: RunFolder) -> None:
    evaluate([s.url for s in made.snapshots()], None)
    page = Path(write_report(made.url)).read_text()
    lead = re.search(r'class="lead">([^<]*)<', page)
    assert lead is not None
    assert lead[1].startswith("examples.qssm.workload:QSSM, seed 1.")


def test_what_needs_a_language_model_says_so(made: RunFolder, tmp_path: Path) -> None:
    last = made.snapshots()[-1].url
    with pytest.raises(UserError, match=r"--format hf is for language models; .*'examples\.qssm\.workload:QSSM'"):
        export(last, str(tmp_path / "hf"), format_="hf", dtype=None, max_shard=None, workers="local")
    export(last, str(tmp_path / "dcp"), format_="dcp", dtype=None, max_shard=None, workers="local")
    with pytest.raises(UserError, match="--tasks is for language models"):
        evaluate([last], None, harness=Harness(python="python", version="0", tasks=()))
    loaded = verify(last, load=True)
    assert not loaded["ok"]
    assert "--load runs language models" in " ".join(loaded["problems"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.expert_parallel=2", "training.expert_parallel"),
        ("training.activation_checkpointing=layer", "training.activation_checkpointing"),
        ("training.compile=true", "training.compile"),
        ("drill.poison=one-token", "drill.poison"),
    ],
)
def test_settings_of_language_models_are_refused(override: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        tiny(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workload.options.target=cat", "target"),
        ("workload.options.qbits=4", "unknown field 'qbits'"),
        ("workload.options.bond=4", "bond=4"),
        ("workload.options.joint_fraction=1.0", "joint_fraction=1.0"),
    ],
)
def test_options_that_the_example_does_not_know_are_refused_before_anything_is_written(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_run(str(tmp_path / "run"), tiny(override))
    assert not (tmp_path / "run").exists()


def test_other_options_are_another_run_and_no_fork(made: RunFolder) -> None:
    other = tiny("workload.options.target=w")
    with pytest.raises(UserError, match=r"workload\.options"):
        prepare_run(made.url, other)
    with pytest.raises(UserError, match=r"workload\.options"):
        require_forkable(made, "fork", other)
    require_forkable(made, "fork", dataclasses.replace(tiny(), seed=2))


def test_two_ranks_train_the_same_circuit(made: RunFolder, tmp_path: Path, gang: Callable[..., RunFolder]) -> None:
    found = weights(gang(tmp_path / "two", tiny("training.num_workers=2"), 2).snapshots()[-1].url)
    for name, value in weights(made.snapshots()[-1].url).items():
        np.testing.assert_allclose(found[name], value, atol=RANKS_TOLERANCE, rtol=0)


@pytest.fixture
def gang(tmp_path: Path) -> Callable[..., RunFolder]:
    """Train with ranks in processes of their own."""
    from cluster.lease import hold_lease
    from tasks.checkpoints.run_folder import RUN_LEASE
    from tests.plain_gang import train_plainly

    def run_gang(folder: Path, config: Config, world_size: int) -> RunFolder:
        run = prepare_run(str(folder), config)
        with hold_lease(run.store, RUN_LEASE) as lease:
            train_plainly(run, config, lease, world_size, tmp_path)
        return RunFolder(run.url)

    return run_gang
