"""Blockwise attention in bf16 on a CPU against attention in fp64 over the whole score matrix."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from xlmega.models import attention  # noqa: E402
from xlmega.models.positions import alibi_slopes, rotated  # noqa: E402


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, slopes_H: torch.Tensor | None
) -> torch.Tensor:
    """[L, B, H, K] to the same, every score held."""
    query_BHLK, key_BHLK, value_BHLK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    scores = query_BHLK @ key_BHLK.mT * scale
    if slopes_H is not None:
        scores = scores + slopes_H[:, None, None] * torch.arange(len(query))
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ value_BHLK).permute(2, 0, 1, 3)


def _both(
    length: int, batch: int, heads: int, width: int, slopes_H: torch.Tensor | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(found, exact) for the output and for the gradient of queries, keys and values side by side."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(length, batch, heads, 3 * width, generator=generator).bfloat16()
    gradient = torch.randn(length, batch, heads, width, generator=generator).bfloat16()
    results = []
    for function, dtype in ((attention._BlockwiseAttention.apply, torch.bfloat16), (_exact, torch.float64)):
        leaf = mixed.to(dtype, copy=True).requires_grad_()
        output = function(*leaf.split(width, dim=-1), width**-0.5, slopes_H)
        output.backward(gradient.to(dtype))
        results.append((output.detach().double(), leaf.grad.double()))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize(
    ("length", "batch", "heads", "width"),
    [(1, 1, 1, 8), (7, 2, 3, 8), (128, 1, 2, 64), (129, 1, 2, 32), (300, 2, 3, 24)],
)
def test_output_and_gradients_are_within_rounding_of_bf16(length: int, batch: int, heads: int, width: int) -> None:
    for slopes_H in (None, alibi_slopes(heads)):
        for found, exact in _both(length, batch, heads, width, slopes_H):
            assert float((found - exact).norm() / exact.norm().clamp_min(1e-9)) < 5e-3


def test_slopes_by_eye() -> None:
    assert alibi_slopes(4).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    # Six heads: those of four, then every second one of those of eight.
    assert alibi_slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_rotation_by_eye() -> None:
    ones = torch.ones(3, 1, 1, 6)
    turned = rotated(ones, 4, base=100.0)
    assert torch.equal(turned[0], ones[0]) and torch.equal(turned[..., 4:], ones[..., 4:])
    for place, angle in ((1, 1.0), (2, 2.0)):
        expected = [math.cos(a) - math.sin(a) for a in (angle, angle / 10)]
        expected += [math.cos(a) + math.sin(a) for a in (angle, angle / 10)]
        assert turned[place, 0, 0, :4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("score_bytes", [1, 4 * 128 * 200 * 2])
def test_heads_taken_together_do_not_matter(score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _both(200, 1, 3, 16)
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    for (found, _), (before, _) in zip(_both(200, 1, 3, 16), whole, strict=True):
        assert float((found - before).norm() / before.norm()) < 2e-3


def test_later_positions_are_not_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(150, 1, 2, 16, generator=generator).bfloat16() for _ in range(3))
    before = attention._BlockwiseAttention.apply(query, key, value, 0.25, None)
    key[140:], value[140:] = 100.0, -100.0
    assert torch.equal(attention._BlockwiseAttention.apply(query, key, value, 0.25, None)[:140], before[:140])


def test_the_precision_of_other_products_is_left_alone() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has no switch for it")
    before = matmul.fp32_precision
    _both(20, 1, 1, 8)
    assert matmul.fp32_precision == before
