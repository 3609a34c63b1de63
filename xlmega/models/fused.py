"""Whether kernels of our own do a tensor's work. Torch alone: triton is only imported where it is used."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch


@functools.lru_cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from xlmega.models import kernels

    return kernels


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """`models.kernels` where the tensor is on an NVIDIA GPU and triton is installed, else None."""
    return _kernels() if tensor.device.type == "cuda" and torch.version.cuda else None
