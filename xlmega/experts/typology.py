"""Languages in, a tree of languages out, and clusters of equal numbers of languages at any level of it.

Distances are cosine distances between typological features of lang2vec, over the features that both languages have,
each norm over those that its language has. `pairs` builds the tree from below (METHODS §2.5): each round lists all
pairs of clusters by distance and takes the closest pair whose two are both free, then the next, until all are taken;
the number of clusters halves, and all have equally many languages where that number was even. `halves` builds it from
above for numbers that do not halve: each cluster falls into two of equal size (one more where it is odd) with the least
sum of distances inside them, so 12 languages give 2, 4 and 8 clusters.

lang2vec (extra `typology`) is imported here only. Codes are the data's; two-letter ones stand for the macro-languages
that lang2vec gives them (ar: ara, zh: zho, sw: swa), whose features gave the published clusters.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError, nearest

LINKAGES = ("single", "complete", "average")
Clusters = tuple[tuple[str, ...], ...]
_EXACT_HALVES = 14
"""Up to this many languages every way to halve them is tried; beyond, exchanges improve one way until none does."""


@dataclass(frozen=True)
class LanguageTree:
    """Clusters at every level, from the most to the fewest."""

    levels: tuple[Clusters, ...]
    distances: tuple[tuple[float, ...], ...]
    """For each level the distance at which each of its clusters was joined (0 for a language alone)."""

    def clusters(self, num_clusters: int) -> Clusters:
        """The level with that many clusters; a ConfigError that names the levels there are."""
        for level in self.levels:
            if len(level) == num_clusters:
                return level
        known = ", ".join(str(len(level)) for level in self.levels)
        raise ConfigError(
            f"{len(self.levels[0])} languages have no level of {num_clusters} clusters in this tree; it has {known}. "
            "Take one of these, another tree (pairs or halves), or give the clusters by hand."
        )


def parent(cluster: Sequence[str], above: Clusters) -> int:
    """The cluster of a level above that shares most languages with `cluster`; the first of several."""
    return int(np.argmax([len(set(cluster) & set(other)) for other in above]))


def language_tree(
    codes: Sequence[str],
    *,
    feature_set: str = "syntax_average",
    linkage: Literal["single", "complete", "average"] = "single",
    method: Literal["pairs", "halves"] = "pairs",
) -> LanguageTree:
    """The tree of these languages by typology."""
    return tree_of(codes, distances(features(codes, feature_set)), linkage=linkage, method=method)


def features(codes: Sequence[str], feature_set: str = "syntax_average") -> npt.NDArray[np.float64]:
    """[languages, features] of lang2vec, nan where a language has no value; features that none has are left out."""
    library = _lang2vec()
    known = {*library.LANGUAGES, *library.LETTER_CODES.values()}  # the latter has the macro-languages, too
    for code in codes:
        if _long(code) not in known:
            raise ConfigError(
                f"lang2vec has no language '{code}'.{nearest(code, library.LETTER_CODES)} Codes are of ISO 639."
            )
    if feature_set.split("+")[0].split("|")[0] not in library.FEATURE_SETS:
        raise ConfigError(f"lang2vec has no feature set '{feature_set}'.{nearest(feature_set, library.FEATURE_SETS)}")
    found = library.get_features([_long(code) for code in codes], feature_set, minimal=True)
    rows = [[np.nan if value == "--" else float(value) for value in found[_long(code)]] for code in codes]
    return np.array(rows, np.float64)


def distances(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[languages, languages] cosine distances of rows with gaps (nan)."""
    known = np.nan_to_num(rows)
    norms = np.linalg.norm(known, axis=1)
    bare = np.flatnonzero(norms == 0)
    if len(bare):
        raise ConfigError(
            f"language number {bare[0]} has no features at all. Leave it out, or take another feature set."
        )
    result: npt.NDArray[np.float64] = 1.0 - (known @ known.T) / np.outer(norms, norms)
    return result


def nearest_language(code: str, others: Sequence[str], feature_set: str = "syntax_average") -> str:
    """The language among `others` that is typologically closest to `code`; the first of several."""
    if not others:
        raise ConfigError(f"there is no language that '{code}' could be close to.")
    table = distances(features([code, *others], feature_set))
    return others[int(np.argmin(table[0, 1:]))]


def tree_of(
    codes: Sequence[str],
    table: npt.NDArray[np.float64],
    *,
    linkage: str = "single",
    method: str = "pairs",
) -> LanguageTree:
    """The tree of languages with these distances [languages, languages]."""
    if len(set(codes)) != len(codes) or not codes:
        raise ConfigError(f"a tree is made of different languages, but {', '.join(codes) or 'none'} were given.")
    if linkage not in LINKAGES or method not in ("pairs", "halves"):
        raise ConfigError(
            f"linkage is one of {', '.join(LINKAGES)} and the tree pairs or halves; got {linkage}, {method}."
        )
    members = _pairs(table, linkage) if method == "pairs" else _halves(table)
    levels = [tuple(tuple(codes[k] for k in cluster) for cluster in level) for level in members]
    widths = [tuple(_width(table, cluster, linkage) for cluster in level) for level in members]
    return LanguageTree(tuple(levels), tuple(widths))


Level = list[tuple[int, ...]]


def _pairs(table: npt.NDArray[np.float64], linkage: str) -> list[Level]:
    level: Level = [(k,) for k in range(len(table))]
    levels = [level]
    while len(level) > 1:
        pairs = sorted(
            (_between(table, level[a], level[b], linkage), a, b)
            for a, b in itertools.combinations(range(len(level)), 2)
        )
        taken: set[int] = set()
        joined: Level = []
        for _, a, b in pairs:
            if not taken & {a, b}:
                taken |= {a, b}
                joined.append(level[a] + level[b])
        level = joined + [cluster for k, cluster in enumerate(level) if k not in taken]
        levels.append(level)
    return levels


def _halves(table: npt.NDArray[np.float64]) -> list[Level]:
    level: Level = [tuple(range(len(table)))]
    levels = [level]
    while any(len(cluster) > 1 for cluster in level):
        level = [half for cluster in level for half in _halved(table, cluster)]
        levels.append(level)
    return levels[::-1]


def _halved(table: npt.NDArray[np.float64], cluster: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(cluster) == 1:
        return [cluster]
    size = (len(cluster) + 1) // 2

    def inside(half: tuple[int, ...]) -> float:
        rest = [k for k in cluster if k not in half]
        return float(table[np.ix_(half, half)].sum() + table[np.ix_(rest, rest)].sum())

    if len(cluster) <= _EXACT_HALVES:
        best = min(itertools.combinations(cluster, size), key=lambda half: (round(inside(half), 12), half))
    else:
        best = tuple(sorted(cluster[:size]))
        while True:
            rest = [k for k in cluster if k not in best]
            swaps = [tuple(sorted({*best, b} - {a})) for a in best for b in rest]
            better = min(swaps, key=lambda half: (round(inside(half), 12), half))
            if inside(better) >= inside(best) - 1e-12:
                break
            best = better
    return [best, tuple(k for k in cluster if k not in best)]


def _between(table: npt.NDArray[np.float64], a: tuple[int, ...], b: tuple[int, ...], linkage: str) -> float:
    block = table[np.ix_(a, b)]
    return float(block.min() if linkage == "single" else block.max() if linkage == "complete" else block.mean())


def _width(table: npt.NDArray[np.float64], cluster: tuple[int, ...], linkage: str) -> float:
    """The largest step needed to link the cluster's languages (single), or their largest or mean distance."""
    if len(cluster) == 1:
        return 0.0
    if linkage != "single":
        values = table[np.ix_(cluster, cluster)][np.triu_indices(len(cluster), 1)]
        return float(values.max() if linkage == "complete" else values.mean())
    linked, step = {cluster[0]}, 0.0
    while len(linked) < len(cluster):
        rest = [k for k in cluster if k not in linked]
        block = table[np.ix_(sorted(linked), rest)]
        step = max(step, float(block.min()))
        linked.add(rest[int(np.argmin(block.min(axis=0)))])
    return step


def _long(code: str) -> str:
    """ISO 639-3 for what the data calls a language; a script or region behind '-' or '_' is left out."""
    short = code.replace("_", "-").split("-")[0]
    letters: Mapping[str, str] = _lang2vec().LETTER_CODES
    return letters.get(short, short)


def _lang2vec() -> Any:
    try:
        with warnings.catch_warnings():  # it imports pkg_resources, which warns of its end
            warnings.simplefilter("ignore")
            import lang2vec.lang2vec as library
    except ImportError as error:
        raise ConfigError(
            f"typology needs the package lang2vec ({error}): pip install 'xlmega[typology]', or give clusters of "
            "languages by hand."
        ) from None
    return library
