"""The domains of a run's data, opened: what each reads, and that they speak one vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from configs.data import WHOLE, DataConfig
from configs.errors import UserError
from tasks.checkpoints.digest import fingerprint
from tasks.data.corpus import Side, read_text
from tasks.data.rows import Row, RowVocabulary, TextRow, TokenFileRow, TokenRow, side_of
from tasks.data.sources import find_sources
from tasks.data.token_files import TokenSet, find_token_files
from tasks.data.vocabulary import BYTE_LEVEL, Vocabulary, load_vocabulary

Value = TypeVar("Value", int, str)
Row_co = TypeVar("Row_co", bound=Row, covariant=True)
_OPENED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Domain(Generic[Row_co]):
    """One domain on one side of the split."""

    name: str
    """Its name in ``data.mixture``; ``all`` for plain ``data.sources``."""
    weight: float
    """Its weight; only proportions count."""
    row: Row_co
    """Its tokens."""

    @property
    def key(self) -> str:
        """What a user calls its sources."""
        return sources_key(self.name)


def open_domains(data: DataConfig, side: Side, *, thorough: bool = False) -> tuple[Domain[TokenRow], ...]:
    """Open every domain of ``data`` on ``side``: text is read, token files are found and their sizes checked.

    ``thorough`` reads Megatron indices whole, as :func:`tasks.data.token_files.find_token_files` says.
    Raises :class:`configs.errors.UserError` for what is missing, empty or damaged, and for domains whose token ids
    come from different vocabularies.
    """
    opening = _Opening(data=data, side=side, vocabulary=_asked_vocabulary(data), thorough=thorough)
    asked = [(domain.name, domain.sources, domain.weight) for domain in data.mixture] or [(WHOLE, data.sources, 1.0)]
    domains = tuple(
        Domain(name=name, weight=weight, row=opening.open_row(name, sources)) for name, sources, weight in asked
    )
    for field in ("digest", "end_of_document"):
        _require_agreement(domains, field)
    if data.packing == "documents":
        _require_borders(domains)
    return domains


def vocabulary_size(domains: Sequence[Domain[Row]]) -> int | None:
    """Size of the vocabulary that the domains share, if any of them says it."""
    return max((d.row.vocabulary.size for d in domains if d.row.vocabulary.size is not None), default=None)


def sources_key(name: str) -> str:
    """What a user calls the sources of the domain ``name``."""
    return "data.sources" if name == WHOLE else f"data.mixture[{name}].sources"


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """What all domains are opened by."""

    data: DataConfig
    side: Side
    vocabulary: Vocabulary | None
    thorough: bool

    def open_row(self, name: str, sources: Sequence[str]) -> TokenRow:
        """The row of the domain ``name``."""
        key, data = sources_key(name), self.data
        found = find_sources(sources, data, key)
        if found.tokens:
            row = self._open_token_row(found.tokens)
            if not row.num_tokens:
                raise UserError(
                    f"{key}={list(sources)} leave no {self.side.replace('_', '-')} tokens at "
                    f"data.held_out_fraction={data.held_out_fraction}; give more tokens or another fraction"
                )
            return row
        spoken = self.vocabulary or load_vocabulary(BYTE_LEVEL, data.end_of_document)
        known = RowVocabulary(size=spoken.size, end_of_document=spoken.end_of_document, digest=spoken.digest)
        return TextRow(read_text(found.texts, spoken, data, self.side, key=key), known)

    def _open_token_row(self, urls: Sequence[str]) -> TokenFileRow:
        with ThreadPoolExecutor(_OPENED_AT_ONCE, thread_name_prefix="open-tokens") as pool:
            sets = list(pool.map(self._find, urls))
            known = _known_vocabulary(sets, self.data, self.vocabulary)
            cut = functools.partial(
                side_of, side=self.side, fraction=self.data.held_out_fraction, end_of_document=known.end_of_document
            )
            pieces = list(pool.map(cut, [file for found in sets for file in found.files]))
        digests = [found.manifest.digest for found in sets if found.manifest is not None]
        content = fingerprint(digests) if len(digests) == len(sets) else None
        return TokenFileRow(pieces, known, content)

    def _find(self, url: str) -> TokenSet:
        return find_token_files(url, dtype=self.data.token_dtype, thorough=self.thorough)


def _known_vocabulary(sets: Sequence[TokenSet], data: DataConfig, vocabulary: Vocabulary | None) -> RowVocabulary:
    plans = {found.url: found.manifest.plan for found in sets if found.manifest is not None}
    size = _agreed({url: plan.vocabulary_size for url, plan in plans.items()}, "vocabulary size")
    digest = _agreed({url: plan.tokenizer_digest for url, plan in plans.items()}, "tokenizer")
    end = _agreed({url: plan.end_of_document for url, plan in plans.items()}, "end of document")
    if vocabulary is not None:
        if digest not in (None, vocabulary.digest):
            raise UserError(
                f"data.tokenizer={data.tokenizer!r} (with its end of document, {vocabulary.end_of_document}) is not the one "
                f"that {next(iter(plans))} was written with; leave data.tokenizer out, or give the same"
            )
        return RowVocabulary(size=vocabulary.size, end_of_document=vocabulary.end_of_document, digest=vocabulary.digest)
    asked = _asked_end(data)
    if asked is not None and end not in (None, asked):
        raise UserError(
            f"data.end_of_document={data.end_of_document!r}, but {next(iter(plans))} ends documents with {end}; leave it out"
        )
    return RowVocabulary(size=size, end_of_document=asked if end is None else end, digest=digest)


def _asked_vocabulary(data: DataConfig) -> Vocabulary | None:
    """The tokenizer that ``data`` names; None for ``bytes``, which says nothing of token files."""
    if data.tokenizer == BYTE_LEVEL:
        return None
    try:
        return load_vocabulary(data.tokenizer, data.end_of_document)
    except UserError as error:
        raise UserError(f"data.tokenizer, data.end_of_document: {error}") from None


def _asked_end(data: DataConfig) -> int | None:
    """``data.end_of_document`` where no tokenizer is named."""
    if data.end_of_document is None:
        return None
    if not data.end_of_document.isdecimal():
        raise UserError(
            f"data.end_of_document={data.end_of_document!r}: token files know ids only; give the id, or data.tokenizer too"
        )
    return int(data.end_of_document)


def _agreed(values: dict[str, Value], what: str) -> Value | None:
    """The one value of all folders, or None if there are none."""
    if len(set(values.values())) > 1:
        (first, one), (second, other) = next((a, b) for a in values.items() for b in values.items() if a[1] != b[1])
        raise UserError(
            f"token files of different vocabularies do not go together: {what} of {first} is {one!r}, of {second} {other!r}; "
            "tokenize them with one tokenizer"
        )
    return next(iter(values.values()), None)


def _require_agreement(domains: Sequence[Domain[TokenRow]], field: str) -> None:
    values = {domain.key: getattr(domain.row.vocabulary, field) for domain in domains}
    _agreed({key: value for key, value in values.items() if value is not None}, field.replace("_", " "))


def _require_borders(domains: Sequence[Domain[TokenRow]]) -> None:
    for domain in domains:
        if domain.row.vocabulary.end_of_document is None:
            raise UserError(
                f"data.packing=documents: nothing says which token ends a document of {domain.key}; give its id as "
                "data.end_of_document (50256 in nanoGPT's files), or the tokenizer as data.tokenizer"
            )
