"""A small made corpus, a vocabulary of 800 pieces trained on it and its tokens, made once a session."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from xlmega.data import tokenizing
from xlmega.text import corpus, synthetic, vocabulary

# No test may depend on how busy the machine is.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, valid/, parallel/ and lexicon.json of the five made languages, 8:4:2:1:1, 0.4 MB of training text."""
    output = tmp_path_factory.mktemp("made") / "corpus"
    synthetic.make_corpus(output, seed=0, megabytes=0.4, frac_valid=0.1, parallel_pairs=200)
    return output


@pytest.fixture(scope="session")
def made_vocabulary(made_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a vocabulary of 800 ids."""
    output = tmp_path_factory.mktemp("vocab") / "made800"
    texts = (document.text for document in corpus.read_corpus(made_corpus / "train"))
    vocabulary.train_vocabulary(texts, 800, output)
    return output


@pytest.fixture(scope="session")
def made_tokens(made_corpus: Path, made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token folder of the made corpus: train/, valid/ and vocabulary/."""
    output = tmp_path_factory.mktemp("tokens") / "made"
    tokenizing.tokenize_corpus(made_corpus / "train", made_vocabulary, output)
    return output
