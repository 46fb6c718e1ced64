"""What was found, in plain sentences, each with the number it stands on and what it does not show."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.report.data import Evaluated, ReportData
from tasks.evaluation.held_out import paired_gain


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence and whether it supports the paper."""

    text: str
    """Plain English."""
    verdict: str
    """``as in the paper``, ``not as in the paper`` or ``cannot tell``."""


def find_all(data: ReportData) -> list[Finding]:
    """Findings that the run's checkpoints allow."""
    findings = [_stable_gain(data), _early_merge(data), *_against_annealing(data)]
    return [finding for finding in findings if finding is not None]


def _stable_gain(data: ReportData) -> Finding | None:
    pair = _last_pair(data)
    if pair is None:
        return None
    raw, merged = pair
    gain, error = paired_gain(raw.evaluation, merged.evaluation)
    spread = raw.evaluation.spread
    text = (
        f"At {_millions(raw.tokens)}, the merge of the last {data.config.merge.count} snapshots has a held-out loss of "
        f"{merged.evaluation.loss:.4f} against {raw.evaluation.loss:.4f} for the raw snapshot: "
        f"{abs(gain):.4f} {'lower' if gain > 0 else 'higher'} (standard error {error:.4f} over "
        f"{len(raw.evaluation.slices)} held-out slices, whose losses spread over {spread:.4f})."
    )
    if gain > spread:
        return Finding(text=text, verdict="as in the paper")
    return Finding(text=text, verdict="not as in the paper" if gain < -2 * error else "cannot tell")


def _early_merge(data: ReportData) -> Finding | None:
    pairs = _pairs(data)
    if len(pairs) < 2:
        return None
    worse = [(raw, merged) for raw, merged in pairs if merged.evaluation.loss > raw.evaluation.loss]
    if not worse or worse[0][0] is not pairs[0][0]:
        return Finding(
            text=f"The earliest merge, at {_millions(pairs[0][0].tokens)}, is already better than its raw snapshot.",
            verdict="not as in the paper",
        )
    better = next((raw for raw, merged in pairs if merged.evaluation.loss < raw.evaluation.loss), None)
    raw, merged = worse[0]
    turn = f"; from {_millions(better.tokens)} on it is the other way round" if better else " and stays so to the end"
    return Finding(
        text=f"Early in training merging hurts: at {_millions(raw.tokens)} the merge has {merged.evaluation.loss:.3f} against "
        f"{raw.evaluation.loss:.3f} raw, because its window reaches back to much worse weights{turn}.",
        verdict="as in the paper" if better else "cannot tell",
    )


def _against_annealing(data: ReportData) -> list[Finding]:
    findings = []
    for name, rows in data.branches.items():
        if not rows or not data.merged:
            continue
        soon = _soon_after_fork(data, name)
        if soon is not None:
            branch, merged = soon
            ahead = branch.evaluation.loss - merged.evaluation.loss
            findings.append(
                Finding(
                    text=f"{_millions(branch.tokens - data.fork_tokens[name])} after the fork the merge at constant learning rate "
                    f"has {merged.evaluation.loss:.4f}, the annealing branch {branch.evaluation.loss:.4f}.",
                    verdict="as in the paper" if ahead > 0 else "not as in the paper",
                )
            )
        findings.append(_at_the_end(data, rows[-1]))
    return findings


def _at_the_end(data: ReportData, annealed: Evaluated) -> Finding:
    merged = min(data.merged, key=lambda row: abs(row.tokens - annealed.tokens))
    difference, error = paired_gain(merged.evaluation, annealed.evaluation)
    raw = min(data.raw, key=lambda row: abs(row.tokens - annealed.tokens))
    whole = raw.evaluation.loss - annealed.evaluation.loss
    share = (raw.evaluation.loss - merged.evaluation.loss) / whole if whole > 0 else float("nan")
    text = (
        f"At equal tokens ({_millions(annealed.tokens)}) the annealed model has {annealed.evaluation.loss:.4f}, the merge "
        f"{merged.evaluation.loss:.4f}: the merge reaches {share:.0%} of what annealing gains over the raw snapshot, "
        f"{abs(difference):.4f} {'short of' if difference > 0 else 'better than'} it (standard error {error:.4f}). "
        "This is one fork of one seed; it does not say how the difference varies."
    )
    return Finding(text=text, verdict="as in the paper" if share > 0.5 else "not as in the paper")


def _soon_after_fork(data: ReportData, name: str) -> tuple[Evaluated, Evaluated] | None:
    """Branch snapshot a fifth into its budget, and the scheduled merge at the same tokens."""
    rows = data.branches[name]
    fork = data.fork_tokens.get(name)
    if fork is None:
        return None
    target = fork + (rows[-1].tokens - fork) / 5
    branch = min(rows, key=lambda row: abs(row.tokens - target))
    merged = next((row for row in data.merged if row.tokens == branch.tokens), None)
    return (branch, merged) if merged and branch is not rows[-1] else None


def _pairs(data: ReportData) -> list[tuple[Evaluated, Evaluated]]:
    merged = {row.tokens: row for row in data.merged}
    return [(raw, merged[raw.tokens]) for raw in data.raw if raw.tokens in merged]


def _last_pair(data: ReportData) -> tuple[Evaluated, Evaluated] | None:
    pairs = _pairs(data)
    return pairs[-1] if pairs else None


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f} M tokens"
