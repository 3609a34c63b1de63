"""What watches over a run while it trains: one object that the loop tells where it is.

In come the settings of the command line and the store in which the ranks met; out go beats for the watchdog, wishes to
stop, comparisons of replicas, and two small files that a monitor outside can read: `RUN/heartbeat.json` (always) and
`RUN/metrics.prom` (Prometheus' text format, when asked for). None of it changes what is learnt.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmega.errors import ConfigError
from xlmega.parallel.groups import Process
from xlmega.training.stopping import StopRequest
from xlmega.training.stragglers import in_words
from xlmega.training.watchdog import STEP, Store, Watchdog

if TYPE_CHECKING:
    from xlmega.training.engine import Engine

HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class SupervisionSettings:
    """From the command line of pretrain.py; none of it is part of a recipe."""

    hang_timeout_seconds: float = 900.0
    """No progress for so long is a hang; a training step's own limit is less once its length is known. 0: no watch."""
    silent_seconds: float = 60.0
    """A rank that has not been heard of for so long is lost."""
    check_replicas_every_steps: int = 0
    """Compare the parameters that ranks hold in common; 0: never."""
    prometheus: bool = False
    straggler_seconds: float = 60.0
    """How often is looked for a rank that the others wait for; 0: never."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.hang_timeout_seconds < 1e8 or not 1.0 <= self.silent_seconds < 1e8:
            raise ConfigError(
                f"--hang_timeout_seconds {self.hang_timeout_seconds} and --silent_seconds {self.silent_seconds} are "
                "seconds to wait: the first 0 (no watch) or more, the second at least 1."
            )
        if not 0.0 <= self.straggler_seconds < 1e8:
            raise ConfigError(f"--straggler_seconds {self.straggler_seconds} is not a time; 0 never looks.")
        if self.check_replicas_every_steps < 0:
            raise ConfigError(
                f"--check_replicas_every_steps {self.check_replicas_every_steps} is negative; 0 never compares."
            )

    @property
    def longest_silence_seconds(self) -> float:
        """After which the watch has told of any hang, and torch may end the run in its own words; a day without one."""
        return 2 * (self.hang_timeout_seconds + self.silent_seconds) if self.hang_timeout_seconds else 86_400.0


class Supervisor:
    """Use as a context manager around the training of a run, in the main thread of every rank."""

    def __init__(
        self,
        settings: SupervisionSettings,
        store: Store,
        run: Path,
        process: Process,
    ) -> None:
        self.settings = settings
        self._run, self._speaker = run, process.rank == 0
        self.stop = StopRequest(run / "stop" if process.rank == 0 else None)
        self._dog = (
            Watchdog(
                store,
                process.rank,
                process.world_size,
                folder=run / "hang",
                host=socket.gethostname(),
                timeout_seconds=settings.hang_timeout_seconds,
                silent_seconds=settings.silent_seconds,
            )
            if settings.hang_timeout_seconds
            else None
        )
        self._troubled = False
        self._wrote, self._compared = float("-inf"), time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Supervisor:
        self._stack.enter_context(self.stop)
        if self._dog:
            self._stack.enter_context(self._dog)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def begins(self, step: int, doing: str) -> None:
        """The main thread begins `doing` ('data', 'step', 'save', ...) at `step`."""
        if self._dog:
            self._dog.beat(step, doing)

    def step(self, step: int) -> None:
        """The main thread begins the forward and backward pass of `step`."""
        self.begins(step, STEP)

    def done(self, step: int, engine: Engine, record: Mapping[str, Any] | None) -> str:
        """`step` updates are done; `record` is what metrics told of the last (rank 0's).

        What rank 0 has to say of slow ranks and of files that it cannot keep, now and then; '' for nothing.
        """
        if self._dog:
            self._dog.waits(engine.waited_seconds)
        every = self.settings.check_replicas_every_steps
        if every and step % every == 0:
            from xlmega.training.replicas import check_replicas  # megatron-core: the supervisor's tests do without

            self.begins(step, "replicas")
            check_replicas(engine, step)
        if self._speaker and record is not None and time.monotonic() - self._wrote >= HEARTBEAT_SECONDS:
            self._wrote = time.monotonic()
            if trouble := self._tell(step, record):
                return trouble
        every_seconds = self.settings.straggler_seconds
        if not self._dog or not self._speaker or not every_seconds or time.monotonic() - self._compared < every_seconds:
            return ""
        self._compared = time.monotonic()
        waits, hosts, seconds = self._dog.waits_of_all()
        return in_words(waits, seconds, engine.layout, hosts) if len(waits) == engine.layout.world_size else ""

    def _tell(self, step: int, record: Mapping[str, Any]) -> str:
        """Write what a monitor reads; what is wrong, in words, when it is wrong for the first time."""
        figures = {key: value for key, value in record.items() if isinstance(value, (int, float)) and isfinite(value)}
        texts = {"heartbeat.json": json.dumps({"time": time.time(), "step": step, **figures}) + "\n"}
        if self.settings.prometheus:
            texts["metrics.prom"] = prometheus(self._run.name, step, record)
        trouble = []
        for name, text in texts.items():
            try:
                _replace(self._run / name, text)
            except OSError as error:  # whether the run can go on is the checkpoint's to tell
                trouble.append(f"'{self._run / name}' cannot be written: {error.strerror}")
        news, self._troubled = bool(trouble) and not self._troubled, bool(trouble)
        return f"note: {'; '.join(trouble)}. A monitor will not see this run." if news else ""


def prometheus(run: str, step: int, record: Mapping[str, Any]) -> str:
    """The record in Prometheus' text format: a gauge for each figure, with a label for the run and the language."""
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    lines = ["# TYPE xlmega_step counter", f'xlmega_step{{run="{label}"}} {step}']
    for name, value in record.items():
        if isinstance(value, (int, float)):
            lines += [f"# TYPE xlmega_{name} gauge", f'xlmega_{name}{{run="{label}"}} {float(value):.9g}']
        elif isinstance(value, Mapping) and value and all(isinstance(one, (int, float)) for one in value.values()):
            lines.append(f"# TYPE xlmega_{name} gauge")
            lines += [f'xlmega_{name}{{run="{label}",language="{key}"}} {float(one):.9g}' for key, one in value.items()]
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
