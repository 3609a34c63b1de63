"""Dropout whose mask is a function of (seed, window, place), never of rank, micro-batch or recomputation.

In comes an activation and the place in the model where it is dropped; out goes the activation with the mask of the
windows that `windows(...)` announced. The mask of a window is drawn whole from a generator seeded by its slot in the
run, the layer and the site, then cut to what this rank holds. So dropout keeps promise 1: layouts do not change it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch

from xlmega.errors import ConfigError

_seed: int = 0
_slots: tuple[int, ...] | None = None


@contextlib.contextmanager
def windows(seed: int, slots: Sequence[int] | None) -> Iterator[None]:
    """Announce which windows (slots of the run) the coming forward pass holds, in batch order; None: no dropout."""
    global _seed, _slots
    before = _seed, _slots
    _seed, _slots = seed, None if slots is None else tuple(slots)
    try:
        yield
    finally:
        _seed, _slots = before


def announced() -> tuple[int, tuple[int, ...] | None]:
    """What `windows` announced: recomputation remembers it and announces it again."""
    return _seed, _slots


def dropout(
    hidden_LBD: torch.Tensor, p: float, place: str, *, first_position: int = 0, num_positions: int | None = None
) -> torch.Tensor:
    """Dropout over [L, B, D], where this rank may hold positions first_position.. of num_positions."""
    if p == 0.0 or _slots is None:
        return hidden_LBD
    positions, batch, width = hidden_LBD.shape
    if len(_slots) != batch:
        raise ConfigError(f"dropout was announced for {len(_slots)} windows, but the batch has {batch}.")
    total = num_positions or positions
    masks = [
        keep_mask((total, width), p, place, slot, hidden_LBD.device)[first_position : first_position + positions]
        for slot in _slots
    ]
    # The factor is a Python number: as a bf16 tensor 1 / 0.9 would be 0.16 % too small, the same for every value.
    return hidden_LBD * (1.0 / (1.0 - p)) * torch.stack(masks, dim=1)


def keep_mask(shape: tuple[int, ...], p: float, place: str, slot: int, device: torch.device) -> torch.Tensor:
    """Which entries of one window stay: a bool tensor, the same on every rank (of one kind of device)."""
    digest = hashlib.blake2b(f"{_seed}/{slot}/{place}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(shape, generator=generator, device=device) >= p
