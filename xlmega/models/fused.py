"""Whether kernels of our own do a tensor's work. Torch alone: triton is only imported where it is used."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

# What the kernels' blocks take of a multiprocessor; an A100 has 163 kB and an H100 227, cards for the desk have 100.
SHARED_MEMORY_BYTES = 160_000


@functools.lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    properties = torch.cuda.get_device_properties(device)
    if getattr(properties, "shared_memory_per_block_optin", 0) < SHARED_MEMORY_BYTES:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    from xlmega.models import kernels

    return kernels


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """`models.kernels` where the tensor is on an NVIDIA GPU that they fit and triton is installed, else None."""
    return _kernels(tensor.device) if tensor.device.type == "cuda" and torch.version.cuda else None
