"""Parameter groups: named sets of parameters, the unit of merge policy and of merge tasks.

Names follow the disk layout. Nothing is looked up in architecture templates: what no rule knows
falls into a group named after its module, so no tensor is ever left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_LAYER_RULES = (
    (re.compile(r"(^|\.)experts\."), "experts"),
    (re.compile(r"(^|\.)shared_experts?\."), "shared_expert"),
    (re.compile(r"(^|\.)(gate|router)\."), "router"),
    (re.compile(r"norm"), "norms"),
    (re.compile(r"(^|\.)(self_attn|attention|attn)\."), "attention"),
    (re.compile(r"(^|\.)(mlp|feed_forward|block_sparse_moe)\."), "feed_forward"),
)
_OUTER_RULES = (
    (re.compile(r"embed_tokens|(^|\.)wte\.|word_embeddings"), "embedding"),
    (re.compile(r"(^|\.)lm_head|output_layer"), "head"),
    (re.compile(r"norm"), "norm"),
)


def group_of(name: str) -> str:
    """Parameter group of the tensor ``name``, such as ``layers.3.experts`` or ``embedding``."""
    layer = _LAYER.search(name)
    if layer:
        number, inner = layer.groups()
        for pattern, label in _LAYER_RULES:
            if pattern.search(inner):
                return f"layers.{number}.{label}"
        return f"layers.{number}.{inner.split('.')[0]}"
    for pattern, label in _OUTER_RULES:
        if pattern.search(name):
            return label
    return name.split(".", maxsplit=1)[0]


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter group to its tensors, both in the order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    return groups
