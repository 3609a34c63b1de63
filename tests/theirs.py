"""Tiny models of every family as transformers makes, fills and saves them: the other side of imports and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

VOCABULARY = 97  # prime: no tensor-parallel size divides it
POSITIONS = 32


def _gpt2(**changes: Any) -> Any:
    sizes = {"n_embd": 64, "n_layer": 6, "n_head": 8, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    return transformers.GPT2Config(**{**sizes, **changes})


def _sized(kind: Any, **changes: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": VOCABULARY}
    return kind(**{**sizes, "intermediate_size": 112, "max_position_embeddings": POSITIONS, **changes})


SIX: dict[str, Callable[..., Any]] = {
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=64, ffn_dim=112, num_layers=6, attention_heads=8,
        max_position_embeddings=POSITIONS,
    ),
    "gpt2": _gpt2,
    "languini": lambda: _gpt2(tie_word_embeddings=False, n_inner=112),
    "gpt_neox": lambda **changes: _sized(transformers.GPTNeoXConfig, **changes),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=6, n_head=8),
    "llama": lambda: _sized(transformers.LlamaConfig, num_key_value_heads=4),
}  # fmt: skip
# What these families have beyond their published models.
MORE: dict[str, Callable[..., Any]] = {
    "gpt2 scaled by layer": lambda: _gpt2(n_layer=2, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox in turn, tied": lambda: _sized(
        transformers.GPTNeoXConfig,
        num_hidden_layers=2,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "bloom with six heads, untied": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6, tie_word_embeddings=False
    ),
    "llama wide, tied, with biases": lambda: _sized(
        transformers.LlamaConfig,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=24,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    ),
}  # fmt: skip


def saved(kind: str, path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The model `kind` with uneven values everywhere, saved by transformers; what its file holds."""
    model = transformers.AutoModelForCausalLM.from_config({**SIX, **MORE}[kind](**changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes, in fp32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found
