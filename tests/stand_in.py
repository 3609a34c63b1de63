"""A plan of experts that are trained in a moment: a stand-in for pretrain.py leaves what the driver looks at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SMALL = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "data.sequence_length=32",
    "training.batch_windows=8", "training.validation_windows=2", "training.validate_every_steps=0",
    "training.save_every_steps=2",
]  # fmt: skip
# Does what the driver sees of pretrain.py: metrics, a last checkpoint, an exit code; one whose name is in FAIL fails.
STAND_IN = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
run = pathlib.Path(words[words.index("--output") + 1])
steps = next(int(w.split("=")[1]) for w in words if w.startswith("training.total_steps="))
run.mkdir(parents=True, exist_ok=True)
(run / "run.json").write_text("{}")
(run / "words.json").write_text(json.dumps(words))
with (run / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 1, "loss": 2.5}) + "\\n")
fail = pathlib.Path(__file__).with_name("fail")
if fail.is_file() and str(run).endswith(fail.read_text()):
    print("DataError: the disk is full of sand", file=sys.stderr)
    sys.exit(2)
hold = pathlib.Path(__file__).with_name("hold")
while hold.is_file():
    time.sleep(0.02)
folder = run / "checkpoints" / f"step-{steps:08d}"
folder.mkdir(parents=True)
(folder / "manifest.json").write_text("{}")
"""


def write_plan(folder: Path, tokens: Path, rounds: list[dict[str, Any]], **keys: Any) -> Path:
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "ds_config.json").write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}')
    table = {
        "recipe": "xglm_tiny",
        "data": str(tokens),
        "ds_config": str(folder / "ds_config.json"),
        "overrides": SMALL,
        "launcher": [sys.executable, str(folder / "stand_in.py")],
        **keys,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    for one in rounds:
        lines += ["[[rounds]]", *(f"{key} = {json.dumps(value)}" for key, value in one.items())]
    path = folder / "plan.toml"
    path.write_text("\n".join(lines))
    return path
