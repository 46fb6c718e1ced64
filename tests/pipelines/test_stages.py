"""Stages that begin with a checkpoint's weights alone, and their matched control arms."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bpe_tokenizer import train_bpe
from local_gang import run_tasks, train
from safetensors.torch import save_file
from short_run import small
from stage_arms import SHORT, ask, evaluate, losses, make_parent, plain_copy, weights_of

from cluster.journal import read_journal
from configs.errors import UserError
from configs.json_numbers import finite_or_none
from configs.schema import Config
from pipelines.gc import gc
from pipelines.merge_request import MergeRequest, choose
from pipelines.pretrain import prepare_fork, prepare_run
from pipelines.recover import inherited_course
from pipelines.render_stages import render_stage
from pipelines.scheduled import unevaluated
from pipelines.stages import StageRequest, require_stage, summarise_stage
from tasks.checkpoints.course import AS_CONFIGURED, read_course
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tasks.checkpoints.start_point import StartPoint, WeightsReplaced
from tasks.checkpoints.tied import open_untied
from tasks.evaluation.held_out import read_evaluation, suite_of
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.policy import MergePolicy
from tasks.models.build import build_model
from tasks.models.weights import load_weights
from tasks.training.schedule import step_learning_rate
from tests.plain_text import rank_batch, read_corpus

# The gang sums losses over sequences in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 40 steps with snapshots of another seed's data, to take weights from."""
    return make_parent(tmp_path_factory.mktemp("stages") / "parent")


@pytest.fixture
def own_parent(parent: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the parent that a test may change."""
    shutil.copytree(parent.url, tmp_path / "parent", ignore=shutil.ignore_patterns("dependents"))
    return RunFolder(str(tmp_path / "parent"))


def oracle_loss(config: Config, weights: str, step: int) -> float:
    """Mean cross-entropy of the global batch of ``step`` (from 0) under the stored weights, taken by hand."""
    network = build_model(config.model, config.training.sequence_length).eval()
    load_weights(network, open_checkpoint(weights))
    tokens_BS1 = torch.from_numpy(
        rank_batch(read_corpus(config.data, "train"), config, step=step, rank=0, world_size=1)
    )
    with torch.inference_mode():
        logits_BSV = network(input_ids=tokens_BS1[:, :-1], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS1[:, 1:].flatten()))


def merge_of(parent: RunFolder, output: Path, *, moments: str) -> str:
    """A merge of the parent's snapshots, its moments as ``moments`` says."""
    inputs = [open_untied(s.url) for s in parent.snapshots()]
    plan = plan_merge(
        inputs,
        MethodChoice(method="sma"),
        output_url=str(output),
        shard_bytes=1 << 30,
        policy=MergePolicy(moments=moments),  # type: ignore[arg-type]
    )
    execute_merge(plan, lambda function, tasks: run_tasks(function, tasks, lambda: False), lambda: None)
    return str(output)


def test_stage_begins_with_the_weights_on_its_own_data_at_step_zero(parent: RunFolder, tmp_path: Path) -> None:
    init = parent.snapshots()[-1].url
    (pair,) = ask(tmp_path, init)
    train(pair.init.run, pair.init.config)
    measured = read_journal(pair.init.run.store)
    assert [row.step for row in measured if "train/loss" in row.metrics] == list(range(1, 21))
    assert losses(pair.init.run)[0] == pytest.approx(oracle_loss(pair.init.config, init, 0), abs=TOLERANCE)
    assert measured[0].metrics["train/learning_rate"] == step_learning_rate(pair.init.config, 1)
    assert pair.init.run.segments()[0]["plan"]["optimizer_moments"] == "fresh"
    assert [s.step for s in pair.init.run.trajectory()] == [10, 20]


def test_stage_from_a_snapshot_equals_that_from_its_bare_weights_bit_by_bit(parent: RunFolder, tmp_path: Path) -> None:
    snapshot = parent.snapshots()[-1].url
    digests = []
    for name, init in (("a", snapshot), ("b", plain_copy(snapshot, tmp_path / "foreign"))):
        (pair,) = ask(tmp_path / name, init)
        train(pair.init.run, pair.init.config)
        digests.append((pair.init.run.snapshots()[-1].digest, pair.init.run.snapshots()[-1].manifest.state_digest))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("moments", ["merge", "reset"])
def test_stage_begins_with_a_merge_whatever_became_of_its_moments(
    parent: RunFolder, tmp_path: Path, moments: str
) -> None:
    merged = merge_of(parent, tmp_path / "merged", moments=moments)
    (pair,) = ask(tmp_path, merged)
    train(pair.init.run, pair.init.config)
    assert losses(pair.init.run)[0] == pytest.approx(oracle_loss(pair.init.config, merged, 0), abs=TOLERANCE)


def test_stage_begins_with_bfloat16_weights_in_float32(parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(parent.snapshots()[-1].url, tmp_path / "half", torch.bfloat16)
    (pair,) = ask(tmp_path, init)
    train(pair.init.run, pair.init.config)
    assert losses(pair.init.run)[0] == pytest.approx(oracle_loss(pair.init.config, init, 0), abs=TOLERANCE)
    assert {t.dtype for t in weights_of(pair.init.run.snapshots()[0].url).values()} == {torch.float32}


@pytest.mark.parametrize("lost", [("step-000000020",), ("step-000000010", "step-000000020")])
def test_stage_that_lost_its_newest_snapshots_goes_on_to_the_same_bits(
    parent: RunFolder, tmp_path: Path, lost: Sequence[str]
) -> None:
    (pair,) = ask(tmp_path, parent.snapshots()[-1].url)
    run = pair.init.run
    train(run, pair.init.config)
    digest = run.snapshots()[-1].digest
    for name in lost:
        shutil.rmtree(Path(run.url) / "snapshots" / name)
    (again,) = ask(tmp_path, parent.snapshots()[-1].url)
    train(again.init.run, again.init.config)
    assert RunFolder(run.url).snapshots()[-1].digest == digest


def test_arms_of_a_seed_read_the_same_batches_and_seeds_read_others(parent: RunFolder, tmp_path: Path) -> None:
    early, late = parent.snapshots()[0].url, parent.snapshots()[-1].url
    pairs = ask(tmp_path, late, early, seeds=(3, 4))
    for pair in pairs:
        assert pair.control is not None
        for arm in pair.arms:
            train(arm.run, arm.config)
            assert losses(arm.run)[0] == pytest.approx(oracle_loss(arm.config, arm.start.url, 0), abs=TOLERANCE)
        assert pair.init.config == pair.control.config
    assert [pair.init.config.seed for pair in pairs] == [3, 4]
    names = [[arm.run.url.removeprefix(str(tmp_path)) for arm in pair.arms] for pair in pairs]
    assert names == [
        ["/stage", "/stage/branches/control"],
        ["/stage/branches/seed-4", "/stage/branches/control-seed-4"],
    ]
    orders = [json.loads(_state(pair.init.run))["data_position"]["order_seed"] for pair in pairs]
    assert orders == [3, 4]


def test_result_has_both_arms_their_starts_and_the_comparison(parent: RunFolder, tmp_path: Path) -> None:
    early, late = parent.snapshots()[0].url, parent.snapshots()[-1].url
    pairs = ask(tmp_path, late, early)
    for arm in pairs[0].arms:
        train(arm.run, arm.config)
        evaluate(arm.run, arm.config)
    result = summarise_stage(pairs, {pairs[0].init.run.url: 2.0})
    assert result["init"]["url"] == late
    assert result["control"]["init"]["url"] == early
    assert (result["final_step"], result["control"]["final_step"]) == (20, 20)
    differences = result["comparison"]["seeds"][0]["differences"]
    assert differences["initial_loss"]["mean"] == pytest.approx(
        result["init"]["loss"] - result["control"]["init"]["loss"]
    )
    assert differences["initial_loss"]["sign"] == -1
    assert [row["tokens"] for row in result["comparison"]["seeds"][0]["curve"]] == [0, 1280, 2560]
    assert result["comparison"]["over_seeds"] is None
    text = render_stage(finite_or_none(result))
    assert "held-out loss at the start: -" in text
    assert "over 3 held-out slices), lower" in text


def test_weights_at_the_start_are_evaluated_once_on_the_stages_text(parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(parent.snapshots()[-1].url, tmp_path / "foreign")
    (pair,) = ask(tmp_path, init)
    run, config = pair.init.run, pair.init.config
    assert unevaluated(run, config) == [init]
    evaluate(run, config)
    assert unevaluated(run, config) == []
    assert read_evaluation(run.store, pair.init.start.digest, suite_of(config)) is not None


# What a stage must not inherit


def test_windows_of_a_stage_never_reach_into_the_run_that_its_weights_are_of(parent: RunFolder, tmp_path: Path) -> None:
    (pair,) = ask(tmp_path, parent.snapshots()[-1].url)
    train(pair.init.run, pair.init.config)
    request = MergeRequest(run=pair.init.run.url, count=3, across=("fork",), method="sma")
    with pytest.raises(UserError, match="2"):
        choose(request)


def test_course_of_the_run_that_weights_are_of_stays_behind(own_parent: RunFolder, tmp_path: Path) -> None:
    snapshot = own_parent.snapshots()[-1]
    state = Path(snapshot.url) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "course": {"learning_rate_scale": 0.5}}))
    (pair,) = ask(tmp_path, snapshot.url)
    assert inherited_course(pair.init.run) == AS_CONFIGURED
    train(pair.init.run, pair.init.config)
    assert read_course(json.loads(_state(pair.init.run))) == AS_CONFIGURED


def test_fork_still_continues_step_and_moments(parent: RunFolder, own_parent: RunFolder) -> None:
    config = small("training.total_tokens=6400")
    branch = prepare_fork(own_parent.url, "longer", config)
    train(branch, config)
    assert [s.step for s in branch.snapshots()] == [50]
    assert branch.segments()[0]["plan"]["optimizer_moments"] == "restored"
    assert [s.step for s in branch.trajectory()] == [10, 20, 30, 40, 50]


def test_run_json_of_before_weights_alone_is_read_as_a_fork(own_parent: RunFolder) -> None:
    branch = prepare_fork(own_parent.url, "old", small("training.total_tokens=6400"))
    path = Path(branch.url) / "run.json"
    values = json.loads(path.read_text())
    del values["start"]["weights_only"]
    path.write_text(json.dumps(values))
    start = RunFolder(branch.url).identity().start
    assert start == StartPoint(url=own_parent.snapshots()[-1].url, digest=start.digest, step=40, tokens_seen=5120)  # type: ignore[union-attr]


# Retention


def test_gc_of_the_other_run_keeps_what_a_stage_began_with(own_parent: RunFolder, tmp_path: Path) -> None:
    first = own_parent.snapshots()[1]
    assert first.step in deleted_steps(own_parent)
    ask(tmp_path, first.url)
    assert first.step not in deleted_steps(own_parent)
    rows = gc(own_parent.url, apply=True, overrides=("retention.keep_last=1",))["rows"]
    assert [f"start of {tmp_path}/stage"] in [row["reasons"] for row in rows]
    assert open_checkpoint(first.url).manifest is not None


def test_damaged_record_of_a_dependent_run_stops_gc(own_parent: RunFolder, tmp_path: Path) -> None:
    ask(tmp_path, own_parent.snapshots()[0].url)
    (record,) = (Path(own_parent.url) / "dependents").iterdir()
    record.write_text("{")
    with pytest.raises(UserError, match=r"dependents/.*is damaged"):
        gc(own_parent.url, apply=True, overrides=("retention.keep_last=1",))
    assert len(own_parent.snapshots()) == 4


def deleted_steps(run: RunFolder) -> list[int]:
    rows = gc(run.url, apply=False, overrides=("retention.keep_last=1",))["rows"]
    return [row["step"] for row in rows if row["action"] == "delete"]


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.hidden_size=64", r"model.embed_tokens.weight has shape \[256, 32\], the network \[256, 64\]"),
        ("model.num_layers=2", r"missing model.layers.1"),
        ("model.num_experts_per_token=1", "model.num_experts_per_token is 1, the checkpoint's 2"),
        ("model.rope_theta=500000.0", "model.rope_theta is 500000.0, the checkpoint's 10000.0"),
    ],
)
def test_weights_that_do_not_fit_the_model_section_are_refused_with_a_difference(
    parent: RunFolder, tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(UserError, match=f"--init .* does not fit the model section of tiny:(?s:.*){said}"):
        ask(tmp_path, parent.snapshots()[-1].url, None, override)
    assert not (tmp_path / "stage").exists()


def test_control_that_does_not_fit_is_refused_before_the_first_arm_is_on_record(
    parent: RunFolder, tmp_path: Path
) -> None:
    other = plain_copy(parent.snapshots()[-1].url, tmp_path / "other")
    tensors = weights_of(other)
    del tensors["lm_head.weight"]
    save_file(tensors, Path(other) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--control .*other does not fit(?s:.*)missing lm_head.weight"):
        ask(tmp_path, parent.snapshots()[-1].url, other)
    assert not (tmp_path / "stage").exists()


def test_checkpoint_that_is_none_is_refused_by_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--init: .*nowhere: no checkpoint here"):
        ask(tmp_path, str(tmp_path / "nowhere"))


def test_control_with_the_same_weights_is_refused(parent: RunFolder, tmp_path: Path) -> None:
    init = parent.snapshots()[-1].url
    with pytest.raises(UserError, match="holds the same weights as --init"):
        ask(tmp_path, init, plain_copy(init, tmp_path / "copy"))


def test_control_arm_that_stands_with_another_configuration_is_refused_with_the_difference(
    parent: RunFolder, tmp_path: Path
) -> None:
    early, late = parent.snapshots()[0].url, parent.snapshots()[-1].url
    (pair,) = ask(tmp_path, late, early, "schedule.peak_learning_rate=0.001")
    shutil.rmtree(pair.init.run.url + "/leases", ignore_errors=True)
    (Path(pair.init.run.url) / "run.json").unlink()
    with pytest.raises(
        UserError,
        match=r"branches/control is a run of another configuration:\n  schedule.peak_learning_rate: run has 0.001, asked for 0.003",
    ):
        ask(tmp_path, late, early)
    assert not (tmp_path / "stage" / "run.json").exists()


def test_stage_that_began_with_other_weights_is_refused(parent: RunFolder, tmp_path: Path) -> None:
    early, late = parent.snapshots()[0].url, parent.snapshots()[-1].url
    ask(tmp_path, late)
    with pytest.raises(UserError, match=r"began with the weights of .*step-000000040, --init .*000000010 holds others"):
        ask(tmp_path, early)


def test_same_weights_at_another_place_continue_the_stage(parent: RunFolder, tmp_path: Path) -> None:
    snapshot = parent.snapshots()[-1].url
    (first,) = ask(tmp_path, snapshot)
    (again,) = ask(tmp_path, plain_copy(snapshot, tmp_path / "copy"))
    assert again.init.run.identity() == first.init.run.identity()


def test_run_that_is_no_stage_is_refused(parent: RunFolder, tmp_path: Path) -> None:
    prepare_run(str(tmp_path / "stage"), small(*SHORT))
    with pytest.raises(UserError, match="is a run that did not begin with given weights"):
        ask(tmp_path, parent.snapshots()[-1].url)


def test_pretrain_on_the_folder_of_a_stage_is_refused(parent: RunFolder, tmp_path: Path) -> None:
    (pair,) = ask(tmp_path, parent.snapshots()[-1].url)
    with pytest.raises(UserError, match="start: run has StartPoint"):
        prepare_run(pair.init.run.url, pair.init.config)


def test_tokenizer_of_other_ids_is_refused_by_token(parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(parent.snapshots()[-1].url, tmp_path / "foreign")
    train_bpe(Path(init) / "tokenizer.json", vocab_size=256)
    with pytest.raises(
        UserError, match=r"another vocabulary(?s:.*)the data are read as bytes.*data.tokenizer=.*foreign/tokenizer.json"
    ):
        ask(tmp_path, init)


def test_sft_demands_conversations(parent: RunFolder) -> None:
    request = StageRequest(stage="sft", init=parent.snapshots()[-1].url)
    with pytest.raises(UserError, match=r"needs data.format=chat, got auto.*pma continue-training"):
        require_stage(request, small())


# Weights that change under the stage


def test_replaced_snapshot_is_an_error_when_the_command_runs_again(own_parent: RunFolder, tmp_path: Path) -> None:
    first, last = own_parent.snapshots()[0], own_parent.snapshots()[-1]
    ask(tmp_path, last.url)
    shutil.rmtree(last.url)
    shutil.copytree(first.url, last.url)
    with pytest.raises(WeightsReplaced, match=f"holds other weights .digest {first.digest[:12]}. than when"):
        ask(tmp_path, last.url)


@pytest.mark.parametrize("form", ["snapshot", "plain"])
def test_flipped_bit_in_the_weights_is_an_error_before_the_first_step(
    own_parent: RunFolder, tmp_path: Path, form: str
) -> None:
    init = own_parent.snapshots()[-1].url
    if form == "plain":
        init = plain_copy(init, tmp_path / "foreign")
    (pair,) = ask(tmp_path, init)
    file = min(Path(init).glob("model*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsReplaced, match="put the checkpoint back"):
        train(pair.init.run, pair.init.config)
    assert pair.init.run.segments() == []


def test_evaluation_refuses_weights_that_were_replaced(own_parent: RunFolder, tmp_path: Path) -> None:
    init = plain_copy(own_parent.snapshots()[-1].url, tmp_path / "foreign")
    (pair,) = ask(tmp_path, init)
    shutil.rmtree(init)
    plain_copy(own_parent.snapshots()[0].url, tmp_path / "foreign")
    with pytest.raises(WeightsReplaced):
        evaluate(pair.init.run, pair.init.config)
    assert pair.init.run.store.keys("evaluations") == []


def _state(run: RunFolder) -> str:
    return (Path(run.snapshots()[-1].url) / "state.json").read_text()
