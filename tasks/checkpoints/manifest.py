"""The manifest: the JSON list of what a snapshot holds, written last. It is the commit.

A folder without a manifest does not exist. Readers trust manifests only, never listings.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from cluster.storage import Store
from configs.typed import parse_record
from tasks.checkpoints.digest import content_digest, digest_bytes, fingerprint
from tasks.checkpoints.safetensors_header import CheckpointError, TensorEntry

FORMAT_VERSION = 1
MANIFEST_KEY = "manifest.json"
INDEX_KEY = "model.safetensors.index.json"
STATE_KEY = "state.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One safetensors object of a snapshot."""

    key: str
    """Key below the snapshot's folder."""
    part: Literal["model", "state"]
    """Whether it holds weights or training state."""
    bytes: int
    """Size of the object."""
    digest: str
    """BLAKE3 of the whole object."""
    tensors: tuple[TensorEntry, ...]
    """What it holds, in file order."""


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """A small object beside the shards: config.json, the index, state.json."""

    key: str
    """Key below the snapshot's folder."""
    bytes: int
    """Size."""
    digest: str
    """BLAKE3 of the object."""


@dataclass(frozen=True, kw_only=True)
class LossStatistics:
    """Training loss since the previous snapshot."""

    mean: float | None
    """Mean over steps; None without finite values."""
    maximum: float | None
    """Largest finite loss."""
    last: float | None
    """Loss of the last step."""
    gradient_norm_mean: float | None
    """Mean gradient norm before clipping."""
    steps: int
    """Steps counted."""
    nonfinite_steps: int
    """Steps whose loss or gradient norm was not finite."""

    @property
    def healthy(self) -> bool:
        """Whether every step was finite."""
        return self.nonfinite_steps == 0


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """One input of a merged checkpoint."""

    url: str
    """Where it was read."""
    digest: str
    """Its content digest."""
    manifest_digest: str | None
    """BLAKE3 of its manifest; None for plain folders."""
    step: int | None
    """Its step; None for plain folders."""
    tokens_seen: int | None
    """Its tokens seen; None for plain folders."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How a merged checkpoint came to be: enough to make it again."""

    method: str
    """Merge method."""
    alpha: float | None
    """Weight of the newest in the EMA recursion; None for other methods."""
    inputs: tuple[MergeInput, ...]
    """Oldest first."""
    weights: tuple[float, ...]
    """One per input."""
    dtypes: dict[str, str]
    """``read``, ``accumulate`` and ``write`` rules."""
    policies: dict[str, Any]
    """What became of optimizer moments, integers, buffers and kept tensors, and rules of single tensors."""
    identity: str
    """Fingerprint of what determines the bytes; equal identity means the same merge."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Parameters of the method beside ``alpha``: a decay list, a relative width, what a search tried."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an adopted checkpoint was left."""

    url: str
    """Its folder."""
    format: Literal["hf", "dcp"]
    """Hugging Face safetensors, or torch DCP."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot or merged checkpoint is."""

    kind: Literal["training", "merged", "adopted"]
    """Where it came from."""
    step: int | None
    """Completed optimizer steps (for a merged one, of its newest input)."""
    tokens_seen: int | None
    """Tokens seen up to ``step``."""
    digest: str
    """Content digest of the model part."""
    state_digest: str | None
    """Content digest of the state tensors combined with state.json; None without state."""
    shards: tuple[Shard, ...]
    """All safetensors objects."""
    files: tuple[SideFile, ...]
    """All other objects."""
    parameter_groups: dict[str, list[str]]
    """Parameter group to tensor names."""
    phase: Literal["warmup", "stable", "decay"] | None = None
    """Phase of the schedule at ``step``."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    loss: LossStatistics | None = None
    """Training loss since the previous snapshot."""
    healthy: bool = True
    """Whether the loss statistics show no trouble."""
    run_id: str | None = None
    """Run that made it."""
    segment: int | None = None
    """Segment that made it."""
    recovery: int = 0
    """Recoveries that were in force (of a merged one, when its newest input was made)."""
    ephemeral: bool = False
    """Whether it is there to resume from alone: off the grid of intervals, in no window, gone once a later one stands."""
    merge: Merge | None = None
    """For merged checkpoints."""
    source: Source | None = None
    """For adopted checkpoints: the folder that the keys of ``shards`` lie in."""
    code_version: str = ""
    """Version of pmaflow that wrote it."""
    created: float = 0.0
    """Unix seconds."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    def model_tensors(self) -> list[TensorEntry]:
        """Every tensor of the model part."""
        return [tensor for shard in self.shards if shard.part == "model" for tensor in shard.tensors]

    def state_tensors(self) -> list[TensorEntry]:
        """Every tensor of the training state."""
        return [tensor for shard in self.shards if shard.part == "state" for tensor in shard.tensors]


def model_digest(shards: tuple[Shard, ...]) -> str:
    """Content digest of the model part of ``shards``."""
    return content_digest(tensor for shard in shards if shard.part == "model" for tensor in shard.tensors)


def state_digest(shards: tuple[Shard, ...], state: dict[str, Any]) -> str:
    """Digest of the training state: its tensors' content digest and the scalars of state.json."""
    tensors = content_digest(tensor for shard in shards if shard.part == "state" for tensor in shard.tensors)
    return fingerprint({"tensors": tensors, "scalars": state})


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON of ``manifest``, with the fields of :class:`Merge` at top level as the storage contract has them."""
    values = dataclasses.asdict(manifest)
    merge = values.pop("merge")
    values.update(merge or {})
    # Left out where it says nothing, so that a manifest reads the same as those of before there were any.
    if not manifest.ephemeral:
        del values["ephemeral"]
    return json.dumps(values, indent=1, allow_nan=False).encode()


def parse_manifest(data: bytes, url: str) -> Manifest:
    """Typed manifest from untrusted JSON; :class:`CheckpointError` names ``url`` and the field."""
    try:
        values = json.loads(data)
        if values.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{url}: format_version {values.get('format_version')!r}; this version reads {FORMAT_VERSION}"
            )
        merge_fields = {item.name for item in dataclasses.fields(Merge)}
        merge = {key: values.pop(key) for key in merge_fields if key in values}
        return parse_record(Manifest, {**values, "merge": merge or None})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}: manifest is damaged: {type(error).__name__}: {error}") from error


def read_manifest(store: Store) -> tuple[Manifest, str]:
    """Manifest of the checkpoint at ``store`` and the BLAKE3 of its bytes."""
    data = store.read(MANIFEST_KEY)
    return parse_manifest(data, f"{store.url}/{MANIFEST_KEY}"), digest_bytes(data)
