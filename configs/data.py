"""Where text and tokens come from, in which shares, and how they become training sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from configs.errors import ConfigError
from configs.fields import require
from configs.typed import parse_record
from configs.urls import require_no_credentials

STDLIB_SOURCE = "python://stdlib"
DEFAULT_SOURCES = (STDLIB_SOURCE,)
WHOLE = "all"
"""Name of the one domain that plain ``data.sources`` make, and of the loss over all domains."""


@dataclass(frozen=True, kw_only=True)
class MixtureDomain:
    """One domain of a weighted mixture."""

    name: str
    """Short name; held-out loss is reported by it."""
    sources: tuple[str, ...]
    """As ``data.sources``."""
    weight: float
    """Share of the training sequences; only the proportions of weights count."""

    def __post_init__(self) -> None:
        require(
            bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name) and self.name != WHOLE,
            "data.mixture[].name",
            self.name,
            f"letters, digits, '.', '_' and '-' only, at least one, and not {WHOLE!r}",
        )
        _require_sources(self.sources, f"data.mixture[{self.name}].sources")
        require(
            0 < self.weight < math.inf,
            f"data.mixture[{self.name}].weight",
            self.weight,
            "a positive number; leave the domain out to give it nothing",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What training reads and how it is split; see ``docs/data.md``."""

    sources: tuple[str, ...] = DEFAULT_SOURCES
    """fsspec URLs, folders or globs of text or token files; ``python://stdlib`` is this interpreter's own library
    sources, ``python://PACKAGE/GLOB`` files of an installed package."""
    mixture: tuple[MixtureDomain, ...] = ()
    """Domains with weights, a row ``{name, sources, weight}`` each, in place of ``sources``."""
    tokenizer: str = "bytes"
    """How text becomes tokens: ``bytes`` (one token a byte of UTF-8), or path or URL of a ``tokenizer.json``."""
    end_of_document: str | None = None
    """Token, by name or id, that ends a document; null: the tokenizer's usual one, or the one ``pma tokenize`` wrote."""
    format: Literal["auto", "txt", "jsonl", "parquet", "tokens"] = "auto"
    """What files hold; ``auto`` goes by their names (``docs/data.md``)."""
    text_field: str = "text"
    """Field of a JSON line, or column of a parquet file, that holds the text."""
    token_dtype: Literal["uint8", "uint16", "uint32"] | None = None
    """Integers of token files that do not say it themselves; null means uint16, as nanoGPT writes."""
    shuffle: bool = True
    """Read windows in another random order each epoch; false reads them as they lie."""
    packing: Literal["none", "documents"] = "none"
    """``documents`` keeps attention, positions and targets within a document; ``none`` lets them cross borders."""
    epochs: int | None = None
    """How often a domain may be read; null: as often as training.total_tokens asks for."""
    held_out_fraction: float = 0.05
    """Share that training never sees: of text files and documents by hash, of token files their tail."""

    def __post_init__(self) -> None:
        # OmegaConf leaves the items of a list as it read them.
        object.__setattr__(self, "mixture", tuple(_mixture_domain(row, i) for i, row in enumerate(self.mixture)))
        if self.mixture:
            require(
                self.sources in ((), DEFAULT_SOURCES),
                "data.sources",
                list(self.sources),
                "leave it out beside data.mixture, or give these sources as a domain of the mixture",
            )
        else:
            _require_sources(self.sources, "data.sources")
        names = [domain.name for domain in self.mixture]
        require(len(set(names)) == len(names), "data.mixture", names, "every name once")
        require(bool(self.tokenizer), "data.tokenizer", self.tokenizer, "bytes, or path or URL of a tokenizer.json")
        require_no_credentials(self.tokenizer, "data.tokenizer")
        require(bool(self.text_field), "data.text_field", self.text_field, "the name of a field, such as text")
        require(self.epochs is None or self.epochs >= 1, "data.epochs", self.epochs, "at least 1, or null")
        require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            self.held_out_fraction,
            "a fraction between 0 and 1, both excluded",
        )


def _require_sources(sources: tuple[str, ...], key: str) -> None:
    require(len(sources) > 0, key, list(sources), "name at least one URL")
    for source in sources:
        require(bool(source), key, list(sources), "URLs, none of them empty")
        require_no_credentials(source, key)


def _mixture_domain(row: Any, number: int) -> MixtureDomain:
    if isinstance(row, MixtureDomain):
        return row
    try:
        return parse_record(MixtureDomain, row)
    except TypeError as error:
        known = ", ".join(item.name for item in fields(MixtureDomain))
        raise ConfigError(f"data.mixture[{number}]={row!r} is not possible: {error}; keys of a row: {known}") from None
