"""Several merges of one set of inputs in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from cluster.fan_out import fan_out_local
from configs.errors import UserError
from tasks.checkpoints.reader import open_checkpoint
from tasks.merging.merge import MergeReport, execute_merges
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import Recipe, plan_merges
from tasks.merging.planned import MergePlan, MergeTask
from tasks.merging.receipt import Receipt
from tasks.merging.verify import verify_checkpoint

CHOICES = [
    (MethodChoice(method="sma"), 2),
    (MethodChoice(method="sma"), 5),
    (MethodChoice(method="wma"), 5),
    (MethodChoice(method="ema", alpha=0.2), 4),
]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{layer}.mlp.up.weight": (17, 3 + layer) for layer in range(6)}
    return {
        **{name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()},
        "positions": torch.arange(5),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def urls(save_folder: Callable[..., str]) -> list[str]:
    return [save_folder(f"in{seed}", tensors(seed)) for seed in range(5)]


def plans_of(urls: Sequence[str], folder: Path, choices: Sequence[tuple[MethodChoice, int]]) -> list[MergePlan]:
    recipes = [
        Recipe(output_url=str(folder / f"{number}"), choice=choice, count=count)
        for number, (choice, count) in enumerate(choices)
    ]
    return plan_merges([open_checkpoint(url) for url in urls], recipes, shard_bytes=300)


def run(plans: Sequence[MergePlan], stop_after: int | None = None) -> list[MergeReport]:
    def run_tasks(function: Callable[[MergeTask], list[Receipt]], tasks: list[MergeTask]) -> Iterator[list[Receipt]]:
        yield from fan_out_local(function, tasks[:stop_after], num_workers=2)
        if stop_after is not None:
            raise RuntimeError("killed on purpose")

    return execute_merges(plans, run_tasks, [lambda: None] * len(plans))


def test_grid_gives_the_bits_of_each_merge_alone_and_reads_once(urls: list[str], tmp_path: Path) -> None:
    together = run(plans_of(urls, tmp_path / "grid", CHOICES))
    for number, (choice, count) in enumerate(CHOICES):
        (alone,) = run(plans_of(urls[-count:], tmp_path / f"alone{number}", [(choice, count)]))
        assert together[number].manifest.digest == alone.manifest.digest
        standing = together[number].manifest.merge
        assert standing is not None
        assert [item.url for item in standing.inputs] == urls[-count:]
        assert verify_checkpoint(str(tmp_path / "grid" / str(number))).problems == []
    size = sum(place.num_bytes for place in open_checkpoint(urls[0]).model.values())
    assert sum(report.bytes_read for report in together) == 5 * size


def test_grid_broken_off_goes_on_at_the_shards_of_every_merge(urls: list[str], tmp_path: Path) -> None:
    plans = plans_of(urls, tmp_path / "grid", CHOICES)
    assert len(plans[0].tasks) > 3
    with pytest.raises(RuntimeError, match="killed on purpose"):
        run(plans, stop_after=2)
    reports = run(plans)
    assert [report.tasks_reused for report in reports] == [2] * len(CHOICES)
    whole = run(plans_of(urls, tmp_path / "whole", CHOICES))
    assert [r.manifest.digest for r in reports] == [r.manifest.digest for r in whole]


def test_grid_of_more_inputs_than_there_are_is_refused(urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="merge of 6 inputs was asked for; 5 are given"):
        plans_of(urls, tmp_path, [(MethodChoice(method="sma"), 6)])


def test_grid_memory_grows_with_the_number_of_merges_alone(urls: list[str], tmp_path: Path) -> None:
    few = plans_of(urls[:2], tmp_path, [(MethodChoice(method="sma"), 2)] * 1)[0].tasks[0]
    more = plans_of(urls, tmp_path, [(MethodChoice(method="sma"), 5)] * 1)[0].tasks[0]
    many = plans_of(urls, tmp_path, CHOICES)[0].tasks[0]
    assert few.memory_bytes == more.memory_bytes < many.memory_bytes
