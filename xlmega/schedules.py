"""Whatever changes during training, as pure functions of the step.

A schedule is a frozen value with `at(step)`; steps count from 0. Nothing here has state, so a resumed run asks the
same question and gets the same answer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Stages(Generic[T]):
    """values[k] holds from starts[k] (inclusive) until starts[k + 1] (exclusive); starts[0] is 0."""

    starts: tuple[int, ...]
    values: tuple[T, ...]

    def __post_init__(self) -> None:
        assert self.starts and self.starts[0] == 0 and len(self.starts) == len(self.values), self
        assert all(a < b for a, b in pairwise(self.starts)), self

    def at(self, step: int) -> T:
        """The value that holds at `step`; the last one holds for ever."""
        assert step >= 0, step
        return self.values[bisect_right(self.starts, step) - 1]


def constant(value: T) -> Stages[T]:
    """One value for ever."""
    return Stages((0,), (value,))


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then a decay to `minimum` that ends at `decay_steps` and stays there.

    The warm-up multiplies the decay curve (as Languini does, METHODS §1.7: the cosine starts at step 0); with
    `warmup_first` the decay begins where the warm-up ends (the more usual form). Step 0 of a warm-up of W steps has
    1/W of the peak, so that no step is wasted on a learning rate of zero.
    """

    peak: float
    minimum: float
    warmup_steps: int
    decay_steps: int
    shape: str = "cosine"  # cosine, linear or constant
    warmup_first: bool = True

    def at(self, step: int) -> float:
        """Learning rate of `step`."""
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.warmup_first and step < self.warmup_steps:
            return self.peak * ramp
        start = self.warmup_steps if self.warmup_first else 0
        progress = min(1.0, max(0.0, (step - start) / max(1, self.decay_steps - start)))
        if self.shape == "constant":
            left = 1.0
        elif self.shape == "linear":
            left = 1.0 - progress
        else:
            assert self.shape == "cosine", self.shape
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        decayed = self.minimum + (self.peak - self.minimum) * left
        return decayed if self.warmup_first else decayed * ramp
