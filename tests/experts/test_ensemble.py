"""Ensembles against their experts: identical ones, routing, mixtures, what is asked of whom, memory, generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import Drawn

from xlmega.errors import ConfigError, DataError
from xlmega.evaluation.scoring import LogicalScorer, Scorer
from xlmega.experts.clusterer import save_clusterer, train_clusterer
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.collection import Ensemble
from xlmega.experts.ensemble import EnsembleScorer, ExpertPool, generate
from xlmega.experts.features import FeatureSettings
from xlmega.experts.weighing import Weighing, WeighingSettings
from xlmega.models.config import ModelConfig, model_config
from xlmega.text.vocabulary import load_vocabulary
from xlmega.weights.directory import write_logical

pytestmark = pytest.mark.torch
IDS = torch.randint(3, 800, (3, 12), generator=torch.Generator().manual_seed(0))


def config_of(vocab_size: int = 800) -> ModelConfig:
    small = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 2, "max_positions": 64}
    return model_config(preset="xglm_tiny", vocab_size=vocab_size, **small)


class Counted:
    """A scorer that notes what it was asked."""

    def __init__(self, seed: int) -> None:
        config = config_of()
        self._inner = LogicalScorer(Drawn(config, seed, 0.3))
        self.vocab_size, self.max_positions = self._inner.vocab_size, self._inner.max_positions
        self.asked: list[tuple[int, ...]] = []

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        self.asked.append(tuple(inputs_BL.shape))
        return self._inner.log_probabilities(inputs_BL, targets_BL)

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        return self._inner.next_distribution(inputs_BL, lengths_B)


def pool_of(scorers: list[Counted], resident: int = 0) -> ExpertPool:
    def maker(scorer: Counted) -> Callable[[], Scorer]:
        return lambda: scorer

    return ExpertPool([maker(scorer) for scorer in scorers], resident)


def fixed(*prior: float, **more: object) -> Weighing:
    return Weighing(WeighingSettings("fixed", prior=prior, **more), len(prior))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uniform", "bayes", "posterior", "fixed"])
def test_identical_experts_are_the_expert(kind: str) -> None:
    one = Counted(1)
    weighing = Weighing(WeighingSettings(kind, prior=(0.7, 0.1, 0.2)), 3)  # type: ignore[arg-type]
    ensemble = EnsembleScorer(pool_of([one, one, one]), weighing)
    torch.testing.assert_close(
        ensemble.log_probabilities(IDS[:, :-1], IDS[:, 1:]), one.log_probabilities(IDS[:, :-1], IDS[:, 1:])
    )
    lengths = torch.tensor([11, 4, 7])
    torch.testing.assert_close(ensemble.next_distribution(IDS, lengths), one.next_distribution(IDS, lengths))


def test_probabilities_are_mixed_and_sum_to_one() -> None:
    experts = [Counted(1), Counted(2)]
    ensemble = EnsembleScorer(pool_of(experts), fixed(0.25, 0.75))
    p, q = (one.log_probabilities(IDS[:, :-1], IDS[:, 1:]).exp() for one in experts)
    torch.testing.assert_close(ensemble.log_probabilities(IDS[:, :-1], IDS[:, 1:]).exp(), 0.25 * p + 0.75 * q)
    for kind in ("fixed", "bayes", "posterior"):
        weighing = Weighing(WeighingSettings(kind, prior=(0.25, 0.75)), 2)  # type: ignore[arg-type]
        found = EnsembleScorer(pool_of(experts), weighing).next_distribution(IDS, torch.tensor([12, 5, 1]))
        torch.testing.assert_close(found.exp().sum(1), torch.ones(3))
    # What the next distribution gives an id is what scoring the id gives.
    bayes = EnsembleScorer(pool_of(experts), Weighing(WeighingSettings("bayes", prior=(0.25, 0.75)), 2))
    scored = bayes.log_probabilities(IDS[:, :-1], IDS[:, 1:])
    row = bayes.next_distribution(IDS, torch.tensor([5, 5, 5]))
    torch.testing.assert_close(row[torch.arange(3), IDS[:, 5]], scored[:, 4])


@pytest.mark.parametrize("kind", ["clustering", "product"])
def test_identical_experts_are_the_expert_whatever_the_clusters_say(models: Path, kind: str) -> None:
    ensemble = Ensemble.of([models / "m0"] * 2, clusterer=models / "text2")
    scorer = ensemble.scorer(settings=WeighingSettings(kind))  # type: ignore[arg-type]
    one = scorer.pool.expert(0)
    torch.testing.assert_close(
        scorer.log_probabilities(IDS[:, :-1], IDS[:, 1:]), one.log_probabilities(IDS[:, :-1], IDS[:, 1:])
    )
    mixed = Ensemble.of([models / "m0", models / "m1"], clusterer=models / "text2")
    found = mixed.scorer(settings=WeighingSettings(kind)).next_distribution(IDS, torch.tensor([11, 4, 1]))  # type: ignore[arg-type]
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))


def test_only_experts_with_weight_are_asked_and_only_as_far() -> None:
    experts = [Counted(k) for k in range(4)]
    ensemble = EnsembleScorer(pool_of(experts), fixed(0.4, 0.0, 0.3, 0.3, top_k=2))
    ensemble.log_probabilities(IDS[:, :-1], IDS[:, 1:])
    assert [len(one.asked) for one in experts] == [1, 0, 1, 0]
    routed = ensemble.routed(3)
    torch.testing.assert_close(
        routed.log_probabilities(IDS[:, :-1], IDS[:, 1:]), experts[3].log_probabilities(IDS[:, :-1], IDS[:, 1:])
    )

    class Early(Weighing):
        def before_experts(self, inputs, targets):  # type: ignore[no-untyped-def]
            weights = np.zeros((len(inputs), targets, 2))
            weights[..., 0] = 1.0
            weights[1, :4] = [0.5, 0.5]
            return weights

    early = EnsembleScorer(pool_of(experts[:2]), Early(WeighingSettings("uniform"), 2))
    experts[1].asked.clear()
    early.log_probabilities(IDS[:, :-1], IDS[:, 1:])
    assert experts[1].asked == [(1, 4)]


def test_memory_holds_so_many_experts_and_loads_few() -> None:
    experts = [Counted(k) for k in range(4)]
    small = EnsembleScorer(pool_of(experts, resident=2), Weighing(WeighingSettings("uniform"), 4))
    large = EnsembleScorer(pool_of(experts), Weighing(WeighingSettings("uniform"), 4))
    for _ in range(3):
        torch.testing.assert_close(
            small.log_probabilities(IDS[:, :-1], IDS[:, 1:]), large.log_probabilities(IDS[:, :-1], IDS[:, 1:])
        )
        assert len(small.pool._loaded) == 2
    assert large.pool.loads == 4
    assert small.pool.loads <= 4 + 2 * 2 + 1  # the two used last are used first


def test_two_devices_work_at_once() -> None:
    experts = [Counted(k) for k in range(3)]
    together = ExpertPool([lambda one=one: one for one in experts], num_devices=2)  # type: ignore[misc]
    weighing = Weighing(WeighingSettings("uniform"), 3)
    torch.testing.assert_close(
        EnsembleScorer(together, weighing).log_probabilities(IDS[:, :-1], IDS[:, 1:]),
        EnsembleScorer(pool_of(experts), weighing).log_probabilities(IDS[:, :-1], IDS[:, 1:]),
    )


def test_generation() -> None:
    ensemble = EnsembleScorer(pool_of([Counted(1), Counted(2)]), fixed(0.5, 0.5))
    greedy = generate(ensemble, [2, 5], 6, eod_id=2, temperature=0.0)
    assert greedy == generate(ensemble, [2, 5], 6, eod_id=2, temperature=0.0, seed=9) and len(greedy) <= 6
    assert greedy[0] == int(ensemble.next_distribution(torch.tensor([[2, 5]]), torch.tensor([2])).argmax())
    drawn = generate(ensemble, [2, 5], 6, eod_id=2, seed=1)
    assert drawn == generate(ensemble, [2, 5], 6, eod_id=2, seed=1)
    assert generate(ensemble, [2, 5], 6, eod_id=2, top_p=1e-9, seed=3) == greedy
    assert generate(ensemble, [2, 5], 6, eod_id=greedy[0], temperature=0.0) == []
    with pytest.raises(ConfigError, match="temperature=-1"):
        generate(ensemble, [2], 1, eod_id=2, temperature=-1.0)


def test_an_ensemble_is_exported_and_loaded_by_one_class(
    made_corpus: Path, made_vocabulary: Path, tmp_path: Path
) -> None:
    vocabulary = load_vocabulary(made_vocabulary)
    config = config_of(vocabulary.size)
    folders = []
    for seed in range(3):
        folders.append(tmp_path / f"model{seed}")
        write_logical(Drawn(config, seed, 0.3), folders[-1], vocabulary_folder=made_vocabulary)
    save_clusterer(
        train_clusterer(made_corpus / "train", KMeansSettings(3), FeatureSettings(num_components=8)),
        tmp_path / "clusterer",
    )
    ensemble = Ensemble.of(folders, clusterer=tmp_path / "clusterer")
    settings = WeighingSettings(temperature=0.2, top_k=2)
    expected = ensemble.scorer(settings=settings).log_probabilities(IDS[:, :-1], IDS[:, 1:])
    ensemble.export(tmp_path / "hf", settings=settings)
    again = Ensemble.open(tmp_path / "hf")
    assert again.weighing == settings and again.vocabulary.hash == vocabulary.hash
    torch.testing.assert_close(again.scorer().log_probabilities(IDS[:, :-1], IDS[:, 1:]), expected)
    streamed = again.scorer(again.pool(resident=1))
    torch.testing.assert_close(streamed.log_probabilities(IDS[:, :-1], IDS[:, 1:]), expected)
    top = ensemble.scorer(settings=WeighingSettings(top_k=1))
    weights, mixed = top.scored(IDS[:, :-1], IDS[:, 1:])
    chosen = weights.argmax(axis=2)
    for row, place in np.ndindex(*chosen.shape):  # top-1 is routing, position by position
        alone = top.pool.expert(int(chosen[row, place])).log_probabilities(
            IDS[row : row + 1, :-1], IDS[row : row + 1, 1:]
        )
        assert abs(float(alone[0, place] - mixed[row, place])) < 1e-5
    with pytest.raises(ConfigError, match="no expert was trained on 'xx'"):
        again.route("xx")
    trained = dataclasses.replace(again, documents=({"xx": 3}, {"xx": 5}, {"yy": 1}))
    assert trained.route("xx") == 1 and trained.route("yy") == 2
    with pytest.raises(DataError, match="no vocabulary beside its weights"):
        write_logical(Drawn(config, 0), tmp_path / "bare")
        Ensemble.of([tmp_path / "bare"])
