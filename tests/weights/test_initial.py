"""Initial weights: any slice is a slice of the whole, and the whole has the family's statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from xlmega.models.config import model_config
from xlmega.weights import initial
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
ALL = slice(None)
XGLM = model_config(preset="xglm_tiny", vocab_size=509)
LANGUINI = model_config(
    preset="languini_tiny", num_layers=8, hidden_size=256, num_heads=4, ffn_hidden_size=1024, vocab_size=509
)
WORDS = "embedding.word_embeddings.weight"


def weights(model: object = XGLM, seed: int = 0) -> InitialWeights:
    return InitialWeights(model, seed, logical_shapes(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("block_elements", [initial._BLOCK_ELEMENTS, 1000, 1])
def test_slices_along_any_axis_are_slices_of_the_whole(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_BLOCK_ELEMENTS", block_elements)
    source = weights()
    whole = source.read_slice(WORDS, (ALL, ALL))
    assert whole.shape == (509, 256) and whole.dtype == torch.float32
    for rows in (slice(0, 255), slice(255, 509), slice(3, 4), slice(509, 509), slice(-5, None), slice(100, 9999)):
        for columns in (ALL, slice(0, 128), slice(128, 256), slice(7, 8)):
            assert torch.equal(source.read_slice(WORDS, (rows, columns)), whole[rows, columns])


def test_every_tensor_in_shares() -> None:
    source, shapes = weights(LANGUINI), logical_shapes(LANGUINI)
    for name in [one for one in shapes if ".layers." not in one or ".layers.7." in one]:
        shape = shapes[name]
        whole = source.read_slice(name, (ALL,) * len(shape))
        assert whole.shape == shape
        for axis, size in enumerate(shape):
            cuts = [size * k // 3 for k in range(4)]
            parts = [
                source.read_slice(name, tuple(slice(a, b) if axis == k else ALL for k in range(len(shape))))
                for a, b in itertools.pairwise(cuts)
            ]
            assert torch.equal(torch.cat(parts, axis), whole), name


def test_a_function_of_seed_and_name() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    first = weights().read_slice(name, (ALL, ALL))
    torch.manual_seed(9)
    assert torch.equal(weights().read_slice(name, (ALL, ALL)), first)
    assert not torch.equal(weights(seed=1).read_slice(name, (ALL, ALL)), first)
    assert not torch.equal(weights().read_slice(name.replace(".0.", ".1."), (ALL, ALL)), first)


def test_statistics() -> None:
    for name, shape in logical_shapes(XGLM).items():
        value = weights().read_slice(name, (ALL,) * len(shape))
        if len(shape) == 1:
            assert set(value.tolist()) == {1.0 if name.endswith("norm.weight") else 0.0}, name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.02), name
            assert abs(value.mean().item()) < 5 * 0.02 / math.sqrt(value.numel()), name
            rows = value.double() / value.double().norm(dim=1, keepdim=True)
            assert (rows[0] @ rows[1:].T).abs().max().item() < 0.5, name  # blocks do not repeat


def test_languini_divides_the_mlp_output_alone() -> None:
    source = weights(LANGUINI)
    for name, std in (
        ("mlp.linear_fc2.weight", 0.02 / math.sqrt(2 * 8)),
        ("mlp.linear_fc1.weight", 0.02),
        ("self_attention.linear_proj.weight", 0.02),
    ):
        assert source.read_slice(f"decoder.layers.5.{name}", (ALL, ALL)).std().item() == pytest.approx(std, rel=0.02)
    assert source.read_slice("embedding.position_embeddings.weight", (ALL, ALL)).std().item() == pytest.approx(
        0.02, rel=0.02
    )
    assert source.read_slice("output_layer.weight", (ALL, ALL)).std().item() == pytest.approx(0.02, rel=0.02)
