"""Tokenize text into flat token files: plan first, shards next, the manifest last."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cluster.data_files import DataFile, list_data_files
from cluster.errors import ObjectExists
from cluster.fan_out import fan_out_processes
from cluster.storage import Store, is_shared_with_workers, open_store, require_create_if_absent
from configs.errors import UserError
from tasks.data.documents import DocumentOptions
from tasks.data.token_manifest import (
    FORMAT,
    MANIFEST_KEY,
    PLAN_KEY,
    TOKENIZER_KEY,
    TokenManifest,
    TokenPlan,
    TokenShard,
    encode_record,
    parse_token_manifest,
    parse_token_plan,
    row_digest,
)
from tasks.data.tokenizing import RECEIPTS, Unit, UnitResult, cut_units, tokenize_unit
from tasks.data.vocabulary import BYTE_LEVEL, Vocabulary, build_vocabulary, dtype_of, load_vocabulary

SHARD_TOKENS = 1 << 27
UNIT_BYTES = 1 << 27


def print_progress(line: str) -> None:
    """Write a progress line to stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def tokenize(
    sources: Sequence[str],
    output_url: str,
    *,
    tokenizer: str = BYTE_LEVEL,
    end_of_document: str | int | None = None,
    options: DocumentOptions | None = None,
    shard_tokens: int = SHARD_TOKENS,
    unit_bytes: int = UNIT_BYTES,
    workers: int = 1,
    report: Callable[[str], None] = print_progress,
) -> dict[str, Any]:
    """Write the documents of ``sources`` (files, folders, globs) to ``output_url`` as shards of token ids.

    The bytes do not depend on ``workers``. A command that was killed goes on at the shard where it stood; one that
    was finished is success without work; for other content in the output :class:`configs.errors.UserError` is
    raised and nothing is touched.

    Returns ``output``, ``tokens``, ``documents``, ``empty_documents``, ``malformed_documents``, ``shards``, ``dtype``,
    ``digest`` (of the token row) and, of this call alone, ``bytes_read``, ``bytes_written`` and ``seconds``.
    """
    began = time.monotonic()
    store = open_store(output_url)
    _require_sane(store, shard_tokens=shard_tokens, unit_bytes=unit_bytes, workers=workers)
    vocabulary = load_vocabulary(tokenizer, end_of_document)
    files = _list_sources(sources, store.url)
    plan = plan_tokens(
        files, vocabulary, options or DocumentOptions(), shard_tokens=shard_tokens, unit_bytes=unit_bytes
    )
    standing = find_standing(store, plan)
    results: list[UnitResult] = []
    if standing is None:
        _write_plan(store, plan, vocabulary)
        units = cut_units(files, plan.options, unit_bytes)
        progress = _Progress(units)
        for result in _carry_out(store, units, plan, vocabulary, workers):
            results.append(result)
            report(progress.line(result, time.monotonic() - began))
        if _list_sources(sources, store.url) != files:
            raise UserError("the sources changed while they were read; once they rest, begin again in another output")
        standing = _commit(store, _manifest_of(plan, results))
    return _describe(store, standing, results, time.monotonic() - began)


def plan_tokens(
    files: tuple[DataFile, ...], vocabulary: Vocabulary, options: DocumentOptions, *, shard_tokens: int, unit_bytes: int
) -> TokenPlan:
    """All that determines the bytes of the output."""
    return TokenPlan(
        format=FORMAT,
        tokenizer=vocabulary.kind,
        tokenizer_digest=vocabulary.digest,
        vocabulary_size=vocabulary.size,
        end_of_document=vocabulary.end_of_document,
        dtype=dtype_of(vocabulary.size).name,
        options=options,
        shard_tokens=shard_tokens,
        unit_bytes=unit_bytes,
        sources=files,
    )


def find_standing(store: Store, plan: TokenPlan) -> TokenManifest | None:
    """The manifest of ``plan`` if it is committed; :class:`configs.errors.UserError` if other content stands there."""
    data = store.read_if_present(MANIFEST_KEY)
    if data is not None:
        name = f"{store.url}/{MANIFEST_KEY}"
        manifest = parse_token_manifest(data, name)
        _require_same_plan(manifest.plan, plan, name)
        return manifest
    data = store.read_if_present(PLAN_KEY)
    if data is not None:
        name = f"{store.url}/{PLAN_KEY}"
        _require_same_plan(parse_token_plan(data, name), plan, name)
    elif keys := store.keys():
        raise UserError(f"{store.url} is not empty (it holds {keys[0]}, among others); choose a new folder")
    return None


def _require_sane(store: Store, *, shard_tokens: int, unit_bytes: int, workers: int) -> None:
    for name, value in (("shard_tokens", shard_tokens), ("unit_bytes", unit_bytes), ("workers", workers)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if workers > 1 and not is_shared_with_workers(store):
        raise UserError(f"{store.url} lives in one process; give one worker, or an output that processes share")


def _list_sources(sources: Sequence[str], output_url: str) -> tuple[DataFile, ...]:
    if not sources:
        raise UserError("no sources; give files, folders or globs")
    files = [file for source in sources for file in list_data_files(source)]
    seen: set[str] = set()
    for file in files:
        if file.url in seen:
            raise UserError(f"data file {file.url} is named twice by the sources {list(sources)}; name it once")
        if file.url.startswith(f"{output_url}/"):
            raise UserError(
                f"data file {file.url} lies in the output {output_url}; choose an output outside the sources"
            )
        seen.add(file.url)
    return tuple(files)


def _require_same_plan(standing: TokenPlan, wanted: TokenPlan, name: str) -> None:
    names = [name for name in TokenPlan.__dataclass_fields__ if getattr(standing, name) != getattr(wanted, name)]
    if not names:
        return
    if names == ["sources"]:
        old, new = set(standing.sources), set(wanted.sources)
        example = next(iter(sorted((old ^ new), key=lambda file: file.url)), None)
        detail = f"its sources differ, first {example.url if example else 'in their order'}"
    else:
        detail = ", ".join(
            f"{key}: {getattr(standing, key)!r}, now {getattr(wanted, key)!r}" for key in names if key != "sources"
        )
    cure = (
        "choose another output"
        if name.endswith(MANIFEST_KEY)
        else "choose another output, or delete this unfinished one"
    )
    raise UserError(f"{name} is of another tokenization ({detail}); {cure}; nothing was touched")


def _write_plan(store: Store, plan: TokenPlan, vocabulary: Vocabulary) -> None:
    data = encode_record(plan)
    try:
        store.create(PLAN_KEY, data)
        require_create_if_absent(store, PLAN_KEY, data)
    except ObjectExists:
        _require_same_plan(parse_token_plan(store.read(PLAN_KEY), store.url), plan, f"{store.url}/{PLAN_KEY}")
    # Workers read this copy, so that all use one tokenizer whatever happens to the file it came from.
    if vocabulary.source and store.read_if_present(TOKENIZER_KEY) != vocabulary.source:
        store.put(TOKENIZER_KEY, vocabulary.source)


def _carry_out(
    store: Store, units: Sequence[Unit], plan: TokenPlan, vocabulary: Vocabulary, workers: int
) -> Iterator[UnitResult]:
    if workers == 1:
        return (tokenize_unit(store, unit, plan, vocabulary) for unit in units)
    # The plan goes along with every unit; the names of all sources need not.
    work = functools.partial(_tokenize_in_process, store.url, dataclasses.replace(plan, sources=()))
    return fan_out_processes(work, units, num_workers=min(workers, len(units)))


def _tokenize_in_process(output_url: str, plan: TokenPlan, unit: Unit) -> UnitResult:
    store = open_store(output_url)
    return tokenize_unit(store, unit, plan, _worker_vocabulary(output_url, plan.tokenizer, plan.end_of_document))


@functools.lru_cache(maxsize=1)
def _worker_vocabulary(output_url: str, kind: str, end_of_document: int) -> Vocabulary:
    if kind == BYTE_LEVEL:
        return build_vocabulary(b"", end_of_document, BYTE_LEVEL)
    name = f"{output_url}/{TOKENIZER_KEY}"
    return build_vocabulary(open_store(output_url).read(TOKENIZER_KEY), end_of_document, name)


def _manifest_of(plan: TokenPlan, results: Sequence[UnitResult]) -> TokenManifest:
    ordered = sorted(results, key=lambda result: result.unit.number)
    receipts = [receipt for result in ordered for receipt in result.receipts]
    shards: tuple[TokenShard, ...] = tuple(receipt.shard for receipt in receipts if receipt.shard is not None)
    if not shards:
        raise UserError("the sources hold no document with text; look at the text field and the format")
    return TokenManifest(
        plan=plan,
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        empty_documents=sum(receipt.empty for receipt in receipts),
        malformed_documents=sum(receipt.malformed for receipt in receipts),
        digest=row_digest(plan, shards),
        shards=shards,
    )


def _commit(store: Store, manifest: TokenManifest) -> TokenManifest:
    try:
        store.create(MANIFEST_KEY, encode_record(manifest))
    except ObjectExists:
        standing = parse_token_manifest(store.read(MANIFEST_KEY), f"{store.url}/{MANIFEST_KEY}")
        if standing != manifest:
            raise UserError(
                f"{store.url} was just committed with digest {standing.digest[:12]}, here it is {manifest.digest[:12]}; "
                "the committed one is kept"
            ) from None
    for key in store.keys(RECEIPTS):
        store.delete(key)
    store.prune(RECEIPTS)
    return manifest


class _Progress:
    """Running totals of the units that have ended."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.num_units, self.total_bytes = len(units), sum(unit.bytes for unit in units)
        self.units = self.bytes = self.bytes_read = self.tokens = self.shards = 0

    def line(self, result: UnitResult, seconds: float) -> str:
        """Count ``result`` and say where the work stands after ``seconds``."""
        shards = [receipt.shard for receipt in result.receipts if receipt.shard is not None]
        self.units += 1
        self.bytes += result.unit.bytes
        self.bytes_read += result.bytes_read
        self.tokens += sum(shard.tokens for shard in shards)
        self.shards += len(shards)
        speed = self.bytes_read / max(seconds, 1e-9)
        left = f"{(self.total_bytes - self.bytes) / speed:,.0f} s left" if speed else "resuming"
        return (
            f"tokenize: unit {self.units} of {self.num_units}, {self.bytes / 1e6:,.1f} of {self.total_bytes / 1e6:,.1f} MB, "
            f"{self.tokens / 1e6:,.2f} M tokens in {self.shards} shards, {speed / 1e6:,.1f} MB/s, {left}"
        )


def _describe(store: Store, manifest: TokenManifest, results: Sequence[UnitResult], seconds: float) -> dict[str, Any]:
    return {
        "output": store.url,
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "empty_documents": manifest.empty_documents,
        "malformed_documents": manifest.malformed_documents,
        "shards": len(manifest.shards),
        "dtype": manifest.plan.dtype,
        "digest": manifest.digest,
        "bytes_read": sum(result.bytes_read for result in results),
        "bytes_written": sum(result.bytes_written for result in results),
        "seconds": seconds,
    }
