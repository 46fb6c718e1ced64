"""Which tensors of a DCP folder are weights and which are training state, under the names that other formats give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tasks.checkpoints.regions import TensorPlace
from tasks.checkpoints.safetensors_header import CheckpointError

MAX_DEPTH = 64
"""Of nested state dicts."""
_STATE_PARTS = re.compile(
    r"^(optim|optimizer|optimizers|lr_scheduler|scheduler|opt_param_scheduler|dataloader|data_loader|train_state|trainer|"
    r"rng|rng_state|ema|iteration|rerun_state_machine|chained_\d+)(\.|$)"
)
_MOMENT_LAST = re.compile(r"(?:^|\.)(?:optim|optimizer)\.state\.(?P<name>.+)\.(?P<moment>exp_avg|exp_avg_sq|step)$")
_MOMENT_FIRST = re.compile(
    r"(?:^|\.)(?:optim|optimizer)\.state\.(?P<moment>exp_avg|exp_avg_sq|fp32_param|step)\.(?P<name>.+)$"
)


def is_state(key: str) -> bool:
    """Whether a flat key belongs to the training state: optimizer, scheduler, data loader, random state, averages."""
    return _STATE_PARTS.match(key) is not None


def split_names(
    places: Mapping[str, TensorPlace], paths: Mapping[str, Any], where: str
) -> tuple[dict[str, TensorPlace], dict[str, TensorPlace]]:
    """Weights and training state, each under the name that other formats give it; two of one name are refused.

    ``paths`` are the keys by which each entry was reached before the nested state dict was flattened: below a key ``model`` lie
    the weights. A flat state dict has no such key, and Hugging Face names themselves begin with ``model.``.
    """
    nested = {key: _below_model(paths.get(key), f"{where}: tensor {key!r}") for key in places}
    if not any(nested.values()):
        model_keys = [key for key in places if not is_state(key)]
        # Megatron-Core keeps no paths: only a doubled prefix then tells a nested dict from Hugging Face names.
        doubled = any(key.startswith(("model.model.", "model.lm_head.")) for key in model_keys)
        strip = doubled and all(key.startswith("model.") for key in model_keys)
        nested = {key: key.removeprefix("model.") if strip else key for key in model_keys}
    model: dict[str, TensorPlace] = {}
    state: dict[str, TensorPlace] = {}
    for key, place in places.items():
        name = nested.get(key)
        if name is None:
            # Chained optimizers may number their parameters alike: then both keep their own names.
            short = _state_name(key)
            state[key if short in state or short in places else short] = place
        elif name in model:
            raise CheckpointError(f"{where}: tensor {key!r} is a second one named {name!r}")
        else:
            model[name] = place
    return model, state


def _below_model(path: Any, where: str) -> str | None:
    if not isinstance(path, tuple) or not path:
        return None
    if len(path) > MAX_DEPTH or not all(type(part) in (str, int) for part in path):
        raise CheckpointError(f"{where}: the path to it in planner_data is not one of names")
    if "model" not in path[:-1] or is_state(str(path[0])):
        return None
    return ".".join(str(part) for part in path[path.index("model") + 1 :])


def _state_name(key: str) -> str:
    match = _MOMENT_FIRST.search(key) or _MOMENT_LAST.search(key)
    if match is None:
        return key
    moment = "master" if match["moment"] == "fp32_param" else match["moment"]
    return f"{moment}.{match['name']}"
