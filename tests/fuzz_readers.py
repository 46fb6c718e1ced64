"""Fuzz what reads untrusted bytes: ``python -m tests.fuzz_readers [--seconds 60] [--seed N]``.

Real safetensors headers, DCP metadata and torch.save archives are damaged at random (bits, bytes, numbers, cuts, splices); a reader
may read them or refuse them by one of our errors, and nothing else. A failure prints the seed that repeats it.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from cluster.errors import StorageError
from cluster.storage import open_store
from configs.errors import UserError
from tasks.checkpoints.dcp import open_dcp
from tasks.checkpoints.regions import Region
from tasks.checkpoints.safetensors_header import CheckpointError, read_header
from tasks.checkpoints.torch_archive import locate_elements
from tests.dcp_checkpoints import write_plain

TENSORS = {"model.a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5).bfloat16(), "c": torch.tensor(3)}
SLOW_SECONDS = 10.0
Target = Callable[[bytes], object]


def main() -> None:
    """Fuzz every reader in turn until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        targets = make_targets(Path(scratch))
        counts = dict.fromkeys(targets, 0)
        deadline = time.monotonic() + options.seconds
        seed = options.seed
        while time.monotonic() < deadline:
            for name, (good, target) in targets.items():
                seed += 1
                check(name, target, damage(good, random.Random(seed)), seed)
                counts[name] += 1
    sys.stdout.write(f"seed {options.seed}: {counts}\n")


def check(name: str, target: Target, data: bytes, seed: int) -> None:
    """Run one reader on damaged bytes; anything but success or our own errors ends the program."""
    started = time.monotonic()
    try:
        target(data)
    except (CheckpointError, StorageError, UserError):
        pass
    except BaseException:
        sys.stderr.write(f"{name}: failed with --seed {seed - 1}\n")
        raise
    assert time.monotonic() - started < SLOW_SECONDS, f"{name}: slow with --seed {seed - 1}"


def make_targets(scratch: Path) -> dict[str, tuple[bytes, Target]]:
    """Readers by name, each with bytes that it reads well."""
    write_plain(scratch / "dcp", TENSORS, {"state": {"x": torch.ones(2)}, "lr": 0.1})
    dcp = open_store(str(scratch / "dcp"))
    memory = open_store(f"memory://{uuid.uuid4().hex}")
    archive = io.BytesIO()
    torch.save(TENSORS["model.a"], archive)

    def headers(data: bytes) -> object:
        memory.put("x.safetensors", data)
        return read_header(memory, "x.safetensors")

    def metadata(data: bytes) -> object:
        dcp.put(".metadata", data)
        return open_dcp(dcp)

    def archives(data: bytes) -> object:
        region = Region(key="k", offset=0, start=(0, 0), shape=(3, 4), archive_bytes=len(data))
        return locate_elements(lambda start, end: data[start:end], region, "F32", "fuzz")

    return {
        "safetensors header": (save(TENSORS), headers),
        "DCP metadata": (dcp.read(".metadata"), metadata),
        "torch archive": (archive.getvalue(), archives),
    }


def damage(data: bytes, chance: random.Random) -> bytes:
    """One to four random changes."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not made:
            break
        at = chance.randrange(len(made))
        kind = chance.randrange(6)
        if kind == 0:
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at] = chance.randrange(256)
        elif kind == 2:
            del made[at : at + chance.randint(1, 64)]
        elif kind == 3:
            value = chance.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            made[at : at + 8] = struct.pack("<Q", value)
        elif kind == 4:
            other = chance.randrange(len(made))
            made[at:at] = made[other : other + chance.randint(1, 64)]
        else:
            made = made[:at]
    return bytes(made)


if __name__ == "__main__":
    main()
