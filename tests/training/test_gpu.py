"""Promise 1 on one GPU: what can change without a second one (ZeRO stage, offload, micro-batch, recomputation).

fp32 without TF32; five steps with clipping active, against one process of the same GPU and against one of a CPU. The
tolerances are those of test_theorem. Skipped without a GPU.
"""

from __future__ import annotations

import functools
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
    "zero0": {"zero": 0, "micro": 2},
    "zero0_recompute": {"zero": 0, "recompute": "full", "micro": 12},
    "zero2": {"zero": 2, "micro": 3},
    "zero2_offload": {"zero": 2, "micro": 4, **OFFLOAD},
    "zero3": {"zero": 3, "micro": 3},
    "zero3_recompute": {"zero": 3, "recompute": "full", "micro": 4},
    "zero3_offload": {"zero": 3, "micro": 6, **OFFLOAD},
}
DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1}
DROPPED: dict[str, dict[str, Any]] = {
    "dropout_micro4_recompute": {"micro": 4, "recompute": "full"},
    "dropout_zero3": {"zero": 3, "micro": 3},
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


Runs = tuple[Path, dict[str, Any]]


@functools.lru_cache
def on_gpu(kind: str, folder: Path) -> Runs:
    """All cases of a model, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        return folder, trained.run_cases(0, folder, [case for case in CASES if case["name"].startswith(kind)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def check(found: Runs, name: str, expected: Runs, other: str) -> None:
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
def test_how_it_is_run_does_not_change_the_run(folder: Path, kind: str, name: str) -> None:
    runs = on_gpu(kind, folder)
    check(runs, f"{kind}_{name}", runs, f"{kind}_single")


@pytest.mark.parametrize("name", DROPPED)
def test_nor_its_dropout(folder: Path, name: str) -> None:
    runs = on_gpu("xglm", folder)
    check(runs, f"xglm_{name}", runs, "xglm_single_dropout")
    assert runs[1]["xglm_single"] != runs[1]["xglm_single_dropout"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_cpu_finds_the_same(folder: Path, tmp_path: Path, kind: str) -> None:
    single = {**MODELS[kind], "name": f"{kind}_single"}
    alone = worlds.run(1, trained.run_cases, [single], folder=tmp_path)[0]
    check(on_gpu(kind, folder), single["name"], (tmp_path, alone), single["name"])
