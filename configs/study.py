"""Configuration of ``pma study``: which runs are made and what is measured of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.typed import parse_record

SHIPPED = Path(__file__).parent / "studies"
Start = Literal["raw", "merged", "annealed", "annealed-merged"]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Merges of every trunk."""

    counts: tuple[int, ...]
    """N."""
    interval_multiples: tuple[int, ...]
    """V in intervals of snapshots."""
    alphas: tuple[float, ...]
    """Of EMA."""
    ends: tuple[int, ...]
    """Steps that windows end at, the first early in training and the last at its end."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One arm of a later stage."""

    name: str
    """Part of folder names."""
    start: Start
    """Which weights of the trunk it begins with."""
    overrides: tuple[str, ...] = ()
    """Changes to the stage's configuration."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Continued training or SFT from the trunk's weights."""

    config: str
    """Configuration of the stage, by name or path."""
    arms: tuple[ArmConfig, ...]
    """The first is the control."""
    overrides: tuple[str, ...] = ()
    """Changes for all arms."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"arms {names}: at least a control and another one, each name once")


@dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """Runs that spike, and what answers them."""

    faults: tuple[str, ...]
    """Of :mod:`pipelines.study.faults`."""
    arms: tuple[str, ...]
    """Of :mod:`pipelines.study.spike_arms`, beside the control."""


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """Second-order picture around a merge."""

    count: int = 10
    """Snapshots, an interval apart."""
    tokens: int = 32_768
    """Held-out tokens that loss and Hessian are taken on."""
    contour_points: int = 15
    """Of each side of the contour's grid."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study."""

    name: str
    """Of the study."""
    base: str
    """Configuration of the trunks, by name or path."""
    seeds: tuple[int, ...]
    """A trunk each."""
    forks: tuple[int, ...]
    """Steps at which annealing branches leave the trunk, of ``anneal.tokens`` each; the last one ends with the trunk."""
    grid: GridConfig
    """Merges of every trunk."""
    overrides: tuple[str, ...] = ()
    """Changes to ``base``."""
    inside_count: int = 5
    """N of merges inside the anneal."""
    continued: StageConfig | None = None
    """Continued training."""
    sft: StageConfig | None = None
    """Supervised fine-tuning."""
    spikes: SpikesConfig | None = None
    """Spike recovery."""
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    """Hessian check and contour."""
    notes: str = ""
    """Where its numbers come from."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: at least one, each once")
        if len(self.grid.ends) < 2 or list(self.grid.ends) != sorted(set(self.grid.ends)):
            raise ValueError(f"grid.ends {list(self.grid.ends)}: an early and a late step at least, in order")
        if not self.forks or list(self.forks) != sorted(set(self.forks)):
            raise ValueError(f"forks {list(self.forks)}: at least one step, in order")


def load_study(name: str, overrides: tuple[str, ...] = (), *, quick: bool = False) -> StudyConfig:
    """The study ``name`` (one that ships, or a path) with ``key=value`` overrides; ``quick`` applies its ``quick`` section first.

    Raises :class:`ConfigError` for a file that is not there, an unknown key, a wrong type, or a value that makes no study.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no study {name!r}: shipped are {', '.join(study_names())}; or give the path of a .yaml file"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values")
    smaller = values.pop("quick", {})
    try:
        layers = [values, smaller if quick else {}, OmegaConf.from_dotlist(list(overrides))]
        merged: Any = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)
        return parse_record(StudyConfig, merged)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def study_names() -> list[str]:
    """Names of the studies that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))
