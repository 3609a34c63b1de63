"""Digests that know no layout, and differences that name values."""

from __future__ import annotations

import math

import pytest
import torch

from xlmega.weights import comparison
from xlmega.weights.comparison import Difference, differences, logical_hash, tensor_hash

pytestmark = pytest.mark.torch


class Held:
    """Tensors in memory as a source."""

    def __init__(self, **tensors: torch.Tensor):
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self._tensors[name][slices]


def test_a_digest_sees_every_bit_and_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.arange(12.0).view(3, 4), torch.zeros(5)
    whole = logical_hash(Held(a=a, b=b))
    assert whole == logical_hash(Held(b=b, a=a))
    assert whole != logical_hash(Held(a=a.view(4, 3), b=b)) and whole != logical_hash(Held(a=a, c=b))
    assert tensor_hash(Held(b=b), "b") != tensor_hash(Held(b=-b), "b")  # -0.0 is another value
    monkeypatch.setattr(comparison, "BLOCK_VALUES", 5)  # in several blocks
    assert whole == logical_hash(Held(a=a, b=b))


def test_differences_name_how_many_and_how_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "BLOCK_VALUES", 4)
    a = torch.tensor([[1.0, -8.0], [3.0, 4.0], [5.0, math.nan]])
    b = a.clone()
    (found,) = differences(Held(a=a), Held(a=b), ["a"])
    assert found.equal == 6  # the same nan
    b[0, 0], b[2, 0] = 1.5, 5.25
    (found,) = differences(Held(a=a[:, :1]), Held(a=b[:, :1]), ["a"])
    assert found == Difference("a", (3, 1), 1, 0.5, 5.0) and found.size == 3
    b[1, 1] = math.nan
    (found,) = differences(Held(a=a), Held(a=b), ["a"])
    assert found.equal == 3 and math.isnan(found.largest)
