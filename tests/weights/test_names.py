"""Logical names, and the tables that spell them as XGLM and GPT-2."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from xlmega.errors import CheckpointError, ConfigError
from xlmega.models.config import PRESETS, ModelConfig, model_config
from xlmega.weights.families import check_expressible, family_table, folded_scale, zero_heads
from xlmega.weights.names import TRANSPOSE, TURNS_TO_BLOCKS, Row, heads_to_blocks, logical_shapes, scaled, zero_groups

pytestmark = pytest.mark.torch

XGLM = model_config(preset="xglm_tiny", vocab_size=300)
MINI = model_config(preset="languini_mini", vocab_size=300)  # 8 heads of 32 in hidden size 512
SMALL = model_config(preset="languini_small", vocab_size=300)
NEOX = model_config(preset="neox_tiny", vocab_size=300)
NEOX_NARROW = model_config(preset="neox_tiny", vocab_size=300, num_heads=3, head_dim=64)
BLOOM = model_config(preset="bloom_tiny", vocab_size=300)
LLAMA = model_config(preset="llama_tiny", vocab_size=300, num_kv_heads=2, num_heads=8)
ALL = [XGLM, MINI, SMALL, NEOX, NEOX_NARROW, BLOOM, LLAMA]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_shapes_add_up_to_the_number_of_parameters(preset: str) -> None:
    config = model_config(**{**PRESETS[preset](), "vocab_size": 1000})
    assert sum(math.prod(shape) for shape in logical_shapes(config).values()) == config.num_parameters()


def test_names_follow_the_config() -> None:
    xglm, gpt = logical_shapes(XGLM), logical_shapes(MINI)
    assert "output_layer.weight" not in xglm and gpt["output_layer.weight"] == (300, 512)
    assert "embedding.position_embeddings.weight" not in xglm
    assert gpt["embedding.position_embeddings.weight"] == (512, 512)
    assert gpt["decoder.layers.3.self_attention.linear_qkv.weight"] == (3 * 8 * 32, 512)
    assert gpt["decoder.layers.3.self_attention.linear_proj.weight"] == (512, 8 * 32)
    assert "decoder.layers.4.input_layernorm.weight" not in gpt
    assert list(xglm)[-1] == "decoder.final_layernorm.bias"


def test_heads_to_blocks_by_eye() -> None:
    # Two heads of one row each: (head 0: q k v)(head 1: q k v) becomes (q q)(k k)(v v).
    fused = torch.tensor([10, 20, 30, 11, 21, 31])
    assert heads_to_blocks(2).forward(fused).tolist() == [10, 11, 20, 21, 30, 31]
    # Rows of one head stay in order.
    assert heads_to_blocks(1).forward(torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_grouped_heads_to_blocks_by_eye() -> None:
    # Two heads of keys with two queries each, of one row: (q q k v)(q q k v) becomes (q q q q)(k k)(v v).
    fused = torch.tensor([10, 11, 20, 30, 12, 13, 21, 31])
    piece = heads_to_blocks(2, 2)
    assert piece.forward(fused).tolist() == [10, 11, 12, 13, 20, 21, 30, 31]
    assert piece.backward(piece.forward(fused)).tolist() == fused.tolist()
    q, k, v = Row("qkv", ("q", "k", "v"), (piece,), (4, 2, 2)).to_theirs(fused)
    assert (q.tolist(), k.tolist(), v.tolist()) == ([10, 11, 12, 13], [20, 21], [30, 31])


def test_rows_that_take_turns_by_eye() -> None:
    assert TURNS_TO_BLOCKS.forward(torch.tensor([1, 10, 2, 20, 3, 30])).tolist() == [1, 2, 3, 10, 20, 30]
    assert TURNS_TO_BLOCKS.backward(torch.tensor([1, 2, 3, 10, 20, 30])).tolist() == [1, 10, 2, 20, 3, 30]


def test_zero_groups_by_eye() -> None:
    piece = zero_groups(0, size=2, added=1, groups=3)
    padded = piece.forward(torch.tensor([1, 2, 3, 4, 5, 6]))
    assert padded.tolist() == [1, 2, 0, 3, 4, 0, 5, 6, 0]
    assert piece.backward(padded).tolist() == [1, 2, 3, 4, 5, 6]
    columns = zero_groups(1, size=2, added=2)
    assert columns.forward(torch.ones(1, 2)).tolist() == [[1, 1, 0, 0]]
    padded[2] = 7
    with pytest.raises(CheckpointError, match="hold other values now"):
        piece.backward(padded)


def test_a_row_splits_and_joins_and_knows_its_parts_without_data() -> None:
    row = Row("qkv", ("q", "k", "v"), (heads_to_blocks(2),))
    fused = torch.randn(12, 5)
    q, k, v = row.to_theirs(fused)
    assert torch.equal(q, torch.cat([fused[0:2], fused[6:8]])) and torch.equal(v, torch.cat([fused[4:6], fused[10:12]]))
    assert torch.equal(row.to_logical([q, k, v]), fused)
    assert [part.shape for part in row.to_theirs(torch.empty(12, 5, device="meta"))] == [(4, 5)] * 3


def test_transpose_and_scale() -> None:
    x = torch.randn(3, 4)
    row = Row("fc", ("c_fc",), (scaled(16.0), TRANSPOSE))
    assert torch.equal(row.to_theirs(x)[0], x.T * 16)
    assert torch.equal(row.to_logical(row.to_theirs(x)), x)  # exact: 16 is a power of two


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.preset}-{config.num_heads}")
def test_a_table_covers_every_logical_name_once(config: ModelConfig) -> None:
    table = family_table(config)
    assert sorted(row.logical for row in table) == sorted(logical_shapes(config))
    theirs = [name for row in table for name in row.theirs]
    assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize("config", ALL, ids=lambda config: f"{config.preset}-{config.num_heads}")
def test_there_and_back_is_bit_exact(config: ModelConfig) -> None:
    config = dataclasses.replace(config, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    for row in family_table(config):
        tensor = torch.randn(logical_shapes(config)[row.logical], generator=generator)
        back = row.to_logical(row.to_theirs(tensor))
        if row.logical == "embedding.word_embeddings.weight" and config.embedding_scale not in (1.0, 16.0):
            torch.testing.assert_close(back, tensor, rtol=2e-7, atol=0)  # the folded scale: one rounding each way
        else:
            assert torch.equal(back, tensor), row.logical


def test_what_has_to_be_written_into_the_weights() -> None:
    assert (folded_scale(XGLM), zero_heads(XGLM)) == (1.0, 0)
    assert (folded_scale(MINI), zero_heads(MINI)) == (math.sqrt(512), 8)
    assert folded_scale(dataclasses.replace(XGLM, tied=False, embedding_scale=3.0)) == 3.0
    check_expressible(dataclasses.replace(XGLM, embedding_scale=1.0))


def test_refusals_say_why() -> None:
    xl = model_config(preset="languini_xl", vocab_size=300)
    with pytest.raises(ConfigError, match=r"num_heads=24 x head_dim=128 is 3072, wider than hidden_size=2048"):
        check_expressible(xl)
    with pytest.raises(ConfigError, match="would scale the logits"):
        check_expressible(dataclasses.replace(SMALL, tied=True))
    with pytest.raises(ConfigError) as refused:
        check_expressible(dataclasses.replace(XGLM, positions="learned", embedding_scale=3.0, layernorm_epsilon=1e-6))
    assert all(part in str(refused.value) for part in ("positions is learned", "is 3 and the head is tied", "1e-06"))
    with pytest.raises(ConfigError, match="with more heads ALiBi's slopes would be others"):
        check_expressible(dataclasses.replace(BLOOM, num_heads=2))
    with pytest.raises(ConfigError, match="num_kv_heads is 2, but the family has as many as num_heads=4"):
        check_expressible(dataclasses.replace(NEOX, num_kv_heads=2))
    with pytest.raises(ConfigError, match="gated_mlp is false, but the family knows only true"):
        check_expressible(dataclasses.replace(LLAMA, gated_mlp=False))
    with pytest.raises(ConfigError, match="do not fill hidden_size=512"):
        check_expressible(dataclasses.replace(MINI, head_dim=48))
