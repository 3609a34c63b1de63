"""Tokens divided by cluster: the documents, their order, what stays whole; groups, lots, overlaps, refusals."""

from __future__ import annotations

import gzip
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from stand_in import write_plan

from xlmega.data.indexed import open_corpus, splits, verify
from xlmega.errors import ConfigError, DataError
from xlmega.experts.assignment import assign_clusters, clusters_by_language
from xlmega.experts.clusterer import RandomClusterer, save_clusterer
from xlmega.experts.parts import (
    check_labels,
    divide_tokens,
    join_clusters,
    labels_by_lot,
    labels_of_groups,
    overlap,
)
from xlmega.text.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parents[2]


def test_every_document_is_in_its_cluster_in_order(made_tokens: Path, tmp_path: Path) -> None:
    corpus = open_corpus(made_tokens, "train")
    generator = np.random.default_rng(0)
    labels = {code: generator.integers(-1, 3, tokens.num_documents) for code, tokens in corpus.items()}
    only = next(iter(corpus))
    labels[only][:] = 2
    folders = divide_tokens(made_tokens, labels, 3, tmp_path / "parts")
    for k, folder in enumerate(folders):
        part = open_corpus(folder, "train")
        for code, tokens in corpus.items():
            wanted = np.flatnonzero(labels[code] == k)
            if not len(wanted):
                assert code not in part
                continue
            assert part[code].num_documents == len(wanted)
            for mine, theirs in enumerate(wanted):
                np.testing.assert_array_equal(part[code].document(mine), tokens.document(int(theirs)))
            vocabulary = load_vocabulary(folder / "vocabulary")
            assert part[code].manifest.utf8_bytes == vocabulary.piece_bytes[part[code].tokens].sum()
            verify(folder / "train" / code)
        for code, tokens in open_corpus(made_tokens, "valid").items():
            assert open_corpus(folder, "valid")[code].manifest == tokens.manifest
    linked, whole = (folder / "train" / f"{only}.bin" for folder in (folders[2], made_tokens))
    assert linked.stat().st_ino == whole.stat().st_ino  # the same on disk where nothing differs
    assert divide_tokens(made_tokens, labels, 3, tmp_path / "parts") == folders
    labels[only][0] = 0
    with pytest.raises(DataError, match="other tokens or clusters"):
        divide_tokens(made_tokens, labels, 3, tmp_path / "parts")
    with pytest.raises(DataError, match="cluster 3 has no document"):
        divide_tokens(made_tokens, labels, 4, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_clusters_are_joined_to_tokens_by_file(
    made_corpus: Path, made_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_clusterer(RandomClusterer(2), tmp_path / "lot")
    assign_clusters(made_corpus / "train", tmp_path / "lot", tmp_path / "lot2", only=True)
    tokens = tmp_path / "tokens"
    words = [made_corpus / "train", "--vocabulary", made_vocabulary, "--clusters", tmp_path / "lot2"]
    for _ in range(2):  # the second time everything is there
        monkeypatch.setattr(sys, "argv", ["tokenize_corpus.py", *map(str, words), "--output", str(tokens)])
        runpy.run_path(str(ROOT / "tools/tokenize_corpus.py"))["main"]()
    labels = clusters_by_language(tmp_path / "lot2", "train")
    for k in range(2):
        for code, part in open_corpus(tokens / "clusters/lot2" / f"cluster-{k}", "train").items():
            assert part.num_documents == (labels[code] == k).sum()
    assert splits(tokens) == ["train", "valid"]
    # train_experts takes what was joined, and makes its own of other clusters.
    pytest.importorskip("torch")
    from xlmega.experts.branching import Experts
    from xlmega.experts.plan import Resolved, read_plan

    plan = write_plan(tmp_path, tokens, [{"clusters": str(tmp_path / "lot2"), "total_steps": 2}], dense=False)
    experts = Experts(Resolved(read_plan(plan), tmp_path / "out"))
    experts.prepare()
    experts.divide(experts.experts)
    assert (tmp_path / "out/data/round-1").resolve() == tokens / "clusters/lot2"
    other = made_corpus.parent / "other"
    shutil.copytree(made_corpus, other)
    with next((other / "train").rglob("*.jsonl*")).open("ab") as file:
        file.write(gzip.compress(b"\n"))
    assign_clusters(other / "train", tmp_path / "lot", tmp_path / "other2", only=True)
    with pytest.raises(DataError, match="assigned from other files than .* bytes were tokenised"):
        join_clusters(tokens, tmp_path / "other2")


def test_groups_lots_and_overlaps(made_tokens: Path) -> None:
    corpus = open_corpus(made_tokens, "train")
    a, b, *rest = corpus
    two = labels_of_groups(corpus, [[a], [b, *rest]])
    assert (two[a] == 0).all() and (two[b] == 1).all()
    assert (labels_of_groups(corpus, [[a]])[b] == -1).all()
    lots = labels_by_lot(corpus, 3, seed=1)
    assert all(np.ptp(np.bincount(one, minlength=3)) <= 1 for one in lots.values())
    counts = overlap(lots, two)
    assert counts.shape == (3, 2) and counts.sum() == sum(tokens.num_documents for tokens in corpus.values())
    with pytest.raises(ConfigError, match="cluster 0 names 'xx'"):
        labels_of_groups(corpus, [["xx"]])
    with pytest.raises(ConfigError, match="named twice"):
        labels_of_groups(corpus, [[a], [a]])
    with pytest.raises(DataError, match=f"clusters of 1 documents of '{a}'"):
        check_labels(corpus, {**two, a: two[a][:1]}, "'clusters'")
