"""Token files and the cluster of every document in, token files of each cluster out: what an expert is trained on.

    OUTPUT/cluster-3/{train/LANG.*, valid/LANG.*, vocabulary/}

A cluster's folder is a token folder like any other. Its `train` holds the cluster's documents in their order; every
other split is there whole, so all experts are validated on the same text. Files that are the same in a cluster and in
the corpus are links where the file system can. OUTPUT appears whole, and one made from the same tokens and clusters is
kept.

Documents are joined to their clusters by file, language and order: both sides say which files they were made from, and
they must be the same ones. Tokens are divided after they are made, not made cluster by cluster, because a division
copies at the disk's rate where tokenising takes minutes a gigabyte, and because one tokenisation then serves every
clustering, the seed model and the dense baseline. `join_clusters` keeps a division with the tokens, in
TOKENS/clusters/NAME; tools/train_experts.py takes it from there, and otherwise makes its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xlmega.data.indexed import IndexedTokens, IndexedWriter, open_corpus, splits
from xlmega.errors import ConfigError, DataError
from xlmega.experts.assignment import assigned_files, clusters_by_language, num_clusters
from xlmega.experts.features import read_json, write_json
from xlmega.locking import locked
from xlmega.text.vocabulary import load_vocabulary

Labels = Mapping[str, npt.NDArray[np.int64]]
"""For each language the cluster of each document of its training tokens; -1 where it is in none."""
FORMAT_VERSION = 1
NAME = "parts.json"
BLOCK_DOCUMENTS = 4096


def labels_of_groups(
    corpus: Mapping[str, IndexedTokens], groups: Sequence[Sequence[str]]
) -> dict[str, npt.NDArray[np.int64]]:
    """All documents of a language in the group that names it."""
    found = {}
    for number, group in enumerate(groups):
        for code in group:
            if code not in corpus:
                raise ConfigError(f"cluster {number} names '{code}', but the tokens have {', '.join(corpus)}.")
            if code in found:
                raise ConfigError(f"'{code}' is named twice; a language is in one cluster.")
            found[code] = np.full(corpus[code].num_documents, number, np.int64)
    return {code: found.get(code, np.full(corpus[code].num_documents, -1, np.int64)) for code in corpus}


def labels_by_lot(
    corpus: Mapping[str, IndexedTokens], num_clusters: int, seed: int
) -> dict[str, npt.NDArray[np.int64]]:
    """Clusters drawn so that each has, of every language, as many documents as another, give or take one."""
    return {
        code: np.random.default_rng((seed, number)).permutation(tokens.num_documents) % num_clusters
        for number, (code, tokens) in enumerate(corpus.items())
    }


def check_labels(corpus: Mapping[str, IndexedTokens], labels: Labels, what: str) -> None:
    """Refuse clusters that were assigned to other documents than were tokenised."""
    for code, tokens in corpus.items():
        if len(labels.get(code, ())) != tokens.num_documents:
            raise DataError(
                f"{what} has clusters of {len(labels.get(code, ()))} documents of '{code}', but the tokens have "
                f"{tokens.num_documents}. Both must be made from the same files: assign or tokenise again."
            )


def check_sources(root: Path, split: str, clusters: Path) -> None:
    """Refuse clusters of other files than a split of tokens was made from."""
    path = root / split / "sources.txt"
    if not path.is_file():
        return  # tokens that another tool made say nothing of files
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    tokenised = {name: int(size) for size, _, name in lines}
    assigned = {str(name): int(size) for name, size in assigned_files(clusters, split)}
    for name in sorted(tokenised.keys() | assigned.keys()):
        if tokenised.get(name) != assigned.get(name):
            sides = (tokenised.get(name, "no"), assigned.get(name, "no"))
            raise DataError(
                f"'{clusters}' was assigned from other files than '{root / split}' was tokenised from: of {name}, "
                f"{sides[0]} bytes were tokenised and {sides[1]} assigned. Assign or tokenise again."
            )


def join_clusters(
    root: Path, clusters: Path, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """The tokens of each cluster beside all tokens, in ROOT/clusters/NAME/cluster-K; made where they are not there."""
    check_sources(root, "train", clusters)
    corpus, labels = open_corpus(root, "train"), clusters_by_language(clusters, "train")
    check_labels(corpus, labels, f"'{clusters}'")
    output = joined_folder(root, clusters)
    output.parent.mkdir(exist_ok=True)
    with locked(output, wait=True):
        if overwrite:
            shutil.rmtree(output, ignore_errors=True)
        return divide_tokens(root, labels, num_clusters(clusters), output, say)


def joined_folder(root: Path, clusters: Path) -> Path:
    """Where `join_clusters` puts the clusters' tokens."""
    return root / "clusters" / clusters.resolve().name


def overlap(below: Labels, above: Labels) -> npt.NDArray[np.int64]:
    """[clusters below, clusters above]: documents in common."""
    shape = tuple(max(int(one.max(initial=0)) for one in labels.values()) + 1 for labels in (below, above))
    counts = np.zeros(shape, np.int64)
    for code in below.keys() & above.keys():
        both = (below[code] >= 0) & (above[code] >= 0)
        np.add.at(counts, (below[code][both], above[code][both]), 1)
    return counts


@dataclass(frozen=True)
class Marks:
    """Ids in front of each document that tell its cluster, see `told`."""

    ids: npt.NDArray[np.int64]
    """[clusters, length of a mark]"""
    labels: Labels
    """What the documents are told; no document that is written may be in no cluster."""


def divide_tokens(
    root: Path,
    labels: Labels,
    num_clusters: int,
    output: Path,
    say: Callable[[str], None] = lambda line: None,
    marks: Marks | None = None,
) -> list[Path]:
    """The folders of the clusters' tokens under `output`, made where they are not there yet."""
    folders = [output / f"cluster-{k}" for k in range(num_clusters)]
    corpus = open_corpus(root, "train")
    pinned = pinned_to(corpus, labels, num_clusters, marks)
    if (output / NAME).is_file():
        if read_json(output / NAME, FORMAT_VERSION) == pinned:
            return folders
        raise DataError(
            f"'{output}' was made from other tokens or clusters. Choose another output for the experts, or remove it."
        )
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    piece_bytes = load_vocabulary(root / "vocabulary").piece_bytes
    counts = np.zeros(num_clusters, np.int64)
    for k in range(num_clusters):
        folder = part / f"cluster-{k}"
        for split in splits(root):
            if split != "train":
                _link_folder(root / split, folder / split)
        _link_folder(root / "vocabulary", folder / "vocabulary")
        (folder / "train").mkdir()
    for code, tokens in corpus.items():
        told = None if marks is None else (marks.ids, marks.labels[code])
        counts += _divide(tokens, labels[code], part, num_clusters, piece_bytes, told)
        say(f"{code}: tokens by cluster {' '.join(map(str, counts))} so far")
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise DataError(f"cluster {empty[0]} has no document of '{root}', so there is nothing to train its expert on.")
    write_json(part / NAME, pinned)
    shutil.rmtree(output, ignore_errors=True)
    part.replace(output)
    return folders


def _divide(
    tokens: IndexedTokens,
    labels: npt.NDArray[np.int64],
    part: Path,
    num_clusters: int,
    piece_bytes: npt.NDArray[np.int32],
    told: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
) -> npt.NDArray[np.int64]:
    """Write one language's documents to their clusters; returns tokens by cluster."""
    manifest = tokens.manifest
    result = np.zeros(num_clusters, np.int64)
    present = np.unique(labels[labels >= 0])
    if len(present) == 1 and (labels >= 0).all() and told is None:
        target = part / f"cluster-{present[0]}" / "train"
        for suffix in (".bin", ".idx", ".json"):
            name = tokens.path.name + suffix
            _link(tokens.path.with_name(name), target / name)
        result[present[0]] = tokens.num_tokens
        return result
    starts = tokens.document_starts
    for k in present:
        writer = IndexedWriter(part / f"cluster-{k}" / "train" / tokens.path.name, manifest.dtype)
        utf8_bytes = 0
        documents = np.flatnonzero(labels == k)
        for first in range(0, len(documents), BLOCK_DOCUMENTS):
            chosen = documents[first : first + BLOCK_DOCUMENTS]
            lengths = starts[chosen + 1] - starts[chosen]
            places = np.repeat(starts[chosen] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
            ids = np.asarray(tokens.tokens[places + np.arange(len(places))])
            utf8_bytes += int(piece_bytes[ids].sum(dtype=np.int64))
            if told is not None:
                rows = told[0][told[1][chosen]]
                firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
                ids = np.insert(ids, np.repeat(firsts, rows.shape[1]), rows.ravel())
                lengths = lengths + rows.shape[1]
            writer.add_documents(ids, lengths)
        done = writer.finish(
            language=manifest.language,
            split=manifest.split,
            vocabulary_hash=manifest.vocabulary_hash,
            vocabulary_size=manifest.vocabulary_size,
            eod_id=manifest.eod_id,
            utf8_bytes=utf8_bytes,
            document_prefix=manifest.document_prefix,
            document_suffix=manifest.document_suffix,
        )
        result[k] = done.tokens
    return result


def pinned_to(
    corpus: Mapping[str, IndexedTokens], labels: Labels, num_clusters: int, marks: Marks | None = None
) -> dict[str, object]:
    """What parts.json says of a division: another one says something else."""

    def digests(of: Labels) -> dict[str, str]:
        return {code: hashlib.sha256(of[code].astype("<i8").tobytes()).hexdigest() for code in corpus}

    tokens = {code: one.manifest.bin_sha256 for code, one in corpus.items()}
    told = {} if marks is None else {"marks": marks.ids.tolist(), "told": digests(marks.labels)}
    facts = {"format_version": FORMAT_VERSION, "num_clusters": num_clusters, "tokens": tokens}
    return {**facts, "clusters": digests(labels), **told}


def _link_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            _link(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
