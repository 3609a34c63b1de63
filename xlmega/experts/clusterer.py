"""What says which cluster a document belongs to: by its text, by its language, or by lot.

A clusterer is a folder: `clusterer.json` (kind and settings) and, for the kind `text`, the files of `features` and
`clusterer.npz` (centres, prices). All three kinds answer one question, the cost of each document in each cluster: the
squared distance to the centre; 0 in a language's own cluster and 1 elsewhere; a number drawn for the document. The
least cost is the published, greedy rule.

Training takes a uniform sample of a split in one pass over it: documents are ranked by a hash of the seed, their
dataset-relative path and line, and the first `sample_documents` are counted. Memory grows with the sample (about 2 kB a
document), not with the split; the same text, settings and seed give the same folder, byte for byte.
Source: METHODS §2.3 to §2.5, §2.6 (random clusters).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from xlmega import config
from xlmega.errors import ConfigError, DataError
from xlmega.experts.balancing import balanced_assignment
from xlmega.experts.clustering import KMeans, KMeansSettings, squared_distances, train_kmeans
from xlmega.experts.features import (
    FeatureSettings,
    TermCounts,
    TextFeatures,
    fit_features,
    load_features,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from xlmega.text.corpus import Document, corpus_files, read_documents

FORMAT_VERSION = 1
NAME = "clusterer.json"
PROGRESS_SECONDS = 5.0


class Clusterer(Protocol):
    """Costs of documents in clusters."""

    @property
    def num_clusters(self) -> int: ...

    def costs(self, documents: Sequence[Document], keys: Sequence[str]) -> npt.NDArray[np.float32]:
        """[documents, clusters]; a key is 'SPLIT/SHARD/FILE|LINE' with lines from 0."""
        ...

    def save(self, folder: Path) -> None:
        """Write the clusterer into an existing folder."""
        ...


@dataclass(frozen=True)
class TextClusterer:
    """Centres in the space of TextFeatures."""

    features: TextFeatures
    kmeans: KMeans
    metric: str
    about: Mapping[str, Any]
    """How it was trained."""

    @property
    def num_clusters(self) -> int:
        return len(self.kmeans.centres)

    def costs(self, documents: Sequence[Document], keys: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.distances(self.features.vectors(document.text for document in documents))

    def distances(self, vectors: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """[vectors, clusters] squared distances."""
        return squared_distances(vectors, self.kmeans.centres, self.metric)

    def save(self, folder: Path) -> None:
        self.features.save(folder)
        write_arrays(folder / "clusterer.npz", centres=self.kmeans.centres, prices=self.kmeans.prices)
        table = {"format_version": FORMAT_VERSION, "kind": "text", "num_clusters": self.num_clusters}
        write_json(folder / NAME, {**table, "metric": self.metric, **self.about})


@dataclass(frozen=True)
class LanguageClusterer:
    """Every document goes where its language goes."""

    clusters: Mapping[str, int]
    """Language code, as the data has it, to cluster."""

    def __post_init__(self) -> None:
        found = sorted(set(self.clusters.values()))
        if found != list(range(len(found))) or not found:
            raise ConfigError(f"clusters are numbered from 0 without gaps, but the languages are in {found}.")

    @property
    def num_clusters(self) -> int:
        return max(self.clusters.values()) + 1

    def costs(self, documents: Sequence[Document], keys: Sequence[str]) -> npt.NDArray[np.float32]:
        result = np.ones((len(documents), self.num_clusters), np.float32)
        for row, (document, key) in enumerate(zip(documents, keys, strict=True)):
            if document.language not in self.clusters:
                raise DataError(
                    f"{key}: language '{document.language}' is in no cluster. The clusters have "
                    f"{', '.join(sorted(self.clusters))}; name it in one of them, or leave its files out."
                )
            result[row, self.clusters[document.language]] = 0.0
        return result

    def save(self, folder: Path) -> None:
        table = {"format_version": FORMAT_VERSION, "kind": "languages", "num_clusters": self.num_clusters}
        write_json(folder / NAME, {**table, "clusters": dict(sorted(self.clusters.items()))})


@dataclass(frozen=True)
class RandomClusterer:
    """Clusters by lot: what clusters are worth is measured against these."""

    num_clusters: int
    seed: int = 0

    def costs(self, documents: Sequence[Document], keys: Sequence[str]) -> npt.NDArray[np.float32]:
        number = self.num_clusters
        drawn = b"".join(hashlib.shake_128(f"{self.seed}|{key}".encode()).digest(4 * number) for key in keys)
        return (np.frombuffer(drawn, "<u4").reshape(len(keys), number) / 2.0**32).astype(np.float32)

    def save(self, folder: Path) -> None:
        table = {"format_version": FORMAT_VERSION, "kind": "random", "num_clusters": self.num_clusters}
        write_json(folder / NAME, {**table, "seed": self.seed})


def load_clusterer(folder: Path) -> Clusterer:
    """Any of the three; a DataError where the folder is none."""
    if not (folder / NAME).is_file():
        raise DataError(f"'{folder}' is not a clusterer: it has no {NAME}. tools/train_clusterer.py writes one.")
    table = read_json(folder / NAME, FORMAT_VERSION)
    try:
        if table["kind"] == "languages":
            return LanguageClusterer({str(code): int(k) for code, k in table["clusters"].items()})
        if table["kind"] == "random":
            return RandomClusterer(int(table["num_clusters"]), int(table["seed"]))
        arrays = read_arrays(folder / "clusterer.npz", ("centres", "prices"))
        features = load_features(folder)
        if arrays["centres"].shape != (table["num_clusters"], features.dimension):
            raise ValueError(f"centres of shape {arrays['centres'].shape}")
        about = {key: value for key, value in table.items() if key not in ("format_version", "kind", "num_clusters")}
        return TextClusterer(features, KMeans(arrays["centres"], arrays["prices"], 0), str(table["metric"]), about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"'{folder / NAME}' is damaged: {error!r}.") from None


def save_clusterer(clusterer: Clusterer, output: Path, *, overwrite: bool = False) -> None:
    """Write a clusterer to a folder that appears whole or not at all."""
    check_free(output, overwrite=overwrite)
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    clusterer.save(part)
    if output.exists():
        shutil.rmtree(output)
    part.replace(output)


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is a file, or is occupied by anything but a clusterer that may be replaced."""
    if output.is_file():
        raise DataError(f"--output '{output}' is a file; a clusterer is a folder.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise DataError(f"'{output}' exists and is not empty. Choose another --output, or add --overwrite.")
        if not (output / NAME).is_file():
            raise DataError(f"'{output}' holds no clusterer, so it is not replaced. Choose another --output.")


def clusterer_hash(folder: Path) -> str:
    """sha256 over the clusterer's files: what assignments are pinned to."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.npz")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key_of(file: Path, line: int) -> str:
    """'SPLIT/SHARD/FILE|LINE', lines from 0: the same wherever the data set lies."""
    return f"{file.parent.parent.name}/{file.parent.name}/{file.name}|{line}"


# -------------------------------------------------------------------- training


def train_clusterer(
    split: Path,
    kmeans: KMeansSettings,
    features: FeatureSettings,
    *,
    sample_documents: int = 200_000,
    say: Callable[[str], None] = lambda line: None,
) -> TextClusterer:
    """A clusterer from a sample of a split's documents."""
    if sample_documents < kmeans.num_clusters:
        raise ConfigError(
            f"a sample of {sample_documents} documents cannot fill {kmeans.num_clusters} clusters. Take a larger one."
        )
    counts = TermCounts(features)
    sample, num_documents = _sample(corpus_files(split), counts, sample_documents, features.seed, say)
    say(f"{len(sample):,} of {num_documents:,} documents, {len(counts.ids):,} different terms")
    fitted, vectors = fit_features(counts, [counted for _, counted in sample])
    say(f"vectors of {fitted.dimension} components from {len(fitted.vocabulary):,} terms")
    found = train_kmeans(vectors, kmeans, say)
    distances = squared_distances(vectors, found.centres, kmeans.metric)
    greedy = np.bincount(np.argmin(distances, axis=1), minlength=kmeans.num_clusters)
    about = {
        "settings": config.to_table(kmeans),
        "documents": num_documents,
        "sample_documents": len(sample),
        "iterations": found.iterations,
        "mean_squared_distance": float(distances.min(axis=1).mean(dtype=np.float64)),
        "sample_sizes_nearest_centre": greedy.tolist(),
    }
    if kmeans.method == "balanced":
        labels, _ = balanced_assignment(distances, found.prices)
        about["sample_sizes_balanced"] = np.bincount(labels, minlength=kmeans.num_clusters).tolist()
    return TextClusterer(fitted, found, kmeans.metric, about)


def _sample(
    files: Sequence[Path], counts: TermCounts, limit: int, seed: int, say: Callable[[str], None]
) -> tuple[list[tuple[int, Any]], int]:
    """(rank, counted terms) of at most `limit` documents, by rank, and the number of documents there are."""
    kept: list[tuple[int, Any]] = []
    highest = 1 << 64
    num_documents = 0
    told = time.monotonic()
    for file, line, document in _numbered(files):
        num_documents += 1
        rank = int.from_bytes(
            hashlib.blake2b(f"{seed}|{key_of(file, line)}".encode(), digest_size=8).digest(), "little"
        )
        if rank < highest:
            kept.append((rank, counts.count(document.text)))
            if len(kept) >= 2 * limit + 1000:
                kept.sort(key=lambda entry: entry[0])
                del kept[limit:]
                highest = kept[-1][0]
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"{num_documents:,} documents read, {document.id}")
    kept.sort(key=lambda entry: entry[0])
    if not kept:
        raise DataError("the split holds no document. Put text into it.")
    return kept[:limit], num_documents


def _numbered(files: Sequence[Path]) -> Iterator[tuple[Path, int, Document]]:
    for file in files:
        for line, document in enumerate(read_documents(file)):
            yield file, line, document
