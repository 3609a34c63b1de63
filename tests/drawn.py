"""Models with random values everywhere, held in memory: no bias or norm can be forgotten unseen."""

from __future__ import annotations

import torch

from xlmega.models.config import ModelConfig
from xlmega.weights.names import logical_shapes


class Drawn:
    """A LogicalTensors of any config; counts how often it is read."""

    def __init__(self, config: ModelConfig, seed: int = 0, std: float = 0.15) -> None:
        self.config, self.num_read = config, 0
        draw = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: torch.randn(shape, generator=draw) * std + ("norm.weight" in name)
            for name, shape in logical_shapes(config).items()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.num_read += 1
        return self.tensors[name]
