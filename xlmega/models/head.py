"""The loss over the vocabulary, vocabulary-parallel and a block of rows at a time: logits are never all held at once.

In come hidden states, this rank's rows of the output embedding, the targets and a weight for each target; out go the
weighted sum of the negative log-likelihoods (differentiable) and each target's own (for reports).
The gradients are formed here, not in the backward pass. Where one block holds all logits they become the probabilities
in place; else a first pass over the blocks finds each token's sum and a second forms the probabilities anew. Going by
rows, a block's part of the embedding's gradient is one product: nothing is summed in fp32 over the embedding, and the
ranks need not cut their rows alike.

With P the probabilities and w the weights, the gradient of the logits is w (P - onehot), so
    d hidden = w (P W - W[target])        d W = P^T (w hidden) - sum of (w hidden) at the target rows
and neither the one-hot nor the weighting is ever written over [tokens, vocabulary]. On a GPU the passes over a block
are the kernels of `models.kernels`, where triton is installed: one reads it, one overwrites it.

Shape letters: N tokens, V rows of the vocabulary on this rank, v rows of one block, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from xlmega.models.fused import kernels_for

LOG2_E = math.log2(math.e)
# Logits of one block in their own precision. On a CPU the least that takes 4,096 tokens with 16,384 pieces in one, on a
# GPU 8,192 with 262,144 pieces: logits of a single block are formed once, not twice.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**32}
# On a CPU the probabilities of this many bytes of logits are formed at a time, so that they stay in the cache.
CACHE_BYTES = 2**20


def weighted_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    first_row: int = 0,
    group: dist.ProcessGroup | None = None,
    gradient_scale: float = 1.0,
    chunk_bytes: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights_N * nll_N as an fp32 scalar, nll_N in nats as fp32 without gradient).

    weight_VD holds rows first_row.. of the vocabulary; the ranks of `group` hold it all. `gradient_scale` is the factor
    that the caller will multiply the loss by (loss scaling): gradients are formed at that scale, so that fp16 does not
    lose them. `chunk_bytes` of logits are formed at a time; 0: as suits the device.
    """
    chunk_bytes = chunk_bytes or CHUNK_BYTES[hidden_ND.device.type]
    if not torch.is_grad_enabled():
        nll_N = _forward(hidden_ND, weight_VD, targets_N, None, first_row, group, chunk_bytes)[0]
        return (nll_N * weights_N).sum(), nll_N
    return _ChunkedLoss.apply(  # type: ignore[no-any-return]
        hidden_ND, weight_VD, targets_N, weights_N, first_row, group, gradient_scale, chunk_bytes
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        first_row: int,
        group: dist.ProcessGroup | None,
        gradient_scale: float,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled_N = weights_N * gradient_scale
        nll_N, d_hidden_ND, d_weight_VD = _forward(
            hidden_ND, weight_VD, targets_N, scaled_N, first_row, group, chunk_bytes, ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.gradient_scale = gradient_scale
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        factor = gradients[0] / ctx.gradient_scale
        # The usual caller multiplies by exactly gradient_scale: no pass over the embedding then. But asking a GPU for
        # the value would have the host wait for all that it was told to do; a product with one changes nothing.
        if factor.device.type == "cuda" or float(factor) != 1.0:
            d_hidden_ND = d_hidden_ND * factor
            d_weight_VD = None if d_weight_VD is None else d_weight_VD * factor
        return d_hidden_ND, d_weight_VD, None, None, None, None, None, None


def _forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    first_row: int,
    group: dist.ProcessGroup | None,
    chunk_bytes: int,
    wants_d_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """nll_N and, where weights_N is given, the gradients of sum(weights_N * nll_N)."""
    num_tokens, num_rows = hidden_ND.shape[0], weight_VD.shape[0]
    parallel = group is not None and group.size() > 1
    most = min(num_rows, max(1, chunk_bytes // max(1, num_tokens * hidden_ND.element_size())))
    # No block: a tiny vocabulary leaves the last ranks with padding only.
    blocks = [slice(row, min(row + most, num_rows)) for row in range(0, num_rows, max(1, most))]
    buffer = hidden_ND.new_empty(num_tokens * most)

    def logits_of(rows: slice) -> torch.Tensor:
        logits_Nv = buffer[: num_tokens * (rows.stop - rows.start)].view(num_tokens, -1)
        return torch.mm(hidden_ND, weight_VD[rows].t(), out=logits_Nv)

    top_N = torch.full((num_tokens,), float("-inf"), device=hidden_ND.device)
    sum_N, target_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
    row_N = targets_N - first_row
    with_gradients = weights_N is not None
    # With all logits at hand and nobody to ask, one pass suffices.
    at_once = with_gradients and len(blocks) == 1 and not parallel and not kernels_for(hidden_ND)
    for rows in blocks:
        logits_Nv = logits_of(rows)
        inside_N = (row_N >= rows.start) & (row_N < rows.stop)
        place_N = (row_N - rows.start).masked_fill(~inside_N, 0)
        target_N += logits_Nv.gather(1, place_N[:, None])[:, 0].float().masked_fill(~inside_N, 0.0)
        _add_to_sum(logits_Nv, top_N, sum_N, at_once)
    if parallel:
        own_top_N = top_N.clone()
        dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=group)
        sum_N *= (own_top_N - top_N).exp()
        dist.all_reduce(sum_N, group=group)
        dist.all_reduce(target_N, group=group)
    log_sum_N = sum_N.log() + top_N
    nll_N = log_sum_N - target_N
    if weights_N is None:
        return nll_N, None, None

    weighted_ND = (hidden_ND * weights_N[:, None]).to(hidden_ND.dtype)
    d_weight_VD = torch.empty_like(weight_VD) if wants_d_weight else None
    # One product needs no sum; those of several blocks are summed in fp32.
    d_ND = None if len(blocks) == 1 else torch.zeros(hidden_ND.shape, device=hidden_ND.device)
    for rows in blocks:
        if not at_once:
            logits_Nv = logits_of(rows) if len(blocks) > 1 else logits_Nv
            _to_probabilities(logits_Nv, log_sum_N)
        probabilities_Nv = logits_Nv
        part_ND = probabilities_Nv @ weight_VD[rows]
        d_ND = part_ND if d_ND is None else d_ND.add_(part_ND)
        if d_weight_VD is not None:
            torch.mm(probabilities_Nv.t(), weighted_ND, out=d_weight_VD[rows])
    assert d_ND is not None
    if num_rows:
        mine_N = (row_N >= 0) & (row_N < num_rows)
        row_N = row_N.masked_fill(~mine_N, 0)
        d_ND -= weight_VD[row_N] * mine_N[:, None]
        if d_weight_VD is not None:
            d_weight_VD.index_add_(0, row_N, weighted_ND * mine_N[:, None], alpha=-1.0)
    return nll_N, (d_ND * weights_N[:, None]).to(hidden_ND.dtype), d_weight_VD


def _add_to_sum(logits_Nv: torch.Tensor, top_N: torch.Tensor, sum_N: torch.Tensor, finish: bool) -> None:
    """Take a block into each token's maximum and its sum of exp(logit - maximum).

    With `finish` there is nothing else to come, and the logits become the probabilities.
    """
    if kernels := kernels_for(logits_Nv):
        kernels.add_to_sum(logits_Nv, top_N, sum_N)
        return
    for part, values_nv in _parts(logits_Nv):
        before_n = top_N[part].clone()
        top_n = torch.maximum(before_n, values_nv.amax(1), out=top_N[part])
        # exp2: torch's exp takes five times as long on a CPU. The maximum goes first, so large logits lose nothing.
        values_nv.sub_(top_n[:, None]).mul_(LOG2_E).exp2_()
        sum_n = sum_N[part].mul_((before_n - top_n).exp_()).add_(values_nv.sum(1))
        if finish:
            torch.mul(values_nv, sum_n.reciprocal()[:, None], out=values_nv)
            logits_Nv[part] = values_nv


def _to_probabilities(logits_Nv: torch.Tensor, log_sum_N: torch.Tensor) -> None:
    if kernels := kernels_for(logits_Nv):
        kernels.to_probabilities(logits_Nv, log_sum_N)
        return
    for part, values_nv in _parts(logits_Nv):
        logits_Nv[part] = values_nv.sub_(log_sum_N[part, None]).mul_(LOG2_E).exp2_()


def _parts(logits_Nv: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some tokens at a time, and their logits in an fp32 buffer that every part uses again."""
    num_tokens, num_rows = logits_Nv.shape
    step = num_tokens
    if logits_Nv.device.type == "cpu":
        step = max(1, min(num_tokens, CACHE_BYTES // (4 * num_rows)))
    buffer_nv = torch.empty(step, num_rows, dtype=torch.float32, device=logits_Nv.device)
    for start in range(0, num_tokens, step):
        part = slice(start, min(start + step, num_tokens))
        yield part, buffer_nv[: part.stop - start].copy_(logits_Nv[part])
