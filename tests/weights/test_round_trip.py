"""Six families from transformers into every layout and back: the same tensors bit for bit, and the same function.

Every tp in 1, 2, 4 with every pp in 1, 2, 3 by the arithmetic of shards, as a checkpoint that ranks of that layout
would leave; and each family once through real ranks, which load, score and save it. Nothing divides its 97 ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file

from xlmega import config as tables
from xlmega.data.batches import Batch
from xlmega.models.config import ModelConfig, check_layout
from xlmega.models.decoder import padded_vocabulary, shard_axis
from xlmega.parallel import groups
from xlmega.parallel.layout import Layout
from xlmega.training.checkpoint import FORMAT_VERSION, manifest_digest, open_source, piece_name
from xlmega.training.engine import Engine
from xlmega.training.optimizer import OptimizerSettings
from xlmega.training.runtime import runtime
from xlmega.training.saving import Retention, Saver
from xlmega.weights.directory import open_logical_directory, write_logical
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import Shard
from xlmega.weights.storage import json_text, sha256_of

pytestmark = pytest.mark.torch

WINDOWS, LENGTH = 4, 16
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


def rank_main(rank: int, folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load each family's logical directory, score a batch, save a checkpoint; what the scores were."""
    torch.set_num_threads(1)
    scores = {}
    for kind, sizes in kinds.items():
        source, layout = open_logical_directory(folder / kind), Layout(**sizes)
        worlds.forget_groups()
        port = worlds.meet(folder, kind, rank)
        process = groups.Process(rank, layout.world_size, rank, "127.0.0.1", port, "test")
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
        with groups.joined(process, layout, timeout_seconds=300) as device:
            engine = Engine(
                source.config, layout, runtime(settings), OptimizerSettings(), device=device, micro_batches=WINDOWS
            )
            engine.write_state(source)
            ids = np.load(folder / "ids.npy")[:, None]
            batch = Batch(
                ids, np.ones((WINDOWS, 1, LENGTH), np.float32), np.arange(WINDOWS, dtype=np.int32)[:, None],
                np.arange(WINDOWS)[:, None],
            )  # fmt: skip
            scores[kind] = engine.evaluate(batch, num_languages=WINDOWS).nll
            ended = list(Saver(engine, folder / f"{kind}_run", Retention()).save(0, {}, wait=True))
            assert not any(one.problem for one in ended), ended
    return scores


@pytest.mark.multiprocess
def test_real_ranks_compute_what_transformers_does_and_give_it_back(tmp_path: Path) -> None:
    import theirs

    from xlmega.weights.huggingface import export_huggingface, open_huggingface

    stored, expected = {}, {}
    ids = torch.randint(theirs.VOCABULARY, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "ids.npy", ids.numpy())
    for kind in RANKED:
        stored[kind] = theirs.saved(kind, tmp_path / f"{kind}_theirs")
        write_logical(open_huggingface(tmp_path / f"{kind}_theirs"), tmp_path / kind)
        logits = theirs.logits(tmp_path / f"{kind}_theirs", ids[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        expected[kind] = losses.sum(1)
    results = worlds.run(4, rank_main, RANKED, folder=tmp_path)
    for kind in RANKED:
        found = torch.tensor(results[0][kind], dtype=torch.float32)
        torch.testing.assert_close(found / LENGTH, expected[kind] / LENGTH, rtol=0, atol=1e-4, msg=kind)
        export_huggingface(open_source(tmp_path / f"{kind}_run"), tmp_path / f"{kind}_back", vocabulary_folder=None)
        back = load_file(tmp_path / f"{kind}_back" / "model.safetensors")
        assert back.keys() == stored[kind].keys(), kind
        assert all(torch.equal(back[name], stored[kind][name]) for name in back), kind
