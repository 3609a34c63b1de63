"""Backpacks that their authors' own code saved, read as LogicalTensors.

In: the state dict of the original (flash-attention's GPT modules; METHODS §4.2) or of nanoBackpack and what derives
from it (§4.3), as `weights.torch_files` gives them. Out: the tensors under the names of an exported Backpack, and its
ModelConfig. Number of layers and senses, widths and biases are read off the tensors; the number of heads is not in
them: nanoBackpack stores it as `model_args`, for the original a config.json beside the file says `n_head`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig
from xlmega.weights.family_configs import is_count

Tensors = Mapping[str, torch.Tensor]

_ORIGINAL = "transformer.content_model.final_mlp.fc2.weight"
_NANO = "backpack.sense_vector_layer.ff_2.c_proj.weight"

_ORIGINAL_NAMES = {
    "transformer.gpt2_model.embeddings.word_embeddings": "gpt2_model.wte",
    "transformer.gpt2_model.embeddings.position_embeddings": "gpt2_model.wpe",
    "transformer.contextualization_attn.Wqkv": "sense_weight_net.c_attn",
    "transformer.content_model.ln_0": "sense_network.ln",
    "transformer.content_model.layers.0.norm1": "sense_network.block.ln_1",
    "transformer.content_model.layers.0.norm2": "sense_network.block.ln_2",
    "transformer.content_model.layers.0.mlp.fc1": "sense_network.block.mlp.c_fc",
    "transformer.content_model.layers.0.mlp.fc2": "sense_network.block.mlp.c_proj",
    "transformer.content_model.final_mlp.fc1": "sense_network.final_mlp.c_fc",
    "transformer.content_model.final_mlp.fc2": "sense_network.final_mlp.c_proj",
}
_ORIGINAL_LAYER = {"mixer.Wqkv": "attn.c_attn", "mixer.out_proj": "attn.c_proj", "norm1": "ln_2"}
_ORIGINAL_LAYER |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_CONTEXT, _SENSES = "backpack.contextualization_layer.", "backpack.sense_vector_layer."
_NANO_NAMES = {
    f"{_CONTEXT}transformer.wte": "gpt2_model.wte",
    f"{_CONTEXT}transformer.wpe": "gpt2_model.wpe",
    f"{_CONTEXT}transformer.ln_f": "gpt2_model.ln_f",
    f"{_CONTEXT}c_attn": "sense_weight_net.c_attn",
    f"{_SENSES}ff_1.c_fc": "sense_network.block.mlp.c_fc",
    f"{_SENSES}ff_1.c_proj": "sense_network.block.mlp.c_proj",
    f"{_SENSES}ln_1": "sense_network.block.ln_1",
    f"{_SENSES}ff_2.c_fc": "sense_network.final_mlp.c_fc",
    f"{_SENSES}ff_2.c_proj": "sense_network.final_mlp.c_proj",
    f"{_SENSES}ln_2": "sense_network.joint_ln",
}
# The shared embedding under its other names, and masks.
_REPEATED = re.compile(
    r"^(transformer\.(content_model\.)?embeddings\..*|lm_head\.weight|wte\.weight|.*\.attn\.bias|"
    r"backpack\.(sense_vector_layer\.wte\.weight|logit_layer\.lm_head\.weight|contextualization_layer\.bias))$"
)


def backpack_in(
    path: Path, stored: Any, tensors: Tensors, config_folder: Path | None
) -> tuple[ModelConfig, dict[str, torch.Tensor]] | None:
    """The model and its tensors by an export's names; None where the state dict is no Backpack's."""
    if _ORIGINAL in tensors:
        return _original(path, tensors, config_folder)
    if _NANO in tensors:
        return _nano(path, stored, tensors)
    return None


def _original(path: Path, tensors: Tensors, config_folder: Path | None) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    settings: dict[str, Any] = {}
    for folder in [config_folder] if config_folder else [path.parent]:
        if (folder / "config.json").is_file():
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = settings.get("n_head", settings.get("num_attention_heads"))
    if not is_count(heads):
        raise CheckpointError(
            f"'{path}' is a Backpack's state dict, which does not say how many heads its contextualiser has.\n"
            '  Put a config.json with {"n_head": ...} beside it, or name its folder: --config DIR.'
        )
    layers = _count_layers(tensors, r"transformer\.gpt2_model\.layers\.(\d+)\.")
    names = dict(_ORIGINAL_NAMES)
    # A norm stands behind the sum that it norms: each layer's second is the next one's first.
    names["transformer.gpt2_model.ln_0"] = "gpt2_model.h.0.ln_1"
    for layer in range(layers):
        ours, theirs = f"gpt2_model.h.{layer}.", f"transformer.gpt2_model.layers.{layer}."
        names |= {f"{theirs}{name}": f"{ours}{mine}" for name, mine in _ORIGINAL_LAYER.items()}
        names[f"{theirs}norm2"] = f"gpt2_model.h.{layer + 1}.ln_1" if layer + 1 < layers else "gpt2_model.ln_f"
    renamed = _renamed(path, tensors, names)
    scaled = bool(settings.get("scale_attn_by_inverse_layer_idx", True))
    return _config(path, "original", renamed, layers, heads, scaled), renamed


def _nano(path: Path, stored: Any, tensors: Tensors) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    arguments = stored.get("model_args") if isinstance(stored, Mapping) else None
    heads = arguments.get("n_head") if isinstance(arguments, Mapping) else None
    if not is_count(heads):
        raise CheckpointError(f"'{path}' is a nanoBackpack, but has no 'model_args' with n_head.")
    layers = _count_layers(tensors, re.escape(f"{_CONTEXT}transformer.h.") + r"(\d+)\.")
    names = dict(_NANO_NAMES)
    for layer in range(layers):
        for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names[f"{_CONTEXT}transformer.h.{layer}.{module}"] = f"gpt2_model.h.{layer}.{module}"
    renamed = _renamed(path, tensors, names)
    config = _config(path, "nano", renamed, layers, heads, False)
    # Its last axis counts senses, ours the width.
    for name in ("final_mlp.c_proj.weight", "final_mlp.c_proj.bias", "joint_ln.weight", "joint_ln.bias"):
        full = f"backpack.sense_network.{name}"
        if full in renamed and renamed[full].shape[-1] == config.num_senses * config.hidden_size:
            parts = renamed[full].unflatten(-1, (config.hidden_size, -1))
            renamed[full] = parts.transpose(-1, -2).flatten(-2, -1)
    return config, renamed


def _count_layers(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def _renamed(path: Path, tensors: Tensors, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """By an export's names and in its shapes; a tensor that has no place there is an error."""
    renamed, strange = {}, []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            ours = names[module]
            transposed = kind == "weight" and (".attn." in ours or ".mlp." in ours or "final_mlp." in ours)
            renamed[f"backpack.{ours}.{kind}"] = tensor.t() if transposed else tensor
        elif not _REPEATED.match(name):
            strange.append(name)
    if strange:
        raise CheckpointError(f"'{path}' has tensors that a Backpack has not: {', '.join(sorted(strange)[:5])}.")
    return renamed


def _config(path: Path, variant: Any, tensors: Tensors, layers: int, heads: int, scaled: bool) -> ModelConfig:
    try:
        vocab_size, width = tensors["backpack.gpt2_model.wte.weight"].shape
        positions = tensors["backpack.gpt2_model.wpe.weight"].shape[0]
        inner = tensors["backpack.sense_network.block.mlp.c_fc.weight"].shape[1]
        last, outputs = tensors["backpack.sense_network.final_mlp.c_proj.weight"].shape
    except KeyError as error:
        raise CheckpointError(f"'{path}' lacks {error.args[0].removeprefix('backpack.')} of a Backpack.") from None
    if width % heads or last % width or outputs % width:
        raise CheckpointError(
            f"'{path}' is {width} wide, which {heads} heads do not divide, or its last hidden layer, {last} wide, or "
            f"its senses, {outputs} wide together, are no multiple of that."
        )
    config = ModelConfig(
        family="backpack",
        backpack_variant=variant,
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=inner,
        num_heads=heads,
        head_dim=width // heads,
        max_positions=positions,
        positions="learned",
        tied=True,
        embedding_scale=1.0,
        activation="gelu_tanh",
        vocab_size=vocab_size,
        residual_init="both",
        linear_bias="backpack.sense_network.block.mlp.c_fc.bias" in tensors,
        norm_bias="backpack.sense_network.block.ln_1.bias" in tensors,
        layer_scaled_attention=scaled,
        num_senses=outputs // width,
        sense_intermediate_scale=last // width,
    )
    if wrong := list(config.problems()):
        raise CheckpointError("\n  ".join([f"'{path}' is no Backpack of ours:", *wrong]))
    return config
