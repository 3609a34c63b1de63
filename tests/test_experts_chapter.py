"""The README's chapter on experts: its commands as they stand there, on a small corpus, with small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn import Drawn
from stand_in import SMALL
from test_readme import ROOT, run_chapter

from xlmega.models.config import model_config
from xlmega.weights.directory import write_logical

pytestmark = pytest.mark.multiprocess


def test_from_documents_to_an_ensemble(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 4}
    seed = Drawn(model_config(preset="xglm_tiny", vocab_size=800, **sizes))
    write_logical(seed, tmp_path / "given/seed", vocabulary_folder=made_vocabulary)
    shipped = (ROOT / "plans/tfidf4.toml").read_text(encoding="utf-8")
    small = [*SMALL, "model.num_heads=4"]
    plan = shipped.replace("overrides = [", f"overrides = [{json.dumps(small)[1:-1]}, ").replace("= 400", "= 4")
    assert plan.count(small[0]) == 1
    (tmp_path / "given/tfidf4.toml").write_text(plan.replace("zero1_bf16", "cpu_debug"), encoding="utf-8")
    given = {
        "DATA": made_corpus,
        "vocab/mine": made_vocabulary,
        "runs/first": tmp_path / "given/seed",
        "plans/tfidf4.toml": tmp_path / "given/tfidf4.toml",
    }
    (place := tmp_path / "place").mkdir()
    clusterer, assigned, tokens, trained, status, scored = run_chapter("Experts", place, {"4": "2"}, given)
    assert clusterer.splitlines()[-1] == "wrote clusterers/tfidf4: 2 clusters"
    assert assigned.splitlines()[-1] == "wrote clusters/tfidf4: 2 clusters, train, valid"
    assert "clusters/tfidf4/cluster-1)" in tokens
    assert (place / "experts/tfidf4/data/round-1").resolve() == place / "tokens/pydocs/clusters/tfidf4"
    assert trained.splitlines()[-1].endswith("3 of 3 experts are trained") and status.count(": done, 4 steps") == 3
    rows = json.loads((place / "scores/tfidf4/result.json").read_text(encoding="utf-8"))["rows"]
    assert set(rows) == {"dense", "seed", "clustering", "expert-0", "expert-1"} and "mean" in scored
    assert (place / "scores/tfidf4/matrix.png").stat().st_size > 3000
