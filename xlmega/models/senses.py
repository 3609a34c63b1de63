"""The mix of senses: attention whose heads are senses and whose values are as wide as the model, never held whole.

In come queries and keys of this rank's senses, the sense vectors of the distinct tokens of a micro-batch, and which of
them stands where; out goes, for every position, the sum over senses and earlier positions
    o_i = sum_k sum_{j <= i} alpha_kij C(x_j)_k        alpha_ki = softmax_{j <= i}(scale q_ki . k_kj)
Sources: METHODS §4.1 to 4.3.

Sense vectors depend on the token alone, so they come once for each distinct token and are gathered a window at a time;
alpha exists for a block of queries only, and the backward pass forms it anew from each query's log sum. A block's
alpha is kept as [key block, sense, key, query] and the window's senses as [key block, sense, key, D]: the keys that a
block of queries sees are then one contiguous matrix for all senses, and the mix, its gradient by alpha and its
gradient by the senses are one matrix product each, whose sum over senses is the product's own. On a GPU the same is
done by the kernels of `models.kernels`, where triton is installed.

Shape letters: L positions, B windows, K senses of this rank, H width of a sense's queries, D hidden_size, U distinct
tokens; within a window m blocks of c keys seen by l queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from xlmega.models.attention import LOG2_E, fp32_from_bf16
from xlmega.models.fused import kernels_for

# Scores in fp32 of one block of queries with all senses and all keys. On a CPU: what stays in the caches while it is
# passed over; on a GPU, whose launches cost more than its passes: large pieces of work.
SCORE_BYTES = {"cpu": 2**22, "cuda": 2**28}
LARGEST_BLOCK = {"cpu": 128, "cuda": 512}
SMALLEST_BLOCK = 32


def mix_senses(
    query_LBKH: torch.Tensor, key_LBKH: torch.Tensor, senses_UKD: torch.Tensor, place_BL: torch.Tensor, scale: float
) -> torch.Tensor:
    """o [L, B, D]; `place_BL` says which row of `senses_UKD` stands at each position."""
    kernels = kernels_for(query_LBKH)
    mix = kernels.SenseMix if kernels else _SenseMix
    return mix.apply(query_LBKH, key_LBKH, senses_UKD, place_BL, scale)  # type: ignore[no-any-return]


class _SenseMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_LBKH: torch.Tensor,
        key_LBKH: torch.Tensor,
        senses_UKD: torch.Tensor,
        place_BL: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        walk = _Walk(query_LBKH, senses_UKD, place_BL, scale)
        mixed_LBD = senses_UKD.new_empty(walk.length, walk.num_windows, walk.width)
        log_sum_BKL = query_LBKH.new_empty(walk.num_windows, walk.num_senses, walk.padded, dtype=torch.float32)
        with walk.products():
            for window in range(walk.num_windows):
                senses_xD = walk.senses_of(senses_UKD, window)
                query_KHL, key_mKcH = walk.queries(query_LBKH, window), walk.keys(key_LBKH, window)
                for rows in walk.rows():
                    scores_mKcl = walk.scores(query_KHL, key_mKcH, rows)
                    top_Kl = scores_mKcl.amax(2).amax(0)  # at once it takes four times as long
                    scores_mKcl.sub_(top_Kl[:, None]).exp2_()
                    total_Kl = scores_mKcl.sum((0, 2))
                    scores_mKcl.mul_(total_Kl.reciprocal()[:, None])
                    log_sum_BKL[window, :, rows] = total_Kl.log2_().add_(top_Kl)
                    alpha_xl = walk.low(scores_mKcl).flatten(0, 2)
                    valid = slice(rows.start, min(rows.stop, walk.length))
                    mixed_lD = alpha_xl.t() @ senses_xD[: len(alpha_xl)]
                    mixed_LBD[valid, window] = mixed_lD[: valid.stop - valid.start]
        ctx.save_for_backward(query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL)
        ctx.scale = scale
        return mixed_LBD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_LBKH, key_LBKH, senses_UKD, place_BL, log_sum_BKL = ctx.saved_tensors
        walk = _Walk(query_LBKH, senses_UKD, place_BL, ctx.scale)
        d_query_LBKH, d_key_LBKH = torch.empty_like(query_LBKH), torch.empty_like(key_LBKH)
        d_senses_UKD = torch.zeros_like(senses_UKD, dtype=torch.float32)
        d_senses_xD = senses_UKD.new_empty(walk.padded * walk.num_senses, walk.width, dtype=torch.float32)
        d_mixed_LD = senses_UKD.new_zeros(walk.padded, walk.width)
        with walk.products():
            for window in range(walk.num_windows):
                senses_xD = walk.senses_of(senses_UKD, window)
                query_KHL, key_mKcH = walk.queries(query_LBKH, window), walk.keys(key_LBKH, window)
                d_mixed_LD[: walk.length] = gradients[0][:, window]
                d_key_mKcH = torch.zeros_like(key_mKcH)
                # Backwards: the last queries see all keys, so what they write need not be zeroed before.
                for rows in reversed(list(walk.rows())):
                    alpha_mKcl = walk.scores(query_KHL, key_mKcH, rows)
                    alpha_mKcl.sub_(log_sum_BKL[window, :, None, rows]).exp2_()
                    num_blocks, seen = len(alpha_mKcl), alpha_mKcl.numel() // walk.step
                    d_mixed_lD = d_mixed_LD[rows]
                    last = rows.stop == walk.padded
                    d_senses_xD[:seen].addmm_(alpha_mKcl.view(seen, -1), d_mixed_lD.float(), beta=0 if last else 1)
                    d_alpha_xl = torch.mm(senses_xD[:seen], d_mixed_lD.t(), out=walk.low_like(alpha_mKcl))
                    d_scores_mKcl = walk.second(alpha_mKcl).copy_(d_alpha_xl.view_as(alpha_mKcl))
                    delta_Kl = torch.mul(d_scores_mKcl, alpha_mKcl).sum((0, 2))
                    d_scores_mKcl.sub_(delta_Kl[:, None]).mul_(alpha_mKcl)
                    flat_xcl = d_scores_mKcl.flatten(0, 1)
                    query_xlH = query_KHL[:, :, rows].mT.expand(num_blocks, -1, -1, -1).flatten(0, 1)
                    d_key_mKcH[:num_blocks] += torch.bmm(flat_xcl, query_xlH).view(num_blocks, -1, *key_mKcH.shape[2:])
                    d_query_mKlH = torch.bmm(flat_xcl.mT, key_mKcH[:num_blocks].flatten(0, 1))
                    d_query_KlH = d_query_mKlH.view(num_blocks, -1, *d_query_mKlH.shape[1:]).sum(0)
                    valid = slice(rows.start, min(rows.stop, walk.length))
                    count = valid.stop - valid.start
                    d_query_LBKH[valid, window] = d_query_KlH[:, :count].mul_(walk.scale).transpose(0, 1)
                d_key_KLH = d_key_mKcH.transpose(0, 1).flatten(1, 2)
                d_key_LBKH[:, window] = d_key_KLH[:, : walk.length].mul_(walk.scale).transpose(0, 1)
                walk.add_senses(d_senses_UKD, d_senses_xD, window)
        return d_query_LBKH, d_key_LBKH, d_senses_UKD.to(senses_UKD.dtype), None, None


class _Walk:
    """How the windows are walked through, and the buffers that every step of the walk uses again."""

    def __init__(self, query_LBKH: torch.Tensor, senses_UKD: torch.Tensor, place_BL: torch.Tensor, scale: float):
        self.length, self.num_windows, self.num_senses = query_LBKH.shape[:3]
        self.width, self.scale = senses_UKD.shape[2], scale
        kind = query_LBKH.device.type
        most = SCORE_BYTES[kind] // (4 * self.num_senses * self.length)
        block = max(SMALLEST_BLOCK, min(LARGEST_BLOCK[kind], 1 << max(0, most.bit_length() - 1)))
        self.step = min(block, self.length)
        """Queries, and keys, of one block."""
        self.num_blocks = -(-self.length // self.step)
        self.padded = self.num_blocks * self.step
        """Positions, filled up to whole blocks: the added keys are in everybody's future."""
        self._device, self._dtype = query_LBKH.device, senses_UKD.dtype
        size = self.padded * self.num_senses * self.step
        self._scores, self._second = (torch.empty(size, device=self._device) for _ in range(2))
        self._low = torch.empty(size, device=self._device, dtype=self._dtype)
        self._senses_xD = senses_UKD.new_empty(self.padded * self.num_senses, self.width)
        place_BL = torch.nn.functional.pad(place_BL, (0, self.padded - self.length))
        place_Bmc = place_BL.view(self.num_windows, self.num_blocks, 1, self.step)
        senses = torch.arange(self.num_senses, device=self._device)
        self._rows_Bx = (place_Bmc * self.num_senses + senses[:, None]).flatten(1)
        """For each window the row of [U * K, D] at each (key block, sense, key)."""
        self._future_cl = torch.full((self.step, self.step), float("-inf"), device=self._device).tril_(-1)

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Products of fp32 tensors run on the bf16 units where the model is in bf16 and the device is a CPU."""
        low = self._dtype == torch.bfloat16 and self._device.type == "cpu"
        with fp32_from_bf16() if low else contextlib.nullcontext():
            yield

    def rows(self) -> Iterator[slice]:
        """Blocks of queries; each sees the key blocks up to its own."""
        for start in range(0, self.padded, self.step):
            yield slice(start, start + self.step)

    def senses_of(self, senses_UKD: torch.Tensor, window: int) -> torch.Tensor:
        """The window's senses [key block x sense x key, D]; the next call overwrites them."""
        return torch.index_select(senses_UKD.flatten(0, 1), 0, self._rows_Bx[window], out=self._senses_xD)

    def add_senses(self, d_senses_UKD: torch.Tensor, d_senses_xD: torch.Tensor, window: int) -> None:
        """Add a window's gradient to that of the distinct tokens."""
        d_senses_UKD.view(-1, self.width).index_add_(0, self._rows_Bx[window], d_senses_xD)

    def queries(self, query_LBKH: torch.Tensor, window: int) -> torch.Tensor:
        """fp32 [K, H, L]."""
        query_KHL = query_LBKH[:, window].permute(1, 2, 0).float()
        return torch.nn.functional.pad(query_KHL, (0, self.padded - self.length))

    def keys(self, key_LBKH: torch.Tensor, window: int) -> torch.Tensor:
        """fp32 [key block, K, key, H]."""
        key_LKH = key_LBKH[:, window].float()
        key_LKH = torch.nn.functional.pad(key_LKH, (0, 0, 0, 0, 0, self.padded - self.length))
        return key_LKH.view(self.num_blocks, self.step, *key_LKH.shape[1:]).transpose(1, 2).contiguous()

    def scores(self, query_KHL: torch.Tensor, key_mKcH: torch.Tensor, rows: slice) -> torch.Tensor:
        """fp32 scores of these queries with all keys they may see, times log2(e); -inf for the future."""
        num_blocks = rows.stop // self.step
        query_mKHl = query_KHL[:, :, rows].expand(num_blocks, -1, -1, -1)
        keys_xcH, queries_xHl = key_mKcH[:num_blocks].flatten(0, 1), query_mKHl.flatten(0, 1)
        scores_xcl = self._scores[: len(keys_xcH) * self.step**2].view(-1, self.step, self.step)
        torch.baddbmm(scores_xcl, keys_xcH, queries_xHl, beta=0, alpha=self.scale * LOG2_E, out=scores_xcl)
        scores_xcl[-self.num_senses :] += self._future_cl
        return scores_xcl.view(num_blocks, self.num_senses, self.step, self.step)

    def second(self, like: torch.Tensor) -> torch.Tensor:
        """Another fp32 buffer of this shape."""
        return self._second[: like.numel()].view(like.shape)

    def low(self, values: torch.Tensor) -> torch.Tensor:
        """The values in the model's precision; the next call overwrites them."""
        return values if values.dtype == self._dtype else self._low[: values.numel()].view(values.shape).copy_(values)

    def low_like(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer in the model's precision with as many columns and elements as `like`."""
        return self._low[: like.numel()].view(-1, like.shape[-1])
