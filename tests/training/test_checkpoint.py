"""Logical checkpoints: any slice over any pieces, and every kind of damage found, named and passed over."""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from safetensors.torch import save_file

from xlmega import config as tables
from xlmega.data.batches import Batch
from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig, model_config
from xlmega.parallel import groups
from xlmega.parallel.layout import Layout
from xlmega.training import checkpoint
from xlmega.training.checkpoint import (
    Checkpoint,
    damage,
    folder_of,
    list_checkpoints,
    newest,
    open_run,
    open_source,
    piece_name,
    prune,
)
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
MODEL = model_config(
    preset="xglm_tiny", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_heads=2, vocab_size=37, tied=False
)
WORDS = "embedding.word_embeddings.weight"
PROJECTION = "decoder.layers.1.self_attention.linear_proj.weight"


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
                "sha256": checkpoint._digest(path),
                "pieces": list(pieces),
            }
        )
    manifest: dict[str, Any] = {
        "format_version": checkpoint.FORMAT_VERSION, "step": step, "layout": "by hand", "precision": "fp32",
        "zero_stage": 1, "loss_scale": 1.0, "model": tables.to_table(model), "facts": {"é": 1}, "files": entries,
    }  # fmt: skip
    publish(folder, manifest)
    return folder


def publish(folder: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("written") / "run"
    for step in (2, 4):
        write(run, step)
    return run


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy to damage, of steps 2 and 4."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_whole_tensors_and_moments(written: Path) -> None:
    found = Checkpoint(folder_of(written, 4))
    assert (found.step, found.config, found.names()) == (4, MODEL, list(logical_shapes(MODEL)))
    for name in found.names():
        assert found.shape(name) == logical_shapes(MODEL)[name]
        whole = (slice(None),) * len(found.shape(name))
        assert torch.equal(found.read(name), tensor_of("weight", name, 4))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found.moment(kind).read_slice(name, whole), tensor_of(kind, name, 4))


@pytest.mark.parametrize("name", [WORDS, PROJECTION, "decoder.layers.0.mlp.linear_fc1.bias"])
def test_any_slice_across_pieces(written: Path, name: str) -> None:
    found = Checkpoint(folder_of(written, 4))
    whole = tensor_of("weight", name, 4)
    cuts = [
        [slice(None), slice(0, 1), slice(1, n), slice(n // 3 - 1, n // 3 + 1), slice(-2, None), slice(n, n)]
        for n in whole.shape
    ]
    for slices in itertools.product(*cuts):
        part = found.read_slice(name, slices)
        assert part.dtype == torch.float32 and torch.equal(part, whole[slices]), slices


def test_names_of_pieces() -> None:
    name = piece_name("weight", WORDS, (37, 16), (slice(0, 12), slice(None)))
    assert name == "weight/embedding.word_embeddings.weight[0:12,0:16]"
    assert checkpoint._parse(name) == ("weight", WORDS, ((0, 12), (0, 16)))
    for bad in ("weight/../../x[0:1]", "weight/a", "a[0:1]"):
        with pytest.raises(CheckpointError, match="is not the name of a piece"):
            checkpoint._parse(bad)


def test_listing_and_pruning(run: Path) -> None:
    write(run, 3)
    (run / "checkpoints/step-00000009.part").mkdir()
    (run / "checkpoints/step-9").mkdir()
    assert list_checkpoints(run) == [2, 3, 4]
    assert folder_of(run, 123_456_789).name == "step-123456789"
    prune(run, 0, 4)
    assert list_checkpoints(run) == [2, 3, 4]
    prune(run, 5, 4)
    assert list_checkpoints(run) == [2, 3, 4]
    prune(run, 1, 3)  # 4 was damaged and is yet to be written again
    assert list_checkpoints(run) == [3, 4]
    prune(run, 1, 4)
    assert list_checkpoints(run) == [4]
    assert list_checkpoints(run / "none") == []


# -------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(bytes(data))


def swap(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


FILES = [*(f"rank-{rank:05d}.safetensors" for rank in range(4)), "manifest.json"]
HURTS: dict[str, Callable[[Path], Any]] = {
    "first bit flipped": lambda path: flip(path, 0),
    "middle bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last bit flipped": lambda path: flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another step": lambda path: shutil.copy(path.parents[1] / "step-00000002" / path.name, path),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("hurt", sorted(HURTS))
def test_damage_is_named_and_passed_over(run: Path, file: str, hurt: str) -> None:
    HURTS[hurt](folder_of(run, 4) / file)
    problems = list(damage(folder_of(run, 4)))
    assert problems
    # A manifest of another step knows other checksums for every file; else the one file is named.
    assert file in problems[0] or (file, hurt) == ("manifest.json", "of another step")
    said: list[str] = []
    found = newest(run, said.append)
    assert found is not None and found.step == 2
    assert len(said) == 1 and said[0].startswith("passing over the checkpoint of step 4: ")
    with pytest.raises(CheckpointError):
        open_run(folder_of(run, 4)).read(WORDS)
    assert open_run(run).step == open_source(run).step == 2


def test_files_swapped_in_a_checkpoint_and_whole_checkpoints_swapped(run: Path) -> None:
    folder = folder_of(run, 4)
    swap(folder / FILES[0], folder / FILES[1])
    assert len(list(damage(folder))) == 2
    swap(folder / FILES[0], folder / FILES[1])
    assert not list(damage(folder))
    swap(folder_of(run, 2), folder)
    assert "holds the checkpoint of step 2: it was renamed or exchanged" in next(iter(damage(folder)))


def test_shares_of_the_hashing_find_it_once(run: Path) -> None:
    flip(folder_of(run, 4) / FILES[2], 500)
    found = [list(damage(folder_of(run, 4), share, 3)) for share in range(3)]
    assert [len(problems) for problems in found] == [0, 0, 1]


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(run: Path, tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    for step in (2, 4):
        flip(folder_of(run, step) / FILES[0], 600)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged \(steps 2, 4\)\. Restore one"):
        newest(run, said.append)
    assert len(said) == 2


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "step": (lambda manifest: manifest.update(step=3), "its own checksum differs"),
    "a file's checksum": (lambda manifest: manifest["files"][0].update(sha256="0" * 64), "its own checksum differs"),
    "the model": (lambda manifest: manifest["model"].update(num_layers=1), "its own checksum differs"),
    "no checksum": (lambda manifest: manifest.pop("sha256"), "is not a checkpoint's manifest"),
}


@pytest.mark.parametrize("name", sorted(TAMPERED))
def test_a_tampered_manifest(run: Path, name: str) -> None:
    path = folder_of(run, 4) / "manifest.json"
    manifest = json.loads(path.read_text())
    change, words = TAMPERED[name]
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert words in next(iter(damage(path.parent)))
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(path.parent)


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "{", "{}"])
def test_a_manifest_that_is_something_else(run: Path, text: str) -> None:
    (folder_of(run, 4) / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a checkpoint's manifest"):
        Checkpoint(folder_of(run, 4))


def test_another_format_and_missing_pieces_under_a_good_checksum(run: Path) -> None:
    folder = folder_of(run, 4)
    good = json.loads((folder / "manifest.json").read_text())
    publish(folder, {**good, "format_version": 2})
    with pytest.raises(CheckpointError, match="has format 2; this xlmega reads 1"):
        Checkpoint(folder)
    files = [
        {**entry, "pieces": [piece for piece in entry["pieces"] if not piece.startswith(f"weight/{WORDS}")]}
        for entry in good["files"]
    ]
    publish(folder, {**good, "files": files})
    with pytest.raises(CheckpointError, match=f"lacks {WORDS}"):
        Checkpoint(folder)
    files = [
        {**entry, "pieces": [piece for piece in entry["pieces"] if not piece.startswith(f"weight/{WORDS}[0:")]}
        for entry in good["files"]
    ]
    publish(folder, {**good, "files": files})
    with pytest.raises(CheckpointError, match="has only .* values of weight/embedding"):
        Checkpoint(folder).read(WORDS)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        open_source(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_source(tmp_path)


# -------------------------------------------------------------------- written by an engine


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """A tiny engine of one rank, two steps old."""
    from xlmega.training.engine import Engine
    from xlmega.training.optimizer import OptimizerSettings
    from xlmega.training.runtime import runtime

    process = groups.Process(0, 1, 0, "127.0.0.1", worlds.free_port(), "test")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "DS_SKIP_CUDA_CHECK"):
            patch.setenv(name, "0")  # so that they are as before afterwards
        patch.setenv("DS_ACCELERATOR", "cpu")
        worlds.forget_groups()
        with groups.joined(process, Layout()) as device:
            how = runtime({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}})
            one = Engine(MODEL, Layout(), how, OptimizerSettings(), device=device, micro_batches=1, languages=("a",))
            one.write_state(InitialWeights(MODEL, 0, logical_shapes(MODEL)))
            for step in range(2):
                advance(one, step)
            yield one
        worlds.forget_groups()
    gc.collect()


def advance(engine: Any, step: int) -> float:
    tokens = np.random.default_rng(step).integers(0, 37, (1, 2, 9))
    slots = np.array([[2 * step, 2 * step + 1]])
    batch = Batch(tokens, np.ones((1, 2, 8), np.float32), np.zeros((1, 2), np.int32), slots)
    loss: float = engine.forward_backward(batch, step=step).loss
    engine.apply(1e-3, step=step)
    return loss


def state(engine: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (kind, shard.name): engine.read_state(shard, parameter, kind).clone()
        for kind in checkpoint.KINDS
        for shard, parameter in engine.shards
    }


def test_an_engine_saves_reads_back_and_goes_on_bitwise(engine: Any, tmp_path: Path) -> None:
    before = state(engine)
    folder = checkpoint.save(engine, tmp_path, 2, {"tokens": 32})
    assert list_checkpoints(tmp_path) == [2] and not list(folder.parent.glob("*.part"))
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert not list(damage(folder))
    found = Checkpoint(folder)
    assert found.manifest["facts"] == {"tokens": 32} and found.config == MODEL
    stored = sum(math.prod(shape) for shape in logical_shapes(MODEL).values())
    assert 0 < (folder / "rank-00000.safetensors").stat().st_size - 3 * 4 * stored < 20_000
    for (kind, name), value in before.items():
        assert torch.equal(found._read(kind, name, (slice(None),) * value.dim()), value), (kind, name)
    losses = [advance(engine, step) for step in (2, 3)]
    after = state(engine)
    engine.write_state(found, {kind: found.moment(kind) for kind in checkpoint.KINDS[1:]}, found.step)
    assert all(torch.equal(value, before[key]) for key, value in state(engine).items())
    assert [advance(engine, step) for step in (2, 3)] == losses
    assert all(torch.equal(value, after[key]) for key, value in state(engine).items())


def test_saving_replaces_what_a_killed_run_left(engine: Any, tmp_path: Path) -> None:
    part = tmp_path / "checkpoints/step-00000005.part"
    part.mkdir(parents=True)
    (part / "rank-00009.json").write_text("rubbish")
    folder = checkpoint.save(engine, tmp_path, 5, {})
    flip(folder / "rank-00000.safetensors", 900)
    assert list(damage(folder))
    assert checkpoint.save(engine, tmp_path, 5, {}) == folder
    assert not list(damage(folder)) and list_checkpoints(tmp_path) == [5]


def test_a_disk_that_cannot_be_written_is_one_error_and_leaves_the_others(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(engine, tmp_path, 5, {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="step 6 could not be written .*rank 0: .*No space left.*are untouched"):
        checkpoint.save(engine, tmp_path, 6, {})
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [5] and not list(damage(folder_of(tmp_path, 5)))


def test_validation_sums_what_the_engine_finds(engine: Any) -> None:
    from xlmega.training.validation import ValidationSet

    class Windows(list[Batch]):
        languages = ("a", "b")

    generator = np.random.default_rng(1)
    weights = np.ones((1, 2, 8), np.float32)
    weights[0, 1, 5:] = 0.0
    batches = Windows(
        Batch(
            generator.integers(0, 37, (1, 2, 9)), weights, np.array([[0, 1]], np.int32), np.array([[2 * k, 2 * k + 1]])
        )
        for k in range(3)
    )
    piece_bytes = np.arange(37, dtype=np.int32)
    before = state(engine)
    scores = ValidationSet("valid", batches, piece_bytes).score(engine)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in state(engine).items())
    assert (scores["a"].tokens, scores["b"].tokens) == (24.0, 15.0)
    assert scores["b"].bytes == sum(int(batch.tokens[0, 1, 1:6].sum()) for batch in batches)
    reports = [engine.evaluate(batch, num_languages=2) for batch in batches]
    assert scores["a"].nats == pytest.approx(sum(report.nll[0] for report in reports), rel=1e-12)
