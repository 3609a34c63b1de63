"""Shapes of known models as plain functions that return tables: what `[model] preset = "..."` fills in.

A table holds the keys of ModelConfig that make the model what it is; a recipe may change any of them. The families
differ by such keys alone: nothing else in the code asks for a family's name but its Hugging Face table.
Sources: XGLM, METHODS §2.10; Languini GPT, METHODS §1.6; GPT-NeoX (Pythia), arXiv:2304.01373; BLOOM, arXiv:2211.05100;
Llama, arXiv:2302.13971 and arXiv:2407.21783; TinyLlama, arXiv:2401.02385; SmolLM2, arXiv:2502.02737;
Backpack, METHODS §4.2 to 4.4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any


def xglm(num_layers: int, hidden_size: int, ffn_hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """An XGLM decoder: tied, scaled embeddings, sinusoidal positions."""
    return {
        "family": "xglm",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_positions": 2048,
        "positions": "sinusoidal",
        "tied": True,
        "embedding_scale": math.sqrt(hidden_size),
        "activation": "gelu",
        "dropout": 0.0,
        **changes,
    }


def languini(num_layers: int, hidden_size: int, ffn_hidden_size: int, head_dim: int, num_heads: int) -> dict[str, Any]:
    """A Languini GPT: GPT-2 with scaled embeddings, learned positions and an untied head without bias."""
    return {
        "family": "gpt",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "max_positions": 512,
        "positions": "learned",
        "tied": False,
        "embedding_scale": math.sqrt(hidden_size),
        "activation": "gelu_tanh",
        "residual_init": "mlp",
    }


def gpt2(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """OpenAI's GPT-2: tied, nothing scaled; output projections start smaller by the depth."""
    return {
        **languini(num_layers, hidden_size, 4 * hidden_size, hidden_size // num_heads, num_heads),
        "max_positions": 1024,
        "tied": True,
        "embedding_scale": 1.0,
        "residual_init": "both",
        "vocab_size": 50_257,
        **changes,
    }


def neox(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """GPT-NeoX as in Pythia: attention and MLP side by side, a quarter of each head rotated, an untied head."""
    return {
        "family": "neox",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_positions": 2048,
        "positions": "rotary",
        "rotary_fraction": 0.25,
        "parallel_residual": True,
        "tied": False,
        "embedding_scale": 1.0,
        "activation": "gelu",
        **changes,
    }


def bloom(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """BLOOM: ALiBi, a layer norm over the embedding, a tied head."""
    return {
        "family": "bloom",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": 4 * hidden_size,
        "num_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_positions": 2048,
        "positions": "alibi",
        "embedding_norm": True,
        "tied": True,
        "embedding_scale": 1.0,
        "activation": "gelu_tanh",
        **changes,
    }


def llama(
    num_layers: int, hidden_size: int, ffn_hidden_size: int, num_heads: int, num_kv_heads: int, **changes: Any
) -> dict[str, Any]:
    """Llama: RMS norm, rotary positions, gated MLP, grouped queries, no biases."""
    return {
        "family": "llama",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": hidden_size // num_heads,
        "max_positions": 4096,
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_bias": False,
        "linear_bias": False,
        "gated_mlp": True,
        "tied": False,
        "embedding_scale": 1.0,
        "activation": "silu",
        **changes,
    }


def backpack(num_layers: int, hidden_size: int, num_heads: int, num_senses: int) -> dict[str, Any]:
    """The published Backpack: a GPT-2 whose attention scores are also divided by the layer's number, and its senses."""
    return {
        **gpt2(num_layers, hidden_size, num_heads),
        "family": "backpack",
        "max_positions": 512,
        "layer_scaled_attention": True,
        "backpack_variant": "original",
        "num_senses": num_senses,
        "vocab_size": 0,
    }


def nano_gpt(num_layers: int, hidden_size: int, num_heads: int, **changes: Any) -> dict[str, Any]:
    """nanoGPT without biases: the twin that a nanoBackpack is compared with."""
    return {
        **gpt2(num_layers, hidden_size, num_heads),
        "max_positions": 256,
        "norm_bias": False,
        "linear_bias": False,
        "vocab_size": 0,
        **changes,
    }


def nano_backpack(depth: int, hidden_size: int, num_heads: int, num_senses: int) -> dict[str, Any]:
    """nanoBackpack, as used for several languages: one of the twin's `depth` layers makes way for the senses."""
    return nano_gpt(
        depth - 1, hidden_size, num_heads, family="backpack", backpack_variant="nano", num_senses=num_senses
    )


_SENSES = (4, 8, 16, 64)
_BACKPACKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"backpack_micro_{k}": functools.partial(backpack, 6, 384, 6, k) for k in _SENSES},
    **{f"backpack_mini_{k}": functools.partial(backpack, 8, 640, 8, k) for k in _SENSES},
    **{f"backpack_small_{k}": functools.partial(backpack, 12, 768, 12, k) for k in _SENSES},
    **{f"nano_backpack_mini_{k}": functools.partial(nano_backpack, 6, 384, 6, k) for k in _SENSES},
    **{f"nano_backpack_small_{k}": functools.partial(nano_backpack, 12, 768, 12, k) for k in _SENSES},
    "nano_gpt_mini": functools.partial(nano_gpt, 6, 384, 6),
    "nano_gpt_small": functools.partial(nano_gpt, 12, 768, 12),
}

PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "xglm_tiny": lambda: xglm(4, 256, 1024, 4),
    "xglm_27m": lambda: xglm(6, 512, 2048, 8),
    "xglm_564m": lambda: xglm(24, 1024, 4096, 16, vocab_size=256_008),
    "xglm_1.7b": lambda: xglm(24, 2048, 8192, 16, vocab_size=256_008),
    "xglm_2.9b": lambda: xglm(48, 2048, 8192, 16, vocab_size=256_008),
    "xglm_4.5b": lambda: xglm(48, 2048, 16384, 16, vocab_size=256_008),
    "xglm_7.5b": lambda: xglm(32, 4096, 16384, 32, vocab_size=256_008),
    "languini_mini": lambda: languini(4, 512, 2048, 32, 8),
    "languini_tiny": lambda: languini(4, 768, 3072, 64, 12),
    "languini_small": lambda: languini(12, 768, 3072, 64, 12),
    "languini_medium": lambda: languini(24, 1024, 4096, 64, 16),
    "languini_large": lambda: languini(24, 1536, 6144, 96, 16),
    "languini_xl": lambda: languini(24, 2048, 8192, 128, 24),
    "gpt2_small": lambda: gpt2(12, 768, 12),
    "gpt2_medium": lambda: gpt2(24, 1024, 16),
    "gpt2_large": lambda: gpt2(36, 1280, 20),
    "gpt2_xl": lambda: gpt2(48, 1600, 25),
    "pythia_70m": lambda: neox(6, 512, 8, vocab_size=50_304),
    "pythia_160m": lambda: neox(12, 768, 12, vocab_size=50_304),
    "pythia_410m": lambda: neox(24, 1024, 16, vocab_size=50_304),
    "pythia_1b": lambda: neox(16, 2048, 8, vocab_size=50_304),
    "pythia_1.4b": lambda: neox(24, 2048, 16, vocab_size=50_304),
    "pythia_2.8b": lambda: neox(32, 2560, 32, vocab_size=50_304),
    "pythia_6.9b": lambda: neox(32, 4096, 32, vocab_size=50_432),
    "bloom_560m": lambda: bloom(24, 1024, 16, vocab_size=250_880),
    "bloom_1b1": lambda: bloom(24, 1536, 16, vocab_size=250_880),
    "bloom_1b7": lambda: bloom(24, 2048, 16, vocab_size=250_880),
    "bloom_3b": lambda: bloom(30, 2560, 32, vocab_size=250_880),
    "bloom_7b1": lambda: bloom(30, 4096, 32, vocab_size=250_880),
    "smollm2_135m": lambda: llama(
        30, 576, 1536, 9, 3, vocab_size=49_152, tied=True, rotary_base=100_000.0, max_positions=8192
    ),
    "tinyllama_1.1b": lambda: llama(22, 2048, 5632, 32, 4, vocab_size=32_000, max_positions=2048),
    "llama2_7b": lambda: llama(32, 4096, 11008, 32, 32, vocab_size=32_000),
    "llama3_8b": lambda: llama(32, 4096, 14336, 32, 8, vocab_size=128_256, rotary_base=500_000.0, max_positions=8192),
    "neox_tiny": lambda: neox(4, 256, 4),
    "bloom_tiny": lambda: bloom(4, 256, 4),
    "llama_tiny": lambda: llama(4, 256, 704, 4, 2, max_positions=2048),
    **_BACKPACKS,
}
