"""A model's parameters under names that know no rank, and the reversible steps by which others spell them.

In: a ModelConfig. Out: the logical names with their shapes; and rows that turn a logical tensor into another spelling's
tensors and back. A row's transformation is a chain of small pieces, each with its inverse, so both directions are one
definition. Pieces work on `meta` tensors too, which is how a writer knows the other's shapes before it has read
anything. The spellings of Hugging Face's families are in `weights.families`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig

WORD_EMBEDDING = "embedding.word_embeddings.weight"
POSITION_EMBEDDING = "embedding.position_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"

# The only epsilon that XGLM's layer norms know: it is not in its config.
XGLM_LAYERNORM_EPSILON = 1e-5


class LogicalTensors(Protocol):
    """One whole model that can be read tensor by tensor: a checkpoint, an HF directory, a merge of several."""

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor:
        """The full logical tensor, in fp32 or as stored."""
        ...

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of it, in fp32."""
        ...


@runtime_checkable
class StoredRows(Protocol):
    """LogicalTensors that lie on a disk in the dtype that a copy of them would have, too."""

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of the logical tensor, as stored."""
        ...


# A tensor larger than this is passed on in parts: 128 MiB of fp32, less than any model's memory but most embeddings.
PART_ELEMENTS = 1 << 25


def parts_of(source: LogicalTensors, name: str) -> Iterator[torch.Tensor]:
    """The logical tensor in equal numbers of rows, so that none is larger than PART_ELEMENTS; whole where it is not."""
    shape = source.shape(name)
    rows = max(1, PART_ELEMENTS // max(1, math.prod(shape[1:])))
    if rows >= shape[0]:
        yield source.read(name)
        return
    for first in range(0, shape[0], rows):
        block = slice(first, min(first + rows, shape[0]))
        if isinstance(source, StoredRows):
            yield source.read_rows(name, block)
        else:
            yield source.read_slice(name, (block, *(slice(None) for _ in shape[1:])))


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every logical parameter with its unpadded shape, in the order in which the model computes.

    How rows of `linear_qkv` and of a gated `linear_fc1` are interleaved says `ModelConfig.layer_shapes`.
    """
    shapes: dict[str, tuple[int, ...]] = {WORD_EMBEDDING: (config.vocab_size, config.hidden_size)}
    if config.positions == "learned":
        shapes[POSITION_EMBEDDING] = (config.max_positions, config.hidden_size)
    if config.embedding_norm:
        shapes |= config.norm_shapes("embedding.layernorm")
    for layer in range(config.num_layers):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in config.layer_shapes().items()}
    shapes |= config.norm_shapes("decoder.final_layernorm") | config.sense_shapes()
    if not config.tied:
        shapes[OUTPUT_LAYER] = (config.vocab_size, config.hidden_size)
    return shapes


@dataclass(frozen=True)
class Piece:
    """One reversible step: `backward(forward(x)) == x`."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], torch.Tensor]
    by_rows: bool = False
    """Acts on each row by itself, in its place: parts of a tensor may be passed through one by one."""


@dataclass(frozen=True)
class Row:
    """One logical tensor and the family's tensors that hold it, parts along their first axis."""

    logical: str
    theirs: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()
    shares: tuple[int, ...] = ()
    """How the parts' lengths relate; empty where they are equal."""

    def to_theirs(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The family's tensors, one for each of `theirs`."""
        for piece in self.pieces:
            tensor = piece.forward(tensor)
        if not self.shares:
            return tensor.chunk(len(self.theirs))
        unit = tensor.shape[0] // sum(self.shares)
        parts: tuple[torch.Tensor, ...] = tensor.split([unit * share for share in self.shares])
        return parts

    @property
    def by_rows(self) -> bool:
        """Whether parts of the tensor may be passed through one by one."""
        return len(self.theirs) == 1 and all(piece.by_rows for piece in self.pieces)

    def to_logical(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The logical tensor from the family's, given in the order of `theirs`."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        for piece in reversed(self.pieces):
            tensor = piece.backward(tensor)
        return tensor


TRANSPOSE = Piece(torch.t, torch.t)


def scaled(factor: float) -> Piece:
    """Multiplied by `factor` in fp32. Its inverse divides: exact for powers of two, else within a rounding."""
    return Piece(lambda x: x.float() * factor, lambda x: x.float() / factor, by_rows=True)


def heads_to_blocks(num_groups: int, queries_each: int = 1) -> Piece:
    """Rows (head of keys, its queries|k|v, head_dim) to rows (queries of all|k of all|v of all, head_dim)."""
    if queries_each == 1:
        return Piece(lambda x: _swap_leading(x, num_groups, 3), lambda x: _swap_leading(x, 3, num_groups))
    counts = [queries_each, 1, 1]

    def forward(x: torch.Tensor) -> torch.Tensor:
        heads = _split_axis(x, 0, (num_groups, sum(counts), x.shape[0] // (num_groups * sum(counts))))
        return torch.cat([part.flatten(0, 2) for part in heads.split(counts, dim=1)])

    def backward(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[0] // (num_groups * sum(counts))
        parts = x.split([num_groups * count * width for count in counts])
        heads = [_split_axis(part, 0, (num_groups, count, width)) for part, count in zip(parts, counts, strict=True)]
        return torch.cat(heads, dim=1).flatten(0, 2)

    return Piece(forward, backward)


def senses_to_blocks(num_senses: int) -> Piece:
    """Rows (sense, its queries|its keys, width) to rows (queries of all|keys of all, width)."""
    return Piece(lambda x: _swap_leading(x, num_senses, 2), lambda x: _swap_leading(x, 2, num_senses))


# Rows that take turns (gate, value, gate, value) to rows of one and then of the other.
TURNS_TO_BLOCKS = Piece(lambda x: _swap_leading(x, x.shape[0] // 2, 2), lambda x: _swap_leading(x, 2, x.shape[0] // 2))


def zero_groups(axis: int, size: int, added: int, groups: int = 1) -> Piece:
    """`added` all-zero entries behind each of `groups` equal groups of `size` entries along `axis`.

    The inverse drops them, and refuses if they are no longer zero: dropping them would change the function.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        parts = _split_axis(x, axis, (groups, size))
        shape = [*parts.shape]
        shape[axis + 1] = added
        return torch.cat([parts, parts.new_zeros(shape)], axis + 1).flatten(axis, axis + 1)

    def backward(x: torch.Tensor) -> torch.Tensor:
        kept, dropped = torch.split(_split_axis(x, axis, (groups, size + added)), [size, added], axis + 1)
        if not x.is_meta and torch.count_nonzero(dropped):
            raise CheckpointError(
                f"the attention heads that an export added as zeros ({added} wide) hold other values now, so they "
                "cannot be dropped.\n  Remove 'xlmega' from config.json to read them as heads of the model."
            )
        return kept.flatten(axis, axis + 1)

    return Piece(forward, backward)


def _swap_leading(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    return _split_axis(x, 0, (first, second, x.shape[0] // (first * second))).transpose(0, 1).flatten(0, 2)


def _split_axis(x: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
