"""The gradient norm of the whole model, around DeepSpeed's step: what counts in it, and which steps it discards.

In come DeepSpeed's engine and this rank's shards. Guaranteed: each parameter counts once, though pipeline stages and
tensor-parallel ranks hold copies; a gradient that is not finite makes the norm of all ranks infinite, also where it
stands in a copy that does not count; a step whose norm is above `limit` updates nothing. DeepSpeed (0.19.8) takes the
norm in another method in each of its optimizers. All ranks call these methods together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from xlmega.training.runtime import Runtime
from xlmega.weights.shards import Shard


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Where DeepSpeed accumulates this parameter's gradient (bf16 and fp16 keep an fp32 sum beside it)."""
    for place in ("_hp_grad", "grad_accum", "grad"):
        gradient = getattr(parameter, place, None)
        if gradient is not None:
            return gradient.view(parameter.shape) if place == "_hp_grad" else gradient  # type: ignore[no-any-return]
    raise AssertionError("a parameter without gradient took part in the step")


def _largest(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest value in them; not finite where one of theirs is not."""
    return torch.stack(torch._foreach_norm(list(gradients), math.inf)).float().max()


class GradientNorm:
    """The norm of an engine's steps; `utils` are deepspeed.runtime's, `scale` the factor that gradients carry then."""

    def __init__(
        self,
        engine: Any,
        utils: Any,
        runtime: Runtime,
        shards: Sequence[tuple[Shard, torch.nn.Parameter]],
        *,
        device: torch.device,
        scale: Callable[[], float],
    ):
        self._optimizer, self._utils, self._runtime, self._shards = engine.optimizer, utils, runtime, shards
        self._device, self._scale = device, scale
        self.limit = math.inf
        """The largest of a step that updates."""
        self.newest = math.inf
        self._have_it_limited()
        if runtime.zero_stage >= 2 and parallel_state.get_tensor_model_parallel_world_size() > 1:
            self._have_copies_looked_at()

    def _have_it_limited(self) -> None:
        """Have DeepSpeed discard a step whose norm is above the limit as it does one whose norm is not finite.

        The norm that it takes between reducing and updating is the whole model's, so all ranks decide alike.
        """
        optimizer, infinite = self._optimizer, torch.tensor(math.inf, device=self._device)

        def replace(name: str, norm: Callable[[Any], Any], instead: Callable[[Any], Any]) -> None:
            take = getattr(optimizer, name)

            def limited(*arguments: Any, **keywords: Any) -> Any:
                taken = take(*arguments, **keywords)
                if self.limit == math.inf or keywords:  # keywords: what is to be clipped
                    return taken
                self.newest = float(norm(taken)) / self._scale()
                return instead(taken) if math.isfinite(self.newest) and self.newest > self.limit else taken

            setattr(optimizer, name, limited)

        if self._runtime.zero_stage == 1 and self._runtime.precision == "bf16":

            def whole(grads: Any) -> Any:
                norm_of = self._utils.get_global_norm_of_tensors
                return norm_of(grads[0], mpu=optimizer.mpu, norm_type=optimizer.norm_type)

            replace("get_grads_for_norm", whole, lambda grads: ([infinite], grads[1]))
        elif self._runtime.zero_stage in (1, 2):
            replace("scaled_global_norm", float, lambda norm: math.inf)
        elif self._runtime.zero_stage == 3:
            replace("_get_norm_groups", self._utils.combine_grad_norm_groups, lambda norms: [infinite])

    def _have_copies_looked_at(self) -> None:
        """Have stages 2 and 3 take a norm for invalid (-1) where a copy's gradient on any rank is not finite.

        With the optimizer on the CPU they take it elsewhere, and copies are left to the check of replicas.
        """
        take = self._optimizer.get_grad_norm_direct

        def looked_at(gradients: Any, parameters: Any, **keywords: Any) -> Any:
            norm = take(gradients, parameters, **keywords)
            own = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
            pairs = zip(own, parameters, strict=False)
            copies = [gradient for gradient, p in pairs if not self._utils.is_model_parallel_parameter(p)]
            return torch.where(self._any_spoilt(copies), torch.full_like(norm, -1.0), norm)

        self._optimizer.get_grad_norm_direct = looked_at

    def _any_spoilt(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Whether one of these is not finite on any rank, as a boolean on the device."""
        spoilt = torch.zeros((), device=self._device)
        if gradients:
            spoilt = (~_largest(gradients).isfinite()).to(self._device, torch.float32)
        dist.all_reduce(spoilt, op=dist.ReduceOp.MAX)
        return spoilt.bool()

    def show_copies(self) -> None:
        """Have a gradient that is not finite stand in one that the norm counts: stages 0 and 1, before they reduce.

        Of a parameter that all tensor-parallel ranks hold whole only the first's gradient is counted. The others' are
        equal to it unless a device errs, which would otherwise be seen only when it has spoilt a weight.
        """
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            return
        copies = [gradient_of(parameter) for shard, parameter in self._shards if shard.axis is None]
        counted = next(gradient_of(p) for shard, p in self._shards if shard.axis is not None and not shard.is_copy)
        first = counted[(0,) * counted.dim()]
        first.copy_(torch.where(_largest(copies).isfinite(), first, math.nan))

    def clip(self, most: float) -> float:
        """Scale gradients to a norm of `most` (0: leave them), for stage 0; the norm before."""
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        gradients = [p.grad for shard, p in self._shards if p.grad is not None]
        counted = [
            p.grad.double().square().sum()
            for shard, p in self._shards
            if p.grad is not None and not shard.is_copy and (shard.axis is not None or tp_rank == 0)
        ]
        square = torch.stack(counted).sum() if counted else torch.zeros((), dtype=torch.float64, device=self._device)
        dist.all_reduce(square, group=parallel_state.get_model_parallel_group())
        norm = math.sqrt(square.item()) if math.isfinite(square.item()) else math.inf
        if most and norm > most and math.isfinite(norm):
            torch._foreach_mul_(gradients, most / (norm + 1e-6))
        return norm
