"""How many ranks do what: pure arithmetic on tensor-, pipeline- and data-parallel sizes.

In come the sizes a user asked for and the number of ranks; out goes a frozen `Layout`, or one
LayoutError that names layouts that work. Nothing here knows torch: the planner and `--dry_run` use it as it is.
Ranks are ordered tensor-parallel first, then data-parallel, then pipeline (Megatron-core's "tp-dp-pp").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xlmega.errors import LayoutError


@dataclass(frozen=True)
class Layout:
    """Sizes whose product is the number of ranks, and how a pipeline stage is cut into virtual stages."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual_stages: int = 1
    """Model chunks per pipeline rank (interleaved schedule when above 1)."""
    sequence_parallel: bool = False
    """Activations between the tensor-parallel regions are split along the sequence."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp_rank, dp_rank, pp_rank) of a global rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)

    def describe(self) -> str:
        """'tp2 pp2 dp1', with interleaving and sequence parallelism where they are on."""
        text = f"tp{self.tp} pp{self.pp} dp{self.dp}"
        text += f" x{self.virtual_stages} interleaved" if self.virtual_stages > 1 else ""
        return text + (" sp" if self.sequence_parallel else "")


def choose(
    world_size: int, *, tp: int = 1, pp: int = 1, virtual_stages: int = 1, sequence_parallel: bool = False
) -> Layout:
    """The layout of `world_size` ranks with the asked sizes; what is left is data-parallel."""
    _check_sizes(world_size=world_size, tp=tp, pp=pp, virtual_stages=virtual_stages)
    if world_size % (tp * pp):
        raise LayoutError(
            f"tp={tp} x pp={pp} needs a multiple of {tp * pp} ranks, but WORLD_SIZE is {world_size}.\n"
            f"  With {world_size} ranks try: {_nearest_sizes(world_size, tp, pp)}."
        )
    if virtual_stages > 1 and pp == 1:
        raise LayoutError(f"virtual_stages={virtual_stages} interleaves a pipeline, but pp=1. Use pp=2 or more.")
    if sequence_parallel and tp == 1:
        raise LayoutError("sequence_parallel splits activations over tensor-parallel ranks, but tp=1. Drop it.")
    return Layout(tp, pp, world_size // (tp * pp), virtual_stages, sequence_parallel)


def fitting(
    world_size: int, *, tp: int, pp: int, virtual_stages: int, micro_batch_windows: int, batches: Iterable[int]
) -> int:
    """The most of `world_size` ranks that can share every one of these batch sizes evenly, tp and pp as they are.

    What a job that gets other nodes than before trains on: the batch, and with it the loss curve, stays.
    """
    _check_sizes(world_size=world_size, tp=tp, pp=pp, virtual_stages=virtual_stages)
    sizes = sorted(set(batches))
    for dp in range(world_size // (tp * pp), 0, -1):
        counts = [divmod(size, dp * micro_batch_windows) for size in sizes]
        if all(left == 0 and (virtual_stages == 1 or count % pp == 0) for count, left in counts):
            return tp * pp * dp
    raise LayoutError(
        f"--elastic: of {world_size} ranks no number shares batches of {spell(sizes)} windows in micro-batches of "
        f"{micro_batch_windows} with tp={tp} x pp={pp}. tp and pp stay as given, so {tp * pp} are the least."
    )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise LayoutError(f"{name}={value}: sizes start at 1.")


def _nearest_sizes(world_size: int, tp: int, pp: int) -> str:
    options = [(t, p) for t in divisors(world_size) for p in divisors(world_size // t)]
    options.sort(key=lambda o: (abs(o[0] - tp) + abs(o[1] - pp), -o[0]))
    return " or ".join(f"tp={t} pp={p} (dp={world_size // (t * p)})" for t, p in options[:2])


def check_interleaving(layout: Layout, micro_batches: int) -> None:
    """Refuse a number of micro-batches that the interleaved schedule cannot arrange."""
    if layout.virtual_stages > 1 and micro_batches % layout.pp:
        raise LayoutError(
            f"virtual_stages={layout.virtual_stages} needs the micro-batches of a step to be a multiple of "
            f"pp={layout.pp}, but there are {micro_batches}. Choose training.batch_windows and the DeepSpeed file's "
            f"train_micro_batch_size_per_gpu so that batch / (dp={layout.dp} x micro-batch) is one, or drop "
            "--virtual_stages."
        )


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def spell(numbers: list[int]) -> str:
    """'1, 2, 4' for a message."""
    return ", ".join(map(str, numbers)) if numbers else "none here"
