"""The contenders of benchmarks/train_step.py: xlmega's engine, and what a user could run instead.

In come a `Workload` and a micro-batch; out goes a function that takes one whole optimizer step and returns its loss.
Guaranteed the same for all: bf16 weights, fp32 master copies, gradients accumulated in fp32, clipping at 1.0, torch's
fused AdamW, tied embeddings, no dropout, the same windows in the same order.

Peers: a bare loop over xlmega's own decoder; Megatron-core's GPTModel with its local spec and its own loss; Hugging
Face XGLM with its default attention; and a minimal decoder in the manner of nanoGPT.

Shape letters: B windows, L positions, D hidden_size, H heads, K head_dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Step = Callable[[np.ndarray], float]
LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
LEARNING_RATE = 1e-4
CLIPPING = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Workload:
    """A model's sizes and a step's batch."""

    num_layers: int = 6
    hidden_size: int = 512
    ffn_hidden_size: int = 2048
    num_heads: int = 8
    vocab_size: int = 16_384
    batch_windows: int = 8
    sequence_length: int = 512

    def tokens(self, step: int) -> np.ndarray:
        """[batch_windows, sequence_length + 1] ids of this step."""
        generator = np.random.default_rng((0, step))
        return generator.integers(0, self.vocab_size, (self.batch_windows, self.sequence_length + 1))

    @property
    def step_tokens(self) -> int:
        return self.batch_windows * self.sequence_length

    def step_flops(self) -> float:
        """Model FLOPs of a step: 6 per parameter and token (a tied head counted once), and causal attention."""
        d, f = self.hidden_size, self.ffn_hidden_size
        parameters = self.vocab_size * d + self.num_layers * (4 * d * d + 2 * d * f + 9 * d + f) + 2 * d
        attention = 3 * 2 * 2 * self.num_layers * d * self.sequence_length / 2
        return self.step_tokens * (6.0 * parameters + attention)


def synchronize() -> None:
    """Wait for a GPU, so that a clock tells the time of the work and not of its orders."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class MasterAdamW:
    """The precision recipe of a plain loop: fp32 masters and fp32 gradient sums beside a model's bf16 weights."""

    def __init__(self, module: torch.nn.Module):
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.weights]
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(self._adder(master.grad))
        decayed = [m for m in self.masters if m.dim() > 1]
        others = [m for m in self.masters if m.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, fused=True)

    @staticmethod
    def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(weight: torch.Tensor) -> None:
            total.add_(weight.grad)
            weight.grad = None

        return add

    @torch.no_grad()
    def step(self) -> None:
        """Clip, update the masters, copy them to the model and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.masters, CLIPPING, foreach=True)
        self.adamw.step()
        torch._foreach_copy_(self.weights, self.masters)
        torch._foreach_zero_([m.grad for m in self.masters])


def plain_loop(module: torch.nn.Module, loss_of: LossOf, micro: int) -> Step:
    """One step of a plain PyTorch loop; `loss_of(inputs_BL, targets_BL)` is a mean over the micro-batch."""
    optimizer = MasterAdamW(module)

    def step(tokens: np.ndarray) -> float:
        total = 0.0
        for part in torch.from_numpy(tokens).to(DEVICE).split(micro):
            loss = loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) * (len(part) / len(tokens))
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


def draw(module: torch.nn.Module) -> None:
    """Seeded initial weights for any decoder: N(0, 0.02) matrices, norms at one, biases at zero."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    module.to(DEVICE)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


# ---------------------------------------------------------------- xlmega


@contextlib.contextmanager
def _one_rank() -> Iterator[tuple[Any, torch.device]]:
    from xlmega.parallel import groups, layout

    process = groups.discover({})
    chosen = layout.choose(1)
    if DEVICE.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with groups.joined(process, chosen) as device:
        yield chosen, device


def _xlmega_model(work: Workload) -> Any:
    from xlmega.models import config

    return config.model_config(
        preset="xglm_27m",
        num_layers=work.num_layers,
        hidden_size=work.hidden_size,
        ffn_hidden_size=work.ffn_hidden_size,
        num_heads=work.num_heads,
        vocab_size=work.vocab_size,
    )


@contextlib.contextmanager
def xlmega(work: Workload, micro: int) -> Iterator[Step]:
    """xlmega's engine: DeepSpeed ZeRO-1, Megatron-core's schedule."""
    from xlmega.data.batches import Batch
    from xlmega.training.engine import Engine
    from xlmega.training.optimizer import OptimizerSettings
    from xlmega.training.runtime import runtime
    from xlmega.weights.initial import InitialWeights

    model = _xlmega_model(work)
    how = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    settings = OptimizerSettings(beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY, gradient_clipping=CLIPPING)
    count = work.batch_windows // micro
    with _one_rank() as (layout, device):
        engine = Engine(
            model,
            layout,
            runtime(how),
            settings,
            device=device,
            micro_batches=count,
            languages=("any",),
        )
        engine.write_state(InitialWeights(model, 0, {shard.name: shard.shape for shard, _ in engine.shards}))

        def step(tokens: np.ndarray) -> float:
            cut = tokens.reshape(count, micro, -1)
            weights = np.ones((count, micro, work.sequence_length), dtype=np.float32)
            slots = np.arange(work.batch_windows).reshape(count, micro)
            batch = Batch(cut, weights, np.zeros_like(slots, dtype=np.int32), slots)
            loss = engine.forward_backward(batch).loss
            engine.apply(LEARNING_RATE)
            return loss

        yield step


def _own_decoder(work: Workload, layout: Any) -> tuple[Any, LossOf]:
    from xlmega.models import specs
    from xlmega.models.decoder import MicroBatch, build_stages

    model = _xlmega_model(work)
    config = specs.transformer_config(model, layout, dtype=torch.bfloat16, on_cpu=DEVICE.type == "cpu")
    (stage,) = build_stages(model, config)
    draw(stage)

    def loss_of(inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        weights_BL = torch.full(inputs_BL.shape, 1.0 / inputs_BL.numel(), device=DEVICE)
        return stage(MicroBatch(inputs_BL, targets_BL, weights_BL))[0]

    return stage, loss_of


@contextlib.contextmanager
def bare(work: Workload, micro: int) -> Iterator[Step]:
    """xlmega's decoder in a plain loop: what DeepSpeed, the schedule and the engine add is measured against it."""
    with _one_rank() as (layout, _):
        stage, loss_of = _own_decoder(work, layout)
        # The factor on the loss is known to the head, as the engine's is: no pass over the embedding's gradient.
        stage.gradient_scale = micro / work.batch_windows
        yield plain_loop(stage, loss_of, micro)


# ---------------------------------------------------------------- peers


def _megatron_decoder(work: Workload) -> tuple[torch.nn.Module, LossOf]:
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=work.num_layers,
        hidden_size=work.hidden_size,
        ffn_hidden_size=work.ffn_hidden_size,
        num_attention_heads=work.num_heads,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=DEVICE.type == "cpu",
        perform_initialization=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    module = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=work.vocab_size,
        max_sequence_length=work.sequence_length,
        share_embeddings_and_output_weights=True,
    ).bfloat16()
    draw(module)
    # Nothing is dropped, so nothing is drawn: swapping CUDA generators for dropout has no meaning here.
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    places = torch.arange(work.sequence_length, device=DEVICE)[None]
    future = torch.ones(1, 1, work.sequence_length, work.sequence_length, dtype=torch.bool, device=DEVICE).triu(1)

    def loss_of(inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        positions_BL = places.expand(len(inputs_BL), -1)
        return module(inputs_BL, positions_BL, future, labels=targets_BL).mean()

    return module, loss_of


@contextlib.contextmanager
def megatron(work: Workload, micro: int) -> Iterator[Step]:
    """Megatron-core's GPTModel as its local spec gives it (scores held, vocabulary-parallel cross-entropy)."""
    with _one_rank():
        yield plain_loop(*_megatron_decoder(work), micro)


@contextlib.contextmanager
def huggingface(work: Workload, micro: int) -> Iterator[Step]:
    """transformers' XGLMForCausalLM, default attention, its own loss."""
    from transformers import XGLMConfig, XGLMForCausalLM

    config = XGLMConfig(
        vocab_size=work.vocab_size,
        d_model=work.hidden_size,
        ffn_dim=work.ffn_hidden_size,
        num_layers=work.num_layers,
        attention_heads=work.num_heads,
        max_position_embeddings=2048,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        use_cache=False,
    )
    module = XGLMForCausalLM(config).bfloat16().train()
    draw(module)

    def loss_of(inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        # Its labels are the inputs and it shifts them itself: one target a window fewer than the others.
        return module(input_ids=inputs_BL, labels=inputs_BL).loss

    yield plain_loop(module, loss_of, micro)


class _SmallBlock(torch.nn.Module):
    def __init__(self, width: int, ffn: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.project = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, ffn), torch.nn.Linear(ffn, width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BLD.shape
        parts = self.qkv(self.norm_1(x_BLD)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)  # BHLK
        mixed_BHLK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.project(mixed_BHLK.transpose(1, 2).contiguous().view(batch, length, width))
        return x_BLD + self.down(F.gelu(self.up(self.norm_2(x_BLD))))


class SmallDecoder(torch.nn.Module):
    """The least that trains: fused qkv, SDPA, tied head, cross-entropy on the full logits."""

    def __init__(self, work: Workload, fp32_loss: bool):
        super().__init__()
        width = work.hidden_size
        self.fp32_loss = fp32_loss
        self.words = torch.nn.Embedding(work.vocab_size, width)
        self.positions = torch.nn.Embedding(work.sequence_length, width)
        self.blocks = torch.nn.ModuleList(
            _SmallBlock(width, work.ffn_hidden_size, work.num_heads) for _ in range(work.num_layers)
        )
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        x_BLD = self.words(inputs_BL) * math.sqrt(self.words.embedding_dim)
        x_BLD = x_BLD + self.positions.weight[: inputs_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_NV = F.linear(self.norm(x_BLD), self.words.weight).flatten(0, 1)
        return F.cross_entropy(logits_NV.float() if self.fp32_loss else logits_NV, targets_BL.flatten())


@contextlib.contextmanager
def nanogpt(work: Workload, micro: int, fp32_loss: bool = True) -> Iterator[Step]:
    """A decoder in the manner of nanoGPT, its cross-entropy in fp32 as autocast would have it."""
    module = SmallDecoder(work, fp32_loss).bfloat16()
    draw(module)
    yield plain_loop(module, module, micro)


@contextlib.contextmanager
def nanogpt_bf16_loss(work: Workload, micro: int) -> Iterator[Step]:
    """The same with cross-entropy on bf16 logits: losses rounded to 1/32, but the fastest form there is."""
    with nanogpt(work, micro, fp32_loss=False) as step:
        yield step


CONTENDERS: dict[str, Callable[[Workload, int], contextlib.AbstractContextManager[Step]]] = {
    "xlmega": xlmega,
    "bare": bare,
    "megatron": megatron,
    "huggingface": huggingface,
    "nanogpt": nanogpt,
    "nanogpt_bf16_loss": nanogpt_bf16_loss,
}


# ---------------------------------------------------------------- the machine, and a very large vocabulary


def matmul_rate(size: int = 2048, repeats: int = 10) -> float:
    """Best bf16 rate of a square product in FLOP/s."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def forward_backward(name: str, work: Workload) -> float:
    """One forward and backward pass of 'xlmega' or 'megatron' in bf16 without optimizer; the loss."""
    with _one_rank() as (layout, _):
        _, loss_of = _own_decoder(work, layout) if name == "xlmega" else _megatron_decoder(work)
        tokens_BL1 = torch.from_numpy(work.tokens(0)).to(DEVICE)
        loss = loss_of(tokens_BL1[:, :-1].contiguous(), tokens_BL1[:, 1:].contiguous())
        loss.backward()
        return float(loss)
