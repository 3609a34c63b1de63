"""TF-IDF and SVD against scikit-learn's, the vector of a growing prefix, files, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import Normalizer

from xlmega.errors import DataError
from xlmega.experts.features import (
    FeatureSettings,
    TermCounts,
    TextFeatures,
    fit_features,
    load_features,
    prefix_vectors,
)
from xlmega.experts.segmentation import terms
from xlmega.text.corpus import read_corpus


def fitted(texts: list[str], **settings: object) -> tuple[TextFeatures, np.ndarray]:
    counts = TermCounts(FeatureSettings(**settings))  # type: ignore[arg-type]
    return fit_features(counts, [counts.count(text) for text in texts])


@pytest.fixture(scope="module")
def texts(made_corpus: Path) -> list[str]:
    return [document.text for document in read_corpus(made_corpus / "train")][:150]


def test_it_is_scikit_learns_pipeline(texts: list[str]) -> None:
    features, vectors = fitted(texts, num_components=12, stop_words=())
    theirs = TfidfVectorizer(analyzer=terms).fit(texts)
    assert features.vocabulary == sorted(theirs.vocabulary_)
    np.testing.assert_allclose(features.idf, theirs.idf_, rtol=1e-6)
    reduced = Normalizer().fit_transform(TruncatedSVD(12, random_state=0).fit_transform(theirs.transform(texts)))
    np.testing.assert_allclose(np.abs((vectors * reduced).sum(axis=1)), 1.0, atol=1e-3)
    np.testing.assert_array_equal(vectors, features.vectors(texts))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


def test_the_most_frequent_terms_are_kept() -> None:
    features, _ = fitted(["apple pear pear plum", "plum fig pear"], max_terms=3)
    assert features.vocabulary == ["apple", "pear", "plum"]  # apple and fig are equal: the first by name


def test_stop_words_and_numbers_are_left_out() -> None:
    features, _ = fitted(["the parser and 42 trees", "une arborescence 7"], stop_words=("all",))
    assert features.vocabulary == ["arborescence", "parser", "trees"]
    features, _ = fitted(["the parser and 42 trees", "une arborescence 7"], stop_words=("en",))
    assert features.vocabulary == ["arborescence", "parser", "trees", "une"]
    features, _ = fitted(["the parser and 42 trees"], stop_words=())
    assert "#NUMBER" in features.vocabulary and "the" in features.vocabulary


def test_a_prefix_is_embedded_as_it_grows(texts: list[str]) -> None:
    features, _ = fitted(texts, num_components=8)
    for text in [*texts[:5], "", "nothing known: zzzz qqqq"]:
        pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
        found = prefix_vectors(features, pieces)
        assert found.shape == (len(pieces), 8)
        for number, vector in enumerate(found, start=1):
            np.testing.assert_allclose(vector, features.vectors(["".join(pieces[:number])])[0], atol=2e-5)
    assert not features.vectors([""]).any() and not prefix_vectors(features, ["", ""]).any()


def test_saved_and_loaded_without_pickle(texts: list[str], tmp_path: Path) -> None:
    features, _ = fitted(texts, num_components=8)
    features.save(tmp_path)
    again = load_features(tmp_path)
    np.testing.assert_array_equal(again.vectors(texts[:9]), features.vectors(texts[:9]))
    data = (tmp_path / "features.npz").read_bytes()
    (tmp_path / "features.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="is damaged"):
        load_features(tmp_path)


def test_the_same_texts_give_the_same_numbers(texts: list[str]) -> None:
    one, other = (fitted(texts, num_components=8)[0] for _ in range(2))
    np.testing.assert_array_equal(one.components, other.components)
    assert one.vocabulary == other.vocabulary


def test_documents_without_terms_are_refused() -> None:
    with pytest.raises(DataError, match="hold no term to cluster by"):
        fitted(["the and", "a"])
    features, vectors = fitted(["parser", "the"])  # one term: one component
    assert vectors.tolist() == [[1.0], [0.0]] and features.dimension == 1
