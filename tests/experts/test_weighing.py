"""Weights by hand, their sums, prefixes, ratios, and rules that listen to the experts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError
from xlmega.experts.clusterer import TextClusterer, train_clusterer
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.features import FeatureSettings
from xlmega.experts.weighing import Weighing, WeighingSettings, cluster_weights, kept, texts_of
from xlmega.text.corpus import read_corpus
from xlmega.text.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture(scope="module")
def clusterer(made_corpus: Path) -> TextClusterer:
    return train_clusterer(made_corpus / "train", KMeansSettings(3), FeatureSettings(num_components=8))


@pytest.fixture(scope="module")
def vocabulary(made_vocabulary: Path) -> Vocabulary:
    return load_vocabulary(made_vocabulary)


def test_cluster_weights_by_hand() -> None:
    """Squared distances 1 and 2 at T = 1: exp(-1) : exp(-2), and with the extra square exp(-1) : exp(-4)."""
    one = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(cluster_weights(np.array([1.0, 2.0]), 1.0), [one, 1 - one])
    other = 1 / (1 + math.exp(-3))
    np.testing.assert_allclose(cluster_weights(np.array([1.0, 2.0]), 1.0, published_square=True), [other, 1 - other])
    np.testing.assert_allclose(cluster_weights(np.array([0.5, 0.5, 0.5]), 0.1), [1 / 3] * 3)
    assert cluster_weights(np.array([0.0, 1e6]), 0.1).tolist() == [1.0, 0.0]


def test_top_k_keeps_the_largest_and_the_first_of_equals() -> None:
    np.testing.assert_allclose(kept(np.array([0.5, 0.3, 0.2]), 2), [0.625, 0.375, 0.0])
    assert kept(np.array([[0.25] * 4]), 1).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert kept(np.array([0.5, 0.5]), 0).tolist() == kept(np.array([0.5, 0.5]), 2).tolist() == [0.5, 0.5]


def test_each_position_is_weighed_by_its_own_prefix(
    clusterer: TextClusterer, vocabulary: Vocabulary, made_corpus: Path
) -> None:
    weighing = Weighing(WeighingSettings(), 3, clusterer, vocabulary)
    text = next(iter(read_corpus(made_corpus / "valid"))).text + " 世é"
    ids = [vocabulary.eod_id, *vocabulary.encode(text)]
    found = weighing.before_experts([ids], len(ids))[0]
    assert found.shape == (len(ids), 3)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    for place in [0, 1, 2, 7, len(ids) // 2, len(ids) - 1]:
        vector = clusterer.features.vectors([vocabulary.decode(ids[: place + 1])])
        expected = cluster_weights(clusterer.distances(vector)[0], 0.1)
        np.testing.assert_allclose(found[place], expected, atol=1e-4)
    half = Weighing(WeighingSettings(cluster_ratio=0.5), 3, clusterer, vocabulary).before_experts([ids], len(ids))[0]
    number = math.ceil(len(ids) / 2)
    np.testing.assert_array_equal(half[:number], found[:number])
    assert (half[number:] == found[number - 1]).all()
    assert "".join(texts_of(ids, vocabulary)) == text


def test_rules_that_listen_to_the_experts(clusterer: TextClusterer, vocabulary: Vocabulary) -> None:
    p = np.array([[[0.5, 0.1], [0.2, 0.4], [0.3, 0.3]]])  # [1, 3 targets, 2 experts]
    bayes = Weighing(WeighingSettings("bayes", prior=(3.0, 1.0)), 2)
    found = bayes.with_experts(bayes.before_experts([[2, 5, 6]], 3), np.log(p))[0]
    np.testing.assert_allclose(found, [[0.75, 0.25], [15 / 16, 1 / 16], [0.6, 0.4]])
    posterior = Weighing(WeighingSettings("posterior"), 2)
    found = posterior.with_experts(posterior.before_experts([[2, 5, 6]], 3), np.log(p))[0]
    np.testing.assert_allclose(found, [[0.5, 0.5], [5 / 6, 1 / 6], [10 / 14, 4 / 14]])
    product = Weighing(WeighingSettings("product"), 3, clusterer, vocabulary)
    ids = [2, *vocabulary.encode("guyo")][:3]
    cluster = Weighing(WeighingSettings(), 3, clusterer, vocabulary).before_experts([ids], 3)[0]
    p = np.array([[[0.5, 0.1, 0.1], [0.2, 0.4, 0.1], [0.3, 0.3, 0.1]]])
    found = product.with_experts(product.before_experts([ids], 3), np.log(p))[0]
    np.testing.assert_allclose(found[0], [1 / 3] * 3)
    np.testing.assert_allclose(found[1], cluster[1] * p[0, 0] / (cluster[1] * p[0, 0]).sum())
    top = Weighing(WeighingSettings("bayes", prior=(3.0, 1.0), top_k=1), 2)
    assert top.with_experts(top.before_experts([[2, 5]], 2), np.log(p[:, :2, :2]))[0].tolist() == [[1, 0], [1, 0]]


def test_refusals(clusterer: TextClusterer, vocabulary: Vocabulary) -> None:
    for settings, match in (
        (WeighingSettings(temperature=0.0), "temperature must be positive"),
        (WeighingSettings(temperature=float("nan")), "temperature must be positive"),
        (WeighingSettings(top_k=5), "top_k=5, but there are 3"),
        (WeighingSettings(top_k=-1), "must not be negative"),
        (WeighingSettings(cluster_ratio=0.0), "cluster_ratio must be above 0"),
        (WeighingSettings("bayes", prior=(1.0,)), "prior has 1 numbers"),
        (WeighingSettings("fixed"), "it is empty"),
        (WeighingSettings("fixed", prior=(0.0, 0.0, 0.0)), "not all 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            Weighing(settings, 3, clusterer, vocabulary)
    with pytest.raises(ConfigError, match="need the clusterer"):
        Weighing(WeighingSettings(), 3)
    with pytest.raises(ConfigError, match="3 clusters for 2 experts"):
        Weighing(WeighingSettings(), 2, clusterer, vocabulary)
