"""A family's config.json: written from a ModelConfig, and read back into one.

In: a ModelConfig, or what transformers made of a config.json (any object with its attributes). Out: the other. What the
family's keys cannot say stands in a note under 'xlmega', so that an import undoes what an export did. What the family's
code could compute and our decoders do not is refused by name.
Source: the configuration classes of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from xlmega.errors import CheckpointError
from xlmega.models.config import XGLM_POSITION_OFFSET, ModelConfig
from xlmega.weights.families import FAMILIES, family_of, folded_scale, xglm_scale, zero_heads
from xlmega.weights.names import XGLM_LAYERNORM_EPSILON

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
_THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

# BLOOM's code has no limit; its published configs say this as 'seq_length'.
BLOOM_POSITIONS = 2048


def to_table(config: ModelConfig, dtype: str, markers: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json; `markers` are the ids of begin, end and padding."""
    note = {
        "format_version": 1,
        "preset": config.preset,
        "residual_init": config.residual_init,
        "embedding_scale": config.embedding_scale,
        "folded_embedding_scale": folded_scale(config),
        "num_heads": config.num_heads,
        "num_zero_heads": zero_heads(config),
    }
    return {
        **_WRITERS[config.family](config),
        "model_type": family_of(config).model_type,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
        "use_cache": True,
        "torch_dtype": dtype,
        **markers,
        "xlmega": note,
    }


def _write_xglm(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["XGLMForCausalLM"],
        "d_model": config.hidden_size,
        "ffn_dim": config.ffn_hidden_size,
        "num_layers": config.num_layers,
        "attention_heads": config.num_heads + zero_heads(config),
        "max_position_embeddings": config.max_positions,
        "activation_function": ACTIVATIONS[config.activation],
        "scale_embedding": bool(xglm_scale(config)),
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": config.init_std,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads + zero_heads(config),
        "n_positions": config.max_positions,
        "activation_function": ACTIVATIONS[config.activation],
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "initializer_range": config.init_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config.layer_scaled_attention,
        "reorder_and_upcast_attn": False,
    }


def _write_neox(config: ModelConfig) -> dict[str, Any]:
    # With zero heads a head is as wide as before: the family derives its width from their number.
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        **_shared(config),
        "num_attention_heads": config.num_heads + zero_heads(config),
        "hidden_dropout": config.dropout,
        "layer_norm_eps": config.layernorm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": True,
        "rope_parameters": _rotary(config),
        # What transformers before 5 reads.
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
    }


def _write_bloom(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_positions,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "layer_norm_epsilon": config.layernorm_epsilon,
        "initializer_range": config.init_std,
        "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False,
        "pretraining_tp": 1,
    }


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        **_shared(config),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.layernorm_epsilon,
        "attention_bias": config.linear_bias,
        "mlp_bias": config.linear_bias,
        "rope_parameters": _rotary(config),
        "rope_theta": config.rotary_base,  # what transformers before 5 reads
    }


def _write_backpack(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["BackpackForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_backpack.BackpackConfig",
            "AutoModel": "modeling_backpack.BackpackModel",
            "AutoModelForCausalLM": "modeling_backpack.BackpackForCausalLM",
        },
        "variant": config.backpack_variant,
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "num_senses": config.num_senses,
        "sense_intermediate_scale": config.sense_intermediate_scale,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layernorm_epsilon,
        "initializer_range": config.init_std,
        "linear_bias": config.linear_bias,
        "norm_bias": config.norm_bias,
        "scale_attn_by_inverse_layer_idx": config.layer_scaled_attention,
    }


def _shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": config.max_positions,
        "hidden_act": ACTIVATIONS[config.activation],
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def _rotary(config: ModelConfig) -> dict[str, Any]:
    partial = {"partial_rotary_factor": config.rotary_fraction} if config.rotary_fraction != 1.0 else {}
    if config.family == "neox":
        partial = {"partial_rotary_factor": config.rotary_fraction}  # where it is absent a quarter is meant
    return {"rope_type": "default", "rope_theta": config.rotary_base, **partial}


_WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "xglm": _write_xglm,
    "gpt": _write_gpt2,
    "neox": _write_neox,
    "bloom": _write_bloom,
    "llama": _write_llama,
    "backpack": _write_backpack,
}


# -------------------------------------------------------------------- reading


def from_theirs(folder: Path, theirs: Any) -> ModelConfig:
    """The ModelConfig of a family's config object; a CheckpointError lists what our decoders do not compute."""
    family = next((name for name, one in FAMILIES.items() if one.model_type == theirs.model_type), None)
    if family is None:
        kinds = ", ".join(one.model_type for one in FAMILIES.values())
        raise CheckpointError(f"'{folder}' is a '{theirs.model_type}'. Models of these kinds can be read: {kinds}.")
    problems = list(_wrong_kinds(theirs)) or [*_common_obstacles(theirs), *_OBSTACLES[family](theirs)]
    if problems:
        raise CheckpointError("\n  ".join([f"'{folder}' cannot be read as a model of ours:", *problems]))
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        num_heads=theirs.num_attention_heads,
        tied=theirs.tie_word_embeddings,
        vocab_size=theirs.vocab_size,
        **{"head_dim": theirs.hidden_size // theirs.num_attention_heads, **_READERS[family](theirs)},
    )
    wrong = list(config.problems())
    if wrong:
        raise CheckpointError("\n  ".join([f"'{folder}' has a config.json of no model:", *wrong]))
    note = getattr(theirs, "xlmega", None)
    return config if note is None else _with_note(folder, config, note)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number from 1; in JSON true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _wrong_kinds(theirs: Any) -> Iterator[str]:
    """Sizes are whole numbers, small constants numbers: transformers takes what a file says."""
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = getattr(theirs, name, None)
        if not is_count(value) and (name in _SIZES or value is not None):
            yield f"{name} is {value!r}, but must be a whole number from 1."
    for name in ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "initializer_range"):
        value = getattr(theirs, name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{name} is {value!r}, but must be a number."


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = (
    *("n_inner", "intermediate_size", "ffn_dim", "max_position_embeddings", "num_key_value_heads"),
    *("num_senses", "sense_intermediate_scale"),
)


def _activation(theirs: Any) -> str:
    for name in ("activation_function", "hidden_act"):
        if hasattr(theirs, name):
            return str(getattr(theirs, name))
    return "gelu_new"  # BLOOM, whose code has no other


def _common_obstacles(theirs: Any) -> Iterator[str]:
    if _activation(theirs) not in _THEIR_ACTIVATIONS:
        yield f"activation_function is '{_activation(theirs)}'; known: {', '.join(_THEIR_ACTIVATIONS)}."
    if getattr(theirs, "add_cross_attention", False):
        yield "add_cross_attention is true; only decoders without an encoder can be read."
    if theirs.hidden_size % theirs.num_attention_heads:
        yield f"hidden size {theirs.hidden_size} is not a multiple of the {theirs.num_attention_heads} heads."
    rope = getattr(theirs, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        yield (
            f"rope_scaling is '{rope['rope_type']}': positions are stretched by a rule that our decoders do not have. "
            "Only rope_type 'default' can be read."
        )


def _xglm_obstacles(theirs: Any) -> Iterator[str]:
    if theirs.pad_token_id is not None and theirs.pad_token_id >= XGLM_POSITION_OFFSET:
        # transformers zeroes this row of the position table, and from 2 on a token stands there.
        position = theirs.pad_token_id - XGLM_POSITION_OFFSET
        yield f"pad_token_id is {theirs.pad_token_id}, which blanks position {position}; it must be 0 or 1."


def _gpt2_obstacles(theirs: Any) -> Iterator[str]:
    if not theirs.scale_attn_weights:
        yield "scale_attn_weights is false; scores are always divided by the root of a head's width here."


def _neox_obstacles(theirs: Any) -> Iterator[str]:
    if not theirs.attention_bias:
        yield "attention_bias is false while the MLP has biases; here linear layers have them all or none."


def _bloom_obstacles(theirs: Any) -> Iterator[str]:
    if theirs.apply_residual_connection_post_layernorm:
        yield "apply_residual_connection_post_layernorm is true; residuals are always those before the norm here."


def _llama_obstacles(theirs: Any) -> Iterator[str]:
    if theirs.attention_bias != theirs.mlp_bias:
        yield (
            f"attention_bias is {theirs.attention_bias} and mlp_bias {theirs.mlp_bias}; here linear layers have biases "
            "all or none."
        )


_OBSTACLES: dict[str, Callable[[Any], Iterator[str]]] = {
    "xglm": _xglm_obstacles,
    "gpt": _gpt2_obstacles,
    "neox": _neox_obstacles,
    "bloom": _bloom_obstacles,
    "llama": _llama_obstacles,
    "backpack": lambda theirs: iter(()),
}


def _read_xglm(theirs: Any) -> dict[str, Any]:
    return {
        "ffn_hidden_size": theirs.ffn_dim,
        "max_positions": theirs.max_position_embeddings,
        "positions": "sinusoidal",
        "embedding_scale": math.sqrt(theirs.d_model) if theirs.scale_embedding else 1.0,
        "activation": _THEIR_ACTIVATIONS[theirs.activation_function],
        "layernorm_epsilon": XGLM_LAYERNORM_EPSILON,
        "dropout": float(theirs.dropout),
        "attention_dropout": float(theirs.attention_dropout),
        "init_std": theirs.init_std,
    }


def _read_gpt2(theirs: Any) -> dict[str, Any]:
    return {
        "ffn_hidden_size": 4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner,
        "max_positions": theirs.n_positions,
        "positions": "learned",
        "embedding_scale": 1.0,
        "activation": _THEIR_ACTIVATIONS[theirs.activation_function],
        "layernorm_epsilon": theirs.layer_norm_epsilon,
        "dropout": float(theirs.resid_pdrop),
        "attention_dropout": float(theirs.attn_pdrop),
        "init_std": theirs.initializer_range,
        "layer_scaled_attention": theirs.scale_attn_by_inverse_layer_idx,
    }


def _read_neox(theirs: Any) -> dict[str, Any]:
    return {
        **_read_shared(theirs),
        "positions": "rotary",
        "rotary_base": float(theirs.rope_parameters["rope_theta"]),
        "rotary_fraction": float(theirs.rope_parameters.get("partial_rotary_factor", 1.0)),
        "layernorm_epsilon": theirs.layer_norm_eps,
        "dropout": float(theirs.hidden_dropout),
        "parallel_residual": theirs.use_parallel_residual,
    }


def _read_bloom(theirs: Any) -> dict[str, Any]:
    return {
        "ffn_hidden_size": 4 * theirs.hidden_size,
        "max_positions": getattr(theirs, "seq_length", None) or BLOOM_POSITIONS,
        "positions": "alibi",
        "embedding_norm": True,
        "embedding_scale": 1.0,
        "activation": "gelu_tanh",
        "layernorm_epsilon": theirs.layer_norm_epsilon,
        "dropout": float(theirs.hidden_dropout),
        "attention_dropout": float(theirs.attention_dropout),
        "init_std": theirs.initializer_range,
    }


def _read_llama(theirs: Any) -> dict[str, Any]:
    kv_heads = theirs.num_key_value_heads
    return {
        **_read_shared(theirs),
        "num_kv_heads": 0 if kv_heads == theirs.num_attention_heads else kv_heads,
        "head_dim": theirs.head_dim,
        "positions": "rotary",
        "rotary_base": float(theirs.rope_parameters["rope_theta"]),
        "norm": "rmsnorm",
        "norm_bias": False,
        "linear_bias": theirs.mlp_bias,
        "gated_mlp": True,
        "layernorm_epsilon": theirs.rms_norm_eps,
    }


def _read_backpack(theirs: Any) -> dict[str, Any]:
    return {
        "backpack_variant": theirs.variant,
        "ffn_hidden_size": 4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner,
        "max_positions": theirs.n_positions,
        "positions": "learned",
        "embedding_scale": 1.0,
        "activation": _THEIR_ACTIVATIONS[theirs.activation_function],
        "layernorm_epsilon": theirs.layer_norm_epsilon,
        "init_std": theirs.initializer_range,
        "residual_init": "both",
        "linear_bias": theirs.linear_bias,
        "norm_bias": theirs.norm_bias,
        "layer_scaled_attention": theirs.scale_attn_by_inverse_layer_idx,
        "num_senses": theirs.num_senses,
        "sense_intermediate_scale": theirs.sense_intermediate_scale,
    }


def _read_shared(theirs: Any) -> dict[str, Any]:
    return {
        "ffn_hidden_size": theirs.intermediate_size,
        "max_positions": theirs.max_position_embeddings,
        "embedding_scale": 1.0,
        "activation": _THEIR_ACTIVATIONS[theirs.hidden_act],
        "attention_dropout": float(theirs.attention_dropout),
        "init_std": theirs.initializer_range,
    }


_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "xglm": _read_xglm,
    "gpt": _read_gpt2,
    "neox": _read_neox,
    "bloom": _read_bloom,
    "llama": _read_llama,
    "backpack": _read_backpack,
}


def _with_note(folder: Path, config: ModelConfig, note: Mapping[str, Any]) -> ModelConfig:
    # The note only adds what config.json cannot say; sizes stay the family's own, which the user may have changed.
    try:
        scale = note["embedding_scale"] if note["folded_embedding_scale"] != 1.0 else config.embedding_scale
        if note["num_heads"] + note["num_zero_heads"] != config.num_heads:
            raise ValueError(f"its heads do not add up to {config.num_heads}")
        return dataclasses.replace(
            config,
            preset=note["preset"],
            residual_init=note["residual_init"],
            embedding_scale=scale,
            num_heads=note["num_heads"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' has a damaged 'xlmega' note: {error!r}.") from None
