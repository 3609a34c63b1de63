"""The README's commands, chapter by chapter, as they stand there, on data and models of a size for tests."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import worlds

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "data.sequence_length=32",
    "training.batch_windows=16", "training.total_steps=4", "training.validation_windows=2",
]  # fmt: skip


def commands(chapter: str) -> list[str]:
    """The command lines in the code blocks of '## chapter' (or of '### chapter')."""
    text = re.split(r"^##+ ", README, flags=re.MULTILINE)
    (found,) = [part for part in text if part.startswith(f"{chapter}\n")]
    blocks = re.findall(r"```\n(.*?)```", found, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def run_chapter(
    chapter: str, place: Path, changes: Mapping[str, str], given: Mapping[str, Path], also: Sequence[str] = ()
) -> list[str]:
    """Run a chapter's commands in `place` and give back what each said.

    `changes` replaces words of the commands; `given` puts what earlier chapters made at the places that they name;
    `also` is set in recipes.
    """
    for name in ("xlmega", "tools", "ds_configs"):
        (place / name).symlink_to(ROOT / name)
    for name, made in given.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(made)
    said = []
    for line in commands(chapter):
        words = shlex.split(line, comments=True)
        words = [changes.get(word, word) for word in words]
        words = [re.sub(r"[\w/.-]+", lambda match: changes.get(match[0], match[0]), word) for word in words]
        if "xlmega/pretrain.py" in words:
            words += [part for one in [*TINY, *also] for part in ("--set", one)]
        if words[0] == "deepspeed":
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            words[:1] = [sys.executable, launcher, "--master_port", str(worlds.free_port())]
        words[0] = sys.executable if words[0] == "python" else words[0]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        said.append(done.stdout)
    return said


@pytest.mark.multiprocess
def test_stopping_resuming_failing(made_tokens: Path, tmp_path: Path) -> None:
    changes = {"100": "2", "runs/second/checkpoints/step-00000100": "runs/second/checkpoints/step-00000002"}
    first, second, inspected, compared = run_chapter(
        "Stopping, resuming, failing", tmp_path, changes, {"tokens/pydocs": made_tokens}
    )
    assert "done: step 2 of 4" in first
    assert "resuming from step 2" in second and "ZeRO-2, bf16" in second and "done: step 4 of 4" in second
    assert "tp1 pp1 dp1 ZeRO-1 fp32" in inspected and "tp1 pp1 dp2 ZeRO-2 bf16" in inspected
    assert inspected.count(", whole") == 2 and "DAMAGED" not in inspected
    assert "DIFFERENT: 0 of" in compared


@pytest.fixture(scope="module")
def export(made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the made vocabulary, as a Hugging Face directory."""
    from drawn import Drawn

    from xlmega.models.config import model_config
    from xlmega.weights.huggingface import export_huggingface

    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 48, "max_positions": 512}
    output = tmp_path_factory.mktemp("export") / "hf"
    model = Drawn(model_config(preset="xglm_tiny", vocab_size=800, **sizes))
    export_huggingface(model, output, vocabulary_folder=made_vocabulary)
    return output


@pytest.mark.torch
def test_models_of_other_trainers(export: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from xlmega.text.corpus import write_records

    tensors = load_file(export / "model.safetensors")
    settings = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_embed_dim": 48,
        "max_target_positions": 512,
    }
    (tmp_path / "given").mkdir()
    for name, value in (
        (
            "consolidated.pt",
            {"model": {f"decoder.{k.removeprefix('model.')}": v for k, v in tensors.items()}, "args": settings},
        ),
        ("mp_rank_00_model_states.pt", {"module": tensors}),
    ):
        torch.save(value, tmp_path / "given" / name)
    trained = tmp_path / "given" / "trained"
    (trained / "global_step500").mkdir(parents=True)
    (trained / "config.json").write_bytes((export / "config.json").read_bytes())
    (tmp_path / "given" / "mp_rank_00_model_states.pt").rename(
        trained / "global_step500" / "mp_rank_00_model_states.pt"
    )
    write_records(tmp_path / "given" / "sw" / "0.jsonl", [{"cluster": 1}, {"cluster": 1}, {"cluster": 0}])
    given = {
        "downloads/expert0/consolidated.pt": tmp_path / "given" / "consolidated.pt",
        "downloads/trained": trained,
        "runs/expert0": export,
        "runs/expert1": export,
        "models/expert1": export,
        "clusters/valid/sw": tmp_path / "given" / "sw",
    }
    (place := tmp_path / "place").mkdir()
    said = run_chapter("Models of other trainers", place, {}, given)
    assert [text.splitlines()[-1].split(":")[0] for text in said] == [
        f"wrote {path}"
        for path in ("models/expert0", "exports/trained", "models/mean", "exports/mean", "models/mean_sw")
    ]
    assert said[4].startswith("0.333333  models/expert0")


@pytest.mark.torch
def test_perplexity_and_multiple_choice(export: Path, made_corpus: Path, made_tokens: Path, tmp_path: Path) -> None:
    from xlmega.text.corpus import write_records

    languages = sorted(path.name for path in (made_corpus / "valid").iterdir())
    given = {"runs/first": export, "exports/first": export, "tokens/pydocs": made_tokens, "DATA": made_corpus}
    (place := tmp_path / "scores").mkdir()
    changes = {"en": languages[0], "fr": languages[1]}
    first, text, last = run_chapter("Perplexity", place, changes, given)
    assert all(name in first for name in languages) and "all " in first
    assert languages[2] not in text and "mean exp" not in last and last.endswith("wrote scores/last128/result.json\n")
    item = {"premise": "It rained", "label": 0}
    (place := tmp_path / "choices").mkdir()
    for name, more in (
        ("xcopa/val.it.jsonl", {"choice1": "Wet.", "choice2": "Dry.", "question": "effect"}),
        ("xcopa/val.sw.jsonl", {"choice1": "Wet.", "choice2": "Dry.", "question": "effect"}),
        ("xnli/test/sw.jsonl", {"hypothesis": "It poured"}),
        ("xnli/dev/sw.jsonl", {"hypothesis": "It poured"}),
    ):
        write_records(tmp_path / "items" / name, [{**item, **more}] * 4)
    items = {"xcopa": tmp_path / "items" / "xcopa", "xnli": tmp_path / "items" / "xnli"}
    zero, few = run_chapter("Multiple choice", place, {}, {"exports/first": export, **items})
    assert "mean" in zero and few.endswith("wrote scores/xnli/result.json\n")


@pytest.mark.multiprocess
def test_to_transformers_and_back(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    """GPT-NeoX as transformers saves it, with padded rows and its own tokenizer: taken in, trained on, given back."""
    import theirs

    from xlmega.text.vocabulary import load_vocabulary
    from xlmega.weights.directory import write_logical
    from xlmega.weights.huggingface import open_huggingface
    from xlmega.weights.tokenizer_json import tokenizer_files

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs.saved("gpt_neox", tmp_path / "pythia", vocab_size=812, **sizes)
    for name, value in tokenizer_files(load_vocabulary(made_vocabulary), 32).items():
        (tmp_path / "pythia" / name).write_text(json.dumps(value), encoding="utf-8")
    write_logical(open_huggingface(tmp_path / "pythia"), tmp_path / "first", vocabulary_folder=made_vocabulary)
    exported, back, taken, tokenized, trained, again = run_chapter(
        "To transformers and back",
        tmp_path,
        {"4": "2", "model.preset=pythia_410m": "model.preset=neox_tiny", "DATA/train": str(made_corpus / "train")},
        {"runs/first": tmp_path / "first", "downloads/pythia-410m": tmp_path / "pythia"},
        ["model.vocab_size=812"],
    )
    assert "texts tokenized alike" in exported and "texts tokenized alike" in again
    assert "wrote models/first" in back and "left out" not in taken and "wrote" in tokenized
    assert "done: step 4 of 4" in trained
    card = (tmp_path / "exports" / "german" / "README.md").read_text(encoding="utf-8")
    assert "- Step: 4\n" in card and f"| all | {4 * 16 * 32:,} |" in card and 'preset = "neox_tiny"' in card
    assert "are rows that the tokenizer never produces" in card
    assert json.loads((tmp_path / "exports" / "german" / "config.json").read_text())["model_type"] == "gpt_neox"


@pytest.mark.multiprocess
def test_planning_a_run(made_tokens: Path, tmp_path: Path) -> None:
    measured, here, large = run_chapter("Planning a run", tmp_path, {}, {"tokens/pydocs": made_tokens})
    assert "wrote here.toml" in measured and "1 devices in 1 nodes" in here
    assert "512 devices in 64 nodes" in large and "so: --tp " in large and "save every" in large


def test_chapters_are_found() -> None:
    assert commands("Two commands") == [line for line in commands("Two commands") if line.startswith(("make", "pip"))]
    assert any("train_vocabulary" in line for line in commands("From your text to a model"))
