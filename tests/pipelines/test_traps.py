"""Defects seen in other merge tools, each as a test through the command line.

The ones that are not here have a test where they belong: running sums and coefficients in bfloat16 in
tests/tasks/merging/test_kernel.py, snapshots of the decay phase in test_selection.py, optimizer state in test_policy.py, an
unbounded write queue in test_merge_memory.py, kills between data and marker in test_merge_kills.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Pma = Callable[..., Any]
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


def tensors(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "model.embed_tokens.weight": torch.randn(12, 8, generator=generator),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.randn(6, 8, generator=generator),
        "model.layers.0.mlp.experts.1.up_proj.weight": torch.randn(6, 8, generator=generator),
        BIAS: torch.randn(2, generator=generator),
    }
    return {**made, **more}


def write(folder: Path, made: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> str:
    folder.mkdir(parents=True)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def load(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(folder / key)[name] for name, key in index.items()}


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return [write(tmp_path / f"in{seed}", tensors(seed)) for seed in range(3)]


def merge(pma: Pma, output: Path, inputs: list[str], *options: str) -> Any:
    return pma("merge", "--output", str(output), "--json", *options, "--inputs", *inputs)


def test_tensor_missing_from_one_input_is_not_divided_by_n(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    fewer = tensors(9)
    del fewer["model.layers.0.mlp.experts.1.up_proj.weight"]
    answer = merge(pma, tmp_path / "out", [*inputs, write(tmp_path / "fewer", fewer)])
    assert answer.code == 2
    assert "experts.1.up_proj.weight: missing from" in answer.json["message"]
    assert not (tmp_path / "out").exists()


def test_own_earlier_output_is_not_taken_for_an_input(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    assert merge(pma, tmp_path / "out", inputs).code == 0
    answer = merge(pma, tmp_path / "out", [*inputs, str(tmp_path / "out")])
    assert (answer.code, "both an input and the output" in answer.json["message"]) == (2, True)
    again = merge(pma, tmp_path / "second", [*inputs, str(tmp_path / "out")])
    assert (again.code, "is a merge that holds" in again.json["message"]) == (2, True)


def test_same_snapshot_under_two_names_does_not_count_twice(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    assert merge(pma, tmp_path / "a", inputs[:2]).code == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    answer = merge(pma, tmp_path / "out", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (answer.code, "hold the same weights" in answer.json["message"]) == (2, True)
    answer = merge(pma, tmp_path / "out", [inputs[0], f"{inputs[0]}/../in0"])
    assert (answer.code, "given twice" in answer.json["message"]) == (2, True)


def test_integer_tensors_are_compared_not_averaged(pma: Pma, tmp_path: Path) -> None:
    same = [write(tmp_path / f"same{s}", tensors(s, positions=torch.arange(5))) for s in range(2)]
    assert merge(pma, tmp_path / "out", same).code == 0
    assert torch.equal(load(tmp_path / "out")["positions"], torch.arange(5))
    other = write(tmp_path / "other", tensors(3, positions=torch.arange(5) + 1))
    answer = merge(pma, tmp_path / "refused", [*same, other])
    assert answer.code == 1
    assert "'positions' differs" in answer.json["message"]
    assert not (tmp_path / "refused" / "manifest.json").exists()


def test_router_bias_is_merged_and_never_cast(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    assert merge(pma, tmp_path / "out", inputs, "--dtype", "bfloat16").code == 0
    merged = load(tmp_path / "out")
    mean = sum(tensors(seed)[BIAS].double() for seed in range(3)) / 3
    assert merged[BIAS].dtype == torch.float32
    torch.testing.assert_close(merged[BIAS].double(), mean, atol=1e-6, rtol=0)
    assert merged["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_tied_weights_are_written_once(pma: Pma, tmp_path: Path) -> None:
    tied = [tensors(seed) for seed in range(2)]
    for made in tied:
        made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
    config = {"model_type": "tiny", "tie_word_embeddings": True}
    urls = [write(tmp_path / f"tied{n}", made, config) for n, made in enumerate(tied)]
    once = write(tmp_path / "once", tensors(7), config)
    assert merge(pma, tmp_path / "out", [*urls, once]).code == 0, "inputs with and without the head go together"
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert pma("verify", str(tmp_path / "out")).code == 0
    exported = pma("export", urls[0], "--output", str(tmp_path / "hf"), "--json")
    assert (exported.code, exported.json["tied"]) == (0, ["lm_head.weight"])


def test_tied_weights_that_differ_are_refused(pma: Pma, tmp_path: Path) -> None:
    made = tensors(0)
    made["lm_head.weight"] = made["model.embed_tokens.weight"] + 1
    url = write(tmp_path / "in", made, {"tie_word_embeddings": True})
    answer = merge(pma, tmp_path / "out", [url, write(tmp_path / "other", tensors(1))])
    assert answer.code == 1
    assert "tie_word_embeddings" in answer.json["message"]


def test_tensors_that_no_template_knows_are_merged(pma: Pma, tmp_path: Path) -> None:
    odd = {"model.layers.0.hyper_mixer.qq.zeta": torch.ones(3), "☃": torch.ones(2), "x" * 300: torch.zeros(1)}
    urls = [write(tmp_path / f"in{s}", tensors(s, **{k: v + s for k, v in odd.items()})) for s in range(2)]
    assert merge(pma, tmp_path / "out", urls).code == 0
    merged = load(tmp_path / "out")
    assert merged.keys() == tensors(0).keys() | odd.keys()
    assert merged["☃"].tolist() == [1.5, 1.5]


def test_weight_zero_is_a_weight(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    assert merge(pma, tmp_path / "out", inputs, "--method", "weights", "--weights", "0,0,1").code == 0
    merged = load(tmp_path / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors(2).items())


def test_stale_shards_of_an_earlier_attempt_stay_out_of_the_index(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    output = tmp_path / "out"
    (output / "receipts").mkdir(parents=True)
    (output / "receipts" / "attempt").write_text("an older attempt")
    save_file({"stale": torch.ones(3)}, output / "model-00001-of-00001.safetensors")
    assert merge(pma, output, inputs).code == 0
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model-00001-of-00001.safetensors" not in index.values()
    assert load(output).keys() == tensors(0).keys()
    assert pma("verify", str(output)).code == 0


def test_marker_of_one_attempt_with_data_of_another_is_found(pma: Pma, tmp_path: Path, inputs: list[str]) -> None:
    assert merge(pma, tmp_path / "a", inputs).code == 0
    assert merge(pma, tmp_path / "b", inputs, "--method", "wma").code == 0
    shutil.copy(tmp_path / "a" / "manifest.json", tmp_path / "b" / "manifest.json")
    checked = pma("verify", str(tmp_path / "b"), "--json")
    assert (checked.code, checked.json["ok"]) == (1, False)
    assert "differs from its digest" in " ".join(checked.json["problems"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_nonfinite_value_in_one_expert_of_one_input_is_named(
    pma: Pma, tmp_path: Path, inputs: list[str], value: float
) -> None:
    made = tensors(5)
    made["model.layers.0.mlp.experts.1.up_proj.weight"][3, 4] = value
    bad = write(tmp_path / "bad", made)
    answer = merge(pma, tmp_path / "out", [*inputs, bad])
    assert answer.code == 1
    assert f"{bad}/model.safetensors" in answer.json["message"]
    assert "experts.1.up_proj.weight' is not finite at element 28" in answer.json["message"]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_full_training_checkpoint_lends_its_weights_alone(pma: Pma, tmp_path: Path) -> None:
    from tests.dcp_checkpoints import write_plain

    for seed in range(2):
        made = tensors(seed)
        state = {
            "state": {f"{name}.exp_avg": torch.ones_like(t) for name, t in made.items()},
            "param_groups": [{"lr": 1.0}],
        }
        write_plain(tmp_path / f"step-{seed}", made, state)
    answer = merge(pma, tmp_path / "out", [str(tmp_path / f"step-{seed}") for seed in range(2)])
    assert answer.code == 0, answer.stderr
    assert load(tmp_path / "out").keys() == tensors(0).keys()
    assert answer.json["policies"]["optimizer_moments"] == "reset"
