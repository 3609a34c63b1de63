"""What a logical model computes, as plainly as it can be written: the oracle that every implementation answers to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from xlmega.models.config import XGLM_POSITION_OFFSET, ModelConfig


def reference_logits(config: ModelConfig, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] for ids [B, L] from logical tensors, with no dropout. Slow, one head at a time."""
    length = ids.shape[1]
    words = tensors["embedding.word_embeddings.weight"]
    x = words[ids] * config.embedding_scale + _positions(config, tensors, length)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(config.num_layers):
        ours = {
            name.removeprefix(f"decoder.layers.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        x = x + _attention(config, ours, _norm(config, ours, "input_layernorm", x), future)
        inner = _linear(ours, "mlp.linear_fc1", _norm(config, ours, "pre_mlp_layernorm", x))
        inner = F.gelu(inner, approximate="tanh" if config.activation == "gelu_tanh" else "none")
        x = x + _linear(ours, "mlp.linear_fc2", inner)
    x = _norm(config, tensors, "decoder.final_layernorm", x)
    return x @ (words if config.tied else tensors["output_layer.weight"]).T


def _positions(config: ModelConfig, tensors: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    if config.positions == "learned":
        return tensors["embedding.position_embeddings.weight"][:length]
    half = config.hidden_size // 2
    freq = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angle = (torch.arange(length) + XGLM_POSITION_OFFSET)[:, None] * freq[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _attention(
    config: ModelConfig, ours: Mapping[str, torch.Tensor], x: torch.Tensor, future: torch.Tensor
) -> torch.Tensor:
    per_head = _linear(ours, "self_attention.linear_qkv", x).chunk(config.num_heads, dim=-1)
    outputs = []
    for head in per_head:
        q, k, v = head.chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
    return _linear(ours, "self_attention.linear_proj", torch.cat(outputs, dim=-1))


def _norm(config: ModelConfig, tensors: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(
        x, (config.hidden_size,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], config.layernorm_epsilon
    )


def _linear(tensors: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
