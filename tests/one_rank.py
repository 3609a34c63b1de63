"""A decoder in a group of one rank with weights that all count, and batches for it: for tests of single models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from worlds import free_port

from xlmega.models.config import ModelConfig
from xlmega.models.decoder import Decoder, MicroBatch
from xlmega.models.specs import transformer_config
from xlmega.parallel import groups
from xlmega.parallel.layout import Layout
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import shards_of


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """The groups of one rank; afterwards everything is as before."""
    process = groups.Process(0, 1, 0, "127.0.0.1", free_port(), "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS"):
            patch.setenv(name, "0")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are too small for more, and other tests may be running
        with groups.joined(process, Layout()):
            yield
        torch.set_num_threads(threads)


def uneven_weights(model: ModelConfig, seed: int = 3) -> dict[str, torch.Tensor]:
    """Initial weights by logical name, biases and norms made uneven so that each one counts."""
    shapes = logical_shapes(model)
    weights = InitialWeights(model, seed, shapes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = weights.read_slice(name, (slice(None),) * len(shape))
        if len(shape) == 1:
            tensors[name] = tensors[name] + 0.2 * torch.randn(shape, generator=generator)
    return tensors


def built(model: ModelConfig, **how: Any) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A decoder, built as the words for it say, and its weights."""
    decoder = Decoder(model, transformer_config(model, Layout(), dtype=torch.float32, on_cpu=True), **how)
    tensors = uneven_weights(model)
    for shard, parameter in shards_of([decoder], model, 0, 1):
        parameter.data.copy_(tensors[shard.name])
    return decoder, tensors


def batch_of(
    model: ModelConfig, windows: int = 4, length: int = 17, slots: tuple[int, ...] | None = None
) -> MicroBatch:
    """Arbitrary ids and weights."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.vocab_size, (windows, length + 1), generator=generator)
    return MicroBatch(ids[:, :-1], ids[:, 1:], torch.rand(windows, length, generator=generator), slots)


def part(batch: MicroBatch, rows: slice) -> MicroBatch:
    """Some of the windows."""
    slots = None if batch.slots is None else batch.slots[rows]
    return MicroBatch(batch.tokens_BL[rows], batch.targets_BL[rows], batch.weights_BL[rows], slots)


def gradients(decoder: Decoder, *batches: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and the accumulated gradients by parameter name."""
    decoder.zero_grad()
    losses = []
    for batch in batches:
        loss, _ = decoder(batch)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
