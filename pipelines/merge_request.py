"""What ``pma merge`` was asked for, checked and turned into plans before any tensor data is read."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.storage import open_store
from configs.errors import UserError
from tasks.checkpoints.reader import Checkpoint
from tasks.checkpoints.run_folder import RunFolder, Snapshot
from tasks.checkpoints.tied import open_untied
from tasks.merging.methods import EVALUATED_METHODS, MethodChoice
from tasks.merging.plan import Recipe, plan_merges
from tasks.merging.planned import MergePlan
from tasks.merging.policy import DTYPE_NAMES, MergePolicy, parse_policy
from tasks.merging.selection import BORDERS, WindowRule, on_grid, select_window

BYTE_UNITS = {
    "": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
LONG_SPAN_FRACTION = 0.16
"""Longest span relative to the tokens seen that was best in the paper: 72B of 452B tokens (arXiv 2505.12082, section 4.4)."""


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """Options of ``pma merge``."""

    run: str | None = None
    """Run to choose a window from; None when ``inputs`` are given."""
    inputs: tuple[str, ...] = ()
    """Checkpoints, oldest first."""
    count: int | None = None
    """N, with ``run``."""
    interval_tokens: int | None = None
    """V, with ``run``; None means the run's own."""
    end: int | None = None
    """Step of the newest input, with ``run``."""
    across: tuple[str, ...] = ()
    """Borders that the window may cross, of :data:`tasks.merging.selection.BORDERS`."""
    output: str | None = None
    """Folder of the result; None means ``<run>/merged/<name>``."""
    method: str = "sma"
    """Merge method."""
    alpha: float | None = None
    """For ``ema``."""
    weights: str | None = None
    """Comma-separated, oldest first, for method ``weights``."""
    decay: str | None = None
    """Comma-separated, for ``wsm:list``."""
    width: float | None = None
    """For ``power-ema``."""
    allow_unnormalised: bool = False
    """Accept explicit weights that do not sum to 1."""
    grid: str | None = None
    """Several merges of the inputs in one pass, such as ``sma:3,sma:10,ema=0.2:10``."""
    dtype: str | None = None
    """Output dtype; None keeps the inputs'."""
    policy: str | None = None
    """YAML file of a :class:`tasks.merging.policy.MergePolicy`."""
    workers: str = "local"
    """``ray``, ``local`` (a thread per CPU), or a number of local processes."""
    memory_budget: str | None = None
    """Most memory for one worker's buffers, such as ``32MiB``; None means the default chunk."""

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.inputs):
            raise UserError("give either --run URL with --count N, or --inputs URL..., not both and not neither")
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            raise UserError(f"--dtype {self.dtype!r} is not known; known: {', '.join(DTYPE_NAMES)}")
        if self.inputs and self.output is None:
            raise UserError("--output URL is needed with --inputs")
        if self.inputs and (self.count or self.interval_tokens or self.end is not None or self.across):
            raise UserError(
                "--count, --interval-tokens, --end and --across choose a window of a --run, not of --inputs"
            )
        if unknown := sorted(set(self.across) - set(BORDERS)):
            raise UserError(f"--across {unknown[0]!r} is not known; known: {', '.join(BORDERS)}")
        if self.grid and (self.method != "sma" or self.alpha or self.weights or self.decay or self.width):
            raise UserError("--grid names methods and their parameters itself; leave --method and its options out")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Inputs and outputs that a request comes to."""

    inputs: list[Checkpoint]
    """Oldest first."""
    recipes: list[Recipe]
    """One per merge."""
    notes: list[str]
    """What the user should know about the choice."""


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: a plan is a million small values that all stay, and looking at them doubles its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@collection_paused()
def choose(request: MergeRequest) -> Chosen:
    """Open the inputs that ``request`` names or whose rule it gives, and say which merges are to be made of them."""
    grid = parse_grid(request.grid) if request.grid else [(_choice(request), None)]
    for choice, _ in grid:
        choice.check()
    counts = [count for _, count in grid if count is not None]
    notes: list[str] = []
    if request.run is None:
        inputs = [_open_input(url, str(request.output)) for url in request.inputs]
        output = open_store(str(request.output)).url
        names = [f"{output}/{_grid_name(choice, count)}" if count else output for choice, count in grid]
    else:
        window, rule, notes = _window(request, max(counts, default=None))
        inputs = [open_untied(snapshot.url) for snapshot in window]
        names = [_output_in_run(request, rule, choice, count, window[-1]) for choice, count in grid]
    recipes = [
        Recipe(output_url=name, choice=choice, count=count) for name, (choice, count) in zip(names, grid, strict=True)
    ]
    return Chosen(inputs=inputs, recipes=recipes, notes=notes)


@collection_paused()
def build_plans(request: MergeRequest, chosen: Chosen, recipes: Sequence[Recipe] | None = None) -> list[MergePlan]:
    """Plans of ``recipes`` (default: all that were chosen); every mistake is found here."""
    return plan_merges(
        chosen.inputs,
        chosen.recipes if recipes is None else recipes,
        dtype=request.dtype,
        policy=read_policy(request.policy),
        buffer_bytes=None if request.memory_budget is None else parse_bytes(request.memory_budget),
    )


def read_policy(path: str | None) -> MergePolicy | None:
    """The policy in the YAML file at ``path``."""
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--policy {path}: cannot be read: {error}") from None
    return parse_policy(text, path)


def parse_grid(text: str) -> list[tuple[MethodChoice, int]]:
    """Merges of ``METHOD[=ALPHA]:N,...``, each method with the number of newest inputs that it takes."""
    grid = []
    for item in text.split(","):
        match = re.fullmatch(r"([a-z0-9:-]+?)(?:=([0-9.eE+-]+))?:(\d+)", item.strip())
        if match is None:
            raise UserError(
                f"--grid {item.strip()!r}: expected METHOD:N or ema=ALPHA:N, as in sma:3,sma:10,wma:10,ema=0.2:10"
            )
        method, alpha, count = match[1], match[2], int(match[3])
        grid.append((MethodChoice(method=method, alpha=None if alpha is None else float(alpha)), count))
    if len({(choice.method, choice.alpha, count) for choice, count in grid}) < len(grid):
        raise UserError(f"--grid {text!r} asks for the same merge twice")
    return grid


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Numbers of ``0.2,0.3,0.5``; :class:`configs.errors.UserError` names ``option``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between, such as 0.2,0.3,0.5") from None


def parse_bytes(text: str) -> int:
    """Bytes from ``1048576``, ``32MiB``, ``1.5GiB``, ``64MB``; :class:`configs.errors.UserError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)", text.strip())
    if match is None:
        raise UserError(f"{text!r} is not a number of bytes; write 1048576, 32MiB or 1GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def _choice(request: MergeRequest) -> MethodChoice:
    if request.method in EVALUATED_METHODS and request.weights is not None:
        raise UserError(f"--method {request.method} finds its own weights; leave --weights out")
    return MethodChoice(
        method=request.method,
        alpha=request.alpha,
        decay=parse_numbers("--decay", request.decay),
        width=request.width,
        weights=parse_numbers("--weights", request.weights),
        allow_unnormalised=request.allow_unnormalised,
    )


def _window(request: MergeRequest, largest: int | None) -> tuple[list[Snapshot], WindowRule, list[str]]:
    run = RunFolder(str(request.run))
    config = run.identity().config
    rule = WindowRule(
        method=request.method,
        count=largest or request.count or config.merge.count,
        interval_tokens=request.interval_tokens or config.merge_interval_tokens,
        alpha=request.alpha,
        max_span_fraction=None if request.count or largest else config.merge.max_span_fraction,
    )
    snapshots = on_grid(run.trajectory() if "fork" in request.across else run.snapshots())
    end = next((s for s in snapshots if s.step == request.end), None) if request.end is not None else None
    newest = end or (snapshots[-1] if snapshots else None)
    fitting = rule.shortened(newest.manifest.tokens_seen or 0) if newest else rule
    try:
        window = select_window(snapshots, fitting, request.end, request.across)
    except UserError as error:
        start = run.identity().start
        if start is None or start.weights_only or "fork" in request.across:
            raise
        raise UserError(
            f"{error}\nthe run was forked at step {start.step} from {start.url}: --across fork takes snapshots of that run too"
        ) from None
    return window, fitting, _span_notes(rule, fitting, window)


def _span_notes(asked: WindowRule, fitting: WindowRule, window: Sequence[Snapshot]) -> list[str]:
    tokens = window[-1].manifest.tokens_seen or 0
    span = (fitting.count - 1) * fitting.interval_tokens
    notes = []
    if fitting.count < asked.count:
        notes.append(
            f"{fitting.count} snapshots instead of {asked.count}: at {tokens:,} tokens merge.max_span_fraction="
            f"{asked.max_span_fraction} allows a span of {int((asked.max_span_fraction or 0) * tokens):,} tokens"
        )
    elif tokens and span > LONG_SPAN_FRACTION * tokens:
        notes.append(
            f"the window spans {span:,} tokens, {span / tokens:.0%} of the training so far: early in a run long spans score "
            f"worse than short ones (the paper's best were up to {LONG_SPAN_FRACTION:.0%})"
        )
    return notes


def _output_in_run(
    request: MergeRequest, rule: WindowRule, choice: MethodChoice, count: int | None, end: Snapshot
) -> str:
    if count is None and request.output is not None:
        return open_store(request.output).url
    named = dataclasses.replace(rule, method=choice.method, alpha=choice.alpha, count=count or rule.count)
    folder = open_store(request.output).url if request.output else f"{open_store(str(request.run)).url}/merged"
    return f"{folder}/{named.output_name(end.step)}"


def _grid_name(choice: MethodChoice, count: int) -> str:
    method = f"ema{choice.alpha!r}" if choice.method == "ema" else choice.method.replace(":", "-")
    return f"{method}-n{count}"


def _open_input(url: str, output: str) -> Checkpoint:
    checkpoint = open_untied(url)
    if checkpoint.url == open_store(output).url:
        raise UserError(f"{url} is both an input and the output")
    return checkpoint
