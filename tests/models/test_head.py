"""The blockwise, vocabulary-parallel loss against a plain cross-entropy over the whole logits."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from xlmega.models import head  # noqa: E402

NUM_TOKENS, NUM_ROWS, WIDTH = 23, 57, 16


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(dtype)
    weight_VD = torch.randn(NUM_ROWS, WIDTH, generator=generator).to(dtype)
    targets_N = torch.randint(0, NUM_ROWS, (NUM_TOKENS,), generator=generator)
    targets_N[3] = targets_N[4] = targets_N[5]  # one row of the embedding gets several gradients
    weights_N = torch.rand(NUM_TOKENS, generator=generator)
    weights_N[::5] = 0.0
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N, weights_N


def _plain(factor: float = 1.0) -> list[torch.Tensor]:
    """Loss, nll and the two gradients in fp64, from the whole logits."""
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    hidden_ND, weight_VD = (x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD))
    nll_N = F.cross_entropy(hidden_ND @ weight_VD.t(), targets_N, reduction="none")
    loss = (nll_N * weights_N).sum()
    (loss * factor).backward()
    return [loss.detach(), nll_N.detach(), hidden_ND.grad, weight_VD.grad]


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= tolerance * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("rows_in_block", [1, 19, NUM_ROWS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_on_a_gpu_it_is_the_same(rows_in_block: int, dtype: torch.dtype, tolerance: float) -> None:
    found = [x.detach().to("cuda", dtype if x.is_floating_point() else None) for x in _inputs()[:3]]
    hidden_ND, weight_VD, targets_N = (x.requires_grad_() if x.is_floating_point() else x for x in found)
    loss, nll_N = head.weighted_loss(
        hidden_ND,
        weight_VD,
        targets_N,
        _inputs()[3].cuda(),
        gradient_scale=0.25,
        chunk_bytes=rows_in_block * NUM_TOKENS * hidden_ND.element_size(),
    )
    (loss * 8.0).backward()
    for value, expected in zip((loss, nll_N, hidden_ND.grad, weight_VD.grad), _plain(8.0)):
        _close(value.detach().cpu(), expected, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_a_vocabulary_wider_than_a_program_is_summed() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = (torch.randn(n, 32, generator=generator).cuda().requires_grad_() for n in (40, 5003))
    targets_N = torch.randint(0, 5003, (40,), generator=generator).cuda()
    loss, nll_N = head.weighted_loss(hidden_ND, weight_VD, targets_N, torch.ones(40, device="cuda"))
    expected_N = F.cross_entropy(hidden_ND.double() @ weight_VD.double().t(), targets_N, reduction="none")
    _close(nll_N, expected_N.detach())
    wanted = torch.autograd.grad(expected_N.sum(), (hidden_ND, weight_VD))
    for gradient, other in zip(torch.autograd.grad(loss, (hidden_ND, weight_VD)), wanted, strict=True):
        _close(gradient, other, 5e-6)  # a sum of 5,003 products in fp32


@pytest.mark.parametrize("rows_in_block", [1, 5, 19, NUM_ROWS - 1, NUM_ROWS, 1000])
def test_fp32_equals_cross_entropy_for_any_block(rows_in_block: int) -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, nll_N = head.weighted_loss(
        hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes=rows_in_block * NUM_TOKENS * 4
    )
    loss.backward()
    for found, expected in zip((loss, nll_N, hidden_ND.grad, weight_VD.grad), _plain()):
        _close(found.detach(), expected)


def test_a_block_smaller_than_one_row_still_takes_one() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, _ = head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes=1)
    _close(loss.detach(), _plain()[0])


@pytest.mark.parametrize("rows", [1, 4, NUM_TOKENS])
def test_parts_for_the_cache_that_do_not_divide_the_tokens(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CACHE_BYTES", rows * NUM_ROWS * 4)
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, nll_N = head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes=10 * NUM_TOKENS * 4)
    loss.backward()
    for found, expected in zip((loss, nll_N, hidden_ND.grad, weight_VD.grad), _plain()):
        _close(found.detach(), expected)


def test_targets_of_weight_zero_leave_no_trace() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N)[0].backward()
    assert torch.count_nonzero(hidden_ND.grad[weights_N == 0]) == 0
    other = targets_N.masked_fill(weights_N == 0, 1)
    again_ND, same_VD, _, _ = _inputs()
    head.weighted_loss(again_ND, same_VD, other, weights_N)[0].backward()
    assert torch.equal(same_VD.grad, weight_VD.grad)


def test_all_weights_zero_give_zero_loss_and_gradients() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, _ = head.weighted_loss(hidden_ND, weight_VD, targets_N, torch.zeros_like(weights_N))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(hidden_ND.grad) == torch.count_nonzero(weight_VD.grad) == 0


@pytest.mark.parametrize(("told", "applied"), [(1.0, 1.0), (1024.0, 1024.0), (1.0, 0.25), (8.0, 2.0)])
def test_gradients_bear_the_factor_on_the_loss_whether_it_was_told_or_not(told: float, applied: float) -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, nll_N = head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N, gradient_scale=told)
    (loss * applied).backward()
    for found, expected in zip((loss, nll_N, hidden_ND.grad, weight_VD.grad), _plain(applied)):
        _close(found.detach(), expected)


def test_fp16_keeps_gradients_that_its_range_would_lose() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs(torch.float16)
    unit = 2.0**-20
    scale = 2.0**20
    loss, _ = head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N * unit, gradient_scale=scale)
    (loss * scale).backward()
    _close(hidden_ND.grad, _plain()[2], 1e-2)


def test_without_gradients_only_the_nll_is_formed() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    with torch.no_grad():
        loss, nll_N = head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes=7 * NUM_TOKENS * 4)
    assert not loss.requires_grad
    _close(loss, _plain()[0])
    _close(nll_N, _plain()[1])


def test_a_frozen_embedding_gets_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    weight_VD.requires_grad_(False)
    head.weighted_loss(hidden_ND, weight_VD, targets_N, weights_N)[0].backward()
    assert weight_VD.grad is None
    _close(hidden_ND.grad, _plain()[2])


def test_very_large_logits_stay_finite() -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    loss, nll_N = head.weighted_loss(hidden_ND * 1e4, weight_VD, targets_N, weights_N)
    loss.backward()
    assert nll_N.isfinite().all() and hidden_ND.grad.isfinite().all() and weight_VD.grad.isfinite().all()


@pytest.mark.parametrize("rows_in_block", [6, NUM_ROWS])
def test_bf16_is_as_near_as_its_rounding_allows(rows_in_block: int) -> None:
    hidden_ND, weight_VD, targets_N, weights_N = _inputs(torch.bfloat16)
    loss, nll_N = head.weighted_loss(
        hidden_ND, weight_VD, targets_N, weights_N, chunk_bytes=rows_in_block * NUM_TOKENS * 2
    )
    loss.backward()
    exact_ND, exact_VD = (x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD))
    exact_N = F.cross_entropy(exact_ND @ exact_VD.t(), targets_N, reduction="none")
    (exact_N * weights_N).sum().backward()
    assert nll_N.dtype == loss.dtype == torch.float32
    _close(nll_N, exact_N.detach(), 5e-3)  # logits up to 16 are rounded to 1/16
    for found, expected in ((hidden_ND.grad, exact_ND.grad), (weight_VD.grad, exact_VD.grad)):
        assert found.dtype == torch.bfloat16
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


class _Meeting:
    """Stands in for a process group whose ranks are threads; only the `all_reduce` that the head needs."""

    def __init__(self, num_ranks: int):
        self._num_ranks = num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=timedelta(seconds=30).total_seconds())
        self._values: dict[int, torch.Tensor] = {}

    def size(self) -> int:
        return self._num_ranks

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM, group: object = None) -> None:
        self._values[threading.get_ident()] = tensor.clone()
        self._barrier.wait()
        values = torch.stack(list(self._values.values()))
        tensor.copy_(values.amax(0) if op == dist.ReduceOp.MAX else values.sum(0))
        self._barrier.wait()


@pytest.mark.parametrize("rows_in_block", [12, 1000])  # the ranks may have different numbers of blocks
@pytest.mark.parametrize("cuts", [(30, 27), (37, 20), (40, 17, 0)])  # a tiny vocabulary leaves the last without rows
def test_a_vocabulary_split_over_ranks_gives_the_same(
    cuts: tuple[int, ...], rows_in_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = _Meeting(len(cuts))
    monkeypatch.setattr(head.dist, "all_reduce", meeting.all_reduce)
    hidden_ND, weight_VD, targets_N, weights_N = _inputs()
    found: dict[int, tuple[torch.Tensor, ...]] = {}

    def work(rank: int) -> None:
        first_row = sum(cuts[:rank])
        rows_VD = weight_VD.detach()[first_row : first_row + cuts[rank]].clone().requires_grad_()
        mine_ND = hidden_ND.detach().clone().requires_grad_()
        loss, nll_N = head.weighted_loss(
            mine_ND,
            rows_VD,
            targets_N,
            weights_N,
            first_row=first_row,
            group=meeting,
            chunk_bytes=rows_in_block * NUM_TOKENS * 4,
        )
        loss.backward()
        found[rank] = loss.detach(), nll_N, mine_ND.grad, rows_VD.grad

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(cuts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == len(cuts)
    loss, nll_N, d_hidden_ND, d_weight_VD = _plain()
    for rank in found:
        _close(found[rank][0], loss)
        _close(found[rank][1], nll_N)
    # Each rank has its rows' share of the gradient of the hidden states; the caller's mapping sums them.
    _close(torch.stack([found[rank][2] for rank in found]).sum(0), d_hidden_ND)
    _close(torch.cat([found[rank][3] for rank in sorted(found)]), d_weight_VD)
