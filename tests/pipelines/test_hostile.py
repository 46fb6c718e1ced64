"""Checkpoints that lie, through the command line: a named error, nothing published, little time and memory spent."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.dcp_checkpoints import write_plain

ROOT = Path(__file__).parents[2]
# A small process in between: the peak that the kernel tells of a child begins at the size of its parent.
LAUNCH = """
import json, os, subprocess, sys
with open(sys.argv[1], "wb") as out:
    process = subprocess.Popen(sys.argv[2:], stdout=out, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
cost = {"peak_bytes": usage.ru_maxrss * 1024, "seconds": usage.ru_utime + usage.ru_stime}
print(json.dumps({"code": process.returncode, **cost}))
"""
MAX_SECONDS, MAX_BYTES = 10.0, 1 << 30
Damage = Callable[[Path], str]


def good(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.arange(6.0), "b": torch.ones(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_header(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    folder.mkdir()
    stated = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", stated) + header + data)


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def truncated(folder: Path) -> str:
    path = good(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    return "truncated or padded"


def empty_file(folder: Path) -> str:
    folder.mkdir()
    (folder / "model.safetensors").touch()
    return "too few for a safetensors file"


def bit_flipped_header(folder: Path) -> str:
    path = good(folder) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(b'"data_offsets":[0,') + len(b'"data_offsets":[')] ^= 1
    path.write_bytes(data)
    return "data_offsets"


def overlapping(folder: Path) -> str:
    with_header(folder, json.dumps({"a": entry(0, 8), "b": entry(4, 12)}).encode(), bytes(12))
    return "tensor 'b' at byte"


def gap(folder: Path) -> str:
    with_header(folder, json.dumps({"a": entry(0, 8), "b": entry(12, 16)}).encode(), bytes(16))
    return "leaves a gap"


def lying_shape(folder: Path) -> str:
    with_header(folder, json.dumps({"a": entry(0, 8, [2**40])}).encode(), bytes(8))
    return "tensor 'a'"


def huge_product(folder: Path) -> str:
    with_header(folder, json.dumps({"a": entry(0, 8, [2**62, 2**62])}).encode(), bytes(8))
    return "tensor 'a'"


def header_longer_than_the_file(folder: Path) -> str:
    with_header(folder, b"{}", length=1 << 30)
    return f"header claims {1 << 30} bytes"


def gigabyte_header(folder: Path) -> str:
    with_header(folder, b"{", length=(1 << 30))
    os.truncate(folder / "model.safetensors", (1 << 30) + 100)
    return "the format allows"


def deep_header(folder: Path) -> str:
    with_header(folder, b"[" * 3_000_000)
    return "not JSON"


def many_tensors_header(folder: Path) -> str:
    items = b",".join(b'"%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}' % n for n in range(400_000))
    with_header(folder, b"{" + items + b"}", bytes(4))
    return "overlaps its neighbour"


def duplicate_keys(folder: Path) -> str:
    one = json.dumps(entry(0, 4))
    with_header(folder, f'{{"a":{one},"a":{one}}}'.encode(), bytes(4))
    return "appears twice"


def unknown_dtype(folder: Path) -> str:
    with_header(folder, json.dumps({"a": entry(0, 4, dtype="Q4")}).encode(), bytes(4))
    return "dtype 'Q4' is not known"


def traversal(folder: Path) -> str:
    good(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    return "leaves the checkpoint's folder"


def not_in_the_index(folder: Path) -> str:
    good(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    return "'b' is in the file but not in the index"


def index_names_nothing(folder: Path) -> str:
    good(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    return "'other.safetensors', which does not exist"


class Runs:
    """Would run a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickle_that_runs(folder: Path) -> str:
    write_plain(folder, {"a": torch.ones(3)})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Runs(folder / "executed")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return "system"


def pickle_memo_bomb(folder: Path) -> str:
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b".")
    return "memo entry"


def pickle_of_a_length_that_lies(folder: Path) -> str:
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.")
    return "damaged pickle"


def pickle_nested_deeply(folder: Path) -> str:
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"\x80\x04" + b"(" * 2_000_000 + b"t" * 2_000_000 + b".")
    return "expected Metadata"


def dcp_truncated(folder: Path) -> str:
    write_plain(folder, {"a": torch.ones(3000)})
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-10])
    return "truncated or not complete"


DAMAGES: list[Damage] = [
    truncated, empty_file, bit_flipped_header, overlapping, gap, lying_shape, huge_product, header_longer_than_the_file,
    gigabyte_header, deep_header, many_tensors_header, duplicate_keys, unknown_dtype, traversal, not_in_the_index,
    index_names_nothing, pickle_that_runs, pickle_memo_bomb, pickle_of_a_length_that_lies, pickle_nested_deeply, dcp_truncated,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_hostile_input_is_refused_by_name_and_costs_little(tmp_path: Path, damage: Damage) -> None:
    bad, output = tmp_path / "bad", tmp_path / "out"
    expected = damage(bad)
    command = [sys.executable, "-m", "pipelines", "merge", "--json", "--output", str(output), "--inputs"]
    code, answer, usage = run([*command, str(good(tmp_path / "good")), str(bad)], tmp_path / "stdout")
    assert code in (1, 2)
    assert str(bad) in answer["message"]
    assert expected in answer["message"]
    assert "Traceback" not in answer["message"]
    assert not (output / "manifest.json").exists()
    assert not (bad / "executed").exists()
    assert usage["peak_bytes"] < MAX_BYTES
    # Processor time: a busy machine is not the header's fault.
    assert usage["seconds"] < MAX_SECONDS


def run(command: list[str], stdout: Path) -> tuple[int, dict[str, Any], dict[str, float]]:
    """Exit code, JSON answer and cost of a command."""
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(stdout), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    usage = json.loads(launched.stdout)
    return usage["code"], json.loads(stdout.read_text()), usage
