"""The forward pass of a logical model on torch alone: no process group, no Megatron, one device.

In: LogicalTensors of any family. Out: hidden states and logits in the dtype that is asked for. It is what scores text
and what exports are compared with; training has its own (`models.decoder`), and the tests hold the two together.
Weights are kept (`resident`), or read again for every pass, a layer at a time, where the model is larger than memory.

Shape letters: B texts, L positions, D hidden_size, V vocabulary, G heads of keys, Q queries of each, K head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from xlmega.models.activations import activation_of
from xlmega.models.config import ModelConfig
from xlmega.models.positions import alibi_slopes, rotated, sinusoidal_positions
from xlmega.weights.backpack_forward import mixed
from xlmega.weights.names import OUTPUT_LAYER, POSITION_EMBEDDING, WORD_EMBEDDING, LogicalTensors


class PlainModel(Protocol):
    """What a family's forward pass offers."""

    @property
    def config(self) -> ModelConfig: ...

    def hidden(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, D]: what the head is applied to."""
        ...

    def head(self) -> torch.Tensor:
        """[V, D]."""
        ...


class PlainDecoder:
    """A decoder of any family."""

    def __init__(
        self,
        source: LogicalTensors,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        resident: bool = True,
        sense_factors_VK: torch.Tensor | None = None,
    ) -> None:
        self.config = source.config
        self._sense_factors_VK = sense_factors_VK
        self._source, self._dtype, self._device, self._resident = source, dtype, torch.device(device), resident
        self._kept: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def hidden(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, D] behind the final norm; of a Backpack the mix of senses."""
        hidden_BLD = self.contextualised(ids_BL)
        if not self.config.backpack_variant:
            return hidden_BLD
        return mixed(self.config, self._tensor, hidden_BLD, ids_BL.to(self._device), self._sense_factors_VK)

    @torch.inference_mode()
    def contextualised(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, D] behind the final norm."""
        config, ids_BL = self.config, ids_BL.to(self._device)
        hidden_BLD = F.embedding(ids_BL, self._tensor(WORD_EMBEDDING)) * config.embedding_scale
        length = ids_BL.shape[1]
        if config.positions == "learned":
            hidden_BLD = hidden_BLD + self._tensor(POSITION_EMBEDDING)[:length]
        elif config.positions == "sinusoidal":
            hidden_BLD = hidden_BLD + sinusoidal_positions(length, config.hidden_size).to(hidden_BLD)
        if config.embedding_norm:
            hidden_BLD = self._norm("embedding.layernorm", hidden_BLD)
        for layer in range(config.num_layers):
            hidden_BLD = self._layer(layer, hidden_BLD)
        return self._norm("decoder.final_layernorm", hidden_BLD)

    def head(self) -> torch.Tensor:
        """[V, D]."""
        return self._tensor(WORD_EMBEDDING if self.config.tied else OUTPUT_LAYER)

    @torch.inference_mode()
    def logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V]."""
        return F.linear(self.hidden(ids_BL), self.head())

    def _layer(self, layer: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        name = f"decoder.layers.{layer}."
        attended_BLD = hidden_BLD + self._attention(
            f"{name}self_attention.", layer, self._norm(f"{name}input_layernorm", hidden_BLD)
        )
        source_BLD = hidden_BLD if self.config.parallel_residual else attended_BLD
        inner = self._linear(f"{name}mlp.linear_fc1", self._norm(f"{name}pre_mlp_layernorm", source_BLD))
        return attended_BLD + self._linear(f"{name}mlp.linear_fc2", activation_of(self.config)(inner))

    def _attention(self, name: str, layer: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        config = self.config
        groups = (config.kv_heads, config.num_heads // config.kv_heads + 2, config.head_dim)
        rows_LBGxK = self._linear(f"{name}linear_qkv", hidden_BLD).unflatten(2, groups).transpose(0, 1)
        query, key, value = rows_LBGxK.split([groups[1] - 2, 1, 1], dim=3)
        query, key, value = (part.flatten(2, 3) for part in (query, key, value))  # [L, B, heads, K]
        if config.positions == "rotary":
            query, key = (rotated(part, config.rotary_dim, config.rotary_base) for part in (query, key))
        key, value = (part.repeat_interleave(groups[1] - 2, dim=2) for part in (key, value))
        scale = config.head_dim**-0.5 / (layer + 1 if config.layer_scaled_attention else 1)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if config.positions == "alibi":
            mixed_BHLK = F.scaled_dot_product_attention(query, key, value, self._alibi(hidden_BLD), scale=scale)
        else:
            mixed_BHLK = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return self._linear(f"{name}linear_proj", mixed_BHLK.transpose(1, 2).flatten(2))

    def _alibi(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """[H, L, L]: minus infinity for the future, else slope times (key's place - query's place)."""
        places = torch.arange(hidden_BLD.shape[1], dtype=torch.float32, device=self._device)
        distance_LL = places[None, :] - places[:, None]
        bias_HLL = alibi_slopes(self.config.num_heads).to(self._device)[:, None, None] * distance_LL
        return bias_HLL.masked_fill(distance_LL > 0, float("-inf")).to(hidden_BLD.dtype)

    def _norm(self, name: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        shape, weight, epsilon = (
            (self.config.hidden_size,),
            self._tensor(f"{name}.weight"),
            self.config.layernorm_epsilon,
        )
        if self.config.norm == "rmsnorm":
            return F.rms_norm(hidden_BLD, shape, weight, epsilon)
        bias = self._tensor(f"{name}.bias") if self.config.norm_bias else None
        return F.layer_norm(hidden_BLD, shape, weight, bias, epsilon)

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        bias = self._tensor(f"{name}.bias") if self.config.linear_bias else None
        return F.linear(inputs, self._tensor(f"{name}.weight"), bias)

    def _tensor(self, name: str) -> torch.Tensor:
        found = self._kept.get(name)
        if found is None:
            found = self._source.read(name).to(self._device, self._dtype)
            if self._resident:
                self._kept[name] = found
        return found


def plain_model(
    source: LogicalTensors,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    resident: bool = True,
    sense_factors_VK: torch.Tensor | None = None,
) -> PlainModel:
    """The forward pass of a model, whatever its family; the factors are by what senses of a Backpack are multiplied."""
    return PlainDecoder(source, dtype=dtype, device=device, resident=resident, sense_factors_VK=sense_factors_VK)
