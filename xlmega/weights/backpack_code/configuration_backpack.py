"""What an exported Backpack is: sizes, and which of the two published variants.

Written by xlmega; needs transformers alone.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class BackpackConfig(PretrainedConfig):
    """`n_layer` counts the contextualiser's layers; every token has `num_senses` sense vectors."""

    model_type = "backpack"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        variant: str = "original",
        vocab_size: int = 50_264,
        n_positions: int = 512,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int | None = None,
        num_senses: int = 16,
        sense_intermediate_scale: int = 4,
        activation_function: str = "gelu_new",
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        linear_bias: bool = True,
        norm_bias: bool = True,
        scale_attn_by_inverse_layer_idx: bool = True,
        output_senses: bool = True,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        if variant not in ("original", "nano"):
            raise ValueError(f"variant is '{variant}', but must be 'original' or 'nano'.")
        self.variant = variant
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.num_senses = num_senses
        self.sense_intermediate_scale = sense_intermediate_scale
        self.activation_function = activation_function
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.linear_bias = linear_bias
        self.norm_bias = norm_bias
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.output_senses = output_senses
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
