"""Where text and tokens come from, in which shares, and how they become training sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from configs.errors import ConfigError
from configs.fields import added, require
from configs.typed import parse_record
from configs.urls import require_no_credentials

STDLIB_SOURCE = "python://stdlib"
SIGNATURES_SOURCE = "python://stdlib-signatures"
"""Chat rows from docstrings to signatures of the same sources."""
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
    format: Literal["auto", "txt", "jsonl", "parquet", "tokens", "chat"] = "auto"
    """What files hold; ``auto`` goes by their names (``docs/data.md``), ``chat`` is rows with answers (``docs/chat.md``)."""
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
    """Share that training never sees: of text files, documents and chat rows by hash, of token files their tail."""
    chat_template: str | None = added(None)
    """How chat rows become text: ``plain``, ``chatml``, or path or URL of a Jinja file; null: the tokenizer's own."""
    long_rows: Literal["refuse", "truncate", "drop"] = added("refuse")
    """What becomes of a chat row that is longer than a training sequence."""
    split_field: str | None = added(None)
    """Field of a chat row, such as ``module``, whose hash decides the side it is on; null: the row's own hash."""

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
        self._check_chat()
        require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            self.held_out_fraction,
            "a fraction between 0 and 1, both excluded",
        )

    def _check_chat(self) -> None:
        for key, usual in (("chat_template", None), ("long_rows", "refuse"), ("split_field", None)):
            value = getattr(self, key)
            require(
                self.format == "chat" or value == usual, f"data.{key}", value, "leave it out without data.format=chat"
            )
            require(value != "", f"data.{key}", value, "a value that is not empty, or null")
        if self.chat_template is not None:
            require_no_credentials(self.chat_template, "data.chat_template")
        # The default is documents, and fits no chat; rows are made of the same sources under another name.
        misfit = STDLIB_SOURCE if self.format == "chat" else SIGNATURES_SOURCE
        fitting = f"files of chat rows, or {SIGNATURES_SOURCE}" if self.format == "chat" else "data.format=chat with it"
        for sources in (self.sources if not self.mixture else (), *(domain.sources for domain in self.mixture)):
            require(misfit not in sources, "data.sources", list(sources), fitting)


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
