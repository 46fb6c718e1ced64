"""Fire drills: faults that a run makes on purpose, to try its detector and its recovery (config section ``drill``).

Two kinds. *Poisoned data* belongs to a stretch of the run's data stream: whoever reads those sequences meets it, so a
plain rollback meets it again and a data skip does not. *Silent corruption* belongs to a machine: it strikes the weights
or moments of one rank once, at a step, and is gone after a recovery. Both are functions of the configuration and the
seed alone, so a run that was killed and resumed meets the same faults.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from configs.recovery import DrillConfig


def poison(
    tokens_BS1: torch.Tensor,
    stream_positions_B: Sequence[int] | NDArray[np.int64],
    drill: DrillConfig,
    *,
    vocab_size: int,
    seed: int,
) -> torch.Tensor:
    """Token ids int64 ``[B, S + 1]`` with the poisoned sequences replaced; the input where there are none.

    ``stream_positions_B`` are the rows' places in the run's endless stream of sequences. What replaces a row depends
    on (seed, place) alone, so on neither batch nor rank.
    """
    end = drill.poison_start_sequence + drill.poison_sequences
    rows = [
        (row, int(place)) for row, place in enumerate(stream_positions_B) if drill.poison_start_sequence <= place < end
    ]
    if drill.poison == "none" or not rows:
        return tokens_BS1
    poisoned_BS1 = tokens_BS1.clone()
    for row, place in rows:
        poisoned_BS1[row] = _poisoned(tokens_BS1[row], drill, vocab_size=vocab_size, key=f"{seed}/{place}")
    return poisoned_BS1


def is_corruption_due(drill: DrillConfig, *, step: int, recoveries: int, rank: int, world_size: int) -> bool:
    """Whether this rank is struck now, with ``step`` steps completed (and their snapshot, if one was due, taken).

    ``recoveries`` counts how often the run already went back from a spike: after the first the fault is gone.
    """
    is_now = drill.corruption != "none" and step == drill.corruption_step and recoveries == 0
    return is_now and rank == drill.corruption_rank % world_size


def corrupt(
    parameters: Iterable[tuple[str, torch.Tensor]],
    optimizer: torch.optim.AdamW,
    drill: DrillConfig,
    *,
    rank: int,
    seed: int,
) -> int:
    """Damage this rank's float32 slices, or their first moments, in place; returns how many elements were struck.

    ``parameters`` are names and the local tensors that ``optimizer`` steps. Which elements are struck, a share
    ``corruption_fraction`` of each slice and at least one, depends on (seed, rank, name) alone.
    """
    struck = 0
    with torch.no_grad():
        for name, local in parameters:
            if local.numel() == 0:
                continue
            draws = _generator(f"corrupt/{seed}/{rank}/{name}")
            count = max(1, round(drill.corruption_fraction * local.numel()))
            chosen = torch.from_numpy(draws.choice(local.numel(), size=count, replace=False))
            target = local
            if drill.corruption == "scale-moments":
                moments = optimizer.state.get(local, {})
                if "exp_avg" not in moments:
                    continue  # No step was taken yet, so there is nothing to damage.
                target = moments["exp_avg"]
            damaged = _damaged(target.flatten()[chosen.to(target.device)], drill, draws)
            target.view(-1)[chosen.to(target.device)] = damaged
            struck += count
    return struck


def _poisoned(tokens_S1: torch.Tensor, drill: DrillConfig, *, vocab_size: int, key: str) -> torch.Tensor:
    if drill.poison == "random-tokens":
        draws = _generator(f"poison/{key}").integers(vocab_size, size=len(tokens_S1))
        return torch.from_numpy(draws).to(tokens_S1)
    if drill.poison == "one-token":
        return torch.full_like(tokens_S1, int(_generator(f"poison/{key}").integers(vocab_size)))
    # As if tokenised with another tokenizer: one wrong vocabulary for the whole stretch.
    wrong_V = torch.from_numpy(_generator(f"poison/{key.partition('/')[0]}").permutation(vocab_size))
    return wrong_V.to(tokens_S1)[tokens_S1]


def _damaged(values: torch.Tensor, drill: DrillConfig, draws: np.random.Generator) -> torch.Tensor:
    if drill.corruption == "nan-weights":
        return torch.full_like(values, torch.nan)
    if drill.corruption == "flip-bits":
        bits = torch.from_numpy(draws.integers(32, size=len(values)).astype(np.int32)).to(values.device)
        flips = torch.bitwise_left_shift(torch.ones_like(bits), bits)
        return (values.view(torch.int32) ^ flips).view(torch.float32)
    return values * drill.corruption_scale


def _generator(key: str) -> np.random.Generator:
    """Independent draws for each ``key``, the same on every machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake3(key.encode()).digest(16), "little")))
