"""Backpack language models for transformers: every prediction is a weighted sum of context-free sense vectors.

Written by xlmega; needs torch and transformers alone. In come token ids; out go logits and, with `output_senses` (the
default), what they are made of: `senses` C [B, K, S, D], `contextualization` alpha [B, K, L, S] and
`backpack_hidden_states` o [B, L, D], with o_i = sum_k sum_{j <= i} alpha_kij C(x_j)_k and logits = E o.

Sense vectors depend on the token alone. Training computes them once for each distinct token of a batch; inference keeps
those of every token it has met in a table, until a weight changes or `train` or `eval` is called. With a key-value
cache a step attends to cached keys and ids. Senses can be re-weighted by token and sense (`steer`).

Shape letters: B texts, L new positions, S all positions with those cached, K senses, H width of a sense's queries,
D hidden size, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from .configuration_backpack import BackpackConfig

IGNORED = -100
"""Labels that do not count."""


@dataclass
class BackpackOutput(ModelOutput):
    """What a forward pass found; the loss is the mean over labels that count."""

    loss: torch.Tensor | None = None
    loss_unsmoothed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    backpack_hidden_states: torch.Tensor | None = None
    senses: torch.Tensor | None = None
    contextualization: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Linear(nn.Module):
    """x W + b with the weight stored [in, out], as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class MLP(nn.Module):
    def __init__(self, config: BackpackConfig, inner: int, outputs: int) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, inner, config.linear_bias)
        self.c_proj = Linear(inner, outputs, config.linear_bias)
        # transformers' own "gelu_new" is the same function in eight passes.
        of_tanh = config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        self.act = nn.GELU(approximate="tanh") if of_tanh else ACT2FN[config.activation_function]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c_proj(self.act(self.c_fc(x)))
        return y


def layer_norm(config: BackpackConfig, width: int | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(width or config.n_embd, eps=config.layer_norm_epsilon, bias=config.norm_bias)


class Attention(nn.Module):
    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.linear_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, config.linear_bias)
        self.scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=self.scale
        )
        y: torch.Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    def __init__(self, config: BackpackConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config, config.n_inner or 4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), seen, cache)
        y: torch.Tensor = x + self.mlp(self.ln_2(x))
        return y


class Contextualiser(nn.Module):
    """A GPT-2 without a head."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = layer_norm(config)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None, cache: Cache | None
    ) -> list[torch.Tensor]:
        """The embedding, what each layer but the last makes of it, and the normed last: [B, L, D] each."""
        hidden = [self.wte(ids) + self.wpe(positions)]
        for block in self.h:
            hidden.append(block(hidden[-1], seen, cache))
        hidden[-1] = self.ln_f(hidden[-1])
        return hidden


class IdentityMixerBlock(nn.Module):
    """The original's block: its mixer is the identity, so the normed embedding is added to the residual."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config, config.n_inner or 4 * config.n_embd, config.n_embd)

    def forward(self, normed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        residual = normed + residual
        residual = residual + self.mlp(self.ln_1(residual))
        y: torch.Tensor = self.ln_2(residual)
        return y


class OriginalSenseNetwork(nn.Module):
    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.ln = layer_norm(config)
        self.block = IdentityMixerBlock(config)
        inner = config.sense_intermediate_scale * config.n_embd
        self.final_mlp = MLP(config, inner, config.num_senses * config.n_embd)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., K, D]."""
        flat: torch.Tensor = self.final_mlp(self.block(self.ln(words), words))
        senses: torch.Tensor = flat.unflatten(-1, (self.num_senses, -1))
        return senses


class NanoBlock(nn.Module):
    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.mlp = MLP(config, config.n_inner or 4 * config.n_embd, config.n_embd)
        self.ln_1 = layer_norm(config)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.ln_1(words + self.mlp(words))
        return y


class NanoSenseNetwork(nn.Module):
    """nanoBackpack's: norms after, the token's own vector in each sense, one norm over all of a token's senses."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.block = NanoBlock(config)
        inner = config.sense_intermediate_scale * config.n_embd
        self.final_mlp = MLP(config, inner, config.num_senses * config.n_embd)
        self.joint_ln = layer_norm(config, config.num_senses * config.n_embd)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., K, D]."""
        x = self.block(words)
        senses = x.unsqueeze(-2) + self.final_mlp(x).unflatten(-1, (self.num_senses, -1))
        y: torch.Tensor = self.joint_ln(senses.flatten(-2)).view(senses.shape)
        return y


class SenseWeightNetwork(nn.Module):
    """Alpha: a softmax over earlier positions for each sense."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        original = config.variant == "original"
        self.scale = (config.n_embd // config.num_senses) ** -0.5 if original else 1.0
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd, bias=original and config.linear_bias)

    def query_key(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, L, D] to queries and keys, [B, K, L, H] each."""
        parts = self.c_attn(hidden).chunk(2, dim=2)
        return tuple(part.unflatten(2, (self.num_senses, -1)).transpose(1, 2) for part in parts)

    def alpha(self, query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """[..., L, H] and [..., S, H] to [..., L, S]; `seen` [..., L, S] is broadcast."""
        scores = (query @ key.transpose(-1, -2)).float() * self.scale
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).to(query.dtype)


class BackpackPreTrainedModel(PreTrainedModel):
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["Block", "OriginalSenseNetwork", "NanoSenseNetwork"]  # noqa: RUF012
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012  # shared modules and masks that older files store
        r"(word|position)_embeddings\.weight$",
        r"\.attn\.(bias|masked_bias)$",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        depth = self.config.n_layer + (self.config.variant == "nano")
        if isinstance(module, (Linear, nn.Linear)):
            nn.init.normal_(module.weight, std=deviation)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (MLP, Attention)):
            nn.init.normal_(module.c_proj.weight, std=deviation / (2 * depth) ** 0.5)


class BackpackModel(BackpackPreTrainedModel):
    """Everything but the head."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__(config)
        self.gpt2_model = Contextualiser(config)
        networks = {"original": OriginalSenseNetwork, "nano": NanoSenseNetwork}
        self.sense_network = networks[config.variant](config)
        self.sense_weight_net = SenseWeightNetwork(config)
        self.factors_VK: torch.Tensor | None = None
        """By what each sense of each token is multiplied."""
        self._table: _SenseTable | None = None
        self.post_init()

    @property
    def word_embeddings(self) -> nn.Embedding:
        """E, which the contextualiser, the sense network and the head share."""
        return self.gpt2_model.wte

    @property
    def position_embeddings(self) -> nn.Embedding:
        return self.gpt2_model.wpe

    def get_input_embeddings(self) -> nn.Embedding:
        return self.gpt2_model.wte

    def set_input_embeddings(self, new: nn.Embedding) -> None:
        self.gpt2_model.wte = new

    def sense_vectors(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """C of these ids [...], or of the whole vocabulary: [..., K, D], steering included."""
        if ids is None:
            ids = torch.arange(self.config.vocab_size, device=self.gpt2_model.wte.weight.device)
        distinct_U, places = torch.unique(ids, return_inverse=True)
        if torch.is_grad_enabled():
            senses_UKD = self.sense_network(self.gpt2_model.wte(distinct_U))
        else:
            table = self._table_of_senses()
            table.fill(distinct_U)
            senses_UKD = table.senses_VKD[distinct_U]
        if self.factors_VK is not None:
            senses_UKD = senses_UKD * self.factors_VK.to(senses_UKD)[distinct_U, :, None]
        senses: torch.Tensor = senses_UKD[places]
        return senses

    def cache_senses(self) -> None:
        """Compute the whole vocabulary's senses now (V x K x D values), rather than those of tokens as they come."""
        with torch.no_grad():
            ids = torch.arange(self.config.vocab_size, device=self.gpt2_model.wte.weight.device)
            self._table_of_senses().fill(ids)

    def train(self, mode: bool = True) -> BackpackModel:
        """As always. Kept senses go, for optimizers that write past a tensor's version counter (`.data`)."""
        self._table = None
        return super().train(mode)  # type: ignore[no-any-return]

    def _table_of_senses(self) -> _SenseTable:
        if self._table is None or not self._table.is_current():
            self._table = _SenseTable(self)
        return self._table

    def steer(self, ids: Any, senses: Any, factor: float) -> None:
        """Multiply these senses of these tokens by `factor`, wherever the tokens stand; calls add up. See `unsteer`."""
        if self.factors_VK is None:
            weight = self.gpt2_model.wte.weight
            self.factors_VK = torch.ones(self.config.vocab_size, self.config.num_senses, device=weight.device)
        rows, columns = (torch.as_tensor(x, device=self.factors_VK.device).flatten() for x in (ids, senses))
        self.factors_VK[rows[:, None], columns[None]] *= factor

    def unsteer(self) -> None:
        """Take back all that `steer` has done."""
        self.factors_VK = None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_senses: bool | None = None,
        **ignored: Any,
    ) -> BackpackOutput:
        """The mix of senses; `attention_mask` [B, S] is zero where a text is padded."""
        wants_senses = self.config.output_senses if output_senses is None else output_senses
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        length = input_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} axes; a Backpack takes [texts, positions].")
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        self._check_length(past + length, position_ids)
        seen = self._seen(attention_mask, past, length, input_ids.device)
        needs_mask = attention_mask is not None or (past > 0 and length > 1)
        hidden = self.gpt2_model(input_ids, position_ids, seen if needs_mask or past else None, cache)
        query, key = self.sense_weight_net.query_key(hidden[-1])
        all_ids = input_ids
        if cache is not None:
            # One more layer of the cache: the keys of the senses and, in place of values, the ids.
            while len(cache.layers) <= self.config.n_layer:
                cache.layers.append(_SenseLayer())
            if not isinstance(cache.layers[self.config.n_layer], _SenseLayer):
                cache.layers[self.config.n_layer] = _SenseLayer()
            key, ids = cache.update(key, input_ids[:, None, :, None], self.config.n_layer)
            all_ids = ids[:, 0, :, 0]
        mixed, senses, alpha = self._mix(query, key, all_ids, seen, wants_senses)
        return BackpackOutput(
            backpack_hidden_states=mixed,
            senses=senses,
            contextualization=alpha,
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )

    def _check_length(self, length: int, positions: torch.Tensor) -> None:
        """Texts that are padded on their left may be longer together than each of them is."""
        most = self.config.n_positions
        if length > most and (last := int(positions.max()) + 1) > most:
            raise ValueError(
                f"a text of {last} tokens is beyond the model's {most} positions: give fewer, or generate fewer."
            )

    def _seen(self, mask: torch.Tensor | None, past: int, length: int, device: torch.device) -> torch.Tensor:
        """Bool [B or 1, 1, L, S]: which positions each new one may look at; itself it always sees."""
        causal = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None, None]
        if mask is None:
            return causal
        itself = torch.eye(past + length, dtype=torch.bool, device=device)[past:]
        return causal & (mask.bool()[:, None, None, :] | itself)

    def _mix(
        self, query: torch.Tensor, key: torch.Tensor, ids: torch.Tensor, seen: torch.Tensor, wants_senses: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """o [B, L, D]; C and alpha where they are wanted, else one sense at a time and a single position by its bag."""
        if wants_senses:
            alpha = self.sense_weight_net.alpha(query, key, seen)
            senses = self.sense_vectors(ids).transpose(1, 2)
            return (alpha @ senses).sum(1), senses, alpha
        if query.shape[2] == 1 and not torch.is_grad_enabled():
            alpha = self.sense_weight_net.alpha(query, key, seen)[:, :, 0]  # [B, K, S]
            return self._bag(alpha, ids)[:, None], None, None
        distinct, places = torch.unique(ids, return_inverse=True)
        senses_UKD = self.sense_vectors(distinct)
        mixed = torch.zeros((), device=query.device, dtype=query.dtype)
        for sense in range(self.config.num_senses):
            alpha = self.sense_weight_net.alpha(query[:, sense], key[:, sense], seen[:, 0])
            mixed = mixed + alpha @ senses_UKD[:, sense][places]
        return mixed, None, None

    def _bag(self, alpha_BKS: torch.Tensor, ids_BS: torch.Tensor) -> torch.Tensor:
        """o [B, D] of one position: rows of the table, weighed and added up where they lie."""
        table = self._table_of_senses()
        table.fill(torch.unique(ids_BS))
        if self.factors_VK is not None:
            alpha_BKS = alpha_BKS * self.factors_VK.to(alpha_BKS)[ids_BS].transpose(1, 2)
        senses = torch.arange(self.config.num_senses, device=ids_BS.device)[:, None]
        rows_BX = (ids_BS[:, None] * self.config.num_senses + senses).flatten(1)
        flat = table.senses_VKD.flatten(0, 1)
        return F.embedding_bag(rows_BX, flat, mode="sum", per_sample_weights=alpha_BKS.flatten(1).to(flat))


class _SenseLayer(DynamicLayer):
    """A layer of the cache whose values are ids."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.values = value_states[:, :, :0]


class _SenseTable:
    """Sense vectors of the tokens met so far, valid as long as no weight that they depend on changes."""

    def __init__(self, model: BackpackModel) -> None:
        self._parameters = [model.gpt2_model.wte.weight, *model.sense_network.parameters()]
        self._versions = self._now()
        self._model = model
        weight, config = model.gpt2_model.wte.weight, model.config
        shape = (config.vocab_size, config.num_senses, config.n_embd)
        self.senses_VKD = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.known_V = torch.zeros(config.vocab_size, dtype=torch.bool, device=weight.device)
        self._all_known = False

    def _now(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._parameters]

    def is_current(self) -> bool:
        model = self._model
        parameters = [model.gpt2_model.wte.weight, *model.sense_network.parameters()]
        return all(a is b for a, b in zip(parameters, self._parameters, strict=True)) and self._versions == self._now()

    def fill(self, ids_U: torch.Tensor) -> None:
        """Compute what is missing, some thousands of tokens at a time."""
        if self._all_known:
            return
        with torch.autocast(self.senses_VKD.device.type, enabled=False):  # kept for whoever comes later
            for missing in ids_U[~self.known_V[ids_U]].split(2048):
                self.senses_VKD[missing] = self._model.sense_network(self._model.gpt2_model.wte(missing))
                self.known_V[missing] = True
        self._all_known = bool(self.known_V.all())


class BackpackForCausalLM(BackpackPreTrainedModel, GenerationMixin):
    """A Backpack with its head, the word embedding."""

    _tied_weights_keys = {"lm_head.weight": "backpack.gpt2_model.wte.weight"}  # noqa: RUF012

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__(config)
        self.backpack = BackpackModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new: nn.Linear) -> None:
        self.lm_head = new

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """As always, but without handing out senses unless they are asked for."""
        # Only with this name for the rest does transformers accept what forward alone takes.
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.setdefault("output_senses", False)
        return inputs

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_senses: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> BackpackOutput | tuple[Any, ...]:
        """Logits [B, L, V] and, with `labels` (ids, -100 where none counts; shifted here), the loss.

        `loss` is smoothed by `label_smoothing`, `loss_unsmoothed` never.
        """
        if ignored.get("output_attentions"):
            raise ValueError(
                "output_attentions is not kept; output_senses gives `contextualization`, what senses weigh."
            )
        output: BackpackOutput = self.backpack(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_senses=output_senses,
        )
        hidden = output.backpack_hidden_states
        assert hidden is not None
        output.logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the logits of all positions: leave logits_to_keep at 0.")
            logits = output.logits[:, :-1].flatten(0, 1).float()
            targets = labels[:, 1:].flatten().to(logits.device)
            output.loss_unsmoothed = F.cross_entropy(logits, targets, ignore_index=IGNORED)
            output.loss = output.loss_unsmoothed
            if label_smoothing:
                smooth: Any = {"label_smoothing": label_smoothing, "ignore_index": IGNORED}
                output.loss = F.cross_entropy(logits, targets, **smooth)
        return output if return_dict in (None, True) else output.to_tuple()
