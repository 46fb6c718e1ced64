"""What a folder of token files says of itself: the plan it was made by, and the manifest, written last."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from cluster.data_files import DataFile
from configs.errors import UserError
from configs.typed import parse_record
from tasks.checkpoints.digest import fingerprint
from tasks.data.documents import DocumentOptions

FORMAT = "pmaflow tokens 1"
MANIFEST_KEY = "manifest.json"
PLAN_KEY = "plan.json"
TOKENIZER_KEY = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """All that determines the bytes of a folder; written first, so that no two contents meet in one folder."""

    format: str
    """What this is, with its version."""
    tokenizer: str
    """``bytes`` or ``tokenizers``."""
    tokenizer_digest: str
    """Digest of the vocabulary with its end of document."""
    vocabulary_size: int
    """Largest token id plus one."""
    end_of_document: int
    """Token id that follows every document."""
    dtype: str
    """``uint8``, ``uint16`` or ``uint32``, little-endian."""
    options: DocumentOptions
    """How the sources are read."""
    shard_tokens: int
    """Most tokens of a shard, a single longer document apart."""
    unit_bytes: int
    """Size of the stretches of source that are tokenized on their own."""
    sources: tuple[DataFile, ...]
    """Files in reading order."""


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """One flat file with its Megatron index."""

    key: str
    """Key of the ``.bin`` below the folder; its index is beside it, as ``.idx``."""
    tokens: int
    """Tokens."""
    documents: int
    """Documents; none is cut."""
    bytes: int
    """Size of the ``.bin``."""
    digest: str
    """BLAKE3 of the ``.bin``."""
    index_bytes: int
    """Size of the ``.idx``."""
    index_digest: str
    """BLAKE3 of the ``.idx``."""


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """The commit: a folder without it does not exist."""

    plan: TokenPlan
    """What was asked for."""
    tokens: int
    """Tokens of all shards."""
    documents: int
    """Documents of all shards."""
    empty_documents: int
    """Documents without text, which were left out."""
    malformed_documents: int
    """Documents that could not be read and were left out."""
    digest: str
    """Digest of the token row with its cuts: dtype, and the shards' digests in order."""
    shards: tuple[TokenShard, ...]
    """Shards in the order of the row."""

    def __post_init__(self) -> None:
        sums = (sum(shard.tokens for shard in self.shards), sum(shard.documents for shard in self.shards))
        if sums != (self.tokens, self.documents):
            raise ValueError(f"shards hold {sums} tokens and documents, {(self.tokens, self.documents)} are claimed")
        if self.digest != row_digest(self.plan, self.shards):
            raise ValueError("the digest is not that of the shards")
        if self.plan.format != FORMAT:
            raise ValueError(f"format {self.plan.format!r} is not known; known: {FORMAT!r}")


def row_digest(plan: TokenPlan, shards: tuple[TokenShard, ...]) -> str:
    """Digest of shards in order; it depends on no path, time or number of workers."""
    return fingerprint({"dtype": plan.dtype, "shards": [[shard.tokens, shard.digest] for shard in shards]})


def encode_record(record: Any) -> bytes:
    """A dataclass as JSON."""
    return json.dumps(dataclasses.asdict(record), indent=1).encode()


def parse_token_manifest(data: bytes, name: str) -> TokenManifest:
    """The manifest in ``data``; raises :class:`configs.errors.UserError` naming ``name``."""
    try:
        return parse_record(TokenManifest, json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: is no manifest of token files: {error}") from None


def parse_token_plan(data: bytes, name: str) -> TokenPlan:
    """The plan in ``data``; raises :class:`configs.errors.UserError` naming ``name``."""
    try:
        return parse_record(TokenPlan, json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: is no plan of token files: {error}") from None
