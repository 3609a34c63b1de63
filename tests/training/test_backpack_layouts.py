"""Promise 1 for Backpacks: layouts change neither losses, gradient norms, gradients nor weights.

Five steps with clipping active, both variants, against one process; tolerances as in test_theorem.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained
import worlds
from reshaping import compare, named

pytestmark = pytest.mark.multiprocess

LAYOUTS: dict[str, dict[str, Any]] = {
    "selective_zero0": {"recompute": "selective", "micro": 6, "zero": 0},
    "zero3_recompute": {"zero": 3, "recompute": "full", "micro": 4},
    "pp3_zero0": {"pp": 3, "zero": 0},
    "tp4": {"tp": 4},
    "tp2_pp2_interleaved_sp": {"tp": 2, "pp": 2, "virtual": 3, "sp": True, "recompute": "full"},
    "pp2_dp2": {"pp": 2, "dp": 2},
    "tp2_dp2_zero3": {"tp": 2, "dp": 2, "zero": 3},
    "tp2_dp2_zero2_sp": {"tp": 2, "dp": 2, "zero": 2, "sp": True},
}
# The contextualiser has six layers, or five and the senses: 1, 2, 3 and 6 stages.
MODELS = {
    "original": {"preset": "backpack_micro_4", "model": {"num_layers": 6, "init_std": 0.15}},
    "nano": {"preset": "nano_backpack_mini_4", "model": {"num_layers": 5, "init_std": 0.15}},
}
CASES = [
    {**how, **model, "name": f"{variant}_{name}"}
    for name, how in {"single": {}, **LAYOUTS}.items()
    for variant, model in MODELS.items()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("backpack")
    # Largest first: then all ranks of a case have run the same cases before. ZeRO-3 numbers modules per process.
    cases = sorted(CASES, key=lambda case: -trained.world_size(case))
    return folder, worlds.run(4, trained.run_cases, cases, folder=folder, timeout=1500)


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_does_not_change_the_run(world: tuple[Path, list[dict[str, Any]]], name: str, variant: str) -> None:
    folder, figures = world
    ranks = trained.world_size(LAYOUTS[name])

    def tensors(case: str, kind: str, count: int) -> dict[str, np.ndarray]:
        return trained.assemble([folder / f"{variant}_{case}.{kind}.{rank}.npz" for rank in range(count)])

    expected_losses, expected_norms = np.array(figures[0][f"{variant}_single"]).T
    for rank in range(ranks):
        losses, norms = np.array(figures[rank][f"{variant}_{name}"]).T
        np.testing.assert_allclose(losses, expected_losses, rtol=2e-6, atol=0, err_msg="losses")
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-5, atol=0, err_msg="gradient norms")
    for kind in ("gradient", "weight"):
        expected, found = tensors("single", kind, 1), tensors(name, kind, ranks)
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            np.testing.assert_allclose(
                found[tensor], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=f"{kind} of {tensor}"
            )


@pytest.mark.parametrize("variant", MODELS)
def test_clipping_was_active_and_training_moved(world: tuple[Path, list[dict[str, Any]]], variant: str) -> None:
    losses, norms = np.array(world[1][0][f"{variant}_single"]).T
    assert (norms > 0.1).all() and len(set(losses)) == 5, (norms, losses)


def test_any_layout_loads_what_any_layout_saved(tmp_path: Path) -> None:
    """Bit for bit, and the run goes on as the one that saved would have."""
    sources: list[dict[str, Any]] = [{"tp": 2, "pp": 2, "virtual": 3, "sp": True}, {"dp": 2, "zero": 3}]
    targets: list[dict[str, Any]] = [{"tp": 4, "sp": True}, {"pp": 3}, {"dp": 2, "zero": 3}]

    def of_variant(variant: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**case, **MODELS[variant], "name": f"{variant}_{case['name']}"} for case in named(cases)]

    saved = {variant: of_variant(variant, sources) for variant in MODELS}
    loading = [
        {**target, "loads": [source["name"] for source in saved[variant]]}
        for variant in MODELS
        for target in of_variant(variant, targets)
    ]
    pairs, problems, _ = compare(tmp_path, [*saved["original"], *saved["nano"]], loading)
    assert not problems, "\n".join(problems)
    assert pairs == 12
