"""What stands between the two linear layers of an MLP. Torch alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from xlmega.models.config import ModelConfig

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def activation_of(model: ModelConfig) -> Activation:
    """From what fc1 gives to what fc2 takes.

    Megatron-core's own gating halves a rank's columns, so its tensors could not be cut for another tp. Here gate and
    value take turns: the gate is part of the activation, and fc1 is simply twice as wide as fc2.
    """
    one = ACTIVATIONS[model.activation]
    return functools.partial(gated, activation=one) if model.gated_mlp else one


def gated(x_LBF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[L, B, 2 F], gate and value side by side in turn, to [L, B, F]: activation(gate) * value."""
    pairs_LBF2: torch.Tensor = x_LBF.unflatten(-1, (-1, 2))
    return activation(pairs_LBF2[..., 0]) * pairs_LBF2[..., 1]
