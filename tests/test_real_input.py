"""The README's commands on real text in twelve languages, short: words to tokens to a trained model to transformers.

Skipped where the text is not there: it lies beside the repository, not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds

ROOT = Path(__file__).resolve().parents[1]
PYDOCS = ROOT.parent / "shared" / "data" / "pydocs"

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not PYDOCS.is_dir(), reason=f"real text: {PYDOCS} is not there"),
]
SHORT = (
    "training.total_steps=30",
    "training.validation_windows=4",
    "training.validate_every_steps=0",
    "optimizer.warmup_steps=5",
    "training.save_every_steps=0",
)
LARGE_LANGUAGES = ("en", "es", "fr", "id", "it", "ja", "ko", "pl", "pt", "tr", "uk", "zh")


def call(*line: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *map(str, line)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pydocs")
    # A vocabulary of a few documents of each language: the full one takes 45 s, and its size matters more than its fit.
    call("tools/train_vocabulary.py", PYDOCS / "valid", "--size", "4096", "--output", folder / "vocabulary")
    call(
        "tools/tokenize_corpus.py",
        PYDOCS / "train",
        "--vocabulary",
        folder / "vocabulary",
        "--output",
        folder / "tokens",
    )
    return folder / "tokens"


def pretrain(tokens: Path, output: Path, ranks: int, ds_config: str, *layout: str) -> list[dict[str, Any]]:
    sets = [part for one in (f"data.root={tokens}", *SHORT) for part in ("--set", one)]
    launcher = Path(sys.executable).parent / "deepspeed"
    call(
        launcher,
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(worlds.free_port()),
        "xlmega/pretrain.py",
        "--ds_config",
        ds_config,
        "--recipe",
        "xglm_tiny",
        *sets,
        "--output",
        output,
        *layout,
    )
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("ranks", "ds_config", "layout"),
    [(4, "ds_configs/zero1_bf16.json", ("--tp", "2", "--pp", "2")), (2, "ds_configs/zero3_offload.json", ())],
    ids=["tp2_pp2", "zero3"],
)
def test_bits_per_byte_fall_and_transformers_agrees(
    tokens: Path, tmp_path: Path, ranks: int, ds_config: str, layout: tuple[str, ...]
) -> None:
    records = pretrain(tokens, tmp_path / "run", ranks, ds_config, *layout)
    before, after = (record["by_language"] for record in records if "validation" in record)
    assert set(before) == set(LARGE_LANGUAGES)
    for language in LARGE_LANGUAGES:
        assert after[language]["bits_per_byte"] < before[language]["bits_per_byte"], language
    call("tools/convert_checkpoint.py", tmp_path / "run", "--to", "hf", "--output", tmp_path / "export")
    for language, (nats, count) in transformers_scores(tmp_path / "export", tokens, windows=4).items():
        assert count == after[language]["tokens"]
        assert nats == pytest.approx(after[language]["nats_per_token"], abs=1e-3), language


def transformers_scores(export: Path, tokens: Path, windows: int) -> dict[str, tuple[float, int]]:
    """Nats per token and tokens of the same validation windows, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export).eval()
    length, found = 256, {}
    for path in sorted((tokens / "valid").glob("*.bin")):
        ids = np.fromfile(path, np.uint16).astype(np.int64)
        nats, count = 0.0, 0
        for start in range(0, min(windows * length, len(ids) - 1), length):
            window = torch.from_numpy(ids[start : start + length + 1])[None]
            with torch.no_grad():
                logits = model(window[:, :-1]).logits.float()
            nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
        found[path.stem] = (nats / count, count)
    return found
