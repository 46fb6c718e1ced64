"""Every format that docs/formats.md promises, through the command line: merge, mixed window, adopt, export, verify.

All folders of one member hold the same weights, so that a merge of any mixture has one digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.storage import open_store
from tasks.checkpoints.digest import content_digest
from tasks.checkpoints.reader import open_checkpoint
from tasks.checkpoints.writer import write_shard, write_side_files
from tests.dcp_checkpoints import fsdp2, megatron, sharded, write, write_plain

FORMATS = (
    "hf-single",
    "hf-sharded",
    "dcp-1",
    "dcp-2",
    "dcp-4",
    "dcp-dim1",
    "fsdp2-2",
    "fsdp2-4",
    "megatron",
    "snapshot",
)
MEMBERS = (1, 2)
CONFIG = {"model_type": "tiny", "dtype": "float32"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (10, 6),
        "model.layers.0.mlp.up_proj.weight": (7, 5),
        "model.norm.weight": (6,),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "model.layers.0.mlp.experts.0.up_proj.weight": made["model.layers.0.mlp.up_proj.weight"].bfloat16()}


def write_hf(folder: Path, made: dict[str, torch.Tensor], files: int) -> None:
    folder.mkdir()
    weight_map = {}
    for number in range(files):
        part = dict(list(made.items())[number::files])
        key = f"model-{number + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        save_file(part, folder / key, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, key)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_snapshot(folder: Path, made: dict[str, torch.Tensor], seed: int) -> None:
    from tasks.checkpoints.groups import group_names
    from tasks.checkpoints.manifest import Manifest, model_digest
    from tasks.checkpoints.writer import commit_manifest

    store = open_store(str(folder))
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    shard = write_shard(
        store,
        "model-00001-of-00001.safetensors",
        [(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in made.items()],
        lambda entry: [made[entry.name].reshape(-1).view(torch.uint8).numpy().tobytes()],
        "model",
    )
    files = write_side_files(store, {"config.json": json.dumps(CONFIG).encode()}, [shard], lambda: None)
    manifest = Manifest(
        kind="training", step=seed, tokens_seen=100 * seed, digest=model_digest((shard,)), state_digest=None,
        shards=(shard,), files=files, parameter_groups=group_names(made),
    )  # fmt: skip
    commit_manifest(store, manifest, lambda: None)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<format>/step-<member>`` for every format and member."""
    root = tmp_path_factory.mktemp("formats")
    for format_ in FORMATS:
        (root / format_).mkdir()
        for seed in MEMBERS:
            folder, made = root / format_ / f"step-{seed}", tensors(seed)
            if format_.startswith("hf"):
                write_hf(folder, made, 1 if format_ == "hf-single" else 3)
            elif format_ == "snapshot":
                write_snapshot(folder, made, seed)
            elif format_ == "dcp-1":
                write_plain(folder, made, {"state": {"exp_avg": torch.ones(3)}, "lr": 0.1})
    members = [(seed, tensors(seed)) for seed in MEMBERS]
    write(
        2,
        [sharded(root / "dcp-2" / f"step-{seed}", made) for seed, made in members]
        + [sharded(root / "dcp-dim1" / f"step-{seed}", made, dim=1) for seed, made in members]
        + [fsdp2(root / "fsdp2-2" / f"step-{seed}", made) for seed, made in members]
        + [megatron(root / "megatron" / f"step-{seed}", made) for seed, made in members],
    )
    write(
        4,
        [sharded(root / "dcp-4" / f"step-{seed}", made) for seed, made in members]
        + [fsdp2(root / "fsdp2-4" / f"step-{seed}", made) for seed, made in members],
    )
    for folder in root.glob("*/step-*"):
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return root


@pytest.fixture(scope="session")
def expected(written: Path) -> dict[str, torch.Tensor]:
    """The mean of both members, as one rounding of exact arithmetic gives it: halves are exact."""
    made = [tensors(seed) for seed in MEMBERS]
    return {name: ((made[0][name].double() + made[1][name].double()) / 2).to(made[0][name].dtype) for name in made[0]}


def load(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for key in set(index["weight_map"].values()):
        found |= load_file(folder / key)
    return found


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def folder_of(written: Path, format_: str, seed: int) -> str:
    return str(written / format_ / f"step-{seed}")


@pytest.mark.parametrize("format_", FORMATS)
def test_merge_in(
    pma: Callable[..., Any], written: Path, tmp_path: Path, expected: dict[str, torch.Tensor], format_: str
) -> None:
    answer = pma(
        "merge",
        "--output",
        str(tmp_path / "out"),
        "--json",
        "--inputs",
        *(folder_of(written, format_, s) for s in MEMBERS),
    )
    assert answer.code == 0, answer.stderr
    require_equal(load(tmp_path / "out"), expected)
    assert [item["digest"] for item in answer.json["inputs"]] == [digest_of(written, seed) for seed in MEMBERS]
    checked = pma("verify", str(tmp_path / "out"), "--json")
    assert checked.code == 0, checked.stdout


@pytest.mark.parametrize("format_", FORMATS)
def test_mixed_window(
    pma: Callable[..., Any], written: Path, tmp_path: Path, expected: dict[str, torch.Tensor], format_: str
) -> None:
    other = "dcp-4" if format_ == "hf-sharded" else "hf-sharded"
    inputs = [folder_of(written, format_, 1), folder_of(written, other, 2)]
    answer = pma("merge", "--output", str(tmp_path / "out"), "--json", "--workers", "1", "--inputs", *inputs)
    assert answer.code == 0, answer.stderr
    require_equal(load(tmp_path / "out"), expected)
    assert pma("verify", str(tmp_path / "out")).code == 0


@pytest.mark.parametrize("format_", [f for f in FORMATS if f != "snapshot"])
def test_adopt(
    pma: Callable[..., Any], written: Path, tmp_path: Path, expected: dict[str, torch.Tensor], format_: str
) -> None:
    run, kind = str(tmp_path / "run"), "hf" if format_.startswith("hf") else "dcp"
    pattern = str(written / format_ / "step-{step}")
    answer = pma("adopt", "--run", run, "--from", pattern, "--format", kind, "--tokens-per-step", "50", "--json")
    assert answer.code == 0, answer.stderr
    assert [row["digest"] for row in answer.json["adopted"]] == [digest_of(written, seed) for seed in MEMBERS]
    assert pma("verify", answer.json["adopted"][0]["url"]).code == 0
    merged = pma("merge", "--run", run, "--count", "2", "--json")
    assert merged.code == 0, merged.stderr
    require_equal(load(Path(merged.json["output"])), expected)
    assert [item["step"] for item in merged.json["inputs"]] == list(MEMBERS)
    assert pma("verify", merged.json["output"]).code == 0
    again = pma("adopt", "--run", run, "--from", pattern, "--format", kind, "--json")
    assert (again.code, again.json["adopted"], again.json["known"]) == (0, [], list(MEMBERS))


@pytest.mark.parametrize("format_", FORMATS)
def test_export(pma: Callable[..., Any], written: Path, tmp_path: Path, format_: str) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    source = folder_of(written, format_, 1)
    answer = pma("export", source, "--output", str(tmp_path / "hf"), "--json")
    assert answer.code == 0, answer.stderr
    require_equal(load(tmp_path / "hf"), tensors(1))
    assert answer.json["digest"] == digest_of(written, 1)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == CONFIG
    answer = pma("export", source, "--output", str(tmp_path / "dcp"), "--format", "dcp", "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["digest"] == digest_of(written, 1)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "back.pt")
    require_equal(torch.load(tmp_path / "back.pt"), tensors(1))


@pytest.mark.parametrize("format_", ["hf-sharded", "dcp-2", "snapshot"])
def test_export_in_another_dtype_rounds_once(
    pma: Callable[..., Any], written: Path, tmp_path: Path, format_: str
) -> None:
    for number, kind in enumerate(("hf", "dcp")):
        output = tmp_path / f"out{number}"
        answer = pma(
            "export",
            folder_of(written, format_, 2),
            "--output",
            str(output),
            "--format",
            kind,
            "--dtype",
            "bfloat16",
            "--json",
        )
        assert answer.code == 0, answer.stderr
        places = open_checkpoint(str(output)).model
        assert {place.dtype for place in places.values()} == {"BF16"}
    require_equal(load(tmp_path / "out0"), {name: tensor.bfloat16() for name, tensor in tensors(2).items()})


@pytest.mark.parametrize("format_", FORMATS)
def test_verify_names_what_changed(pma: Callable[..., Any], written: Path, tmp_path: Path, format_: str) -> None:
    import shutil

    source = tmp_path / "run" / "step-1"
    shutil.copytree(written / format_ / "step-1", source)
    if format_ == "snapshot":
        target = str(source)
    else:
        kind = "hf" if format_.startswith("hf") else "dcp"
        adopted = pma(
            "adopt",
            "--run",
            str(tmp_path / "r"),
            "--from",
            str(source),
            "--format",
            kind,
            "--tokens-per-step",
            "50",
            "--json",
        )
        assert adopted.code == 0, adopted.stderr
        target = adopted.json["adopted"][0]["url"]
    place = open_checkpoint(target).model["model.norm.weight"]
    path = source / place.regions[0].key
    data = bytearray(path.read_bytes())
    data[data.index(tensors(1)["model.norm.weight"][:2].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    checked = pma("verify", target, "--json")
    assert (checked.code, checked.json["ok"]) == (1, False)
    assert any("'model.norm.weight'" in problem for problem in checked.json["problems"]), checked.json["problems"]


def digest_of(written: Path, seed: int) -> str:
    """Content digest of a member, whatever its format."""
    from tasks.checkpoints.content import tensor_digests
    from tasks.checkpoints.safetensors_header import TensorEntry

    checkpoint = open_checkpoint(folder_of(written, "hf-single", seed))
    return content_digest(
        TensorEntry(name=name, dtype=p.dtype, shape=p.shape, offset=0, bytes=p.num_bytes, digest=digest)
        for name, digest in tensor_digests(checkpoint)
        for p in [checkpoint.model[name]]
    )
