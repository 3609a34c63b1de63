"""A few steps of a tiny model under some layout, for tests that compare layouts: runs inside the ranks of a world."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds

from xlmega.data.batches import Batch
from xlmega.models.config import check_layout, model_config
from xlmega.parallel import groups, layout
from xlmega.training.engine import MOMENTS, Engine
from xlmega.training.optimizer import OptimizerSettings
from xlmega.training.runtime import check_pair, runtime
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

VOCABULARY = 509  # prime: no tensor-parallel size divides it
WINDOWS, LENGTH = 12, 16
SIZES = {"num_layers": 12, "hidden_size": 32, "ffn_hidden_size": 64, "num_heads": 4, "vocab_size": VOCABULARY}


def model_of(case: dict[str, Any]) -> Any:
    return model_config(preset=case.get("preset", "xglm_tiny"), **{**SIZES, **case.get("model", {})})


def world_size(case: dict[str, Any]) -> int:
    return int(case.get("tp", 1) * case.get("pp", 1) * case.get("dp", 1))


@contextlib.contextmanager
def engine_of(case: dict[str, Any], rank: int, folder: Path) -> Iterator[Engine]:
    """The case's engine with initial weights, in a group of the world's first ranks."""
    size = world_size(case)
    chosen = layout.choose(
        size,
        tp=case.get("tp", 1),
        pp=case.get("pp", 1),
        virtual_stages=case.get("virtual", 1),
        sequence_parallel=case.get("sp", False),
    )
    model = model_of(case)
    check_layout(chosen, model, LENGTH)
    micro = case.get("micro", 1)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "zero_optimization": {"stage": case.get("zero", 1), **case.get("zero_settings", {})},
    }
    if case.get("precision", "fp32") != "fp32":
        settings[case["precision"]] = {"enabled": True}
    how = runtime(settings)
    check_pair(how, chosen)
    torch.set_num_threads(1)
    worlds.forget_groups()
    process = groups.Process(rank, size, rank, "127.0.0.1", worlds.meet(folder, case["name"], rank), "test")
    with groups.joined(process, chosen, timeout_seconds=300) as device:
        engine = Engine(
            model,
            chosen,
            how,
            # Clipping is active; epsilon is large because a true gradient of zero (key biases) is only rounding.
            OptimizerSettings(gradient_clipping=0.1, epsilon=1e-4, weight_decay=0.1, beta1=0.9),
            device=device,
            micro_batches=WINDOWS // (chosen.dp * micro),
            recompute=case.get("recompute", "none"),
            seed=7,
            languages=("a", "b", "c"),
        )
        if case.get("broken"):  # the mistake that the theorem must catch
            setattr(engine, case["broken"], lambda: None)
        engine.write_state(InitialWeights(model, 1, logical_shapes(model)))
        yield engine
        engine._engine.destroy()  # hooks of ZeRO-3 would keep the groups, and each has threads that wake all the time
    gc.collect()


def batch_of(engine: Engine, step: int, rank: int) -> Batch:
    """This rank's part of the step's batch: the same windows for every layout, with some targets that do not count."""
    chosen, micro = engine.layout, engine.runtime.micro_batch_windows
    generator = np.random.default_rng((11, step))
    tokens = generator.integers(0, engine.model.vocab_size, (WINDOWS, LENGTH + 1))
    weights = (generator.random((WINDOWS, LENGTH)) < 0.9).astype(np.float32)
    rounds = WINDOWS // (chosen.dp * micro)
    dp_rank = chosen.coordinates(rank)[1]
    rows = np.arange(rounds)[:, None] * (chosen.dp * micro) + dp_rank * micro + np.arange(micro)
    return Batch(tokens[rows], weights[rows], (rows % 3).astype(np.int32), rows + step * WINDOWS)


def train(engine: Engine, steps: range, rank: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    figures = []
    for step in steps:
        report = engine.forward_backward(batch_of(engine, step, rank), step=step)
        figures.append((report.loss, engine.apply(1e-3, step=step)[0]))
    return figures


def pieces(engine: Engine, kind: str) -> dict[str, np.ndarray]:
    """This rank's shards, with the places of their logical tensors they cover in the key."""
    found = {}
    for shard, parameter in engine.shards:
        spans = ",".join(f"{s.indices(n)[0]}:{s.indices(n)[1]}" for s, n in zip(shard.slices, shard.shape))
        found[f"{shard.name}|{shard.shape}|{spans}|{int(shard.is_copy)}"] = engine.read_state(
            shard, parameter, kind
        ).numpy()
    return found


def assemble(files: list[Path]) -> dict[str, np.ndarray]:
    """Logical tensors from every rank's pieces; overlapping pieces (replicas, tied copies) must agree bit for bit."""
    whole: dict[str, np.ndarray] = {}
    for path in files:
        with np.load(path) as archive:
            for key in archive.files:
                name, shape, spans, _ = key.split("|")
                place = tuple(slice(*map(int, span.split(":"))) for span in spans.split(","))
                size = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
                tensor = whole.setdefault(name, np.full(size, np.nan, np.float32))
                before = tensor[place]
                assert np.isnan(before).all() or np.array_equal(before, archive[key]), f"{name}: replicas differ"
                tensor[place] = archive[key]
    assert not any(np.isnan(tensor).any() for tensor in whole.values())
    return whole


def run_cases(rank: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Five steps of every case this rank is part of; weights and the gradient of step 1 go to files in `folder`.

    Adam's first moment after one step is (1 - beta1) times the clipped gradient of the whole model.
    """
    results = {}
    for case in cases:
        if rank >= world_size(case):
            continue
        with engine_of(case, rank, folder) as engine:
            figures = train(engine, range(1), rank)
            np.savez(folder / f"{case['name']}.gradient.{rank}.npz", **pieces(engine, MOMENTS[0]))
            figures += train(engine, range(1, 5), rank)
            np.savez(folder / f"{case['name']}.weight.{rank}.npz", **pieces(engine, "weight"))
        results[case["name"]] = figures
    return results
