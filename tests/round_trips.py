"""Models of transformers loaded, scored and saved by real ranks, then exported: the same function, the same bits.

In come directories that transformers saved and cases (`model`: one of them; the sizes of a layout; `zero`). Every
case loads its model, scores one batch and saves a checkpoint. Scores must be those of transformers' logits, to 1e-4 a
token, and what the checkpoint is exported to must hold the same tensors as the directory, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from safetensors.torch import load_file

from xlmega.data.batches import Batch
from xlmega.parallel import groups
from xlmega.parallel.layout import Layout
from xlmega.training.checkpoint import open_source
from xlmega.training.engine import Engine
from xlmega.training.optimizer import OptimizerSettings
from xlmega.training.runtime import runtime
from xlmega.training.saving import Retention, Saver
from xlmega.weights.directory import open_logical_directory, write_logical

WINDOWS, LENGTH = 4, 16


def _sizes(case: dict[str, Any]) -> Layout:
    return Layout(**{name: value for name, value in case.items() if name not in ("model", "zero")})


def _rank_main(rank: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load, score, save; the sum of losses of each window."""
    torch.set_num_threads(1)
    scores = {}
    # Largest first: ZeRO-3 numbers modules per process, so all ranks of a case must have run the same cases before.
    for name, case in sorted(cases.items(), key=lambda item: -_sizes(item[1]).world_size):
        layout = _sizes(case)
        if rank >= layout.world_size:
            continue
        source = open_logical_directory(folder / f"{case['model']}_logical")
        worlds.forget_groups()
        process = groups.Process(rank, layout.world_size, rank, "127.0.0.1", worlds.meet(folder, name, rank), "test")
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": case.get("zero", 1)}}
        with groups.joined(process, layout, timeout_seconds=300) as device:
            each = WINDOWS // layout.dp
            engine = Engine(
                source.config, layout, runtime(settings), OptimizerSettings(), device=device, micro_batches=each
            )
            engine.write_state(source)
            mine = np.arange(each) * layout.dp + layout.coordinates(rank)[1]
            ids = np.load(folder / "ids.npy")[mine][:, None]
            weights = np.ones((each, 1, LENGTH), np.float32)
            batch = Batch(ids, weights, mine.astype(np.int32)[:, None], mine[:, None])
            scores[name] = engine.evaluate(batch, num_languages=WINDOWS).nll
            ended = list(Saver(engine, folder / f"{name}_run", Retention()).save(0, {}, wait=True))
            assert not any(one.problem for one in ended), ended
            engine._engine.destroy()  # as in trained.engine_of
    return scores


def through_real_ranks(
    folder: Path, cases: dict[str, dict[str, Any]], logits: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """`folder` has a directory for each model that a case names; `logits` computes a model's for ids [B, L]."""
    from xlmega.weights.huggingface import export_huggingface, open_huggingface

    models = {str(case["model"]) for case in cases.values()}
    stored, expected = {}, {}
    vocabulary = 0
    for model in models:
        source = open_huggingface(folder / model)
        vocabulary = vocabulary or source.config.vocab_size
        write_logical(source, folder / f"{model}_logical")
        stored[model] = load_file(folder / model / "model.safetensors")
    ids = torch.randint(vocabulary, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    np.save(folder / "ids.npy", ids.numpy())
    for model in models:
        predicted = logits(model, ids[:, :-1]).transpose(1, 2)
        expected[model] = torch.nn.functional.cross_entropy(predicted, ids[:, 1:], reduction="none").sum(1)
    results = worlds.run(max(_sizes(case).world_size for case in cases.values()), _rank_main, cases, folder=folder)
    for name, case in cases.items():
        model = case["model"]
        found = torch.tensor(results[0][name], dtype=torch.float32)
        torch.testing.assert_close(found / LENGTH, expected[model] / LENGTH, rtol=0, atol=1e-4, msg=name)
        export_huggingface(open_source(folder / f"{name}_run"), folder / f"{name}_back", vocabulary_folder=None)
        back = load_file(folder / f"{name}_back" / "model.safetensors")
        assert back.keys() == stored[model].keys(), name
        assert all(torch.equal(back[tensor], stored[model][tensor]) for tensor in back), name
