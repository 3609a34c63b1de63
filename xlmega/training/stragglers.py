"""Which rank do the others wait for?

In come, for each rank, the seconds of a step that it waits at the step's own sum over all ranks, which all must reach;
out go words, or none. Who is slow waits least there, and the others wait for it. Within a tensor-parallel group ranks
wait for one another at every layer, so a slow one makes its group late as a whole: then the group is named, and the
ranks' device times of the pre-flight say which. A pipeline's stages are late by turns and are compared only with the
same stage of other replicas.
Source: MegaScale (arXiv:2402.15627 §5) on stragglers found by comparing ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from xlmega.parallel.layout import Layout

LOST_SHARE = 0.1
"""A slow rank is told when the others wait for it for more than this share of a step."""


def slow_ranks(waits: Mapping[int, float], step_seconds: float, layout: Layout) -> tuple[list[int], float]:
    """(ranks that the others wait for, seconds of a step that these lose); ([], 0.0) where none stands out."""
    found: list[int] = []
    lost = 0.0
    for stage in range(layout.pp):
        mine = {rank: wait for rank, wait in waits.items() if layout.coordinates(rank)[2] == stage}
        if len(mine) < 2 or len(mine) < layout.tp * layout.dp:
            continue
        least = min(mine.values())
        usual = statistics.median_high(mine.values())
        late = [rank for rank, wait in mine.items() if wait < (least + usual) / 2]
        if usual - least > LOST_SHARE * step_seconds and len(late) <= max(layout.tp, len(mine) // 2):
            found += late
            lost = max(lost, usual - least)
    return sorted(found), lost


def in_words(waits: Mapping[int, float], step_seconds: float, layout: Layout, hosts: Mapping[int, str]) -> str:
    """One line for the log, '' where no rank stands out."""
    ranks, lost = slow_ranks(waits, step_seconds, layout)
    if not ranks:
        return ""
    who = ", ".join(f"{rank} on {hosts.get(rank, '?')}" for rank in ranks[:8])
    group = " (a tensor-parallel group waits as one)" if layout.tp > 1 and len(ranks) > 1 else ""
    return f"SLOW: the others wait {lost:.2f} s of each {step_seconds:.2f} s step for rank {who}{group}"
