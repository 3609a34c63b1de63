"""The published clusters from lang2vec, trees of other shapes, donors, pictures, refusals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError
from xlmega.experts import typology
from xlmega.experts.pictures import draw_matrix, draw_tree
from xlmega.experts.typology import language_tree, nearest_language, parent, tree_of

XELM = ["en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "zh", "hi", "sw", "ur", "ja", "ko"]


def test_the_published_clusters() -> None:
    """METHODS §2.5, and their numbering."""
    tree = language_tree(XELM)
    assert tree.clusters(4) == (
        ("en", "es", "bg", "ru"), ("ja", "ko", "tr", "zh"), ("de", "el", "fr", "ar"), ("hi", "ur", "vi", "sw"),
    )  # fmt: skip
    assert tree.clusters(8) == tuple(
        tuple(pair.split()) for pair in ("en es", "de el", "ja ko", "hi ur", "bg ru", "fr ar", "tr zh", "vi sw")
    )
    assert tree.clusters(16) == tuple((code,) for code in XELM)
    assert [len(level) for level in tree.levels] == [16, 8, 4, 2, 1]
    assert parent(("fr", "ar"), tree.clusters(4)) == 2
    with pytest.raises(ConfigError, match="no level of 3 clusters in this tree; it has 16, 8, 4, 2, 1"):
        tree.clusters(3)


def test_halves_serve_numbers_that_do_not_halve() -> None:
    codes = ["en", "es", "fr", "id", "it", "ja", "ko", "pl", "pt", "tr", "uk", "zh"]
    tree = language_tree(codes, method="halves")
    assert [len(level) for level in tree.levels] == [12, 8, 4, 2, 1]
    for level in tree.levels:
        sizes = [len(cluster) for cluster in level]
        assert max(sizes) - min(sizes) <= 1 and sorted(code for c in level for code in c) == codes
    for below, above in zip(tree.levels, tree.levels[1:]):
        assert all(set(cluster) <= set(above[parent(cluster, above)]) for cluster in below)


@pytest.mark.parametrize("linkage", ["single", "complete", "average"])
def test_linkages_on_a_line(linkage: str) -> None:
    place = np.array([0.0, 1.0, 3.0, 7.0])
    table = np.abs(place[:, None] - place)
    tree = tree_of(["a", "b", "c", "d"], table, linkage=linkage)
    assert tree.levels[1] == (("a", "b"), ("c", "d"))
    assert tree.distances[1] == (1.0, 4.0)
    assert tree.distances[2] == ({"single": 4.0, "complete": 7.0, "average": 23 / 6}[linkage],)
    assert tree_of(["a", "b", "c"], table[:3, :3]).levels[1] == (("a", "b"), ("c",))


def test_large_halves_are_found_by_exchanges() -> None:
    generator = np.random.default_rng(0)
    side = np.array([0, 1] * 10)
    points = np.stack([side * 9.0, generator.random(20)], axis=1)
    table = np.linalg.norm(points[:, None] - points, axis=2)
    tree = tree_of([f"l{k}" for k in range(20)], table, method="halves")
    assert {frozenset(cluster) for cluster in tree.clusters(2)} == {
        frozenset(f"l{k}" for k in range(20) if side[k] == s) for s in (0, 1)
    }


def test_donors_and_other_feature_sets() -> None:
    assert nearest_language("pl", ["en", "uk", "ja"]) == "uk"
    assert len(language_tree(XELM, feature_set="phonology_knn").clusters(4)) == 4


def test_pictures(tmp_path: Path) -> None:
    draw_tree(language_tree(XELM), tmp_path / "tree.png")
    draw_tree(language_tree(["en", "fr", "de"]), tmp_path / "tree.svg")
    values = np.array([[10.0, 20.0], [12.0, np.nan]])
    draw_matrix(values, ["e0", "e1"], ["en", "fr"], tmp_path / "matrix.png", label="perplexity")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("tree.png", "tree.svg", "matrix.png"))
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_tree(language_tree(["en", "fr"]), tmp_path / "tree.nosuch")


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no language 'xx'"):
        language_tree(["en", "xx"])
    with pytest.raises(ConfigError, match="no feature set 'syntax_avrage'. Did you mean 'syntax_average'"):
        language_tree(["en", "fr"], feature_set="syntax_avrage")
    with pytest.raises(ConfigError, match="different languages"):
        language_tree(["en", "en"])
    monkeypatch.setitem(sys.modules, "lang2vec.lang2vec", None)
    with pytest.raises(ConfigError, match=r"pip install 'xlmega\[typology\]'"):
        typology.features(["en"])
