"""Are two models the same, and where not: digests and differences of logical tensors.

In come sources of logical tensors (checkpoints, their moments, logical or Hugging Face directories); out go sha256
digests that know neither layout nor file, and for each tensor how many values are equal and how far the others are
apart. A few megabytes are in memory at a time, whatever the size of the tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK_VALUES = 1 << 21


class SlicedTensors(Protocol):
    """Logical tensors that can be read in slices."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Difference:
    """How one tensor of A and of B differ."""

    name: str
    shape: tuple[int, ...]
    equal: int
    """Values with the same bits."""
    largest: float
    """Largest |A - B|; nan where either has one and the other does not."""
    scale: float
    """Largest |A|."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor_hash(source: SlicedTensors, name: str) -> str:
    """The sha256 of a logical tensor's name, shape and fp32 values in row order."""
    digest = hashlib.sha256(f"{name}{tuple(source.shape(name))}".encode())
    for block in _blocks(source.shape(name)):
        digest.update(_bits(source, name, block).numpy().tobytes())
    return digest.hexdigest()


def logical_hash(*sources: SlicedTensors) -> str:
    """One sha256 over all tensors of all sources; whatever layout wrote them, equal values give an equal hash."""
    digest = hashlib.sha256()
    for source in sources:
        for name in sorted(source.names()):
            digest.update(tensor_hash(source, name).encode())
    return digest.hexdigest()


def differences(ours: SlicedTensors, theirs: SlicedTensors, names: Sequence[str]) -> Iterator[Difference]:
    """Tensor by tensor, of names and shapes that both have."""
    for name in names:
        shape = tuple(ours.shape(name))
        equal, largest, scale = 0, 0.0, 0.0
        for block in _blocks(shape):
            a, b = _bits(ours, name, block), _bits(theirs, name, block)
            same = a == b
            equal += int(same.sum())
            a, b = a.view(torch.float32), b.view(torch.float32)
            if a.numel():
                scale = max(scale, a.abs().max().item())
            apart = (a - b).abs()[~same]
            if apart.numel():
                largest = torch.tensor([largest, apart.max().item()]).max().item()  # a nan stays one
        yield Difference(name, shape, equal, largest, scale)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Runs of whole rows."""
    rows = max(1, BLOCK_VALUES // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 0, rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(None) for _ in shape[1:]))
    if not shape:
        yield ()


def _bits(source: SlicedTensors, name: str, block: tuple[slice, ...]) -> torch.Tensor:
    return source.read_slice(name, block).float().contiguous().view(torch.int32)
