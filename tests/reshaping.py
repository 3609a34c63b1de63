"""Checkpoints of a tiny model written under some layouts and loaded under others: runs inside the ranks of two worlds.

A case is one of `trained`, with `precision` and `zero`. Every source is saved at step 3 and goes on to step 6; every
target loads each of them, saves what it then holds, and goes on to step 6 as well.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import trained
import worlds

from xlmega.errors import XlmegaError
from xlmega.models.config import check_layout
from xlmega.parallel import layout
from xlmega.training.checkpoint import MOMENTS, Checkpoint, folder_of, restore
from xlmega.training.engine import Engine
from xlmega.training.saving import Retention, Saver
from xlmega.weights.comparison import differences, logical_hash

SAVED_AT, LAST = 3, 6
PRECISIONS = ("fp32", "bf16", "fp16")
MODELS: dict[str, dict[str, Any]] = {
    "xglm": {},
    "original": {"preset": "backpack_micro_4", "model": {"init_std": 0.15}},
    "nano": {"preset": "nano_backpack_mini_4", "model": {"num_layers": 11, "init_std": 0.15}},
}
"""Twelve parts for stages: layers, or eleven and nano's senses."""


def save(engine: Engine, run: Path, step: int) -> None:
    """A checkpoint that must be good."""
    (outcome,) = Saver(engine, run, Retention()).save(step, {})
    assert not outcome.problem and not outcome.note, outcome


def write_sources(rank: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses and norms of steps 4 to 6 of every source that this rank is part of."""
    figures = {}
    for case in cases:
        if rank < trained.world_size(case):
            with trained.engine_of(case, rank, folder) as engine:
                trained.train(engine, range(SAVED_AT), rank)
                save(engine, folder / case["name"], SAVED_AT)
                figures[case["name"]] = trained.train(engine, range(SAVED_AT, LAST), rank)
                save(engine, folder / case["name"], LAST)
    return figures


def load_targets(rank: int, folder: Path, cases: list[dict[str, Any]], runs: dict[str, str]) -> dict[str, Any]:
    """For every target and source: losses and norms of steps 4 to 6; the checkpoints lie in `folder`/TARGET/SOURCE.

    A target loads every source, or those that its `loads` names.
    """
    figures: dict[str, Any] = {}
    for case in cases:
        if rank < trained.world_size(case):
            with trained.engine_of(case, rank, folder) as engine:
                for source, run in ((one, runs[one]) for one in case.get("loads", runs)):
                    restore(engine, Checkpoint(folder_of(Path(run), SAVED_AT)))
                    out = folder / case["name"] / source
                    save(engine, out, SAVED_AT)
                    figures[f"{case['name']} {source}"] = trained.train(engine, range(SAVED_AT, LAST), rank)
                    save(engine, out, LAST)
                    dist.barrier()
    return figures


def whole_hash(run: Path, step: int) -> str:
    """Of weights and moments of a checkpoint."""
    found = Checkpoint(folder_of(run, step))
    return logical_hash(found, *(found.moment(kind) for kind in MOMENTS))


def possible_cases(max_ranks: int, model: str = "xglm") -> list[dict[str, Any]]:
    """Every combination that xlmega accepts of the sizes that a model of 12 layers and 4 heads allows."""
    cases = []
    for tp, sp, pp, dp, virtual, zero, precision in itertools.product(
        (1, 2, 4),
        (False, True),
        (1, 2, 3, 4, 6),
        (1, 2, 3, 4, 6),
        (1, 2, 3),
        (0, 1, 2, 3),
        ("fp32", "fp32", "fp32", "bf16", "fp16"),
    ):
        case = {"tp": tp, "sp": sp, "pp": pp, "dp": dp, "virtual": virtual, "zero": zero, "precision": precision}
        case |= MODELS[model]
        rounds = trained.WINDOWS // dp
        if sp and tp == 1:
            continue
        if tp * pp * dp > max_ranks or (pp > 1 and zero > 1) or (zero == 0 and precision != "fp32"):
            continue
        if (virtual > 1 and (pp == 1 or rounds % pp)) or trained.WINDOWS % dp:
            continue
        try:
            chosen = layout.choose(tp * pp * dp, tp=tp, pp=pp, virtual_stages=virtual, sequence_parallel=sp)
            check_layout(chosen, trained.model_of(case), trained.LENGTH)
        except XlmegaError:
            continue
        cases.append({**case, "name": name_of(case)})
    return cases


def name_of(case: dict[str, Any]) -> str:
    """'tp2_sp_pp3_x2_dp1_z1_fp32'."""
    chunks = f"_x{case['virtual']}" if case.get("virtual", 1) > 1 else ""
    shared = "_sp" if case.get("sp") else ""
    sizes = f"tp{case.get('tp', 1)}{shared}_pp{case.get('pp', 1)}{chunks}_dp{case.get('dp', 1)}"
    return f"{sizes}_z{case.get('zero', 1)}_{case.get('precision', 'fp32')}"


def drawn_cases(seed: int, count: int, max_ranks: int = 8, model: str = "xglm") -> list[dict[str, Any]]:
    """`count` different cases."""
    found = possible_cases(max_ranks, model)
    random.Random(seed).shuffle(found)
    return list({case["name"]: case for case in found}.values())[:count]


def named(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases with all that `compare` looks at, each once."""
    return list({name_of(case): {"precision": "fp32", **case, "name": name_of(case)} for case in cases}.values())


def single(precision: str, model: str = "xglm") -> dict[str, Any]:
    """One process."""
    return named([{"precision": precision, **MODELS[model]}])[0]


def largest_first(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Then all ranks of a case have run the same cases before: ZeRO-3 numbers modules per process."""
    return sorted(cases, key=lambda case: -trained.world_size(case))


# -------------------------------------------------------------------- in the process that starts the worlds


def compare(
    folder: Path, sources: list[dict[str, Any]], targets: list[dict[str, Any]]
) -> tuple[int, list[str], dict[str, tuple[float, ...]]]:
    """(pairs, problems, largest distances) of all sources loaded by all targets.

    Where both compute in one precision the source left alone is what to be, else one process of the target's precision
    that loaded the same checkpoint: it must be among the targets. Losses may then be apart by four times what that
    process is from one in fp32 (or 1e-4). Loaded by the layout that saved it, a run must go on bit for bit. Distances
    by kind: (pairs, loss, norm, weights).
    """
    ranks = [max(trained.world_size(case) for case in cases) for cases in (sources, targets)]
    runs = {case["name"]: str(folder / "sources" / case["name"]) for case in sources}
    alone, loaded = worlds.run_in_turn(
        (ranks[0], write_sources, [largest_first(sources)], folder / "sources"),
        (ranks[1], load_targets, [largest_first(targets), runs], folder / "targets"),
        timeout=9000,
    )
    problems: list[str] = []
    distances: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for source in sources:
        run = Path(runs[source["name"]])
        before = whole_hash(run, SAVED_AT)
        for target in (one for one in targets if source["name"] in one.get("loads", runs)):
            pair, out = f"{source['name']} -> {target['name']}", folder / "targets" / target["name"] / source["name"]
            if whole_hash(out, SAVED_AT) != before:
                problems.append(f"{pair}: weights or moments are not equal bit for bit after loading")
            figures = [one[f"{target['name']} {source['name']}"] for one in loaded[: trained.world_size(target)]]
            if any(one != figures[0] for one in figures):
                problems.append(f"{pair}: ranks tell different losses")
            if source["name"] == target["name"]:
                same = figures[0] == alone[0][source["name"]] and whole_hash(out, LAST) == whole_hash(run, LAST)
                problems += [] if same else [f"{pair}: resumed under its own layout the run is another"]
            precisions = {case["precision"] for case in (source, target)}
            kind = precisions.pop() if len(precisions) == 1 else f"other to {target['precision']}"
            if kind == "fp32":
                expected, of = alone[0][source["name"]], run
            else:
                one = single(target["precision"])["name"]
                expected, of = loaded[0][f"{one} {source['name']}"], folder / "targets" / one / source["name"]
            losses = _farthest(figures[0], expected, 0)
            norms = _farthest(figures[0], expected, 1)
            weights = _weights_apart(out, of)
            distances[kind].append((losses, norms, weights))
            bound = 2e-6
            if target["precision"] != "fp32":  # what rounding alone does, where one process has done both
                exact = loaded[0].get(f"{single('fp32')['name']} {source['name']}")
                bound = max(1e-4, 4 * _farthest(expected, exact, 0) if exact else 0.0)
            if not losses < bound:
                problems.append(f"{pair}: losses are {losses:.1e} apart")
            if target["precision"] == "fp32" and not (norms < 1e-5 and weights < 1e-5):
                problems.append(f"{pair}: gradient norms are {norms:.1e}, weights {weights:.1e} apart")
    worst = {kind: (len(found), *map(max, zip(*found, strict=True))) for kind, found in distances.items()}
    return sum(map(len, distances.values())), problems, worst


def _farthest(ours: list[list[float]], theirs: list[list[float]], column: int) -> float:
    """Largest relative distance; where both have no norm (a step that fp16 skipped) there is none."""
    pairs = [(a[column], b[column]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) else float(a != b) for a, b in pairs)


def _weights_apart(one: Path, other: Path) -> float:
    ours, theirs = (Checkpoint(folder_of(run, LAST)) for run in (one, other))
    return max(found.largest / (found.scale or 1.0) for found in differences(theirs, ours, theirs.names()))
