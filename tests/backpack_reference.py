"""What a Backpack computes, straight from the formulas: all of alpha, a sense network at every position, no sharing.

The oracle of both variants (METHODS §4.2 and 4.3), from logical tensors, slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from reference import reference_hidden

from xlmega.models.config import ModelConfig


@dataclass(frozen=True)
class Parts:
    """Everything between token ids and logits."""

    senses: torch.Tensor
    """C [B, K, L, D]."""
    alpha: torch.Tensor
    """[B, K, L, L]: sense, target position, source position."""
    hidden: torch.Tensor
    """o [B, L, D]."""
    logits: torch.Tensor
    """[B, L, V]."""


def reference_parts(config: ModelConfig, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> Parts:
    """C, alpha, o and the logits for ids [B, L]."""
    words = tensors["embedding.word_embeddings.weight"]
    senses = reference_senses(config, tensors, ids)
    alpha = reference_alpha(config, tensors, reference_hidden(config, tensors, ids))
    hidden = torch.zeros(*ids.shape, config.hidden_size, dtype=words.dtype)
    for sense in range(config.num_senses):
        hidden = hidden + alpha[:, sense] @ senses[:, sense]
    return Parts(senses, alpha, hidden, hidden @ words.T)


def reference_senses(config: ModelConfig, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """C [B, K, L, D]."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ tensors[f"senses.{name}.weight"].T
        return y + tensors[f"senses.{name}.bias"] if f"senses.{name}.bias" in tensors else y

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = tensors[f"senses.{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.layernorm_epsilon).sqrt()
        return x * weight + tensors[f"senses.{name}.bias"] if f"senses.{name}.bias" in tensors else x * weight

    def mlp(first: str, second: str, x: torch.Tensor) -> torch.Tensor:
        return linear(second, F.gelu(linear(first, x), approximate="tanh"))

    e = tensors["embedding.word_embeddings.weight"][ids]
    if config.backpack_variant == "original":
        residual = norm("input_layernorm", e) + e
        residual = residual + mlp("mlp.linear_fc1", "mlp.linear_fc2", norm("mlp_layernorm", residual))
        flat = mlp("expand", "output", norm("output_layernorm", residual))
    else:
        x = norm("mlp_layernorm", e + mlp("mlp.linear_fc1", "mlp.linear_fc2", e))
        flat = norm("joint_layernorm", x.repeat(1, 1, config.num_senses) + mlp("expand", "output", x))
    return torch.stack(flat.chunk(config.num_senses, dim=-1), dim=1)


def reference_alpha(config: ModelConfig, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """[B, K, L, L] from the contextualiser's normed hidden states."""
    query_key = hidden @ tensors["senses.query_key.weight"].T
    if "senses.query_key.bias" in tensors:
        query_key = query_key + tensors["senses.query_key.bias"]
    scale = math.sqrt(config.num_senses / config.hidden_size) if config.backpack_variant == "original" else 1.0
    length = hidden.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = []
    for rows in query_key.chunk(config.num_senses, dim=-1):
        query, key = rows.chunk(2, dim=-1)
        weights.append((scale * query @ key.transpose(-1, -2)).masked_fill(future, -math.inf).softmax(-1))
    return torch.stack(weights, dim=1)
