"""Faults that make a loss spike, as overrides of ``configs/tiny.yaml``: the runs that arms of recovery are compared on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHORT = ("recovery.window_steps=64", "recovery.patience_steps=24")
"""Half the detector's default window and patience, for runs of a few hundred steps."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run that is to spike, or not to."""

    about: str
    """What is done to it."""
    overrides: tuple[str, ...]
    """Changes to ``configs/tiny.yaml``."""
    num_steps: int
    """Optimizer steps of the experiment."""
    fault_step: int | None = None
    """Completed steps after which the fault is met; null where it grows from a learning rate, or there is none."""
    is_easy_text: bool = False
    """Whether :func:`write_sums` is the corpus, instead of the standard library's sources."""


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
SMALL = ("model.hidden_size=32", "model.expert_intermediate_size=32", "training.batch_tokens=1024")
"""A quarter of the work of a step of ``tiny``."""
NO_QK_NORM = (
    "model.family=llama",
    "model.num_experts=0",
    "model.num_layers=4",
    "training.sequence_length=64",
    "training.batch_tokens=1024",
    "training.max_gradient_norm=null",
)
"""A dense network without norms on queries and keys, and no clipping."""
QUICK_TO_LEARN = (*NO_QK_NORM, "model.initializer_range=0.1", "schedule.warmup_tokens=102_400")
"""Larger initial weights learn faster here; the warmup of 100 steps is still long enough to learn in."""
FAULT_STEP = 200
"""``tiny`` stands at a loss of about 2.1 nats then, of 5.5 at the start; its warmup ends at step 100."""


def _poisoned(kind: str, num_batches: int) -> Setting:
    first, count = 16 * FAULT_STEP, 16 * num_batches
    stretch = (f"drill.poison_start_sequence={first}", f"drill.poison_sequences={count}")
    return Setting(
        about=f"{num_batches} batches of {kind}",
        overrides=(f"drill.poison={kind}", *stretch),
        num_steps=2 * FAULT_STEP,
        fault_step=FAULT_STEP,
    )


def _corrupted(kind: str, about: str, *details: str) -> Setting:
    overrides = (f"drill.corruption={kind}", f"drill.corruption_step={FAULT_STEP}", *details)
    return Setting(about=about, overrides=overrides, num_steps=2 * FAULT_STEP, fault_step=FAULT_STEP)


SETTINGS: dict[str, Setting] = {
    "clean": Setting(about="tiny as it ships", overrides=(), num_steps=2 * FAULT_STEP),
    "clean-small": Setting(about="tiny at half the width and batch", overrides=SMALL, num_steps=2 * FAULT_STEP),
    "learning-rate": Setting(
        about="a learning rate far too high without QK-norm, on text that is learnt in forty steps",
        overrides=(*QUICK_TO_LEARN, "schedule.peak_learning_rate=0.15"),
        num_steps=400,
        is_easy_text=True,
    ),
    "learning-rate-lower": Setting(
        about="the same at a quarter of the learning rate, which is well",
        overrides=(*QUICK_TO_LEARN, "schedule.peak_learning_rate=0.0375"),
        num_steps=400,
        is_easy_text=True,
    ),
    "momentum": Setting(
        about="a first moment that outlives the second fivefold, without clipping and QK-norm",
        overrides=(
            *NO_QK_NORM,
            "model.family=mixtral",
            "model.num_experts=4",
            "schedule.peak_learning_rate=6e-3",
            "schedule.warmup_tokens=204_800",
            "optimizer.beta1=0.98",
            "optimizer.beta2=0.9",
        ),
        num_steps=700,
    ),
    "poison": _poisoned("random-tokens", 32),
    "poison-vocabulary": _poisoned("wrong-vocabulary", 32),
    "poison-one-token": _poisoned("one-token", 32),
    "corrupt-weights": _corrupted("scale-weights", "1 % of one rank's weights times 100"),
    "corrupt-bits": _corrupted(
        "flip-bits", "a random bit of 0.1 % of one rank's weights", "drill.corruption_fraction=0.001"
    ),
    "corrupt-nan": _corrupted("nan-weights", "one NaN in each of one rank's slices", "drill.corruption_fraction=1e-9"),
    "corrupt-moments": _corrupted(
        "scale-moments",
        "one rank's first moments times 1000",
        "drill.corruption_scale=1000",
        "drill.corruption_fraction=1",
    ),
}


def write_sums(folder: Path, *, num_files: int = 20, num_lines: int = 2000) -> str:
    """Write a corpus of lines such as ``two and three is five.``, always the same one, and return its URL.

    A small network soon predicts all but the summands: 0.3 nats a byte, of 5.5 at the start.
    """
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        pairs = draws.integers(0, 5, size=(num_lines, 2))
        lines = [f"{NUMBERS[a]} and {NUMBERS[b]} is {NUMBERS[a + b]}.\n" for a, b in pairs]
        (folder / f"{number:02d}.txt").write_text("".join(lines))
    return str(folder)
