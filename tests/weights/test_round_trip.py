"""Six families from transformers into every layout and back: the same tensors bit for bit, and the same function.

Every tp in 1, 2, 4 with every pp in 1, 2, 3 by the arithmetic of shards, as a checkpoint that ranks of that layout
would leave; and each family once through real ranks, which load, score and save it. Nothing divides its 97 ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from round_trips import LENGTH, through_real_ranks
from safetensors.torch import load_file, save_file

from xlmega import config as tables
from xlmega.models.config import ModelConfig, check_layout
from xlmega.models.decoder import padded_vocabulary, shard_axis
from xlmega.parallel.layout import Layout
from xlmega.training.checkpoint import FORMAT_VERSION, manifest_digest, open_source, piece_name
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import Shard
from xlmega.weights.storage import json_text, sha256_of

pytestmark = pytest.mark.torch

RANKED: dict[str, dict[str, Any]] = {
    "xglm": {"tp": 2, "pp": 2},
    "gpt2": {"tp": 4},
    "languini": {"tp": 2, "pp": 2, "virtual_stages": 3},
    "gpt_neox": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "bloom": {"tp": 4, "sequence_parallel": True},
    "llama": {"tp": 2, "pp": 2, "virtual_stages": 3, "sequence_parallel": True},
}


def shards_on(config: ModelConfig, layout: Layout, tp_rank: int, stage: int) -> list[Shard]:
    """What one rank holds, from shapes alone."""
    each = config.num_layers // layout.pp
    found = []
    for name, shape in logical_shapes(config).items():
        parts = name.split(".")
        last = parts[0] == "output_layer" or parts[1] == "final_layernorm"
        where = int(parts[2]) // each if parts[1] == "layers" else layout.pp - 1 if last else 0
        if where != stage:
            continue
        axis = shard_axis(name)
        if axis is None:
            found.append(Shard(name, shape, None, 0, 0, shape))
            continue
        # Only rows of the vocabulary are padded; what else is cut divides.
        width = padded_vocabulary(shape[axis], layout.tp) // layout.tp
        start, stop = (min((tp_rank + k) * width, shape[axis]) for k in (0, 1))
        local = tuple(width if a == axis else n for a, n in enumerate(shape))
        found.append(Shard(name, shape, axis, start, stop, local))
    return found


def cut_and_saved(source: Any, layout: Layout, folder: Path) -> Path:
    """A checkpoint as the ranks of `layout` leave it, each having loaded its padded part of `source`."""
    check_layout(layout, source.config, LENGTH)
    folder.mkdir(parents=True)
    entries = []
    for rank in range(layout.world_size):
        tp_rank, _, stage = layout.coordinates(rank)
        pieces = {}
        for shard in shards_on(source.config, layout, tp_rank, stage):
            local = torch.full(shard.local_shape, torch.nan)
            shard.valid(local).copy_(source.read_slice(shard.name, shard.slices))
            if shard.axis is not None or tp_rank == 0:
                held = shard.valid(local).contiguous()
                pieces[piece_name("weight", shard.name, shard.shape, shard.slices)] = held
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file(pieces, path)
        entries.append(
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path), "pieces": list(pieces)}
        )
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "layout": layout.describe(),
        "model": tables.to_table(source.config),
        "facts": {},
        "files": entries,
    }
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json_text(manifest))
    return folder


@pytest.mark.parametrize("kind", sorted(RANKED))
def test_any_layout_gives_back_what_transformers_saved(kind: str, tmp_path: Path) -> None:
    import theirs

    from xlmega.weights.huggingface import export_huggingface, open_huggingface, verify_huggingface

    stored = theirs.saved(kind, tmp_path / "theirs")
    source = open_huggingface(tmp_path / "theirs")
    for tp in (1, 2, 4):
        for pp in (1, 2, 3):
            name = f"tp{tp}pp{pp}"
            checkpoint = open_source(cut_and_saved(source, Layout(tp, pp), tmp_path / name))
            export_huggingface(checkpoint, tmp_path / f"{name}hf", vocabulary_folder=None)
            back = load_file(tmp_path / f"{name}hf" / "model.safetensors")
            assert back.keys() == stored.keys() and all(torch.equal(back[k], stored[k]) for k in stored), name
    assert verify_huggingface(checkpoint, tmp_path / "tp4pp3hf").logit_difference < 1e-4


@pytest.mark.multiprocess
def test_real_ranks_compute_what_transformers_does_and_give_it_back(tmp_path: Path) -> None:
    import theirs

    for kind in RANKED:
        theirs.saved(kind, tmp_path / kind)
    cases = {kind: {"model": kind, **sizes} for kind, sizes in RANKED.items()}
    through_real_ranks(tmp_path, cases, lambda kind, ids: theirs.logits(tmp_path / kind, ids))
