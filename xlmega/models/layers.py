"""The pieces of a decoder layer that Megatron-core does not have in a form that runs everywhere.

Norms that know sequence parallelism without Apex or Transformer Engine, and a pre-norm layer with the residual adds
written out and recomputation of its own. Linear layers and their tensor parallelism are Megatron-core's. Tensors
are sequence-first; with sequence parallelism a rank holds L / tp positions between the tensor-parallel regions.

Shape letters: L positions, B windows, D hidden_size, F feed-forward width of this rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint

from xlmega.models import documents, dropout


def summed_over_sequence(parameter: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """A replicated parameter as seen by this rank's share of the positions; its gradient is summed over all shares.

    Doing the sum where the parameter is used, not before the step, makes it hold under every ZeRO stage: stages 2
    and 3 reduce gradients while the backward pass is still running.
    """
    return copy_to_tensor_model_parallel_region(parameter) if config.sequence_parallel else parameter


def enter_tensor_parallel_region(
    hidden_LBD: torch.Tensor, config: TransformerConfig, *, cut_by_position: bool = True
) -> torch.Tensor:
    """Hidden states as every rank's own part of a split computation wants them: all positions, gradients summed.

    `cut_by_position` says whether they come as this rank's share where there is sequence parallelism.
    """
    if config.sequence_parallel and cut_by_position:
        return gather_from_sequence_parallel_region(hidden_LBD, tensor_parallel_output_grad=True)  # type: ignore[no-any-return]
    return copy_to_tensor_model_parallel_region(hidden_LBD)  # type: ignore[no-any-return]


def sequence_share(config: TransformerConfig, num_positions: int) -> tuple[int, int]:
    """(first position, length of the whole sequence) of what this rank holds between tensor-parallel regions."""
    if not config.sequence_parallel:
        return 0, num_positions
    rank = parallel_state.get_tensor_model_parallel_rank()
    return rank * num_positions, num_positions * parallel_state.get_tensor_model_parallel_world_size()


class LayerNorm(torch.nn.Module):
    """Layer norm over D with Megatron-core's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, bias: bool = True, **_: Any):
        super().__init__()
        self.config = config
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        """[L, B, D] to the same shape."""
        weight = summed_over_sequence(self.weight, self.config)
        bias = None if self.bias is None else summed_over_sequence(self.bias, self.config)
        normed_LBD: torch.Tensor = F.layer_norm(hidden_LBD, weight.shape, weight, bias, self.eps)
        return normed_LBD


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over D with Megatron-core's constructor: no mean is taken off and nothing is added."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.config = config
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        """[L, B, D] to the same shape."""
        weight = summed_over_sequence(self.weight, self.config)
        normed_LBD: torch.Tensor = F.rms_norm(hidden_LBD, weight.shape, weight, self.eps)
        return normed_LBD


def recomputed(function: Any, *tensors: torch.Tensor) -> torch.Tensor:
    """function(*tensors), of which only the tensors are kept for the backward pass."""
    seed, slots = dropout.announced()
    numbers_BL = documents.announced()

    def again(*tensors: torch.Tensor) -> torch.Tensor:
        with dropout.windows(seed, slots), documents.within(numbers_BL):
            return function(*tensors)  # type: ignore[no-any-return]

    # Reentrant: under ZeRO-3 a parameter has another shape when it is gathered again, which the other form refuses.
    # No generator is saved: nothing in the layer draws from one.
    return checkpoint(again, *tensors, use_reentrant=True, preserve_rng_state=False)  # type: ignore[no-any-return]


class DecoderLayer(MegatronModule):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `parallel_residual` both from the same x.

    Recomputation is decided here: "full" keeps only the layer's input, "selective" recomputes the MLP (its 4 D wide
    activations are most of what a layer keeps once attention holds no scores).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        recompute: str = "none",
        parallel_residual: bool = False,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        """Counted from 1 over the whole model."""
        self.recompute = recompute
        self.parallel_residual = parallel_residual
        groups = ProcessGroupCollection.use_mpu_process_groups()
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(
            submodules.self_attention, config=config, layer_number=self.layer_number, pg_collection=groups
        )
        self.pre_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **norm)
        assert isinstance(submodules.mlp, ModuleSpec)
        self.mlp = build_module(submodules.mlp, config=config, tp_group=groups.tp)

    def forward(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        """[L, B, D] to the same shape."""
        recompute = self.recompute if self.training and torch.is_grad_enabled() else "none"
        if recompute == "full":
            return recomputed(self._layer, hidden_LBD)
        attended_LBD = self._attend(hidden_LBD)
        transform = functools.partial(recomputed, self._transform) if recompute == "selective" else self._transform
        return transform(attended_LBD, hidden_LBD) if self.parallel_residual else transform(attended_LBD)

    def _layer(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        attended_LBD = self._attend(hidden_LBD)
        return self._transform(attended_LBD, hidden_LBD if self.parallel_residual else None)

    def _attend(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        output_LBD, bias_D = self.self_attention(self.input_layernorm(hidden_LBD), attention_mask=None)
        return self._add(hidden_LBD, output_LBD, bias_D, "attention_output")

    def _transform(self, residual_LBD: torch.Tensor, input_LBD: torch.Tensor | None = None) -> torch.Tensor:
        """residual + mlp(norm(input)); the input is the residual itself unless it is given."""
        output_LBD, bias_D = self.mlp(self.pre_mlp_layernorm(residual_LBD if input_LBD is None else input_LBD))
        return self._add(residual_LBD, output_LBD, bias_D, "mlp_output")

    def _add(self, residual_LBD: torch.Tensor, output_LBD: torch.Tensor, bias_D: Any, site: str) -> torch.Tensor:
        if bias_D is not None:
            output_LBD = output_LBD + summed_over_sequence(bias_D, self.config)
        if self.training and self.config.hidden_dropout:
            first, total = sequence_share(self.config, output_LBD.shape[0])
            place = f"{site}/{self.layer_number}"
            p = self.config.hidden_dropout
            output_LBD = dropout.dropout(output_LBD, p, place, first_position=first, num_positions=total)
        return residual_LBD + output_LBD
