"""A change of mix and batch size on resume, trained for real: bitwise the run that declared it ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "data.sequence_length=32",
    "training.total_steps=8", "training.save_every_steps=4", "training.validate_every_steps=0",
    "training.validation_windows=2", "data.temperature=1", "data.num_cloned_languages=1", "data.p_clone=0.25",
)  # fmt: skip
FIRST = ("data.languages={qla = 3.0, qlb = 1.0}", "training.batch_windows=8")
SECOND = ("data.languages={qlb = 1.0, qgr = 1.0}", "training.batch_windows=[[0, 8], [2, 16]]")
DECLARED = (
    "data.languages={qla = 3.0, qlb = 1.0}",
    'data.stages=[{name = "b", from_step = 4, languages = {qlb = 1.0, qgr = 1.0}}]',
    "training.batch_windows=[[0, 8], [4, 16]]",
)


def train(tokens: Path, output: Path, *arguments: str, sets: tuple[str, ...]) -> str:
    config = output.parent / "fp32.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}))
    overrides = [part for one in (f"data.root={tokens}", *SMALL, *sets) for part in ("--set", one)]
    line = [sys.executable, "xlmega/pretrain.py", "--ds_config", str(config), "--recipe", "xglm_tiny", *overrides]
    done = subprocess.run(
        [*line, "--output", str(output), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_changed_on_resume_equals_declared(made_tokens: Path, tmp_path: Path) -> None:
    declared, changed = tmp_path / "declared", tmp_path / "changed"
    planned = train(made_tokens, declared, "--dry_run", sets=DECLARED)
    assert "stage 'start', steps 0 to 4, 8 windows a step: 32 windows" in planned
    assert "stage 'b', steps 4 to 8, 16 windows a step: 64 windows" in planned
    assert "qlb-clone1: 10 windows" in planned and "the windows of qlb" in planned
    train(made_tokens, declared, sets=DECLARED)
    train(made_tokens, changed, "--stop_at", "4", sets=FIRST)
    told = train(made_tokens, changed, "--resume", "--dry_run", sets=SECOND)
    assert "stage 'start from 4', steps 4 to 8, 16 windows a step: 64 windows" in told
    train(made_tokens, changed, "--resume", sets=SECOND)
    same = ("step", "loss", "loss_by_language", "tokens_by_language", "gradient_norm", "served", "tokens")
    found = [
        [{key: record[key] for key in same} for record in records(run) if "loss" in record]
        for run in (declared, changed)
    ]
    assert len(found[0]) == 8 and found[0] == found[1]
    (valid,) = [record for record in records(changed) if record.get("validation") == "valid" and record["step"] == 8]
    assert set(valid["by_language"]) == {"qgr", "qgr-clone1", "qlb", "qlb-clone1"}
    audit = subprocess.run(
        [sys.executable, "tools/inspect_run.py", str(changed), "--audit"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert audit.returncode == 0, audit.stderr
    assert audit.stdout.splitlines()[-1] == "the audit holds: no window was repeated or skipped within an epoch"
    (changed / "run.json").write_text((declared / "run.json").read_text().replace('"seed": 0', '"seed": 7'))
    audit = subprocess.run(
        [sys.executable, "tools/inspect_run.py", str(changed), "--audit"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert audit.returncode == 2 and "was trained on other windows" in audit.stderr
