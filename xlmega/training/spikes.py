"""Steps that would do harm: recognised before any weight changes, and refused or left out by the recipe's rule.

In come each step's loss and gradient norm, which are the same on every rank; out goes the largest norm with which the
step may update, and what became of it in words. A step is bad where its loss or a gradient is not finite, or where the
norm of its gradient is above `spike_factor` times the median of the last steps that counted. `on_bad_step` says what
then: "stop" ends the run (NumericsError), "skip" leaves weights and moments as they are and goes on with the next
windows. Either names the windows. `max_bad_steps` in a row end the run in any case: then it is not the data.

Guaranteed: the decision depends on nothing but the steps before, and what it needs of them stands in the checkpoint, so
a resumed run decides as the run that was never stopped, in any layout up to rounding.
Source: PaLM (arXiv:2204.02311 §5.1) skips the batches around a spike; OLMo 2 (arXiv:2501.00656 §3.1) on spikes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from xlmega.errors import NumericsError
from xlmega.training.recipe import TrainingSettings

REMEMBERED = 64
"""Norms of which the median is taken."""
FEWEST = 16
"""With fewer nothing is called a spike."""


class Guard:
    """One for each run; every rank has the same."""

    def __init__(self, settings: TrainingSettings, state: Mapping[str, Any] | None = None):
        """`state` is what `table` gave at the step from which the run goes on."""
        self._settings, state = settings, state or {}
        self._norms: deque[float] = deque(map(float, state.get("norms", ())), maxlen=REMEMBERED)
        self._in_a_row = int(state.get("in_a_row", 0))
        self._skipped: list[dict[str, Any]] = [dict(one) for one in state.get("skipped", ())]

    @property
    def skips(self) -> bool:
        """Whether a bad step is left out; else it ends the run."""
        return self._settings.on_bad_step == "skip"

    def limit(self, loss: float) -> float:
        """The largest gradient norm with which a step of this loss may update; negative: none."""
        if not math.isfinite(loss):
            return -1.0
        return self._settings.spike_factor * self._median() if self._ready else math.inf

    def judge(self, step: int, loss: float, norm: float, skipped: bool, where: str, *, scaled: bool = False) -> str:
        """What is wrong with a step that was applied so, '' where nothing is; NumericsError where that ends the run.

        `where` names its windows. A norm that is not finite where losses are `scaled` (fp16) is the scale's affair.
        """
        if not skipped:
            self._norms.append(norm)
            self._in_a_row = 0
            return ""
        if scaled and math.isfinite(loss) and not math.isfinite(norm):
            return ""
        if not math.isfinite(loss):
            why = f"its loss is {loss}"
        elif not math.isfinite(norm):
            why = "a gradient is not finite, though its loss is"
        else:
            times = f"{self._settings.spike_factor:g} times the median {self._median():.4g}"
            why = f"the norm of its gradient, {norm:.4g}, is above {times} of the last {len(self._norms)} steps"
        words = f"step {step}: {why}. {where} No weight changed."
        self._in_a_row += 1
        if not self.skips:
            raise NumericsError(f"{words} With training.on_bad_step=skip such steps are left out.")
        if self._in_a_row > self._settings.max_bad_steps:
            raise NumericsError(
                f"{words} These are {self._in_a_row} bad steps in a row, and training.max_bad_steps is "
                f"{self._settings.max_bad_steps}: other windows do not help. Go back to an earlier checkpoint, or "
                "lower the learning rate."
            )
        self._skipped.append({"step": step, "why": why, "windows": where})
        return words

    def table(self) -> dict[str, Any]:
        """What a checkpoint keeps, for `state`."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row, "skipped": list(self._skipped)}

    @property
    def _ready(self) -> bool:
        return self._settings.spike_factor > 0 and len(self._norms) >= FEWEST

    def _median(self) -> float:
        return statistics.median(self._norms)
