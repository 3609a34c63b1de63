"""The blockwise mix of senses against all of alpha written out."""

from __future__ import annotations

import pytest
import torch

from xlmega.models import senses
from xlmega.models.senses import mix_senses

pytestmark = pytest.mark.torch
# On a GPU the kernels do it, on a CPU (and where triton is not installed) the walk.
on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
        ),
    ],
)


def written_out(
    query_LBKH: torch.Tensor, key_LBKH: torch.Tensor, senses_UKD: torch.Tensor, place_BL: torch.Tensor, scale: float
) -> torch.Tensor:
    length = len(query_LBKH)
    scores_BKLS = torch.einsum("lbkh,sbkh->bkls", query_LBKH.double(), key_LBKH.double()) * scale
    future_LS = torch.ones(length, length, dtype=torch.bool, device=query_LBKH.device).triu(1)
    alpha_BKLS = scores_BKLS.masked_fill(future_LS, float("-inf")).softmax(-1)
    return torch.einsum("bkls,bskd->lbd", alpha_BKLS, senses_UKD.double()[place_BL]).float()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Values to 1e-5; on a GPU, where sums are taken in another order, to 5e-6 of the largest."""
    if found.device.type == "cuda":
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * expected.abs().max().item())
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def inputs(
    length: int, num_senses: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, 3, num_senses, 8)] * 2 + [(11, num_senses, 24)]
    values = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return *values, torch.randint(11, (3, length), generator=generator).to(device)


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.device)


# One position; a whole block; a part of a block more; blocks of the smallest size because there are many senses.
@on_every_device
@pytest.mark.parametrize(("length", "num_senses"), [(1, 1), (128, 2), (130, 2), (100, 512), (300, 5)])
def test_mix_and_gradients(length: int, num_senses: int, device: str) -> None:
    *values, place_BL = inputs(length, num_senses, device=device)
    mixed, expected = mix_senses(*values, place_BL, 0.3), written_out(*values, place_BL, 0.3)
    assert_near(mixed, expected)
    d_mixed = random_like(mixed)
    found = torch.autograd.grad(mixed, values, d_mixed)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, values, d_mixed), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * wanted.abs().max().clamp(min=1).item())


@on_every_device
def test_large_scores_neither_overflow_nor_vanish(device: str) -> None:
    query, key, sense_vectors, place_BL = inputs(40, 3, device=device)
    values = (query.detach() * 100, key.detach() * 100, sense_vectors.detach())
    found, expected = mix_senses(*values, place_BL, 1.0), written_out(*values, place_BL, 1.0)
    if device == "cuda":  # scores of up to 1e5 are rounded to 1/128 in fp32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    else:
        torch.testing.assert_close(found, expected)


@on_every_device
def test_bf16_is_as_near_as_bf16_can_be(device: str) -> None:
    *values, place_BL = inputs(200, 4, torch.bfloat16, device)
    mixed, expected = mix_senses(*values, place_BL, 0.3), written_out(*values, place_BL, 0.3)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    d_mixed = random_like(mixed)
    found = torch.autograd.grad(mixed, values, d_mixed.bfloat16())
    for gradient, wanted in zip(found, torch.autograd.grad(expected, values, d_mixed), strict=True):
        torch.testing.assert_close(gradient.float(), wanted.float(), rtol=0, atol=2e-2 * wanted.abs().max().item())


@on_every_device
@pytest.mark.parametrize("width", [40, 384])
def test_queries_and_keys_may_be_views_and_senses_of_any_width(width: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(70, 2, 3, 2, 5, generator=generator).to(device).requires_grad_()
    vectors = torch.randn(9, 3, width, generator=generator).to(device).requires_grad_()
    place_BL = torch.randint(9, (70, 2), generator=generator).to(device).t()
    mixed = mix_senses(pairs[..., 0, :], pairs[..., 1, :], vectors, place_BL, 0.5)
    expected = written_out(pairs[..., 0, :], pairs[..., 1, :], vectors, place_BL, 0.5)
    assert_near(mixed, expected)
    d_mixed = random_like(mixed)
    found = torch.autograd.grad(mixed, (pairs, vectors), d_mixed)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (pairs, vectors), d_mixed), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_what_is_held_grows_with_the_length_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for length in (512, 4096):
        query, _, sense_vectors, _ = inputs(16, 16)
        walk = senses._Walk(
            query.expand(-1, -1, -1, -1).new_empty(length, 1, 16, 8),
            sense_vectors,
            torch.zeros(1, length, dtype=torch.long),
            1.0,
        )
        sizes.append(walk._scores.numel())
    assert sizes[1] <= 8 * sizes[0]
