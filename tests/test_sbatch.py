"""What the pretraining sbatch files do with the code that a run ends with; `srun` and `scontrol` are stand-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import ROOT
from worlds import free_port

FORMS = ("pretrain.sbatch", "pretrain_torchrun.sbatch", "pretrain_deepspeed.sbatch")


def submit(
    script: str, folder: Path, code: int, *arguments: str, restarts: str = "0", task: int | None = None
) -> tuple[int, list[str], str]:
    """(exit code, what scontrol was asked, stderr) of the script's shell when srun ends with that code.

    `task` is the code of the one task that it starts; None: no task ends by itself.
    """
    start = "" if task is None else f'while [ "$1" != bash ]; do shift; done; bash -c "$3" "$4" sh -c "exit {task}"'
    (folder / "srun").write_text(f'#!/bin/bash\necho "$@" >{folder}/srun.log\n{start}\nexit {code}\n')
    (folder / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo n1 && exit\necho "$@" >>{folder}/asked\n')
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    environ = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1",
        "SLURM_RESTART_COUNT": restarts,
    }  # fmt: skip
    line = ["bash", str(ROOT / "slurm" / script), *arguments]
    done = subprocess.run(line, env=environ, cwd=folder, capture_output=True, text=True, timeout=60)
    asked = folder / "asked"
    told = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return done.returncode, told, done.stderr


@pytest.mark.parametrize("script", FORMS)
def test_a_job_is_started_again_where_that_helps(script: str, tmp_path: Path) -> None:
    again = {75, 4, 5, 6, 137, 143} | ({241, 247} if "deepspeed" in script else set())
    for code in sorted(again | {0, 1, 2, 3, 7, 130, 139}):
        ended, asked, _ = submit(script, tmp_path, code, "run", "--recipe", "xglm_tiny")
        assert (ended, asked) == (code, ["requeue 7"] if code in again else []), code
    assert submit(script, tmp_path, 5, "run", restarts="50")[1] == []  # it has been tried often enough
    assert submit(script, tmp_path, 75, "run", restarts="50")[1] == ["requeue 7"]  # it was asked to stop
    # One task ended by itself, and srun terminated the others: that one's code says whether to start again.
    for code in (2, 3, 7):
        assert submit(script, tmp_path, 143, "run", task=code)[:2] == (code, []), code
    assert submit(script, tmp_path, 143, "run", task=75, restarts="50")[:2] == (75, ["requeue 7"])
    assert submit(script, tmp_path, 143, "run", task=5)[:2] == (5, ["requeue 7"])
    assert submit(script, tmp_path, 0, "run", task=0)[:2] == (0, [])
    command = (tmp_path / "srun.log").read_text()
    assert "xlmega/pretrain.py --ds_config" in command and "--output run --resume" in command
    assert not [*tmp_path.glob(".hosts*"), *tmp_path.glob(".codes*")]


@pytest.mark.parametrize("script", FORMS)
def test_a_forgotten_run_directory_is_asked_for(script: str, tmp_path: Path) -> None:
    ended, asked, told = submit(script, tmp_path, 0)
    assert ended != 0 and not asked and not (tmp_path / "srun.log").exists()
    assert f"the run directory comes first: sbatch slurm/{script} RUN" in told


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ends", "code"), [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", 137)])
def test_torchrun_ends_as_its_rank_does(ends: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(f"import os, sys\nif os.environ['RANK'] == '1':\n    {ends}\n")
    where = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    line = [sys.executable, str(ROOT / "slurm/torchrun.py"), *where, str(tmp_path / "rank.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-2000:]
