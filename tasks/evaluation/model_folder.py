"""A checkpoint as a plain Hugging Face folder on this machine, for programs that read nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

from cluster.storage import Store
from configs.data import DataConfig
from configs.errors import UserError
from tasks.checkpoints.digest import new_hasher
from tasks.checkpoints.manifest import INDEX_KEY
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.data.byte_tokenizer import byte_tokenizer_files
from tasks.data.tokenizer_files import run_vocabulary, tokenizer_files
from tasks.data.vocabulary import ByteLevel
from tasks.merging.publish import COPIED_FILES

READ_BYTES = 64 << 20
_TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def write_model_folder(checkpoint: Checkpoint, data: DataConfig, folder: Path) -> None:
    """Make ``folder`` what ``from_pretrained`` loads: links to what lies on this machine, copies of what does not.

    Shards are held against the digests of the manifest, if there is one. A checkpoint without tokenizer files gets those of
    ``data``; for bytes, :func:`tasks.data.byte_tokenizer.byte_tokenizer_files`. Raises :class:`CheckpointError` for a shard that
    was changed, and :class:`configs.errors.UserError` if weights, configuration or tokenizer are not there as such files.
    """
    store = checkpoint.store
    keys = {region.key for place in checkpoint.model.values() for region in place.regions}
    if other := sorted(key for key in keys if not key.endswith(".safetensors")):
        raise UserError(f"{checkpoint.url} is no Hugging Face folder ({other[0]}); write one with pma export")
    present = {name for name in (*COPIED_FILES, INDEX_KEY) if store.exists(name)}
    if "config.json" not in present:
        raise UserError(f"{checkpoint.url} has no config.json: transformers needs one beside the weights")
    folder.mkdir(parents=True, exist_ok=True)
    digests = {} if checkpoint.manifest is None else {s.key: s.digest for s in checkpoint.manifest.shards}
    for key in sorted(keys):
        _fetch(store, key, folder / key, digests.get(key))
    for name in present:
        (folder / name).write_bytes(store.read(name))
    if not present & _TOKENIZERS:
        for name, content in _tokenizer_of(checkpoint, data).items():
            (folder / name).write_bytes(content)


def _fetch(store: Store, key: str, path: Path, digest: str | None) -> None:
    """Link or copy one shard, and hold it against ``digest`` on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" not in store.url:
        path.symlink_to(f"{store.url}/{key}")
        found = _digest(store, key, None) if digest is not None else None
    else:
        with path.open("wb") as file:
            found = _digest(store, key, file)
    if digest is not None and found != digest:
        raise CheckpointError(
            f"{store.url}/{key} has digest {str(found)[:16]}, its manifest says {digest[:16]}: the object was changed or "
            "damaged after it was committed"
        )


def _digest(store: Store, key: str, copy: BinaryIO | None) -> str:
    """BLAKE3 of an object, which is written to ``copy`` on the way."""
    hasher, size = new_hasher(), store.size(key)
    with contextlib.closing(store.open_reader(key)) as reader:
        for start in range(0, size, READ_BYTES):
            data = memoryview(bytearray(min(READ_BYTES, size - start)))
            reader.read_into(start, data)
            hasher.update(data)
            if copy is not None:
                copy.write(data)
    return str(hasher.hexdigest())


def _tokenizer_of(checkpoint: Checkpoint, data: DataConfig) -> dict[str, bytes]:
    vocabulary = run_vocabulary(data)
    files = byte_tokenizer_files() if isinstance(vocabulary, ByteLevel) else tokenizer_files(data)
    if not files:
        raise UserError(
            f"{checkpoint.url} has no tokenizer, and nobody said which its run's token files were made with"
        )
    return files
