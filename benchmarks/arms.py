"""What helps against a loss spike: arms of recovery on the same faults and seeds.

``python -m benchmarks.arms [--faults poison corrupt-weights ...] [--arms pma rollback ...] [--seeds 5] [--workers 2] --out FOLDER``

The cases are those of :mod:`pipelines.study.spike_arms`; runs that are complete in FOLDER are not made again. Reported per
fault and arm: runs that recovered, tokens trained in vain, and the held-out loss at the end less the control's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path

from pipelines.study.faults import write_sums
from pipelines.study.spike_arms import ARMS, CONTROL, SNAPSHOT_STEPS, Case, run_case, table


def main() -> None:
    """Make the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", default=["poison", "corrupt-weights", "learning-rate"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    if unknown := sorted(set(options.faults) - SNAPSHOT_STEPS.keys() | set(options.arms) - ARMS.keys()):
        parser.error(f"{unknown[0]!r} is not known; faults: {', '.join(SNAPSHOT_STEPS)}; arms: {', '.join(ARMS)}")
    write_sums(Path(options.out).resolve() / "text")
    cases = [
        Case(fault=fault, arm=arm, seed=seed, folder=str(Path(options.out).resolve()))
        for seed in range(1, options.seeds + 1)
        for fault in options.faults
        for arm in dict.fromkeys([CONTROL, *options.arms])
    ]
    results = []
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        for result in pool.imap_unordered(run_case, cases):
            print(json.dumps(result), flush=True)
            results.append(result)
    for row in table(results):
        print(json.dumps({key: value for key, value in row.items() if key != "excess"}))


if __name__ == "__main__":
    main()
