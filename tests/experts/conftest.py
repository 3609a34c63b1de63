"""Two models with drawn weights and clusterers of two clusters, made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(made_corpus: Path, made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m0 and m1, and clusterers text2, languages2 and random2."""
    from drawn import Drawn  # torch is not for the tests that do without it

    from xlmega.experts.clusterer import LanguageClusterer, RandomClusterer, save_clusterer, train_clusterer
    from xlmega.experts.clustering import KMeansSettings
    from xlmega.experts.features import FeatureSettings
    from xlmega.models.config import model_config
    from xlmega.text.vocabulary import load_vocabulary
    from xlmega.weights.directory import write_logical

    folder = tmp_path_factory.mktemp("models")
    small = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2, "max_positions": 48}
    config = model_config(preset="xglm_tiny", vocab_size=load_vocabulary(made_vocabulary).size, **small)
    for seed in range(2):
        write_logical(Drawn(config, seed, 0.3), folder / f"m{seed}", vocabulary_folder=made_vocabulary)
    text = train_clusterer(made_corpus / "train", KMeansSettings(2), FeatureSettings(num_components=4))
    save_clusterer(text, folder / "text2")
    languages = LanguageClusterer({"qla": 0, "qlb": 0, "qcy": 1, "qgr": 1, "qhn": 1})
    save_clusterer(languages, folder / "languages2")
    save_clusterer(RandomClusterer(2), folder / "random2")
    return folder
