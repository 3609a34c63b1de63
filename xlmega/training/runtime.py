"""How a run is executed: a DeepSpeed JSON checked against the recipe and the layout, before anything is allocated.

In come the JSON and a Layout; out go a frozen `Runtime` and the dictionary that DeepSpeed gets. What is learnt lives in
the recipe: a JSON that holds an optimizer, a schedule, clipping or a batch size is refused with the key to use instead.
Pairs of settings that cannot work (DeepSpeed 0.19.8 with Megatron-core 0.16.1) are refused with the nearest that does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError, nearest
from xlmega.parallel.layout import Layout

# DeepSpeed's own default, in values. It allocates a bucket whole (2 GB in fp32) for however small a model.
LARGEST_BUCKET = 500_000_000
_RECIPE_KEYS = {
    "optimizer": "the [optimizer] table",
    "scheduler": "the [optimizer] table",
    "gradient_clipping": "optimizer.gradient_clipping",
    "train_batch_size": "training.batch_windows",
    "gradient_accumulation_steps": "training.batch_windows (it follows from that, dp and the micro-batch)",
    "data_types": "no file: gradients are always accumulated in fp32",
    "steps_per_print": "training.log_every_steps",
    "activation_checkpointing": "--recompute",
    "pipeline": "--pp and --virtual_stages",
    "amp": "'bf16' or 'fp16' of this file",
    "wandb": "--wandb",
    "tensorboard": "--tensorboard",
}
# DeepSpeed ignores a top-level key that it does not know, so "zero_optimisation" would silently be no ZeRO at all.
_KEYS = (
    "train_micro_batch_size_per_gpu", "zero_optimization", "bf16", "fp16", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio",
)  # fmt: skip
_TABLE_KEYS = {
    "bf16": (
        "enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    "fp16": (
        "enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
        "consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads",
    ),
    "zero_optimization": (
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
        "allgather_partitions", "allgather_bucket_size", "overlap_comm", "offload_param", "offload_optimizer",
        "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
        "round_robin_gradients", "zero_hpz_partition_size", "zero_quantized_weights",
        "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
        "log_trace_cache_warnings",
    ),
}  # fmt: skip


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

    def describe(self) -> str:
        """'ZeRO-1, bf16'."""
        return f"ZeRO-{self.zero_stage}, {self.precision}"

    def for_deepspeed(
        self, *, gradient_clipping: float, micro_batches: int, num_parameters: int = LARGEST_BUCKET
    ) -> dict[str, Any]:
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
            zero.setdefault("reduce_bucket_size", min(LARGEST_BUCKET, num_parameters))
        return settings


def read_runtime(path: Path) -> Runtime:
    """The Runtime of a DeepSpeed JSON file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no DeepSpeed settings at '{path}'. ds_configs/ holds five to start from.") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read as a JSON file: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid JSON: {error}.") from None
    return runtime(settings, what=str(path))


def runtime(settings: Mapping[str, Any], *, what: str = "ds_config") -> Runtime:
    """A checked Runtime; every key that belongs to the recipe is named in one error."""
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{what} must hold a JSON object of DeepSpeed settings, but holds {settings!r}.")
    misplaced = [f"'{key}' lives in {place}" for key, place in _RECIPE_KEYS.items() if key in settings]
    if misplaced:
        raise ConfigError(f"{what} says how a run is executed, not what is learnt: {'; '.join(misplaced)}.")
    _check_keys(settings, _KEYS, what)
    zero, bf16, fp16 = (_table(settings, name, what) for name in ("zero_optimization", "bf16", "fp16"))
    if "train_micro_batch_size_per_gpu" not in settings:
        raise ConfigError(f'{what} must set "train_micro_batch_size_per_gpu" (windows per rank and micro-batch).')
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{what}: zero_optimization.stage is {stage!r}; it may be 0, 1, 2 or 3.")
    if zero.get("overlap_comm") and stage == 1:
        raise ConfigError(
            f"{what}: overlap_comm reduces during DeepSpeed's own backward pass, but at stage 1 the pipeline schedule "
            "runs it. Drop overlap_comm, or use stage 2."
        )
    if zero.get("round_robin_gradients"):
        raise ConfigError(
            f"{what}: with round_robin_gradients DeepSpeed 0.19.8 gives out other parameters' optimizer state than was "
            "asked for, so a checkpoint would be wrong. Drop it."
        )
    for kind, table in (("bf16", bf16), ("fp16", fp16)):
        if not isinstance(table.get("enabled", False), bool):
            raise ConfigError(f"{what}: {kind}.enabled must be true or false, but is {table['enabled']!r}.")
    on = [kind for kind, table in (("bf16", bf16), ("fp16", fp16)) if table.get("enabled")]
    if len(on) == 2:
        raise ConfigError(f"{what} enables both bf16 and fp16. Keep one.")
    devices = {name: _table(zero, name, what).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    for name, device in devices.items():
        if device not in ("none", "cpu"):
            raise ConfigError(f"{what}: {name}.device is {device!r}; it may be 'cpu' or 'none'.")
    if devices["offload_param"] == "cpu" and stage != 3:
        raise ConfigError(f"{what}: offload_param needs ZeRO stage 3, but the stage is {stage}. Drop it, or use 3.")
    micro = settings["train_micro_batch_size_per_gpu"]
    if type(micro) is not int or micro < 1:
        raise ConfigError(f"{what}: train_micro_batch_size_per_gpu must be a whole number from 1, but is {micro!r}.")
    return Runtime(stage, on[0] if on else "fp32", micro, devices["offload_optimizer"] == "cpu", dict(settings))


def _table(settings: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any]:
    """The table of that name (empty where it is not given), with only keys that DeepSpeed knows."""
    table = settings.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{what}: '{name}' must be an object of keys, but is {table!r}.")
    if name in _TABLE_KEYS:
        _check_keys(table, _TABLE_KEYS[name], what, f"{name}.")
    return table


def _check_keys(table: Mapping[str, Any], known: Iterable[str], what: str, path: str = "") -> None:
    unknown = [f"{what} has no key '{path}{key}'.{nearest(key, known)}" for key in table if key not in known]
    if unknown:
        raise ConfigError("\n  ".join(unknown))


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
