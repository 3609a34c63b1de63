"""How each family of Hugging Face spells a model: one table a family, and what its code can compute at all.

In: a ModelConfig. Out: the rows from logical tensors to the family's and back, all bit-exact except a folded embedding
scale; or one error that lists every reason why the family cannot compute the model. Nothing here knows a layout.

What a family lacks is written into its weights where that is possible, as a function of the config alone:
- XGLM knows the embedding scales 1 and sqrt(hidden_size), the others only 1. Another scale is folded into the word
  embedding where the head is untied; where it is tied that would scale the logits as well, so it is refused.
- All but Llama know only num_heads * head_dim == hidden_size. Missing heads are added as all-zero ones, which add
  exactly nothing; a surplus of heads (Languini XL) has no place and is refused. Under ALiBi a head's slope depends on
  how many there are, so BLOOM is refused either way.
Sources: METHODS §1.6 (Languini), §2.10 (XGLM); the modelling code of transformers 5.23.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xlmega.errors import ConfigError
from xlmega.models.config import ModelConfig
from xlmega.weights.names import (
    OUTPUT_LAYER,
    TRANSPOSE,
    TURNS_TO_BLOCKS,
    WORD_EMBEDDING,
    XGLM_LAYERNORM_EPSILON,
    Piece,
    Row,
    heads_to_blocks,
    logical_shapes,
    scaled,
    senses_to_blocks,
    zero_groups,
)

QKV, PROJ, FC1, FC2 = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face. Modules are named without '.weight' and '.bias'."""

    model_type: str
    """As its config.json says."""
    prefix: str
    """What the names begin with; the bare base model of the same weights leaves it out."""
    outer: Mapping[str, str]
    """Modules outside the layers."""
    layers: str
    """The layers; '{}' is the number."""
    inner: Mapping[str, tuple[str, ...]]
    """Modules of a layer; several where the family keeps apart what is one tensor here."""
    head: str = "lm_head.weight"
    """The output embedding where it is not the word embedding: outside the prefix."""
    fused_by_head: bool = False
    """Rows of a fused query-key-value stand head by head, as they do here; else in three blocks."""
    transposed: bool = False
    """Linear layers are stored [in, out] (Conv1D)."""
    grouped: bool = False
    """Knows fewer heads of keys than of queries, and heads that do not fill the hidden size."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ModelConfig of which the family's code knows one value."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names under which a shared tensor may be stored instead, or once more."""
    code: str = ""
    """The package whose files an export brings along, where transformers has no code of its own for the family."""


_LAYER_NORMED: dict[str, Any] = {
    "norm": "layernorm",
    "norm_bias": True,
    "linear_bias": True,
    "gated_mlp": False,
    "parallel_residual": False,
    "embedding_norm": False,
    "layer_scaled_attention": False,
}

_GPT2_LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("ln_1",),
    QKV: ("attn.c_attn",),
    PROJ: ("attn.c_proj",),
    "pre_mlp_layernorm": ("ln_2",),
    FC1: ("mlp.c_fc",),
    FC2: ("mlp.c_proj",),
}

FAMILIES: dict[str, Family] = {
    "xglm": Family(
        "xglm",
        "model.",
        {"embedding.word_embeddings": "embed_tokens", "decoder.final_layernorm": "layer_norm"},
        "layers.{}.",
        {
            "input_layernorm": ("self_attn_layer_norm",),
            QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            PROJ: ("self_attn.out_proj",),
            "pre_mlp_layernorm": ("final_layer_norm",),
            FC1: ("fc1",),
            FC2: ("fc2",),
        },
        fixed={**_LAYER_NORMED, "positions": "sinusoidal", "layernorm_epsilon": XGLM_LAYERNORM_EPSILON},
    ),
    "gpt": Family(
        "gpt2",
        "transformer.",
        {
            "embedding.word_embeddings": "wte",
            "embedding.position_embeddings": "wpe",
            "decoder.final_layernorm": "ln_f",
        },
        "h.{}.",
        _GPT2_LAYER,
        transposed=True,
        fixed={key: value for key, value in _LAYER_NORMED.items() if key != "layer_scaled_attention"}
        | {"positions": "learned"},
    ),
    "neox": Family(
        "gpt_neox",
        "gpt_neox.",
        {"embedding.word_embeddings": "embed_in", "decoder.final_layernorm": "final_layer_norm"},
        "layers.{}.",
        {
            "input_layernorm": ("input_layernorm",),
            QKV: ("attention.query_key_value",),
            PROJ: ("attention.dense",),
            "pre_mlp_layernorm": ("post_attention_layernorm",),
            FC1: ("mlp.dense_h_to_4h",),
            FC2: ("mlp.dense_4h_to_h",),
        },
        head="embed_out.weight",
        fused_by_head=True,
        fixed={key: value for key, value in _LAYER_NORMED.items() if key != "parallel_residual"}
        | {"positions": "rotary"},
    ),
    "bloom": Family(
        "bloom",
        "transformer.",
        {
            "embedding.word_embeddings": "word_embeddings",
            "embedding.layernorm": "word_embeddings_layernorm",
            "decoder.final_layernorm": "ln_f",
        },
        "h.{}.",
        {
            "input_layernorm": ("input_layernorm",),
            QKV: ("self_attention.query_key_value",),
            PROJ: ("self_attention.dense",),
            "pre_mlp_layernorm": ("post_attention_layernorm",),
            FC1: ("mlp.dense_h_to_4h",),
            FC2: ("mlp.dense_4h_to_h",),
        },
        fused_by_head=True,
        fixed=_LAYER_NORMED | {"positions": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
    ),
    "backpack": Family(
        "backpack",
        "backpack.",
        {
            "embedding.word_embeddings": "gpt2_model.wte",
            "embedding.position_embeddings": "gpt2_model.wpe",
            "decoder.final_layernorm": "gpt2_model.ln_f",
            "senses.query_key": "sense_weight_net.c_attn",
            "senses.input_layernorm": "sense_network.ln",
            "senses.mlp_layernorm": "sense_network.block.ln_1",
            "senses.mlp.linear_fc1": "sense_network.block.mlp.c_fc",
            "senses.mlp.linear_fc2": "sense_network.block.mlp.c_proj",
            "senses.output_layernorm": "sense_network.block.ln_2",
            "senses.expand": "sense_network.final_mlp.c_fc",
            "senses.output": "sense_network.final_mlp.c_proj",
            "senses.joint_layernorm": "sense_network.joint_ln",
        },
        "gpt2_model.h.{}.",
        _GPT2_LAYER,
        transposed=True,
        fixed={
            "positions": "learned",
            "norm": "layernorm",
            "gated_mlp": False,
            "parallel_residual": False,
            "embedding_norm": False,
        },
        # The embeddings have several names in the published code; a file may hold any of them.
        aliases={
            "backpack.gpt2_model.wte.weight": ("backpack.word_embeddings.weight", "lm_head.weight"),
            "backpack.gpt2_model.wpe.weight": ("backpack.position_embeddings.weight",),
        },
        code="xlmega.weights.backpack_code",
    ),
    "llama": Family(
        "llama",
        "model.",
        {"embedding.word_embeddings": "embed_tokens", "decoder.final_layernorm": "norm"},
        "layers.{}.",
        {
            "input_layernorm": ("input_layernorm",),
            QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            PROJ: ("self_attn.o_proj",),
            "pre_mlp_layernorm": ("post_attention_layernorm",),
            FC1: ("mlp.gate_proj", "mlp.up_proj"),
            FC2: ("mlp.down_proj",),
        },
        grouped=True,
        fixed={
            "positions": "rotary",
            "rotary_fraction": 1.0,
            "norm": "rmsnorm",
            "norm_bias": False,
            "gated_mlp": True,
            "parallel_residual": False,
            "embedding_norm": False,
            "layer_scaled_attention": False,
        },
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family that the config names; a ConfigError where Hugging Face has none."""
    if config.family not in FAMILIES:
        raise ConfigError(
            f"transformers has no model for family '{config.family}' (it has {', '.join(FAMILIES)}). Such a model "
            "stays in logical form (--to logical)."
        )
    return FAMILIES[config.family]


def family_table(config: ModelConfig) -> list[Row]:
    """The rows of the config's family, after `check_expressible`; they cover `logical_shapes` exactly."""
    check_expressible(config)
    family = family_of(config)
    pieces = _pieces(config, family)
    rows = []
    for logical in logical_shapes(config):
        module, kind = logical.rsplit(".", 1)
        if logical == OUTPUT_LAYER:
            rows.append(Row(logical, (family.head,)))
        elif (match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)) is not None:
            names = family.inner[match[2]]
            theirs = tuple(f"{family.prefix}{family.layers.format(match[1])}{name}.{kind}" for name in names)
            shares = (config.num_heads, config.kv_heads, config.kv_heads) if len(names) == 3 else ()
            rows.append(Row(logical, theirs, pieces.get(f"{match[2]}.{kind}", ()), shares))
        else:
            rows.append(Row(logical, (f"{family.prefix}{family.outer[module]}.{kind}",), pieces.get(logical, ())))
    return rows


def _pieces(config: ModelConfig, family: Family) -> dict[str, tuple[Piece, ...]]:
    """What happens to a tensor on its way to the family, by its name in the layer (or in the model)."""
    width, added = config.attention_width, _missing_width(config, family)
    qkv: tuple[Piece, ...] = ()
    if not family.fused_by_head:
        qkv = (heads_to_blocks(config.kv_heads, config.num_heads // config.kv_heads),)
    if added:
        qkv += (zero_groups(0, 3 * width, 3 * added) if family.fused_by_head else zero_groups(0, width, added, 3),)
    fc1 = (TURNS_TO_BLOCKS,) if config.gated_mlp else ()
    last = (TRANSPOSE,) if family.transposed else ()
    scale = folded_scale(config)
    return {
        WORD_EMBEDDING: () if scale == 1.0 else (scaled(scale),),
        f"{QKV}.weight": (*qkv, *last),
        f"{QKV}.bias": qkv,
        f"{PROJ}.weight": (*((zero_groups(1, width, added),) if added else ()), *last),
        f"{FC1}.weight": (*fc1, *last),
        f"{FC1}.bias": fc1,
        f"{FC2}.weight": last,
        **_pieces_of_senses(config),
    }


def _pieces_of_senses(config: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    if not config.backpack_variant:
        return {}
    halves = (senses_to_blocks(config.num_senses),)
    linear = ("mlp.linear_fc1", "mlp.linear_fc2", "expand", "output")
    transposed: dict[str, tuple[Piece, ...]] = {f"senses.{name}.weight": (TRANSPOSE,) for name in linear}
    return {"senses.query_key.weight": halves, "senses.query_key.bias": halves, **transposed}


def folded_scale(config: ModelConfig) -> float:
    """The part of the embedding scale that the family's code does not apply and its word embedding must hold."""
    return config.embedding_scale if xglm_scale(config) is None or config.family != "xglm" else 1.0


def xglm_scale(config: ModelConfig) -> bool | None:
    """XGLM's `scale_embedding`; None where it can say neither, and the scale has to be folded."""
    if math.isclose(config.embedding_scale, math.sqrt(config.hidden_size), rel_tol=1e-6):
        return True
    return False if config.embedding_scale == 1.0 else None


def _missing_width(config: ModelConfig, family: Family) -> int:
    return 0 if family.grouped else config.hidden_size - config.attention_width


def zero_heads(config: ModelConfig) -> int:
    """How many all-zero heads make the attention as wide as the family's; negative where it is wider already."""
    return _missing_width(config, family_of(config)) // config.head_dim


def check_expressible(config: ModelConfig) -> None:
    """Raise one ConfigError that lists every reason why the config's HF family cannot compute this model."""
    family = family_of(config)
    found = list(_obstacles(config, family))
    if found:
        raise ConfigError("\n  ".join([f"a Hugging Face '{family.model_type}' cannot compute this model:", *found]))


def _obstacles(config: ModelConfig, family: Family) -> Iterator[str]:
    for key, value in family.fixed.items():
        if getattr(config, key) != value:
            yield f"{key} is {_word(getattr(config, key))}, but the family knows only {_word(value)}."
    if config.family == "bloom" and config.ffn_hidden_size != 4 * config.hidden_size:
        yield f"ffn_hidden_size is {config.ffn_hidden_size}, but BLOOM's is 4 x hidden_size={config.hidden_size}."
    if config.tied and folded_scale(config) != 1.0:
        known = f"1 and sqrt(hidden_size) = {math.sqrt(config.hidden_size):.6g}" if config.family == "xglm" else "1"
        yield (
            f"embedding_scale is {config.embedding_scale:.6g} and the head is tied; the family knows the scale {known}"
            ", and folding another into the shared matrix would scale the logits. Untied heads can be exported."
        )
    if family.grouped:
        if config.hidden_size % config.num_heads:
            yield f"transformers wants hidden_size={config.hidden_size} divided by num_heads={config.num_heads}."
        return
    if config.kv_heads != config.num_heads:
        yield f"num_kv_heads is {config.kv_heads}, but the family has as many as num_heads={config.num_heads}."
    sizes = f"num_heads={config.num_heads} x head_dim={config.head_dim} is {config.attention_width}"
    if zero_heads(config) < 0:
        yield (
            f"{sizes}, wider than hidden_size={config.hidden_size}; the family has no more attention than that, and "
            "heads cannot be left out. Such a model stays in logical form (--to logical)."
        )
    elif config.hidden_size % config.head_dim:
        yield f"{sizes}, and all-zero heads of {config.head_dim} do not fill hidden_size={config.hidden_size}."
    elif config.positions == "alibi" and zero_heads(config):
        yield f"{sizes}, not hidden_size={config.hidden_size}, and with more heads ALiBi's slopes would be others."


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
