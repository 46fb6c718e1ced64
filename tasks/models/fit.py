"""Whether a checkpoint fits the network of a configuration, told from headers and ``config.json`` alone."""

from __future__ import annotations

import json

import torch

from configs.model import ModelConfig
from configs.schema import Config
from tasks.checkpoints.reader import Checkpoint
from tasks.models.build import build_model
from tasks.models.config_file import CONFIG_KEY, read_model_shape
from tasks.models.disk_layout import model_tensors
from tasks.models.weights import census_problems

UNSEEN_KEYS = (
    "num_attention_heads", "num_key_value_heads", "head_size", "rope_head_size", "num_experts_per_token", "normalise_top_k",
    "num_expert_groups", "num_groups_per_token", "routed_scaling_factor", "rope_theta", "norm_epsilon", "tie_embeddings",
)  # fmt: skip
"""Keys of ``model`` that decide what a network computes and that names and shapes of tensors need not show."""


def misfits(config: Config, checkpoint: Checkpoint) -> list[str]:
    """How ``checkpoint`` differs from what ``config.model`` describes, a line each; empty if its weights can be loaded.

    Compares names and shapes of all tensors and, where a Hugging Face ``config.json`` lies beside them, what they do not
    show. Allocates nothing. Raises :class:`configs.errors.UserError` for a ``config.json`` that the section cannot express.
    """
    with torch.device("meta"):
        network = build_model(config.model, config.training.sequence_length)
    found = census_problems(model_tensors(network), checkpoint.model)
    stated = _stated_shape(checkpoint)
    if stated is None:
        return found
    if stated.family != config.model.family:
        return [f"model.family is {config.model.family}, the checkpoint's {stated.family}", *found]
    ours = {key: getattr(config.model, key) for key in UNSEEN_KEYS}
    return [
        *(
            f"model.{key} is {value!r}, the checkpoint's {getattr(stated, key)!r}"
            for key, value in ours.items()
            if value != getattr(stated, key)
        ),
        *found,
    ]


def _stated_shape(checkpoint: Checkpoint) -> ModelConfig | None:
    """What ``config.json`` beside the weights says; None without one, and for another trainer's file of that name."""
    data = checkpoint.store.read_if_present(CONFIG_KEY)
    try:
        values = json.loads(data or b"null")
    except ValueError:
        return None
    if not isinstance(values, dict) or "model_type" not in values:
        return None
    return read_model_shape(checkpoint.store.url)
