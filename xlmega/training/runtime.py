"""How a run is executed: a DeepSpeed JSON checked against the recipe and the layout, before anything is allocated.

In come the JSON and a Layout; out go a frozen `Runtime` and the dictionary that DeepSpeed gets. What is learnt lives in
the recipe: a JSON that holds an optimizer, a schedule, clipping or a batch size is refused with the key to use instead.
Pairs of settings that cannot work (DeepSpeed 0.19.8 with Megatron-core 0.16.1) are refused with the nearest that does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError
from xlmega.parallel.layout import Layout

_RECIPE_KEYS = {
    "optimizer": "the [optimizer] table",
    "scheduler": "the [optimizer] table",
    "gradient_clipping": "optimizer.gradient_clipping",
    "train_batch_size": "training.batch_windows",
    "gradient_accumulation_steps": "training.batch_windows (it follows from that, dp and the micro-batch)",
    "data_types": "nothing: gradients are always accumulated in fp32",
    "steps_per_print": "training.log_every_steps",
}


@dataclass(frozen=True)
class Runtime:
    """What the engine needs to know of the DeepSpeed JSON."""

    zero_stage: int
    precision: str
    """fp32, bf16 or fp16."""
    micro_batch_windows: int
    offload_optimizer: bool
    settings: Mapping[str, Any]
    """The JSON as given, completed by `for_deepspeed`."""

    @property
    def uses_schedule(self) -> bool:
        """Megatron's schedule drives the step (stages 0 and 1); stages 2 and 3 reduce while going backward."""
        return self.zero_stage <= 1

    def for_deepspeed(self, *, gradient_clipping: float, micro_batches: int) -> dict[str, Any]:
        """The dictionary for `deepspeed.initialize`; `micro_batches` is this rank's number of them in a step."""
        settings: dict[str, Any] = json.loads(json.dumps(self.settings))
        settings["train_micro_batch_size_per_gpu"] = self.micro_batch_windows
        settings["gradient_accumulation_steps"] = 1 if self.uses_schedule else micro_batches
        # Without ZeRO DeepSpeed clips each pipeline stage by itself; the engine then clips over the whole model.
        settings["gradient_clipping"] = gradient_clipping if self.zero_stage else 0.0
        settings["steps_per_print"] = 2**40
        settings["zero_allow_untested_optimizer"] = True
        settings["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's CPU Adam needs a compiler
        if self.precision != "fp32":
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.precision == "bf16":
            # Stage 1: the backward pass belongs to the schedule, so DeepSpeed's own accumulation never runs.
            settings["bf16"] = {**settings["bf16"], "immediate_grad_update": True, "check_grad_overflow": True}
        zero = settings.setdefault("zero_optimization", {})
        zero["stage"] = self.zero_stage
        if self.zero_stage:
            zero.setdefault("overlap_comm", False)
        return settings


def read_runtime(path: Path) -> Runtime:
    """The Runtime of a DeepSpeed JSON file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no DeepSpeed settings at '{path}'. ds_configs/ holds five to start from.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid JSON: {error}.") from None
    return runtime(settings, what=str(path))


def runtime(settings: Mapping[str, Any], *, what: str = "ds_config") -> Runtime:
    """A checked Runtime; every key that belongs to the recipe is named in one error."""
    misplaced = [f"'{key}' lives in {place}" for key, place in _RECIPE_KEYS.items() if key in settings]
    if misplaced:
        raise ConfigError(f"{what} says how a run is executed, not what is learnt: {'; '.join(misplaced)}.")
    if "train_micro_batch_size_per_gpu" not in settings:
        raise ConfigError(f'{what} must set "train_micro_batch_size_per_gpu" (windows per rank and micro-batch).')
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{what}: zero_optimization.stage is {stage!r}; it may be 0, 1, 2 or 3.")
    if zero.get("overlap_comm") and stage == 1:
        raise ConfigError(
            f"{what}: overlap_comm reduces during DeepSpeed's own backward pass, but at stage 1 the pipeline schedule "
            "runs it. Drop overlap_comm, or use stage 2."
        )
    on = [kind for kind in ("bf16", "fp16") if settings.get(kind, {}).get("enabled")]
    if len(on) == 2:
        raise ConfigError(f"{what} enables both bf16 and fp16. Keep one.")
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload not in ("none", "cpu"):
        raise ConfigError(f"{what}: offload_optimizer.device is {offload!r}; it may be 'cpu' or 'none'.")
    micro = settings["train_micro_batch_size_per_gpu"]
    if not isinstance(micro, int) or micro < 1:
        raise ConfigError(f"{what}: train_micro_batch_size_per_gpu must be a whole number from 1, but is {micro!r}.")
    return Runtime(stage, on[0] if on else "fp32", micro, offload == "cpu", dict(settings))


def check_pair(runtime: Runtime, layout: Layout) -> None:
    """Refuse what this ZeRO stage, precision and layout cannot do together."""
    if runtime.zero_stage >= 2 and layout.pp > 1:
        raise ConfigError(
            f"ZeRO-{runtime.zero_stage} with pp={layout.pp}: stages 2 and 3 give gradients away while the backward "
            "pass runs, and a pipeline still adds to them. Use ZeRO-1 with pp, or pp=1 with a larger tp."
        )
    if runtime.zero_stage == 0 and runtime.precision != "fp32":
        raise ConfigError(
            f"ZeRO-0 with {runtime.precision}: DeepSpeed then accumulates gradients in {runtime.precision}, not fp32. "
            "Use ZeRO-1: with dp=1 it keeps the same memory."
        )
    if runtime.offload_optimizer and runtime.zero_stage == 0:
        raise ConfigError("offload_optimizer needs ZeRO stage 1, 2 or 3, but the stage is 0. Use stage 2.")
    if runtime.offload_optimizer and runtime.zero_stage == 1:
        raise ConfigError(
            "offload_optimizer at ZeRO-1 moves gradients during DeepSpeed's own backward pass, but the pipeline "
            "schedule runs it. Use stage 2 (pp=1) or 3 with offload_optimizer."
        )
