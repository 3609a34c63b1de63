"""The contenders of benchmarks/backpack_step.py: xlmega's Backpack, its GPT twin, and the formulas written down.

In come a `Sizes` and a variant; out go a module and its loss over a micro-batch. The same for all: bf16 weights, the
plain loop of `peers` around them, no dropout, tied embeddings, the same windows in the same order.

- `straight`: a whole model as one would write it for oneself: the sense network at every position, all of alpha [B, K,
  L, L] at once, cross-entropy in fp32 on all logits.
- `straight_senses`: xlmega's decoder (attention, loss by blocks) with only the senses written straight down: what the
  senses alone cost.
- `selective`: xlmega's with the MLPs recomputed in the backward pass (--recompute selective).
- `blockwise`, on a GPU: xlmega's with the mix of senses as a CPU does it, in place of the kernels.

Shape letters: B windows, L positions, D hidden_size, K senses, H width of a sense's queries, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peers
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Sizes:
    """A model's sizes and a step's batch."""

    variant: str = "original"
    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    num_senses: int = 16
    vocab_size: int = 10_001
    batch_windows: int = 8
    sequence_length: int = 512

    @property
    def num_contextualiser_layers(self) -> int:
        return self.num_layers - (self.variant == "nano")


class _Norm(torch.nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class _MLP(torch.nn.Module):
    def __init__(self, width: int, outputs: int, bias: bool):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width, bias), torch.nn.Linear(4 * width, outputs, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class _Block(torch.nn.Module):
    def __init__(self, sizes: Sizes, layer: int):
        super().__init__()
        width, bias = sizes.hidden_size, sizes.variant == "original"
        self.num_heads = sizes.num_heads
        self.scale = (width // sizes.num_heads) ** -0.5 / (layer + 1 if sizes.variant == "original" else 1)
        self.norm_1, self.norm_2 = _Norm(width, bias), _Norm(width, bias)
        self.qkv, self.project = torch.nn.Linear(width, 3 * width, bias), torch.nn.Linear(width, width, bias)
        self.mlp = _MLP(width, width, bias)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BLD.shape
        parts = self.qkv(self.norm_1(x_BLD)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in parts)  # BHLK
        mixed_BHLK = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x_BLD = x_BLD + self.project(mixed_BHLK.transpose(1, 2).contiguous().view(batch, length, width))
        return x_BLD + self.mlp(self.norm_2(x_BLD))


class StraightSenses(torch.nn.Module):
    """Senses at every position, all of alpha, their sum."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, bias = sizes.hidden_size, sizes.variant == "original"
        self.sizes = sizes
        self.query_key = torch.nn.Linear(width, 2 * width, bias)
        self.mlp, self.output = _MLP(width, width, bias), _MLP(width, sizes.num_senses * width, bias)
        self.norms = torch.nn.ModuleList(_Norm(width, bias) for _ in range(3 if bias else 1))
        if not bias:
            self.joint = _Norm(sizes.num_senses * width, bias)

    def forward(self, hidden_BLD: torch.Tensor, words_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden_BLD.shape
        senses, original = self.sizes.num_senses, self.sizes.variant == "original"
        if original:
            residual_BLD = self.norms[0](words_BLD) + words_BLD
            residual_BLD = residual_BLD + self.mlp(self.norms[1](residual_BLD))
            senses_BLX = self.output(self.norms[2](residual_BLD))
        else:
            x_BLD = self.norms[0](words_BLD + self.mlp(words_BLD))
            senses_BLX = self.joint(x_BLD.repeat(1, 1, senses) + self.output(x_BLD))
        senses_BKLD = senses_BLX.view(batch, length, senses, width).transpose(1, 2)
        parts = self.query_key(hidden_BLD).split(width, dim=2)
        q, k = (part.view(batch, length, senses, -1).transpose(1, 2) for part in parts)  # BKLH
        scores_BKLL = q @ k.transpose(2, 3) * ((width // senses) ** -0.5 if original else 1.0)
        future_LL = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        alpha_BKLL = scores_BKLL.masked_fill(future_LL, float("-inf")).softmax(-1)
        return (alpha_BKLL @ senses_BKLD).sum(1)


class StraightBackpack(torch.nn.Module):
    """A Backpack as one would write it for oneself."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.words = torch.nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.positions = torch.nn.Embedding(sizes.sequence_length, sizes.hidden_size)
        self.blocks = torch.nn.ModuleList(_Block(sizes, layer) for layer in range(sizes.num_contextualiser_layers))
        self.norm = _Norm(sizes.hidden_size, sizes.variant == "original")
        self.senses = StraightSenses(sizes)

    def logits(self, inputs_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, V]."""
        words_BLD = self.words(inputs_BL)
        x_BLD = words_BLD + self.positions.weight[: inputs_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return F.linear(self.senses(self.norm(x_BLD), words_BLD), self.words.weight)

    def forward(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(inputs_BL).flatten(0, 1).float(), targets_BL.flatten())


def model_of(sizes: Sizes, family: str) -> Any:
    """xlmega's Backpack or its GPT twin."""
    from xlmega.models.config import model_config

    presets = {"original": ("backpack_small_16", "gpt2_small"), "nano": ("nano_backpack_small_16", "nano_gpt_small")}
    backpack = family == "backpack"
    changes: dict[str, Any] = {"num_senses": sizes.num_senses} if backpack else {}
    return model_config(
        preset=presets[sizes.variant][0 if backpack else 1],
        num_layers=sizes.num_contextualiser_layers if backpack else sizes.num_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=4 * sizes.hidden_size,
        num_heads=sizes.num_heads,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.sequence_length,
        **changes,
    )


def _decoder(
    sizes: Sizes, family: str, *, straight: bool = False, recompute: str = "none"
) -> tuple[torch.nn.Module, peers.LossOf]:
    from xlmega.models import specs
    from xlmega.models.decoder import MicroBatch, build_stages
    from xlmega.parallel.layout import Layout

    model = model_of(sizes, family)
    config = specs.transformer_config(model, Layout(), dtype=torch.bfloat16, on_cpu=peers.DEVICE.type == "cpu")
    (stage,) = build_stages(model, config, recompute=recompute)
    if straight:
        stage.senses = _InPlace(StraightSenses(sizes).bfloat16())
    peers.draw(stage)

    def loss_of(inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        weights_BL = torch.full(inputs_BL.shape, 1.0 / inputs_BL.numel(), device=inputs_BL.device)
        return stage(MicroBatch(inputs_BL, targets_BL, weights_BL))[0]

    return stage, loss_of


class _InPlace(torch.nn.Module):
    """StraightSenses where xlmega's decoder has its own."""

    def __init__(self, senses: StraightSenses):
        super().__init__()
        self.straight = senses

    def forward(self, hidden_LBD: torch.Tensor, tokens_BL: torch.Tensor, words_VD: torch.Tensor) -> torch.Tensor:
        return self.straight(hidden_LBD.transpose(0, 1), F.embedding(tokens_BL, words_VD)).transpose(0, 1)


@contextlib.contextmanager
def contender(name: str, sizes: Sizes) -> Iterator[tuple[torch.nn.Module, peers.LossOf]]:
    """A module and its loss."""
    if name == "straight":
        module = StraightBackpack(sizes).bfloat16()
        peers.draw(module)
        yield module, module
        return
    with peers._one_rank():
        if name == "blockwise":
            from xlmega.models import senses

            senses.kernels_for = lambda tensor: None
        recompute = "selective" if name == "selective" else "none"
        family = "gpt" if name == "twin" else "backpack"
        yield _decoder(sizes, family, straight=name == "straight_senses", recompute=recompute)


def names() -> tuple[str, ...]:
    """The contenders on this machine."""
    on_gpu = ["blockwise"] if peers.DEVICE.type == "cuda" else []
    return ("xlmega", "selective", "twin", "straight", "straight_senses", *on_gpu)
