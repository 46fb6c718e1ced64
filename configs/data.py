"""Where text comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.fields import require
from configs.urls import require_no_credentials


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it is split."""

    sources: tuple[str, ...] = ("python://stdlib",)
    """fsspec URLs, folders or globs of text files; ``python://stdlib`` is this interpreter's own library sources."""
    tokenizer: Literal["bytes"] = "bytes"
    """Vocabulary: ``bytes`` maps each byte of UTF-8 text to its value."""
    held_out_fraction: float = 0.05
    """Share of files, chosen by a hash of their path, that training never sees."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", list(self.sources), "name at least one URL")
        for source in self.sources:
            require_no_credentials(source, "data.sources")
        require(
            0 < self.held_out_fraction < 1,
            "data.held_out_fraction",
            self.held_out_fraction,
            "a fraction between 0 and 1, both excluded",
        )
