"""A batch that changes its size along the run, and windows of several documents: the same in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained
import worlds

pytestmark = pytest.mark.multiprocess

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SINGLES: list[dict[str, Any]] = [{"name": "single"}, {"name": "single_documents", "documents": True}]
LAYOUTS: list[dict[str, Any]] = [
    {"name": "micro3_zero2", "micro": 3, "zero": 2},
    {"name": "pp2", "pp": 2},
    {"name": "dp2_zero2", "dp": 2, "zero": 2},
    {"name": "dp2_zero2_offload", "dp": 2, "zero": 2, "zero_settings": OFFLOAD},
    {"name": "dp2_zero3", "dp": 2, "zero": 3},
    {"name": "tp2_sp_recompute_documents", "tp": 2, "sp": True, "recompute": "full", "documents": True},
    {"name": "pp2_interleaved_documents", "pp": 2, "virtual": 2, "documents": True},
    {"name": "dp2_zero3_documents", "dp": 2, "zero": 3, "micro": 3, "documents": True},
]
SIZES = (12, 6, 6, 12, 6)
"""Windows of each step; the first half of a step's micro-batches are its first 6 windows, whatever the layout."""


def run_stages(rank: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    results = {}
    for case in cases:
        if rank >= trained.world_size(case):
            continue
        with trained.engine_of(case, rank, folder) as engine:
            figures = []
            for step, size in enumerate(SIZES):
                whole = trained.batch_of(engine, step, rank)
                count = whole.tokens.shape[0] * size // trained.WINDOWS
                parts = {name: getattr(whole, name)[:count] for name in ("tokens", "weights", "languages", "slots")}
                if case.get("documents"):
                    parts["documents"] = documents_of(parts["slots"])
                report = engine.forward_backward(replace(whole, **parts), step=step)
                figures.append((report.loss, engine.apply(1e-3, step=step)[0]))
            np.savez(folder / f"{case['name']}.weight.{rank}.npz", **trained.pieces(engine, "weight"))
        results[case["name"]] = figures
    return results


def documents_of(slots: np.ndarray) -> np.ndarray:
    """Documents of about five tokens, the same for a window wherever it is served."""
    begins = [np.random.default_rng((3, slot)).random(trained.LENGTH) < 0.2 for slot in slots.ravel().tolist()]
    numbers: np.ndarray = np.cumsum(begins, axis=1, dtype=np.int32).reshape(*slots.shape, trained.LENGTH)
    return numbers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("stages")
    cases = sorted([*SINGLES, *LAYOUTS], key=lambda case: -trained.world_size(case))
    return folder, worlds.run(2, run_stages, cases, folder=folder, timeout=900)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["name"])
def test_stages_do_not_know_the_layout(world: tuple[Path, list[Any]], case: dict[str, Any]) -> None:
    folder, figures = world
    single = "single_documents" if case.get("documents") else "single"
    for rank in range(trained.world_size(case)):
        losses, norms = np.array(figures[rank][case["name"]]).T
        due_losses, due_norms = np.array(figures[0][single]).T
        np.testing.assert_allclose(losses, due_losses, rtol=2e-6, atol=0)
        np.testing.assert_allclose(norms, due_norms, rtol=1e-5, atol=0)
    ranks = range(trained.world_size(case))
    found = trained.assemble([folder / f"{case['name']}.weight.{rank}.npz" for rank in ranks])
    for name, value in trained.assemble([folder / f"{single}.weight.0.npz"]).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_documents_make_a_difference(world: tuple[Path, list[Any]]) -> None:
    assert world[1][0]["single"] != world[1][0]["single_documents"]
