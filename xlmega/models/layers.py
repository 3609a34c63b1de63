"""The pieces of a decoder layer that Megatron-core does not have in a form that runs everywhere.

A layer norm that knows sequence parallelism without Apex or Transformer Engine, attention that never holds the score
matrix, and a pre-norm layer with the residual adds written out. Linear layers and their tensor parallelism are
Megatron-core's. Tensors are sequence-first; with sequence parallelism a rank holds L / tp positions between the
tensor-parallel regions.

Shape letters: L positions, B windows, D hidden_size, H heads of this rank, K head_dim.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.utils.checkpoint import checkpoint

from xlmega.models import dropout


def summed_over_sequence(parameter: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """A replicated parameter as seen by this rank's share of the positions; its gradient is summed over all shares.

    Doing the sum where the parameter is used, not before the step, makes it hold under every ZeRO stage: stages 2
    and 3 reduce gradients while the backward pass is still running.
    """
    return copy_to_tensor_model_parallel_region(parameter) if config.sequence_parallel else parameter


def sequence_share(config: TransformerConfig, num_positions: int) -> tuple[int, int]:
    """(first position, length of the whole sequence) of what this rank holds between tensor-parallel regions."""
    if not config.sequence_parallel:
        return 0, num_positions
    rank = parallel_state.get_tensor_model_parallel_rank()
    return rank * num_positions, num_positions * parallel_state.get_tensor_model_parallel_world_size()


class LayerNorm(torch.nn.Module):
    """Layer norm over D with Megatron-core's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.config = config
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        """[L, B, D] to the same shape."""
        weight = summed_over_sequence(self.weight, self.config)
        bias = summed_over_sequence(self.bias, self.config)
        return F.layer_norm(hidden_LBD, weight.shape, weight, bias, self.eps)


LOG2_E = math.log2(math.e)
# Scores in fp32 of one step of the blockwise attention: what stays in a core's cache while it is passed over.
SCORE_BYTES = 2**21
BLOCK_POSITIONS = 128


@contextlib.contextmanager
def _fp32_from_bf16() -> Iterator[None]:
    """Products of fp32 tensors run on the bf16 units: exact where every entry is a bf16 number, at twice the speed."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch before 2.9 has no such switch
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@functools.lru_cache
def _kernel_is_slow() -> bool:
    """Whether torch's own CPU attention in bf16 is left to MKL, which reaches 100 GFLOP/s where oneDNN reaches 450.

    With AMX torch packs its blocks and is fast. Measured with torch 2.13 on a Zen 5 core: 135 ms against 50 ms.
    """
    return not torch.cpu._is_amx_tile_supported()


class _BlockwiseAttention(torch.autograd.Function):
    """Causal attention in bf16 on a CPU, a block of queries of some heads at a time; scores are formed in fp32.

    Kept for the backward pass: queries, keys, values, the output, and the log of each query's sum. With S the scores
    (in units of log 2, so that exp2 serves: torch's exp takes five times as long), P = exp2(S - log sum) and
    dS = P (dO V^T - sum(dO O)).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query, key, value [L, B, H, K] to [L, B, H, K]."""
        length, batch, heads, _ = query.shape
        output_LBHK = torch.empty_like(value, memory_format=torch.contiguous_format)
        log_sum_BHL = torch.empty(batch, heads, length)
        blocks = _Blocks(query)
        with _fp32_from_bf16():
            for window, some in blocks.groups():
                query_HLK, key_HLK = _heads(query, window, some).float(), _heads(key, window, some).float()
                value_HLK = _heads(value, window, some)
                for rows in blocks.rows():
                    scores = blocks.scores(query_HLK, key_HLK, rows)
                    top = scores.amax(-1, keepdim=True)
                    scores.sub_(top).exp2_()
                    total = scores.sum(-1, keepdim=True)
                    mixed_HlK = torch.bmm(blocks.low(scores), value_HLK[:, : rows.stop])
                    output_LBHK[rows, window, some] = (mixed_HlK / total).transpose(0, 1)
                    log_sum_BHL[window, some, rows] = total.log2_().add_(top)[:, :, 0]
        ctx.save_for_backward(query, key, value, output_LBHK, log_sum_BHL)
        return output_LBHK

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, output, log_sum_BHL = ctx.saved_tensors
        blocks = _Blocks(query)
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
        with _fp32_from_bf16():
            for window, some in blocks.groups():
                query_HLK, key_HLK = _heads(query, window, some), _heads(key, window, some)
                query_32, key_32 = query_HLK.float(), key_HLK.float()
                value_32 = _heads(value, window, some).float()
                d_HLK = _heads(gradients[0], window, some)
                d_32 = d_HLK.float()
                delta_HL1 = (d_32 * _heads(output, window, some)).sum(-1, keepdim=True)
                d_key_HLK, d_value_HLK = torch.zeros_like(query_32), torch.zeros_like(query_32)
                for rows in blocks.rows():
                    seen = slice(0, rows.stop)
                    scores = blocks.scores(query_32, key_32, rows)
                    weights = scores.sub_(log_sum_BHL[window, some, rows, None]).exp2_()
                    d_scores = torch.bmm(d_32[:, rows], _columns(value_32, seen), out=blocks.second(scores))
                    d_scores.sub_(delta_HL1[:, rows]).mul_(weights)
                    d_value_HLK[:, seen] += torch.bmm(blocks.low(weights).mT, d_HLK[:, rows])
                    low = blocks.low(d_scores)
                    d_key_HLK[:, seen] += torch.bmm(low.mT, query_HLK[:, rows])
                    d_rows = torch.bmm(low, key_HLK[:, seen])
                    d_query[rows, window, some] = d_rows.mul_(blocks.scale).transpose(0, 1)
                d_key[:, window, some] = d_key_HLK.mul_(blocks.scale).transpose(0, 1)
                d_value[:, window, some] = d_value_HLK.transpose(0, 1)
        return d_query, d_key, d_value


class _Blocks:
    """How the scores [B, H, L, L] are walked through, and the buffers that every step of the walk uses again."""

    def __init__(self, query: torch.Tensor):
        self.length, self.batch, self.heads, width = query.shape
        self.scale = width**-0.5
        self.step = min(BLOCK_POSITIONS, self.length)
        self.together = max(1, min(self.heads, SCORE_BYTES // (4 * self.step * self.length)))
        size = self.together * self.step * self.length
        self._scores, self._second = torch.empty(size), torch.empty(size)
        self._low = torch.empty(size, dtype=query.dtype)
        self._future = torch.full((self.step, self.step), float("-inf")).triu_(1)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """(window, some of its heads)."""
        for window in range(self.batch):
            for head in range(0, self.heads, self.together):
                yield window, slice(head, min(head + self.together, self.heads))

    def rows(self) -> Iterator[slice]:
        """Blocks of queries; each sees the keys up to its own end."""
        for start in range(0, self.length, self.step):
            yield slice(start, min(start + self.step, self.length))

    def scores(self, query_HLK: torch.Tensor, key_HLK: torch.Tensor, rows: slice) -> torch.Tensor:
        """fp32 scores of these queries with all keys up to the last of them, times log2(e); -inf for the future."""
        count = rows.stop - rows.start
        scores = self._scores[: len(query_HLK) * count * rows.stop].view(-1, count, rows.stop)
        keys_HKl = _columns(key_HLK, slice(0, rows.stop))
        torch.baddbmm(scores, query_HLK[:, rows], keys_HKl, beta=0, alpha=self.scale * LOG2_E, out=scores)
        scores[:, :, rows] += self._future[:count, :count]
        return scores

    def second(self, like: torch.Tensor) -> torch.Tensor:
        """Another fp32 buffer of this shape."""
        return self._second[: like.numel()].view(like.shape)

    def low(self, values: torch.Tensor) -> torch.Tensor:
        """The values in bf16; the next call overwrites them."""
        return self._low[: values.numel()].view(values.shape).copy_(values)


def _heads(tensor: torch.Tensor, window: int, some: slice) -> torch.Tensor:
    """[L, B, H, K] to [some of H, L, K] of one window, contiguous."""
    return tensor[:, window, some].transpose(0, 1).contiguous()


def _columns(tensor_HLK: torch.Tensor, positions: slice) -> torch.Tensor:
    """[H, L, K] to [H, K, some of L]: a transposed view of a copy, since torch copies a view of a part anew, slowly."""
    return tensor_HLK[:, positions].contiguous().mT


class CausalAttention(MegatronModule):
    """Core attention that never holds the scores of a layer: `scaled_dot_product_attention`, or blockwise on a CPU.

    With attention dropout the scores are formed after all, one window at a time: torch's own dropout would draw from a
    generator that knows ranks.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any):
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query, key, value [L, B, H, K] to [L, B, H * K]."""
        drops_out = bool(self.config.attention_dropout and dropout.announced()[1] is not None)
        on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
        if on_cpu and not drops_out and _kernel_is_slow():
            return _BlockwiseAttention.apply(query, key, value).flatten(2)  # type: ignore[no-any-return]
        query_BHLK, key_BHLK, value_BHLK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if drops_out:
            mixed_BHLK = self._with_dropout(query_BHLK, key_BHLK, value_BHLK)
        else:
            mixed_BHLK = F.scaled_dot_product_attention(query_BHLK, key_BHLK, value_BHLK, is_causal=True)
        return mixed_BHLK.permute(2, 0, 1, 3).flatten(2)

    def _with_dropout(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads, length = query.shape[1:3]
        first_head = heads * parallel_state.get_tensor_model_parallel_rank()
        future_LL = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        p = self.config.attention_dropout
        mixed = []
        for window, slot in enumerate(dropout.announced()[1] or ()):
            scores_HLL = query[window] @ key[window].transpose(-1, -2) / query.shape[-1] ** 0.5
            weights_HLL = scores_HLL.masked_fill(future_LL, float("-inf")).float().softmax(-1)
            keep_HLL = torch.stack(
                [
                    dropout.keep_mask((length, length), p, f"attention/{self.layer_number}/{head}", slot, query.device)
                    for head in range(first_head, first_head + heads)
                ]
            )
            mixed.append((weights_HLL * keep_HLL / (1.0 - p)).to(value.dtype) @ value[window])
        return torch.stack(mixed)


class DecoderLayer(MegatronModule):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Recomputation is decided here: "full" keeps only the layer's input, "selective" recomputes the MLP (its 4 D wide
    activations are most of what a layer keeps once attention holds no scores).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        recompute: str = "none",
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        """Counted from 1 over the whole model."""
        self.recompute = recompute
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
            return self._recomputed(self._layer, hidden_LBD)
        hidden_LBD = self._attend(hidden_LBD)
        if recompute == "selective":
            return self._recomputed(self._transform, hidden_LBD)
        return self._transform(hidden_LBD)

    def _layer(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        return self._transform(self._attend(hidden_LBD))

    def _attend(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        output_LBD, bias_D = self.self_attention(self.input_layernorm(hidden_LBD), attention_mask=None)
        return self._add(hidden_LBD, output_LBD, bias_D, "attention_output")

    def _transform(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        output_LBD, bias_D = self.mlp(self.pre_mlp_layernorm(hidden_LBD))
        return self._add(hidden_LBD, output_LBD, bias_D, "mlp_output")

    def _add(self, residual_LBD: torch.Tensor, output_LBD: torch.Tensor, bias_D: Any, site: str) -> torch.Tensor:
        if bias_D is not None:
            output_LBD = output_LBD + summed_over_sequence(bias_D, self.config)
        if self.training and self.config.hidden_dropout:
            first, total = sequence_share(self.config, output_LBD.shape[0])
            place = f"{site}/{self.layer_number}"
            p = self.config.hidden_dropout
            output_LBD = dropout.dropout(output_LBD, p, place, first_position=first, num_positions=total)
        return residual_LBD + output_LBD

    @staticmethod
    def _recomputed(function: Any, hidden_LBD: torch.Tensor) -> torch.Tensor:
        seed, slots = dropout.announced()

        def again(hidden_LBD: torch.Tensor) -> torch.Tensor:
            with dropout.windows(seed, slots):
                return function(hidden_LBD)  # type: ignore[no-any-return]

        # Reentrant: under ZeRO-3 a parameter has another shape when it is gathered again, which the other form refuses.
        # No generator is saved: nothing in the layer draws from one.
        return checkpoint(again, hidden_LBD, use_reentrant=True, preserve_rng_state=False)  # type: ignore[no-any-return]
