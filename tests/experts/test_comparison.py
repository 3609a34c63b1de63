"""evaluate_ensemble.py from start to end: rules, matrix, routing, comparison, what result.json sums to, refusals."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from xlmega.errors import ConfigError, DataError

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_ensemble.py", *map(str, words)])
    runpy.run_path(str(ROOT / "tools/evaluate_ensemble.py"))["main"]()


def test_rules_matrix_and_comparison(
    models: Path, made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = (models / "m0", models / "m1", "--data", made_tokens, "--max_documents", 4)
    rules = ("--kind", "clustering,routing,bayes", "--prior", "1,3", "--matrix", "--compare", f"m0={models / 'm0'}")
    with pytest.raises(ConfigError, match="no expert was trained on"):
        run(monkeypatch, *experts, *rules, "--clusterer", models / "text2", "--output", tmp_path / "a")
    told = ("--told", f"knows={models / 'm1'}")
    run(monkeypatch, *experts, *rules[2:], *told, "--clusterer", models / "text2", "--output", tmp_path / "a")
    result = json.loads((tmp_path / "a/result.json").read_text())
    assert set(result["rows"]) == {"m0", "knows", "clustering", "expert-0", "expert-1"}
    assert result["definition"]["length"] == 47  # of 48 positions one is the mark's
    assert (tmp_path / "a/matrix.png").stat().st_size > 3000
    for name, row in result["rows"].items():
        sums = [one["nats"] for one in row["languages"].values()]
        assert math.isclose(row["all"]["nats"], sum(sums), rel_tol=1e-9), name
        mean = sum(math.exp(one["nats"] / one["tokens"]) for one in row["languages"].values()) / len(sums)
        assert math.isclose(row["mean_perplexity"], mean, rel_tol=1e-9)
    alone, compared = (result["rows"][name]["all"]["nats"] for name in ("expert-0", "m0"))
    assert math.isclose(alone, compared, rel_tol=1e-6)
    table = capsys.readouterr().out
    assert "mean" in table and "wrote" in table.splitlines()[-1]
    run(
        monkeypatch, *experts, "--clusterer", models / "languages2", "--matrix", "--output", tmp_path / "b",
        "--export", tmp_path / "exported",
    )  # fmt: skip
    rows = json.loads((tmp_path / "b/result.json").read_text())["rows"]
    assert rows["routing"]["languages"]["qlb"] == rows["expert-0"]["languages"]["qlb"]
    assert rows["routing"]["languages"]["qcy"] == rows["expert-1"]["languages"]["qcy"]
    run(
        monkeypatch, tmp_path / "exported", "--data", made_tokens, "--max_documents", 4, "--language", "qla",
        "--output", tmp_path / "c", "--prompt", "gu",
    )  # fmt: skip
    again = json.loads((tmp_path / "c/result.json").read_text())["rows"]["routing"]["languages"]["qla"]
    assert math.isclose(again["nats"], rows["routing"]["languages"]["qla"]["nats"], rel_tol=1e-5)


def test_refusals(models: Path, made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = (models / "m0", models / "m1", "--data", made_tokens, "--output", tmp_path / "x")
    with pytest.raises(ConfigError, match="clustering weights need the clusterer"):
        run(monkeypatch, *experts, "--kind", "clustering", "--clusterer", models / "random2")
    with pytest.raises(ConfigError, match="--told needs --clusterer"):
        run(monkeypatch, *experts, "--kind", "uniform", "--told", f"a={models / 'm0'}")
    with pytest.raises(ConfigError, match="kind 'clusters' is not known"):
        run(monkeypatch, *experts, "--kind", "clusters")
    with pytest.raises(ConfigError, match="--prior takes numbers"):
        run(monkeypatch, *experts, "--kind", "bayes", "--prior", "a")
    with pytest.raises(ConfigError, match="has no 'xx'; it has"):
        run(monkeypatch, *experts, "--kind", "uniform", "--language", "xx")
    with pytest.raises(ConfigError, match="take NAME=MODEL"):
        run(monkeypatch, *experts, "--kind", "uniform", "--compare", "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/result.json").write_text("{}")
    with pytest.raises(DataError, match="holds a result"):
        run(monkeypatch, *experts, "--kind", "uniform")
