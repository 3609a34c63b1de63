"""Kernels for a GPU: the mix of a Backpack's senses, and the passes over a block of logits.

In and out as `models.senses` and `models.head` say, which use these where tensors are on CUDA. Nothing of the size
[senses, length, length] or [length, senses, hidden] is ever written to memory. Products are of the tensors' own
precision (of fp32 in full fp32) and summed in fp32.

The mix sums over senses, so one sum per query holds all of them once each query's log sum of exponentials is known:
a first kernel finds those, a second the mix. Going back, delta_ki = sum_j alpha_kij (dO_i . C_jk) belongs to each
sense and query, so a kernel finds it before the gradients of the scores can be formed; a last one sums alpha^T dO into
the rows of the distinct tokens. The only file that may import triton. Measured and tested on an H100 alone.

Shape letters: L positions, B windows, K senses of this rank, H width of a sense's queries, D hidden_size, U distinct
tokens, N tokens, V rows of the vocabulary; a program has M queries and S keys, and C of the D columns at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

# What triton compiles has types of its own.
# mypy: allow-untyped-defs, allow-incomplete-defs

LOG2_E = math.log2(math.e)


@triton.jit
def _scores(
    Q, K, q_l, k_l, place_q, place_k, L, scale,
    H: tl.constexpr, H2: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[M, S] scores in units of log 2; -inf for the future and beyond the last position."""
    h = tl.arange(0, H2)
    q = tl.load(Q + place_q[:, None] * q_l + h[None, :], mask=(place_q[:, None] < L) & (h[None, :] < H), other=0.0)
    k = tl.load(K + place_k[None, :] * k_l + h[:, None], mask=(place_k[None, :] < L) & (h[:, None] < H), other=0.0)
    s = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32") * scale
    seen = (place_k[None, :] <= place_q[:, None]) & (place_k[None, :] < L)
    return tl.where(seen, s, float("-inf")), q, k


@triton.jit
def _log_sums(
    Q, K, LSE, q_l, q_b, q_k, k_l, k_b, k_k, L, NK, scale,
    H: tl.constexpr, H2: tl.constexpr, M: tl.constexpr, S: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    start, which = tl.program_id(0) * M, tl.program_id(1)
    b, k = (which // NK).to(tl.int64), (which % NK).to(tl.int64)
    Q += b * q_b + k * q_k
    K += b * k_b + k * k_k
    place_q = start + tl.arange(0, M)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for first in range(0, tl.minimum(start + M, L), S):
        s, _, _ = _scores(Q, K, q_l, k_l, place_q, first + tl.arange(0, S), L, scale, H, H2, EXACT)
        now = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - now) + tl.sum(tl.exp2(s - now[:, None]), 1)
        top = now
    tl.store(LSE + which.to(tl.int64) * L + place_q, top + tl.log2(total), mask=place_q < L)


@triton.jit
def _mix(
    Q, K, C, PLACE, LSE, OUT, q_l, q_b, q_k, k_l, k_b, k_k, L, NB, NK, scale,
    H: tl.constexpr, H2: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # The last queries see the most keys: they come first.
    start, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place_q = start + tl.arange(0, M)
    mixed = tl.zeros([M, COLUMNS], tl.float32)
    for k in range(NK):
        lse = tl.load(LSE + (b * NK + k) * L + place_q, mask=place_q < L, other=0.0)
        for first in range(0, tl.minimum(start + M, L), S):
            place_k = first + tl.arange(0, S)
            s, _, _ = _scores(
                Q + b * q_b + k * q_k, K + b * k_b + k * k_k, q_l, k_l, place_q, place_k, L, scale, H, H2, EXACT
            )
            alpha = tl.exp2(s - lse[:, None])
            row = tl.load(PLACE + b * L + place_k, mask=place_k < L, other=0)
            c = tl.load(C + (row[:, None] * NK + k) * D + d[None, :], mask=d[None, :] < D, other=0.0)
            mixed += tl.dot(alpha.to(c.dtype), c, input_precision="ieee" if EXACT else "tf32")
    target = OUT + (place_q[:, None].to(tl.int64) * NB + b) * D + d[None, :]
    tl.store(target, mixed.to(OUT.dtype.element_ty), mask=(place_q[:, None] < L) & (d[None, :] < D))


@triton.jit
def _alpha_gradient(
    DO, C, row, k, place_q, b, L, NB, NK,
    D: tl.constexpr, M: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[M, S]: dO_i . C_jk."""
    found = tl.zeros([M, S], tl.float32)
    for column in range(0, D, COLUMNS):
        d = column + tl.arange(0, COLUMNS)
        o = tl.load(
            DO + (place_q[:, None].to(tl.int64) * NB + b) * D + d[None, :],
            mask=(place_q[:, None] < L) & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        c = tl.load(C + (row[None, :] * NK + k) * D + d[:, None], mask=d[:, None] < D, other=0.0)
        found += tl.dot(o, c, input_precision="ieee" if EXACT else "tf32")
    return found


@triton.jit
def _deltas(
    Q, K, C, PLACE, LSE, DO, DELTA, q_l, q_b, q_k, k_l, k_b, k_k, L, NB, NK, scale,
    H: tl.constexpr, H2: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    start, which = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1)
    b, k = (which // NK).to(tl.int64), (which % NK).to(tl.int64)
    place_q = start + tl.arange(0, M)
    at_q = which.to(tl.int64) * L + place_q
    lse = tl.load(LSE + at_q, mask=place_q < L, other=0.0)
    delta = tl.zeros([M], tl.float32)
    for first in range(0, tl.minimum(start + M, L), S):
        place_k = first + tl.arange(0, S)
        s, _, _ = _scores(
            Q + b * q_b + k * q_k, K + b * k_b + k * k_k, q_l, k_l, place_q, place_k, L, scale, H, H2, EXACT
        )
        row = tl.load(PLACE + b * L + place_k, mask=place_k < L, other=0)
        d_alpha = _alpha_gradient(DO, C, row, k, place_q, b, L, NB, NK, D, M, S, COLUMNS, EXACT)
        delta += tl.sum(tl.exp2(s - lse[:, None]) * d_alpha, 1)
    tl.store(DELTA + at_q, delta, mask=place_q < L)


@triton.jit
def _query_key_gradients(
    Q, K, C, PLACE, LSE, DO, DELTA, DQ, DK, q_l, q_b, q_k, k_l, k_b, k_k, L, NB, NK, scale,
    H: tl.constexpr, H2: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of one block of keys; DQ and DK are fp32 [B, K, L, H], and each program adds its part to DQ."""
    first, which = tl.program_id(0) * S, tl.program_id(1)
    b, k = (which // NK).to(tl.int64), (which % NK).to(tl.int64)
    place_k = first + tl.arange(0, S)
    h = tl.arange(0, H2)
    row = tl.load(PLACE + b * L + place_k, mask=place_k < L, other=0)
    d_key = tl.zeros([S, H2], tl.float32)
    for start in range(first // M * M, L, M):
        place_q = start + tl.arange(0, M)
        at_q = which.to(tl.int64) * L + place_q
        s, q, key = _scores(
            Q + b * q_b + k * q_k, K + b * k_b + k * k_k, q_l, k_l, place_q, place_k, L, scale, H, H2, EXACT
        )
        lse = tl.load(LSE + at_q, mask=place_q < L, other=0.0)
        delta = tl.load(DELTA + at_q, mask=place_q < L, other=0.0)
        d_alpha = _alpha_gradient(DO, C, row, k, place_q, b, L, NB, NK, D, M, S, COLUMNS, EXACT)
        d_scores = (tl.exp2(s - lse[:, None]) * (d_alpha - delta[:, None])).to(q.dtype)
        d_key += tl.dot(tl.trans(d_scores), q, input_precision="ieee" if EXACT else "tf32")
        d_query = tl.dot(d_scores, tl.trans(key), input_precision="ieee" if EXACT else "tf32")
        inside = (place_q[:, None] < L) & (h[None, :] < H)
        tl.atomic_add(DQ + at_q[:, None] * H + h[None, :], d_query, mask=inside, sem="relaxed")
    at_k = which.to(tl.int64) * L + place_k
    tl.store(DK + at_k[:, None] * H + h[None, :], d_key, mask=(place_k[:, None] < L) & (h[None, :] < H))


@triton.jit
def _sense_gradients(
    Q, K, PLACE, LSE, DO, DC, q_l, q_b, q_k, k_l, k_b, k_k, L, NB, NK, scale,
    H: tl.constexpr, H2: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of one block of keys; DC is fp32 [U, K, D], to which each program adds."""
    first, which = tl.program_id(0) * S, tl.program_id(2)
    b, k = (which // NK).to(tl.int64), (which % NK).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place_k = first + tl.arange(0, S)
    d_sense = tl.zeros([S, COLUMNS], tl.float32)
    for start in range(first // M * M, L, M):
        place_q = start + tl.arange(0, M)
        s, _, _ = _scores(
            Q + b * q_b + k * q_k, K + b * k_b + k * k_k, q_l, k_l, place_q, place_k, L, scale, H, H2, EXACT
        )
        lse = tl.load(LSE + which.to(tl.int64) * L + place_q, mask=place_q < L, other=0.0)
        o = tl.load(
            DO + (place_q[:, None].to(tl.int64) * NB + b) * D + d[None, :],
            mask=(place_q[:, None] < L) & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        alpha = tl.exp2(s - lse[:, None])
        d_sense += tl.dot(tl.trans(alpha.to(o.dtype)), o, input_precision="ieee" if EXACT else "tf32")
    row = tl.load(PLACE + b * L + place_k, mask=place_k < L, other=0)
    inside = (place_k[:, None] < L) & (d[None, :] < D)
    tl.atomic_add(DC + (row[:, None] * NK + k) * D + d[None, :], d_sense, mask=inside, sem="relaxed")


class SenseMix(torch.autograd.Function):
    """`senses.mix_senses`: o [L, B, D] from queries, keys [L, B, K, H], senses [U, K, D] and places [B, L]."""

    @staticmethod
    def forward(
        ctx: Any,
        query_LBKH: torch.Tensor,
        key_LBKH: torch.Tensor,
        senses_UKD: torch.Tensor,
        place_BL: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        query_LBKH, key_LBKH = (x if x.stride(3) == 1 else x.contiguous() for x in (query_LBKH, key_LBKH))
        senses_UKD, place_BL = senses_UKD.contiguous(), place_BL.contiguous()
        launch = _Launch(query_LBKH, key_LBKH, senses_UKD, scale)
        log_sum_BKL = query_LBKH.new_empty(launch.windows, launch.senses, launch.length, dtype=torch.float32)
        mixed_LBD = senses_UKD.new_empty(launch.length, launch.windows, launch.width)
        with torch.cuda.device_of(query_LBKH):
            _log_sums[launch.grid("M", launch.windows * launch.senses)](
                query_LBKH, key_LBKH, log_sum_BKL, *launch.strides, launch.length, launch.senses, launch.scale,
                launch.head, launch.padded_head, launch.M, launch.S, launch.exact,
            )  # fmt: skip
            _mix[launch.grid("M", launch.chunks, launch.windows)](
                query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL, mixed_LBD, *launch.numbers, *launch.constants,
                num_warps=launch.warps,
            )  # fmt: skip
        ctx.save_for_backward(query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL)
        ctx.scale = scale
        return mixed_LBD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL = ctx.saved_tensors
        launch = _Launch(query_LBKH, key_LBKH, senses_UKD, ctx.scale)
        d_mixed_LBD = gradients[0].contiguous()
        delta_BKL = torch.empty_like(log_sum_BKL)
        shape = (launch.windows, launch.senses, launch.length, launch.head)
        d_query_BKLH = query_LBKH.new_zeros(shape, dtype=torch.float32)
        d_key_BKLH = query_LBKH.new_empty(shape, dtype=torch.float32)
        d_senses_UKD = torch.zeros_like(senses_UKD, dtype=torch.float32)
        each = launch.windows * launch.senses
        with torch.cuda.device_of(query_LBKH):
            _deltas[launch.grid("M", each)](
                query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL, d_mixed_LBD, delta_BKL,
                *launch.numbers, *launch.constants, num_warps=launch.warps,
            )  # fmt: skip
            _query_key_gradients[launch.grid("S", each)](
                query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL, d_mixed_LBD, delta_BKL, d_query_BKLH,
                d_key_BKLH, *launch.numbers, *launch.constants, num_warps=launch.warps,
            )  # fmt: skip
            _sense_gradients[launch.grid("S", launch.chunks, each)](
                query_LBKH, key_LBKH, place_BL, log_sum_BKL, d_mixed_LBD, d_senses_UKD,
                *launch.numbers, *launch.constants, num_warps=launch.warps,
            )  # fmt: skip
        d_query_LBKH, d_key_LBKH = (
            (d_BKLH * ctx.scale).to(query_LBKH.dtype).permute(2, 0, 1, 3) for d_BKLH in (d_query_BKLH, d_key_BKLH)
        )
        return d_query_LBKH, d_key_LBKH, d_senses_UKD.to(senses_UKD.dtype), None, None


class _Launch:
    """Sizes of the programs and the numbers that every kernel gets."""

    def __init__(self, query_LBKH: torch.Tensor, key_LBKH: torch.Tensor, senses_UKD: torch.Tensor, scale: float):
        self.length, self.windows, self.senses, self.head = query_LBKH.shape
        self.width = senses_UKD.shape[2]
        self.scale = scale * LOG2_E
        self.exact = senses_UKD.dtype == torch.float32
        # A product has at least 16 rows, columns and terms.
        self.padded_head = max(16, triton.next_power_of_2(self.head))
        self.M, self.S, widest, self.warps = BLOCKS[self.exact]
        self.columns = max(16, min(widest, triton.next_power_of_2(self.width)))
        self.chunks = -(-self.width // self.columns)
        self.strides = (*query_LBKH.stride()[:3], *key_LBKH.stride()[:3])
        self.numbers = (*self.strides, self.length, self.windows, self.senses, self.scale)
        self.constants = (self.head, self.padded_head, self.width, self.M, self.S, self.columns, self.exact)

    def grid(self, block: str, *others: int) -> tuple[int, ...]:
        """Programs: blocks of queries (M) or keys (S), and others."""
        return (-(-self.length // getattr(self, block)), *others)


# Queries, keys and columns of a program, and its warps: for fp32, and for 16 bits.
BLOCKS = {True: (32, 32, 64, 4), False: (64, 64, 128, 4)}


# ---------------------------------------------------------------- a block of logits


@triton.jit
def _row_sums(X, TOP, SUM, COUNT, x_n, log2_e, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COUNT, BLOCK):
        x = tl.load(X + n * x_n + first + at, mask=first + at < COUNT, other=float("-inf")).to(tl.float32)
        now = tl.maximum(top, x)
        # A lane that has seen nothing yet has no maximum to subtract.
        total = tl.where(now == float("-inf"), 0.0, total * tl.exp2((top - now) * log2_e) + tl.exp2((x - now) * log2_e))
        top = now
    before = tl.load(TOP + n)
    largest = tl.maximum(tl.max(top, 0), before)
    found = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp2((top - largest) * log2_e)), 0)
    old = tl.where(before == float("-inf"), 0.0, tl.load(SUM + n) * tl.exp2((before - largest) * log2_e))
    tl.store(TOP + n, largest)
    tl.store(SUM + n, old + found)


@triton.jit
def _row_probabilities(X, LSE, COUNT, x_n, log2_e, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + n * x_n + at, mask=at < COUNT, other=0.0)
    p = tl.exp2((x.to(tl.float32) - tl.load(LSE + n)) * log2_e)
    tl.store(X + n * x_n + at, p.to(x.dtype), mask=at < COUNT)


def add_to_sum(logits_Nv: torch.Tensor, top_N: torch.Tensor, sum_N: torch.Tensor) -> None:
    """Take a block into each token's maximum and its sum of exp(logit - maximum), in one pass."""
    count = logits_Nv.shape[1]
    block = min(1024, max(128, triton.next_power_of_2(count)))
    with torch.cuda.device_of(logits_Nv):
        _row_sums[(len(logits_Nv),)](logits_Nv, top_N, sum_N, count, logits_Nv.stride(0), LOG2_E, block)


def to_probabilities(logits_Nv: torch.Tensor, log_sum_N: torch.Tensor) -> None:
    """exp(logit - log sum), in place."""
    count, block = logits_Nv.shape[1], 1024
    with torch.cuda.device_of(logits_Nv):
        grid = (len(logits_Nv), triton.cdiv(count, block))
        _row_probabilities[grid](logits_Nv, log_sum_N, count, logits_Nv.stride(0), LOG2_E, block)
