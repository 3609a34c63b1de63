"""What is learnt: a recipe file, presets and `--set` overrides in, one frozen Recipe out.

A recipe is TOML with the tables [model], [data], [optimizer], [training] and [init]; nothing in it says how many ranks
run it. The name of a file in xlmega/recipes/ stands for that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xlmega import config
from xlmega.data.settings import CHANGEABLE, DataSettings
from xlmega.errors import ConfigError, nearest
from xlmega.models import config as models
from xlmega.models.config import ModelConfig
from xlmega.schedules import Stages, constant
from xlmega.training.optimizer import OptimizerSettings

FIGURES = ("nats_per_token", "bits_per_byte")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class TrainingSettings:
    """Length and rhythm of a run."""

    total_steps: int
    batch_windows: int | tuple[tuple[int, ...], ...]
    """Windows of a step, over all ranks; or [[0, 64], [1000, 256]]: each from a step on."""
    seed: int = 0
    """Of initial weights, data order and dropout."""
    log_every_steps: int = 1
    """How often the progress line is printed; metrics.jsonl has every step."""
    validate_every_steps: int = 0
    """Validation also comes before the first step and after the last; 0: only then."""
    validation_windows: int = 64
    """Most windows of each language in a validation set."""
    save_every_steps: int = 0
    """A checkpoint also comes after the last step; 0: only then."""
    keep_checkpoints: int = 3
    """The newest ones; 0 keeps all."""
    keep_every_steps: int = 0
    """Checkpoints of steps that this divides are kept too; 0: none."""
    keep_best: str = ""
    """The checkpoint with the lowest validation figure is kept too, as in "valid/bits_per_byte"; empty: none."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What to do with a step that would do harm: end the run, or leave its windows out."""
    spike_factor: float = 0.0
    """A gradient norm above so many times the median of the last 64 steps is harm too; 0: only what is not finite."""
    max_bad_steps: int = 8
    """More in a row end the run, where they are skipped."""

    def problems(self) -> Iterator[str]:
        for name in ("total_steps", "log_every_steps", "validation_windows"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, but is {getattr(self, name)}."
        yield from self._problems_of_batches()
        for name in ("seed", "validate_every_steps", "save_every_steps", "keep_checkpoints", "keep_every_steps"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."
        if self.spike_factor and not self.spike_factor > 1:
            yield f"spike_factor is a multiple of the usual gradient norm, above 1, or 0; it is {self.spike_factor}."
        if self.max_bad_steps < 1:
            yield f"max_bad_steps must be at least 1, but is {self.max_bad_steps}; on_bad_step=stop allows none."
        if self.keep_checkpoints == 0 and (self.keep_every_steps or self.keep_best):
            yield "keep_checkpoints=0 keeps every checkpoint. With keep_every_steps or keep_best set it to 1 or more."
        if self.keep_every_steps and (not self.save_every_steps or self.keep_every_steps % self.save_every_steps):
            yield (
                f"keep_every_steps={self.keep_every_steps} must be a multiple of save_every_steps="
                f"{self.save_every_steps}, or there is nothing to keep."
            )
        if not self.keep_best:
            return
        if self.keep_best.partition("/")[2] not in FIGURES:
            yield f"keep_best is 'SET/FIGURE' with FIGURE one of {', '.join(FIGURES)}, but is '{self.keep_best}'."
        if not self.validate_every_steps or self.save_every_steps % self.validate_every_steps:
            yield (
                f"keep_best compares validations at saved steps: save_every_steps={self.save_every_steps} must be a "
                f"multiple of validate_every_steps={self.validate_every_steps}."
            )

    def _problems_of_batches(self) -> Iterator[str]:
        if isinstance(self.batch_windows, int):
            if self.batch_windows < 1:
                yield f"batch_windows must be at least 1, but is {self.batch_windows}."
            return
        stages = [list(stage) for stage in self.batch_windows]
        if not stages or any(len(stage) != 2 or stage[0] < 0 or stage[1] < 1 for stage in stages):
            yield f"batch_windows must be a number or pairs of step and windows, [[0, 64], [1000, 256]], not {stages}."
            return
        starts = [stage[0] for stage in stages]
        if starts[0] != 0 or starts != sorted(set(starts)):
            yield f"batch_windows begins at step 0 and goes on in ascending steps, but its steps are {starts}."
        elif starts[-1] >= self.total_steps:
            yield f"batch_windows changes at step {starts[-1]}, but the run ends at {self.total_steps}."

    @property
    def batch(self) -> Stages[int]:
        """Windows of a step, by step."""
        if isinstance(self.batch_windows, int):
            return constant(self.batch_windows)
        starts, sizes = zip(*self.batch_windows, strict=True)
        return Stages(starts, sizes)


@dataclass(frozen=True)
class InitSettings:
    """Where the first weights come from."""

    weights: str = ""
    """A run, checkpoint, logical or Hugging Face directory; empty: drawn from training.seed."""


@dataclass(frozen=True)
class Recipe:
    """All that fixes the loss curve."""

    model: ModelConfig
    training: TrainingSettings
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    init: InitSettings = field(default_factory=InitSettings)


# Changing these between two starts of a run does not change what is learnt.
FREE_ON_RESUME = {
    "data.root",
    "training.log_every_steps",
    "training.validate_every_steps",
    "training.validation_windows",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.keep_best",
    # They change what is learnt only where the run would have ended, and checkpoints tell which steps were left out.
    "training.on_bad_step",
    "training.spike_factor",
    "training.max_bad_steps",
}
# Changing these changes what is served, from the resumed step on.
CHANGES_THE_DATA = {*(f"data.{name}" for name in CHANGEABLE), "training.batch_windows"}


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name or path, with `--set` overrides on top."""
    table = config.with_overrides(config.read_toml(recipe_path(name)), overrides)
    return build_recipe(table, what=f"recipe '{name}'")


def build_recipe(table: dict[str, Any], *, what: str = "recipe") -> Recipe:
    """A checked Recipe from its tables."""
    if isinstance(table.get("model"), dict):
        table = {**table, "model": models.resolve(table["model"])}
    return config.build(Recipe, table, what=what)


def recipe_path(name: str) -> Path:
    """xlmega/recipes/NAME.toml, or NAME as a path."""
    shipped = RECIPES / f"{name}.toml"
    if shipped.is_file():
        return shipped
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    raise ConfigError(f"no recipe '{name}'.{nearest(name, (path.stem for path in RECIPES.glob('*.toml')))}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """{'training.seed': '0 -> 1'} for every value that differs between two recipes as tables and matters."""
    return dict(sorted(_differences(old, new, "")))


def _differences(old: dict[str, Any], new: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for key in {*old, *new}:
        here = f"{path}{key}"
        leaf = here in CHANGES_THE_DATA or here in FREE_ON_RESUME
        if not leaf and isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from _differences(old[key], new[key], f"{here}.")
        elif old.get(key) != new.get(key) and here not in FREE_ON_RESUME:
            yield here, f"{old.get(key)!r} -> {new.get(key)!r}"
