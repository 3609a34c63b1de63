"""Causal attention that never holds the scores of a layer.

In come queries, keys and values of this rank's heads; out goes their mix. The work is torch's
`scaled_dot_product_attention`, except in two places: a blockwise form of our own on a CPU without AMX, where torch's
bf16 kernel is slow, and a plain one with attention dropout, where masks must belong to windows and not to ranks.

Shape letters: L positions, B windows, H heads of this rank, K head_dim; N is B x H.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from xlmega.models import documents, dropout
from xlmega.models.config import ModelConfig
from xlmega.models.positions import alibi_slopes, rotated

LOG2_E = math.log2(math.e)
# Scores in fp32 of one step of the blockwise attention: what stays in the caches while it is passed over.
SCORE_BYTES = 2**22
BLOCK_POSITIONS = 128


@contextlib.contextmanager
def fp32_from_bf16() -> Iterator[None]:
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

    With AMX torch packs its blocks and is left to it. On two cores with avx512_bf16 (torch 2.13) a layer of 8 x 512
    tokens and d 512 takes 70 ms there and 35 ms here.
    """
    return not torch.cpu._is_amx_tile_supported()


class _BlockwiseAttention(torch.autograd.Function):
    """Causal attention in bf16 on a CPU, a block of queries of some heads at a time; scores are formed in fp32.

    Kept for the backward pass: queries, keys, values, the output, and the log of each query's sum. With S the scores
    (in units of log 2, so that exp2 serves: torch's exp takes five times as long), P = exp2(S - log sum) and
    dS = P (dO V^T - sum(dO O)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        slopes_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """query, key, value [L, B, H, K] to [L, B, H, K]; slopes_H are ALiBi's."""
        output_LNK = torch.empty(value.flatten(1, 2).shape, dtype=value.dtype)
        blocks = _Blocks(query, scale, slopes_H)
        log_sum_NL = torch.empty(blocks.num_heads, blocks.length)
        with fp32_from_bf16():
            for some in blocks.groups():
                query_NLK, key_NLK, value_NLK = (_heads(x, some) for x in (query, key, value))
                query_NLK, key_NLK = query_NLK.float(), key_NLK.float()
                for rows in blocks.rows():
                    scores = blocks.scores(query_NLK, key_NLK, rows, some)
                    top = scores.amax(-1, keepdim=True)
                    scores.sub_(top).exp2_()
                    total = scores.sum(-1, keepdim=True)
                    mixed_NlK = torch.bmm(blocks.low(scores), value_NLK[:, : rows.stop])
                    output_LNK[rows, some] = (mixed_NlK / total).transpose(0, 1)
                    log_sum_NL[some, rows] = total.log2_().add_(top)[:, :, 0]
        output = output_LNK.view(value.shape)
        ctx.save_for_backward(query, key, value, output, log_sum_NL)
        ctx.scale, ctx.slopes_H = scale, slopes_H
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sum_NL = ctx.saved_tensors
        blocks = _Blocks(query, ctx.scale, ctx.slopes_H)
        d_query, d_key, d_value = (torch.empty(x.flatten(1, 2).shape, dtype=x.dtype) for x in (query, key, value))
        with fp32_from_bf16():
            for some in blocks.groups():
                query_NLK, key_NLK, d_NLK = (_heads(x, some) for x in (query, key, gradients[0]))
                query_32, key_32, d_32 = query_NLK.float(), key_NLK.float(), d_NLK.float()
                value_32 = _heads(value, some).float()
                delta_NL1 = (d_32 * _heads(output, some)).sum(-1, keepdim=True)
                d_key_NLK, d_value_NLK = torch.zeros_like(query_32), torch.zeros_like(query_32)
                for rows in blocks.rows():
                    seen = slice(0, rows.stop)
                    scores = blocks.scores(query_32, key_32, rows, some)
                    weights = scores.sub_(log_sum_NL[some, rows, None]).exp2_()
                    d_scores = torch.bmm(d_32[:, rows], _columns(value_32, seen), out=blocks.second(scores))
                    d_scores.sub_(delta_NL1[:, rows]).mul_(weights)
                    d_value_NLK[:, seen] += torch.bmm(blocks.low(weights).mT, d_NLK[:, rows])
                    low = blocks.low(d_scores)
                    d_key_NLK[:, seen] += torch.bmm(low.mT, query_NLK[:, rows])
                    d_rows_NlK = torch.bmm(low, key_NLK[:, seen])
                    d_query[rows, some] = d_rows_NlK.mul_(blocks.scale).transpose(0, 1)
                d_key[:, some] = d_key_NLK.mul_(blocks.scale).transpose(0, 1)
                d_value[:, some] = d_value_NLK.transpose(0, 1)
        return d_query.view(query.shape), d_key.view(key.shape), d_value.view(value.shape), None, None


class _Blocks:
    """How the scores [N, L, L] are walked through, and the buffers that every step of the walk uses again."""

    def __init__(self, query: torch.Tensor, scale: float, slopes_H: torch.Tensor | None):
        self.length = query.shape[0]
        self.num_heads = query.shape[1] * query.shape[2]
        """Heads of all windows, N."""
        self.scale = scale
        self._slopes_N11 = None if slopes_H is None else slopes_H.repeat(query.shape[1])[:, None, None] * LOG2_E
        self.step = min(BLOCK_POSITIONS, self.length)
        self.together = max(1, min(self.num_heads, SCORE_BYTES // (4 * self.step * self.length)))
        size = self.together * self.step * self.length
        self._scores, self._second = torch.empty(size), torch.empty(size)
        self._low = torch.empty(size, dtype=query.dtype)
        self._future = torch.full((self.step, self.step), float("-inf")).triu_(1)
        self._places_L = torch.arange(self.length, dtype=torch.float32)

    def groups(self) -> Iterator[slice]:
        """Some heads at a time."""
        for head in range(0, self.num_heads, self.together):
            yield slice(head, min(head + self.together, self.num_heads))

    def rows(self) -> Iterator[slice]:
        """Blocks of queries; each sees the keys up to its own end."""
        for start in range(0, self.length, self.step):
            yield slice(start, min(start + self.step, self.length))

    def scores(self, query_NLK: torch.Tensor, key_NLK: torch.Tensor, rows: slice, some: slice) -> torch.Tensor:
        """fp32 scores of these queries with all keys up to the last of them, times log2(e); -inf for the future."""
        count = rows.stop - rows.start
        scores = self._scores[: len(query_NLK) * count * rows.stop].view(-1, count, rows.stop)
        keys_NKl = _columns(key_NLK, slice(0, rows.stop))
        torch.baddbmm(scores, query_NLK[:, rows], keys_NKl, beta=0, alpha=self.scale * LOG2_E, out=scores)
        if self._slopes_N11 is not None:
            # Distances to the block's last query: what a row gains over ALiBi's own is the same for all its keys.
            scores += self._slopes_N11[some] * (self._places_L[: rows.stop] - (rows.stop - 1))
        scores[:, :, rows] += self._future[:count, :count]
        return scores

    def second(self, like: torch.Tensor) -> torch.Tensor:
        """Another fp32 buffer of this shape."""
        return self._second[: like.numel()].view(like.shape)

    def low(self, values: torch.Tensor) -> torch.Tensor:
        """The values in bf16; the next call overwrites them."""
        return self._low[: values.numel()].view(values.shape).copy_(values)


def _heads(tensor: torch.Tensor, some: slice) -> torch.Tensor:
    """[L, B, H, K] to [some of B * H, L, K], contiguous."""
    return tensor.flatten(1, 2)[:, some].transpose(0, 1).contiguous()


def _columns(tensor_NLK: torch.Tensor, positions: slice) -> torch.Tensor:
    """[N, L, K] to [N, K, some of L]: a transposed view of a copy, since torch copies a view of a part anew, slowly."""
    return tensor_NLK[:, positions].contiguous().mT


@functools.lru_cache(maxsize=4)
def _alibi_mask(slopes: tuple[float, ...], length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, H, L, L]: minus slope times distance, -inf for the future."""
    with torch.inference_mode(False):
        places_L = torch.arange(length, dtype=torch.float32, device=device)
        distance_LL = places_L[:, None] - places_L
        mask_HLL = -torch.tensor(slopes, device=device)[:, None, None] * distance_LL
        return mask_HLL.masked_fill(distance_LL < 0, float("-inf")).to(dtype)[None]


@dataclass(frozen=True)
class AttentionForm:
    """What a model's attention does beyond mixing values by scores."""

    num_heads: int
    """Of the whole model: ALiBi's slopes depend on it."""
    rotary_dim: int
    """0 without rotary positions."""
    rotary_base: float
    alibi: bool
    layer_scaled: bool

    @classmethod
    def of(cls, model: ModelConfig) -> AttentionForm:
        rotary_dim = model.rotary_dim if model.positions == "rotary" else 0
        alibi = model.positions == "alibi"
        return cls(model.num_heads, rotary_dim, model.rotary_base, alibi, model.layer_scaled_attention)

    def scale(self, head_dim: int, layer_number: int) -> float:
        """What a product of query and key is multiplied by, in the layer of this number (from 1)."""
        return 1.0 / (math.sqrt(head_dim) * (layer_number if self.layer_scaled else 1))


class CausalAttention(MegatronModule):
    """Core attention that never holds the scores of a layer: `scaled_dot_product_attention`, or blockwise on a CPU.

    With attention dropout the scores are formed after all, one window at a time: torch's own dropout would draw from a
    generator that knows ranks. ALiBi goes into torch's attention as a mask that all layers and windows share.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, how: AttentionForm, **__: Any):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.how = how
        self.scale = how.scale(config.kv_channels or 1, layer_number)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """query [L, B, H, K], key and value [L, B, heads of keys, K] to [L, B, H * K]."""
        numbers_BL = documents.announced()
        if numbers_BL is None:
            return self._attend(query, key, value)
        mixed_LBD = query.new_empty(*query.shape[:2], query.shape[2] * value.shape[3])
        for window, spans in enumerate(documents.spans(numbers_BL)):
            for span in spans:  # a document on its own: no mask, and rotary positions begin anew
                one = slice(window, window + 1)
                mixed_LBD[span, one] = self._attend(query[span, one], key[span, one], value[span, one])
        return mixed_LBD

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.how.rotary_dim:
            query, key = (rotated(x, self.how.rotary_dim, self.how.rotary_base) for x in (query, key))
        if key.shape[2] != query.shape[2]:
            key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
        first_head = query.shape[2] * parallel_state.get_tensor_model_parallel_rank()
        slopes_H = None
        if self.how.alibi:
            slopes_H = alibi_slopes(self.how.num_heads)[first_head : first_head + query.shape[2]]
        drops_out = bool(self.config.attention_dropout and dropout.announced()[1] is not None)
        on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
        if on_cpu and not drops_out and _kernel_is_slow():
            return _BlockwiseAttention.apply(query, key, value, self.scale, slopes_H).flatten(2)  # type: ignore[no-any-return]
        query_BHLK, key_BHLK, value_BHLK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None
        if slopes_H is not None:
            mask = _alibi_mask(tuple(slopes_H.tolist()), query.shape[0], query.dtype, query.device)
        if drops_out:
            mixed_BHLK = self._with_dropout(query_BHLK, key_BHLK, value_BHLK, mask, first_head)
        else:
            mixed_BHLK = F.scaled_dot_product_attention(
                query_BHLK, key_BHLK, value_BHLK, attn_mask=mask, is_causal=mask is None, scale=self.scale
            )
        return mixed_BHLK.permute(2, 0, 1, 3).flatten(2)

    def _with_dropout(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, first_head: int
    ) -> torch.Tensor:
        heads, length = query.shape[1:3]
        if mask is None:
            future_LL = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
            mask = torch.zeros(length, length, device=query.device).masked_fill(future_LL, float("-inf"))[None, None]
        p = self.config.attention_dropout
        mixed = []
        for window, slot in enumerate(dropout.announced()[1] or ()):
            scores_HLL = (query[window] @ key[window].transpose(-1, -2)).float() * self.scale
            weights_HLL = (scores_HLL + mask[0]).softmax(-1)
            keep_HLL = torch.stack(
                [
                    dropout.keep_mask((length, length), p, f"attention/{self.layer_number}/{head}", slot, query.device)
                    for head in range(first_head, first_head + heads)
                ]
            )
            mixed.append((weights_HLL * keep_HLL / (1.0 - p)).to(value.dtype) @ value[window])
        return torch.stack(mixed)
