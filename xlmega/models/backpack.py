"""The senses of a Backpack: a sense network over the distinct tokens, and the mix that the contextualiser weighs.

In come the contextualiser's last hidden states, the micro-batch's token ids and the word embedding; out goes, for
every position, the sum of weighted sense vectors that the head reads. Both published variants are here, exactly:
- original (METHODS §4.2): scores scaled by 1 / sqrt(H); with e the token's embedding a = LN0(e), r = a + e,
  r' = r + MLP(LN1(r)), senses = output(gelu(expand(LN2(r'))));
- nano (§4.3): scores not scaled; x = LN1(e + MLP(e)), senses = LN(x + output(gelu(expand(x)))) with x added to each
  sense and one norm over all senses of a token together.

Tensor parallelism gives each rank K / tp senses: their queries and keys, their rows of the sense network's output, and
their part of the mix, which is summed over ranks. (Splitting every sense's width instead would have each rank form the
softmax of all senses.) What lies before the output layer is small and whole on every rank, but for the MLP. A Backpack
is all in one piece on the last pipeline stage; with more than one the word embedding there is the head's copy.
Dropout has no place here: a token has one set of senses wherever it stands.

Shape letters: L positions, B windows, K senses of this rank, H width of a sense's queries, D hidden_size, U distinct
tokens of the micro-batch, I width of the last hidden layer, R rows of the vocabulary on this rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from xlmega.models.config import ModelConfig
from xlmega.models.layers import LayerNorm, enter_tensor_parallel_region, recomputed
from xlmega.models.senses import mix_senses


class Senses(MegatronModule):
    """What turns hidden states and token ids into the sum of weighted senses."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, *, recompute: str):
        super().__init__(config=config)
        self.model, self.recompute = model, recompute
        self.num_senses = model.num_senses // config.tensor_model_parallel_size
        d, dtype = model.hidden_size, config.params_dtype
        # Distinct tokens are no sequence: nothing here is cut by position.
        whole = copy.copy(config)
        whole.sequence_parallel = False
        original = model.backpack_variant == "original"
        self.scale = (d // model.num_senses) ** -0.5 if original else 1.0
        own_width = self.num_senses * d
        self.query_key = Linear(d, 2 * own_width // model.num_senses, bias=original and model.linear_bias, dtype=dtype)
        self.mlp = MLP(
            whole,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=model.ffn_hidden_size,
            tp_group=ProcessGroupCollection.use_mpu_process_groups().tp,
        )
        self.expand = Linear(d, model.sense_intermediate_scale * d, bias=model.linear_bias, dtype=dtype)
        self.output = Linear(model.sense_intermediate_scale * d, own_width, bias=model.linear_bias, dtype=dtype)
        norm: Any = {"config": whole, "eps": model.layernorm_epsilon, "bias": model.norm_bias}
        self.mlp_layernorm = LayerNorm(hidden_size=d, **norm)
        if original:
            self.input_layernorm = LayerNorm(hidden_size=d, **norm)
            self.output_layernorm = LayerNorm(hidden_size=d, **norm)
        else:
            self.joint_layernorm = JointLayerNorm(hidden_size=own_width, **norm)

    def forward(self, hidden_LBD: torch.Tensor, tokens_BL: torch.Tensor, words_RD: torch.Tensor) -> torch.Tensor:
        """The mix [L, B, D] of all positions; `hidden_LBD` may be this rank's share of them."""
        hidden_LBD = enter_tensor_parallel_region(hidden_LBD, self.config)
        query_key_LBK2H = self.query_key(hidden_LBD).unflatten(2, (self.num_senses, 2, -1))
        distinct_U, place_BL = torch.unique(tokens_BL, return_inverse=True)
        senses_UKD = self.senses(distinct_U, words_RD)
        mixed_LBD = mix_senses(
            query_key_LBK2H[:, :, :, 0], query_key_LBK2H[:, :, :, 1], senses_UKD, place_BL, self.scale
        )
        return reduce_from_tensor_model_parallel_region(mixed_LBD)  # type: ignore[no-any-return]

    def senses(self, ids_U: torch.Tensor, words_RD: torch.Tensor) -> torch.Tensor:
        """This rank's sense vectors [U, K, D] of some tokens."""
        words_UD = embedded(ids_U, words_RD)
        recompute = self.recompute == "full" and self.training and torch.is_grad_enabled()
        network = self._original if self.model.backpack_variant == "original" else self._nano
        return recomputed(network, words_UD) if recompute else network(words_UD)

    def _original(self, words_UD: torch.Tensor) -> torch.Tensor:
        residual_UD = self.input_layernorm(words_UD) + words_UD
        residual_UD = residual_UD + self._mlp(self.mlp_layernorm(residual_UD))
        return self._expanded(self.output_layernorm(residual_UD))

    def _nano(self, words_UD: torch.Tensor) -> torch.Tensor:
        hidden_UD = self.mlp_layernorm(words_UD + self._mlp(words_UD))
        # Times one: with one sense on a rank the sum hands the same gradient to both its terms, and Megatron-core
        # (0.16.1) adds up a copied term's gradient over the ranks in place.
        each_UD = copy_to_tensor_model_parallel_region(hidden_UD) * 1.0
        return self.joint_layernorm(each_UD[:, None] + self._expanded(hidden_UD))  # type: ignore[no-any-return]

    def _mlp(self, hidden_UD: torch.Tensor) -> torch.Tensor:
        output_UD, bias_D = self.mlp(hidden_UD)
        return output_UD if bias_D is None else output_UD + bias_D  # type: ignore[no-any-return]

    def _expanded(self, hidden_UD: torch.Tensor) -> torch.Tensor:
        inner_UI = copy_to_tensor_model_parallel_region(self.config.activation_func(self.expand(hidden_UD)))
        return self.output(inner_UI).unflatten(1, (self.num_senses, -1))  # type: ignore[no-any-return]


def embedded(ids_U: torch.Tensor, words_RD: torch.Tensor) -> torch.Tensor:
    """Word embeddings [U, D] of some tokens, looked up in this rank's rows of the vocabulary."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return F.embedding(ids_U, words_RD)
    row_U = ids_U - parallel_state.get_tensor_model_parallel_rank() * words_RD.shape[0]
    mine_U = (row_U >= 0) & (row_U < words_RD.shape[0])
    words_UD = F.embedding(row_U.masked_fill(~mine_U, 0), words_RD) * mine_U[:, None]
    return reduce_from_tensor_model_parallel_region(words_UD)  # type: ignore[no-any-return]


class Linear(torch.nn.Module):
    """x W^T + b with weights that are allocated, not drawn."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(inputs, self.weight, self.bias)


class JointLayerNorm(LayerNorm):
    """Layer norm over all senses of a token together, of which this rank has some."""

    def forward(self, senses_UKD: torch.Tensor) -> torch.Tensor:
        """[U, K, D] to the same shape."""
        flat_UX = senses_UKD.flatten(1)
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        if tp_size == 1:
            normed_UX = F.layer_norm(flat_UX, self.weight.shape, self.weight, self.bias, self.eps)
        else:
            centred_UX = flat_UX.float() - self._mean(flat_UX.float(), tp_size)
            scale_U1 = (self._mean(centred_UX.square(), tp_size) + self.eps).rsqrt()
            normed_UX = (centred_UX * scale_U1).to(flat_UX.dtype) * self.weight
            normed_UX = normed_UX if self.bias is None else normed_UX + self.bias
        return normed_UX.view(senses_UKD.shape)

    @staticmethod
    def _mean(values_UX: torch.Tensor, tp_size: int) -> torch.Tensor:
        """Over all ranks' values of a token; its gradient too is summed over the ranks."""
        sum_U1 = reduce_from_tensor_model_parallel_region(values_UX.mean(1, keepdim=True) / tp_size)
        return copy_to_tensor_model_parallel_region(sum_U1)  # type: ignore[no-any-return]
