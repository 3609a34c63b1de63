"""Documents in, unit vectors of about 100 numbers out: TF-IDF, a truncated SVD, and L2. The door of scikit-learn.

    vector = normalise(sum over the document's terms of count * idf * row of the SVD)

The sum is linear in the counts, so TF-IDF's own L2 norm cancels, a document's vector is one sparse product, and the
vector of a growing prefix costs one row for each new term (`prefix_vectors`). Smoothed idf, raw counts and the most
frequent `max_terms` terms are scikit-learn's conventions; ties in frequency go to the term that sorts first.
Source: METHODS §2.3. Differences: the SVD is seeded and fitted on at most `svd_documents`; words, see `segmentation`.

A `TextFeatures` is a folder of `features.json` (settings, vocabulary) and `features.npz` (idf [terms], components
[components, terms], float32). The same documents, settings and seed give the same numbers.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from xlmega import config
from xlmega.errors import DataError
from xlmega.experts.segmentation import NUMBER, GrowingText, terms
from xlmega.experts.stop_words import STOP_WORDS, stop_words

FORMAT_VERSION = 1
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureSettings:
    """How documents become vectors."""

    segmentation: Literal["scripts", "words", "characters"] = "scripts"
    """How text is cut into terms, see `segmentation`."""
    stop_words: tuple[str, ...] = ("all",)
    """Languages whose commonest words are left out, and numbers with them; ["all"], or empty for none."""
    max_terms: int = 500_000
    """The most frequent terms are kept; 0 keeps all."""
    num_components: int = 100
    svd_documents: int = 50_000
    """Documents that the SVD is fitted on; 0: all that are given."""
    seed: int = 0

    def problems(self) -> Iterator[str]:
        unknown = [code for code in self.stop_words if code not in STOP_WORDS]
        if unknown and self.stop_words != ("all",):
            known = ", ".join(STOP_WORDS)
            yield f"stop_words has no list for '{unknown[0]}'. Known: all, {known}."
        if self.num_components < 1:
            yield f"num_components must be at least 1, but is {self.num_components}."
        for name in ("max_terms", "svd_documents", "seed"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."

    @property
    def left_out(self) -> frozenset[str]:
        """The terms that are never counted."""
        if not self.stop_words:
            return frozenset()
        return stop_words(() if self.stop_words == ("all",) else self.stop_words) | {NUMBER}


class TermCounts:
    """The counted terms of many documents: what fitting needs of their text. Memory grows with documents, not text."""

    def __init__(self, settings: FeatureSettings) -> None:
        self.settings = settings
        self._left_out = settings.left_out
        self.ids: dict[str, int] = {}
        """Every term met, in the order met."""

    def count(self, text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """(term ids, counts) of one document."""
        counted = Counter(terms(text, self.settings.segmentation))
        for word in self._left_out.intersection(counted):
            del counted[word]
        ids = self.ids
        found = [ids.setdefault(sys.intern(term), len(ids)) for term in counted]
        return np.array(found, np.int32), np.fromiter(counted.values(), np.int32, len(counted))


def fit_features(
    counts: TermCounts, documents: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]
) -> tuple[TextFeatures, Vectors]:
    """The features of counted documents, and the documents' vectors [documents, components]."""
    settings = counts.settings
    matrix = _matrix([ids for ids, _ in documents], [count for _, count in documents], len(counts.ids))
    names = np.array(list(counts.ids), dtype=object)
    matrix, vocabulary = _most_frequent(matrix, names, settings.max_terms)
    if not vocabulary:
        raise DataError(
            f"{len(documents)} documents hold no term to cluster by ({settings.segmentation}, without stop words). "
            "Give other documents, segmentation 'characters', or no stop words."
        )
    frequency = np.bincount(matrix.indices, minlength=len(vocabulary))
    idf = (np.log((1.0 + len(documents)) / (1.0 + frequency)) + 1.0).astype(np.float32)
    weighted = sparse.csr_matrix(
        (matrix.data * idf[matrix.indices], matrix.indices, matrix.indptr), shape=matrix.shape, dtype=np.float32
    )
    fitted = weighted[: settings.svd_documents or None]
    norms = np.sqrt(np.asarray(fitted.multiply(fitted).sum(axis=1)).ravel())
    fitted = sparse.diags(1.0 / np.where(norms > 0, norms, 1.0)).dot(fitted).tocsr().astype(np.float32)
    features = TextFeatures(settings, vocabulary, idf, _components(fitted, settings))
    matrix.sort_indices()
    return features, normalised(matrix @ features.term_rows)


def _components(rows: Any, settings: FeatureSettings) -> Vectors:
    """[components, terms]: right singular vectors of the rows; as many as there can be, at most what is asked."""
    from sklearn.decomposition import TruncatedSVD

    number = min(settings.num_components, *rows.shape)
    if rows.shape[1] == 1:
        return np.ones((1, 1), np.float32)
    svd = TruncatedSVD(number, random_state=settings.seed)
    with np.errstate(invalid="ignore"):  # its share of explained variance is 0 / 0 where all rows are equal
        components: Vectors = svd.fit(rows).components_.astype(np.float32)
    return components


def _matrix(ids: Sequence[Any], counts: Sequence[Any], num_terms: int) -> Any:
    starts = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(one) for one in ids], out=starts[1:])
    empty = [np.empty(0, np.int32)]
    return sparse.csr_matrix(
        (np.concatenate([*counts, *empty]).astype(np.float32), np.concatenate([*ids, *empty]), starts),
        shape=(len(ids), num_terms),
    )


def _most_frequent(matrix: Any, names: Any, max_terms: int) -> tuple[Any, list[str]]:
    """The columns of the terms that occur most, in the order of their names."""
    total = np.bincount(matrix.indices, weights=matrix.data, minlength=len(names))
    by_name = np.argsort(names)
    kept = by_name[np.argsort(-total[by_name], kind="stable")]
    kept = kept[total[kept] > 0][: max_terms or None]
    kept = kept[np.argsort(names[kept])]
    return matrix[:, kept], [str(name) for name in names[kept]]


def normalised(rows: npt.NDArray[Any]) -> Vectors:
    """Rows of length 1, as float32; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


@dataclass(frozen=True)
class TextFeatures:
    """Fitted features: `vectors` for documents, `prefix_vectors` for a text that grows."""

    settings: FeatureSettings
    vocabulary: list[str]
    idf: Vectors
    """[terms]"""
    components: Vectors = field(repr=False)
    """[components, terms]"""

    @cached_property
    def index(self) -> dict[str, int]:
        """The row of each term."""
        return {term: k for k, term in enumerate(self.vocabulary)}

    @cached_property
    def term_rows(self) -> Vectors:
        """[terms, components]: what one occurrence of a term adds to a document's sum."""
        return np.ascontiguousarray(self.components.T * self.idf[:, None])

    @property
    def dimension(self) -> int:
        return len(self.components)

    def vectors(self, texts: Iterable[str]) -> Vectors:
        """[texts, components] of unit length; a text without a known term is zero."""
        index, segmentation = self.index, self.settings.segmentation
        found = []
        for text in texts:
            ids = [index.get(term, -1) for term in terms(text, segmentation)]
            array = np.array(ids, np.int32)
            found.append(array[array >= 0])
        matrix = _matrix(found, [np.ones(len(ids), np.float32) for ids in found], len(self.vocabulary))
        matrix.sum_duplicates()
        return normalised(matrix @ self.term_rows)

    def save(self, folder: Path) -> None:
        """Write features.json and features.npz into an existing folder."""
        table = {
            "format_version": FORMAT_VERSION,
            "settings": config.to_table(self.settings),
            "vocabulary": self.vocabulary,
        }
        write_json(folder / "features.json", table)
        write_arrays(folder / "features.npz", idf=self.idf, components=self.components)


def load_features(folder: Path) -> TextFeatures:
    """What `save` wrote; a DataError where it is damaged."""
    table = read_json(folder / "features.json", FORMAT_VERSION)
    arrays = read_arrays(folder / "features.npz", ("idf", "components"))
    settings = config.build(FeatureSettings, table.get("settings", {}), what=str(folder / "features.json"))
    vocabulary, idf, components = table.get("vocabulary"), arrays["idf"], arrays["components"]
    if not isinstance(vocabulary, list) or idf.shape != (len(vocabulary),) or components.shape[1:] != idf.shape:
        raise DataError(f"'{folder}': features.json and features.npz do not belong together. Copy the folder again.")
    return TextFeatures(settings, vocabulary, idf, components)


def prefix_vectors(features: TextFeatures, pieces: Sequence[str]) -> Vectors:
    """[pieces, components]: the vector of the text up to and with each piece; one pass over the text."""
    growing, index = GrowingText(features.settings.segmentation), features.index
    settled: list[tuple[int, int]] = []
    still_open: list[tuple[int, int]] = []
    for place, piece in enumerate(pieces):
        settled += [(place, index[term]) for term in growing.add(piece) if term in index]
        still_open += [(place, index[term]) for term in growing.open_terms() if term in index]
    rows = features.term_rows
    total, extra = (np.zeros((len(pieces), features.dimension)) for _ in range(2))
    for sums, found in ((total, settled), (extra, still_open)):
        if found:
            places, ids = np.array(found).T
            np.add.at(sums, places, rows[ids])
    return normalised(np.cumsum(total, axis=0) + extra)


# -------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """JSON on disk, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_arrays(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """An .npz whose bytes depend on the arrays alone, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path, version: int) -> dict[str, Any]:
    """The table in a JSON file of ours; a DataError where there is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = table["format_version"]
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' is damaged: {error!r}.") from None
    if found != version:
        raise DataError(f"'{path}' has format version {found}; this xlmega reads {version}.")
    return dict(table)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """The named arrays of an .npz; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' is damaged: {error!r}.") from None
