"""A model's parameters under names that know no rank, and how each family of Hugging Face spells them.

In: a ModelConfig. Out: the logical names with their shapes, and one table per family whose rows turn a logical tensor
into the family's tensors and back. A row's transformation is a chain of small pieces, each with its inverse, so both
directions are one definition; all are bit-exact except the folded embedding scale. Pieces work on `meta` tensors too,
which is how a writer knows the family's shapes before it has read anything.

Two things a family lacks are written into its weights, as a function of the config alone:
- XGLM knows the embedding scales 1 and sqrt(hidden_size), GPT-2 only 1. Another scale is folded into the word
  embedding where the head is untied; where it is tied that would scale the logits as well, so it is refused.
- Both know only num_heads * head_dim == hidden_size. Missing heads are added as all-zero ones, which add exactly
  nothing; a surplus of heads (Languini XL) has no place and is refused.
Sources: METHODS §1.6 (Languini), §2.10 (XGLM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from xlmega.errors import CheckpointError, ConfigError
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


@dataclass(frozen=True)
class Row:
    """One logical tensor and the family's tensors that hold it, equal parts along their first axis."""

    logical: str
    theirs: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()

    def to_theirs(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The family's tensors, one for each of `theirs`."""
        for piece in self.pieces:
            tensor = piece.forward(tensor)
        return tensor.chunk(len(self.theirs))

    def to_logical(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The logical tensor from the family's, given in the order of `theirs`."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        for piece in reversed(self.pieces):
            tensor = piece.backward(tensor)
        return tensor


TRANSPOSE = Piece(torch.t, torch.t)


def scaled(factor: float) -> Piece:
    """Multiplied by `factor` in fp32. Its inverse divides: exact for powers of two, else within a rounding."""
    return Piece(lambda x: x.float() * factor, lambda x: x.float() / factor)


def heads_to_blocks(num_heads: int) -> Piece:
    """Rows (head, q|k|v, head_dim) to rows (q|k|v, head, head_dim)."""
    return Piece(lambda x: _swap_leading(x, num_heads, 3), lambda x: _swap_leading(x, 3, num_heads))


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


def folded_scale(config: ModelConfig) -> float:
    """The part of the embedding scale that the family's code does not apply and its word embedding must hold."""
    return config.embedding_scale if xglm_scale(config) is None or config.family == "gpt" else 1.0


def xglm_scale(config: ModelConfig) -> bool | None:
    """XGLM's `scale_embedding`; None where it can say neither, and the scale has to be folded."""
    if math.isclose(config.embedding_scale, math.sqrt(config.hidden_size), rel_tol=1e-6):
        return True
    return False if config.embedding_scale == 1.0 else None


def zero_heads(config: ModelConfig) -> int:
    """How many all-zero heads make the attention as wide as the model; negative where it is wider already."""
    return (config.hidden_size - config.attention_width) // config.head_dim


def check_expressible(config: ModelConfig) -> None:
    """Raise one ConfigError that lists every reason why the config's HF family cannot compute this model."""
    found = list(_obstacles(config))
    if found:
        family = FAMILIES[config.family].model_type
        raise ConfigError("\n  ".join([f"a Hugging Face '{family}' cannot compute this model:", *found]))


def _obstacles(config: ModelConfig) -> Iterator[str]:
    expected = {"xglm": "sinusoidal", "gpt": "learned"}[config.family]
    if config.positions != expected:
        yield f"positions are {config.positions}, but the family's are {expected}."
    if config.family == "xglm" and config.layernorm_epsilon != XGLM_LAYERNORM_EPSILON:
        yield f"layernorm_epsilon is {config.layernorm_epsilon}, but XGLM's is fixed at {XGLM_LAYERNORM_EPSILON}."
    if config.tied and folded_scale(config) != 1.0:
        known = "1" if config.family == "gpt" else f"1 and sqrt(hidden_size) = {math.sqrt(config.hidden_size):.6g}"
        yield (
            f"embedding_scale is {config.embedding_scale:.6g} and the head is tied; the family knows the scale {known}"
            ", and folding another into the shared matrix would scale the logits. Untied heads can be exported."
        )
    sizes = f"num_heads={config.num_heads} x head_dim={config.head_dim} is {config.attention_width}"
    if zero_heads(config) < 0:
        yield (
            f"{sizes}, wider than hidden_size={config.hidden_size}; the family has no more attention than that, and "
            "heads cannot be left out. Such a model stays in logical form (--to logical)."
        )
    elif config.hidden_size % config.head_dim:
        yield f"{sizes}, and all-zero heads of {config.head_dim} do not fill hidden_size={config.hidden_size}."


def xglm_table(config: ModelConfig) -> list[Row]:
    """XGLMForCausalLM: separate query, key and value projections."""
    qkv, qkv_bias, proj = _attention_pieces(config)
    rows = [Row(WORD_EMBEDDING, ("model.embed_tokens.weight",), _embedding_pieces(config))]
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind, pieces in (("weight", qkv), ("bias", qkv_bias)):
            parts = tuple(f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
            rows.append(Row(f"{ours}self_attention.linear_qkv.{kind}", parts, pieces))
        rows.append(Row(f"{ours}self_attention.linear_proj.weight", (f"{theirs}self_attn.out_proj.weight",), proj))
        rows.append(Row(f"{ours}self_attention.linear_proj.bias", (f"{theirs}self_attn.out_proj.bias",)))
        for mine, yours in (
            ("input_layernorm", "self_attn_layer_norm"),
            ("pre_mlp_layernorm", "final_layer_norm"),
            ("mlp.linear_fc1", "fc1"),
            ("mlp.linear_fc2", "fc2"),
        ):
            rows.extend(Row(f"{ours}{mine}.{kind}", (f"{theirs}{yours}.{kind}",)) for kind in ("weight", "bias"))
    rows.extend(Row(f"decoder.final_layernorm.{kind}", (f"model.layer_norm.{kind}",)) for kind in ("weight", "bias"))
    return rows + _head(config)


def gpt2_table(config: ModelConfig) -> list[Row]:
    """GPT2LMHeadModel: linear layers stored [in, out] (Conv1D), queries, keys and values as three blocks of c_attn."""
    qkv, qkv_bias, proj = _attention_pieces(config)
    rows = [
        Row(WORD_EMBEDDING, ("transformer.wte.weight",), _embedding_pieces(config)),
        Row(POSITION_EMBEDDING, ("transformer.wpe.weight",)),
    ]
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for mine, yours, weight, bias in (
            ("self_attention.linear_qkv", "attn.c_attn", qkv, qkv_bias),
            ("self_attention.linear_proj", "attn.c_proj", proj, ()),
            ("mlp.linear_fc1", "mlp.c_fc", (), ()),
            ("mlp.linear_fc2", "mlp.c_proj", (), ()),
        ):
            rows.append(Row(f"{ours}{mine}.weight", (f"{theirs}{yours}.weight",), (*weight, TRANSPOSE)))
            rows.append(Row(f"{ours}{mine}.bias", (f"{theirs}{yours}.bias",), bias))
        for mine, yours in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            rows.extend(Row(f"{ours}{mine}.{kind}", (f"{theirs}{yours}.{kind}",)) for kind in ("weight", "bias"))
    rows.extend(Row(f"decoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias"))
    return rows + _head(config)


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face."""

    model_type: str
    """As its config.json says."""
    prefix: str
    """What the names begin with; the bare base model of the same weights leaves it out."""
    table: Callable[[ModelConfig], list[Row]]


FAMILIES: dict[str, Family] = {
    "xglm": Family("xglm", "model.", xglm_table),
    "gpt": Family("gpt2", "transformer.", gpt2_table),
}


def family_table(config: ModelConfig) -> list[Row]:
    """The rows of the config's HF family, after `check_expressible`; they cover `logical_shapes` exactly."""
    check_expressible(config)
    return FAMILIES[config.family].table(config)


def _swap_leading(x: torch.Tensor, first: int, second: int) -> torch.Tensor:
    return _split_axis(x, 0, (first, second, x.shape[0] // (first * second))).transpose(0, 1).flatten(0, 2)


def _split_axis(x: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def _embedding_pieces(config: ModelConfig) -> tuple[Piece, ...]:
    scale = folded_scale(config)
    return () if scale == 1.0 else (scaled(scale),)


def _attention_pieces(config: ModelConfig) -> tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...]]:
    """Pieces of the fused weight, of its bias and of the output projection's weight."""
    blocks, width = heads_to_blocks(config.num_heads), config.attention_width
    added = config.hidden_size - width
    if not added:
        return (blocks,), (blocks,), ()
    qkv = (blocks, zero_groups(0, width, added, groups=3))
    return qkv, qkv, (zero_groups(1, width, added),)


def _head(config: ModelConfig) -> list[Row]:
    # A tied head is not stored: both families take it from the word embedding.
    return [] if config.tied else [Row(OUTPUT_LAYER, ("lm_head.weight",))]
