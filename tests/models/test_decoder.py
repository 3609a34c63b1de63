"""One process's decoder against the plain reference, and dropout inside it. Layouts are compared in training/."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_rank import batch_of, built, gradients, one_rank, part
from reference import reference_logits

from xlmega.models.config import ModelConfig, model_config
from xlmega.models.decoder import padded_vocabulary, shard_axis
from xlmega.models.positions import sinusoidal_positions
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import shards_of

pytestmark = pytest.mark.torch

SIZES = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "vocab_size": 101, "init_std": 0.15}
MODELS = {
    "xglm": {"preset": "xglm_tiny"},
    "xglm untied": {"preset": "xglm_tiny", "tied": False},
    "xglm narrow heads": {"preset": "xglm_tiny", "head_dim": 5, "embedding_scale": 3.0},
    "languini": {"preset": "languini_tiny", "max_positions": 24},
    "languini tied wide heads": {"preset": "languini_tiny", "max_positions": 24, "tied": True, "head_dim": 12},
    "gpt no biases, scaled by layer": {
        "preset": "gpt2_small",
        "max_positions": 24,
        "linear_bias": False,
        "norm_bias": False,
        "layer_scaled_attention": True,
    },
    "neox": {"preset": "neox_tiny"},
    "neox in turn": {"preset": "neox_tiny", "parallel_residual": False, "rotary_fraction": 0.5, "rotary_base": 100.0},
    "bloom": {"preset": "bloom_tiny"},
    "bloom six heads": {"preset": "bloom_tiny", "num_heads": 6, "head_dim": 5},
    "llama": {"preset": "llama_tiny"},
    "llama one key head": {"preset": "llama_tiny", "num_kv_heads": 1, "tied": True, "linear_bias": True},
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The groups of one rank, for the length of this module."""
    with one_rank():
        yield


def model_of(name: str, **changes: Any) -> ModelConfig:
    return model_config(**{**SIZES, **MODELS[name], **changes})


@pytest.mark.parametrize("name", sorted(MODELS))
def test_agrees_with_the_reference(group: None, name: str) -> None:
    model = model_of(name)
    decoder, tensors = built(model)
    batch = batch_of(model)
    logits_BLV = reference_logits(model, tensors, batch.tokens_BL)
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.targets_BL, reduction="none")
    for training in (True, False):
        loss, found_BL = decoder.train(training)(batch)
        torch.testing.assert_close(found_BL, nll_BL, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, (nll_BL * batch.weights_BL).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["xglm", "languini"])
def test_gradients_agree_with_the_reference(group: None, name: str) -> None:
    model = model_of(name)
    decoder, tensors = built(model)
    batch = batch_of(model)
    _, found = gradients(decoder.train(), batch)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    logits_BLV = reference_logits(model, leaves, batch.tokens_BL)
    nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.targets_BL, reduction="none")
    (nll_BL * batch.weights_BL).sum().backward()
    assert found.keys() == leaves.keys()
    for tensor, leaf in leaves.items():
        assert leaf.grad is not None
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(found[tensor], leaf.grad, rtol=0, atol=1e-5 * max(scale, 1.0), msg=tensor)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_are_the_logical_ones(group: None, name: str) -> None:
    model = model_of(name)
    decoder, _ = built(model)
    shards = [shard for shard, _ in shards_of([decoder], model, 0, 1)]
    assert {shard.name: shard.shape for shard in shards} == logical_shapes(model)
    assert sum(math.prod(shard.shape) for shard in shards) == model.num_parameters()
    assert sum(p.numel() for p in decoder.parameters()) == model.num_parameters()
    assert not any(shard.is_copy for shard in shards)


def test_longest_sequence_and_the_last_learned_position(group: None) -> None:
    model = model_of("languini")
    decoder, tensors = built(model)
    batch = batch_of(model, 1, 24)
    logits_BLV = reference_logits(model, tensors, batch.tokens_BL)
    expected = F.cross_entropy(logits_BLV.transpose(1, 2), batch.targets_BL, reduction="none")
    torch.testing.assert_close(decoder.eval()(batch)[1], expected, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_change_earlier_losses(group: None) -> None:
    model = model_of("xglm")
    decoder, _ = built(model)
    batch = batch_of(model, 2)
    changed = dataclasses.replace(batch, tokens_BL=batch.tokens_BL.clone())
    changed.tokens_BL[:, 9:] = 7
    first, second = (decoder.eval()(one)[1] for one in (batch, changed))
    assert torch.equal(first[:, :9], second[:, :9]) and not torch.equal(first[:, 9:], second[:, 9:])


@pytest.mark.parametrize("drop", [{"dropout": 0.1}, {"dropout": 0.1, "attention_dropout": 0.1}])
def test_micro_batch_splits_share_one_loss_with_dropout(group: None, drop: dict[str, float]) -> None:
    model = model_of("xglm", **drop)
    decoder, _ = built(model, dropout_seed=5)
    decoder.train()
    batch = batch_of(model, slots=(40, 41, 42, 43))
    whole, expected = gradients(decoder, batch)
    split, found = gradients(decoder, part(batch, slice(0, 1)), part(batch, slice(1, 4)))
    assert split == pytest.approx(whole, rel=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * max(scale, 1.0), msg=name)
    undropped = gradients(decoder, dataclasses.replace(batch, slots=None))[0]
    other_windows = gradients(decoder, dataclasses.replace(batch, slots=(50, 51, 52, 53)))[0]
    assert len({whole, undropped, other_windows}) == 3
    assert decoder.eval()(batch)[0].item() == pytest.approx(undropped, rel=1e-6)  # evaluation never drops


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients_with_dropout(group: None, recompute: str) -> None:
    model = model_of("languini", dropout=0.2, attention_dropout=0.1)
    batch = batch_of(model, slots=(1, 2, 3, 4))
    (plain, _), (again, _) = built(model, dropout_seed=5), built(model, dropout_seed=5, recompute=recompute)
    expected_loss, expected = gradients(plain.train(), batch)
    loss, found = gradients(again.train(), batch)
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_positions_of_the_xglm_family() -> None:
    table = sinusoidal_positions(4, 6)
    assert table.shape == (4, 6)
    assert table[0, 0].item() == pytest.approx(math.sin(2.0)) and table[0, 3].item() == pytest.approx(math.cos(2.0))
    assert table[3, 2].item() == pytest.approx(math.sin(5.0 / 10000.0)) and table[3, 5].item() == pytest.approx(1.0)


def test_padding_and_axes() -> None:
    assert [padded_vocabulary(509, tp) for tp in (1, 2, 4)] == [509, 510, 512]
    assert padded_vocabulary(512, 4) == 512 and padded_vocabulary(3, 4) == 4
    assert shard_axis("decoder.layers.3.self_attention.linear_qkv.bias") == 0
    assert shard_axis("decoder.layers.3.mlp.linear_fc2.weight") == 1
    assert shard_axis("decoder.layers.3.mlp.linear_fc2.bias") is None
    assert shard_axis("embedding.position_embeddings.weight") is None
