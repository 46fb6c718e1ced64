"""Studies: those that ship can be read, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.study import load_study, study_names


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_have_three_seeds_and_can_be_made(name: str, quick: bool) -> None:
    from pipelines.study.layout import Study
    from pipelines.study.require import require_study
    from pipelines.study.steps import study_steps

    study = Study(url="/nowhere", config=load_study(name, quick=quick))
    require_study(study)
    assert len(study.config.seeds) >= 3
    assert len({step.name for step in study_steps(study)}) == len(study_steps(study))


def test_quick_is_the_same_study_made_smaller() -> None:
    whole, quick = load_study("study-tiny"), load_study("study-tiny", quick=True)
    assert quick.seeds == whole.seeds and len(quick.forks) < len(whole.forks)
    assert quick.sft is not None and whole.sft is not None and len(quick.sft.arms) < len(whole.sft.arms)


def test_overrides_come_last() -> None:
    config = load_study("study-tiny", ("seeds=[7,8]", "spikes=null", "curvature.count=4"), quick=True)
    assert config.seeds == (7, 8) and config.spikes is None and config.curvature.count == 4


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (("seed=[1]",), "'seed'"),
        (("seeds=[1,1]",), "each once"),
        (("seeds=one",), "StudyConfig.seeds"),
        (("grid.ends=[4000]",), "grid.ends"),
        (("forks=[3000,1000]",), "forks"),
        (("sft.arms=[{name: a, start: raw}]",), "at least a control"),
        (("sft.arms=[{name: a, start: cooked},{name: b, start: raw}]",), "cooked"),
    ],
)
def test_mistakes_are_named(overrides: tuple[str, ...], culprit: str) -> None:
    with pytest.raises(ConfigError, match=r"study-tiny\.yaml") as caught:
        load_study("study-tiny", overrides)
    assert culprit in str(caught.value)


def test_unknown_study_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shipped are study-tiny"):
        load_study("study-huge")
    (tmp_path / "bad.yaml").write_text("seeds: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_study(str(tmp_path / "bad.yaml"))
