"""Initial weights as a function of (seed, logical name): the same model whatever the layout or construction order.

In come a ModelConfig and a seed; out goes any slice of any logical tensor. A matrix is drawn in blocks of rows, each
from a generator of its own, so a rank draws little more than what it holds.
"""

from __future__ import annotations

import hashlib
import math

import torch

from xlmega.models.config import ModelConfig

_BLOCK_ELEMENTS = 1 << 18
_MLP_OUTPUT = ("mlp.linear_fc2.weight",)
_OTHER_OUTPUTS = ("self_attention.linear_proj.weight", "senses.output.weight")


class InitialWeights:
    """N(0, init_std) for matrices, ones for norm weights, zeros for biases (METHODS §1.6, §2.10)."""

    def __init__(self, model: ModelConfig, seed: int, shapes: dict[str, tuple[int, ...]]):
        self._model = model
        self._seed = seed
        self._shapes = shapes

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The slice as an fp32 CPU tensor."""
        shape = self._shapes[name]
        if len(shape) == 1:
            value = 1.0 if name.endswith("layernorm.weight") else 0.0
            return torch.full(shape, value)[slices]
        rows, columns = shape
        first, last, _ = slices[0].indices(rows)
        block_rows = max(1, _BLOCK_ELEMENTS // columns)
        out = torch.empty(last - first, columns)[:, slices[1]]
        for block in range(first // block_rows, -(-last // block_rows)):
            top = block * block_rows
            drawn = self._block(name, block, min(block_rows, rows - top), columns)
            begin, end = max(first, top), min(last, top + drawn.shape[0])
            out[begin - first : end - first] = drawn[begin - top : end - top, slices[1]]
        return out

    def _block(self, name: str, block: int, rows: int, columns: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.empty(rows, columns).normal_(0.0, self._std(name), generator=generator)

    def _std(self, name: str) -> float:
        smaller = {"plain": (), "mlp": _MLP_OUTPUT, "both": (*_MLP_OUTPUT, *_OTHER_OUTPUTS)}
        if name.endswith(smaller[self._model.residual_init]):
            return self._model.init_std / math.sqrt(2 * self._model.stage_units)
        return self._model.init_std
