"""Shape of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from configs.fields import require

MOE_FAMILIES = ("qwen3_moe",)
DENSE_FAMILIES = ("llama", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network; built from `transformers` configuration classes by family name."""

    family: Literal["qwen3_moe", "llama", "qwen3"] = "qwen3_moe"
    """Architecture: ``qwen3_moe`` (mixture of experts), ``llama`` or ``qwen3`` (dense)."""
    vocab_size: int = 256
    """Number of token ids; 256 for the byte-level vocabulary."""
    hidden_size: int = 64
    """Width D of the residual stream."""
    num_layers: int = 2
    """Number of transformer layers L."""
    num_attention_heads: int = 4
    """Query heads N."""
    num_key_value_heads: int = 2
    """Key and value heads; divides ``num_attention_heads``."""
    head_size: int = 16
    """Width H of one attention head."""
    intermediate_size: int = 128
    """Hidden width of a dense feed-forward layer (unused by layers that are mixtures of experts)."""
    num_experts: int = 8
    """Experts E per layer; 0 for dense families."""
    num_experts_per_token: int = 2
    """Experts K that the router picks for a token (top-k)."""
    expert_intermediate_size: int = 64
    """Hidden width F of one expert."""
    router_loss_coefficient: float = 0.01
    """Weight of the load-balance loss in the training loss; 0 turns it off."""
    tie_embeddings: bool = False
    """Share the embedding matrix with the output head."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that weights start from."""
    experts_implementation: Literal["eager", "grouped_mm"] = "grouped_mm"
    """How transformers computes experts; both give the same function."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "head_size", "intermediate_size",
            "expert_intermediate_size", "rope_theta", "norm_epsilon", "initializer_range",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"model.{name}", value, "needs a positive number")
        require(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide model.num_attention_heads={self.num_attention_heads}",
        )
        if self.family in MOE_FAMILIES:
            require(self.num_experts >= 2, "model.num_experts", self.num_experts, f"{self.family} needs at least 2")
            require(
                1 <= self.num_experts_per_token <= self.num_experts,
                "model.num_experts_per_token",
                self.num_experts_per_token,
                f"between 1 and model.num_experts={self.num_experts}",
            )
        else:
            require(self.num_experts == 0, "model.num_experts", self.num_experts, f"{self.family} is dense: use 0")
        require(
            self.router_loss_coefficient >= 0,
            "model.router_loss_coefficient",
            self.router_loss_coefficient,
            "needs 0 or more",
        )

    @property
    def is_moe(self) -> bool:
        """Whether layers hold experts and a router."""
        return self.family in MOE_FAMILIES
