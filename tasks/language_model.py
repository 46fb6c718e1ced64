"""The workload that runs have unless they name another: causal language models of ``transformers`` on text and tokens.

Legend: B sequences, S tokens of a sequence, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import Config
from tasks.data.batch import Batch
from tasks.data.stream import open_stream
from tasks.evaluation.held_out_text import HeldOutText
from tasks.workload import ForwardPass, Rows, Side

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from tasks.data.sequences import Stream


class LanguageModel:
    """Next-token prediction, described by the sections ``model`` and ``data``."""

    def build(self, config: Config) -> torch.nn.Module:
        """The network of ``config.model``, on torch's default device."""
        from tasks.models.build import build_model

        network: torch.nn.Module = build_model(config.model, config.training.sequence_length)
        return network

    def batches(self, config: Config, side: Side) -> Stream:
        """Windows of text and token files, or packed chat rows."""
        return open_stream(config, side)

    def loss(self, network: torch.nn.Module, batch: Rows, this: ForwardPass) -> torch.Tensor:
        """Cross-entropy in nats per target, over the targets that count."""
        import torch

        assert isinstance(batch, Batch)
        positions = {} if batch.position_ids_BS is None else {"position_ids": _to(batch.position_ids_BS, this.device)}
        outputs = network(input_ids=_to(batch.inputs_BS, this.device), use_cache=False, **positions)
        logits_TV, targets_T = outputs.logits.float().flatten(0, 1), _to(batch.targets_BS, this.device).flatten()
        if this.weight is None:
            return torch.nn.functional.cross_entropy(logits_TV, targets_T) / this.micro_batches
        total = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
        return total * this.world_size / this.weight

    def evaluate(self, config: Config) -> HeldOutText:
        """Fixed slices of the side that training never sees."""
        return HeldOutText(config)


def model_files(config: Config) -> dict[str, bytes]:
    """What makes a snapshot a folder that ``from_pretrained`` loads: ``config.json`` and, where it is known, the tokenizer."""
    from tasks.data.tokenizer_files import tokenizer_files
    from tasks.models.build import build_model_config

    network = build_model_config(config.model, config.training.sequence_length)
    return {"config.json": network.to_json_string(use_diff=False).encode(), **tokenizer_files(config.data)}


def _to(array: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
