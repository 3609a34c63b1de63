"""Cluster tokens: marks that no text has, before each training document, and in scoring, where they never count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import write_plan

from xlmega.data.indexed import open_corpus, verify
from xlmega.errors import ConfigError
from xlmega.evaluation.scoring import LogicalScorer
from xlmega.experts.branching import Experts
from xlmega.experts.clusterer import LanguageClusterer, RandomClusterer, load_clusterer
from xlmega.experts.parts import labels_by_lot
from xlmega.experts.plan import Resolved, read_plan
from xlmega.experts.told import cluster_marks, told
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.checkpoint import open_source

pytestmark = pytest.mark.torch


def test_marks_are_bytes_that_text_never_has(made_vocabulary: Path) -> None:
    vocabulary = load_vocabulary(made_vocabulary)
    few, many = cluster_marks(vocabulary, 4), cluster_marks(vocabulary, 60)
    assert [len(mark) for mark in few] == [1] * 4 and {len(mark) for mark in many} == {2} and len(set(many)) == 60
    assert {vocabulary.text_of(mark[0])[0] for mark in few} == {0xC0, 0xC1, 0xF5, 0xF6}
    with pytest.raises(ConfigError, match="200 clusters need marks"):
        cluster_marks(vocabulary, 200)


def test_training_documents_begin_with_their_clusters_mark(made_tokens: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, made_tokens, [{"random": 2, "total_steps": 2}], cluster_token=True)
    resolved = Resolved(read_plan(plan), tmp_path / "out")
    experts = Experts(resolved)
    experts.prepare()
    experts.divide(experts.experts)
    marks = cluster_marks(load_vocabulary(made_tokens / "vocabulary"), 2)
    corpus = open_corpus(made_tokens, "train")
    labels = labels_by_lot(corpus, 2, 0)
    for name in ("round-1/cluster-0", "round-1/cluster-1", "dense"):
        folder = tmp_path / "out/data" / name
        for code, tokens in open_corpus(folder, "train").items():
            verify(folder / "train" / code)
            chosen = [k for k in range(len(labels[code])) if name == "dense" or labels[code][k] == int(name[-1])]
            assert tokens.num_documents == len(chosen)
            for mine, theirs in enumerate(chosen[:5]):
                wanted = [*marks[labels[code][theirs]], *corpus[code].document(theirs)]
                np.testing.assert_array_equal(tokens.document(mine), wanted)
            if name == "dense":
                assert tokens.manifest.utf8_bytes == corpus[code].manifest.utf8_bytes
    with pytest.raises(ConfigError, match="cluster_token is for one round"):
        read_plan(write_plan(tmp_path, made_tokens, [{"random": 2, "total_steps": 2}] * 2, cluster_token=True))


def test_a_scored_text_is_told_its_cluster(models: Path, made_tokens: Path) -> None:
    vocabulary = load_vocabulary(made_tokens / "vocabulary")
    inner = LogicalScorer(open_source(models / "m0"))
    clusterer = load_clusterer(models / "text2")
    scorer = told(inner, clusterer, vocabulary, "qla")
    assert scorer.max_positions == inner.max_positions - 1
    eod = vocabulary.eod_id
    texts = [np.asarray(tokens.document(0))[:20].tolist() for tokens in open_corpus(made_tokens, "valid").values()][:2]
    rows = torch.tensor([[eod, *texts[0]], [eod, *texts[1][:14], eod, *[0] * 5]])
    found = scorer.log_probabilities(rows[:, :-1], rows[:, 1:])
    marks = cluster_marks(vocabulary, 2)
    for row, ids in enumerate((texts[0], texts[1][:14])):
        vector = clusterer.features.vectors([vocabulary.decode(ids)])  # type: ignore[attr-defined]
        mark = marks[int(clusterer.distances(vector)[0].argmin())]  # type: ignore[attr-defined]
        whole = torch.tensor([[eod, *mark, *ids]])
        by_hand = inner.log_probabilities(whole[:, :-1], whole[:, 1:])[0, 1:]
        torch.testing.assert_close(found[row, : len(ids)], by_hand)
        following = inner.next_distribution(whole, torch.tensor([whole.shape[1]]))[0]
        length = torch.tensor([len(ids) + 1])
        torch.testing.assert_close(scorer.next_distribution(rows[row : row + 1], length)[0], following)
    of_language = told(inner, LanguageClusterer({"qla": 1, "qlb": 0}), vocabulary, "qla")
    whole = torch.tensor([[eod, *marks[1], *texts[0]]])
    by_hand = inner.log_probabilities(whole[:, :-1], whole[:, 1:])[:, 1:]
    torch.testing.assert_close(of_language.log_probabilities(rows[:1, :-1], rows[:1, 1:]), by_hand)
    with pytest.raises(ConfigError, match="clusters by lot say nothing"):
        told(inner, RandomClusterer(2), vocabulary, "qla")
    with pytest.raises(ConfigError, match="no cluster has 'xx'"):
        told(inner, LanguageClusterer({"qla": 0}), vocabulary, "xx")
