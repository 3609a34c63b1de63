"""Several nodes without Slurm, on this machine's loopback: DeepSpeed's hostfile with a launcher a node, and mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import worlds
from launched import ROOT, TINY, losses

from xlmega.training.checkpoint import list_checkpoints

pytestmark = pytest.mark.multiprocess


def arguments(folder: Path, tokens: Path, run: Path) -> list[str]:
    """pretrain.py and its options for four steps of a tiny model on two ranks."""
    config = folder / "how.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}')
    sets = [f"data.root={tokens}", "training.total_steps=4", *TINY]
    told = [str(ROOT / "xlmega/pretrain.py"), "--ds_config", str(config), "--recipe", "xglm_tiny", "--tp", "2"]
    return [*told, "--output", str(run), *(part for one in sets for part in ("--set", one))]


ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_a_launcher_on_each_node_of_a_hostfile(made_tokens: Path, tmp_path: Path) -> None:
    hosts, run = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--no_ssh", "--hostfile", str(hosts)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(worlds.free_port())]
    started = []
    for node in (0, 1):
        line = [*launcher, "--node_rank", str(node), *arguments(tmp_path, made_tokens, run)]
        with (tmp_path / f"node{node}.log").open("wb") as log:
            started.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT))
    codes = [one.wait(300) for one in started]
    assert codes == [0, 0], (tmp_path / "node0.log").read_text(errors="replace")[-3000:]
    assert set(losses(run)) == {1, 2, 3, 4} and list_checkpoints(run) == [4]


@pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not installed")
def test_mpirun_with_an_address(made_tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(worlds.free_port())}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    line = ["mpirun", "-n", "2", sys.executable, *arguments(tmp_path, made_tokens, run)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0 and "started by mpirun" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert set(losses(run)) == {1, 2, 3, 4}
