"""Models that others saved with torch.save, read as LogicalTensors.

In: X-ELM's consolidated metaseq files (fairseq's XGLM has the same names), the state dict of a Backpack by its authors'
code or nanoBackpack's (`weights.backpack_files`), a state dict of one of the Hugging Face
families (`.pt`, `.bin`, sharded `pytorch_model-*.bin`), or a directory of DeepSpeed's engine under any ZeRO stage.
Out: the same as a Hugging Face directory gives. What a file cannot say of its model is read from a config.json beside
it or above it, or where `config_folder` says; metaseq files say it themselves, in the arguments of their training.
Guaranteed: nothing of a file is executed (`weights.torch_files`); a tensor is read when it is asked for.
Source: METHODS §2.10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig
from xlmega.weights.backpack_files import backpack_in
from xlmega.weights.deepspeed_zero import open_zero, zero_folder
from xlmega.weights.directory import TensorStore
from xlmega.weights.huggingface import HuggingFaceDirectory, read_config
from xlmega.weights.names import XGLM_LAYERNORM_EPSILON
from xlmega.weights.torch_files import (
    SUFFIXES,
    Inert,
    TorchTensors,
    has_torch_weights,
    read_torch,
    tensors_in,
    torch_folder,
)

CONSOLIDATED = "consolidated.pt"
_METASEQ_EMBEDDING = "decoder.embed_tokens.weight"
# What metaseq and fairseq store beside the parameters, and the tied head, which is the embedding once more.
_METASEQ_EXTRA = ("decoder.version", "decoder.embed_positions._float_tensor", "decoder.output_projection.weight")


def is_foreign(path: Path) -> bool:
    """`path` is a file or directory that `open_foreign` is for."""
    if path.is_file():
        return path.suffix in SUFFIXES
    return path.is_dir() and (
        (path / CONSOLIDATED).is_file() or has_torch_weights(path) or zero_folder(path) is not None
    )


def open_foreign(path: Path, config_folder: Path | None = None) -> HuggingFaceDirectory:
    """The model in a file or directory of another trainer; refuses what is no data or no model of ours."""
    try:
        return _opened(path, config_folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # data, but laid out otherwise
        raise CheckpointError(f"'{path}' is not laid out as trainers lay out their models: {error!r}.") from error


def _opened(path: Path, config_folder: Path | None) -> HuggingFaceDirectory:
    if path.is_dir() and (path / CONSOLIDATED).is_file():
        path = path / CONSOLIDATED
    if path.is_file():
        stored = read_torch(path)
        tensors = tensors_in(stored, path)
        if _METASEQ_EMBEDDING in tensors:
            return _metaseq(path, stored, tensors)
        if (backpack := backpack_in(path, stored, tensors, config_folder)) is not None:
            return HuggingFaceDirectory(path, backpack[0], TorchTensors(backpack[1]))
        return _with_config(path, config_folder, TorchTensors(tensors))
    if not path.is_dir():
        raise CheckpointError(f"there is no file or directory '{path}'.")
    if has_torch_weights(path):
        return _with_config(path, config_folder, torch_folder(path))
    folder = zero_folder(path)
    if folder is None:
        raise CheckpointError(
            f"'{path}' holds none of {CONSOLIDATED}, pytorch_model.bin, and mp_rank_00_model_states.pt of DeepSpeed."
        )
    return _with_config(folder, config_folder, open_zero(folder))


def _with_config(path: Path, config_folder: Path | None, tensors: TensorStore) -> HuggingFaceDirectory:
    # Trainers write their DeepSpeed tag folder below the model's own.
    near = [config_folder] if config_folder else [path, path.parent, path.parent.parent]
    for folder in near:
        if (folder / "config.json").is_file():
            return HuggingFaceDirectory(path, read_config(folder), tensors)
    raise CheckpointError(
        f"'{path}' holds weights, but no config.json in {' or '.join(repr(str(folder)) for folder in near)} says of "
        "which model.\n  Name the folder of the model's config.json: --config DIR."
    )


# -------------------------------------------------------------------- metaseq


def _metaseq(path: Path, stored: Any, tensors: Mapping[str, torch.Tensor]) -> HuggingFaceDirectory:
    fused = [name for name in tensors if "qkv_proj" in name]
    if fused:
        raise CheckpointError(
            f"'{path}' has {fused[0]}: queries, keys and values in one matrix, in an order that depends on how it was "
            "trained. Consolidate it with separate projections (q_proj, k_proj, v_proj), as X-ELM does."
        )
    config = metaseq_config(path, _arguments(path, stored), tensors)
    renamed = {
        f"model.{name.removeprefix('decoder.')}": tensor
        for name, tensor in tensors.items()
        if name not in _METASEQ_EXTRA or (name == "decoder.output_projection.weight" and not config.tied)
    }
    if not config.tied:
        renamed["lm_head.weight"] = renamed.pop("model.output_projection.weight")
    return HuggingFaceDirectory(path, config, TorchTensors(renamed))


def _arguments(path: Path, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The training's arguments: `args` of older files, `cfg.model` of newer ones."""
    settings = stored.get("cfg")
    for found in (stored.get("args"), settings.get("model") if isinstance(settings, Mapping) else None):
        table = vars(found) if isinstance(found, Inert) else found
        if isinstance(table, Mapping) and "decoder_layers" in table:
            return {key: value for key, value in table.items() if value is not None}
    raise CheckpointError(f"'{path}' has neither 'args' nor 'cfg' with decoder_layers, so its heads cannot be known.")


def metaseq_config(path: Path, args: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> ModelConfig:
    """The ModelConfig of a decoder that metaseq or fairseq trained with `args`; refuses what is not XGLM's kind."""
    vocab_size, width = tensors[_METASEQ_EMBEDDING].shape
    problems = [
        f"{key} is {args[key]}, but {due} is due."
        for key, due in (
            ("decoder_learned_pos", False),
            ("decoder_normalize_before", True),
            ("decoder_embed_dim", width),
            ("no_token_positional_embeddings", False),
            ("layernorm_embedding", False),
            ("activation_fn", "gelu"),
        )
        if key in args and args[key] != due
    ]
    missing = [key for key in ("decoder_layers", "decoder_attention_heads", "decoder_ffn_embed_dim") if key not in args]
    problems += [f"the training's arguments lack {key}." for key in missing]
    if problems:
        raise CheckpointError("\n  ".join([f"'{path}' cannot be read as an XGLM decoder:", *problems]))
    heads = int(args["decoder_attention_heads"])
    return ModelConfig(
        family="xglm",
        num_layers=int(args["decoder_layers"]),
        hidden_size=width,
        ffn_hidden_size=int(args["decoder_ffn_embed_dim"]),
        num_heads=heads,
        head_dim=width // heads,
        max_positions=int(args.get("max_target_positions", args.get("tokens_per_sample", 2048))),
        positions="sinusoidal",
        tied=bool(args.get("share_decoder_input_output_embed", True)),
        embedding_scale=1.0 if args.get("no_scale_embedding") else math.sqrt(width),
        activation="gelu",
        vocab_size=vocab_size,
        layernorm_epsilon=XGLM_LAYERNORM_EPSILON,
        dropout=float(args.get("dropout", 0.0)),
        attention_dropout=float(args.get("attention_dropout", 0.0)),
    )
