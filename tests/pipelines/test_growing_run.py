"""A run of another trainer, adopted while it grows: complete checkpoints are merged by ticks, half-written ones never."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.errors import UserError
from pipelines.adopt import adopt
from pipelines.status import status
from pipelines.tick import tick
from pipelines.verify import verify
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.run_folder import RunFolder
from tests.dcp_checkpoints import write_plain

# Means of three float32 values, taken in float32: one rounding each of two sums and of the division.
TOLERANCE = 4 * 2**-24
OVERRIDES = ("merge.count=3",)


def llama(step: int) -> Any:
    torch.manual_seed(step)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **shape))


def save_hf(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """As a trainer on transformers leaves it: several files and an index."""
    model = llama(step)
    model.save_pretrained(folder, max_shard_size="20KB")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def save_dcp(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """As a trainer on torch.distributed.checkpoint leaves it, optimizer included."""
    tensors = {name: tensor.clone() for name, tensor in llama(step).state_dict().items()}
    write_plain(folder, tensors, {name: {"exp_avg": torch.ones_like(tensor)} for name, tensor in tensors.items()})
    return tensors


SAVE: dict[str, Callable[[Path, int], dict[str, torch.Tensor]]] = {"hf": save_hf, "dcp": save_dcp}


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> bytes:
    """Leave the file as a writer that is half through has it; returns the whole."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


def require_mean(url: str, members: list[dict[str, torch.Tensor]]) -> None:
    """The merge at ``url`` against float64 arithmetic of torch, read by transformers."""
    loaded = AutoModelForCausalLM.from_pretrained(url, dtype=torch.float32).state_dict()
    assert set(members[0]) <= set(loaded)
    for name in members[0]:
        stack = torch.stack([member[name].double() for member in members])
        bound = TOLERANCE * stack.abs().max()
        assert (loaded[name].double() - stack.mean(0)).abs().max() <= bound, name


@pytest.mark.parametrize("format_", ["hf", "dcp"])
def test_run_of_another_trainer_is_adopted_and_merged_as_it_grows(format_: Any, tmp_path: Path) -> None:
    trainer, run = tmp_path / "trainer", str(tmp_path / "run")
    trainer.mkdir()
    weights = {step: SAVE[format_](trainer / f"step-{step}", step) for step in (10, 20)}
    answer = adopt(run, f"{trainer}/step-{{step}}", format_=format_, tokens_per_step=1000, overrides=OVERRIDES)
    assert [row["step"] for row in answer["adopted"]] == [10, 20]
    assert tick(run)["merged"] == []

    weights[30] = SAVE[format_](trainer / "step-30", 30)
    torn = largest_file(trainer / "step-30")
    whole = cut(torn)
    waiting = tick(run)
    assert (waiting["adopted"], waiting["merged"]) == ([], [])
    assert [row["url"] for row in waiting["waiting"]] == [str(trainer / "step-30")]
    assert len(status(run)["snapshots"]) == 2

    torn.write_bytes(whole)
    grown = tick(run)
    assert [row["step"] for row in grown["adopted"]] == [30]
    (url,) = grown["merged"]
    assert verify(url)["ok"]
    if format_ == "hf":
        require_mean(url, [weights[step] for step in (10, 20, 30)])
    else:
        merged = open_checkpoint(url)
        assert set(merged.model) == set(weights[10])
        assert merged.manifest is not None and merged.manifest.merge is not None
        assert [item.step for item in merged.manifest.merge.inputs] == [10, 20, 30]

    weights[40] = SAVE[format_](trainer / "step-40", 40)
    later = tick(run)
    assert ([row["step"] for row in later["adopted"]], len(later["merged"])) == ([40], 1)
    assert tick(run)["merged"] == []


def test_both_formats_merge_to_the_same_content(tmp_path: Path) -> None:
    digests = {}
    for format_, save in SAVE.items():
        for step in (10, 20, 30):
            save(tmp_path / format_ / f"step-{step}", step)
        run = str(tmp_path / f"run-{format_}")
        pattern = f"{tmp_path}/{format_}/step-{{step}}"
        adopt(run, pattern, format_=format_, tokens_per_step=1000, overrides=OVERRIDES)  # type: ignore[arg-type]
        (url,) = tick(run)["merged"]
        digests[format_] = RunFolder(run).merged()[url.rpartition("/")[2]].digest
    assert digests["hf"] == digests["dcp"]


def test_dcp_without_its_metadata_is_not_complete(tmp_path: Path) -> None:
    for step in (10, 20):
        save_dcp(tmp_path / f"step-{step}", step)
    run = str(tmp_path / "run")
    adopt(run, f"{tmp_path}/step-{{step}}", format_="dcp", tokens_per_step=1000, overrides=OVERRIDES)
    save_dcp(tmp_path / "step-30", 30)
    metadata = (tmp_path / "step-30" / ".metadata").read_bytes()
    (tmp_path / "step-30" / ".metadata").unlink()
    assert "no .metadata" in tick(run)["waiting"][0]["reason"]
    (tmp_path / "step-30" / ".metadata").write_bytes(metadata)
    assert len(tick(run)["merged"]) == 1


def test_hf_files_without_their_index_are_not_complete(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_hf(tmp_path / f"step-{step}", step)
    index = tmp_path / "step-30" / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    run = str(tmp_path / "run")
    shutil.move(tmp_path / "step-30", tmp_path / "later")
    adopt(run, f"{tmp_path}/step-{{step}}", format_="hf", tokens_per_step=1000, overrides=OVERRIDES)
    shutil.move(tmp_path / "later", tmp_path / "step-30")
    assert tick(run)["adopted"] == []
    index.write_text(text)
    assert len(tick(run)["merged"]) == 1


def test_marker_that_the_trainer_writes_last_is_waited_for(tmp_path: Path) -> None:
    for step in (10, 20):
        save_hf(tmp_path / f"step-{step}", step)
        (tmp_path / f"step-{step}" / "DONE").touch()
    run, pattern = str(tmp_path / "run"), f"{tmp_path}/step-{{step}}"
    adopt(run, pattern, format_="hf", tokens_per_step=1000, marker="DONE", overrides=OVERRIDES)
    save_hf(tmp_path / "step-30", 30)
    assert tick(run)["waiting"] == [{"url": str(tmp_path / "step-30"), "reason": "it lacks DONE"}]
    (tmp_path / "step-30" / "DONE").touch()
    assert len(tick(run)["merged"]) == 1
    save_hf(tmp_path / "step-40", 40)
    with pytest.raises(UserError, match=r"step-40: not complete, it lacks DONE"):
        adopt(run, pattern, format_="hf", marker="DONE")


def test_checkpoint_that_changed_after_it_was_adopted_is_refused_in_the_merge(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_hf(tmp_path / f"step-{step}", step)
    run = str(tmp_path / "run")
    adopt(run, f"{tmp_path}/step-{{step}}", format_="hf", tokens_per_step=1000, overrides=OVERRIDES)
    shutil.rmtree(tmp_path / "step-20")
    save_hf(tmp_path / "step-20", 99)
    (failed,) = tick(run)["failed"]
    assert "step-20" in failed["reason"]
    assert RunFolder(run).merged() == {}


def test_tick_looks_at_relative_patterns_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        save_hf(tmp_path / "out" / f"step-{step}", step)
    monkeypatch.chdir(tmp_path)
    adopt("run", "out/step-*", format_="hf", tokens_per_step=1000, overrides=OVERRIDES)
    save_hf(tmp_path / "out" / "step-30", 30)
    monkeypatch.chdir("/")
    assert len(tick(str(tmp_path / "run"))["merged"]) == 1


def test_dcp_reference_loader_reads_what_was_adopted(tmp_path: Path) -> None:
    """The oracle of these tests: torch reads back what it wrote."""
    tensors = save_dcp(tmp_path / "step-10", 10)
    blank = {"model": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(blank, checkpoint_id=tmp_path / "step-10")
    assert all(torch.equal(blank["model"][name], tensor) for name, tensor in tensors.items())
