"""Dropout that is a function of the window and the place."""

from __future__ import annotations

import pytest
import torch

from xlmega.errors import ConfigError
from xlmega.models.dropout import announced, dropout, keep_mask, windows

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


def dropped(
    hidden: torch.Tensor, slots: tuple[int, ...], *, seed: int = 0, place: str = "x", **where: int
) -> torch.Tensor:
    with windows(seed, slots):
        return dropout(hidden, 0.25, place, **where)


def test_a_mask_depends_on_seed_slot_and_place_alone() -> None:
    with windows(1, (0,)):
        first = keep_mask((50, 8), 0.5, "mlp/1", 3, CPU)
        torch.manual_seed(5)
        torch.rand(3)
        assert torch.equal(keep_mask((50, 8), 0.5, "mlp/1", 3, CPU), first)
        assert not torch.equal(keep_mask((50, 8), 0.5, "mlp/1", 4, CPU), first)
        assert not torch.equal(keep_mask((50, 8), 0.5, "mlp/2", 3, CPU), first)
    with windows(2, (0,)):
        assert not torch.equal(keep_mask((50, 8), 0.5, "mlp/1", 3, CPU), first)


def test_windows_keep_their_masks_in_any_batch() -> None:
    hidden_LBD = torch.randn(6, 4, 8)
    together = dropped(hidden_LBD, (10, 11, 12, 13))
    assert torch.equal(dropped(hidden_LBD[:, 2:], (12, 13)), together[:, 2:])
    order = [3, 0, 2, 1]
    assert torch.equal(dropped(hidden_LBD[:, order], (13, 10, 12, 11)), together[:, order])


def test_shares_of_a_sequence_are_slices_of_the_whole() -> None:
    hidden_LBD = torch.randn(8, 2, 5)
    whole = dropped(hidden_LBD, (0, 1))
    for first, last in ((0, 2), (2, 4), (4, 8), (0, 8)):
        share = dropped(hidden_LBD[first:last], (0, 1), first_position=first, num_positions=8)
        assert torch.equal(share, whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.25])
def test_expectation_is_kept(dtype: torch.dtype, p: float) -> None:
    hidden_LBD = torch.full((1000, 2, 500), 9.0, dtype=dtype)
    with windows(0, (0, 1)):
        out = dropout(hidden_LBD, p, "x")
    assert out.dtype == dtype
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=2e-3)
    # 9 / 0.9 = 10 and 9 / 0.75 = 12 are exact in bf16: a rounded factor would show.
    assert out.unique().tolist() == [0.0, pytest.approx(9.0 / (1 - p), rel=1e-6)]


def test_nothing_is_dropped_without_slots_or_probability() -> None:
    hidden_LBD = torch.randn(3, 2, 4)
    with windows(0, None):
        assert dropout(hidden_LBD, 0.5, "x") is hidden_LBD
    with windows(0, (0, 1)):
        assert dropout(hidden_LBD, 0.0, "x") is hidden_LBD
    assert dropout(hidden_LBD, 0.5, "x") is hidden_LBD


def test_announcements_nest_and_end() -> None:
    assert announced() == (0, None)
    with windows(3, [1, 2]):
        with windows(4, None):
            assert announced() == (4, None)
        assert announced() == (3, (1, 2))
    with pytest.raises(RuntimeError), windows(5, (1,)):
        raise RuntimeError
    assert announced() == (0, None)


def test_another_number_of_windows_than_announced_is_refused() -> None:
    with windows(0, (0, 1, 2)), pytest.raises(ConfigError, match="announced for 3 windows, but the batch has 2"):
        dropout(torch.zeros(3, 2, 4), 0.5, "x")


def test_gradient_has_the_same_mask() -> None:
    hidden_LBD = torch.randn(20, 2, 10, requires_grad=True)
    out = dropped(hidden_LBD, (0, 1))
    out.sum().backward()
    assert hidden_LBD.grad is not None
    assert torch.equal(hidden_LBD.grad == 0, out == 0)
