"""One process's Backpack against the plain reference, and the published sizes. Layouts are compared in training/."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backpack_reference import reference_parts, reference_senses
from one_rank import batch_of, built, gradients, one_rank, part

from xlmega.errors import ConfigError, LayoutError
from xlmega.models.config import ModelConfig, check_layout, model_config
from xlmega.parallel.layout import Layout
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import shards_of

pytestmark = pytest.mark.torch

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "vocab_size": 101, "init_std": 0.15}
VARIANTS = ("original", "nano")


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The groups of one rank, for the length of this module."""
    with one_rank():
        yield


def model_of(variant: str, **changes: Any) -> ModelConfig:
    preset = {"original": "backpack_micro_4", "nano": "nano_backpack_mini_4"}[variant]
    return model_config(preset=preset, **{**SIZES, **changes})


@pytest.mark.parametrize("length", [1, 17, 70])  # a position alone, less than one block of keys, not a whole number
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_reference(group: None, variant: str, length: int) -> None:
    model = model_of(variant)
    decoder, tensors = built(model)
    batch = batch_of(model, 3, length)
    found: list[torch.Tensor] = []
    decoder.senses.register_forward_hook(lambda module, inputs, mixed_LBD: found.append(mixed_LBD))
    parts = reference_parts(model, tensors, batch.tokens_BL)
    nll_BL = F.cross_entropy(parts.logits.transpose(1, 2), batch.targets_BL, reduction="none")
    for training in (True, False):
        loss, found_BL = decoder.train(training)(batch)
        logits = found.pop().transpose(0, 1) @ tensors["embedding.word_embeddings.weight"].T
        torch.testing.assert_close(logits, parts.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_BL, nll_BL, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, (nll_BL * batch.weights_BL).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_the_reference(group: None, variant: str, recompute: str) -> None:
    model = model_of(variant)
    decoder, tensors = built(model, recompute=recompute)
    batch = batch_of(model, 4, 40)
    assert batch.tokens_BL.unique().numel() < batch.tokens_BL.numel()  # tokens come more than once
    _, found = gradients(decoder.train(), part(batch, slice(0, 1)), part(batch, slice(1, 4)))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    parts = reference_parts(model, leaves, batch.tokens_BL)
    nll_BL = F.cross_entropy(parts.logits.transpose(1, 2), batch.targets_BL, reduction="none")
    (nll_BL * batch.weights_BL).sum().backward()
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        scale = max(leaf.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(found[name], leaf.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_the_senses_and_log_odds(group: None, variant: str) -> None:
    """Alpha's rows sum to one and see no future; logits, so log-odds, are the sum of what each sense adds."""
    model = model_of(variant)
    decoder, tensors = built(model)
    batch = batch_of(model, 2, 24)
    parts = reference_parts(model, tensors, batch.tokens_BL)
    torch.testing.assert_close(parts.alpha.sum(-1), torch.ones(2, 4, 24))
    assert not parts.alpha.triu(1).any() and (parts.alpha >= 0).all()
    words = tensors["embedding.word_embeddings.weight"]
    added = torch.einsum("bkij,bkjd,vd->bikjv", parts.alpha, parts.senses, words)  # by each sense of each position
    nll_BL = decoder.eval()(batch)[1]
    log_probability = torch.log_softmax(added.sum((2, 3)), -1).gather(2, batch.targets_BL[..., None])[..., 0]
    torch.testing.assert_close(-nll_BL, log_probability, rtol=1e-5, atol=1e-5)
    # Without sense 2 of the first token the log-odds of any two words change by what that sense added to them.
    without = added.clone()
    without[:, :, 2, 0] = 0
    odds, less = (x.sum((2, 3))[..., 5] - x.sum((2, 3))[..., 7] for x in (added, without))
    torch.testing.assert_close(odds - less, added[:, :, 2, 0, 5] - added[:, :, 2, 0, 7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_senses_know_no_place(group: None, variant: str) -> None:
    model = model_of(variant)
    decoder, tensors = built(model)
    ids = torch.tensor([7, 3, 55])
    senses_UKD = decoder.senses.senses(ids, tensors["embedding.word_embeddings.weight"])
    there = reference_senses(model, tensors, torch.tensor([[1, 3, 7], [55, 7, 7]]))
    torch.testing.assert_close(senses_UKD[0], there[1, :, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(senses_UKD[1], there[0, :, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_logical_ones(group: None, variant: str) -> None:
    model = model_of(variant)
    decoder, _ = built(model)
    shards = [shard for shard, _ in shards_of([decoder], model, 0, 1)]
    assert {shard.name: shard.shape for shard in shards} == logical_shapes(model)
    assert sum(math.prod(shard.shape) for shard in shards) == model.num_parameters()


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("nano_gpt_mini", 14.46),
        ("nano_gpt_small", 92.6),
        ("nano_backpack_mini_16", 24.2),
        ("nano_backpack_mini_8", 19.5),
        ("nano_backpack_small_16", 131.6),
        ("nano_backpack_small_8", 112.7),
    ],
)
def test_published_sizes(preset: str, millions: float) -> None:
    """METHODS §4.4, with 10,001 ids and without positions."""
    model = model_config(preset=preset, vocab_size=10_001)
    count = model.num_parameters() - model.max_positions * model.hidden_size
    assert round(count / 1e6, len(str(millions).split(".")[1])) == millions


@pytest.mark.parametrize(("preset", "millions"), [("backpack_micro_16", 40), ("backpack_mini_16", 100)])
def test_published_sizes_of_the_original(preset: str, millions: float) -> None:
    """Totals of METHODS §4.2, which gives them as round figures."""
    model = model_config(preset=preset, vocab_size=50_264)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.06)
    assert model_config(preset="backpack_small_16", vocab_size=50_264).num_parameters() / 1e6 == pytest.approx(
        170, 0.01
    )


def test_the_vocabulary_is_never_overwritten() -> None:
    for kind in ("backpack_micro", "backpack_mini", "backpack_small", "nano_backpack_mini", "nano_backpack_small"):
        for senses in (4, 8, 16, 64):
            model = model_config(preset=f"{kind}_{senses}")
            assert (model.vocab_size, model.num_senses) == (0, senses)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_senses": 5}, "num_senses=5 must divide hidden_size=32"),
        ({"num_senses": 0}, "num_senses=0 must divide"),
        ({"num_senses": -4}, "num_senses=-4 must divide"),
        ({"dropout": 0.1}, "knows no dropout"),
        ({"tied": False}, "tied must be true"),
        ({"embedding_scale": 2.0}, "embedding_scale 1"),
        ({"sense_intermediate_scale": 0}, "sense_intermediate_scale must be at least 1"),
        ({"family": "gpt"}, "backpack_variant must be"),
        ({"backpack_variant": ""}, "backpack_variant must be"),
    ],
)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model_of("original", **changes)


def test_layouts_that_cannot_cut_it() -> None:
    small = model_config(preset="backpack_small_16", vocab_size=100)
    with pytest.raises(LayoutError, match=r"tp=3 must divide num_senses=16.*tp may be 1, 2, 4"):
        check_layout(Layout(tp=3), small, 512)
    nano = model_config(preset="nano_backpack_small_16", vocab_size=100)
    check_layout(Layout(tp=4, pp=3), nano, 256)  # 4 + 4 + 3 layers and the senses
    assert [nano.layers_of_stage(stage, 3) for stage in range(3)] == [range(4), range(4, 8), range(8, 11)]
    with pytest.raises(LayoutError, match=r"must divide num_layers=11 \+ 1 \(the senses\)"):
        check_layout(Layout(pp=5), nano, 256)
