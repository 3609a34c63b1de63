"""The loss over the vocabulary, vocabulary-parallel and in chunks: the logits of a batch are never held at once.

In come hidden states, this rank's rows of the output embedding, the targets and a weight for each target; out go the
weighted sum of the negative log-likelihoods (differentiable) and each target's own (for reports).
The gradients of a chunk are formed while its probabilities are at hand, so nothing is recomputed in the backward pass
and memory is one chunk of logits plus the gradient of the embedding.

With P the probabilities and w the weights, the gradient of the logits is w (P - onehot), so
    d hidden = w (P W - W[target])        d W = P^T (w hidden) - sum of (w hidden) at the target rows
and neither the one-hot nor the weighting is ever written over [tokens, vocabulary].

Shape letters: N tokens, V rows of the vocabulary on this rank, D hidden_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

LOG2_E = math.log2(math.e)
# Logits of one chunk in their own precision. One chunk needs no fp32 sum of the embedding's gradient, so this is the
# least that takes 4,096 tokens with 16,384 pieces at once; larger is not faster.
CHUNK_BYTES = 128 * 2**20
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
    chunk_bytes: int = CHUNK_BYTES,
    most_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weights_N * nll_N as an fp32 scalar, nll_N in nats as fp32 without gradient).

    weight_VD holds rows first_row.. of the vocabulary; the ranks of `group` hold it all. `gradient_scale` is the factor
    that the caller will multiply the loss by (loss scaling): gradients are formed at that scale, so that fp16 does not
    lose them. `most_rows` is the largest number of rows that a rank of `group` holds; a caller that knows it spares the
    ranks asking each other.
    """
    if most_rows is None:
        most_rows = _most_rows(weight_VD, group)
    # The ranks reduce chunk by chunk, so all must cut the tokens alike though the last may hold fewer rows.
    chunk = max(1, min(len(hidden_ND), chunk_bytes // max(1, most_rows * hidden_ND.element_size())))
    if not torch.is_grad_enabled():
        nll_N = _forward(hidden_ND, weight_VD, targets_N, None, first_row, group, chunk)[0]
        return (nll_N * weights_N).sum(), nll_N
    return _ChunkedLoss.apply(  # type: ignore[no-any-return]
        hidden_ND, weight_VD, targets_N, weights_N, first_row, group, gradient_scale, chunk
    )


def _most_rows(weight_VD: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    if group is None or group.size() == 1:
        return weight_VD.shape[0]
    rows = torch.tensor(weight_VD.shape[0], device=weight_VD.device)
    dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=group)
    return int(rows)


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
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scaled_N = weights_N * gradient_scale
        nll_N, d_hidden_ND, d_weight_VD = _forward(
            hidden_ND, weight_VD, targets_N, scaled_N, first_row, group, chunk, ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(d_hidden_ND, d_weight_VD)
        ctx.gradient_scale = gradient_scale
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_ND, d_weight_VD = ctx.saved_tensors
        factor = float(gradients[0]) / ctx.gradient_scale
        if factor != 1.0:  # the usual caller multiplies by exactly gradient_scale: no pass over the embedding then
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
    chunk: int,
    wants_d_weight: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """nll_N and, where weights_N is given, the gradients of sum(weights_N * nll_N); `chunk` tokens at a time."""
    num_tokens, num_rows = hidden_ND.shape[0], weight_VD.shape[0]
    with_gradients = weights_N is not None
    row_N = targets_N - first_row
    mine_N = (row_N >= 0) & (row_N < num_rows)
    row_N = row_N.masked_fill(~mine_N, 0)
    nll_N = torch.empty(num_tokens, dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.empty_like(hidden_ND) if with_gradients else None
    d_weight_VD = None
    if with_gradients and wants_d_weight:
        # Several chunks are summed in fp32; one chunk needs no sum.
        dtype = torch.float32 if chunk < num_tokens else weight_VD.dtype
        allocate = torch.zeros if chunk < num_tokens or not num_rows else torch.empty
        d_weight_VD = allocate(weight_VD.shape, dtype=dtype, device=weight_VD.device)
    buffer_NV = hidden_ND.new_empty(min(chunk, num_tokens), num_rows)
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        hidden_nD, row_n, mine_n = hidden_ND[part], row_N[part], mine_N[part]
        logits_nV = buffer_NV[: hidden_nD.shape[0]]
        if num_rows == 0:  # a tiny vocabulary leaves the last ranks with padding only
            target_n = torch.zeros(hidden_nD.shape[0], device=hidden_nD.device)
        else:
            torch.mm(hidden_nD, weight_VD.t(), out=logits_nV)
            target_n = logits_nV.gather(1, row_n[:, None])[:, 0].float().masked_fill(~mine_n, 0.0)
        log_sum_n = _normalise(logits_nV, group, with_gradients)
        if group is not None and group.size() > 1:
            dist.all_reduce(target_n, group=group)
        nll_N[part] = log_sum_n - target_n
        if weights_N is None:
            continue
        assert d_hidden_ND is not None
        probabilities_nV = logits_nV
        weight_n1 = weights_N[part, None]
        d_nD = probabilities_nV @ weight_VD
        if num_rows:
            d_nD -= weight_VD[row_n] * mine_n[:, None]
        d_hidden_ND[part] = d_nD * weight_n1
        if d_weight_VD is not None and num_rows:
            weighted_nD = (hidden_nD * weight_n1).to(hidden_nD.dtype)
            if chunk >= num_tokens:
                torch.mm(probabilities_nV.t(), weighted_nD, out=d_weight_VD)
            else:
                d_weight_VD += probabilities_nV.t() @ weighted_nD
            d_weight_VD.index_add_(0, row_n, (weighted_nD * mine_n[:, None]).to(d_weight_VD.dtype), alpha=-1.0)
    return nll_N, d_hidden_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype)


def _normalise(logits_nV: torch.Tensor, group: dist.ProcessGroup | None, in_place: bool) -> torch.Tensor:
    """log of the sum of exp over the whole vocabulary; with `in_place` the logits become the probabilities."""
    num_tokens, num_rows = logits_nV.shape
    parallel = group is not None and group.size() > 1
    rows = num_tokens
    if logits_nV.device.type == "cpu":
        rows = max(1, min(num_tokens, CACHE_BYTES // max(1, 4 * num_rows)))
    top_n = torch.empty(num_tokens, dtype=torch.float32, device=logits_nV.device)
    sum_n = torch.empty_like(top_n)
    if parallel:
        top_n[:] = logits_nV.amax(1) if num_rows else float("-inf")
        dist.all_reduce(top_n, op=dist.ReduceOp.MAX, group=group)
    own_buffer = logits_nV.dtype != torch.float32 or not in_place
    buffer_nV = torch.empty(rows, num_rows, dtype=torch.float32, device=logits_nV.device) if own_buffer else None
    for start in range(0, num_tokens, rows):
        part = slice(start, min(start + rows, num_tokens))
        values_nV = logits_nV[part]
        if buffer_nV is not None:
            values_nV = buffer_nV[: values_nV.shape[0]].copy_(values_nV)
        if not parallel:
            torch.amax(values_nV, 1, out=top_n[part])
        # exp2: torch's exp takes five times as long on a CPU. The maximum goes first, so large logits lose nothing.
        values_nV.sub_(top_n[part, None]).mul_(LOG2_E).exp2_()
        torch.sum(values_nV, 1, out=sum_n[part])
        if in_place:
            if not parallel:
                values_nV.mul_(sum_n[part, None].reciprocal())
            if buffer_nV is not None:
                logits_nV[part] = values_nV
    if parallel:
        dist.all_reduce(sum_n, group=group)
        if in_place:
            logits_nV.div_(sum_n[:, None])
    return sum_n.log() + top_n
