"""What is learnt: a recipe file, presets and `--set` overrides in, one frozen Recipe out.

A recipe is TOML with the tables [model], [data], [optimizer], [training] and [init]; nothing in it says how many ranks
run it. The name of a file in xlmega/recipes/ stands for that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xlmega import config
from xlmega.data.blend import DataSettings
from xlmega.errors import ConfigError, nearest
from xlmega.models import config as models
from xlmega.models.config import ModelConfig
from xlmega.training.optimizer import OptimizerSettings

FIGURES = ("nats_per_token", "bits_per_byte")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class TrainingSettings:
    """Length and rhythm of a run."""

    total_steps: int
    batch_windows: int
    """Windows of a step, over all ranks."""
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

    def problems(self) -> Iterator[str]:
        for name in ("total_steps", "batch_windows", "log_every_steps", "validation_windows"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, but is {getattr(self, name)}."
        for name in ("seed", "validate_every_steps", "save_every_steps", "keep_checkpoints", "keep_every_steps"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."
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
}


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


def differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    """'training.seed: 0 -> 1' for every value that differs between two recipes as tables."""
    for key in sorted({*old, *new}):
        here = f"{path}{key}"
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict) and key != "languages":
            yield from differences(old[key], new[key], f"{here}.")
        elif old.get(key) != new.get(key) and here not in FREE_ON_RESUME:
            yield f"{here}: {old.get(key)!r} -> {new.get(key)!r}"
