"""Held-out text: fixed slices of what training never sees, and the loss of a language model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import Config
from tasks.data.batch import Batch

if TYPE_CHECKING:
    import torch

    from tasks.data.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a domain is, over all slices."""

    tokens: int
    """Targets."""
    bytes: int | None
    """Of text; None if nobody knows the tokenizer."""


class HeldOutText:
    """The slices of one configuration, in memory; call it with a network for the loss of each."""

    def __init__(self, config: Config) -> None:
        from tasks.data.held_out import held_out_batches
        from tasks.data.stream import open_stream
        from tasks.data.tokenizer_files import run_vocabulary

        stream = open_stream(config, "held_out")
        try:
            self._slices = held_out_batches(stream, config)
        finally:
            stream.close()
        vocabulary = run_vocabulary(config.data)
        self._batch_sequences = config.evaluation.batch_sequences
        self.sizes = {name: _size_of([found[name] for found in self._slices], vocabulary) for name in self._slices[0]}
        """Size of each domain."""

    def __call__(self, network: torch.nn.Module) -> list[dict[str, tuple[float, int]]]:
        """For each slice, loss in nats summed over targets and their number, by domain."""
        return [
            {name: sum_losses(network, batch, self._batch_sequences) for name, batch in batches.items()}
            for batches in self._slices
        ]


def sum_losses(network: torch.nn.Module, batch: Batch, batch_sequences: int) -> tuple[float, int]:
    """Cross-entropy of ``batch`` in nats, summed over its targets in float64, and how many they are.

    Where the batch has document borders, attention and positions keep to them: transformers reads them off
    ``position_ids`` that begin anew.
    """
    import torch

    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(batch), batch_sequences):
            part = batch.rows(start, start + batch_sequences)
            positions = part.position_ids_BS
            packed = {} if positions is None else {"position_ids": torch.from_numpy(positions)}
            logits_BSV = network(input_ids=torch.from_numpy(part.inputs_BS), use_cache=False, **packed).logits.float()
            losses_T = torch.nn.functional.cross_entropy(
                logits_BSV.flatten(0, 1), torch.from_numpy(part.targets_BS).flatten(), reduction="none"
            )
            total += float(losses_T.double().sum())
    return total, int((batch.targets_BS >= 0).sum())


def _size_of(batches: Sequence[Batch], vocabulary: Vocabulary | None) -> Size:
    rows = [row[row >= 0] for batch in batches for row in batch.targets_BS]
    text_bytes = None if vocabulary is None else sum(vocabulary.count_bytes(row) for row in rows)
    return Size(tokens=sum(len(row) for row in rows), bytes=text_bytes)
