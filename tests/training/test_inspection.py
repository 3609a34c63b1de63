"""What is said of checkpoints: layouts, sizes, states, and two of them tensor by tensor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from written import flip, write

from xlmega.errors import CheckpointError
from xlmega.training.checkpoint import Checkpoint, folder_of, open_source
from xlmega.training.inspection import checkpoint_lines, comparison_lines
from xlmega.weights import storage
from xlmega.weights.comparison import logical_hash
from xlmega.weights.directory import write_logical

pytestmark = pytest.mark.torch
WORDS = "embedding.word_embeddings.weight"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("inspected") / "run"
    for step in (2, 4):
        write(run, step)
    return run


def test_checkpoints_are_listed_with_their_state(written: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(written, tmp_path / "run"))
    storage.write_json(run / "checkpoints/latest", {"step": 4, "sha256": ""})
    (run / "checkpoints/step-00000006.part").mkdir()
    lines = list(checkpoint_lines(run, verify=True))
    assert lines[0] == "checkpoints: 2"
    assert lines[1].endswith("MB, by hand ZeRO-1 fp32, whole") and lines[2].endswith("fp32, latest, whole")
    assert "unfinished" in lines[3] and "step-00000006.part" in lines[3]
    flip(folder_of(run, 4) / "rank-00001.safetensors", 900)
    flip(folder_of(run, 2) / "manifest.json", 40)
    storage.write_json(run / "checkpoints/latest", {"step": 8, "sha256": ""})
    lines = list(checkpoint_lines(run, verify=True))
    assert lines[1].count("DAMAGED") == 1 and "manifest.json" in lines[1]
    assert "DAMAGED" in list(checkpoint_lines(run))[1]  # the manifest is read in any case
    with pytest.raises(CheckpointError, match=f"holds the checkpoints of a run. Give '{run}', or one of them"):
        open_source(run / "checkpoints")
    assert "DAMAGED" in lines[2] and "rank-00001.safetensors" in lines[2] and "sha256 differs" in lines[2]
    assert "step-00000008 was published last and IS GONE" in lines[3]
    assert list(checkpoint_lines(tmp_path)) == ["checkpoints: none"]


def test_a_hash_knows_neither_pieces_nor_directory(written: Path, tmp_path: Path) -> None:
    found = Checkpoint(folder_of(written, 4))
    write_logical(found, tmp_path / "logical")
    other = open_source(tmp_path / "logical")
    assert logical_hash(found) == logical_hash(other) != logical_hash(Checkpoint(folder_of(written, 2)))
    assert logical_hash(found, found.moment("exp_avg")) != logical_hash(found)
    assert list(comparison_lines(written, tmp_path / "logical"))[-1].startswith("equal bit for bit")


def test_two_checkpoints_tensor_by_tensor(written: Path) -> None:
    lines = list(comparison_lines(folder_of(written, 4), written, hashes=True))
    assert "step 4 of" in lines[0] and lines[-1].startswith("equal bit for bit: ")
    lines = list(comparison_lines(folder_of(written, 2), folder_of(written, 4)))
    assert lines[-1].startswith("DIFFERENT: 0 of ")
    told = next(line for line in lines if line.startswith(f"  weight {WORDS}"))
    a, b = (Checkpoint(folder_of(written, step)).read(WORDS) for step in (2, 4))
    assert f"{int((a == b).sum())} of {a.numel()} values equal, largest difference {(a - b).abs().max():.3g} " in told
    assert torch.isfinite(a).all()


def test_the_tool_compares_and_refuses(written: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/inspect_run.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    done = run("--compare", str(folder_of(written, 2)), str(folder_of(written, 4)))
    assert done.returncode == 0 and "DIFFERENT" in done.stdout.splitlines()[-1]
    done = run("--compare", str(written), str(tmp_path / "none"))
    assert done.returncode == 2 and "there is no directory" in done.stderr and "Traceback" not in done.stderr
