"""Presets against published sizes, what a recipe may change of them, and layouts that do not cut a model."""

from __future__ import annotations

import math

import pytest

from xlmega.errors import ConfigError, LayoutError
from xlmega.models.config import PRESETS, check_layout, differences, model_config, resolve
from xlmega.parallel.layout import Layout

# METHODS §1.6: millions of parameters without both embeddings, and with V = 16384 and 32768.
LANGUINI = {
    "languini_mini": (10.8, 27.5, 44.3),
    "languini_tiny": (28.7, 53.9, 79.1),
    "languini_small": (85.4, 110.6, 135.8),
    "languini_medium": (302.8, 336.4, 369.9),
    "languini_large": (680.7, 731.1, 781.4),
    "languini_xl": (1411.1, 1478.2, 1545.3),
}
# Numbers of parameters of the published checkpoints (positions are computed, the head is the embedding).
XGLM = {
    "xglm_564m": 564_463_616,
    "xglm_1.7b": 1_732_907_008,
    "xglm_2.9b": 2_941_505_536,
    "xglm_4.5b": 4_552_511_488,
    "xglm_7.5b": 7_492_771_840,
}
# The published checkpoints of the other families, padded vocabulary rows included.
PUBLISHED = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1.4b": 1_414_647_808,
    "pythia_2.8b": 2_775_208_960,
    "pythia_6.9b": 6_857_302_016,
    "bloom_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "smollm2_135m": 134_515_008,
    "tinyllama_1.1b": 1_100_048_384,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
}


@pytest.mark.parametrize("preset", sorted(LANGUINI))
def test_languini_sizes(preset: str) -> None:
    body, *totals = LANGUINI[preset]
    for vocabulary, total in zip((16384, 32768), totals):
        config = model_config(preset=preset, vocab_size=vocabulary)
        assert config.num_parameters() / 1e6 == pytest.approx(total, abs=0.06)
        assert (config.num_parameters() - 2 * vocabulary * config.hidden_size) / 1e6 == pytest.approx(body, abs=0.06)
    assert (config.positions, config.tied, config.activation) == ("learned", False, "gelu_tanh")


@pytest.mark.parametrize("preset", sorted(XGLM))
def test_xglm_sizes(preset: str) -> None:
    config = model_config(preset=preset)
    assert config.num_parameters() == XGLM[preset]
    assert config.embedding_scale == math.sqrt(config.hidden_size) and config.tied


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_sizes_of_the_other_families(preset: str) -> None:
    assert model_config(preset=preset).num_parameters() == PUBLISHED[preset]


def test_every_preset_is_a_model() -> None:
    assert {*LANGUINI, *XGLM} < {*PRESETS}
    for name in PRESETS:
        config = model_config(preset=name)
        assert config.preset == name and config.num_heads * config.head_dim > 0


def test_a_recipe_changes_a_preset_and_what_follows_from_it() -> None:
    config = model_config(preset="xglm_tiny", hidden_size=64, num_layers=2)
    assert (config.head_dim, config.embedding_scale, config.num_layers, config.num_heads) == (16, 8.0, 2, 4)
    own = model_config(preset="xglm_tiny", hidden_size=64, head_dim=8, embedding_scale=1.0)
    assert (own.head_dim, own.embedding_scale) == (8, 1.0)
    assert model_config(preset="languini_mini").head_dim == 32  # 8 heads of 32 in 512: the preset's own stays
    assert resolve({"family": "gpt"}) == {"family": "gpt"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"preset": "xglm_tinny"}, "model.preset 'xglm_tinny' is not known. Did you mean 'xglm_tiny'?"),
        ({"preset": ["xglm_tiny"]}, "is not known"),
        ({"preset": "xglm_tiny", "num_heads": 3}, "num_heads=3 does not divide hidden_size=256.*1, 2, 4, 8"),
        ({"preset": "xglm_tiny", "hidden_size": 0}, "hidden_size must be at least 1"),
        ({"preset": "xglm_tiny", "hidden_size": 3, "num_heads": 1}, "even and at least 4"),
        ({"preset": "xglm_tiny", "hidden_size": 2, "num_heads": 1}, "even and at least 4"),
        ({"preset": "xglm_tiny", "num_heads": 0}, "num_heads must be at least 1"),
        ({"preset": "xglm_tiny", "dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"preset": "xglm_tiny", "attention_dropout": -0.1}, r"attention_dropout must be in \[0, 1\)"),
        ({"preset": "xglm_tiny", "vocab_size": -1}, "vocab_size must be positive"),
        ({"preset": "xglm_tiny", "layernorm_epsilon": 0.0}, "layernorm_epsilon must be positive"),
        ({"preset": "xglm_tiny", "embedding_scale": -1.0}, "embedding_scale must be positive"),
        ({"preset": "xglm_tiny", "init_std": -0.1}, "init_std must not be negative"),
        ({"preset": "llama_tiny", "num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"preset": "llama_tiny", "num_kv_heads": -1}, "num_kv_heads=-1 must divide"),
        ({"preset": "llama_tiny", "norm_bias": True}, "norm_bias must be false"),
        ({"preset": "llama_tiny", "rotary_base": 0.0}, "rotary_base must be positive"),
        ({"preset": "neox_tiny", "rotary_fraction": 1.5}, r"rotary_fraction must be in \(0, 1\], but is 1.5"),
        ({"preset": "neox_tiny", "rotary_fraction": 0.05}, "turn pairs, but rotary_fraction=0.05 of head_dim=64 is 3"),
        ({"preset": "bloom_tiny", "rotary_base": 5.0}, "rotary_base is of rotary positions, but positions are alibi"),
        ({"preset": "xglm_tiny", "num_layer": 3}, "no key 'num_layer'. Did you mean 'num_layers'?"),
        ({"num_layers": 3}, "10 problems"),
    ],
)
def test_models_that_cannot_be(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_config(**keys)


def test_layouts_that_fit() -> None:
    config = model_config(preset="languini_small")
    for layout in (Layout(4, 3), Layout(12), Layout(pp=12), Layout(2, 2, 2, 3, True)):
        check_layout(layout, config, 512)


def test_a_layout_that_does_not_fit_is_told_every_reason() -> None:
    config = model_config(preset="xglm_tiny", max_positions=64)
    with pytest.raises(LayoutError) as caught:
        check_layout(Layout(tp=3, pp=2, dp=1, virtual_stages=3, sequence_parallel=True), config, 100)
    assert str(caught.value).splitlines() == [
        "tp3 pp2 dp1 x3 interleaved sp does not fit the model:",
        "  tp=3 must divide num_heads=4 and ffn_hidden_size=1024. tp may be 1, 2, 4.",
        "  pp=2 x virtual_stages=3 must divide num_layers=4. Their product may be 1, 2, 4.",
        "  sequence_parallel needs data.sequence_length=100 to be a multiple of tp=3.",
        "  data.sequence_length=100 is beyond the model's max_positions=64.",
    ]


def test_keys_and_values_are_not_cut_finer_than_their_heads() -> None:
    config = model_config(preset="llama_tiny")
    check_layout(Layout(tp=2, pp=2), config, 128)
    with pytest.raises(
        LayoutError, match="tp=4 must divide num_heads=4, num_kv_heads=2 and ffn_hidden_size=704. tp may be 1, 2."
    ):
        check_layout(Layout(tp=4), config, 128)


def test_flops_are_six_for_each_weight_and_attention() -> None:
    config = model_config(preset="xglm_tiny", vocab_size=1000)
    weights = 4 * (4 * 256 * 256 + 2 * 256 * 1024) + 1000 * 256
    assert config.flops_per_token(128) == 6 * weights + 6 * 4 * 256 * 128


def test_models_that_are_other_functions_of_the_same_weights() -> None:
    one = model_config(preset="neox_tiny", vocab_size=100)
    assert differences(one, model_config(preset="neox_tiny", vocab_size=100, max_positions=64, init_std=0.1)) == []
    assert differences(one, model_config(preset="neox_tiny", vocab_size=100, num_kv_heads=4)) == []
    other = model_config(preset="neox_tiny", vocab_size=100, rotary_base=500.0, parallel_residual=False)
    assert differences(one, other) == ["parallel_residual is True and False", "rotary_base is 10000.0 and 500.0"]
