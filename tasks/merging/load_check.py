"""Load a checkpoint in transformers and run it: what a user of the merged model would do first.

For a merge, the logits are compared with those of the mean of its inputs, computed here in float64 with torch and
written as a plain folder: nothing of it has passed the merge engine. Needs memory for the model a few times over.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.storage import Store, open_store
from tasks.checkpoints.manifest import Merge, read_manifest
from tasks.checkpoints.safetensors_header import CheckpointError
from tasks.checkpoints.tied import open_untied
from tasks.merging.policy import DTYPE_NAMES
from tasks.merging.recompute import read_float64, weights_of
from tasks.workload import stated_workload

DTYPE_OF = {stored: name for name, stored in DTYPE_NAMES.items()}
TOKENS = 64
SEQUENCES = 2
# Root mean square difference of logits relative to their spread. Both sides are rounded to the output's dtypes; what is left is
# float32 sums that round the other way at a tie, and, in a mixture of experts, tokens that are routed elsewhere for it.
TOLERANCE = {"F32": 2e-4, "BF16": 1e-2, "F16": 3e-3, "F64": 1e-5}


def check_load(url: str, *, beside_mean: bool = True) -> Iterator[str]:
    """Problems of loading the checkpoint at ``url`` with ``AutoModelForCausalLM.from_pretrained`` and running it in float32.

    A merge is run beside the mean of its inputs, unless ``beside_mean`` says that they are gone.
    """
    store = open_store(url)
    manifest, _ = read_manifest(store)
    if (entry := stated_workload(store)) is not None:
        yield f"{url}: --load runs language models in transformers; this is of workload.entry={entry!r}"
        return
    if not store.exists("config.json"):
        yield f"{url}: no config.json: from_pretrained needs one beside the weights"
        return
    with tempfile.TemporaryDirectory(prefix="pma-load-") as scratch:
        keys = [shard.key for shard in manifest.shards if shard.part == "model"] + [item.key for item in manifest.files]
        logits = _run(_local_copy(store, keys, Path(scratch) / "checkpoint"))
        if not logits.isfinite().all():
            yield f"{url}: the logits are not finite"
        if manifest.merge is None or not beside_mean:
            return
        dtypes = {entry.name: entry.dtype for entry in manifest.model_tensors()}
        expected = _run(_write_mean(store, manifest.merge, dtypes, Path(scratch) / "mean"))
    narrowest = min((entry.dtype for entry in manifest.model_tensors() if entry.dtype in TOLERANCE), key=_precision)
    difference = float((logits - expected).square().mean().sqrt() / expected.std())
    if not difference <= TOLERANCE[narrowest]:
        yield f"{url}: logits differ from the mean's by {difference:.2e} of their spread; at most {TOLERANCE[narrowest]:.0e} is rounding"


def _run(folder: Path) -> Any:
    """Logits [SEQUENCES, TOKENS, V] of fixed tokens, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: from_pretrained fails: {type(error).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(network.config.vocab_size, (SEQUENCES, TOKENS), generator=generator)
    with torch.inference_mode():
        return network(input_ids=tokens, use_cache=False).logits.float()


def _local_copy(store: Store, keys: list[str], folder: Path) -> Path:
    """The folder itself if it is local, else a copy that from_pretrained can read."""
    if "://" not in store.url:
        return Path(store.url)
    for key in keys:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(key))
    return folder


def _write_mean(store: Store, merge: Merge, dtypes: Mapping[str, str], folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    inputs = [open_untied(item.url) for item in merge.inputs]
    tensors = {}
    for name, place in inputs[-1].model.items():
        if dtypes[name] not in DTYPE_OF:
            raise CheckpointError(f"{store.url}: {name!r} holds integers: its forward pass is not compared")
        terms = [
            weight * read_float64(checkpoint.store, checkpoint.model[name], 0, place.num_elements)
            for weight, checkpoint in zip(weights_of(name, merge), inputs, strict=True)
            if weight is not None
        ]
        rounded = torch.from_numpy(sum(terms)).to(getattr(torch, DTYPE_OF[dtypes[name]]))
        tensors[name] = rounded.float().reshape(place.shape).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(store.read("config.json"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def _precision(dtype: str) -> int:
    return ("BF16", "F16", "F32", "F64").index(dtype)
