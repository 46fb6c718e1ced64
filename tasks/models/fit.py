"""Whether a checkpoint fits the network of a configuration, told from headers and ``config.json`` alone."""

from __future__ import annotations

import dataclasses
import json

import torch

from configs.model import ModelConfig
from configs.schema import Config
from tasks.checkpoints.reader import Checkpoint
from tasks.models.build import build_model
from tasks.models.config_file import CONFIG_KEY, read_model_shape
from tasks.models.disk_layout import model_tensors
from tasks.models.weights import census_problems
from tasks.workload import open_workload

FREE_KEYS = {"experts_implementation", "initializer_range", "router_loss_coefficient", "router_bias_speed"}
"""Keys of ``model`` that decide how a network is trained or computed, not what it computes."""


def misfits(config: Config, checkpoint: Checkpoint) -> list[str]:
    """How ``checkpoint`` differs from what ``config.model`` describes, a line each; empty if its weights can be loaded.

    Compares names and shapes of all tensors and, where a Hugging Face ``config.json`` lies beside them, first what that
    says, some of which no tensor shows. Allocates nothing. Raises :class:`configs.errors.UserError` for a ``config.json`` that the section cannot express.
    """
    network = empty_network(config)
    found = census_problems(model_tensors(network), checkpoint.model)
    stated = _stated_shape(checkpoint)
    if stated is None or not config.workload.is_language_model:
        return found
    if stated.family != config.model.family:
        return [f"model.family is {config.model.family}, the checkpoint's {stated.family}", *found]
    return [*_key_differences(config.model, stated), *found]


def empty_network(config: Config) -> torch.nn.Module:
    """The network of ``config`` for its names and shapes; of a language model without memory."""
    if not config.workload.is_language_model:
        return open_workload(config).build(config)
    with torch.device("meta"):
        network: torch.nn.Module = build_model(config.model, config.training.sequence_length)
    return network


def _key_differences(ours: ModelConfig, stated: ModelConfig) -> list[str]:
    names = [item.name for item in dataclasses.fields(ModelConfig) if item.name not in FREE_KEYS]
    # Keys of parts that this network does not have hold whatever their defaults are.
    if not ours.is_moe:
        names = [name for name in names if "expert" not in name and name != "normalise_top_k"]
    elif not ours.num_dense_layers:
        names.remove("intermediate_size")
    pairs = [(name, getattr(ours, name), getattr(stated, name)) for name in names]
    return [f"model.{name} is {mine!r}, the checkpoint's {its!r}" for name, mine, its in pairs if mine != its]


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
