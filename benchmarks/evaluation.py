"""What evaluating K checkpoints costs beyond the arithmetic: the forward passes alone, and evaluations in full, in turns.

``python -m benchmarks.evaluation [--checkpoints 8] [--rounds 5] [--config tiny] [--folder URL] [KEY=VALUE...]``

*forward*: the suite's batches through a network that is loaded already, K times. *ahead*: K checkpoints as ``pma evaluate`` does
them, opened, read, held against their digests and recorded, each read while the one before is computed. *in turn*: the same
without reading ahead. Weights are random, in float32 and with manifests; opening data and networks, once for all, is left out
and told apart. Prints medians and the ratios to the forward passes, round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.checkpoints import write_checkpoints
from benchmarks.measure import timed
from cluster.storage import open_store
from configs.load import load_config
from configs.schema import Config
from pipelines.export import export
from tasks.checkpoints.reader import open_checkpoint
from tasks.evaluation.held_out import HeldOutSuite, build_network
from tasks.models.weights import load_weights


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=8, metavar="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--folder", metavar="URL", help="where checkpoints are written; default a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    config = load_config(options.config, tuple(options.overrides)).config
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or f"{scratch}/run"
        urls = prepare(Path(scratch), folder, options.checkpoints, config)
        print(json.dumps(measure(folder, urls, config, options.rounds)))


def prepare(scratch: Path, folder: str, count: int, config: Config) -> list[str]:
    """``count`` checkpoints with manifests below ``folder``."""
    made = []
    for number, plain in enumerate(write_checkpoints(scratch / "plain", count, config.model)):
        url = f"{open_store(folder).url}/merged/c{number}"
        export(plain, url, format_="hf", dtype="float32", max_shard=None, workers="local")
        made.append(url)
    return made


def measure(folder: str, urls: Sequence[str], config: Config, rounds: int) -> dict[str, object]:
    """Seconds of each way, in turns, and what they are to the forward passes of their round."""
    import torch

    torch.set_num_threads(1)
    suites: list[HeldOutSuite] = []
    opening = timed(lambda: suites.append(HeldOutSuite(folder, config)))
    suite, network = suites[0], build_network(config)
    load_weights(network, open_checkpoint(urls[0]))

    def require_sound(suite: HeldOutSuite, urls: Sequence[str]) -> None:
        assert all(outcome.error is None for outcome in suite.evaluate_each(urls))

    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: [suite.measure(network) for _ in urls],
        "ahead": lambda: require_sound(suite, urls),
        "in turn": lambda: [suite.evaluate(url) for url in urls],
    }
    for work in ways.values():
        work()  # networks, page cache, the allocator
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
            seconds[name].append(timed(ways[name]))
    ratios = {
        name: [round(way / forward, 3) for way, forward in zip(seconds[name], seconds["forward"], strict=True)]
        for name in ("ahead", "in turn")
    }
    return {
        "checkpoints": len(urls),
        "bytes_each": sum(place.num_bytes for place in open_checkpoint(urls[0]).model.values()),
        "tokens_each": config.evaluation.slice_tokens * config.evaluation.num_slices,
        "opening_seconds": round(opening, 3),
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
    }


if __name__ == "__main__":
    main()
