"""torch.distributed.checkpoint folders as trainers write them, read bit for bit; and folders that lie, refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import os
import pickle
import random
import shutil
import struct
import sys
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cluster.errors import ObjectMissing, StorageError
from cluster.storage import Store, open_store
from tasks.checkpoints.dcp import MAX_METADATA_BYTES, METADATA_KEY, DcpContents, open_dcp
from tasks.checkpoints.inert_pickle import RefusedPickle
from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tensor_reader import TensorReader
from tests.dcp_checkpoints import fsdp2, megatron, sharded, write, write_plain

HYPOTHESIS = settings(max_examples=300, deadline=None, derandomize=True, database=None)
Tensors = Mapping[str, torch.Tensor]
Change = Callable[[Metadata], object]


def made(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (100 * torch.randn(shape, generator=generator)).to((dtypes or {}).get(name, torch.float32))
        for name, shape in shapes.items()
    }


# 10, 7 and 5 rows over 2 or 3 ranks are uneven; over 3 ranks, two of them have no share of one row.
PARAMETERS = made(
    {"embed.weight": (10, 6), "layers.0.up.weight": (7, 5), "layers.0.norm.weight": (5,), "thin.weight": (1, 4)},
    {"layers.0.up.weight": torch.bfloat16},
)
TENSORS = {
    **PARAMETERS,
    **made({"experts": (3, 4, 5), "counts": (4,), "scale": ()}, {"experts": torch.float16, "counts": torch.int64}),
}
LAYERS = made(
    {"decoder.layers.self_attention.linear_qkv.weight": (4, 3, 5), "decoder.layers.mlp.linear_fc1.weight": (5, 2, 3),
     "decoder.final_layernorm.weight": (3,)},
    {"decoder.layers.self_attention.linear_qkv.weight": torch.bfloat16},
)  # fmt: skip
MOMENTS = made({"exp_avg": (10, 6), "exp_avg_sq": (10, 6)})
EXPECTED = {
    "plain": TENSORS,
    "sharded-2": TENSORS,
    "sharded-2-dim1": TENSORS,
    "sharded-3": TENSORS,
    "sharded-3-dim1": TENSORS,
    "fsdp2-2": PARAMETERS,
    "fsdp2-3": PARAMETERS,
    "megatron-2": LAYERS,
    "megatron-3": LAYERS,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout once: ``<layout>/`` for the keys of ``EXPECTED``."""
    root = tmp_path_factory.mktemp("layouts")
    state = {"embed.weight": {**MOMENTS, "step": torch.tensor(9.0)}}
    write_plain(root / "plain", TENSORS, {"state": state, "param_groups": [{"lr": 0.1, "params": ["embed.weight"]}]})
    for ranks in (2, 3):
        write(
            ranks,
            [
                sharded(root / f"sharded-{ranks}", TENSORS),
                sharded(root / f"sharded-{ranks}-dim1", TENSORS, dim=1),
                fsdp2(root / f"fsdp2-{ranks}", PARAMETERS),
                megatron(root / f"megatron-{ranks}", LAYERS),
            ],
        )
    return root


def save(folder: Path, state: dict[str, Any]) -> Store:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return open_store(str(folder))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(store: Store, places: Mapping[str, TensorPlace]) -> dict[str, bytes]:
    with TensorReader(store) as reader:
        return {name: read(reader, place, 0, place.num_elements) for name, place in places.items()}


def read(reader: TensorReader, place: TensorPlace, start: int, end: int) -> bytes:
    data = bytearray((end - start) * (place.num_bytes // max(1, place.num_elements)))
    reader.read_into(place, start, end, memoryview(data))
    return bytes(data)


def require_equal(store: Store, places: Mapping[str, TensorPlace], tensors: Tensors) -> None:
    assert places.keys() == tensors.keys()
    assert {name: place.shape for name, place in places.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert read_all(store, places) == {name: raw(tensor) for name, tensor in tensors.items()}


# Every layout


@pytest.mark.parametrize("layout", EXPECTED)
def test_open_dcp_of_every_layout_holds_the_weights_bit_for_bit(layout: str, written: Path) -> None:
    store = open_store(str(written / layout))
    require_equal(store, open_dcp(store).model, EXPECTED[layout])


@pytest.mark.parametrize("layout", EXPECTED)
def test_open_dcp_of_every_layout_reads_random_ranges_bit_for_bit(layout: str, written: Path) -> None:
    store, chance = open_store(str(written / layout)), random.Random(layout)
    contents = open_dcp(store)
    with TensorReader(store) as reader:
        for name, tensor in EXPECTED[layout].items():
            place, whole, width = contents.model[name], raw(tensor), tensor.element_size()
            for _ in range(30):
                start = chance.randint(0, tensor.numel())
                end = chance.randint(start, tensor.numel())
                assert read(reader, place, start, end) == whole[start * width : end * width]


@pytest.mark.parametrize("layout", EXPECTED)
def test_open_dcp_of_every_layout_agrees_with_torch(layout: str, written: Path) -> None:
    # torch's own reader, for training state as well: of every tensor that it finds under its flat key.
    store = open_store(str(written / layout))
    contents = open_dcp(store)
    metadata = pickle.loads((written / layout / METADATA_KEY).read_bytes())
    flat = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(flat, checkpoint_id=written / layout, no_dist=True)
    found = [*read_all(store, contents.model).values(), *read_all(store, contents.state).values()]
    assert sorted(found) == sorted(raw(tensor) for tensor in flat.values())


def test_open_dcp_sharded_layouts_have_a_region_a_rank(written: Path) -> None:
    place = open_dcp(open_store(str(written / "sharded-3"))).model["embed.weight"]
    assert [(region.start, region.shape) for region in place.regions] == [
        ((0, 0), (4, 6)),
        ((4, 0), (4, 6)),
        ((8, 0), (2, 6)),
    ]
    place = open_dcp(open_store(str(written / "sharded-2-dim1"))).model["experts"]
    assert [region.shape for region in place.regions] == [(3, 2, 5), (3, 2, 5)]
    assert len({region.key for region in place.regions}) == 2


def test_open_dcp_grid_over_two_dimensions_reads_bit_for_bit(tmp_path: Path) -> None:
    # As tensor parallelism beside data parallelism saves it: a chunk per rank of a 3 x 2 mesh, in six objects.
    tensor = TENSORS["embed.weight"]
    cells = [((r, c), (5 if r else 3, 3)) for r, c in itertools.product((0, 3, 8), (0, 3))]
    cells = [((r, c), (min(rows, 10 - r), columns)) for (r, c), (rows, columns) in cells]
    store = hand_written(tmp_path / "grid", tensor, cells)
    require_equal(store, open_dcp(store).model, {"w": tensor})


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_open_dcp_empty_tensor_is_read_as_empty(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"none": torch.empty(shape), "some": torch.ones(2)}
    store = save(tmp_path / "empty", {"model": tensors})
    require_equal(store, open_dcp(store).model, tensors)


def test_open_dcp_from_memory_equals_the_folder(written: Path, memory_store: Store) -> None:
    for path in (written / "sharded-2").iterdir():
        memory_store.put(path.name, path.read_bytes())
    require_equal(memory_store, open_dcp(memory_store).model, TENSORS)


def test_open_dcp_moved_folder_is_read(written: Path, tmp_path: Path) -> None:
    # .metadata remembers the absolute path that it was saved to.
    shutil.copytree(written / "plain", tmp_path / "moved")
    store = open_store(str(tmp_path / "moved"))
    require_equal(store, open_dcp(store).model, TENSORS)


# Names


def test_open_dcp_plain_optimizer_moments_go_by_their_weights(written: Path) -> None:
    store = open_store(str(written / "plain"))
    contents = open_dcp(store)
    expected = {f"{moment}.embed.weight": tensor for moment, tensor in MOMENTS.items()}
    require_equal(store, contents.state, {**expected, "step.embed.weight": torch.tensor(9.0)})
    assert "optimizer.param_groups.0.lr" in contents.ignored


@pytest.mark.parametrize("ranks", [2, 3])
def test_open_dcp_fsdp2_moments_go_by_their_weights(ranks: int, written: Path) -> None:
    store = open_store(str(written / f"fsdp2-{ranks}"))
    contents = open_dcp(store)
    # The first step of AdamW on gradients of 1, without shards.
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in PARAMETERS.values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    expected = {
        f"{moment}.{name}": tensor
        for name, parameter in zip(PARAMETERS, parameters, strict=True)
        for moment, tensor in optimizer.state[parameter].items()
    }
    require_equal(store, contents.state, expected)
    assert "train_state.step" in contents.ignored


def test_open_dcp_fsdp2_weights_are_the_same_at_every_number_of_ranks(written: Path) -> None:
    stores = [open_store(str(written / f"fsdp2-{ranks}")) for ranks in (2, 3)]
    found = [read_all(store, open_dcp(store).model) for store in stores]
    assert found[0] == found[1]


@pytest.mark.parametrize("ranks", [2, 3])
def test_open_dcp_megatron_keys_are_weights_and_master_weights_are_state(ranks: int, written: Path) -> None:
    store = open_store(str(written / f"megatron-{ranks}"))
    expected = {f"{kind}.{name}": tensor.float() for name, tensor in LAYERS.items() for kind in ("exp_avg", "master")}
    require_equal(store, open_dcp(store).state, expected)


A, B, C = torch.arange(6.0).reshape(2, 3), torch.arange(4.0), torch.tensor(3.0)
MOMENT = {"exp_avg": B, "exp_avg_sq": B + 1, "step": C}


@pytest.mark.parametrize(
    ("state", "model", "rest"),
    [
        ({"model": {"a": A, "b": B}}, ["a", "b"], []),
        ({"model": {"model.a": A, "lm_head.b": B}}, ["lm_head.b", "model.a"], []),
        ({"model": {"model": {"a": A}, "b": B}}, ["b", "model.a"], []),
        ({"model": {"layers": [A, B]}}, ["layers.0", "layers.1"], []),
        (
            {"model": {"b": B}, "optimizer": {"state": {"b": MOMENT}}},
            ["b"],
            ["exp_avg.b", "exp_avg_sq.b", "step.b"],
        ),
        ({"model": {"b": B}, "optim": {"state": {"b": MOMENT}}}, ["b"], ["exp_avg.b", "exp_avg_sq.b", "step.b"]),
        ({"app": {"model": {"b": B}, "optim": {"state": {"b": MOMENT}}}}, ["b"], ["exp_avg.b", "exp_avg_sq.b", "step.b"]),
        ({"model": {"a": A}, "rng": B, "train_state": {"seen": C}}, ["a"], ["rng", "train_state.seen"]),
        ({"model": {"a": A}, "ema": {"model": {"a": A + 1}}}, ["a"], ["ema.model.a"]),
        # Flat: Hugging Face names begin with "model." themselves.
        ({"model.a": A, "lm_head.b": B}, ["lm_head.b", "model.a"], []),
        ({"model.a": A, "model.b": B}, ["model.a", "model.b"], []),
        (
            {"model.a": A, "model.b": B, "optimizer.state.model.b.exp_avg": B + 1},
            ["model.a", "model.b"],
            ["exp_avg.model.b"],
        ),
        (
            {"tok.weight": A, "layers.0.b": B, "optimizer.state.tok.weight.exp_avg": A + 1, "dataloader.dp": C, "lr_scheduler": C},
            ["layers.0.b", "tok.weight"],
            ["dataloader.dp", "exp_avg.tok.weight", "lr_scheduler"],
        ),
        # Weights whose names only begin like training state.
        ({"optimus.weight": A, "rng_net.weight": B}, ["optimus.weight", "rng_net.weight"], []),
    ],
)  # fmt: skip
def test_open_dcp_names_split_weights_from_training_state(
    state: dict[str, Any], model: list[str], rest: list[str], tmp_path: Path
) -> None:
    contents = open_dcp(save(tmp_path / "x", state))
    assert (sorted(contents.model), sorted(contents.state)) == (model, rest)


def test_open_dcp_names_lead_to_their_own_bytes(tmp_path: Path) -> None:
    store = save(
        tmp_path / "x",
        {"model": {"a": A}, "ema": {"model": {"a": A + 1}}, "optim": {"state": {"a": {"exp_avg": A + 2}}}},
    )
    contents = open_dcp(store)
    require_equal(store, contents.model, {"a": A})
    require_equal(store, contents.state, {"ema.model.a": A + 1, "exp_avg.a": A + 2})


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (["model.model.a", "model.lm_head.b", "optimizer.state.exp_avg.b"], ["lm_head.b", "model.a"]),
        (["model.a", "model.b", "optimizer.state.exp_avg.b"], ["model.a", "model.b"]),
        (["model.a", "lm_head.b", "optimizer.state.exp_avg.b"], ["lm_head.b", "model.a"]),
        (["model.a", "model.b"], ["model.a", "model.b"]),
        (["decoder.a", "decoder.b"], ["decoder.a", "decoder.b"]),
    ],
)
def test_open_dcp_names_without_planner_data_lose_model_only_where_it_is_doubled(
    keys: list[str], model: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    save(folder, {key: B + n for n, key in enumerate(keys)})
    assert sorted(open_dcp(changed(folder, lambda metadata: setattr(metadata, "planner_data", None))).model) == model


def test_open_dcp_two_weights_of_one_name_refused(tmp_path: Path) -> None:
    store = save(tmp_path / "x", {"model": {"a": A}, "teacher": {"model": {"a": A + 1}}})
    with pytest.raises(CheckpointError, match=r"a second one named 'a'"):
        open_dcp(store)


def test_open_dcp_optimizers_that_number_alike_keep_every_tensor(tmp_path: Path) -> None:
    optimizers = [{"optimizer": {"state": {"0": {"exp_avg": A + n}}}} for n in range(2)]
    store = save(tmp_path / "x", {"model": {"a": A}, "chained": optimizers})
    assert sorted(read_all(store, open_dcp(store).state).values()) == sorted([raw(A), raw(A + 1)])


def test_open_dcp_what_is_no_tensor_is_named_as_ignored(tmp_path: Path) -> None:
    contents = open_dcp(save(tmp_path / "x", {"model": {"a": A, "version": "2"}, "iteration": 7}))
    assert (set(contents.model), contents.state, set(contents.ignored)) == ({"a"}, {}, {"model.version", "iteration"})


def test_open_dcp_megatron_reshaped_optimizer_state_is_ignored(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "megatron-2", tmp_path / "x")
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    reshaped = {key: {"nd_reformulated_orig_global_shape": (3,)}}
    contents = open_dcp(changed(tmp_path / "x", lambda metadata: setattr(metadata, "mcore_data", reshaped)))
    assert key in contents.ignored
    assert "exp_avg.decoder.final_layernorm.weight" not in contents.state
    assert set(contents.model) == set(LAYERS)


def test_open_dcp_megatron_reshaped_weight_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "megatron-2", tmp_path / "x")
    reshaped = {"decoder.final_layernorm.weight": {"nd_reformulated_orig_global_shape": (3,)}}
    store = changed(tmp_path / "x", lambda metadata: setattr(metadata, "mcore_data", reshaped))
    with pytest.raises(CheckpointError, match=r"'decoder\.final_layernorm\.weight' is stored flattened"):
        open_dcp(store)


# Metadata that lies


def changed(folder: Path, change: Change) -> Store:
    """``folder`` with its metadata changed."""
    metadata = pickle.loads((folder / METADATA_KEY).read_bytes())
    change(metadata)
    (folder / METADATA_KEY).write_bytes(pickle.dumps(metadata))
    return open_store(str(folder))


def hand_written(folder: Path, tensor: torch.Tensor, cells: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Store:
    """One tensor ``w`` in chunks ``(start, extent)``, whether they tile it or not, an object each."""
    folder.mkdir()
    storage, chunks = {}, []
    for number, (start, extent) in enumerate(cells):
        index = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
        buffer = io.BytesIO()
        torch.save(tensor[index].clone(memory_format=torch.contiguous_format), buffer)
        (folder / f"__{number}_0.distcp").write_bytes(buffer.getvalue())
        chunks.append(ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(extent)))
        storage[MetadataIndex("w", start)] = _StorageInfo(f"__{number}_0.distcp", 0, buffer.tell())
    entry = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.shape, chunks)
    metadata = Metadata({"w": entry}, planner_data={"w": ("w",)}, storage_data=storage)
    (folder / METADATA_KEY).write_bytes(pickle.dumps(metadata))
    return open_store(str(folder))


@dataclass
class Calls:
    """Unpickled, it calls; read as data, it must not."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.fixture
def sharded_folder(written: Path, tmp_path: Path) -> Path:
    """A copy of a folder of two ranks, to be damaged."""
    return Path(shutil.copytree(written / "sharded-2", tmp_path / "copy"))


def first_info(metadata: Metadata) -> Any:
    return metadata.storage_data[MetadataIndex("model.embed.weight", (0, 0))]


def chunks_of(metadata: Metadata) -> list[ChunkStorageMetadata]:
    entry = metadata.state_dict_metadata["model.embed.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry.chunks


PLACES: dict[str, Callable[[Metadata, Any], object]] = {
    "root": lambda metadata, value: metadata.__dict__.update(evil=value),
    "planner_data": lambda metadata, value: setattr(metadata, "planner_data", value),
    "entry": lambda metadata, value: metadata.state_dict_metadata.update({"model.embed.weight": value}),
    "entry-name": lambda metadata, value: metadata.planner_data.update({"model.embed.weight": ("model", value)}),
    "chunks": lambda metadata, value: chunks_of(metadata).append(value),
    "path": lambda metadata, value: setattr(first_info(metadata), "relative_path", value),
    "storage_meta": lambda metadata, value: setattr(metadata, "storage_meta", value),
    "mcore_data": lambda metadata, value: metadata.__dict__.update(mcore_data=value),
}


@pytest.mark.parametrize("place", PLACES)
def test_open_dcp_pickle_that_calls_refused_and_not_executed(place: str, sharded_folder: Path) -> None:
    marker = sharded_folder / "executed"
    metadata = pickle.loads((sharded_folder / METADATA_KEY).read_bytes())
    PLACES[place](metadata, Calls(os.system, (f"touch {marker}",)))
    (sharded_folder / METADATA_KEY).write_bytes(data := pickle.dumps(metadata))
    with pytest.raises(RefusedPickle, match=r"\.metadata: the pickle names '(posix|nt)\.system'"):
        open_dcp(open_store(str(sharded_folder)))
    assert not marker.exists()
    # The same file is dangerous to who unpickles it: the test would see an execution.
    with contextlib.suppress(Exception):
        pickle.loads(data)
    assert marker.exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (getattr, ("", "upper"), "builtins.getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
        (torch.Tensor, (), "torch.Tensor"),
        (Path, ("x",), "pathlib.Path"),
        (OrderedDict.fromkeys, ("ab",), "builtins.getattr"),
        (sys.exit, (1,), "sys.exit"),
    ],
)
def test_open_dcp_pickle_with_other_names_refused(
    function: Callable[..., Any], arguments: tuple[Any, ...], name: str, sharded_folder: Path
) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(metadata, "planner_data", Calls(function, arguments)))
    with pytest.raises(RefusedPickle, match=f"names '{name}'"):
        open_dcp(store)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "..", "__0_0.distcp/.."])
def test_open_dcp_path_traversal_refused(path: str, sharded_folder: Path) -> None:
    (sharded_folder.parent / "secret").write_bytes((sharded_folder / "__0_0.distcp").read_bytes())
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), "relative_path", path))
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight' .*which leaves the folder"):
        open_dcp(store)


@pytest.mark.parametrize(
    "path", ["", "a\0b", "x" * 5000, 7, None, b"__0_0.distcp", ["__0_0.distcp"], "a\nb", "a\x1b[2Jb"]
)
def test_open_dcp_path_that_is_none_refused(path: Any, sharded_folder: Path) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), "relative_path", path))
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight': a name of"):
        open_dcp(store)


def test_open_dcp_path_to_a_folder_refused_when_read(sharded_folder: Path) -> None:
    (sharded_folder / "folder").mkdir()
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), "relative_path", "folder"))
    with pytest.raises((CheckpointError, StorageError), match="folder"):
        read_all(store, open_dcp(store).model)


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [-1, -(2**70), 2**63, 2**100, 1.0, True, None, "7", [7]])
def test_open_dcp_offset_or_length_that_is_none_refused(field: str, value: Any, sharded_folder: Path) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), field, value))
    with pytest.raises(
        CheckpointError, match=r"\.metadata: 'model\.embed\.weight' is stored in '__0_0\.distcp'|damaged"
    ):
        open_dcp(store)


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [10**6, 2**62, 2**63 - 1])
def test_open_dcp_offset_or_length_beyond_the_object_refused(field: str, value: int, sharded_folder: Path) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), field, value))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp .*truncated or not complete"):
        open_dcp(store)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_open_dcp_length_too_short_for_the_chunk_refused(length: int, sharded_folder: Path) -> None:
    # Length 0 must not be taken for bare elements.
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), "length", length))
    with pytest.raises(CheckpointError, match=r"model\.embed\.weight"):
        open_dcp(store)


@pytest.mark.parametrize("shift", [-8, -1, 1, 8, 64])
def test_open_dcp_offset_beside_the_archive_refused_when_read(shift: int, sharded_folder: Path) -> None:
    index = MetadataIndex("model.experts", (0, 0, 0))

    def move(metadata: Metadata) -> None:
        metadata.storage_data[index].offset += shift

    store = changed(sharded_folder, move)
    with pytest.raises(CheckpointError, match=r"experts|chunk at byte"):
        read_all(store, open_dcp(store).model)


def test_open_dcp_truncated_object_refused(sharded_folder: Path) -> None:
    path = sharded_folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp .*truncated or not complete"):
        open_dcp(open_store(str(sharded_folder)))


def test_open_dcp_missing_object_refused(sharded_folder: Path) -> None:
    (sharded_folder / "__1_0.distcp").unlink()
    with pytest.raises((CheckpointError, StorageError), match=r"__1_0\.distcp does not exist"):
        open_dcp(open_store(str(sharded_folder)))


def test_open_dcp_transformed_storage_refused(sharded_folder: Path) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(first_info(metadata), "transform_descriptors", ["zstd"]))
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight' was .*cannot be read by range"):
        open_dcp(store)


def test_open_dcp_unknown_dtype_refused(tmp_path: Path) -> None:
    store = save(tmp_path / "x", {"model": {"a": A, "c": torch.zeros(2, dtype=torch.complex64)}})
    with pytest.raises(CheckpointError, match=r"complex64|'model\.c': its dtype"):
        open_dcp(store)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([((0, 0), (6, 6)), ((4, 0), (6, 6))], "they overlap"),
        ([((0, 0), (5, 6)), ((4, 0), (5, 6))], r"region at \[0, 0\] .*overlaps region at \[4, 0\]"),
        ([((0, 0), (5, 6)), ((0, 0), (5, 3)), ((5, 0), (5, 6))], r"two chunks at \[0, 0\]"),
        ([((0, 0), (4, 6)), ((5, 0), (5, 6))], "they leave gaps"),
        ([((0, 0), (10, 3))], "they leave gaps"),
        ([], "they leave gaps"),
    ],
)
def test_open_dcp_chunks_that_do_not_tile_refused(
    cells: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str, tmp_path: Path
) -> None:
    store = hand_written(tmp_path / "x", TENSORS["embed.weight"], cells)
    with pytest.raises(CheckpointError, match=rf"\.metadata: tensor 'w': .*{message}"):
        open_dcp(store)


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [((9, 0), (5, 6)), ((0, 4), (5, 6)), ((5,), (30,)), ((5, 0, 0), (5, 6, 1)), ((5,), (5, 6)), ((5, 0), (5,)), ((5, 0), ()), ((2**62, 0), (5, 6))],
)  # fmt: skip
def test_open_dcp_chunk_outside_the_shape_refused(
    offsets: tuple[int, ...], sizes: tuple[int, ...], sharded_folder: Path
) -> None:
    def move(metadata: Metadata) -> None:
        (chunk,) = [chunk for chunk in chunks_of(metadata) if chunk.offsets == (5, 0)]
        info = metadata.storage_data.pop(MetadataIndex("model.embed.weight", chunk.offsets))
        metadata.storage_data[MetadataIndex("model.embed.weight", offsets)] = info
        chunk.offsets, chunk.sizes = torch.Size(offsets), torch.Size(sizes)

    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight': .*leaves the tensor's shape \[10, 6\]"):
        open_dcp(changed(sharded_folder, move))


@pytest.mark.parametrize("sizes", [(-5, 6), (5, -6), (5.0, 6), ("5", 6), None, 30, (True, 6), (2**70, 6)])
@pytest.mark.parametrize("field", ["sizes", "offsets"])
def test_open_dcp_chunk_of_no_shape_refused(field: str, sizes: Any, sharded_folder: Path) -> None:
    store = changed(sharded_folder, lambda metadata: setattr(chunks_of(metadata)[0], field, sizes))
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight': \w+ is not a shape"):
        open_dcp(store)


@pytest.mark.parametrize("size", [(2**62, 6), (2**40, 2**40), (11, 6), (60,), (), (10, 6, 1), (9, 6)])
def test_open_dcp_shape_that_the_chunks_do_not_fill_refused(size: tuple[int, ...], sharded_folder: Path) -> None:
    def resize(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.embed.weight"].size = size  # type: ignore[union-attr, assignment]

    with pytest.raises(CheckpointError, match=r"tensor 'model\.embed\.weight'"):
        open_dcp(changed(sharded_folder, resize))


def test_open_dcp_chunk_stored_nowhere_refused(sharded_folder: Path) -> None:
    index = MetadataIndex("model.embed.weight", (5, 0))
    store = changed(sharded_folder, lambda metadata: metadata.storage_data.pop(index))
    with pytest.raises(CheckpointError, match=r"'model\.embed\.weight': the chunk at \[5, 0\] is stored nowhere"):
        open_dcp(store)


def test_open_dcp_chunk_of_another_shape_than_its_archive_refused_when_read(tmp_path: Path) -> None:
    store = hand_written(tmp_path / "x", torch.arange(12.0).reshape(3, 4), [((0, 0), (3, 4))])

    def turn(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = entry.chunks[0].sizes = torch.Size((4, 3))

    store = changed(Path(store.url), turn)
    with pytest.raises(CheckpointError, match=r"\[3, 4\].*\[4, 3\]"):
        read_all(store, open_dcp(store).model)


def test_open_dcp_dtype_of_another_name_than_its_archive_refused_when_read(tmp_path: Path) -> None:
    store = hand_written(tmp_path / "x", torch.arange(12.0).reshape(3, 4), [((0, 0), (3, 4))])

    def rename(metadata: Metadata) -> None:
        metadata.state_dict_metadata["w"].properties.dtype = torch.int32  # type: ignore[union-attr]

    store = changed(Path(store.url), rename)
    with pytest.raises(CheckpointError, match=r"F32.*I32|I32.*F32"):
        read_all(store, open_dcp(store).model)


@pytest.mark.parametrize("state", [{"iteration": 7}, {"optimizer": {"state": {"a": MOMENT}}}, {"rng": B}])
def test_open_dcp_without_weights_refused(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights among"):
        open_dcp(save(tmp_path / "x", state))


def test_open_dcp_without_any_entry_refused(sharded_folder: Path) -> None:
    def clear(metadata: Metadata) -> None:
        metadata.state_dict_metadata, metadata.storage_data = {}, {}

    with pytest.raises(CheckpointError, match="no weights among 0 tensors"):
        open_dcp(changed(sharded_folder, clear))


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data", "planner_data"])
@pytest.mark.parametrize("value", [7, [1], "x", (), BytesStorageMetadata(), OrderedDict({7: 7})])
def test_open_dcp_field_of_another_kind_refused(field: str, value: Any, sharded_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"copy/\.metadata"):
        open_dcp(changed(sharded_folder, lambda metadata: setattr(metadata, field, value)))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x80\x04", pickle.dumps({}), pickle.dumps([1, 2]), pickle.dumps(BytesStorageMetadata())]
)
def test_open_dcp_metadata_that_is_none_refused(data: bytes, memory_store: Store) -> None:
    memory_store.put(METADATA_KEY, data)
    with pytest.raises(CheckpointError, match=r"/\.metadata: "):
        open_dcp(memory_store)


def test_open_dcp_missing_metadata_is_a_missing_object(memory_store: Store) -> None:
    with pytest.raises(ObjectMissing):
        open_dcp(memory_store)


@pytest.mark.parametrize("size", [MAX_METADATA_BYTES + 1, 64 << 20])
def test_open_dcp_metadata_larger_than_its_tensors_refused_unread(size: int, sharded_folder: Path) -> None:
    os.truncate(sharded_folder / METADATA_KEY, size)
    with pytest.raises(CheckpointError, match=f"{size} bytes of metadata"):
        open_dcp(open_store(str(sharded_folder)))


# Opcodes in place of a value: what no pickler would write

STANDS_FOR = "@@ a value @@"
DEEP_TUPLE = b"(" * 50_000 + b"t" * 50_000
DEEP_LIST = b"]" * 50_000 + b"a" * 49_999
NAMED_VALUES: dict[str, Callable[[Metadata], object]] = {
    **{f"info-{field}": lambda metadata, field=field: setattr(first_info(metadata), field, STANDS_FOR)
       for field in ("relative_path", "offset", "length", "transform_descriptors")},
    "index-fqn": lambda metadata: metadata.storage_data.update({MetadataIndex(STANDS_FOR, (0,)): first_info(metadata)}),
    "chunk-sizes": lambda metadata: setattr(chunks_of(metadata)[0], "sizes", STANDS_FOR),
    "chunk-size": lambda metadata: setattr(chunks_of(metadata)[0], "sizes", (5, STANDS_FOR)),
    "chunk": lambda metadata: chunks_of(metadata).append(STANDS_FOR),
    "properties": lambda metadata: setattr(metadata.state_dict_metadata["model.embed.weight"], "properties", STANDS_FOR),
    "entry": lambda metadata: metadata.state_dict_metadata.update({"model.embed.weight": STANDS_FOR}),
    "entries": lambda metadata: setattr(metadata, "state_dict_metadata", STANDS_FOR),
    "entry-of-pairs": lambda metadata: setattr(
        metadata, "state_dict_metadata", OrderedDict(metadata.state_dict_metadata, evil=STANDS_FOR)
    ),
    "path": lambda metadata: metadata.planner_data.update({"model.embed.weight": ("model", STANDS_FOR)}),
    "paths": lambda metadata: setattr(metadata, "planner_data", STANDS_FOR),
    "storage": lambda metadata: setattr(metadata, "storage_data", STANDS_FOR),
}  # fmt: skip


@pytest.mark.parametrize("opcodes", [DEEP_TUPLE, DEEP_LIST], ids=["tuple", "list"])
@pytest.mark.parametrize("place", NAMED_VALUES)
def test_open_dcp_value_of_50_000_levels_refused(place: str, opcodes: bytes, sharded_folder: Path) -> None:
    metadata = pickle.loads((sharded_folder / METADATA_KEY).read_bytes())
    NAMED_VALUES[place](metadata)
    data = pickle.dumps(metadata, protocol=2)
    text = b"X" + struct.pack("<I", len(STANDS_FOR)) + STANDS_FOR.encode()
    assert data.count(text) == 1
    (sharded_folder / METADATA_KEY).write_bytes(data.replace(text, opcodes))
    with pytest.raises(CheckpointError) as caught:
        open_dcp(open_store(str(sharded_folder)))
    assert len(str(caught.value)) < 1000


# Whatever the metadata says, the answer is contents whose tensors can be read, or a named error


def require_readable_or_refused(store: Store) -> DcpContents | None:
    """Opens and reads everything; what comes out has as many bytes as its shape says."""
    try:
        contents = open_dcp(store)
        for places in (contents.model, contents.state):
            for name, data in read_all(store, places).items():
                assert len(data) == places[name].num_bytes
    except (CheckpointError, StorageError):
        return None
    return contents


@pytest.fixture(scope="module")
def small_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Objects of a small folder."""
    folder = tmp_path_factory.mktemp("small") / "x"
    save(folder, {"model": {"a": A, "b": B}, "optimizer": {"state": {"b": MOMENT}, "lr": 0.1}})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def stored(objects: Mapping[str, bytes]) -> Iterator[Store]:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    for key, data in objects.items():
        store.put(key, data)
    yield store
    for key in objects:
        store.delete(key)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with some bytes changed, cut out, repeated or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        match draw(st.sampled_from(["change", "flip", "remove", "insert", "repeat", "end"])):
            case "change":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "remove":
                del data[place : place + length]
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "repeat":
                data[place:place] = data[place : place + length]
            case "end":
                del data[place:]
    return bytes(data)


@HYPOTHESIS
@given(data=st.data())
def test_open_dcp_damaged_metadata_raises_nothing_else(data: st.DataObject, small_objects: dict[str, bytes]) -> None:
    metadata = data.draw(damaged(small_objects[METADATA_KEY]))
    with stored({**small_objects, METADATA_KEY: metadata}) as store:
        require_readable_or_refused(store)


@HYPOTHESIS
@given(data=st.data())
def test_open_dcp_damaged_object_raises_nothing_else(data: st.DataObject, small_objects: dict[str, bytes]) -> None:
    (key,) = [key for key in small_objects if key.endswith(".distcp")]
    with stored({**small_objects, key: data.draw(damaged(small_objects[key]))}) as store:
        require_readable_or_refused(store)


VALUES = st.one_of(
    st.integers(-2, 8),
    st.integers(),
    st.sampled_from([None, True, 0.5, "", "x", "__0_0.distcp", "model.a", ".metadata", b"x", (), [], {}, "..", "."]),
    st.sampled_from(
        [torch.Size((2, 3)), torch.Size(()), torch.Size((4,)), torch.float32, torch.int8, OrderedDict(a=1)]
    ),
    st.lists(st.integers(-1, 9), max_size=4).map(tuple),
    st.lists(st.integers(0, 9), max_size=4).map(torch.Size),
    st.sampled_from([BytesStorageMetadata(), MetadataIndex("model.a", (0, 0)), _StorageInfo("__0_0.distcp", 0, 900)]),
)
FIELDS = ("offsets", "sizes", "size", "chunks", "properties", "relative_path", "offset", "length", "fqn", "index",
          "transform_descriptors", "state_dict_metadata", "storage_data", "planner_data", "dtype")  # fmt: skip


def parts_of(value: Any) -> list[Any]:
    """``value`` and everything in it that has fields, items or keys."""
    inner = [*value.values(), *value.keys()] if isinstance(value, dict) else value if isinstance(value, list) else []
    inner = [*inner, *vars(value).values()] if hasattr(value, "__dict__") else inner
    found = [value] if inner or isinstance(value, (dict, list)) else []
    return [*found, *(part for item in inner for part in parts_of(item))]


@HYPOTHESIS
@given(data=st.data())
def test_open_dcp_metadata_with_other_values_raises_nothing_else(
    data: st.DataObject, small_objects: dict[str, bytes]
) -> None:
    metadata = pickle.loads(small_objects[METADATA_KEY])
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from(parts_of(metadata)))
        # A copy, so that nothing comes to hold itself.
        new = copy.deepcopy(data.draw(st.one_of(VALUES, st.sampled_from(parts_of(metadata)[1:] or [None]))))
        if isinstance(part, dict):
            part[data.draw(st.sampled_from([*part, "other", 7]))] = new
        elif isinstance(part, list):
            part.insert(data.draw(st.integers(0, len(part))), new)
        elif fields := [field for field in vars(part) if field in FIELDS]:
            object.__setattr__(part, data.draw(st.sampled_from(fields)), new)
    with stored({**small_objects, METADATA_KEY: pickle.dumps(metadata)}) as store:
        require_readable_or_refused(store)
