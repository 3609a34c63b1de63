"""What a decoder is: one frozen dataclass, whatever its family.

A recipe names a preset (`models.presets`) and may change any key: `[model] preset = "xglm_tiny"`, `num_layers = 12`.
What comes out, together with the vocabulary's size, is all that models, exports and the planner need to know.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from xlmega import config
from xlmega.errors import ConfigError, LayoutError, nearest
from xlmega.models.presets import PRESETS
from xlmega.parallel.layout import Layout, divisors, spell

# Sinusoidal positions of the fairseq family start at padding_idx + 1 and XGLM's pad is 1.
XGLM_POSITION_OFFSET = 2


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder. Each way in which families differ is a key of its own; `family` says how it is exported."""

    family: Literal["xglm", "gpt", "neox", "bloom", "llama", "backpack"]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    head_dim: int
    """num_heads * head_dim may differ from hidden_size (Languini mini and XL)."""
    max_positions: int
    """Longest sequence; the number of rows of a learned position table."""
    positions: Literal["sinusoidal", "learned", "rotary", "alibi"]
    tied: bool
    """The output head is the word embedding."""
    embedding_scale: float
    """Word embeddings are multiplied by this before positions are added."""
    activation: Literal["gelu", "gelu_tanh", "silu"]
    preset: str = ""
    """The preset this came from, for reports only."""
    vocab_size: int = 0
    """Number of ids; 0 takes the vocabulary's own size. Padding for tensor parallelism is never counted."""
    layernorm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    residual_init: Literal["plain", "mlp", "both"] = "plain"
    """'mlp' divides the std of the MLP's output projection by sqrt(2 * num_layers) (Languini); 'both' the attention's
    too (GPT-2)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_bias: bool = True
    """Layer norms have a bias; RMS norms never do."""
    linear_bias: bool = True
    """Every linear layer but the head has a bias."""
    gated_mlp: bool = False
    """The activation of one projection times another (SwiGLU); both are ffn_hidden_size wide."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + mlp(norm'(x)) instead of one after the other (GPT-NeoX)."""
    num_kv_heads: int = 0
    """Heads of keys and values, each shared by num_heads / num_kv_heads queries; 0 takes num_heads."""
    rotary_fraction: float = 1.0
    """The part of each head that rotary positions turn, from its first dimension on."""
    rotary_base: float = 10000.0
    embedding_norm: bool = False
    """A norm over the word embedding before the first layer (BLOOM)."""
    layer_scaled_attention: bool = False
    """Scores of layer n, counted from 1, are divided by n (`scale_attn_by_inverse_layer_idx`)."""
    backpack_variant: Literal["", "original", "nano"] = ""
    """How a Backpack's senses are made and weighed: as published (METHODS §4.2), or as in nanoBackpack (§4.3)."""
    num_senses: int = 0
    """Sense vectors of each token; of a Backpack only."""
    sense_intermediate_scale: int = 4
    """Width of the sense network's last hidden layer, in hidden_size."""

    def problems(self) -> Iterator[str]:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, but is {getattr(self, name)}."
        if self.positions == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            yield f"hidden_size must be even and at least 4 with sinusoidal positions, but is {self.hidden_size}."
        for name in ("embedding_scale", "layernorm_epsilon", "rotary_base"):
            if getattr(self, name) <= 0.0:
                yield f"{name} must be positive, but is {getattr(self, name)}."
        if self.init_std < 0.0:
            yield f"init_std must not be negative, but is {self.init_std}."
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield f"{name} must be in [0, 1), but is {getattr(self, name)}."
        if self.vocab_size < 0:
            yield f"vocab_size must be positive, or 0 for the vocabulary's own, but is {self.vocab_size}."
        yield from self._problems_of_attention()
        yield from self._problems_of_senses()
        if self.norm == "rmsnorm" and self.norm_bias:
            yield "norm_bias must be false with norm='rmsnorm', which has none."

    def _problems_of_attention(self) -> Iterator[str]:
        if self.num_kv_heads < 0 or (self.num_kv_heads and self.num_heads % self.num_kv_heads):
            yield f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}, or be 0 for as many."
        if self.positions == "rotary":
            if not 0.0 < self.rotary_fraction <= 1.0:
                yield f"rotary_fraction must be in (0, 1], but is {self.rotary_fraction}."
            elif self.rotary_dim < 2 or self.rotary_dim % 2:
                yield (
                    f"rotary positions turn pairs, but rotary_fraction={self.rotary_fraction} of "
                    f"head_dim={self.head_dim} is {self.rotary_dim} dimensions."
                )
        else:
            for name, default in (("rotary_fraction", 1.0), ("rotary_base", 10000.0)):
                if getattr(self, name) != default:
                    yield f"{name} is of rotary positions, but positions are {self.positions}."

    def _problems_of_senses(self) -> Iterator[str]:
        if (self.family == "backpack") != bool(self.backpack_variant):
            yield "backpack_variant must be 'original' or 'nano' with family='backpack', and is of no other family."
        if not self.backpack_variant:
            if self.num_senses:
                yield f"num_senses={self.num_senses} is of family='backpack', but the family is '{self.family}'."
            return
        if self.num_senses < 1 or self.hidden_size % self.num_senses:
            yield (
                f"num_senses={self.num_senses} must divide hidden_size={self.hidden_size}: that is the width of a "
                "sense's queries and keys."
            )
        if self.sense_intermediate_scale < 1:
            yield f"sense_intermediate_scale must be at least 1, but is {self.sense_intermediate_scale}."
        if not self.tied or self.embedding_scale != 1.0:
            yield "a Backpack's head is its word embedding, unscaled: tied must be true and embedding_scale 1."
        if self.norm != "layernorm" or self.gated_mlp:
            yield "a Backpack's norms are layer norms and its MLPs are not gated."
        if self.dropout or self.attention_dropout:
            yield "a Backpack knows no dropout: senses are computed once for each distinct token, not at each position."

    @property
    def stage_units(self) -> int:
        """What a pipeline is divided by: the layers; in nanoBackpack the senses, on the last stage, stand for one."""
        return self.num_layers + (self.backpack_variant == "nano")

    def layers_of_stage(self, stage: int, num_stages: int) -> range:
        """The layers of one (virtual) stage, counted in the order of the model."""
        each = self.stage_units // num_stages
        return range(stage * each, min((stage + 1) * each, self.num_layers))

    @property
    def attention_width(self) -> int:
        """Width of the queries over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and of values."""
        return self.num_kv_heads or self.num_heads

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head rotary positions turn."""
        return int(self.head_dim * self.rotary_fraction)

    def norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The parameters of the norm `name` with their shapes."""
        kinds = ("weight", "bias") if self.norm_bias else ("weight",)
        return {f"{name}.{kind}": (self.hidden_size,) for kind in kinds}

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of one layer, by their names in it, in the order in which it computes.

        Rows of `linear_qkv` are interleaved per head of keys: the rows of its queries, its key rows, its value rows.
        Rows of a gated `linear_fc1` are interleaved one by one: gate, value, gate, value. So an equal part of the rows
        is a model of its own, and tensor parallelism cuts both like any other tensor.
        """
        d, w, f = self.hidden_size, self.attention_width, self.ffn_hidden_size
        return {
            **self.norm_shapes("input_layernorm"),
            **self._linear_shapes("self_attention.linear_qkv", self.qkv_width, d),
            **self._linear_shapes("self_attention.linear_proj", d, w),
            **self.norm_shapes("pre_mlp_layernorm"),
            **self._linear_shapes("mlp.linear_fc1", (2 if self.gated_mlp else 1) * f, d),
            **self._linear_shapes("mlp.linear_fc2", d, f),
        }

    def sense_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters of a Backpack's senses, by their names in the model; none for other families.

        Rows of `query_key` are interleaved per sense: its queries, its keys. Rows of `output` and entries of
        `joint_layernorm` are sense by sense.
        """
        if not self.backpack_variant:
            return {}
        d, inner = self.hidden_size, self.sense_intermediate_scale * self.hidden_size
        mlp = {
            **self._linear_shapes("senses.mlp.linear_fc1", self.ffn_hidden_size, d),
            **self._linear_shapes("senses.mlp.linear_fc2", d, self.ffn_hidden_size),
        }
        output = {
            **self._linear_shapes("senses.expand", inner, d),
            **self._linear_shapes("senses.output", self.num_senses * d, inner),
        }
        if self.backpack_variant == "original":
            first, second, third = (
                self.norm_shapes(f"senses.{name}") for name in ("input_layernorm", "mlp_layernorm", "output_layernorm")
            )
            return {**self._linear_shapes("senses.query_key", 2 * d, d), **first, **second, **mlp, **third, **output}
        joint = dict.fromkeys(self.norm_shapes("senses.joint_layernorm"), (self.num_senses * d,))
        query_key = {"senses.query_key.weight": (2 * d, d)}  # without bias whatever the other layers have
        return {**query_key, **mlp, **self.norm_shapes("senses.mlp_layernorm"), **output, **joint}

    def _linear_shapes(self, name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
        return {**weight, f"{name}.bias": (outputs,)} if self.linear_bias else weight

    def num_parameters(self) -> int:
        """Number of logical parameters (no padding, a tied head counted once)."""
        d = self.hidden_size
        norm = len(self.norm_shapes("")) * d
        words = self.vocab_size * d * (1 if self.tied else 2)
        positions = self.max_positions * d if self.positions == "learned" else 0
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values())
        senses = sum(math.prod(shape) for shape in self.sense_shapes().values())
        return words + positions + self.num_layers * layer + norm * (2 if self.embedding_norm else 1) + senses

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of forward and backward for one token: 6 for each weight of a matrix product, plus
        causal attention's scores and mix. Recomputation is not counted; nor is a Backpack's sense network, whose work
        goes with the distinct tokens."""
        layer = sum(math.prod(shape) for shape in self.layer_shapes().values() if len(shape) == 2)
        weights = self.num_layers * layer + self.vocab_size * self.hidden_size
        flops = 6.0 * weights + 6.0 * self.num_layers * self.attention_width * sequence_length
        if self.backpack_variant:
            d = self.hidden_size
            flops += 6.0 * 2 * d * d + 3.0 * (1 + self.num_senses) * d * sequence_length
        return flops


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


# What weights do not depend on: settings of training and of reports, and how far positions that are computed may go.
_NOT_OF_THE_FUNCTION = {"preset", "init_std", "residual_init", "dropout", "attention_dropout", "family"}


def differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """In which keys two models are different functions of the same weights, as 'key is A and B'."""
    ignored = _NOT_OF_THE_FUNCTION | (set() if one.positions == "learned" else {"max_positions"})
    found = []
    for field in dataclasses.fields(ModelConfig):
        left, right = (one.kv_heads, other.kv_heads) if field.name == "num_kv_heads" else (
            getattr(one, field.name), getattr(other, field.name)
        )  # fmt: skip
        same = math.isclose(left, right, rel_tol=1e-6) if isinstance(left, float) else left == right
        if field.name not in ignored and not same:
            found.append(f"{field.name} is {left} and {right}")
    return found


def check_layout(layout: Layout, model: ModelConfig, sequence_length: int) -> None:
    """Refuse a layout that cannot cut this model; every reason in one error."""
    reasons = list(_reasons(layout, model, sequence_length))
    if reasons:
        raise LayoutError("\n  ".join([f"{layout.describe()} does not fit the model:", *reasons]))


def _reasons(layout: Layout, model: ModelConfig, sequence_length: int) -> Iterator[str]:
    tp, stages = layout.tp, layout.pp * layout.virtual_stages
    cut = {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads, "ffn_hidden_size": model.ffn_hidden_size}
    if model.kv_heads == model.num_heads:
        del cut["num_kv_heads"]
    if any(size % tp for size in cut.values()):
        works = divisors(math.gcd(*cut.values()))
        *most, last = (f"{name}={size}" for name, size in cut.items())
        yield f"tp={tp} must divide {', '.join(most)} and {last}. tp may be {spell(works)}."
    if model.num_senses % tp:
        works = [t for t in divisors(model.num_senses) if model.num_heads % t == 0]
        yield f"tp={tp} must divide num_senses={model.num_senses}: a rank has whole senses. tp may be {spell(works)}."
    if model.stage_units % stages:
        works = divisors(model.stage_units)
        what = f"num_layers={model.num_layers}" + (" + 1 (the senses)" if model.stage_units > model.num_layers else "")
        yield (
            f"pp={layout.pp} x virtual_stages={layout.virtual_stages} must divide {what}. "
            f"Their product may be {spell(works)}."
        )
    if layout.sequence_parallel and sequence_length % tp:
        yield f"sequence_parallel needs data.sequence_length={sequence_length} to be a multiple of tp={tp}."
    if sequence_length > model.max_positions:
        yield f"data.sequence_length={sequence_length} is beyond the model's max_positions={model.max_positions}."
