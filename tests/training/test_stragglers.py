"""Who the others wait for: the rule on given waits, and a rank of a real run that is slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launched import ROOT, Ranks

from xlmega.parallel.layout import Layout
from xlmega.training.stragglers import in_words, slow_ranks


def test_who_waits_least_is_slow_where_the_others_wait_long() -> None:
    four = Layout(dp=4)
    assert slow_ranks({0: 0.5, 1: 0.52, 2: 0.01, 3: 0.49}, 1.0, four) == ([2], pytest.approx(0.49))
    assert slow_ranks({0: 0.05, 1: 0.06, 2: 0.01, 3: 0.05}, 1.0, four) == ([], 0.0)  # 4 % of a step
    assert slow_ranks({0: 0.5, 1: 0.0}, 1.0, Layout(dp=2)) == ([1], 0.5)
    assert slow_ranks({0: 0.5, 1: 0.0, 2: 0.5}, 1.0, four) == ([], 0.0)  # not all have told


def test_a_tensor_parallel_group_is_late_as_one_and_stages_are_not_compared() -> None:
    layout = Layout(tp=2, dp=2, pp=2)
    waits = {0: 0.3, 1: 0.3, 2: 0.0, 3: 0.0, 4: 0.9, 5: 0.9, 6: 0.9, 7: 0.9}
    assert slow_ranks(waits, 1.0, layout)[0] == [2, 3]
    words = in_words(waits, 1.0, layout, {2: "n1", 3: "n1"})
    assert words.startswith("SLOW: the others wait 0.30 s of each 1.00 s step for rank 2 on n1, 3 on n1 (a tensor-p")
    assert in_words(dict.fromkeys(range(8), 0.2), 1.0, layout, {}) == ""


@pytest.mark.multiprocess
def test_a_slow_rank_of_a_run_is_named(made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRIKE", f'{{"kind": "slow", "moment": "", "rank": 1, "marker": "{tmp_path}/struck"}}')
    hook = f"{ROOT / 'tests' / 'hook'}:{ROOT}"
    monkeypatch.setenv("PYTHONPATH", f"{hook}:{os.environ.get('PYTHONPATH', '')}")
    sets = ("training.total_steps=30",)
    with Ranks(tmp_path, 2, made_tokens, tmp_path / "run", "--straggler_seconds", "2", sets=sets) as ranks:
        assert ranks.codes() == [0, 0], ranks.told(0)[-3000:]
        assert "SLOW: the others wait 0." in ranks.told(0) and "step for rank 1 on " in ranks.told(0), ranks.told(0)
