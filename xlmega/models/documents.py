"""Which tokens of a micro-batch may see each other, where windows hold several documents.

In comes `Batch.documents` as a tensor; while it is announced, attention runs within each document and positions begin
anew with it, so that a document gives what it would give in a window of its own. None announced: a window is one text.

Shape letters: B windows, L positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import torch

_numbers_BL: torch.Tensor | None = None


@contextlib.contextmanager
def within(numbers_BL: torch.Tensor | None) -> Iterator[None]:
    """Announce the documents of the coming pass, numbered 0, 1, ... along each window; None: tell none apart."""
    global _numbers_BL
    before = _numbers_BL
    _numbers_BL = numbers_BL
    try:
        yield
    finally:
        _numbers_BL = before


def announced() -> torch.Tensor | None:
    """What `within` announced: recomputation remembers it and announces it again."""
    return _numbers_BL


def spans(numbers_BL: torch.Tensor) -> list[list[slice]]:
    """Of each window, where its documents lie."""
    length = numbers_BL.shape[1]
    result = []
    for numbers_L in numbers_BL.cpu():
        bounds = [0, *(torch.nonzero(torch.diff(numbers_L))[:, 0] + 1).tolist(), length]
        result.append([slice(start, end) for start, end in pairwise(bounds)])
    return result


def positions(numbers_BL: torch.Tensor) -> torch.Tensor:
    """[B, L]: each token's place in its document, from 0."""
    places_L = torch.arange(numbers_BL.shape[1], device=numbers_BL.device)
    begins_BL = torch.diff(numbers_BL, dim=1, prepend=numbers_BL[:, :1] - 1) != 0
    first_BL = torch.where(begins_BL, places_L, 0).cummax(dim=1).values
    return places_L - first_BL
