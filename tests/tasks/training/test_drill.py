"""Fire drills: which sequences are poisoned, which elements of which rank are struck, and that nothing else is."""

from __future__ import annotations

import math

import pytest
import torch

from configs.errors import ConfigError
from configs.recovery import DrillConfig, PoisonKind
from tasks.training.drill import corrupt, is_corruption_due, poison

VOCAB = 256
SEED = 3
POISONS: list[PoisonKind] = ["random-tokens", "wrong-vocabulary", "one-token"]


def stretch(kind: PoisonKind) -> DrillConfig:
    return DrillConfig(poison=kind, poison_start_sequence=100, poison_sequences=10)


def text(rows: int = 16, length: int = 65) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", POISONS)
def test_poison_touches_the_stretch_and_nothing_else(kind: PoisonKind) -> None:
    tokens, places = text(), range(96, 112)
    found = poison(tokens, places, stretch(kind), vocab_size=VOCAB, seed=SEED)
    changed = [place for row, place in enumerate(places) if not torch.equal(found[row], tokens[row])]
    assert changed == list(range(100, 110))
    assert torch.equal(tokens, text()), "the batch that was given stays as it was"
    assert found.dtype == tokens.dtype
    assert 0 <= int(found.min()) <= int(found.max()) < VOCAB


@pytest.mark.parametrize("kind", POISONS)
def test_poison_of_a_sequence_does_not_depend_on_batch_or_rank(kind: PoisonKind) -> None:
    tokens, places = text(), list(range(96, 112))
    whole = poison(tokens, places, stretch(kind), vocab_size=VOCAB, seed=SEED)
    parts = [
        poison(tokens[rows], places[rows], stretch(kind), vocab_size=VOCAB, seed=SEED)
        for rows in (slice(0, 5), slice(5, 9), slice(9, 16))
    ]
    assert torch.equal(torch.cat(parts), whole)
    other = poison(tokens, places, stretch(kind), vocab_size=VOCAB, seed=SEED + 1)
    assert not torch.equal(other, whole)


def test_poison_kinds_are_what_they_say() -> None:
    tokens, places = text(rows=2, length=4097), [100, 101]
    noise, mapped, one = (poison(tokens, places, stretch(kind), vocab_size=VOCAB, seed=SEED) for kind in POISONS)
    counts = torch.bincount(noise.flatten(), minlength=VOCAB).float()
    expected = noise.numel() / VOCAB
    # Chi-squared with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 6 * 22.6
    assert not torch.equal(noise[0], noise[1])
    pairs = set(zip(tokens.flatten().tolist(), mapped.flatten().tolist(), strict=True))
    assert len(pairs) == VOCAB == len({new for _, new in pairs}), "one permutation for all sequences"
    assert [len(row.unique()) for row in one] == [1, 1]


def test_poison_without_a_drill_or_beside_it_returns_the_batch_itself() -> None:
    tokens = text()
    assert poison(tokens, range(16), DrillConfig(), vocab_size=VOCAB, seed=SEED) is tokens
    assert poison(tokens, range(110, 126), stretch("random-tokens"), vocab_size=VOCAB, seed=SEED) is tokens


def test_corruption_is_due_once_on_one_rank() -> None:
    drill = DrillConfig(corruption="nan-weights", corruption_step=40, corruption_rank=5)
    due = [
        (step, recoveries, rank)
        for step in range(80)
        for recoveries in range(3)
        for rank in range(4)
        if is_corruption_due(drill, step=step, recoveries=recoveries, rank=rank, world_size=4)
    ]
    assert due == [(40, 0, 1)]
    assert not is_corruption_due(DrillConfig(), step=0, recoveries=0, rank=0, world_size=1)


def stepped(num_steps: int = 3) -> tuple[list[tuple[str, torch.Tensor]], torch.optim.AdamW]:
    """Three parameters, one of them empty as on a rank that holds no rows, after some steps of AdamW."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (40, 50), "empty": (0, 50), "b": (50,)}
    named = [(name, torch.nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]
    optimizer = torch.optim.AdamW([parameter for _, parameter in named], lr=1e-3)
    for _ in range(num_steps):
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [(name, parameter) for name, parameter in named], optimizer


def drill_of(kind: str, fraction: float = 0.1, scale: float = 50.0) -> DrillConfig:
    return DrillConfig(corruption=kind, corruption_fraction=fraction, corruption_scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["scale-weights", "flip-bits", "nan-weights"])
def test_corrupt_weights_strikes_its_share_of_every_slice(kind: str) -> None:
    named, optimizer = stepped()
    before = {name: parameter.detach().clone() for name, parameter in named}
    moments = {name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in named}
    assert corrupt(named, optimizer, drill_of(kind), rank=0, seed=SEED) == 200 + 5
    for (name, parameter), count in zip(named, (200, 0, 5), strict=True):
        old, new = before[name], parameter.detach()
        struck = old.view(torch.int32) != new.view(torch.int32)
        assert int(struck.sum()) == count
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moments[name])
        if kind == "scale-weights":
            assert torch.equal(new[struck], old[struck] * 50.0)
        elif kind == "nan-weights":
            assert bool(new[struck].isnan().all())
        else:
            flipped = (old.view(torch.int32) ^ new.view(torch.int32))[struck].tolist()
            assert all((value % 2**32).bit_count() == 1 for value in flipped)


def test_corrupt_moments_leaves_weights_and_makes_the_next_update_larger() -> None:
    named, optimizer = stepped()
    before = [parameter.detach().clone() for _, parameter in named]
    moments = [optimizer.state[parameter]["exp_avg"].clone() for _, parameter in named]
    assert corrupt(named, optimizer, drill_of("scale-moments", fraction=1.0), rank=0, seed=SEED) == 2050
    for (_, parameter), old, moment in zip(named, before, moments, strict=True):
        assert torch.equal(parameter.detach(), old)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment * 50.0)


def test_corrupt_moments_before_the_first_step_strikes_nothing() -> None:
    named, optimizer = stepped(num_steps=0)
    assert corrupt(named, optimizer, drill_of("scale-moments"), rank=0, seed=SEED) == 0


def test_corrupt_depends_on_seed_rank_and_name_alone() -> None:
    def struck(*, rank: int, seed: int, reverse: bool = False) -> dict[str, list[int]]:
        named, optimizer = stepped()
        corrupt(reversed(named) if reverse else named, optimizer, drill_of("nan-weights"), rank=rank, seed=seed)
        return {name: parameter.detach().flatten().isnan().nonzero().flatten().tolist() for name, parameter in named}

    first = struck(rank=0, seed=SEED)
    assert first == struck(rank=0, seed=SEED, reverse=True)
    assert first != struck(rank=1, seed=SEED)
    assert first != struck(rank=0, seed=SEED + 1)


def test_corrupt_strikes_at_least_one_element() -> None:
    named, optimizer = stepped()
    assert corrupt(named, optimizer, drill_of("nan-weights", fraction=1e-9), rank=0, seed=SEED) == 2


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"poison": "random-tokens"}, "drill.poison_sequences"),
        ({"poison_sequences": 3}, "drill.poison_sequences"),
        ({"poison_start_sequence": -1}, "drill.poison_start_sequence"),
        ({"corruption_step": -1}, "drill.corruption_step"),
        ({"corruption_rank": -1}, "drill.corruption_rank"),
        ({"corruption_scale": math.nan}, "drill.corruption_scale"),
        ({"corruption_fraction": 0.0}, "drill.corruption_fraction"),
        ({"corruption_fraction": 1.5}, "drill.corruption_fraction"),
    ],
)
def test_impossible_drills_are_named(values: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        DrillConfig(**values)  # type: ignore[arg-type]
