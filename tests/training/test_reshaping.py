"""Any layout loads what any layout saved: every value the same, and the run goes on as the one that saved would have.

The long form, with layouts drawn at random, is benchmarks/any_to_any.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from reshaping import compare, drawn_cases, name_of, named, possible_cases, single

pytestmark = pytest.mark.multiprocess
SOURCES = [
    {"dp": 3, "zero": 3},
    {"tp": 2, "pp": 2, "virtual": 3},
    {"tp": 4},
    {"dp": 2, "zero": 2, "precision": "bf16"},
    {"tp": 2, "precision": "fp16"},
]
TARGETS = [{"dp": 2, "zero": 3}, {"pp": 3}, {"tp": 2, "pp": 2, "precision": "bf16"}]


def test_any_layout_loads_what_any_layout_saved(tmp_path: Path) -> None:
    targets = named([*TARGETS, single("fp32"), single("bf16")])
    pairs, problems, worst = compare(tmp_path, named(SOURCES), targets)
    assert not problems, "\n".join(problems)
    assert pairs == 25 and worst["fp32"][0] == 9


def test_cases_are_drawn_alike_and_all_possible() -> None:
    assert drawn_cases(3, 12) == drawn_cases(3, 12) != drawn_cases(4, 12)
    names = {name_of(case) for case in possible_cases(6)}
    assert {"tp1_pp6_dp1_z1_fp32", "tp2_pp3_x2_dp1_z0_fp32", "tp1_pp1_dp6_z3_bf16"} <= names
    assert not any("pp2_dp1_z2" in name or name.endswith("z0_fp16") for name in names)
