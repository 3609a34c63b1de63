"""A logical Backpack's senses, and what is made of them, on torch alone: the part that `weights.forward` has not.

In: a ModelConfig, a function that gives the tensor of a logical name, and token ids or the contextualiser's hidden
states. Out: sense vectors C, weights alpha and the mix. The trained decoder (`models.backpack`) computes the same.
Source: METHODS §4.2 and 4.3.

Shape letters: B windows, L positions, N tokens, U distinct tokens, V vocabulary, K senses, H width of a sense's
queries, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from xlmega.errors import ConfigError
from xlmega.models.activations import activation_of
from xlmega.models.config import ModelConfig
from xlmega.weights.names import WORD_EMBEDDING

Read = Callable[[str], torch.Tensor]
# Tokens whose senses are computed at a time.
TOGETHER = 1024


def check_backpack(config: ModelConfig) -> None:
    """Refuse a model that has no senses."""
    if not config.backpack_variant:
        raise ConfigError(f"the model has no senses: its family is '{config.family}', and only a 'backpack' has them.")


@torch.inference_mode()
def sense_vectors(config: ModelConfig, read: Read, ids_N: torch.Tensor) -> torch.Tensor:
    """C [N, K, D] of some tokens."""
    check_backpack(config)
    words_ND = read(WORD_EMBEDDING)[ids_N]
    parts = [_network(config, read, words_nD) for words_nD in words_ND.split(TOGETHER)]
    return torch.cat(parts)


def _network(config: ModelConfig, read: Read, words_ND: torch.Tensor) -> torch.Tensor:
    shapes = config.sense_shapes()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        bias = f"senses.{name}.bias"
        return F.linear(x, read(f"senses.{name}.weight"), read(bias) if bias in shapes else None)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = f"senses.{name}.weight", f"senses.{name}.bias"
        return F.layer_norm(
            x, shapes[weight], read(weight), read(bias) if bias in shapes else None, config.layernorm_epsilon
        )

    gelu = activation_of(config)
    shape = (len(words_ND), config.num_senses, config.hidden_size)
    if config.backpack_variant == "original":
        residual_ND = norm("input_layernorm", words_ND) + words_ND
        inner = gelu(linear("mlp.linear_fc1", norm("mlp_layernorm", residual_ND)))
        residual_ND = residual_ND + linear("mlp.linear_fc2", inner)
        return linear("output", gelu(linear("expand", norm("output_layernorm", residual_ND)))).view(shape)
    x_ND = words_ND + linear("mlp.linear_fc2", gelu(linear("mlp.linear_fc1", words_ND)))
    x_ND = norm("mlp_layernorm", x_ND)
    flat = linear("output", gelu(linear("expand", x_ND)))
    return norm("joint_layernorm", x_ND.repeat(1, config.num_senses) + flat).view(shape)


def queries_and_keys(config: ModelConfig, read: Read, hidden_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, K, L, H] each; queries are scaled."""
    bias = "senses.query_key.bias"
    query_key_BLX = F.linear(
        hidden_BLD, read("senses.query_key.weight"), read(bias) if bias in config.sense_shapes() else None
    )
    query_BKLH, key_BKLH = query_key_BLX.unflatten(2, (config.num_senses, 2, -1)).permute(3, 0, 2, 1, 4)
    scale = (config.num_senses / config.hidden_size) ** 0.5 if config.backpack_variant == "original" else 1.0
    return query_BKLH * scale, key_BKLH


def alpha_of(query_xLH: torch.Tensor, key_xLH: torch.Tensor) -> torch.Tensor:
    """Weights [..., L, L] over earlier positions, formed in fp32."""
    scores_xLL = (query_xLH @ key_xLH.transpose(-1, -2)).float()
    length = scores_xLL.shape[-1]
    future_LL = torch.ones(length, length, dtype=torch.bool, device=scores_xLL.device).triu(1)
    return scores_xLL.masked_fill(future_LL, float("-inf")).softmax(-1).to(query_xLH.dtype)


@torch.inference_mode()
def mixed(
    config: ModelConfig,
    read: Read,
    hidden_BLD: torch.Tensor,
    ids_BL: torch.Tensor,
    factors_VK: torch.Tensor | None = None,
) -> torch.Tensor:
    """o [B, L, D], one sense in memory at a time; `factors_VK` multiplies each sense of each token (steering)."""
    mixed_BLD = torch.zeros_like(hidden_BLD)
    for part_BLD in _each(config, read, hidden_BLD, ids_BL, factors_VK):
        mixed_BLD += part_BLD
    return mixed_BLD


def _each(
    config: ModelConfig, read: Read, hidden_BLD: torch.Tensor, ids_BL: torch.Tensor, factors_VK: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """[B, L, D]: what each sense in turn adds to the mix."""
    distinct_U, places_BL = torch.unique(ids_BL, return_inverse=True)
    senses_UKD = sense_vectors(config, read, distinct_U)
    if factors_VK is not None:
        senses_UKD = senses_UKD * factors_VK.to(senses_UKD)[distinct_U, :, None]
    query_BKLH, key_BKLH = queries_and_keys(config, read, hidden_BLD)
    for sense in range(config.num_senses):
        yield alpha_of(query_BKLH[:, sense], key_BKLH[:, sense]) @ senses_UKD[:, sense][places_BL]
