"""A document in a packed window gives what it gives in a window of its own, with every kind of position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import one_rank
import pytest
import torch

from xlmega.models import documents
from xlmega.models.config import model_config
from xlmega.models.decoder import MicroBatch

pytestmark = pytest.mark.torch
SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "vocab_size": 101, "init_std": 0.15}
MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {"preset": "xglm_tiny"},
    "learned": {"preset": "languini_tiny", "max_positions": 24},
    "rotary": {"preset": "neox_tiny"},
    "alibi": {"preset": "bloom_tiny"},
}
NUMBERS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0] * 12, [0] + [1] * 11])


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank.one_rank():
        yield


def test_spans_and_positions_by_eye() -> None:
    assert documents.spans(NUMBERS) == [
        [slice(0, 5), slice(5, 7), slice(7, 12)], [slice(0, 12)], [slice(0, 1), slice(1, 12)]
    ]  # fmt: skip
    assert documents.positions(NUMBERS).tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4], list(range(12)), [0, *range(11)]
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_packed_window_is_its_documents_one_by_one(name: str, recompute: str) -> None:
    decoder, _ = one_rank.built(model_config(**{**SIZES, **MODELS[name]}), recompute=recompute)
    decoder.train()
    packed = replace(one_rank.batch_of(decoder.model, windows=3, length=12), documents_BL=NUMBERS)
    alone = []
    for window, spans in enumerate(documents.spans(NUMBERS)):
        for span in spans:
            rows = slice(window, window + 1)
            parts = (packed.tokens_BL, packed.targets_BL, packed.weights_BL)
            alone.append(MicroBatch(*(part[rows, span] for part in parts)))
    loss, found = one_rank.gradients(decoder, packed)
    due_loss, due = one_rank.gradients(decoder, *alone)
    assert loss == pytest.approx(due_loss, rel=1e-6)
    for key, value in due.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-9, msg=key)
    seen, _ = one_rank.gradients(decoder, replace(packed, documents_BL=None))
    assert abs(seen - loss) > 1e-4, "the documents of a window see each other where none is told apart"
