"""DeepSpeed's optimizer and ZeRO under Megatron-core's schedules, behind four verbs.

In come this rank's model chunks and micro-batches; out go losses, updated weights, and any state as logical shards.
`forward_backward` runs the micro-batches of a step, `apply` updates the weights, `evaluate` scores without training,
and `read_state` / `write_state` exchange fp32 weights and moments with checkpoints and initial weights.

Guaranteed: the loss is normalised by the step's count of targets over all ranks, so that data-parallel size and
micro-batch split do not change it; the gradient norm is the whole model's, each parameter counted once; a loss or
gradient that is not finite stops the run before any weight changes. All ranks must call every method together.

Two paths lead through a step. With ZeRO stages 0 and 1 Megatron's schedule (1F1B, interleaved, or none) runs on the
bare modules and DeepSpeed reduces and steps afterwards; stages 2 and 3 reduce while going backward, so DeepSpeed's own
forward and backward are used (pp is 1 there). The only file that may import deepspeed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from xlmega.data.batches import Batch
from xlmega.errors import ConfigError, NumericsError
from xlmega.models import specs
from xlmega.models.config import ModelConfig
from xlmega.models.decoder import Decoder, MicroBatch, build_stages
from xlmega.parallel.groups import Mpu
from xlmega.parallel.layout import Layout
from xlmega.training.norms import GradientNorm, gradient_of
from xlmega.training.optimizer import OptimizerSettings, adamw
from xlmega.training.runtime import Runtime
from xlmega.weights.shards import LogicalSource, Shard, shards_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _deepspeed(device: torch.device, precision: str) -> Any:
    """The deepspeed module, ready for this device."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Built with a C++ compiler at start (20 s, and there may be none); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo" if device.type == "cpu" else "nccl", dist_init_required=False, verbose=False
    )
    if device.type == "cpu" and precision == "fp16":
        # torch computes fp16 on a CPU; DeepSpeed's accelerator says that it cannot (0.19.8).
        accelerator = type(deepspeed.get_accelerator())
        accelerator.is_fp16_supported = lambda accelerator: True
        accelerator.supported_dtypes = lambda accelerator: list(DTYPES.values())
    return deepspeed


@contextlib.contextmanager
def _settings_refused() -> Iterator[None]:
    """DeepSpeed checks its settings with pydantic; what it says of them is a user's error."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, one['loc']))}: {one['msg']} (given: {one['input']!r})" for one in error.errors()
        )
        raise ConfigError(f"DeepSpeed refuses its settings. {'; '.join(problems)}.") from None


@dataclass(frozen=True)
class Report:
    """What a pass over a batch found, summed over all ranks."""

    nll: tuple[float, ...]
    """Sum of negative log-likelihoods in nats, per language."""
    targets: tuple[float, ...]
    """Number of predicted tokens (sum of weights), per language."""
    extra: tuple[float, ...] = ()
    """What the caller gave as `extra`, summed over data-parallel ranks; in training, first `Batch.served`."""
    wishes: int = 0
    """How many ranks wished to stop; the same on every rank."""

    @property
    def loss(self) -> float:
        """Mean nats per predicted token over all languages."""
        return sum(self.nll) / max(sum(self.targets), 1e-30)


class Engine:
    """One model in training. Build it inside `groups.joined`; its weights are undefined until `write_state`."""

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        runtime: Runtime,
        optimizer: OptimizerSettings,
        *,
        device: torch.device,
        micro_batches: int,
        recompute: str = "none",
        seed: int = 0,
        languages: Sequence[str] = (),
    ):
        self.model, self.layout, self.runtime, self.device = model, layout, runtime, device
        self._optimizer_settings = optimizer
        self._languages = tuple(languages)
        dtype = DTYPES[runtime.precision]
        config = specs.transformer_config(model, layout, dtype=dtype, on_cpu=device.type == "cpu")
        deepspeed = _deepspeed(device, runtime.precision)
        settings = runtime.for_deepspeed(
            gradient_clipping=optimizer.gradient_clipping,
            micro_batches=micro_batches,
            num_parameters=model.num_parameters(),
        )
        building: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if runtime.zero_stage == 3:
            # It cuts each parameter as soon as it is made: the whole model never lies on one rank. (Its dtype= means
            # bf16 on a CPU, whatever is given, in DeepSpeed 0.19.8; it is right when taken from the settings.)
            group = parallel_state.get_data_parallel_group()
            with _settings_refused():
                building = deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=settings, mpu=Mpu())
        with building:
            self.stages = build_stages(model, config, recompute=recompute, dropout_seed=seed)
        for stage in self.stages if runtime.zero_stage < 3 else ():
            stage.to(device)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self.shards: list[tuple[Shard, torch.nn.Parameter]] = shards_of(self.stages, model, tp_rank, layout.tp)
        for shard, parameter in self.shards:
            if shard.is_copy:
                parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]  # counted once in gradient norms
        self.is_last_stage = any(stage.post_process for stage in self.stages)
        self._engine = self._initialise(deepspeed, settings)
        self._nll: list[tuple[int, torch.Tensor]] = []
        self.waited_seconds = 0.0
        """How long this rank waited for the others in the newest pass, at the sums that all take part in."""
        self._stepped = False  # whether Adam's state exists everywhere
        self._norm = GradientNorm(
            self._engine,
            deepspeed.runtime.utils,
            runtime,
            self.shards,
            device=device,
            scale=lambda: self.loss_scale,
        )
        config.grad_scale_func = self._scale_loss
        config.finalize_model_grads_func = None
        config.no_sync_func = None
        self._config = config

    def _initialise(self, deepspeed: Any, settings: dict[str, Any]) -> Any:
        module = self.stages[0] if len(self.stages) == 1 else torch.nn.ModuleList(self.stages)
        base = adamw(self._optimizer_settings, [(p, len(shard.shape) > 1) for shard, p in self.shards])
        with contextlib.redirect_stdout(io.StringIO()), _settings_refused():  # it prints memory figures unasked
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=base, config=settings, mpu=Mpu(), dist_init_required=False
            )
        engine.enable_backward_allreduce = not self.runtime.uses_schedule
        if self.runtime.zero_stage in (1, 2):
            # DeepSpeed 0.19.8 links states to parameters after the first group's first step, when the second group's do
            # not exist yet, and never again: have them all exist before.
            for group in engine.basic_optimizer.param_groups:
                for flat in group["params"]:
                    zeros = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
                    step = torch.zeros((), dtype=torch.float32, device=flat.device)
                    engine.basic_optimizer.state[flat] = {"step": step, **zeros}
        return engine

    # ---------------------------------------------------------------- a step

    def forward_backward(self, batch: Batch, *, step: int = 0, wish: bool = False, strict: bool = True) -> Report:
        """Gradients of the mean loss over the step's predicted tokens; NumericsError when the loss is not finite.

        `wish` is this rank's wish to stop: it rides on the sum over all ranks that the report needs anyway. Not
        `strict`, the loss is reported as it is.
        """
        self._train(True)
        targets = torch.tensor(float(batch.weights.sum(dtype="float64")), dtype=torch.float64)
        begun = time.monotonic()
        dist.all_reduce(targets, group=parallel_state.get_data_parallel_group())
        waited = time.monotonic() - begun  # for those that were late with their data, or with the step before
        # Gradients are averaged over data-parallel ranks, and the loss is a mean over all of them.
        unit = self.layout.dp / max(targets.item(), 1.0)
        served = np.zeros(max(1, len(self._languages)))
        served[0] = batch.served
        report = self._pass(batch, unit, train=True, extra=served, wish=wish)
        self.waited_seconds += waited
        if strict and not math.isfinite(report.loss):
            raise NumericsError(
                f"the loss of step {step} is {report.loss}. {self.name(batch, report)} No weight changed."
            )
        return report

    def apply(
        self,
        learning_rate: float,
        *,
        step: int = 0,
        batch: Batch | None = None,
        limit: float = math.inf,
        strict: bool = True,
    ) -> tuple[float, bool]:
        """Reduce, clip and update; (gradient norm before clipping, whether nothing was updated).

        Nothing is where the norm is above `limit` (negative: whatever it is) or fp16 scaling overflows. A gradient that
        is not finite is a NumericsError, or in fp16 and where not `strict`, another reason to update nothing.
        """
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.runtime.uses_schedule:
            self._sum_tied_embedding()
            self._norm.show_copies()
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
        norm = self._norm
        norm.limit, norm.newest = limit, math.inf
        if self.runtime.zero_stage:
            scaler = self.loss_scaler
            self._engine.step()
            bad = bool(getattr(self._engine.optimizer, "overflow", False))
            if not bad:
                norm.newest = float(self._engine.get_global_grad_norm() or 0.0)
            elif math.isfinite(norm.newest):  # discarded for its norm: no overflow that the scale should answer
                self.loss_scaler = scaler
        else:
            norm.newest = norm.clip(self._optimizer_settings.gradient_clipping)
            if bad := not norm.newest <= limit or not math.isfinite(norm.newest):
                self._engine.zero_grad()
            else:
                self._engine.step()
        if bad and strict and self.runtime.precision != "fp16" and not math.isfinite(norm.newest):
            raise NumericsError(
                f"a gradient of step {step} is not finite, though its loss is. {self.name(batch, None)} "
                "No weight changed."
            )
        self._stepped |= not bad
        return norm.newest, bad

    def evaluate(self, batch: Batch, *, num_languages: int, extra: npt.NDArray[np.float64] | None = None) -> Report:
        """Negative log-likelihoods without gradients; `extra` [num_languages] is summed over data-parallel ranks."""
        self._train(False)
        with torch.no_grad():  # or it would hold all that a training step without recomputation holds
            return self._pass(batch, 0.0, train=False, num_languages=num_languages, extra=extra)

    @property
    def loss_scale(self) -> float:
        """The factor that keeps fp16 gradients in range; 1 in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self.runtime.precision == "fp16" else 1.0

    @property
    def loss_scaler(self) -> dict[str, float]:
        """All that decides the next loss scales in fp16; empty in other precisions."""
        if self.runtime.precision != "fp16":
            return {}
        scaler = self._engine.optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}

    @loss_scaler.setter
    def loss_scaler(self, state: Mapping[str, float]) -> None:
        # A checkpoint of another precision has none: the scale is then found anew.
        scaler = self._engine.optimizer.loss_scaler if self.runtime.precision == "fp16" and state else None
        for name, value in state.items() if scaler else ():
            if hasattr(scaler, name):  # a constant scale has no history
                setattr(scaler, name, type(getattr(scaler, name))(value))

    @property
    def optimizer_steps(self) -> int:
        """Updates that Adam's moments have seen; its bias correction depends on it. Skipped steps do not count."""
        states = self._engine.basic_optimizer.state.values()
        return max((int(state["step"].item()) for state in states if "step" in state), default=0)

    def _train(self, training: bool) -> None:
        for stage in self.stages:
            stage.train(training)

    def _pass(
        self,
        batch: Batch,
        unit: float,
        *,
        train: bool,
        num_languages: int | None = None,
        extra: npt.NDArray[np.float64] | None = None,
        wish: bool = False,
    ) -> Report:
        self._nll.clear()
        for stage in self.stages:
            stage.gradient_scale = self.loss_scale if train else 1.0
        if train and not self.runtime.uses_schedule:
            self._own_backward(batch, unit)
        else:
            self._scheduled(batch, unit, train)
        return self._gathered(batch, num_languages or max(1, len(self._languages)), extra, wish)

    def _micro_batches(self, batch: Batch, unit: float) -> Iterator[tuple[int, MicroBatch]]:
        for index in range(batch.tokens.shape[0]):
            tokens_BL1 = torch.from_numpy(batch.tokens[index]).to(self.device)
            weights_BL = torch.from_numpy(batch.weights[index]).to(self.device)
            slots = tuple(int(slot) for slot in batch.slots[index]) if self._drops_out else None
            documents = None if batch.documents is None else torch.from_numpy(batch.documents[index]).to(self.device)
            yield index, MicroBatch(tokens_BL1[:, :-1], tokens_BL1[:, 1:], weights_BL * unit, slots, documents)

    @property
    def _drops_out(self) -> bool:
        return bool(self.model.dropout or self.model.attention_dropout)

    def _scheduled(self, batch: Batch, unit: float, train: bool) -> None:
        count, windows, length = batch.weights.shape
        feeds = [self._micro_batches(batch, unit) for _ in self.stages]
        if train:
            self._engine.set_gradient_accumulation_boundary(False)
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=feeds if len(feeds) > 1 else feeds[0],
            model=self.stages if len(self.stages) > 1 else self.stages[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=windows,
            forward_only=not train,
        )

    def _forward_step(self, feed: Any, stage: Decoder) -> tuple[torch.Tensor, Any]:
        index, micro_batch = next(feed)
        output = stage(micro_batch)
        if not stage.post_process:
            return output, None
        loss, nll_BL = output
        self._nll.append((index, nll_BL))
        return loss, lambda loss: (loss, torch.ones((), dtype=torch.int), {})

    def _scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.loss_scale

    def _own_backward(self, batch: Batch, unit: float) -> None:
        last = batch.tokens.shape[0] - 1
        for index, micro_batch in self._micro_batches(batch, unit):
            self._engine.set_gradient_accumulation_boundary(index == last)
            loss, nll_BL = self._engine(micro_batch)
            self._nll.append((index, nll_BL))
            self._engine.backward(loss, scale_wrt_gas=False)

    def _gathered(self, batch: Batch, num_languages: int, extra: npt.NDArray[np.float64] | None, wish: bool) -> Report:
        """Sums per language over all ranks; only one rank per replica of the last stage contributes to the scores."""
        sums = torch.zeros(4, num_languages, dtype=torch.float64)
        sums[3, 0] = float(wish)
        if self.is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0:
            if extra is not None:
                sums[2] = torch.from_numpy(extra)
            for index, nll_BL in self._nll:
                weights_BL = torch.from_numpy(batch.weights[index]).double()
                where = torch.from_numpy(batch.languages[index]).long()
                # A padded target may score infinity; it is not part of the sum.
                nll_B = torch.where(weights_BL > 0, nll_BL.cpu().double() * weights_BL, 0.0).sum(1)
                sums[0].index_add_(0, where, nll_B)
                sums[1].index_add_(0, where, weights_BL.sum(1))
        begun = time.monotonic()
        dist.all_reduce(sums)
        self.waited_seconds = time.monotonic() - begun
        nll, targets, extras, wishes = (tuple(row) for row in sums.tolist())
        return Report(nll, targets, extras, round(wishes[0]))

    def name(self, batch: Batch | None, report: Report | None) -> str:
        """The batch in words, for an error."""
        if batch is None:
            return ""
        names = self._languages
        bad = [name for name, nll in zip(names, report.nll, strict=True) if not math.isfinite(nll)] if report else []
        where = f" in {', '.join(bad)}" if bad else ""
        return f"Its windows are slots {int(batch.slots.min())} to {int(batch.slots.max())} of the run{where}."

    # ---------------------------------------------------------------- gradients

    def _sum_tied_embedding(self) -> None:
        """First and last pipeline stage each hold the tied embedding; its gradient is the sum of theirs."""
        if not self.model.tied or self.layout.pp == 1 or not parallel_state.is_rank_in_embedding_group():
            return
        group = parallel_state.get_embedding_group()
        for shard, parameter in self.shards:
            if shard.name == "embedding.word_embeddings.weight":
                dist.all_reduce(gradient_of(parameter), group=group)

    # ---------------------------------------------------------------- state

    def write_state(
        self, weights: LogicalSource, moments: Mapping[str, LogicalSource] | None = None, step: int = 0
    ) -> None:
        """Set every weight (and, with `moments`, the optimizer's state after `step` updates) from logical tensors."""
        if moments is not None:
            self._allocate_moments()
        for shard, parameter in self.shards:
            full = self._local(shard, weights)
            self._set(parameter, full, "weight")
            self._set_low_precision(parameter, full)
        if moments is None:
            return
        for kind in MOMENTS:
            for shard, parameter in self.shards:
                self._set(parameter, self._local(shard, moments[kind]), kind)
        for state in self._engine.basic_optimizer.state.values():
            state["step"].fill_(float(step))

    def read_state(self, shard: Shard, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """'weight', 'exp_avg' or 'exp_avg_sq' of a shard without padding, fp32 on the CPU; copy it to keep it."""
        return self.gather_state(shard, parameter, kind).cpu().contiguous()

    def gather_state(self, shard: Shard, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """What `read_state` reads, where the engine has it."""
        start, part = self._part(parameter, kind)
        if self.runtime.zero_stage and self.layout.dp > 1:
            # Each value is held by one data-parallel rank. Their bit patterns are summed as integers: the sum of floats
            # in DeepSpeed's safe_get_full_* turns -0.0 into 0.0, and no later checkpoint would be equal bit for bit.
            size = max(math.prod(shard.local_shape), len(part) * self.layout.dp if self.runtime.zero_stage == 3 else 0)
            bits = torch.zeros(size, dtype=torch.int32, device=self.device)
            bits[start : start + len(part)] = part.to(self.device).view(torch.int32)
            dist.all_reduce(bits, group=parallel_state.get_data_parallel_group())
            part = bits.view(torch.float32)[: math.prod(shard.local_shape)]
        return shard.valid(part.view(shard.local_shape))

    def _part(self, parameter: torch.nn.Parameter, kind: str) -> tuple[int, torch.Tensor]:
        """What this rank holds of a local tensor's state, flat, and where it begins in it."""
        states = self._engine.basic_optimizer.state
        if self.runtime.zero_stage == 0:
            whole = parameter.data if kind == "weight" else states[parameter].get(kind, torch.zeros_like(parameter))
            return 0, whole.detach().reshape(-1).float()
        if self.runtime.zero_stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            part = safe_get_local_fp32_param(parameter).detach().float()
            if kind != "weight":
                # Before the first step that updated anything there are no moments yet.
                state = safe_get_local_optimizer_state
                part = state(parameter, kind).detach().float() if self._stepped else torch.zeros_like(part)
            return len(part) * parallel_state.get_data_parallel_rank(), part
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # what safe_get_full_* reads (DeepSpeed 0.19.8)
        if mapping is None:
            return 0, torch.empty(0)
        part = mapping.get_hp_fragment().detach().float()
        if kind != "weight":
            # Before the first step that fp16 did not skip there are no moments yet.
            part = mapping.get_hp_fragment(kind).detach().float() if mapping.optim_fragment else torch.zeros_like(part)
        return mapping.lp_fragment_address.start, part

    def _local(self, shard: Shard, source: LogicalSource) -> torch.Tensor:
        full = source.read_slice(shard.name, shard.slices)
        if full.shape != shard.local_shape:  # the vocabulary's padding is zero
            piece, full = full, torch.zeros(shard.local_shape, dtype=torch.float32)
            shard.valid(full).copy_(piece)
        return full.to(self.device)

    def _set(self, parameter: torch.nn.Parameter, full: torch.Tensor, kind: str) -> None:
        """Master weight or moment from the full local tensor, wherever DeepSpeed keeps it."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.runtime.zero_stage == 0:
            (parameter.data if kind == "weight" else self._engine.basic_optimizer.state[parameter][kind]).copy_(full)
        elif self.runtime.zero_stage == 3:
            # Its setters of whole tensors fail where dp does not divide the size (DeepSpeed 0.19.8): cut the part here.
            size = -(-full.numel() // self.layout.dp)
            flat = torch.nn.functional.pad(full.flatten(), (0, size * self.layout.dp - full.numel()))
            part = flat.narrow(0, size * parallel_state.get_data_parallel_rank(), size)
            if kind == "weight":
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == "weight":
            safe_set_full_fp32_param(parameter, full)
        else:
            safe_set_full_optimizer_state(parameter, full, kind)

    def _set_low_precision(self, parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
        """The weights that the forward pass sees; setting the master weights does not reach them."""
        if self.runtime.zero_stage == 0:
            return
        if self.runtime.zero_stage < 3:
            parameter.data.copy_(full)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(full)

    def _allocate_moments(self) -> None:
        """Have every optimizer state exist: DeepSpeed allocates it in the first step, so take one that is undone.

        The weights are zero in it and no target counts, so every gradient is zero; the learning rate is zero too.
        """
        if self._stepped:
            return
        scaler = self.loss_scaler
        for shard, parameter in self.shards:
            zeros = torch.zeros(shard.local_shape, device=self.device)
            self._set(parameter, zeros, "weight")
            self._set_low_precision(parameter, zeros)
        windows = (self.layout.pp if self.layout.virtual_stages > 1 else 1, 1)
        length = self.layout.tp if self.layout.sequence_parallel else 1
        nothing = Batch(
            tokens=np.zeros((*windows, length + 1), np.int64),
            weights=np.zeros((*windows, length), np.float32),
            languages=np.zeros(windows, np.int32),
            slots=np.full(windows, -1, np.int64),
        )
        self.forward_backward(nothing)
        self.apply(0.0)
        self.loss_scaler = scaler
