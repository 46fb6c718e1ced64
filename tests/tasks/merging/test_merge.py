"""Whole merges on real files: right against float64, the same bits however they run, and safe to break off."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import LeaseLost, StorageError
from cluster.fan_out import fan_out_local
from cluster.storage import open_store
from cluster.storage_local import LocalReader
from configs.errors import UserError
from tasks.checkpoints.digest import content_digest, digest_bytes
from tasks.checkpoints.manifest import INDEX_KEY, MANIFEST_KEY, Manifest
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry, read_header
from tasks.checkpoints.writer import CommitConflict
from tasks.merging.merge import MergeReport, execute_merge, find_standing
from tasks.merging.methods import MethodChoice, build_weights
from tasks.merging.plan import plan_merge
from tasks.merging.planned import MergePlan, MergeTask
from tasks.merging.receipt import Receipt

Tensors = dict[str, torch.Tensor]
Execute = Callable[[MergeTask], list[Receipt]]
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.experts.0.up_proj.weight": (12, 8),
    "model.layers.0.mlp.experts.1.up_proj.weight": (12, 8),
    "model.layers.0.mlp.gate.e_score_correction_bias": (4,),
    "model.layers.0.mlp.gate.weight": (4, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "scalar": (),
    "empty": (0, 8),
}
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
SHARD_BYTES = 600
"""Cuts the tensors above into several shards."""
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place, relative, of an output dtype."""


def random_tensors(seed: int, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**tensors, **more}


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "output")


@pytest.fixture
def inputs(save_folder: Callable[..., str]) -> list[str]:
    """Three plain folders, the second one of two files."""
    second = random_tensors(2)
    half = dict(list(second.items())[:4])
    return [
        save_folder("in1", random_tensors(1)),
        save_folder("in2", half, {name: tensor for name, tensor in second.items() if name not in half}),
        save_folder("in3", random_tensors(3), config={"model_type": "tiny", "dtype": "float32"}),
    ]


def plan_of(urls: Sequence[str], output_url: str, method: str = "sma", **options: Any) -> MergePlan:
    opened = [open_checkpoint(url) for url in urls]
    weights = options.pop("weights", None)
    choice = MethodChoice(
        method="weights" if weights else method, alpha=0.2 if method == "ema" else None, weights=weights
    )
    return plan_merge(opened, choice, **{"output_url": output_url, "shard_bytes": SHARD_BYTES, **options})


def with_chunks_of(plan: MergePlan, elements: int, buffers: int = 1) -> MergePlan:
    changed = (dataclasses.replace(task, chunk_bytes=8 * elements, buffers=buffers) for task in plan.tasks)
    return dataclasses.replace(plan, tasks=tuple(changed))


def on_threads(num_workers: int) -> Callable[[Execute, list[MergeTask]], Iterable[list[Receipt]]]:
    return lambda function, tasks: fan_out_local(function, tasks, num_workers=num_workers)


def never_lost() -> None:
    return None


def run(plan: MergePlan, num_workers: int = 1, check: Callable[[], None] = never_lost) -> MergeReport:
    return execute_merge(plan, on_threads(num_workers), check)


def break_off_after(count: int) -> Callable[[Execute, list[MergeTask]], Iterator[list[Receipt]]]:
    """A runner that is killed once ``count`` tasks are done."""

    def run_some(function: Execute, tasks: list[MergeTask]) -> Iterator[list[Receipt]]:
        for task in tasks[:count]:
            yield function(task)
        raise RuntimeError("killed on purpose")

    return run_some


def break_off(plan: MergePlan, count: int) -> None:
    with pytest.raises(RuntimeError, match="killed on purpose"):
        execute_merge(plan, break_off_after(count), never_lost)


def load_merged(url: str) -> Tensors:
    """What the safetensors library reads through the Hugging Face index."""
    folder = Path(url)
    weight_map = json.loads((folder / INDEX_KEY).read_text())["weight_map"]
    files = {key: load_file(folder / key) for key in set(weight_map.values())}
    return {name: files[key][name] for name, key in weight_map.items()}


def published(url: str) -> bool:
    return open_store(url).exists(MANIFEST_KEY)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digest_of(tensors: Tensors) -> str:
    """Content digest of tensors in memory, without any of the reading code."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return content_digest(
        TensorEntry(
            name=name,
            dtype=names[tensor.dtype],
            shape=tuple(tensor.shape),
            offset=0,
            bytes=tensor.nbytes,
            digest=digest_bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()),
        )
        for name, tensor in tensors.items()
    )


# The result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "count"), [("sma", 4), ("wma", 3), ("ema", 5)])
def test_merge_equals_the_float64_mean_within_the_bound(
    save_folder: Callable[..., str], output: str, dtype: torch.dtype, method: str, count: int
) -> None:
    made = [random_tensors(seed, dtype) for seed in range(count)]
    weights = build_weights(method, count, 0.2)
    run(plan_of([save_folder(f"in{i}", tensors) for i, tensors in enumerate(made)], output, method))
    merged = load_merged(output)
    assert set(merged) == set(SHAPES)
    for name, tensor in merged.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, SHAPES[name])
        terms = np.stack([w * tensors[name].double().numpy() for w, tensors in zip(weights, made, strict=True)])
        exact = terms.sum(axis=0)
        # The bound of tasks.merging.kernel for its accumulation dtype, and the one rounding to the output dtype. For
        # float64 the oracle rounds as much itself.
        accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bound = 2 * (count + 2) * accumulate * np.abs(terms).sum(axis=0) + UNIT[dtype] * np.abs(exact)
        assert (np.abs(tensor.double().numpy() - exact) <= bound).all(), name


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_merge_dtype_override_rounds_once_and_keeps_what_is_marked(
    inputs: list[str], output: str, tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    run(plan_of(inputs, str(tmp_path / "own")))
    run(plan_of(inputs, output, dtype=dtype))
    own, merged = load_merged(str(tmp_path / "own")), load_merged(output)
    for name, tensor in merged.items():
        expected = own[name] if name == BIAS else own[name].to(stored)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
    assert json.loads((Path(output) / "config.json").read_text())["dtype"] == dtype


def test_merge_manifest_describes_the_shards_and_where_they_came_from(inputs: list[str], output: str) -> None:
    report = run(plan_of(inputs, output, "wma"))
    manifest = report.manifest
    store = open_store(output)
    assert manifest.kind == "merged"
    assert manifest.digest == digest_of(load_merged(output))
    for shard in manifest.shards:
        assert digest_bytes(store.read(shard.key)) == shard.digest
        assert [dataclasses.replace(tensor, digest="") for tensor in shard.tensors] == read_header(store, shard.key)
    for item in manifest.files:
        assert digest_bytes(store.read(item.key)) == item.digest
    assert {item.key for item in manifest.files} == {"config.json", INDEX_KEY}
    assert sorted(name for names in manifest.parameter_groups.values() for name in names) == sorted(SHAPES)
    merge = manifest.merge
    assert merge is not None
    assert (merge.method, merge.weights) == ("wma", build_weights("wma", 3))
    assert [item.url for item in merge.inputs] == inputs
    assert [item.digest for item in merge.inputs] == [digest_of(random_tensors(seed)) for seed in (1, 2, 3)]
    assert {(item.step, item.manifest_digest) for item in merge.inputs} == {(None, None)}


def test_merge_of_snapshots_takes_over_step_and_lineage_but_no_state(
    tmp_path: Path, output: str, commit_snapshot: Callable[..., Manifest]
) -> None:
    manifests, urls = [], []
    for step in (10, 20):
        store = open_store(str(tmp_path / f"step-{step}"))
        state = {f"exp_avg.{name}": tensor for name, tensor in random_tensors(100 + step).items()}
        manifests.append(commit_snapshot(store, random_tensors(step), state=state, step=step))
        urls.append(store.url)
    merged = run(plan_of(urls, output)).manifest
    assert (merged.step, merged.tokens_seen, merged.phase, merged.run_id) == (20, 2000, "stable", "run")
    assert (merged.state_digest, merged.state_tensors()) == (None, [])
    assert merged.merge is not None
    assert [(item.step, item.tokens_seen, item.digest) for item in merged.merge.inputs] == [
        (manifest.step, manifest.tokens_seen, manifest.digest) for manifest in manifests
    ]
    assert [item.manifest_digest for item in merged.merge.inputs] == [
        digest_bytes(open_store(url).read(MANIFEST_KEY)) for url in urls
    ]


def test_merge_of_a_merge_is_a_checkpoint_like_any_other(inputs: list[str], output: str, tmp_path: Path) -> None:
    first = run(plan_of(inputs[:2], output)).manifest
    second = run(plan_of([output, inputs[2]], str(tmp_path / "second"))).manifest
    assert second.merge is not None
    assert second.merge.inputs[0].digest == first.digest


def test_merge_copies_configuration_and_tokenizer_of_the_newest_input(inputs: list[str], output: str) -> None:
    for number, url in enumerate(inputs):
        for key in ("config.json", "tokenizer.json", "generation_config.json"):
            (Path(url) / key).write_text(json.dumps({"from": number}))
        (Path(url) / "notes.txt").write_text("not copied")
    manifest = run(plan_of(inputs, output)).manifest
    copied = {"config.json", "tokenizer.json", "generation_config.json"}
    assert {item.key for item in manifest.files} == {*copied, INDEX_KEY}
    assert all(json.loads((Path(output) / key).read_text()) == {"from": 2} for key in copied)
    assert not (Path(output) / "notes.txt").exists()


def test_merge_zero_weight_is_a_weight(inputs: list[str], output: str) -> None:
    run(plan_of(inputs, output, weights=(0.0, 1.0, 0.0)))
    assert all(torch.equal(tensor, random_tensors(2)[name]) for name, tensor in load_merged(output).items())


def test_merge_leaves_nothing_but_the_checkpoint(inputs: list[str], output: str) -> None:
    manifest = run(plan_of(inputs, output), num_workers=2).manifest
    listed = {shard.key for shard in manifest.shards} | {item.key for item in manifest.files} | {MANIFEST_KEY}
    assert set(files_of(Path(output))) == listed


def test_merge_report_counts_this_invocation(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)
    report = run(plan)
    elements = sum(math.prod(shape) for shape in SHAPES.values())
    assert len(plan.tasks) > 1
    assert report.bytes_read == 3 * 4 * elements
    assert report.bytes_written == sum(shard.bytes for shard in report.manifest.shards)
    assert report.tasks_reused == 0
    assert report.peak_memory_bytes > 0


# Execution does not show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_chunks_and_threads_do_not_change_a_byte(
    save_folder: Callable[..., str], tmp_path: Path, dtype: torch.dtype
) -> None:
    urls = [save_folder(f"in{seed}", random_tensors(seed, dtype)) for seed in range(3)]
    results = []
    for number, (elements, num_workers) in enumerate([(1 << 18, 1), (1, 1), (7, 4), (64, 2), (97, 3)]):
        url = str(tmp_path / f"out{number}")
        report = run(with_chunks_of(plan_of(urls, url, "ema"), elements, buffers=1 + number % 3), num_workers)
        results.append((report.manifest.digest, {shard.key: shard.digest for shard in report.manifest.shards}))
    assert all(result == results[0] for result in results)


def test_merge_number_of_shards_does_not_change_the_digest(inputs: list[str], tmp_path: Path) -> None:
    manifests = [
        run(plan_of(inputs, str(tmp_path / f"out{shard_bytes}"), shard_bytes=shard_bytes)).manifest
        for shard_bytes in (1, 300, 600, 1 << 30)
    ]
    assert len({manifest.digest for manifest in manifests}) == 1
    assert len({len(manifest.shards) for manifest in manifests}) > 2


def test_merge_files_of_the_inputs_do_not_change_the_digest(save_folder: Callable[..., str], tmp_path: Path) -> None:
    digests = set()
    for number, parts in enumerate((1, 3, 9)):
        urls = []
        for seed in (1, 2):
            items = list(random_tensors(seed).items())
            urls.append(save_folder(f"{number}-{seed}", *(dict(items[i::parts]) for i in range(parts))))
        digests.add(run(plan_of(urls, str(tmp_path / f"out{number}"))).manifest.digest)
    assert len(digests) == 1


# Integers


def test_merge_equal_integers_are_kept(save_folder: Callable[..., str], output: str) -> None:
    more = {
        "position_ids": torch.arange(40),
        "mask": torch.tensor([True, False]),
        "byte": torch.tensor([255, 0], dtype=torch.uint8),
    }
    urls = [save_folder(f"in{seed}", random_tensors(seed, **more)) for seed in (1, 2)]
    run(with_chunks_of(plan_of(urls, output, dtype="bfloat16"), 7))
    merged = load_merged(output)
    for name, tensor in more.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor)


def test_merge_different_integers_refused_by_name(save_folder: Callable[..., str], output: str) -> None:
    first, second = torch.arange(40), torch.arange(40)
    second[33] = 0
    urls = [
        save_folder(f"in{number}", random_tensors(number, position_ids=ids))
        for number, ids in enumerate((first, first.clone(), second))
    ]
    with pytest.raises(CheckpointError, match="integer tensor 'position_ids' differs") as caught:
        run(with_chunks_of(plan_of(urls, output), 8))
    assert urls[0] in str(caught.value)
    assert urls[2] in str(caught.value)
    assert "element 33" in str(caught.value)
    assert not published(output)


# Values that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("elements", [5, 1 << 18])
def test_merge_nonfinite_input_named_with_tensor_and_index(
    save_folder: Callable[..., str], output: str, bad: float, culprit: int, elements: int
) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    made = [random_tensors(seed) for seed in range(3)]
    made[culprit][name].view(-1)[[42, 43, 95]] = bad
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    with pytest.raises(CheckpointError) as caught:
        run(with_chunks_of(plan_of(urls, output), elements))
    assert f"{urls[culprit]}/model.safetensors: tensor '{name}' is not finite at element 42" in str(caught.value)
    assert not published(output)


def test_merge_nonfinite_input_of_zero_weight_is_named_too(save_folder: Callable[..., str], output: str) -> None:
    made = [random_tensors(seed) for seed in range(2)]
    made[0]["scalar"] = torch.tensor(math.nan)
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    with pytest.raises(CheckpointError, match="'scalar' is not finite at element 0"):
        run(plan_of(urls, output, weights=(0.0, 1.0)))


@pytest.mark.parametrize("payload", [0x7FC00000, pytest.param(
    -1,
)])  # fmt: skip
def test_merge_every_nan_is_refused_in_a_narrower_output(
    save_folder: Callable[..., str], output: str, payload: int
) -> None:
    made = [random_tensors(seed) for seed in range(2)]
    made[0]["model.norm.weight"].view(torch.int32)[3] = payload
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is not finite at element 3"):
        run(plan_of(urls, output, dtype="bfloat16"))


def test_merge_overflow_of_the_output_dtype_is_named_as_such(save_folder: Callable[..., str], output: str) -> None:
    made = [random_tensors(seed) for seed in range(2)]
    for tensors in made:
        tensors["model.norm.weight"][5] = 1e6
    urls = [save_folder(f"in{number}", tensors) for number, tensors in enumerate(made)]
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' overflows F16 at element 5; all inputs are finite"):
        run(plan_of(urls, output, dtype="float16"))
    assert not published(output)


# Broken off and run again


@pytest.mark.parametrize("done", [1, 2])
def test_merge_broken_off_resumes_with_its_receipts_and_the_same_digest(
    inputs: list[str], output: str, tmp_path: Path, done: int
) -> None:
    plan = plan_of(inputs, output)
    uninterrupted = run(plan_of(inputs, str(tmp_path / "uninterrupted")))
    break_off(plan, done)
    assert not published(output)
    shards = {task.shard_key: open_store(output).version(task.shard_key) for task in plan.tasks[:done]}
    report = run(plan_of(inputs, output), num_workers=2)
    assert report.tasks_reused == done
    assert report.bytes_read == sum(task.bytes_read for task in plan.tasks[done:])
    assert report.manifest.digest == uninterrupted.manifest.digest
    assert {key: open_store(output).version(key) for key in shards} == shards
    assert report.manifest.merge is not None
    assert uninterrupted.manifest.merge is not None
    assert report.manifest.merge.inputs == uninterrupted.manifest.merge.inputs
    assert set(report.manifest.shards) == set(uninterrupted.manifest.shards)


def test_merge_broken_off_in_the_middle_of_a_shard_leaves_no_half_shard(
    inputs: list[str], output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = with_chunks_of(plan_of(inputs, output), 8)
    reads = iter(range(40))

    def away(self: LocalReader, start: int, buffer: memoryview) -> None:
        if next(reads, None) is None:
            raise StorageError("storage is away")
        read_into(self, start, buffer)

    read_into = LocalReader.read_into
    with monkeypatch.context() as patch:
        patch.setattr(LocalReader, "read_into", away)
        with pytest.raises(StorageError, match="storage is away"):
            run(plan)
    whole = {task.shard_key for task in plan.tasks}
    left = {key for key in files_of(Path(output)) if not key.startswith("receipts/")}
    for key in left:
        assert key in whole
        read_header(open_store(output), key)
    assert run(plan).manifest.digest


def test_merge_broken_off_shard_that_is_gone_is_made_again(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)
    break_off(plan, 1)
    open_store(output).delete(plan.tasks[0].shard_key)
    assert run(plan).tasks_reused == 0
    assert set(load_merged(output)) == set(SHAPES)


def test_merge_broken_off_truncated_shard_is_not_reused(inputs: list[str], output: str, tmp_path: Path) -> None:
    plan = plan_of(inputs, output)
    break_off(plan, 1)
    path = Path(output) / plan.tasks[0].shard_key
    path.write_bytes(path.read_bytes()[:-1])
    report = run(plan)
    assert report.tasks_reused == 0
    assert report.manifest.digest == digest_of(load_merged(output))
    assert report.manifest.digest == run(plan_of(inputs, str(tmp_path / "fresh"))).manifest.digest


def test_merge_broken_off_other_merge_after_it_reuses_nothing(inputs: list[str], output: str, tmp_path: Path) -> None:
    break_off(plan_of(inputs, output, "sma"), 2)
    report = run(plan_of(inputs, output, "wma"))
    assert report.tasks_reused == 0
    assert report.manifest.digest == run(plan_of(inputs, str(tmp_path / "fresh"), "wma")).manifest.digest


def test_merge_broken_off_replaced_input_is_read_again(inputs: list[str], output: str, tmp_path: Path) -> None:
    break_off(plan_of(inputs, output), 1)
    save_file(random_tensors(77), Path(inputs[0]) / "model.safetensors", metadata={"format": "pt"})
    report = run(plan_of(inputs, output))
    assert report.manifest.digest == run(plan_of(inputs, str(tmp_path / "fresh"))).manifest.digest


# Outputs that are taken


def test_merge_same_again_is_success_without_work(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)
    first = run(plan)
    before = {key: open_store(output).version(key) for key in files_of(Path(output))}

    def no_work(function: Execute, tasks: list[MergeTask]) -> Iterable[list[Receipt]]:
        raise AssertionError("no task may run")

    again = execute_merge(plan_of(inputs, output, shard_bytes=1), no_work, never_lost)
    assert again.manifest == first.manifest
    assert (again.bytes_read, again.bytes_written) == (0, 0)
    assert {key: open_store(output).version(key) for key in files_of(Path(output))} == before


def test_merge_other_merge_in_the_output_refused_and_untouched(inputs: list[str], output: str) -> None:
    run(plan_of(inputs, output, "sma"))
    before = files_of(Path(output))
    for other in (
        plan_of(inputs, output, "wma"),
        plan_of(inputs[1:], output),
        plan_of(inputs, output, dtype="float16"),
    ):
        with pytest.raises(UserError, match=r"holds another merge \(sma\); nothing was touched"):
            run(other)
    assert files_of(Path(output)) == before


def test_merge_snapshot_in_the_output_refused_and_untouched(
    inputs: list[str], output: str, commit_snapshot: Callable[..., Manifest]
) -> None:
    commit_snapshot(open_store(output), random_tensors(9))
    before = files_of(Path(output))
    with pytest.raises(UserError, match="holds a training checkpoint; nothing was touched"):
        run(plan_of(inputs, output))
    assert files_of(Path(output)) == before


@pytest.mark.parametrize("key", ["notes.txt", "model.safetensors", "deep/er/file", "model-00001-of-00004.safetensors"])
def test_merge_users_files_in_the_output_refused_and_untouched(inputs: list[str], output: str, key: str) -> None:
    open_store(output).put(key, b"mine")
    with pytest.raises(UserError, match=f"not of this merge \\({key}\\); nothing was touched"):
        run(plan_of(inputs, output))
    assert files_of(Path(output)) == {key: b"mine"}


def test_merge_lease_in_the_output_is_no_users_file(inputs: list[str], output: str) -> None:
    open_store(output).put("leases/merge.json", b"{}")
    assert find_standing(plan_of(inputs, output)) is None


# One of two drivers


def test_merge_lease_lost_publishes_nothing_and_a_later_run_goes_on(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)

    def lost() -> None:
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        run(plan, check=lost)
    assert not published(output)
    report = run(plan)
    assert (report.tasks_reused, report.bytes_read) == (len(plan.tasks), 0)


def test_merge_two_drivers_of_one_merge_publish_once(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)
    others: list[MergeReport] = []

    def overtaken(function: Execute, tasks: list[MergeTask]) -> Iterator[list[Receipt]]:
        others.append(run(plan_of(inputs, output)))
        yield from on_threads(1)(function, tasks)

    report = execute_merge(plan, overtaken, never_lost)
    assert report.manifest == others[0].manifest
    assert digest_of(load_merged(output)) == report.manifest.digest
    index = next(item for item in report.manifest.files if item.key == INDEX_KEY)
    assert digest_bytes(open_store(output).read(INDEX_KEY)) == index.digest


def overtake(inputs: list[str], output: str) -> Manifest:
    """A merge that another, different one overtakes; the manifest that stands."""
    standing: list[Manifest] = []

    def overtaken(function: Execute, tasks: list[MergeTask]) -> Iterator[list[Receipt]]:
        standing.append(run(plan_of(inputs, output, "sma")).manifest)
        yield from on_threads(1)(function, tasks)

    with pytest.raises(CommitConflict, match="the committed one is kept"):
        execute_merge(plan_of(inputs, output, "wma"), overtaken, never_lost)
    return standing[0]


def test_merge_two_drivers_of_different_merges_the_first_stands(inputs: list[str], output: str) -> None:
    standing = overtake(inputs, output)
    reopened = open_checkpoint(output)
    assert reopened.manifest == standing
    for shard in standing.shards:
        assert digest_bytes(open_store(output).read(shard.key)) == shard.digest


def test_merge_two_drivers_of_different_merges_libraries_load_the_first(inputs: list[str], output: str) -> None:
    standing = overtake(inputs, output)
    assert digest_of(load_merged(output)) == standing.digest


def test_merge_lease_lost_to_a_finished_merge_touches_nothing_of_it(inputs: list[str], output: str) -> None:
    finished: list[dict[str, bytes]] = []

    def overtaken(function: Execute, tasks: list[MergeTask]) -> Iterator[list[Receipt]]:
        standing = run(plan_of(inputs, output, "sma")).manifest
        kept = {item.key for item in standing.files} | {shard.key for shard in standing.shards} | {MANIFEST_KEY}
        finished.append({key: data for key, data in files_of(Path(output)).items() if key in kept})
        yield from on_threads(1)(function, tasks)

    def lost() -> None:
        raise LeaseLost("taken over")

    with pytest.raises(LeaseLost):
        execute_merge(plan_of(inputs, output, "wma"), overtaken, lost)
    now = files_of(Path(output))
    assert {key: now[key] for key in finished[0]} == finished[0]


# Inputs that were changed


@pytest.mark.parametrize("place", [0, 100, -1])
def test_merge_changed_byte_in_a_committed_input_is_detected(
    tmp_path: Path, output: str, commit_snapshot: Callable[..., Manifest], place: int
) -> None:
    stores = [open_store(str(tmp_path / f"step-{step}")) for step in (1, 2)]
    manifests = [commit_snapshot(store, random_tensors(step), step=step) for step, store in enumerate(stores, start=1)]
    shard = manifests[1].shards[0]
    tensors = [tensor for tensor in shard.tensors if tensor.bytes]
    path = Path(stores[1].url) / shard.key
    data = bytearray(path.read_bytes())
    data[place if place < 0 else tensors[0].offset + place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="changed or damaged after it was committed") as caught:
        run(plan_of([store.url for store in stores], output))
    assert f"{path}: tensor '{(tensors[-1] if place < 0 else tensors[0]).name}'" in str(caught.value)
    assert not published(output)


def test_merge_truncated_committed_input_is_detected(
    tmp_path: Path, output: str, commit_snapshot: Callable[..., Manifest]
) -> None:
    stores = [open_store(str(tmp_path / f"step-{step}")) for step in (1, 2)]
    manifests = [commit_snapshot(store, random_tensors(step), step=step) for step, store in enumerate(stores, start=1)]
    path = Path(stores[0].url) / manifests[0].shards[0].key
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=f"{path}: ends at byte"):
        run(plan_of([store.url for store in stores], output))
    assert not published(output)


def test_merge_broken_off_changed_receipt_of_another_task_is_ignored(inputs: list[str], output: str) -> None:
    plan = plan_of(inputs, output)
    break_off(plan, 1)
    store = open_store(output)
    values = json.loads(store.read("receipts/task-00001.json"))
    store.put("receipts/task-00001.json", json.dumps({**values, "identity": "of another task"}).encode())
    report = run(plan)
    assert report.tasks_reused == 0
    assert digest_of(load_merged(output)) == report.manifest.digest
