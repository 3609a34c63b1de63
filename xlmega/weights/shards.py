"""Which piece of which logical tensor this rank holds.

In come a rank's model chunks; out go, for each parameter, its logical name and shape and the slice of it that lies
here. Logical names and shapes know no rank: the layer number counts over the whole model, vocabulary padding does not
exist, and the head of a tied model is the embedding. What is stored, initialised and compared is always the logical.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from xlmega.models.config import ModelConfig
from xlmega.models.decoder import Decoder, padded_vocabulary

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Shard:
    """Rows (or columns) start..stop of a logical tensor along `axis`; all of it where axis is None."""

    name: str
    shape: tuple[int, ...]
    """Logical shape, without padding."""
    axis: int | None
    start: int
    stop: int
    local_shape: tuple[int, ...]
    """Shape of the parameter on this rank, padding included."""
    is_copy: bool = False
    """The last stage's copy of a tied embedding: kept equal to the first stage's, and stored there."""

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where this shard lies in the logical tensor."""
        return tuple(slice(self.start, self.stop) if a == self.axis else slice(None) for a in range(len(self.shape)))

    def valid(self, local: torch.Tensor) -> torch.Tensor:
        """The part of the local tensor that is not padding (a view)."""
        return local if self.axis is None else local.narrow(self.axis, 0, self.stop - self.start)


class LogicalSource(Protocol):
    """Anything that can say what a slice of a logical tensor is: a seed, a checkpoint, an imported model."""

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The slice as an fp32 CPU tensor."""
        ...


def shards_of(
    stages: Sequence[Decoder], model: ModelConfig, tp_rank: int, tp_size: int
) -> list[tuple[Shard, torch.nn.Parameter]]:
    """Every parameter of this rank with its shard, in an order that is the same wherever the same stages are built."""
    return [
        (_shard(stage, name, parameter, model, tp_rank, tp_size), parameter)
        for stage in stages
        for name, parameter in stage.named_parameters()
    ]


def _shard(
    stage: Decoder, name: str, parameter: torch.nn.Parameter, model: ModelConfig, tp_rank: int, tp_size: int
) -> Shard:
    local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 the parameter itself is empty
    cut = getattr(parameter, "tensor_model_parallel", False)
    axis: int | None = parameter.partition_dim if cut else None  # type: ignore[attr-defined]
    is_copy = stage.head_copies_embedding and name == "output_layer.weight"
    logical = EMBEDDING if is_copy else _over_the_model(name, stage.decoder.first_layer)
    if axis is None:
        return Shard(logical, local_shape, None, 0, 0, local_shape, is_copy)
    size = local_shape[axis] * tp_size
    if size == padded_vocabulary(model.vocab_size, tp_size) and logical.endswith(
        ("word_embeddings.weight", "output_layer.weight")
    ):
        size = model.vocab_size
    start = min(tp_rank * local_shape[axis], size)
    stop = min(start + local_shape[axis], size)
    shape = tuple(size if a == axis else n for a, n in enumerate(local_shape))
    return Shard(logical, shape, axis, start, stop, local_shape, is_copy)


def _over_the_model(name: str, first_layer: int) -> str:
    """A stage's parameter name with its layer counted over the whole model."""
    return re.sub(r"^decoder\.layers\.(\d+)\.", lambda match: f"decoder.layers.{first_layer + int(match[1])}.", name)
