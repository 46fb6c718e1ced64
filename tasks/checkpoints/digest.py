"""Content digests: BLAKE3 over what tensors are, not over how files happen to be cut.

The content digest of a set of tensors is BLAKE3 over one line per tensor, sorted by name:
``["<name>","<dtype>",[<shape>],"<tensor digest>"]`` as JSON without spaces, UTF-8, newline-terminated.
A tensor digest is BLAKE3 over its little-endian row-major bytes. Both are independent of file split,
worker count, time and place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from blake3 import blake3

from tasks.checkpoints.safetensors_header import TensorEntry


def new_hasher() -> blake3:
    """A fresh single-threaded BLAKE3 hasher."""
    return blake3()


def digest_bytes(data: bytes | memoryview) -> str:
    """BLAKE3 of ``data`` as 64 hex digits."""
    return str(blake3(data).hexdigest())


def content_digest(tensors: Iterable[TensorEntry]) -> str:
    """Content digest of ``tensors``, in any order; each must carry its digest."""
    hasher = blake3()
    for tensor in sorted(tensors, key=lambda entry: entry.name):
        assert tensor.digest, f"{tensor.name} has no digest"
        line = [tensor.name, tensor.dtype, list(tensor.shape), tensor.digest]
        hasher.update(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
    return str(hasher.hexdigest())


def fingerprint(value: Any) -> str:
    """BLAKE3 over canonical JSON; refuses what JSON cannot say exactly (no fallback to ``str``)."""
    _require_text_keys(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_bytes(text.encode())


def _require_text_keys(value: Any) -> None:
    """JSON turns other keys into text in silence, so that different values would look alike."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a fingerprint needs text as keys, got {key!r}")
            _require_text_keys(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _require_text_keys(item)
