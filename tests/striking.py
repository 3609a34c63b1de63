"""Faults that strike one rank of a run, or all, at a chosen moment: for tests of what becomes of the run.

`arrange(fault, rank)` is called in each rank before pretrain.py's main; nothing in xlmega knows of it. The rank that is
to strike waits for the fault's moment to come for the n-th time in this life, notes the time in `marker`, and strikes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOMENTS = ("joining", "meeting", "init", "forward", "reduce", "save", "publish", "evaluation")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGINT")


@dataclass(frozen=True)
class Fault:
    """What strikes where and when."""

    kind: str
    """A signal's name, or one of the strikes below."""
    moment: str
    rank: int
    everyone: bool = False
    """The signal goes to all ranks at once; `rank` sends it."""
    nth: int = 1
    """At which of the moments in this life."""
    marker: str = ""
    """File that tells when it struck."""


def arrange(fault: Fault, rank: int) -> None:
    """Have the fault strike this process, if it is this rank's."""
    if rank != fault.rank:
        return
    if fault.kind in PREPARED:
        PREPARED[fault.kind](fault)
        return
    strike = STRIKES.get(fault.kind) or (lambda: _signal(fault))
    at(fault.moment, fault.nth, lambda: (mark(fault), strike()))


def mark(fault: Fault) -> None:
    """Note that the fault strikes now."""
    if fault.marker:
        Path(fault.marker).write_text(f"{time.monotonic()!r} {os.getpid()}")  # one clock for all of a machine


def at(moment: str, nth: int, strike: Callable[[], object]) -> None:
    """Call `strike` in this process when the moment comes for the n-th time."""
    seen = [0]

    def pass_by() -> None:
        seen[0] += 1
        if seen[0] == nth:
            strike()

    _HOOKS[moment](pass_by)


# -------------------------------------------------------------------- moments


def _joining(pass_by: Callable[[], None]) -> None:
    """All ranks have come to the meeting point and are about to connect."""
    import torch.distributed as dist

    _before(dist, "init_process_group", pass_by)


def _meeting(pass_by: Callable[[], None]) -> None:
    """All ranks are connected; versions and devices are about to be compared."""
    from xlmega.parallel import groups

    _before(groups, "meeting_store", pass_by)


def _init(pass_by: Callable[[], None]) -> None:
    from xlmega.training.engine import Engine

    _before(Engine, "__init__", pass_by)


def _forward(pass_by: Callable[[], None]) -> None:
    """Between two micro-batches of a training step, or before its only one."""
    from xlmega.training.engine import Engine

    real, training = Engine._micro_batches, [False]

    def fed(self: Any, batch: Any, unit: float) -> Iterator[Any]:
        for index, one in real(self, batch, unit):
            if training[0] and index == batch.tokens.shape[0] - 1:
                training[0] = False
                pass_by()
            yield index, one

    _before(Engine, "forward_backward", lambda: training.__setitem__(0, True))
    setattr(Engine, "_micro_batches", fed)  # noqa: B010


def _reduce(pass_by: Callable[[], None]) -> None:
    """Gradients are there; the sum over ranks is about to begin (ZeRO 0 and 1)."""
    from xlmega.training.engine import Engine

    _before(Engine, "_sum_tied_embedding", pass_by)


def _save(pass_by: Callable[[], None]) -> None:
    """The first piece of this rank's file is written."""
    from xlmega.training import saving

    real = saving._write_rank

    def write(part: Any, shapes: Any, pieces: Callable[[], Iterator[Any]]) -> None:
        def some() -> Iterator[Any]:
            for number, piece in enumerate(pieces()):
                if number == 1:
                    pass_by()
                yield piece

        real(part, shapes, some)

    setattr(saving, "_write_rank", write)  # noqa: B010


def _publish(pass_by: Callable[[], None]) -> None:
    """Rank 0: the folder is complete and about to be renamed. Others: they wait for that."""
    from xlmega.training import saving

    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        _before(saving.storage, "move_folder", pass_by)
    else:
        _before(saving, "_told", pass_by)


def _evaluation(pass_by: Callable[[], None]) -> None:
    from xlmega.training.engine import Engine

    _before(Engine, "evaluate", pass_by)


_HOOKS = dict(zip(MOMENTS, (_joining, _meeting, _init, _forward, _reduce, _save, _publish, _evaluation), strict=True))


def _before(place: Any, name: str, pass_by: Callable[[], None]) -> None:
    real = getattr(place, name)

    def stand_in(*arguments: Any, **keywords: Any) -> Any:
        pass_by()
        return real(*arguments, **keywords)

    setattr(place, name, stand_in)


# -------------------------------------------------------------------- strikes


def _signal(fault: Fault) -> None:
    number = signal.Signals[fault.kind]
    if fault.everyone:
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)
    time.sleep(0.05)  # a handler runs before anything else does


def _raise() -> None:
    raise ZeroDivisionError("injected")


def _stand_still() -> None:
    time.sleep(3600)


STRIKES: dict[str, Callable[[], object]] = {
    "exception": _raise,
    "segfault": lambda: ctypes.string_at(0),
    "stuck": _stand_still,
}


def _never_starts(fault: Fault) -> None:
    mark(fault)
    os._exit(1)


def _loader_error(fault: Fault) -> None:
    _loader(fault, lambda: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error (injected)")))


def _loader_stuck(fault: Fault) -> None:
    _loader(fault, _stand_still)


def _loader(fault: Fault, strike: Callable[[], object]) -> None:
    from xlmega.data.batches import Batches

    seen = [0]

    def pass_by() -> None:
        seen[0] += 1
        if seen[0] >= fault.nth:
            mark(fault)
            strike()

    _before(Batches, "at", pass_by)


def _disk_full(fault: Fault) -> None:
    """ENOSPC for the first file operation after the moment, once."""
    import faults

    from xlmega.weights import storage

    module: Any = storage
    stand_in = module.os = faults.FaultyOs(10**9, faults.FULL)
    at(fault.moment, fault.nth, lambda: (mark(fault), stand_in.arm(1)))


def _metrics_full(fault: Fault) -> None:
    """metrics.jsonl takes no byte for three lines (rank 0's)."""
    from xlmega.training import metrics

    seen = [0]

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: bytes) -> int:
            seen[0] += 1
            if fault.nth <= seen[0] < fault.nth + 3:
                mark(fault)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.write(descriptor, data)

    setattr(metrics, "os", Full())  # noqa: B010


def _nan_gradient(fault: Fault) -> None:
    """In a gradient of a parameter that all tensor-parallel ranks hold whole."""
    from xlmega.training.engine import Engine
    from xlmega.training.norms import gradient_of

    summed, passed, seen = Engine._sum_tied_embedding, Engine.forward_backward, [0]

    def now() -> bool:
        seen[0] += 1
        if seen[0] == fault.nth:
            mark(fault)
        return seen[0] == fault.nth

    def poisoned(self: Any) -> None:
        if now():
            gradient_of(self.shards[-1][1]).view(-1)[0] = float("nan")
        summed(self)

    def poisoned_on_the_way(self: Any, *arguments: Any, **keywords: Any) -> Any:
        """Stages 2 and 3 give gradients away while they are made."""
        if not self.runtime.uses_schedule and now():
            hook = self.shards[-1][1].register_hook(lambda gradient: gradient * float("nan"))
            try:
                return passed(self, *arguments, **keywords)
            finally:
                hook.remove()
        return passed(self, *arguments, **keywords)

    setattr(Engine, "_sum_tied_embedding", poisoned)  # noqa: B010
    setattr(Engine, "forward_backward", poisoned_on_the_way)  # noqa: B010


def _perturbed(fault: Fault) -> None:
    """The lowest bit of one weight that others hold too, after the n-th update."""
    import torch

    from xlmega.training.engine import Engine

    real, seen = Engine.apply, [0]

    def apply(self: Any, *arguments: Any, **keywords: Any) -> Any:
        told = real(self, *arguments, **keywords)
        seen[0] += 1
        if seen[0] == fault.nth:
            mark(fault)
            whole = next(p for shard, p in self.shards if shard.axis is None)
            bits = whole.data.view(-1).view(dtype=torch.int32)
            bits[0] ^= 1
        return told

    setattr(Engine, "apply", apply)  # noqa: B010


def _clock(fault: Fault) -> None:
    mark(fault)
    real = time.time
    setattr(time, "time", lambda: real() + 100.0)  # noqa: B010


def _other_version(fault: Fault) -> None:
    from xlmega.training import run

    real = run.versions
    mark(fault)
    setattr(run, "versions", lambda: {**real(), "torch": "1.0"})  # noqa: B010


def _other_code(fault: Fault) -> None:
    from xlmega.training import run

    mark(fault)
    setattr(run, "code_hash", lambda: "0123456789abcdef")  # noqa: B010


def _waits(fault: Fault) -> None:
    """At the moment the rank waits for a file of the marker's name with '.go' added: others may act meanwhile."""

    def wait() -> None:
        mark(fault)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not Path(f"{fault.marker}.go").exists():
            time.sleep(0.02)

    at(fault.moment, fault.nth, wait)


def _slow(fault: Fault) -> None:
    """Every training step takes 0.2 s longer."""
    from xlmega.training.engine import Engine

    _before(Engine, "forward_backward", lambda: time.sleep(0.2))


PREPARED: dict[str, Callable[[Fault], None]] = {
    "never starts": _never_starts,
    "loader error": _loader_error,
    "loader stuck": _loader_stuck,
    "disk full": _disk_full,
    "metrics full": _metrics_full,
    "NaN gradient": _nan_gradient,
    "perturbed": _perturbed,
    "clock": _clock,
    "version": _other_version,
    "code": _other_code,
    "waits": _waits,
    "slow": _slow,
}


def from_environment() -> None:
    """The fault in STRIKE (a dictionary in JSON), unless its marker says that it has struck already."""
    fault = Fault(**json.loads(os.environ["STRIKE"]))
    if not Path(fault.marker).exists():
        arrange(fault, int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "-1"))))


def pace(seconds: float) -> None:
    """Have each training step last so long at least."""
    from xlmega.training.engine import Engine

    begun = [0.0]

    def wait() -> None:
        time.sleep(max(0.0, begun[0] + seconds - time.monotonic()))
        begun[0] = time.monotonic()

    _before(Engine, "forward_backward", wait)
