"""A decoder's layers as Megatron-core specs, and which optional package provides which part.

In come a ModelConfig, a Layout and a precision; out go Megatron-core's TransformerConfig and the spec of one layer.
The only file that may import transformer-engine or apex: they are used where they are installed and help, and never
needed. Parameters have the same names and shapes whichever part is chosen.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from xlmega.models import documents
from xlmega.models.activations import activation_of
from xlmega.models.attention import AttentionForm, CausalAttention
from xlmega.models.config import ModelConfig
from xlmega.models.layers import DecoderLayer, LayerNorm, RMSNorm
from xlmega.parallel.layout import Layout


@functools.lru_cache
def has_transformer_engine() -> bool:
    """Whether attention is Transformer Engine's: it is installed, and there is a GPU for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def extras_in_words() -> str:
    """What the optional packages do in this process, for the start-up line."""
    words = ["attention of transformer-engine" if has_transformer_engine() else "attention of torch"]
    if importlib.util.find_spec("apex") is not None:
        words.append("apex found (torch's fused AdamW and layer norm do its work)")
    return ", ".join(words)


def transformer_config(
    model: ModelConfig, layout: Layout, *, dtype: torch.dtype, on_cpu: bool, **changes: Any
) -> TransformerConfig:
    """Megatron-core's configuration of the same decoder; weights are allocated, not drawn."""
    interleaved = layout.virtual_stages > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        add_bias_linear=model.linear_bias,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.layernorm_epsilon,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        activation_func=activation_of(model),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if interleaved else None,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
        attention_softmax_in_fp32=True,
        # The loss arrives normalised by the step's count of targets; the schedule must not divide it again.
        calculate_per_token_loss=True,
        # Interleaved: with batched messages the two between one pair of ranks are swapped (Megatron-core 0.16.1, pp=2).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **changes,
    )


def norm_spec(model: ModelConfig) -> ModuleSpec:
    """A norm over the hidden size."""
    if model.norm == "rmsnorm":
        return ModuleSpec(module=RMSNorm)
    return ModuleSpec(module=LayerNorm, params={"bias": model.norm_bias})


def layer_spec(model: ModelConfig, config: TransformerConfig) -> ModuleSpec:
    """One pre-norm decoder layer."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=_core_attention(model, config),
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": model.ffn_hidden_size * (2 if model.gated_mlp else 1)},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=DecoderLayer,
        params={"parallel_residual": model.parallel_residual},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm_spec(model),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm_spec(model),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _core_attention(model: ModelConfig, config: TransformerConfig) -> Any:
    # Transformer Engine draws attention dropout from a generator that knows ranks: promise 1 would not hold.
    plain = model.positions in ("sinusoidal", "learned") and not model.layer_scaled_attention
    if has_transformer_engine() and plain and not config.attention_dropout:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return functools.partial(_WithoutDocuments, TEDotProductAttention, how=AttentionForm.of(model))
    return functools.partial(CausalAttention, how=AttentionForm.of(model))


class _WithoutDocuments(CausalAttention):
    """Another core attention where a window is one text, and our own where documents are told apart."""

    def __init__(self, other: Any, config: TransformerConfig, layer_number: int, *rest: Any, how: Any, **keys: Any):
        super().__init__(config, layer_number, how=how)
        self.other = other(config, layer_number, *rest, **keys)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **keys: Any) -> Any:
        """As the other's."""
        if documents.announced() is None:
            return self.other(query, key, value, *rest, **keys)
        return super().forward(query, key, value)
