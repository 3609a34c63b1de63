"""A planned run to its last token: days, cost, failures, and how often to save; and the words of a plan.

In come a Plan, its Cluster and a number of tokens; out go an Outlook, or lines for a person.
Source: Daly (doi:10.1016/j.future.2004.11.016) for the interval between checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xlmega.errors import ConfigError
from xlmega.training.planning import GIB, Cluster, Plan


@dataclass(frozen=True)
class Outlook:
    """A run to its last token, failures included."""

    steps: int
    failures: float
    save_seconds: float
    save_every_seconds: float
    hours: float
    share_training: float
    """Of the hours; the rest is saving, restarting and doing steps again."""
    cost: float


def outlook(chosen: Plan, cluster: Cluster, tokens: float) -> Outlook:
    """How long so many tokens take, with a checkpoint every `young_daly` seconds."""
    job = chosen.job
    steps = math.ceil(tokens / (job.batch_windows * job.sequence_length))
    save = 12.0 * job.model.num_parameters() / (cluster.disk_gb_per_second * 1e9)
    between = cluster.device_hours_between_failures * 3600 / cluster.devices
    every = young_daly(save, between)
    # In each interval: its own steps, a save, and with every / between the chance of a failure half of it again.
    lost = (every / 2 + save + cluster.restart_seconds) / between
    share = every / (every + save) * max(0.0, 1 - lost)
    hours = steps * chosen.step / 3600 / share if share else math.inf
    cost = hours * cluster.devices * cluster.price_per_device_hour
    return Outlook(steps, hours * 3600 / between, save, every, hours, share, cost)


def young_daly(save_seconds: float, seconds_between_failures: float) -> float:
    """The interval between checkpoints at which saving and doing again cost least together (Daly's second order)."""
    if save_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    ratio = save_seconds / (2 * seconds_between_failures)
    first = math.sqrt(2 * save_seconds * seconds_between_failures)
    return first * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def report(found: Sequence[Plan], cluster: Cluster, tokens: float) -> Iterator[str]:
    """Lines for a person: the ways, the first of them in full, and what all rests on."""
    yield f"{cluster.devices} devices in {cluster.nodes} nodes of {cluster.memory_gib:g} GiB; fastest ways that fit:"
    for number, one in enumerate(found, 1):
        memory_gib = one.bytes / GIB + cluster.reserved_gib
        speed = f"{one.step:.3g} s a step, {one.tokens_per_second:,.0f} tokens/s"
        yield f"  {number}. {one.job.describe()}: {memory_gib:.1f} GiB, {speed}"
    best = found[0]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in best.memory.items() if size)
    yield f"memory of the fullest rank in GiB: {parts}, without a model {cluster.reserved_gib:.2f}"
    parts = ", ".join(f"{name} {100 * part / best.step:.1f} %" for name, part in best.seconds.items() if part)
    yield f"a step: {parts}"
    layout = best.job.layout
    yield (
        f"so: --tp {layout.tp} --pp {layout.pp} --recompute {best.job.recompute}, train_micro_batch_size_per_gpu="
        f"{best.job.runtime.micro_batch_windows}, zero_optimization.stage={best.job.runtime.zero_stage}"
    )
    ahead = outlook(best, cluster, tokens)
    if not ahead.share_training:
        between = cluster.device_hours_between_failures * 3600 / cluster.devices
        raise ConfigError(
            f"a failure every {between:,.0f} s leaves no time to train: a save takes {ahead.save_seconds:.0f} s and a "
            f"restart {cluster.restart_seconds:g}. Correct device_hours_between_failures, restart_seconds or "
            "disk_gb_per_second of the cluster, or take fewer devices."
        )
    every = max(1, round(ahead.save_every_seconds / best.step))
    when = f"every {every:,} steps" if every < ahead.steps else "after the last step; failures are rarer than that, or"
    price = f", costs {ahead.cost:,.0f}" if cluster.price_per_device_hour else ""
    yield (
        f"{tokens:.3g} tokens are {ahead.steps:,} steps: {ahead.hours:,.1f} hours{price}, of which "
        f"{100 * ahead.share_training:.1f} % train; {ahead.failures:.1f} failures are to be expected"
    )
    yield (
        f"save {when} ({ahead.save_every_seconds / 60:,.0f} min); a save that is not asynchronous takes "
        f"{ahead.save_seconds:.0f} s"
    )
    yield (
        f"this rests on {cluster.tflops:g} TFLOP/s at {cluster.matmul_share:.0%}, {cluster.node_gb_per_second:g} GB/s "
        f"in a node, {cluster.network_gb_per_second:g} between nodes, {cluster.disk_gb_per_second:g} to disk, a "
        f"failure every {cluster.device_hours_between_failures:,.0f} device hours and {cluster.restart_seconds:g} s to "
        "restart; --calibrate measures what this device does"
    )
