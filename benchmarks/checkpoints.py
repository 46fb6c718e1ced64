"""Generate checkpoints for benchmarks: the tensors of a Qwen3-MoE, random bfloat16 weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.storage import open_store
from configs.model import ModelConfig
from tasks.checkpoints.safetensors_header import TensorEntry
from tasks.checkpoints.writer import write_shard, write_side_files

# About 308 M parameters: 616 MB in bfloat16.
SHAPE = ModelConfig(
    vocab_size=32_000,
    hidden_size=768,
    num_layers=8,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_size=64,
    num_experts=32,
    num_experts_per_token=4,
    expert_intermediate_size=400,
)
SHARDS = 2


def tensor_shapes(model: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Disk names and shapes of ``model``, from its classes on the meta device."""
    import torch

    from tasks.models.build import build_model
    from tasks.models.disk_layout import pieces_of

    with torch.device("meta"):
        network = build_model(model, 128)
    return [
        (piece.disk_name, piece.shape) for name, p in network.named_parameters() for piece in pieces_of(name, p.shape)
    ]


def write_checkpoints(folder: Path, count: int, model: ModelConfig = SHAPE) -> list[str]:
    """Write ``count`` plain Hugging Face folders below ``folder``; returns their paths."""
    shapes = sorted(tensor_shapes(model))
    random = np.random.default_rng(0)
    urls = []
    for number in range(count):
        store = open_store(str(folder / f"checkpoint-{number}"))
        if not store.exists("model.safetensors.index.json"):
            shards = [
                write_shard(
                    store,
                    f"model-{part + 1:05d}-of-{SHARDS:05d}.safetensors",
                    [(name, "BF16", shape) for name, shape in shapes[part::SHARDS]],
                    lambda entry: [_random_bfloat16(random, entry)],
                    "model",
                )
                for part in range(SHARDS)
            ]
            write_side_files(store, {"config.json": _config(model)}, shards, lambda: None)
        urls.append(store.url)
    return urls


def _config(model: ModelConfig) -> bytes:
    from tasks.models.build import build_model_config

    config = build_model_config(model, 128)
    config.dtype = "bfloat16"
    return str(config.to_json_string(use_diff=False)).encode()


def _random_bfloat16(random: np.random.Generator, entry: TensorEntry) -> bytes:
    values = random.standard_normal(entry.bytes // 2, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
