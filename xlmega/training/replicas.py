"""Do the ranks that must hold the same parameters hold the same bits?

In comes an engine between two steps; out goes nothing, or a ReplicaError that names the ranks which differ from the
rest. A parameter that tensor parallelism does not cut is the same on all tensor-parallel ranks; below ZeRO-3 every
parameter is the same on all data-parallel ranks; the tied embedding's two copies are the same on the first and last
stage. Silent data corruption, a broken reduction or a rank that skipped an update all show here and nowhere else
(FIELD.md, pain 9).

The fingerprint of a tensor is a sum of its bits, each word multiplied by a number that depends on its place, modulo
2^64: one pass on the device, 8 bytes a parameter to exchange, and any single changed bit changes it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from xlmega.errors import ReplicaError
from xlmega.parallel.groups import words_of_all
from xlmega.weights.shards import EMBEDDING

if TYPE_CHECKING:
    from xlmega.training.engine import Engine

_BLOCK = 1 << 22
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: torch.Tensor) -> int:
    """64 bits of a tensor of any dtype; equal bits give equal numbers on every device."""
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK].to(torch.int64)
        places = torch.arange(start, start + block.numel(), dtype=torch.int64, device=tensor.device)
        total += (block * (2 * places + 1)).sum()  # odd factors: no changed word is multiplied away
    return int(total.item())


def check_replicas(engine: Engine, step: int) -> None:
    """Compare all replicas; every rank must call it, and every rank raises the same ReplicaError."""
    layout, problems = engine.layout, []
    if engine.runtime.zero_stage < 3:  # at stage 3 each rank holds parts that nobody else has
        prints = [(shard, fingerprint(parameter.data)) for shard, parameter in engine.shards]
        uncut = [(shard.name, one) for shard, one in prints if shard.axis is None]
        tied = [(shard.name, one) for shard, one in prints if shard.name == EMBEDDING]
        if layout.dp > 1:
            everything = [(shard.name, one) for shard, one in prints]
            problems += _differing(everything, parallel_state.get_data_parallel_group(), "data-parallel")
        if layout.tp > 1:
            problems += _differing(uncut, parallel_state.get_tensor_model_parallel_group(), "tensor-parallel")
        if layout.pp > 1 and engine.model.tied and parallel_state.is_rank_in_embedding_group():
            problems += _differing(tied, parallel_state.get_embedding_group(), "the tied embedding's")
    told = sorted({words for words in words_of_all("; ".join(problems)) if words})
    if told:
        raise ReplicaError(
            f"after step {step} {'; '.join(told[:4])}. What these ranks hold must be equal bit for bit: a device "
            "computed wrongly, or memory was corrupted. Take that node out, and go on from a checkpoint before it."
        )


def _differing(prints: list[tuple[str, int]], group: dist.ProcessGroup, kind: str) -> list[str]:
    """What differs within the group, in words that its first rank alone returns."""
    mine = torch.tensor([value for _, value in prints], dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    if group.rank() != 0:
        return []
    ranks = dist.get_process_group_ranks(group)
    accused: set[int] = set()
    names = []
    for (name, _), column in zip(prints, torch.stack(gathered).t().tolist(), strict=True):
        value, votes = Counter(column).most_common(1)[0]
        if votes == group.size():
            continue
        names.append(name)
        # Without a majority nobody knows who is right.
        accused |= {rank for rank, one in zip(ranks, column, strict=True) if one != value or 2 * votes <= group.size()}
    if not names:
        return []
    who, of = (", ".join(map(str, some[:16])) for some in (sorted(accused), ranks))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{kind} replicas differ: rank {who} (of {of}) in {names[0]}{more}"]
