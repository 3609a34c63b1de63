"""Promise 1 on one GPU: what can change without a second one (ZeRO stage, offload, micro-batch, recomputation).

fp32 without TF32; five steps with clipping active, against one process of the same GPU and against one of a CPU. The
tolerances are those of test_theorem. Skipped without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trained
import worlds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

OFFLOAD: dict[str, Any] = {"zero_settings": {"offload_optimizer": {"device": "cpu"}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "micro4": {"micro": 4},
    "recompute": {"recompute": "full", "micro": 3},
    "selective": {"recompute": "selective", "micro": 6},
    "zero0": {"zero": 0},
    "zero0_recompute": {"zero": 0, "recompute": "full", "micro": 12},
    "zero2": {"zero": 2},
    "zero2_offload": {"zero": 2, **OFFLOAD},
    "zero3": {"zero": 3},
    "zero3_recompute": {"zero": 3, "recompute": "full", "micro": 4},
    "zero3_offload": {"zero": 3, **OFFLOAD},
}
DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1}
DROPPED: dict[str, dict[str, Any]] = {
    "dropout_micro4_recompute": {"micro": 4, "recompute": "full"},
    "dropout_zero3": {"zero": 3},
}
MODELS: dict[str, dict[str, Any]] = {
    "xglm": {"preset": "xglm_tiny"},
    "languini": {"preset": "languini_tiny"},
    "original": {"preset": "backpack_micro_4", "model": {"num_layers": 6, "init_std": 0.15}},
    "nano": {"preset": "nano_backpack_mini_4", "model": {"num_layers": 5, "init_std": 0.15}},
}
CASES = [
    {**how, **model, "name": f"{kind}_{name}"}
    for kind, model in MODELS.items()
    for name, how in {"single": {}, **LAYOUTS}.items()
] + [
    {**how, **MODELS["xglm"], "model": DROPOUT, "name": f"xglm_{name}"}
    for name, how in {"single_dropout": {}, **DROPPED}.items()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All cases on the GPU, in this process."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        return folder, trained.run_cases(0, folder, CASES)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cpu")
    singles = [case for case in CASES if case["name"].endswith("_single")]
    return folder, worlds.run(1, trained.run_cases, singles, folder=folder)[0]


def check(found: tuple[Path, dict[str, Any]], name: str, expected: tuple[Path, dict[str, Any]], other: str) -> None:
    losses, norms = np.array(found[1][name]).T
    expected_losses, expected_norms = np.array(expected[1][other]).T
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6, atol=0, err_msg="losses")
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5, atol=0, err_msg="gradient norms")
    for kind in ("gradient", "weight"):
        ours = trained.assemble([found[0] / f"{name}.{kind}.0.npz"])
        theirs = trained.assemble([expected[0] / f"{other}.{kind}.0.npz"])
        assert ours.keys() == theirs.keys()
        for tensor, value in theirs.items():
            np.testing.assert_allclose(
                ours[tensor], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=f"{kind} of {tensor}"
            )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_how_it_is_run_does_not_change_the_run(world: tuple[Path, dict[str, Any]], kind: str, name: str) -> None:
    check(world, f"{kind}_{name}", world, f"{kind}_single")


@pytest.mark.parametrize("name", DROPPED)
def test_nor_its_dropout(world: tuple[Path, dict[str, Any]], name: str) -> None:
    check(world, f"xglm_{name}", world, "xglm_single_dropout")
    assert world[1]["xglm_single"] != world[1]["xglm_single_dropout"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_cpu_finds_the_same(
    world: tuple[Path, dict[str, Any]], on_cpu: tuple[Path, dict[str, Any]], kind: str
) -> None:
    check(world, f"{kind}_single", on_cpu, f"{kind}_single")
