"""Averages of models: the weighted mean of k LogicalTensors is one more.

In: models of one shape and vocabulary, from runs, checkpoints, directories or files, and a weight for each. Out: their
mean in fp32, computed when a tensor is read. Weights come from the caller, or from how often a language's documents
fall into each model's cluster (the `subset_k` most frequent ones, renormalised).
Guaranteed: sums run in fp64 and are rounded once, so the mean of k copies of a model is that model bit for bit, and no
order of the models changes more than the last bit; memory holds one tensor, and of the largest ones a block of rows.
Source: METHODS §2.8 (X-ELM's average.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xlmega import config as tables
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.models.config import ModelConfig
from xlmega.text.corpus import SUFFIXES, read_records
from xlmega.weights.names import LogicalTensors

# Settings of training and of reports, which the function of a model does not know.
_NOT_OF_THE_FUNCTION = ("preset", "init_std", "residual_init", "dropout", "attention_dropout")
# Tensors beyond this are summed by blocks of rows. They are embeddings, which every format stores as they are.
_BLOCK_ELEMENTS = 1 << 25


class Mean:
    """The mean of `sources` with `weights` (any scale, not negative); a LogicalTensors."""

    def __init__(self, sources: Sequence[LogicalTensors], weights: Sequence[float]) -> None:
        _check_weights(weights, len(sources))
        for index, source in enumerate(sources[1:], start=1):
            _check_alike(sources[0].config, source.config, index)
        self._check_vocabularies(sources)
        self.sources = sources
        self.weights = [weight / math.fsum(weights) for weight in weights]
        """Normalised."""
        self.config = sources[0].config

    @property
    def vocabulary_folder(self) -> Path | None:
        """The first vocabulary that a source has."""
        return next((folder for source in self.sources if (folder := _vocabulary(source)) is not None), None)

    def names(self) -> list[str]:
        return self.sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[0].shape(name)

    def read(self, name: str) -> torch.Tensor:
        """The mean of the tensor, in fp32."""
        shape = self.shape(name)
        if math.prod(shape) <= _BLOCK_ELEMENTS:
            return self.read_slice(name, tuple(slice(None) for _ in shape))
        out = torch.empty(shape)
        rows = max(1, _BLOCK_ELEMENTS // math.prod(shape[1:]))
        for first in range(0, shape[0], rows):
            block = slice(first, min(first + rows, shape[0]))
            out[block] = self.read_slice(name, (block, *(slice(None) for _ in shape[1:])))
        return out

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the mean, in fp32."""
        total: torch.Tensor | None = None
        for source, weight in zip(self.sources, self.weights, strict=True):
            if weight == 0.0:
                continue
            part = _slice_of(source, name, slices)
            if total is None:
                total = part.double().mul_(weight)
            else:
                total.add_(part, alpha=weight)  # in fp64: the sum's own precision
        assert total is not None  # the weights add up to more than zero
        return total.div_(math.fsum(self.weights)).float()

    @staticmethod
    def _check_vocabularies(sources: Sequence[LogicalTensors]) -> None:
        known = [(index, folder, _hash_of(folder)) for index, s in enumerate(sources) if (folder := _vocabulary(s))]
        for index, folder, digest in known[1:]:
            if digest != known[0][2]:
                raise CheckpointError(
                    f"models {known[0][0] + 1} and {index + 1} have other vocabularies ('{known[0][1]}', '{folder}'): "
                    "the same row of their embeddings stands for different pieces, and a mean of them for none."
                )


def uniform(count: int) -> list[float]:
    """The same weight for each."""
    return [1.0] * count


def histogram_weights(histogram: Sequence[int], count: int, subset_k: int = 0) -> list[float]:
    """Weights of `count` models from documents per cluster: cluster c is model c.

    With `subset_k`, only the most frequent ones count (of equals, the first).
    """
    if len(histogram) > count:
        raise ConfigError(
            f"the histogram has documents in cluster {len(histogram) - 1}, but there are {count} models. Give one for "
            "each cluster, in the order of the clusters."
        )
    if not 0 <= subset_k <= count:
        raise ConfigError(f"subset_k={subset_k} of {count} models; it is 1 to {count}, or 0 for all.")
    counts = [*histogram, *[0] * (count - len(histogram))]
    kept = sorted(range(count), key=lambda index: (-counts[index], index))[: subset_k or count]
    return [float(counts[index]) if index in kept else 0.0 for index in range(count)]


def read_histogram(path: Path) -> list[int]:
    """Documents per cluster: of a JSON file (a list, or a table by cluster), or counted over assignments.

    Assignments are lines with a `cluster`, in a file or in all `.jsonl` files below a folder; -1 is no cluster.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"'{path}' holds no .jsonl files of assignments.")
        return _counted(files)
    if path.name.endswith(SUFFIXES):
        return _counted([path])
    try:
        stored: Any = json.loads(path.read_text(encoding="utf-8"))
        table = dict(enumerate(stored)) if isinstance(stored, list) else {int(key): n for key, n in stored.items()}
        if not all(type(count) is int and count >= 0 and cluster >= 0 for cluster, count in table.items()):
            raise ValueError("clusters and counts are whole numbers from 0 on")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f'\'{path}\' is not a histogram such as [120, 7] or {{"0": 120, "1": 7}}: {error}.') from None
    return [table.get(cluster, 0) for cluster in range(max(table, default=-1) + 1)]


def _counted(files: Sequence[Path]) -> list[int]:
    counts: dict[int, int] = {}
    for file in files:
        for number, record in read_records(file):
            cluster = record.get("cluster")
            if type(cluster) is not int or cluster < -1:
                raise DataError(f"{file}:{number}: 'cluster' is {cluster!r}; it is a whole number from 0 on, or -1.")
            counts[cluster] = counts.get(cluster, 0) + 1
    return [counts.get(cluster, 0) for cluster in range(max(counts, default=-1) + 1)]


def _check_weights(weights: Sequence[float], count: int) -> None:
    if count == 0:
        raise ConfigError("there is no model to average.")
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights were given for {count} models: one each is due.")
    if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights) or math.fsum(weights) <= 0.0:
        told = ", ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"weights are {told}; they are finite, not negative, and not all zero.")


def _check_alike(first: ModelConfig, other: ModelConfig, index: int) -> None:
    plain = [dataclasses.replace(one, **_defaults()) for one in (first, other)]
    left, right = (tables.to_table(one) for one in plain)
    found = [
        f"{key} is {left.get(key)} and {right.get(key)}" for key in {**left, **right} if left.get(key) != right.get(key)
    ]
    if found:
        raise CheckpointError(
            f"models 1 and {index + 1} are of different shapes: {'; '.join(found)}. Only models that began as one can "
            "be averaged."
        )


def _defaults() -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    return {name: fields[name] for name in _NOT_OF_THE_FUNCTION}


def _slice_of(source: Any, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
    if hasattr(source, "read_slice"):
        part: torch.Tensor = source.read_slice(name, slices)
        return part
    whole: torch.Tensor = source.read(name)
    return whole[slices].float()


def _vocabulary(source: Any) -> Path | None:
    return getattr(source, "vocabulary_folder", None)


def _hash_of(folder: Path) -> Any:
    try:
        return json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))["hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}' is not a vocabulary: {error!r}.") from None
