"""Merges of real checkpoints of every family, as transformers writes them: means of all tensors, dtypes, and a load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.fan_out import fan_out_local
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.load_check import check_load
from tasks.merging.merge import execute_merge
from tasks.merging.methods import MethodChoice
from tasks.merging.moe_report import describe_experts
from tasks.merging.plan import plan_merge
from tests.tasks.models.families import FAMILIES, build_trained_like, random_tokens

BIAS = "e_score_correction_bias"


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def inputs(family: str, tmp_path: Path) -> list[str]:
    """Three checkpoints, folders of transformers' own making."""
    urls = [str(tmp_path / f"in{seed}") for seed in (1, 2, 3)]
    for seed, url in enumerate(urls, start=1):
        build_trained_like(FAMILIES[family], seed=seed).save_pretrained(url)
    return urls


def merge(urls: list[str], output: str, dtype: str | None = None) -> dict[str, torch.Tensor]:
    plan = plan_merge(
        [open_checkpoint(url) for url in urls], MethodChoice(method="sma"), output_url=output, shard_bytes=1 << 30, dtype=dtype
    )  # fmt: skip
    execute_merge(plan, lambda function, tasks: fan_out_local(function, tasks, num_workers=1), lambda: None)
    return {
        name: tensor for file in Path(output).glob("model*.safetensors") for name, tensor in load_file(file).items()
    }


def means(urls: list[str]) -> dict[str, torch.Tensor]:
    files = [load_file(Path(url) / "model.safetensors") for url in urls]
    return {name: sum(file[name].double() for file in files) / len(files) for name in files[0]}


def test_merge_every_tensor_of_the_family_is_the_mean_and_loads_in_transformers(
    family: str, inputs: list[str], tmp_path: Path
) -> None:
    merged, expected = merge(inputs, str(tmp_path / "out")), means(inputs)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        # Sums of three in float32 and the rounding of the result: two units in the last place of the largest.
        assert torch.allclose(tensor.double(), expected[name], rtol=2**-22, atol=2**-26), name
    network, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert {name: list(found) for name, found in report.items() if found} == {}
    assert network.config.model_type == family
    assert list(check_load(str(tmp_path / "out"))) == []


def test_merge_in_bfloat16_keeps_the_correction_biases_in_float32(
    family: str, inputs: list[str], tmp_path: Path
) -> None:
    merged, expected = merge(inputs, str(tmp_path / "out"), dtype="bfloat16"), means(inputs)
    kept = sorted(name for name, tensor in merged.items() if tensor.dtype == torch.float32)
    assert kept == ([f"model.layers.{layer}.mlp.gate.{BIAS}" for layer in (1, 2)] if family == "deepseek_v3" else [])
    assert {merged[name].dtype for name in merged.keys() - set(kept)} == {torch.bfloat16}
    for name in kept:
        assert torch.allclose(merged[name].double(), expected[name], rtol=2**-22, atol=2**-26)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for layer in (1, 2) if kept else ():
        assert torch.equal(network.get_buffer(f"model.layers.{layer}.mlp.gate.{BIAS}"), merged[kept[layer - 1]])


def test_merge_of_one_is_its_input_to_the_bit(family: str, inputs: list[str], tmp_path: Path) -> None:
    merged, original = merge(inputs[:1], str(tmp_path / "out")), load_file(Path(inputs[0]) / "model.safetensors")
    assert merged.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in merged.items())
    tokens = random_tokens(FAMILIES[family])
    networks = [AutoModelForCausalLM.from_pretrained(url) for url in (inputs[0], tmp_path / "out")]
    first, second = (network(input_ids=tokens).logits for network in networks)
    assert torch.equal(first, second)


def test_describe_experts_finds_every_expert_and_router_of_the_family(family: str, inputs: list[str]) -> None:
    model = FAMILIES[family]
    report = describe_experts([open_checkpoint(url) for url in inputs])
    layers = range(model.num_dense_layers, model.num_layers) if model.is_moe else ()
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    assert [(row["layer"], row["experts"]) for row in report["layers"]] == [
        (f"model.layers.{layer}.{block}", model.num_experts) for layer in layers
    ]
    tensors = ("weight", BIAS) if family == "deepseek_v3" else ("weight",)
    assert sorted(row["tensor"] for row in report["routers"]) == sorted(
        f"model.layers.{layer}.{block}.gate.{tensor}" for layer in layers for tensor in tensors
    )
