"""Logical checkpoints: any slice over any pieces, and every kind of damage found, named and passed over."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from written import MODEL, flip, publish, tensor_of, write

from xlmega.errors import CheckpointError
from xlmega.training import checkpoint
from xlmega.training.checkpoint import (
    Checkpoint,
    damage,
    figure_of,
    folder_of,
    list_checkpoints,
    newest,
    open_run,
    open_source,
    piece_name,
)
from xlmega.weights import storage
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
WORDS = "embedding.word_embeddings.weight"
PROJECTION = "decoder.layers.1.self_attention.linear_proj.weight"


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


def test_listing(run: Path) -> None:
    write(run, 3)
    (run / "checkpoints/step-00000009.part").mkdir()
    (run / "checkpoints/step-9").mkdir()
    assert list_checkpoints(run) == [2, 3, 4]
    assert folder_of(run, 123_456_789).name == "step-123456789"
    assert list_checkpoints(run / "none") == []


@pytest.mark.parametrize(
    ("validation", "figure"), [({"valid": {"x": 2.5}}, 2.5), ({"valid": {"x": float("nan")}}, None), ({}, None)]
)
def test_the_figure_of_a_checkpoint(run: Path, validation: Any, figure: float | None) -> None:
    folder = folder_of(run, 4)
    good = json.loads((folder / "manifest.json").read_text())
    publish(folder, {**good, "facts": {"validation": validation}})
    assert figure_of(folder, "valid/x") == figure
    flip(folder / "manifest.json", 30)
    assert figure_of(folder, "valid/x") is None


# -------------------------------------------------------------------- damage


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


def test_one_that_was_published_and_is_gone_is_told(run: Path) -> None:
    storage.write_json(run / "checkpoints" / checkpoint.LATEST, {"step": 6, "sha256": ""})
    said: list[str] = []
    found = newest(run, said.append)
    assert found is not None and found.step == 4
    assert len(said) == 1 and "step 6" in said[0] and "was published and is gone" in said[0]
    for step in (2, 4):
        shutil.rmtree(folder_of(run, step))
    with pytest.raises(CheckpointError, match="every checkpoint of .* is gone"):
        newest(run, said.append)
    (run / "checkpoints" / checkpoint.LATEST).write_text("rubbish")
    assert newest(run, said.append) is None


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(run: Path, tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    for step in (2, 4):
        flip(folder_of(run, step) / FILES[0], 600)
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint of .* is damaged \(steps 2, 4\)\. Restore one"):
        newest(run, said.append)
    assert len(said) == 2


def test_every_bit_of_a_manifest_counts(run: Path) -> None:
    path = folder_of(run, 4) / "manifest.json"
    good = path.read_bytes()
    for place in [*range(0, len(good), 97), *range(len(good) - 80, len(good))]:
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ (1 << bit)]) + good[place + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.read_manifest(path.parent)
    path.write_bytes(good.replace(b"1e-05", b"1E-05"))  # the same number
    with pytest.raises(CheckpointError, match="is not what was written"):
        checkpoint.read_manifest(path.parent)


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
    publish(folder, {**good, "format_version": 1})
    with pytest.raises(CheckpointError, match="has format 1; this xlmega reads 2"):
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
