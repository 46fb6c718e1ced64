"""Write a checkpoint for other tools: a plain Hugging Face folder, or torch DCP."""

from __future__ import annotations

import functools
import json
from typing import Any, Literal

from cluster.storage import open_store
from configs.errors import UserError
from pipelines.merge import carry_out, describe, merge_lease, require_workers
from pipelines.merge_request import parse_bytes
from tasks.checkpoints.pins import hold_pins
from tasks.checkpoints.reader import Checkpoint, open_checkpoint
from tasks.checkpoints.tied import without_tied
from tasks.merging.kernel import recode
from tasks.merging.merge import find_standing, nothing_done
from tasks.merging.methods import MethodChoice
from tasks.merging.plan import plan_merge
from tasks.merging.policy import DTYPE_NAMES
from tasks.workload import stated_workload


def export(
    url: str,
    output: str,
    *,
    format_: Literal["hf", "dcp"],
    dtype: str | None,
    max_shard: str | None,
    workers: str,
) -> dict[str, Any]:
    """Write the weights at ``url`` to ``output``; returns ``url``, ``output``, ``format``, ``digest`` and what was written.

    A Hugging Face export is a merge of one, with all that a merge has: it resumes, and ``pma verify`` proves it.
    """
    require_workers(workers)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise UserError(f"--dtype {dtype!r} is not known; known: {', '.join(DTYPE_NAMES)}")
    checkpoint = open_checkpoint(url)
    target = open_store(output).url
    if target in (checkpoint.url, checkpoint.store.url):
        raise UserError(f"{url} is both the checkpoint and the output")
    shard_bytes = parse_bytes(max_shard) if max_shard else 1 << 30
    if format_ == "hf" and (entry := stated_workload(checkpoint.store)) is not None:
        raise UserError(
            f"--format hf is for language models; {url} is of workload.entry={entry!r}. Its model*.safetensors are plain "
            "safetensors as they lie; --format dcp writes torch DCP"
        )
    if format_ == "dcp":
        from tasks.checkpoints.dcp_writer import write_dcp

        with hold_pins([checkpoint]), merge_lease(target):
            written = write_dcp(
                checkpoint,
                target,
                encode=functools.partial(recode, wanted=DTYPE_NAMES[dtype] if dtype else None),
                shard_bytes=shard_bytes,
            )
        return {"url": url, "output": target, "format": format_, "tied": [], "notes": [], **written}
    untied = without_tied(checkpoint)
    plan = plan_merge([untied], MethodChoice(method="sma"), output_url=target, dtype=dtype, shard_bytes=shard_bytes)
    standing = find_standing(plan)
    report = nothing_done(standing) if standing is not None else carry_out(workers, [plan])[0]
    done = describe(plan, report)
    return {
        "url": url,
        "output": target,
        "format": format_,
        "digest": done["digest"],
        "tied": sorted(checkpoint.model.keys() - untied.model.keys()),
        "notes": _notes(checkpoint),
        **{key: done[key] for key in ("tasks", "bytes_read", "bytes_written", "seconds", "peak_memory_bytes")},
    }


def _notes(checkpoint: Checkpoint) -> list[str]:
    data = checkpoint.store.read_if_present("config.json")
    if data is None:
        return [f"{checkpoint.url} has no config.json: from_pretrained needs one beside the weights"]
    try:
        json.loads(data)
    except ValueError:
        return [f"{checkpoint.url}/config.json is not JSON: from_pretrained will not load the export"]
    return []
