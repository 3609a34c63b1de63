"""The plain forward pass computes what the reference says, for every kind of layer that a config can name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import Drawn
from reference import reference_logits

from xlmega.models.config import model_config
from xlmega.weights.forward import PlainDecoder, plain_model

pytestmark = pytest.mark.torch
BASE: dict[str, Any] = {
    "family": "gpt",
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 56,
    "num_heads": 4,
    "head_dim": 12,
    "max_positions": 24,
    "positions": "learned",
    "tied": True,
    "embedding_scale": 1.0,
    "activation": "gelu_tanh",
    "vocab_size": 61,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "layer scaled": {"layer_scaled_attention": True},
    "languini": {"tied": False, "embedding_scale": 48**0.5, "head_dim": 8, "num_heads": 3},
    "xglm": {"family": "xglm", "positions": "sinusoidal", "embedding_scale": 48**0.5, "activation": "gelu"},
    "neox": {
        "family": "neox",
        "positions": "rotary",
        "rotary_fraction": 0.5,
        "parallel_residual": True,
        "tied": False,
        "activation": "gelu",
    },
    "bloom": {"family": "bloom", "positions": "alibi", "embedding_norm": True, "num_heads": 6, "head_dim": 8},
    "llama": {
        "family": "llama",
        "positions": "rotary",
        "norm": "rmsnorm",
        "norm_bias": False,
        "linear_bias": False,
        "gated_mlp": True,
        "activation": "silu",
        "num_kv_heads": 2,
        "tied": False,
        "layernorm_epsilon": 1e-6,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_forward_pass_is_the_references(kind: str) -> None:
    source = Drawn(model_config(**{**BASE, **KINDS[kind]}))
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(3))
    wanted = reference_logits(source.config, source.tensors, ids)
    assert wanted.std() > 0.3
    torch.testing.assert_close(PlainDecoder(source).logits(ids), wanted, rtol=1e-5, atol=1e-5)
    model = plain_model(source)
    torch.testing.assert_close(model.hidden(ids) @ model.head().T, wanted, rtol=1e-5, atol=1e-5)


def test_weights_are_kept_or_read_again() -> None:
    ids = torch.arange(12)[None]
    kept, passing = (Drawn(model_config(**BASE)) for _ in range(2))
    one, two = PlainDecoder(kept), PlainDecoder(passing, resident=False)
    for _ in range(3):
        assert torch.equal(one.logits(ids), two.logits(ids))
    assert kept.num_read == len(kept.tensors) and passing.num_read == 3 * (len(kept.tensors) + 1)  # tied: also the head
    low = PlainDecoder(kept, dtype=torch.bfloat16).logits(ids)
    assert low.dtype == torch.bfloat16 and (low.float() - one.logits(ids)).abs().max() < 0.5
