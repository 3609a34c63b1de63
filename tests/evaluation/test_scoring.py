"""A logical model scores ids as its logits say, whatever they are batched with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import Drawn
from reference import reference_logits

from xlmega.errors import ConfigError, DataError
from xlmega.evaluation import scoring
from xlmega.evaluation.scoring import LogicalScorer, token_scores
from xlmega.models.config import model_config

pytestmark = pytest.mark.torch
CONFIG = model_config(
    preset="xglm_tiny", num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48, vocab_size=53, max_positions=20
)


MODEL = Drawn(CONFIG, std=0.3)


def wanted(ids: np.ndarray) -> torch.Tensor:
    """[L, V]: log-probabilities of what follows each of ids[:-1]."""
    return reference_logits(CONFIG, MODEL.tensors, torch.from_numpy(ids[None, :-1])).log_softmax(-1)[0]


def test_scores_are_the_models_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    sequences = [draw.integers(0, 53, draw.integers(2, 22)) for _ in range(14)]
    due = [wanted(ids).gather(1, torch.from_numpy(ids[1:, None]))[:, 0].numpy() for ids in sequences]
    for batch_tokens, read_ahead, elements in ((1, 512, 1), (100, 7, 53 * 5), (100_000, 512, 1 << 25)):
        monkeypatch.setattr(scoring, "READ_AHEAD", read_ahead)
        monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", elements)
        found = list(token_scores(LogicalScorer(MODEL), iter(sequences), batch_tokens))
        assert [len(one) for one in found] == [len(ids) - 1 for ids in sequences]
        for one, two in zip(found, due):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


def test_the_next_distribution_is_after_the_last_id() -> None:
    ids = np.random.default_rng(1).integers(0, 53, (3, 12))
    lengths = torch.tensor([12, 5, 1])
    found = LogicalScorer(MODEL).next_distribution(torch.from_numpy(ids), lengths)
    assert found.shape == (3, 53) and torch.allclose(found.exp().sum(1), torch.ones(3), atol=1e-5)
    for row, length in enumerate(lengths.tolist()):
        due = wanted(np.append(ids[row, :length], 0))[-1]
        torch.testing.assert_close(found[row], due, rtol=0, atol=1e-5)


def test_ids_that_the_model_does_not_have_are_refused() -> None:
    scorer = LogicalScorer(MODEL)
    with pytest.raises(ConfigError, match="21 inputs is beyond the model's 20 positions"):
        list(token_scores(scorer, [np.zeros(22, dtype=np.int64)]))
    with pytest.raises(DataError, match="ids from 0 to 53 are not all below the model's 53"):
        list(token_scores(scorer, [np.array([0, 53])]))
    assert list(token_scores(scorer, [])) == []
