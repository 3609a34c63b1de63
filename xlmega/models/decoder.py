"""Decoders of every family, cut into pipeline stages, with the loss inside.

In comes a micro-batch of windows (or, on later stages, hidden states that the pipeline schedule hands over); out goes
the weighted loss on the last stage and hidden states on the others. Parameters are named as in the whole model up to
the stage-local layer number (`weights.shards` gives the logical names).
What a model is made of stands in its ModelConfig; nothing here knows a family.
Sources: METHODS §1.6 (Languini GPT), §2.10 (XGLM); for the others see `models.presets`.

Shape letters: B windows, L positions, D hidden_size, V vocabulary, P max_positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from xlmega.models import documents, dropout
from xlmega.models.backpack import Senses
from xlmega.models.config import ModelConfig
from xlmega.models.head import weighted_loss
from xlmega.models.layers import enter_tensor_parallel_region, sequence_share, summed_over_sequence
from xlmega.models.positions import sinusoidal_positions
from xlmega.models.specs import layer_spec, norm_spec


@dataclass(frozen=True)
class MicroBatch:
    """Some windows on the device, as every stage of the pipeline gets them."""

    tokens_BL: torch.Tensor
    targets_BL: torch.Tensor
    weights_BL: torch.Tensor
    """What each target counts in the loss (fp32); the step's sum of them over all ranks is the loss's unit."""
    slots: tuple[int, ...] | None = None
    """Which windows of the run these are: the keys of dropout. None where nothing is dropped (evaluation)."""
    documents_BL: torch.Tensor | None = None
    """Which document of its window each token belongs to; None where a window is one text."""


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding over all ranks: the least multiple of tp_size that holds the vocabulary."""
    return -(-vocab_size // tp_size) * tp_size


def build_norm(model: ModelConfig, config: TransformerConfig) -> torch.nn.Module:
    """The model's kind of norm over the hidden size."""
    norm: torch.nn.Module = build_module(
        norm_spec(model), config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return norm


class Embedding(MegatronModule):
    """Word embedding (vocabulary-parallel), scaled; plus positions, where they are added here; normed, where it is."""

    def __init__(self, model: ModelConfig, config: TransformerConfig):
        super().__init__(config=config)
        self.model = model
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            padded_vocabulary(model.vocab_size, config.tensor_model_parallel_size),
            model.hidden_size,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        if model.positions == "learned":
            self.position_embeddings = torch.nn.Embedding(
                model.max_positions, model.hidden_size, dtype=config.params_dtype
            )
        if model.embedding_norm:
            self.layernorm = build_norm(model, config)
        self._sinusoids_PD: torch.Tensor | None = None

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids to hidden states [L, B, D] (this rank's positions with sequence parallelism)."""
        hidden: torch.Tensor = self.word_embeddings(tokens_BL)
        hidden_LBD = hidden if self.config.sequence_parallel else hidden.transpose(0, 1)
        if self.model.embedding_scale != 1.0:
            hidden_LBD = hidden_LBD * self.model.embedding_scale
        first, total = sequence_share(self.config, hidden_LBD.shape[0])
        share = slice(first, first + hidden_LBD.shape[0])
        if self.model.positions == "learned":
            table_PD = summed_over_sequence(self.position_embeddings.weight, self.config)
            hidden_LBD = hidden_LBD + torch.nn.functional.embedding(self._places(tokens_BL, share), table_PD)
        elif self.model.positions == "sinusoidal":
            hidden_LBD = hidden_LBD + self._sinusoids(hidden_LBD)[self._places(tokens_BL, share)]
        if self.model.embedding_norm:
            hidden_LBD = self.layernorm(hidden_LBD)
        if self.training and self.config.hidden_dropout:
            p = self.config.hidden_dropout
            hidden_LBD = dropout.dropout(hidden_LBD, p, "embedding", first_position=first, num_positions=total)
        return hidden_LBD.contiguous()

    def _places(self, tokens_BL: torch.Tensor, share: slice) -> torch.Tensor:
        """Positions of this rank's share: [share, B] where documents are told apart, else [share, 1]."""
        numbers_BL = documents.announced()
        if numbers_BL is None:
            return torch.arange(share.start, share.stop, device=tokens_BL.device)[:, None]
        return documents.positions(numbers_BL).t()[share]

    def _sinusoids(self, like: torch.Tensor) -> torch.Tensor:
        # Made in the first pass, not at construction: there DeepSpeed (ZeRO-3) would have it computed in bf16.
        if self._sinusoids_PD is None:
            table_PD = sinusoidal_positions(self.model.max_positions, self.model.hidden_size)
            self._sinusoids_PD = table_PD.to(like.device, like.dtype)
        return self._sinusoids_PD


class Block(MegatronModule):
    """The layers of one pipeline stage (or virtual stage), and the norm that follows the last of the model."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        vp_stage: int | None,
        final_norm: bool,
        recompute: str,
    ):
        super().__init__(config=config)
        virtual, pp = config.virtual_pipeline_model_parallel_size or 1, config.pipeline_model_parallel_size
        chunk = (vp_stage or 0) * pp + parallel_state.get_pipeline_model_parallel_rank()
        mine = model.layers_of_stage(chunk, pp * virtual)
        self.first_layer = mine.start
        """Number of layers before this stage, over the whole model."""
        spec = layer_spec(model, config)
        self.layers = torch.nn.ModuleList(
            build_module(spec, config=config, layer_number=layer + 1, recompute=recompute) for layer in mine
        )
        self.final_layernorm = build_norm(model, config) if final_norm else None

    def forward(self, hidden_LBD: torch.Tensor) -> torch.Tensor:
        """[L, B, D] to the same shape."""
        for layer in self.layers:
            hidden_LBD = layer(hidden_LBD)
        return hidden_LBD if self.final_layernorm is None else self.final_layernorm(hidden_LBD)


class Decoder(MegatronModule):
    """One pipeline stage of a decoder (all of it when pp is 1)."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        recompute: str = "none",
        dropout_seed: int = 0,
    ):
        super().__init__(config=config)
        self.model = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.dropout_seed = dropout_seed
        self.received_LBD: torch.Tensor | None = None
        self.model_type = ModelType.encoder_or_decoder  # the schedules ask
        self.gradient_scale = 1.0
        """What the caller multiplies the loss by before its backward pass (fp16 loss scaling)."""
        if pre_process:
            self.embedding = Embedding(model, config)
        self.decoder = Block(model, config, vp_stage=vp_stage, final_norm=post_process, recompute=recompute)
        self.senses = Senses(model, config, recompute=recompute) if post_process and model.backpack_variant else None
        self.head_copies_embedding = post_process and model.tied and not pre_process
        if post_process and (not model.tied or self.head_copies_embedding):
            rows = padded_vocabulary(model.vocab_size, config.tensor_model_parallel_size)
            rows //= config.tensor_model_parallel_size
            self.output_layer = torch.nn.Module()
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            weight = torch.empty(rows, model.hidden_size, dtype=config.params_dtype, device=device)
            self.output_layer.register_parameter("weight", torch.nn.Parameter(weight))
        for name, parameter in self.named_parameters():
            axis = shard_axis(name)
            parameter.tensor_model_parallel = axis is not None  # gradient norms read it
            if axis is not None:
                parameter.partition_dim = axis

    def set_input_tensor(self, input_tensor: Any) -> None:
        """The schedule hands over what the stage before has sent."""
        self.received_LBD = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: MicroBatch) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Last stage: (sum of weights * nll, nll_BL without gradient), fp32; other stages: hidden states."""
        slots = batch.slots if self.training else None
        with dropout.windows(self.dropout_seed, slots), documents.within(batch.documents_BL):
            hidden_LBD = self.embedding(batch.tokens_BL) if self.pre_process else self.received_LBD
            hidden_LBD = self.decoder(hidden_LBD)
        return self._loss(hidden_LBD, batch) if self.post_process else hidden_LBD

    def _loss(self, hidden_LBD: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        head: Any = self.embedding.word_embeddings if self._head_is_embedding else self.output_layer
        weight = head.weight
        if self.senses is not None:
            hidden_LBD = self.senses(hidden_LBD, batch.tokens_BL, weight)
        hidden_LBD = enter_tensor_parallel_region(hidden_LBD, self.config, cut_by_position=self.senses is None)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        first_row = min(tp_rank * weight.shape[0], self.model.vocab_size)
        rows = min(weight.shape[0], self.model.vocab_size - first_row)
        batch_size, length = batch.targets_BL.shape
        loss, nll_N = weighted_loss(
            hidden_LBD.flatten(0, 1),
            weight[:rows],  # padding rows are never seen, so they need no mask and get no gradient
            batch.targets_BL.t().reshape(-1),
            batch.weights_BL.t().reshape(-1),
            first_row=first_row,
            group=parallel_state.get_tensor_model_parallel_group(),
            gradient_scale=self.gradient_scale,
        )
        return loss, nll_N.view(length, batch_size).t()

    @property
    def _head_is_embedding(self) -> bool:
        return self.model.tied and self.pre_process


# Which axis of a parameter is split over tensor-parallel ranks, by the end of its name. A query-key-value row belongs
# to a head and heads are kept whole; biases of row-parallel layers, norms and positions are replicated.
_SHARD_AXES = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
    # A Backpack's senses are split over ranks.
    "query_key.weight": 0,
    "query_key.bias": 0,
    "output.weight": 0,
    "output.bias": 0,
    "joint_layernorm.weight": 0,
    "joint_layernorm.bias": 0,
}


def shard_axis(name: str) -> int | None:
    """The axis over which tensor parallelism splits the parameter of this name; None where every rank has it whole."""
    return _SHARD_AXES.get(".".join(name.split(".")[-2:]))


def build_stages(
    model: ModelConfig, config: TransformerConfig, *, recompute: str = "none", dropout_seed: int = 0
) -> list[Decoder]:
    """This rank's model chunks: one, or `virtual_stages` of them when the pipeline is interleaved."""
    virtual = config.virtual_pipeline_model_parallel_size
    stages = []
    for vp_stage in range(virtual) if virtual else [None]:
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        stages.append(
            Decoder(
                model,
                config,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                vp_stage=vp_stage,
                recompute=recompute,
                dropout_seed=dropout_seed,
            )
        )
    return stages
