"""Which workload a run trains: language models, or something of the user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from configs.fields import added, added_mapping, require


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What is trained; see ``docs/workloads.md``."""

    entry: str = added("")
    """``package.module:NAME`` of a workload that is not a language model; empty for language models."""
    options: dict[str, Any] = added_mapping()  # noqa: RUF009  it is a field
    """The workload's own keys; it says what they mean and refuses those it does not know."""

    def __post_init__(self) -> None:
        require(
            not self.entry or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.entry) is not None,
            "workload.entry",
            self.entry,
            "package.module:NAME, such as examples.qssm.workload:QSSM, or empty for language models",
        )
        require(
            bool(self.entry) or not self.options,
            "workload.options",
            self.options,
            "none beside an empty workload.entry: a language model is described by the sections model and data",
        )

    @property
    def is_language_model(self) -> bool:
        """Whether the sections ``model`` and ``data`` say what is trained."""
        return not self.entry
