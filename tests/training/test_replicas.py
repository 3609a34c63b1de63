"""Replicas that differ by one bit are found and the rank is named, in every group that holds copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trained
import worlds

from xlmega.errors import ReplicaError
from xlmega.training.replicas import check_replicas, fingerprint

CASES: list[dict[str, Any]] = [
    {"name": "tp2_pp2_dp2", "tp": 2, "pp": 2, "dp": 2, "precision": "bf16"},
    {"name": "dp4", "dp": 4, "zero": 2},
]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_any_changed_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    values = torch.arange(37).to(dtype)
    before = fingerprint(values)
    assert before == fingerprint(values.clone()) and before == fingerprint(torch.stack([values, values], 1)[:, 0])
    bits = values.view(torch.uint8)
    for byte in range(0, bits.numel(), 3):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            assert fingerprint(values) != before
            bits[byte] ^= 1 << bit
    assert fingerprint(values.flip(0)) != before
    assert fingerprint(values[:0]) == 0


def perturb(rank: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What check_replicas says: of healthy ranks, and after one bit of one rank was changed."""
    told: dict[str, list[str]] = {}
    for case in cases:
        if rank >= trained.world_size(case):
            continue
        with trained.engine_of(case, rank, folder) as engine:
            trained.train(engine, range(1), rank)
            check_replicas(engine, 1)  # healthy
            found = []
            for victim, name in ((1, "decoder.final_layernorm.bias"), (1, "embedding.word_embeddings.weight")):
                parameters = [p for shard, p in engine.shards if shard.name == name]
                if rank == victim and not parameters:  # the stage of the victim has other parameters
                    parameters = [engine.shards[0][1]]
                before = parameters[0].data.clone() if parameters else None
                if rank == victim:
                    parameters[0].data.view(-1)[0] += 1.0
                try:
                    check_replicas(engine, 1)
                    found.append("")
                except ReplicaError as error:
                    found.append(str(error))
                if rank == victim:
                    parameters[0].data.copy_(before)
            check_replicas(engine, 1)
            told[case["name"]] = found
    return told


@pytest.mark.multiprocess
def test_a_perturbed_replica_is_named(tmp_path: Path) -> None:
    told = worlds.run(8, perturb, CASES, folder=tmp_path)
    for rank in range(8):
        for words in told[rank]["tp2_pp2_dp2"]:
            assert "after step 1" in words and "replicas differ" in words and "rank" in words
    for rank in range(4):
        for words in told[rank]["dp4"]:
            assert "data-parallel replicas differ: rank 1 (of 0, 1, 2, 3)" in words
