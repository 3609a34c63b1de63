"""Everything that is refused before a run starts: one error of ours with what, rule and remedy, and nothing touched."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xlmega.data import tokenizing
from xlmega.data.manifest import read_manifest, root_of, write_manifest
from xlmega.errors import CheckpointError, ConfigError, DataError, LayoutError, XlmegaError
from xlmega.parallel.layout import choose
from xlmega.text import corpus, vocabulary
from xlmega.training.outline import memory, summary
from xlmega.training.recipe import read_recipe
from xlmega.training.run import (
    Run,
    check_output,
    create_output,
    data_damage,
    facts,
    first_weights,
    resolve,
)
from xlmega.training.runtime import runtime

pytestmark = pytest.mark.torch
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.ffn_hidden_size=64",
    "data.sequence_length=32", "training.total_steps=6", "training.batch_windows=8", "training.validation_windows=4",
)  # fmt: skip
SETTINGS = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}


def resolved(root: Path | str, *overrides: str, output: Path = Path("never"), stop_at: int = 0, **layout: Any) -> Run:
    recipe = read_recipe("xglm_tiny", [*SMALL, f'data.root="{root}"', *overrides])
    world = layout.pop("world", layout.get("tp", 1) * layout.get("pp", 1))
    return resolve(recipe, runtime(SETTINGS), choose(world, **layout), output, stop_at=stop_at)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, size and time of change of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def tokens(made_tokens: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made_tokens, tmp_path / "tokens"))


@pytest.fixture(scope="session")
def other_tokens(made_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text under another vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    texts = (document.text for document in corpus.read_corpus(made_corpus / "train"))
    vocabulary.train_vocabulary(texts, 700, folder / "vocabulary")
    tokenizing.tokenize_corpus(made_corpus / "train", folder / "vocabulary", folder / "tokens")
    return folder / "tokens"


def test_a_good_run(made_tokens: Path) -> None:
    run = resolved(made_tokens, world=2, tp=2)
    assert (run.recipe.model.vocab_size, run.micro_batches, run.stop_at) == (800, 4, 6)
    assert run.languages == tuple(sorted(run.data)) and len(run.languages) == 5
    assert data_damage(run) == ""
    text = summary(run)
    for words in (
        "tp2 pp1 dp1",
        "ZeRO-1",
        "parameters",
        "memory of the fullest rank",
        "validation 'valid'",
        *run.languages,
    ):
        assert words in text
    assert all(size >= 0 for size in memory(run).values())
    assert json.loads(json.dumps(facts(run)))["recipe"]["model"]["vocab_size"] == 800
    assert resolved(made_tokens, stop_at=3).stop_at == 3
    assert resolved(made_tokens, "model.vocab_size=1000").recipe.model.vocab_size == 1000


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(bytes(data))


def rewrite(path: Path, **changes: Any) -> None:
    """Another manifest, signed as if it had been written so."""
    write_manifest(path, replace(read_manifest(path), **changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no train split": (lambda root: shutil.rmtree(root / "train"), "has no split 'train'; it has valid"),
    "bin missing": (lambda root: (root / "train/qla.bin").unlink(), r"qla\.bin' is missing.*Copy it"),
    "bin cut": (lambda root: cut(root / "train/qla.bin"), r"qla\.bin' has \d+ bytes, but .*copy it again"),
    "bin empty": (lambda root: (root / "train/qla.bin").write_bytes(b""), r"qla\.bin' has 0 bytes"),
    "idx cut": (lambda root: cut(root / "train/qla.idx"), r"qla\.idx' has \d+ bytes"),
    "idx missing": (lambda root: (root / "train/qla.idx").unlink(), r"qla\.idx' is missing"),
    "idx of another format": (lambda root: flip(root / "train/qla.idx", 0), r"qla\.idx' and its manifest disagree"),
    "manifest missing": (lambda root: (root / "train/qla.json").unlink(), "no manifest .*tokenise that split again"),
    "manifest no JSON": (lambda root: (root / "train/qla.json").write_text("{"), "not a token manifest"),
    "manifest binary": (lambda root: (root / "train/qla.json").write_bytes(b"\xff\xff"), "not a token manifest"),
    "manifest changed": (lambda root: flip(root / "train/qla.json", 250), "its own checksum|not a token manifest"),
    "manifest of another count": (lambda root: rewrite(root / "train/qla.json", tokens=5), "disagree"),
    "ids beyond the vocabulary": (
        lambda root: rewrite(root / "train/qla.json", max_id=5000), "ids to 5000 .* has 800 ids. Tokenise 'qla' again"
    ),
    "another vocabulary size": (lambda root: rewrite(root / "train/qla.json", vocabulary_size=9000), "has 800 ids"),
    "renamed": (
        lambda root: [(root / f"train/qla.{end}").rename(root / f"train/zz.{end}") for end in ("bin", "idx", "json")],
        "says that its language is 'qla'",
    ),
    "validation cut": (lambda root: cut(root / "valid/qlb.bin"), r"valid/qlb\.bin' has"),
    "no vocabulary": (lambda root: shutil.rmtree(root / "vocabulary"), r"there is no .*vocabulary\.json"),
    "vocabulary cut": (lambda root: cut(root / "vocabulary/tokenizer.model"), "not a SentencePiece|do not belong"),
    "vocabulary no JSON": (lambda root: (root / "vocabulary/vocabulary.json").write_text("{"), "is damaged"),
    "piece bytes empty": (lambda root: (root / "vocabulary/piece_bytes.npy").write_bytes(b""), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damaged_data(tokens: Path, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(tokens)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=words):
        resolved(tokens, output=tmp_path / "run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["train/qla.bin", "train/qlb.idx", "valid/qgr.bin"])
def test_flipped_bits_are_found_by_the_checksums(tokens: Path, file: str) -> None:
    flip(tokens / file, -3)
    run = resolved(tokens)
    shares = [data_damage(run, share, 4) for share in range(4)]
    assert sorted(map(bool, shares)) == [False, False, False, True]
    words = next(filter(None, shares))
    assert file in words and "sha256" in words and "tokenise that split again" in words


def test_missing_roots(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--set data.root=FOLDER, as tools/tokenize_corpus.py"):
        resolved("")
    for root in (tmp_path / "none", __file__):
        with pytest.raises(DataError, match=r"no token folder .*tools/tokenize_corpus\.py writes one"):
            resolved(root)


def test_swapped_and_mixed_vocabularies(tokens: Path, other_tokens: Path) -> None:
    shutil.rmtree(tokens / "vocabulary")
    shutil.copytree(other_tokens / "vocabulary", tokens / "vocabulary")
    with pytest.raises(DataError, match="were made with vocabulary .*run tools/tokenize_corpus.py again"):
        resolved(tokens)
    for end in ("bin", "idx", "json"):
        shutil.copy(other_tokens / f"train/qla.{end}", tokens / "train")
    with pytest.raises(DataError, match="mixes 2 vocabularies .*tokenise all languages with one"):
        resolved(tokens)


def test_a_validation_split_of_another_vocabulary(tokens: Path, other_tokens: Path) -> None:
    shutil.rmtree(tokens / "valid")
    shutil.copytree(other_tokens / "train", tokens / "valid")
    with pytest.raises(DataError, match="split 'valid' .*tokenise that split again"):
        resolved(tokens)


@pytest.mark.parametrize(
    ("overrides", "layout", "error", "words"),
    [
        (["model.vocab_size=799"], {}, DataError, "vocab_size=799, but .* has 800 ids. Leave model.vocab_size at 0"),
        ([], {"tp": 3}, LayoutError, "tp=3 must divide num_heads=4 .* tp may be 1, 2, 4"),
        ([], {"pp": 3}, LayoutError, "must divide num_layers=2"),
        ([], {"world": 3}, LayoutError, "batch_windows=8 .* on dp=3.*Try batch_windows=6 or 9"),
        (["training.batch_windows=6"], {"world": 2}, LayoutError, "on dp=2.*Try micro_batch_windows=1 or 3"),
        (["model.num_layers=4"], {"pp": 2, "virtual_stages": 2, "world": 8}, LayoutError, "but there are 1"),
        (["data.sequence_length=33"], {"tp": 2, "sequence_parallel": True}, LayoutError, "multiple of tp=2"),
        (["data.sequence_length=64", "model.max_positions=32"], {}, LayoutError, "beyond the model's max_positions=32"),
        (["data.languages={xx=0.0}"], {}, ConfigError, "names 'xx', which the corpus does not have. Known: "),
        (["data.sequence_length=50000", "model.max_positions=50000"], {}, DataError, "a language needs.*Lower data"),
        (["training.total_steps=1000000000000000"], {}, ConfigError, "more windows than can be numbered"),
    ],
)  # fmt: skip
def test_recipes_and_layouts_that_do_not_fit(
    made_tokens: Path, overrides: list[str], layout: dict[str, Any], error: type[XlmegaError], words: str
) -> None:
    with pytest.raises(error, match=f"(?s){words}"):
        resolved(made_tokens, *overrides, **layout)


@pytest.mark.parametrize("stop_at", [-1, 7])
def test_a_stop_beyond_the_run(made_tokens: Path, stop_at: int) -> None:
    with pytest.raises(ConfigError, match=f"--stop_at {stop_at} is not a step of this run: training.total_steps is 6"):
        resolved(made_tokens, stop_at=stop_at)


def test_first_weights_that_are_not_there(made_tokens: Path, tmp_path: Path) -> None:
    run = resolved(made_tokens, f"init.weights={tmp_path}/none")
    with pytest.raises(
        CheckpointError, match="there is no directory .*Give a run, checkpoint, Hugging Face or logical"
    ):
        first_weights(run.recipe)
    (tmp_path / "empty").mkdir()
    run = resolved(made_tokens, f"init.weights={tmp_path}/empty")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        first_weights(run.recipe)


# -------------------------------------------------------------------- the run directory


def refusal(run: Run, *, resume: bool = False) -> XlmegaError:
    place = run.output if run.output.is_dir() else run.output.parent
    before = snapshot(place) if place.is_dir() else None
    with pytest.raises(XlmegaError) as caught:
        check_output(run, resume=resume)
    assert (snapshot(place) if place.is_dir() else None) == before
    return caught.value


@pytest.fixture
def run(made_tokens: Path, tmp_path: Path) -> Run:
    """A run that has begun."""
    run = resolved(made_tokens, output=tmp_path / "run")
    check_output(run, resume=False)
    assert not run.output.exists()
    create_output(run)
    return run


def test_a_run_directory_and_going_on(run: Run) -> None:
    assert {path.name for path in run.output.iterdir()} == {"checkpoints", "run.json", "vocabulary"}
    told = json.loads((run.output / "run.json").read_text())
    assert told["recipe"]["training"]["total_steps"] == 6 and told["versions"]["torch"]
    check_output(run, resume=True)
    create_output(run)
    free = dataclasses.replace(run.recipe.training, log_every_steps=3, keep_checkpoints=0)
    check_output(dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, training=free)), resume=True)


def test_an_occupied_directory(run: Run, tmp_path: Path) -> None:
    error = refusal(run)
    assert isinstance(error, CheckpointError) and "is occupied: it has files. Go on with --resume" in str(error)
    (run.output / "checkpoints/step-00000004").mkdir()
    assert "checkpoints of steps [4]" in str(refusal(run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    other = dataclasses.replace(run, output=tmp_path / "mine")
    assert "is occupied" in str(refusal(other))
    assert "not a run (no run.json). Choose another --output" in str(refusal(other, resume=True))


def test_an_empty_or_new_directory_is_free(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a/b/c"):
        for resume in (False, True):
            check_output(dataclasses.replace(run, output=output), resume=resume)
    assert not (tmp_path / "a").exists()


def test_outputs_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o777)
    for name, words in (
        ("file", "is a file; a run needs a directory"),
        ("file/run", "cannot be made: .*is a file"),
        ("a" * 300, "cannot be used: File name too long"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_output(dataclasses.replace(run, output=tmp_path / name), resume=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere/x")
    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        create_output(dataclasses.replace(run, output=tmp_path / "link"))


def test_an_unwritable_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match="cannot be written: no permission in"):
        check_output(dataclasses.replace(run, output=tmp_path / "x/y"), resume=False)


def test_going_on_with_another_recipe(run: Run, made_tokens: Path) -> None:
    other = resolved(made_tokens, "training.seed=3", "optimizer.beta1=0.8", output=run.output)
    error = refusal(other, resume=True)
    assert isinstance(error, ConfigError)
    assert str(error).splitlines()[1:3] == ["  optimizer.beta1: 0.9 -> 0.8", "  training.seed: 0 -> 3"]
    assert "init.weights" in str(error)


def test_going_on_with_another_vocabulary_or_other_tokens(run: Run, other_tokens: Path, tokens: Path) -> None:
    other = resolved(other_tokens, "model.vocab_size=800", output=run.output)
    error = refusal(other, resume=True)
    assert isinstance(error, DataError) and "was trained with vocabulary" in str(error) and "data.root" in str(error)
    check_output(resolved(tokens, output=run.output), resume=True)  # the same tokens elsewhere
    rewrite(tokens / "train/qla.json", bin_sha256=root_of(("0" * 64,)), bin_blocks=("0" * 64,))
    error = refusal(resolved(tokens, output=run.output), resume=True)
    assert isinstance(error, DataError) and "was trained on other tokens of qla" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"recipe": 3, "vocabulary": "x", "data": {}}', "\0"])
def test_a_damaged_run_json(run: Run, text: str) -> None:
    (run.output / "run.json").write_text(text)
    error = refusal(run, resume=True)
    assert isinstance(error, CheckpointError) and "is damaged" in str(error)
