"""Files written in one stream and read in slices: any slice, any dtype, and every way in which a file can be bad."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from xlmega.errors import CheckpointError
from xlmega.weights import storage
from xlmega.weights.storage import TensorFile, TensorReader

pytestmark = pytest.mark.torch
TENSORS = {
    "rows": torch.arange(35.0).view(7, 5),
    "line": torch.arange(6.0),
    "cube": torch.arange(24.0).view(2, 3, 4),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5),
}


def write(path: Path) -> dict[str, Any]:
    file = TensorFile(path, {name: tuple(tensor.shape) for name, tensor in TENSORS.items()})
    for tensor in TENSORS.values():
        file.write(tensor)
    return file.finish()


@pytest.mark.parametrize("block", [16, 1 << 23])
def test_what_is_written_is_safetensors_and_the_digest_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", block)
    told = write(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert told["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    assert told["sha256"] == storage.sha256_of(tmp_path / "x.safetensors") and told["file"] == "x.safetensors"


@pytest.mark.parametrize("block", [8, 1 << 23])
def test_any_slice_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", block)
    save_file({**TENSORS, "half": TENSORS["rows"].bfloat16()}, tmp_path / "x.safetensors")
    reader = TensorReader(tmp_path / "x.safetensors")
    assert set(reader.names()) == {*TENSORS, "half"} and reader.shape("cube") == (2, 3, 4)
    assert reader.read("half").dtype == torch.bfloat16
    cuts = [slice(None), slice(1, 3), slice(0, 1), slice(2, 2), slice(-1, None), slice(3, 1)]
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
        for slices in itertools.product(cuts, repeat=tensor.dim()):
            assert torch.equal(reader.read(name, slices), tensor[slices]), (name, slices)
    with pytest.raises(CheckpointError, match="has no tensor other"):
        reader.read("other")


def header(path: Path, **changes: Any) -> None:
    """Write the file anew with its entry for 'line' changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    table["line"].update(changes)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "hurt",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: header(path, dtype="F99"),
        lambda path: header(path, shape=[7]),
        lambda path: header(path, data_offsets=[-8, 16]),
        lambda path: header(path, data_offsets="ab"),
    ],
)
def test_bad_files_are_refused_at_once(tmp_path: Path, hurt: Any) -> None:
    write(tmp_path / "x.safetensors")
    hurt(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a safetensors file, or its header is damaged"):
        TensorReader(tmp_path / "x.safetensors")


def test_files_that_are_not_there_or_vanish(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            TensorReader(path)
    write(tmp_path / "x.safetensors")
    reader = TensorReader(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")  # a memory map would kill the process here
    with pytest.raises(CheckpointError, match="ends before its tensors do"):
        reader.read("rows")


def test_json_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    storage.write_json(path, {"a": "é"})
    storage.write_json(path, {"b": [1, 2]})
    assert json.loads(path.read_text()) == {"b": [1, 2]} and path.read_text() == storage.json_text({"b": [1, 2]})
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]
