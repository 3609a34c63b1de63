"""What a decoder is: one frozen dataclass, and presets that are plain functions returning tables.

A recipe names a preset and may change any key: `[model] preset = "xglm_tiny"`, `num_layers = 12`. What comes out,
together with the vocabulary's size, is all that models, exports and the planner need to know.
Sources: XGLM, METHODS §2.10; Languini GPT, METHODS §1.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xlmega import config
from xlmega.errors import ConfigError, LayoutError, nearest
from xlmega.parallel.layout import Layout, divisors, spell

# Sinusoidal positions of the fairseq family start at padding_idx + 1 and XGLM's pad is 1.
XGLM_POSITION_OFFSET = 2


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder with multi-head attention, GELU and biases in every linear layer except the head."""

    family: Literal["xglm", "gpt"]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    head_dim: int
    """num_heads * head_dim may differ from hidden_size (Languini mini and XL)."""
    max_positions: int
    """Longest sequence; the number of rows of a learned position table."""
    positions: Literal["sinusoidal", "learned"]
    tied: bool
    """The output head is the word embedding."""
    embedding_scale: float
    """Word embeddings are multiplied by this before positions are added."""
    activation: Literal["gelu", "gelu_tanh"]
    preset: str = ""
    """The preset this came from, for reports only."""
    vocab_size: int = 0
    """Number of ids; 0 takes the vocabulary's own size. Padding for tensor parallelism is never counted."""
    layernorm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    residual_init: Literal["plain", "mlp"] = "plain"
    """'mlp' divides the std of the MLP's output projection by sqrt(2 * num_layers) (Languini)."""

    def problems(self) -> Iterator[str]:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, but is {getattr(self, name)}."
        if self.positions == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            yield f"hidden_size must be even and at least 4 with sinusoidal positions, but is {self.hidden_size}."
        for name in ("embedding_scale", "layernorm_epsilon"):
            if getattr(self, name) <= 0.0:
                yield f"{name} must be positive, but is {getattr(self, name)}."
        if self.init_std < 0.0:
            yield f"init_std must not be negative, but is {self.init_std}."
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield f"{name} must be in [0, 1), but is {getattr(self, name)}."
        if self.vocab_size < 0:
            yield f"vocab_size must be positive, or 0 for the vocabulary's own, but is {self.vocab_size}."

    @property
    def attention_width(self) -> int:
        """Width of the queries, keys and values over all heads."""
        return self.num_heads * self.head_dim

    def num_parameters(self) -> int:
        """Number of logical parameters (no padding, a tied head counted once)."""
        d, w, f = self.hidden_size, self.attention_width, self.ffn_hidden_size
        layer = 2 * 2 * d + (d + 1) * 3 * w + (w + 1) * d + (d + 1) * f + (f + 1) * d
        words = self.vocab_size * d * (1 if self.tied else 2)
        positions = self.max_positions * d if self.positions == "learned" else 0
        return words + positions + self.num_layers * layer + 2 * d

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 for each weight of a matrix product, plus
        causal attention's scores and mix. Recomputation is not counted."""
        d, w, f = self.hidden_size, self.attention_width, self.ffn_hidden_size
        weights = self.num_layers * (4 * d * w + 2 * d * f) + self.vocab_size * d
        return 6.0 * weights + 6.0 * self.num_layers * w * sequence_length


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
}


def resolve(table: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's [model] table with its preset's keys filled in below the recipe's own.

    A changed hidden_size or num_heads carries head_dim and embedding_scale with it unless these are given too.
    """
    preset = table.get("preset", "")
    if not preset:
        return dict(table)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"model.preset '{preset}' is not known.{nearest(str(preset), PRESETS)}")
    base = PRESETS[preset]()
    result = {**base, **table}
    sizes = result["hidden_size"], result["num_heads"]
    if ("hidden_size" in table or "num_heads" in table) and all(isinstance(x, int) and x > 0 for x in sizes):
        if "head_dim" not in table and sizes[0] % sizes[1]:
            raise ConfigError(
                f"model.num_heads={sizes[1]} does not divide hidden_size={sizes[0]}, so there is no head_dim to derive."
                f" num_heads may be {spell(divisors(sizes[0])[:16])}; or give model.head_dim yourself."
            )
        result["head_dim"] = table.get("head_dim", sizes[0] // sizes[1])
        if base["embedding_scale"] != 1.0:
            result["embedding_scale"] = table.get("embedding_scale", math.sqrt(sizes[0]))
    return result


def model_config(**keys: Any) -> ModelConfig:
    """A checked ModelConfig from keyword arguments (as a recipe's [model] table would give it)."""
    return config.build(ModelConfig, resolve(keys), what="model")


def check_layout(layout: Layout, model: ModelConfig, sequence_length: int) -> None:
    """Refuse a layout that cannot cut this model; every reason in one error."""
    reasons = list(_reasons(layout, model, sequence_length))
    if reasons:
        raise LayoutError("\n  ".join([f"{layout.describe()} does not fit the model:", *reasons]))


def _reasons(layout: Layout, model: ModelConfig, sequence_length: int) -> Iterator[str]:
    tp, stages = layout.tp, layout.pp * layout.virtual_stages
    if model.num_heads % tp or model.ffn_hidden_size % tp:
        works = [t for t in divisors(model.num_heads) if model.ffn_hidden_size % t == 0]
        yield (
            f"tp={tp} must divide num_heads={model.num_heads} and ffn_hidden_size={model.ffn_hidden_size}. "
            f"tp may be {spell(works)}."
        )
    if model.num_layers % stages:
        works = divisors(model.num_layers)
        yield (
            f"pp={layout.pp} x virtual_stages={layout.virtual_stages} must divide num_layers={model.num_layers}. "
            f"Their product may be {spell(works)}."
        )
    if layout.sequence_parallel and sequence_length % tp:
        yield f"sequence_parallel needs data.sequence_length={sequence_length} to be a multiple of tp={tp}."
    if sequence_length > model.max_positions:
        yield f"data.sequence_length={sequence_length} is beyond the model's max_positions={model.max_positions}."
