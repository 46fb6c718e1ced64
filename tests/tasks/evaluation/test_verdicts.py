"""Verdicts: by the interval over seeds, the mean, and nothing else."""

from __future__ import annotations

import math

import pytest

from tasks.evaluation.verdicts import Claim, Finding, Verdict, above_zero, below_zero, join_verdicts, within


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        (above_zero("gain", [0.10, 0.11, 0.12]), "reproduced"),
        (above_zero("gain", [0.01, 0.50, 0.02]), "partly"),
        (above_zero("gain", [-0.1, -0.2, 0.1]), "not reproduced"),
        (above_zero("gain", [0.1]), "partly"),
        (above_zero("gain", []), "not measured"),
        (below_zero("less", [-0.10, -0.11, -0.12]), "reproduced"),
        (below_zero("less", [0.10, 0.11, 0.12]), "not reproduced"),
        (within("same", [0.001, -0.001, 0.0005], 0.01), "reproduced"),
        (within("same", [0.009, -0.008, 0.012], 0.01), "partly"),
        (within("same", [0.09, 0.08, 0.12], 0.01), "not reproduced"),
        (Claim(text="loss", values=(0.1, math.inf, 0.1), high=0.5), "not reproduced"),
    ],
)
def test_claim(claim: Claim, verdict: Verdict) -> None:
    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "not reproduced"], "partly"),
        (["reproduced", "partly"], "partly"),
        (["not reproduced", "not reproduced"], "not reproduced"),
        (["reproduced", "not measured"], "reproduced"),
        (["not measured"], "not measured"),
    ],
)
def test_finding_of_several_claims(parts: list[Verdict], whole: Verdict) -> None:
    assert join_verdicts(parts) == whole


def test_finding_joins_its_claims() -> None:
    claims = (above_zero("gain", [0.10, 0.11, 0.12]), below_zero("gain", [0.10, 0.11, 0.12]))
    assert Finding(name="x", source="4", text="x", claims=claims).verdict == "partly"


def test_rule_is_told_in_signs() -> None:
    assert above_zero("x", []).rule == "> 0"
    assert below_zero("x", []).rule == "< 0"
    assert within("x", [], 0.0123).rule == "-0.0123 to 0.0123"
