"""Findings about the theory, about later stages and about loss spikes, as claims on a study's figures.

Section numbers are those of arXiv 2505.12082. All losses are held-out ones, where the paper mostly has benchmark scores.
"""

from __future__ import annotations

import math
from statistics import fmean

from pipelines.study.figures import Results, by_seed, differences, pair_key
from pipelines.study.layout import Study
from pipelines.study.spike_arms import CONTROL, TOLERANCE, table
from tasks.evaluation.verdicts import Claim, Finding, above_zero, below_zero, within


def hessian(study: Study, results: Results) -> Finding:
    """Section 4.6: the gain to second order, and Eq. 15."""
    found = by_seed(study, results, "curvature")
    return Finding(
        name="Second-order theory",
        source="4.6, Eq. 15",
        text="The gain over the mean snapshot is that of a quadratic bowl; deviations are complementary, their cross terms mostly negative.",
        claims=(
            Claim(
                text="measured gain by half the trace of H Cov",
                values=tuple(item["measured"] / item["predicted"] for item in found),
                low=0.5,
                high=2.0,
                unit="",
            ),
            Claim(
                text="cross terms by (k - 1) times the diagonal (Eq. 15)",
                values=tuple(item["cross_ratio"] for item in found),
                high=1.0,
                unit="",
            ),
            Claim(
                text="share of cross terms that are negative",
                values=tuple(item["negative_cross_terms"] for item in found),
                low=0.5,
                unit="",
            ),
        ),
        remark="Eq. 15 holds for every positive semi-definite H; the third claim is the one that could fail. Deviations are from the annealed weights.",
    )


def contour(study: Study, results: Results) -> Finding:
    """Figure 8: where the merge lies."""
    found = by_seed(study, results, "curvature")
    return Finding(
        name="Contour",
        source="figure 8",
        text="The merge lies nearer to the good region than the snapshots.",
        claims=(above_zero("best snapshot less merge", [min(item["losses"]) - item["merged_loss"] for item in found]),),
    )


def continued(study: Study, results: Results, margin: float) -> Finding:
    """Section 4.6: continued training from a merge."""
    assert study.config.continued is not None
    found = by_seed(study, results, "continued")
    pair = pair_key(study.config.continued.arms, "raw", "merged")
    merged = [arm.name for arm in study.config.continued.arms if arm.start == "merged"]
    finals = [[item["arms"][name]["final_loss"] for name in merged] for item in found]
    claims = [
        below_zero("merged less raw at the start", differences(found, pair, "initial_loss")),
        within("merged less raw at the end", differences(found, pair, "final_loss"), margin),
    ]
    if len(merged) > 1:
        claims.append(
            Claim(
                text="spread over learning rates at the end", values=tuple(max(f) - min(f) for f in finals), high=margin
            )
        )
    return Finding(
        name="Continued training",
        source="4.6 (figure 6)",
        text="PMA-init starts lower, ends at parity, and does not depend on the learning rate.",
        claims=tuple(claims),
    )


def sft(study: Study, results: Results) -> Finding:
    """Appendix B and figure 7: SFT from a merge."""
    assert study.config.sft is not None
    found = by_seed(study, results, "sft")
    pair = pair_key(study.config.sft.arms, "annealed", "annealed-merged")
    return Finding(
        name="SFT",
        source="appendix B, figure 7",
        text="SFT from a merge is better at the same learning rate, its gradient norm steadier, its spikes fewer. (The authors could not repeat the gain at other sizes.)",
        claims=(
            below_zero("merged less annealed at the end", differences(found, pair, "final_loss")),
            below_zero(
                "log ratio of gradient-norm variances",
                [math.log(value) for value in differences(found, pair, "gradient_variance")],
                unit="",
            ),
            Claim(
                text="difference in steps that stand out",
                values=tuple(differences(found, pair, "num_excursions")),
                high=0.0,
                unit="",
            ),
        ),
    )


def spikes(study: Study, results: Results) -> Finding:
    """Section 4.8: resuming from a merge after a loss spike."""
    rows = [row for item in by_seed(study, results, "spikes") for row in item["cases"]]
    found = {(row["fault"], row["arm"]): row for row in table(rows)}
    claims = [
        Claim(
            text=f"excess over the run without the fault, {fault}",
            values=tuple(found[fault, "pma"]["excess"]),
            high=TOLERANCE,
        )
        for fault in dict.fromkeys(row["fault"] for row in rows)
        if (fault, "pma") in found
    ]
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != CONTROL]
    share = {arm: [row["recovered"] / row["runs"] for (_, name), row in found.items() if name == arm] for arm in arms}
    told = ", ".join(f"{arm} {fmean(values):.0%}" for arm, values in share.items())
    return Finding(
        name="Spike recovery",
        source="4.8 (figure 7)",
        text="Merging three checkpoints of before the collapse and resuming there passes the spike and follows the original course.",
        claims=tuple(claims),
        remark=f"Runs that ended within {TOLERANCE} nats of the undisturbed one: {told}.",
    )
