"""What a logical model computes, as plainly as it can be written: the oracle that every implementation answers to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from xlmega.models.config import XGLM_POSITION_OFFSET, ModelConfig


def reference_logits(config: ModelConfig, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] for ids [B, L] from logical tensors, with no dropout. Slow, one head at a time."""
    x = reference_hidden(config, tensors, ids)
    return x @ (tensors["embedding.word_embeddings.weight"] if config.tied else tensors["output_layer.weight"]).T


def reference_hidden(config: ModelConfig, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, D] after the last norm."""
    length = ids.shape[1]
    words = tensors["embedding.word_embeddings.weight"]
    x = words[ids] * config.embedding_scale + _positions(config, tensors, length)
    if config.embedding_norm:
        x = _norm(config, tensors, "embedding.layernorm", x)
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."
        ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        attended = _attention(config, ours, _norm(config, ours, "input_layernorm", x), layer + 1)
        if config.parallel_residual:
            x = x + attended + _mlp(config, ours, _norm(config, ours, "pre_mlp_layernorm", x))
        else:
            x = x + attended
            x = x + _mlp(config, ours, _norm(config, ours, "pre_mlp_layernorm", x))
    return _norm(config, tensors, "decoder.final_layernorm", x)


def _positions(config: ModelConfig, tensors: Mapping[str, torch.Tensor], length: int) -> torch.Tensor:
    if config.positions == "learned":
        return tensors["embedding.position_embeddings.weight"][:length]
    if config.positions in ("rotary", "alibi"):
        return torch.zeros(())
    half = config.hidden_size // 2
    freq = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    angle = (torch.arange(length) + XGLM_POSITION_OFFSET)[:, None] * freq[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _attention(config: ModelConfig, ours: Mapping[str, torch.Tensor], x: torch.Tensor, layer: int) -> torch.Tensor:
    length = x.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    queries_each = config.num_heads // config.kv_heads
    per_group = _linear(ours, "self_attention.linear_qkv", x).chunk(config.kv_heads, dim=-1)
    outputs = []
    for group, rows in enumerate(per_group):
        *queries, k, v = rows.split(config.head_dim, dim=-1)
        assert len(queries) == queries_each
        for index, q in enumerate(queries):
            scores = _rotated(config, q) @ _rotated(config, k).transpose(-1, -2) / math.sqrt(config.head_dim)
            if config.layer_scaled_attention:
                scores = scores / layer
            if config.positions == "alibi":
                slope = _alibi_slope(config.num_heads, group * queries_each + index)
                scores = scores + slope * (torch.arange(length)[None, :] - torch.arange(length)[:, None])
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
    return _linear(ours, "self_attention.linear_proj", torch.cat(outputs, dim=-1))


def _rotated(config: ModelConfig, head: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + n / 2) of the first n dimensions, as a complex number, turned by position * base^(-2 i / n)."""
    if config.positions != "rotary":
        return head
    n = int(config.head_dim * config.rotary_fraction)
    first, second, rest = head[..., : n // 2], head[..., n // 2 : n], head[..., n:]
    angles = torch.arange(head.shape[1])[:, None] * config.rotary_base ** (-2 * torch.arange(n // 2) / n)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, rest], dim=-1)


def _alibi_slope(num_heads: int, head: int) -> float:
    power = 1 << (num_heads.bit_length() - 1)
    if head < power:
        return 2.0 ** (-8 * (head + 1) / power)
    return 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def _mlp(config: ModelConfig, ours: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    inner = _linear(ours, "mlp.linear_fc1", x)
    if config.gated_mlp:
        inner = _activation(config, inner[..., 0::2]) * inner[..., 1::2]
    else:
        inner = _activation(config, inner)
    return _linear(ours, "mlp.linear_fc2", inner)


def _activation(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    if config.activation == "silu":
        return x * torch.sigmoid(x)
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def _norm(config: ModelConfig, tensors: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    if config.norm == "rmsnorm":
        mean_square = x.square().mean(-1, keepdim=True)
        return x / (mean_square + config.layernorm_epsilon).sqrt() * tensors[f"{name}.weight"]
    bias = tensors[f"{name}.bias"] if config.norm_bias else None
    return F.layer_norm(x, (config.hidden_size,), tensors[f"{name}.weight"], bias, config.layernorm_epsilon)


def _linear(tensors: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    product = x @ tensors[f"{name}.weight"].T
    return product + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else product
