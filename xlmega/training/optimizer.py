"""AdamW over this rank's parameters, and the learning rate as a function of the step.

In come the recipe's [optimizer] table and named parameters; out go torch's AdamW in two groups (decayed or not) and a
LearningRate. DeepSpeed then owns the optimizer; nothing here has state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from xlmega.schedules import LearningRate


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, its learning rate and clipping. With weight_decay 0 it is Adam."""

    learning_rate: float = 6e-4
    min_learning_rate: float = 6e-5
    warmup_steps: int = 0
    decay_steps: int = 0
    """The step at which min_learning_rate is reached; 0: the last of the run."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_first: bool = True
    """False: the ramp multiplies a decay that starts at step 0 (Languini)."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices, not to biases and norms."""
    gradient_clipping: float = 1.0
    """Largest norm of the whole model's gradient; 0 does not clip."""

    def problems(self) -> Iterator[str]:
        if self.learning_rate <= 0:
            yield f"learning_rate must be positive, but is {self.learning_rate}."
        if self.min_learning_rate > self.learning_rate:
            yield f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}."
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield f"{name} must be in [0, 1), but is {getattr(self, name)}."
        steps = ("warmup_steps", "decay_steps")
        for name in (*steps, "min_learning_rate", "weight_decay", "gradient_clipping", "epsilon"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."


def learning_rate(settings: OptimizerSettings, total_steps: int) -> LearningRate:
    """The schedule of a run; a later `--stop_at` does not change it."""
    return LearningRate(
        settings.learning_rate,
        settings.min_learning_rate,
        settings.warmup_steps,
        settings.decay_steps or total_steps,
        settings.schedule,
        settings.warmup_first,
    )


def adamw(settings: OptimizerSettings, parameters: Iterable[tuple[torch.nn.Parameter, bool]]) -> torch.optim.Optimizer:
    """torch's AdamW over (parameter, decays?) pairs; fused where torch can."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p, decays in parameters if decays], "weight_decay": settings.weight_decay},
        {"params": [p for p, decays in parameters if not decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
