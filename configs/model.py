"""Shape of the network, by family."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from configs.fields import require

MOE_FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3")
DENSE_FAMILIES = ("llama", "qwen3")
DEEPSEEK_BIAS_SPEED = 0.001
"""DeepSeek-V3's bias update speed for the first 14.3T of 14.8T tokens (arXiv 2412.19437, section 4.2)."""
_POSITIVE = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "head_size", "intermediate_size",
    "expert_intermediate_size", "rope_theta", "norm_epsilon", "initializer_range", "routed_scaling_factor",
)  # fmt: skip
_DEEPSEEK_ONLY = (
    "query_rank", "key_value_rank", "rope_head_size", "value_head_size", "num_shared_experts", "num_expert_groups",
    "num_groups_per_token", "routed_scaling_factor",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the network; built from `transformers` configuration classes by family name.

    A key that the family does not have must keep its default: nothing that a user writes is ignored. `docs/models.md`
    says which family has which key, and how `transformers` calls it.
    """

    family: Literal["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "llama", "qwen3"] = "qwen3_moe"
    """Architecture: a mixture of experts (``qwen3_moe``, ``olmoe``, ``mixtral``, ``deepseek_v3``) or dense (``llama``, ``qwen3``)."""
    vocab_size: int = 256
    """Number of token ids; 256 for the byte-level vocabulary."""
    hidden_size: int = 64
    """Width D of the residual stream."""
    num_layers: int = 2
    """Number of transformer layers L."""
    num_attention_heads: int = 4
    """Query heads N."""
    num_key_value_heads: int = 2
    """Key and value heads; divides ``num_attention_heads``. deepseek_v3 has as many as query heads."""
    head_size: int = 16
    """Width H of one attention head; for deepseek_v3 of the part of a query or key without position."""
    query_rank: int = 0
    """deepseek_v3: width that queries are compressed to before they are expanded; 0 leaves them whole."""
    key_value_rank: int = 0
    """deepseek_v3: width that keys and values are compressed to together."""
    rope_head_size: int = 0
    """deepseek_v3: width of the part of a query or key that carries the rotary position, on top of ``head_size``."""
    value_head_size: int = 0
    """deepseek_v3: width of a value head."""
    intermediate_size: int = 128
    """Hidden width of a dense feed-forward layer (unused by layers that are mixtures of experts)."""
    num_dense_layers: int = 0
    """First layers of a mixture of experts that are dense instead (qwen3_moe, deepseek_v3)."""
    num_experts: int = 8
    """Experts E per layer, without shared ones; 0 for dense families."""
    num_experts_per_token: int = 2
    """Experts K that the router picks for a token (top-k)."""
    expert_intermediate_size: int = 64
    """Hidden width F of one expert."""
    num_shared_experts: int = 0
    """deepseek_v3: experts that every token passes, kept as one of this many times the width."""
    num_expert_groups: int = 1
    """deepseek_v3: groups that a layer's experts are divided into; a token's experts come from the best groups only."""
    num_groups_per_token: int = 1
    """deepseek_v3: groups that a token may use."""
    routed_scaling_factor: float = 1.0
    """deepseek_v3: factor on the routed experts' output."""
    normalise_top_k: bool = True
    """Whether the weights of a token's K experts are scaled to sum 1; always so in mixtral. The released OLMoE does not."""
    router_loss_coefficient: float = 0.01
    """Weight of the load-balance loss in the training loss; 0 turns it off. DeepSeek-V3's own is 0.0001, per sequence."""
    router_bias_speed: float | None = None
    """deepseek_v3: step of the router's correction bias after each optimizer step; 0 turns it off, None means 0.001."""
    tie_embeddings: bool = False
    """Share the embedding matrix with the output head."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in RMS norms."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that weights start from."""
    experts_implementation: Literal["eager", "grouped_mm"] = "grouped_mm"
    """How transformers computes experts; both give the same function. ``grouped_mm`` needs widths that are multiples of 8."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), f"model.{name}", value, "needs a positive number")
        require(
            self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"it must divide model.num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.router_loss_coefficient >= 0,
            "model.router_loss_coefficient",
            self.router_loss_coefficient,
            "needs 0 or more",
        )
        self._check_experts()
        self._check_attention()
        if self.family == "deepseek_v3":
            self._check_deepseek()
        else:
            self._check_no_deepseek()

    @property
    def is_moe(self) -> bool:
        """Whether layers hold experts and a router."""
        return self.family in MOE_FAMILIES

    @property
    def bias_speed(self) -> float:
        """``router_bias_speed`` with the family's default applied; 0 where routers have no bias."""
        if self.router_bias_speed is not None:
            return self.router_bias_speed
        return DEEPSEEK_BIAS_SPEED if self.family == "deepseek_v3" else 0.0

    def _check_experts(self) -> None:
        if not self.is_moe:
            require(self.num_experts == 0, "model.num_experts", self.num_experts, f"{self.family} is dense: use 0")
        else:
            for name in (
                ("hidden_size", "expert_intermediate_size") if self.experts_implementation == "grouped_mm" else ()
            ):
                value = getattr(self, name)
                require(
                    value % 8 == 0,
                    f"model.{name}",
                    value,
                    "a multiple of 8, or model.experts_implementation=eager: grouped_mm wants rows of whole 16 bytes in bfloat16",
                )
            require(self.num_experts >= 2, "model.num_experts", self.num_experts, f"{self.family} needs at least 2")
            require(
                1 <= self.num_experts_per_token <= self.num_experts,
                "model.num_experts_per_token",
                self.num_experts_per_token,
                f"between 1 and model.num_experts={self.num_experts}",
            )
        most = self.num_layers - 1 if self.family in ("qwen3_moe", "deepseek_v3") else 0
        require(
            0 <= self.num_dense_layers <= most,
            "model.num_dense_layers",
            self.num_dense_layers,
            f"0 to {most}, so that one layer of {self.family} has experts" if most else f"0 for {self.family}",
        )
        require(
            self.normalise_top_k or self.family != "mixtral",
            "model.normalise_top_k",
            self.normalise_top_k,
            "true: mixtral always scales the weights of a token's experts to sum 1",
        )

    def _check_attention(self) -> None:
        rotary = "rope_head_size" if self.family == "deepseek_v3" else "head_size"
        require(
            getattr(self, rotary) % 2 == 0,
            f"model.{rotary}",
            getattr(self, rotary),
            "an even number: rotary positions turn pairs",
        )
        if self.family == "olmoe":
            require(
                self.num_attention_heads * self.head_size == self.hidden_size,
                "model.head_size",
                self.head_size,
                f"model.hidden_size / model.num_attention_heads = {self.hidden_size}/{self.num_attention_heads}: "
                "olmoe normalises queries over the whole width",
            )

    def _check_deepseek(self) -> None:
        for name, published in (
            ("key_value_rank", 512), ("rope_head_size", 64), ("value_head_size", 128), ("num_shared_experts", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"model.{name}", value, f"deepseek_v3 needs 1 or more ({published} in the released one)")
        require(self.query_rank >= 0, "model.query_rank", self.query_rank, "0 or more")
        require(
            self.num_key_value_heads == self.num_attention_heads,
            "model.num_key_value_heads",
            self.num_key_value_heads,
            f"model.num_attention_heads={self.num_attention_heads}: deepseek_v3 expands a key and a value for each query head",
        )
        require(
            self.num_expert_groups >= 1 and self.num_experts % self.num_expert_groups == 0,
            "model.num_expert_groups",
            self.num_expert_groups,
            f"it must divide model.num_experts={self.num_experts}",
        )
        size = self.num_experts // self.num_expert_groups
        require(
            size >= 2,
            "model.num_expert_groups",
            self.num_expert_groups,
            f"groups of at least 2 of model.num_experts={self.num_experts}: a group is judged by its two best experts",
        )
        require(
            1 <= self.num_groups_per_token <= self.num_expert_groups,
            "model.num_groups_per_token",
            self.num_groups_per_token,
            f"between 1 and model.num_expert_groups={self.num_expert_groups}",
        )
        require(
            self.num_experts_per_token <= self.num_groups_per_token * size,
            "model.num_experts_per_token",
            self.num_experts_per_token,
            f"at most {self.num_groups_per_token * size}, the experts of {self.num_groups_per_token} groups",
        )
        speed = self.bias_speed
        require(speed >= 0 and math.isfinite(speed), "model.router_bias_speed", speed, "needs 0 or more")

    def _check_no_deepseek(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _DEEPSEEK_ONLY:
            value = getattr(self, name)
            require(
                value == defaults[name], f"model.{name}", value, f"{defaults[name]}: {self.family} has no such part"
            )
        require(
            self.router_bias_speed in (None, 0.0),
            "model.router_bias_speed",
            self.router_bias_speed,
            f"0: routers of {self.family} have no correction bias",
        )
