"""Checkpoints of a tiny model written by hand, with values that tell kind, name, step and place apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from xlmega import config as tables
from xlmega.models.config import ModelConfig, model_config
from xlmega.training import checkpoint
from xlmega.training.checkpoint import folder_of, piece_name
from xlmega.weights import storage
from xlmega.weights.names import logical_shapes

MODEL = model_config(
    preset="xglm_tiny", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_heads=2, vocab_size=37, tied=False
)


def tensor_of(kind: str, name: str, step: int) -> torch.Tensor:
    """Values that tell kind, name, step and place apart."""
    shape = logical_shapes(MODEL)[name]
    seed = [checkpoint.KINDS.index(kind), step, *name.encode()]
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def write(run: Path, step: int, model: ModelConfig = MODEL) -> Path:
    """A checkpoint of four files: every tensor cut once along an axis at an uneven place, norms and biases whole."""
    folder = folder_of(run, step)
    folder.mkdir(parents=True)
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    turn = itertools.cycle(range(4))
    for kind in checkpoint.KINDS:
        for index, (name, shape) in enumerate(logical_shapes(model).items()):
            whole = tensor_of(kind, name, step)
            axis = index % len(shape)
            cut = max(1, shape[axis] // 3)
            spans = [slice(0, cut), slice(cut, shape[axis])] if len(shape) == 2 else [slice(None)]
            for span in spans:
                slices = tuple(span if k == axis else slice(None) for k in range(len(shape)))
                files[next(turn)][piece_name(kind, name, shape, slices)] = whole[slices].contiguous()
    entries = []
    for rank, pieces in enumerate(files):
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file(pieces, path)
        entries.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": storage.sha256_of(path),
                "pieces": list(pieces),
            }
        )
    manifest: dict[str, Any] = {
        "format_version": checkpoint.FORMAT_VERSION, "step": step, "layout": "by hand", "precision": "fp32",
        "zero_stage": 1, "optimizer_steps": step, "loss_scaler": {}, "model": tables.to_table(model),
        "facts": {"é": 1}, "files": entries,
    }  # fmt: skip
    publish(folder, manifest)
    return folder


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint.manifest_digest(manifest)
    storage.write_json(folder / "manifest.json", manifest)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))
