"""Models held in memory, and such with random values everywhere: no bias or norm can be forgotten unseen."""

from __future__ import annotations

import torch

from xlmega.models.config import ModelConfig
from xlmega.weights.names import logical_shapes


class Held:
    """A source of these tensors by logical name; counts how often one is read."""

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors, self.num_read = config, tensors, 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        self.num_read += 1
        return self.tensors[name]

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[name][slices]


class Drawn(Held):
    """A source of any config."""

    def __init__(self, config: ModelConfig, seed: int = 0, std: float = 0.15) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = logical_shapes(config).items()
        super().__init__(
            config, {name: torch.randn(n, generator=draw) * std + ("norm.weight" in name) for name, n in shapes}
        )
