"""What a policy decides, seen in the merged tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.fan_out import fan_out_local
from cluster.storage import open_store
from configs.errors import UserError
from tasks.checkpoints.manifest import Manifest
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import MergeReport, execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.policy import MergePolicy, parse_policy
from tasks.merging.verify import verify_checkpoint

SaveFolder = Callable[..., str]
ROUTER = "model.layers.0.mlp.gate.weight"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"
NORM = "model.norm.weight"


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {ROUTER: (4, 9), EXPERT: (9, 5), NORM: (9,)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**made, BIAS: torch.randn(4, generator=generator), "steps": torch.tensor([seed, 7])}


def merge(urls: list[str], output: Path, policy: str = "", **options: Any) -> dict[str, torch.Tensor]:
    choice = options.pop("choice", MethodChoice(method="sma"))
    parsed = parse_policy(policy, "policy.yaml") if policy else None
    plan = plan_merge([open_checkpoint(url) for url in urls], choice, output_url=str(output), policy=parsed, **options)
    report: MergeReport = execute_merge(
        plan, lambda function, tasks: fan_out_local(function, tasks, num_workers=1), lambda: None
    )
    assert verify_checkpoint(str(output)).problems == []
    merged: dict[str, torch.Tensor] = {}
    for shard in report.manifest.shards:
        merged |= load_file(output / shard.key)
    return merged


@pytest.fixture
def urls(save_folder: SaveFolder) -> list[str]:
    return [save_folder(f"in{seed}", tensors(seed)) for seed in range(3)]


def mean(name: str, weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)) -> torch.Tensor:
    return sum(weight * tensors(seed)[name].double() for seed, weight in enumerate(weights))  # type: ignore[return-value]


@pytest.mark.parametrize("pattern", ["layers.0.router", "*.mlp.gate.weight"])
def test_rule_of_a_group_or_a_name_has_its_own_method(urls: list[str], tmp_path: Path, pattern: str) -> None:
    policy = f"integers: newest\nrules: [{{tensors: '{pattern}', method: ema, alpha: 0.5}}]"
    merged = merge(urls, tmp_path / "out", policy)
    torch.testing.assert_close(merged[ROUTER].double(), mean(ROUTER, (0.25, 0.25, 0.5)), atol=1e-6, rtol=0)
    torch.testing.assert_close(merged[EXPERT].double(), mean(EXPERT), atol=1e-6, rtol=0)


def test_rule_newest_keeps_every_bit_of_the_newest(urls: list[str], tmp_path: Path) -> None:
    merged = merge(urls, tmp_path / "out", "integers: newest\nrules: [{tensors: '*gate*', method: newest}]")
    assert torch.equal(merged[ROUTER], tensors(2)[ROUTER])
    assert torch.equal(merged[BIAS], tensors(2)[BIAS])
    assert not torch.equal(merged[NORM], tensors(2)[NORM])


def test_rule_first_match_holds(urls: list[str], tmp_path: Path) -> None:
    rules = "[{tensors: '*.weight', method: newest}, {tensors: '*gate.weight', method: wma}]"
    merged = merge(urls, tmp_path / "out", f"integers: newest\nrules: {rules}")
    assert torch.equal(merged[ROUTER], tensors(2)[ROUTER])


def test_rule_write_dtype_beats_the_override(urls: list[str], tmp_path: Path) -> None:
    merged = merge(
        urls, tmp_path / "out", "integers: newest\nrules: [{tensors: '*norm*', write: float32}]", dtype="bfloat16"
    )
    assert merged[NORM].dtype == torch.float32
    assert merged[EXPERT].dtype == torch.bfloat16
    assert merged[BIAS].dtype == torch.float32, "a router bias keeps its dtype under any override"


def test_keep_list_protects_more_tensors_from_the_override(urls: list[str], tmp_path: Path) -> None:
    merged = merge(urls, tmp_path / "out", "integers: newest\nkeep_dtype: ['*gate.weight']", dtype="bfloat16")
    assert merged[ROUTER].dtype == torch.float32
    assert merged[EXPERT].dtype == torch.bfloat16


def test_rule_accumulate_float64_rounds_once(urls: list[str], tmp_path: Path) -> None:
    merged = merge(urls, tmp_path / "out", "integers: newest\nrules: [{tensors: '*', accumulate: float64}]")
    assert torch.equal(merged[EXPERT], mean(EXPERT).float())


def test_rule_read_lets_inputs_differ_in_dtype(save_folder: SaveFolder, tmp_path: Path) -> None:
    urls = [
        save_folder("wide", {"w": torch.linspace(0, 1, 7)}),
        save_folder("narrow", {"w": torch.linspace(1, 2, 7).bfloat16()}),
    ]
    with pytest.raises(UserError, match=r"dtype F32 in .* BF16 in"):
        merge(urls, tmp_path / "refused")
    merged = merge(urls, tmp_path / "out", "rules: [{tensors: w, read: float32}]")
    expected = (torch.linspace(0, 1, 7) + torch.linspace(1, 2, 7).bfloat16().float()) / 2
    torch.testing.assert_close(merged["w"], expected, atol=1e-7, rtol=0)
    assert merged["w"].dtype == torch.float32


def test_integers_newest_takes_the_newest_inputs(urls: list[str], tmp_path: Path) -> None:
    assert merge(urls, tmp_path / "out", "integers: newest")["steps"].tolist() == [2, 7]


def test_buffers_newest_leaves_weights_averaged(urls: list[str], tmp_path: Path) -> None:
    merged = merge(urls, tmp_path / "out", "integers: newest\nbuffers: newest")
    assert torch.equal(merged[BIAS], tensors(2)[BIAS])
    torch.testing.assert_close(merged[ROUTER].double(), mean(ROUTER), atol=1e-6, rtol=0)


# Optimizer moments


def moments(seed: int) -> dict[str, torch.Tensor]:
    names = [name for name in tensors(0) if name != "steps"]
    return {
        f"{moment}.{name}": tensors(seed + 10 * number)[name].abs()
        for number, moment in enumerate(("exp_avg", "exp_avg_sq"), start=1)
        for name in names
    }


@pytest.fixture
def snapshots(tmp_path: Path, commit_snapshot: Callable[..., Manifest]) -> list[str]:
    made = []
    for seed in range(3):
        store = open_store(str(tmp_path / f"snapshot{seed}"))
        model = {name: tensor for name, tensor in tensors(seed).items() if name != "steps"}
        commit_snapshot(store, model, state=moments(seed), step=seed + 1)
        made.append(store.url)
    return made


def test_moments_are_reset_by_default_and_said_to_be(snapshots: list[str], tmp_path: Path) -> None:
    merged = merge(snapshots, tmp_path / "out")
    assert not any(name.startswith("exp_avg") for name in merged)
    opened = open_checkpoint(str(tmp_path / "out"))
    assert opened.manifest is not None and opened.manifest.merge is not None
    assert opened.manifest.merge.policies["optimizer_moments"] == "reset"
    assert opened.manifest.state_digest is None


def test_moments_merge_averages_them_with_the_weights_vector(snapshots: list[str], tmp_path: Path) -> None:
    merged = merge(snapshots, tmp_path / "out", "moments: merge", choice=MethodChoice(method="wma"))
    for name in moments(0):
        exact = sum(weight * moments(seed)[name].double() for seed, weight in enumerate((1 / 6, 2 / 6, 3 / 6)))
        torch.testing.assert_close(merged[name].double(), exact, atol=1e-6, rtol=0)
    opened = open_checkpoint(str(tmp_path / "out"))
    assert opened.manifest is not None and opened.manifest.state_digest
    assert set(opened.state) == set(moments(0))
    assert (tmp_path / "out" / "state.json").exists(), "step counters come from the newest"


def test_moments_newest_are_the_newest_inputs_bit_for_bit(snapshots: list[str], tmp_path: Path) -> None:
    merged = merge(snapshots, tmp_path / "out", "moments: newest")
    assert all(torch.equal(merged[name], tensor) for name, tensor in moments(2).items())


def test_moments_of_inputs_without_any_are_refused_by_name(urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"keeps optimizer moments.*\n.*in0: no 'exp_avg"):
        merge(urls, tmp_path / "out", "moments: merge\nintegers: newest")
    assert not (tmp_path / "out").exists()


def test_moments_merge_with_a_negative_weight_is_refused(snapshots: list[str], tmp_path: Path) -> None:
    choice = MethodChoice(method="weights", weights=(-0.5, 0.5, 1.0))
    with pytest.raises(UserError, match="second moment would turn negative"):
        merge(snapshots, tmp_path / "out", "moments: merge", choice=choice)


def test_policy_changes_the_identity_of_a_merge(snapshots: list[str], tmp_path: Path) -> None:
    merge(snapshots, tmp_path / "out")
    with pytest.raises(UserError, match="another merge"):
        merge(snapshots, tmp_path / "out", "moments: newest")


# The file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("momentz: merge", "did you mean 'moments'"),
        ("rules: [{tensor: x}]", "did you mean 'tensors'"),
        ("rules: [{tensors: x, write: float8}]", "write 'float8' is not known"),
        ("rules: [{tensors: x, accumulate: bfloat16}]", "accumulate is float32 or float64"),
        ("rules: [{tensors: x, method: weights}]", "list of weights go together"),
        ("moments: keep", "'keep'"),
        ("integers: [", "not YAML"),
        ("[1, 2]", "expected keys and values"),
        ("rules: {tensors: x}", "rule"),
    ],
)
def test_policy_file_mistakes_name_file_key_and_cure(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=r"my-policy\.yaml") as caught:
        parse_policy(text, "my-policy.yaml")
    assert expected in str(caught.value)


def test_policy_empty_file_is_the_contracts_rules() -> None:
    assert parse_policy("", "p") == MergePolicy()
