"""Clones and a second vocabulary through real files; what may change when a run goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from xlmega.data import tokenizing
from xlmega.data.languages import validation_sets
from xlmega.errors import ConfigError, DataError, LayoutError, XlmegaError
from xlmega.parallel.layout import choose
from xlmega.text import corpus, vocabulary
from xlmega.training.outline import summary
from xlmega.training.recipe import read_recipe
from xlmega.training.run import VOCABULARIES, Run, check_output, continued, create_output, facts, resolve
from xlmega.training.runtime import runtime

pytestmark = pytest.mark.torch
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.ffn_hidden_size=64",
    "data.sequence_length=32", "training.total_steps=20", "training.batch_windows=8", "training.validation_windows=4",
    "data.temperature=1",
)  # fmt: skip


def resolved(root: Path, *overrides: str, output: Path = Path("never"), world: int = 1) -> Run:
    recipe = read_recipe("xglm_tiny", [*SMALL, f'data.root="{root}"', *overrides])
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    return resolve(recipe, runtime(settings), choose(world), output)


@pytest.fixture(scope="module")
def roots(made_corpus: Path, made_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One language under a vocabulary of 700 pieces, and another under one of 800."""
    folder = tmp_path_factory.mktemp("roots")
    for split in ("train", "valid"):
        shutil.copytree(made_corpus / split / "qgr", folder / "corpus" / split / "qgr")
    texts = [document.text for document in corpus.read_corpus(folder / "corpus" / "train")]
    vocabulary.train_vocabulary(texts, 700, folder / "vocabulary")
    tokenizing.tokenize_corpus(folder / "corpus" / "train", folder / "vocabulary", folder / "second")
    shutil.copytree(made_tokens, folder / "first")
    for path in (folder / "first").glob("*/*.*"):
        if path.parent.name != "vocabulary" and not path.name.startswith("qla."):
            path.unlink()
    return folder / "first", folder / "second"


def texts_of(run: Run, step: int) -> list[tuple[str, str, int]]:
    """(language, text, numbering) of each window of a step, read as the model's ids are read."""
    batch = run.batches(0).at(step)
    found = []
    for at in np.ndindex(batch.slots.shape):
        numbering, ids = run.ids.decode(batch.tokens[at])
        reader = run.vocabularies[min(numbering, len(run.vocabularies) - 1)]
        found.append((run.languages[batch.languages[at]], reader.decode(ids), numbering))
    return found


@pytest.mark.parametrize("merge", [False, True])
def test_a_second_root_with_a_vocabulary_of_its_own(roots: tuple[Path, Path], merge: bool) -> None:
    first, second = roots
    more = (f'data.data_root_2="{second}"', "data.p_l2=0.5", f"data.merge_vocab={str(merge).lower()}")
    run = resolved(first, *more)
    pieces = [{one.piece(id) for id in range(one.size)} for one in run.vocabularies]
    assert run.ids.size == (len(pieces[0] | pieces[1]) if merge else 1500)
    assert run.recipe.model.vocab_size == run.ids.size
    assert run.plan.ranks(20) == {"qla": 80, "qgr": 80}
    batch = run.batches(0).at(3)
    for (language, text, numbering), at in zip(texts_of(run, 3), np.ndindex(batch.slots.shape)):
        source = run.data[language].windows.ids(int(batch.windows[at]))
        reader = run.vocabularies[language == "qgr"]
        assert text == reader.decode(source.tolist())
        assert numbering == (language == "qgr")
        assert run.piece_bytes[batch.tokens[at]].sum() == reader.piece_bytes[source].sum(), "bits per byte are exact"
    sets = validation_sets(run.recipe.data, 4)
    assert {name: sorted(languages) for name, languages in sets.items()} == {"valid": ["qgr", "qla"]}
    assert "qgr: 80 windows" in summary(run)


def test_clones_are_another_s_windows_under_other_ids(roots: tuple[Path, Path]) -> None:
    run = resolved(roots[0], "data.num_cloned_languages=2", "data.p_clone=0.5")
    assert run.languages == ("qla", "qla-clone1", "qla-clone2") and run.recipe.model.vocab_size == 2400
    assert run.plan.ranks(20) == {"qla": 80, "qla-clone1": 40, "qla-clone2": 40}
    for step in range(3):
        for language, text, numbering in texts_of(run, step):
            assert numbering == run.languages.index(language) and len(text) > 20
    assert list(validation_sets(run.recipe.data, 4)["valid"]) == ["qla", "qla-clone1", "qla-clone2"]
    assert facts(run)["data"].keys() == {"qla"}
    shared = resolved(roots[0], "data.num_cloned_languages=1", "data.p_clone=0.5", "data.frac_clone=0.5")
    batch = shared.batches(0).at(0)
    clone = batch.tokens[batch.languages == 1]
    assert 0.2 < (clone >= 800).mean() < 0.8


def test_two_roots_with_one_language(roots: tuple[Path, Path], made_tokens: Path) -> None:
    with pytest.raises(ConfigError, match="data.root and data_root_2 both have a language 'qgr'"):
        resolved(made_tokens, f'data.data_root_2="{roots[1]}"', "data.p_l2=0.5")


def test_the_run_directory_keeps_both_vocabularies(roots: tuple[Path, Path], tmp_path: Path) -> None:
    more = (f'data.data_root_2="{roots[1]}"', "data.p_l2=0.5")
    run = resolved(roots[0], *more, output=tmp_path / "run")
    create_output(run)
    kept = [vocabulary.load_vocabulary(tmp_path / "run" / name) for name in VOCABULARIES]
    assert [one.hash for one in kept] == [one.hash for one in run.vocabularies]
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["vocabulary"] == run.vocabulary_hash != run.vocabulary.hash
    moved = Path(shutil.copytree(roots[1], tmp_path / "moved"))
    again = resolved(roots[0], f'data.data_root_2="{moved}"', "data.p_l2=0.5", output=tmp_path / "run")
    assert check_output(again, resume=True) is not None
    merged = resolved(roots[0], *more, "data.merge_vocab=true", output=tmp_path / "run")
    with pytest.raises(ConfigError, match="data.merge_vocab: False -> True"):
        check_output(merged, resume=True)


# Going on.


def begun(tokens: Path, output: Path, *overrides: str) -> Run:
    run = resolved(tokens, *overrides, output=output)
    create_output(run)
    return run


def going_on(tokens: Path, output: Path, step: int, *overrides: str) -> Run:
    run = resolved(tokens, *overrides, output=output)
    recorded = check_output(run, resume=True)
    assert recorded
    return continued(run, recorded, step)


def test_languages_come_and_go(made_tokens: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    begun(made_tokens, output, "data.languages={qla = 1.0, qlb = 1.0}")
    run = going_on(made_tokens, output, 5, "data.languages={qlb = 1.0, qgr = 3.0}")
    assert run.plan.ranks(20) == {"qla": 20, "qlb": 50, "qgr": 90}
    assert [change["keys"] for change in run.changes] == [
        {"data.languages": "{'qla': 1.0, 'qlb': 1.0} -> {'qlb': 1.0, 'qgr': 3.0}"}
    ]
    create_output(run)
    again = going_on(made_tokens, output, 10, "data.languages={qlb = 1.0, qgr = 3.0}")
    assert again.plan == run.plan and again.changes == run.changes, "nothing was changed"
    back = going_on(made_tokens, output, 12, "data.languages={qla = 1.0}")
    assert back.plan.ranks(12)["qla"] == 20 and back.plan.ranks(20)["qla"] == 20 + 64


def test_a_language_that_appears_is_served_and_one_that_vanishes_is_refused(made_tokens: Path, tmp_path: Path) -> None:
    fewer = Path(shutil.copytree(made_tokens, tmp_path / "tokens"))
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for path in [*fewer.glob("train/qgr.*")]:
        path.rename(hidden / path.name)
    begun(fewer, tmp_path / "run")
    assert "qgr" not in resolved(fewer).languages
    for path in hidden.iterdir():
        path.rename(fewer / "train" / path.name)
    run = going_on(fewer, tmp_path / "run", 7)
    assert run.plan.ranks(7)["qgr"] == 0 and run.plan.ranks(20)["qgr"] > 0 and run.changes[-1]["added"] == ["qgr"]
    create_output(run)
    for path in [*fewer.glob("train/qgr.*")]:
        path.rename(hidden / path.name)
    with pytest.raises(DataError, match="was trained on qgr, which .* does not have. Put the tokens back, or name"):
        going_on(fewer, tmp_path / "run", 9)
    named = "data.languages={qla = 0.0, qlb = 0.0}"
    assert going_on(fewer, tmp_path / "run", 9, named).plan.mixes[-1].weights.keys() == {"qla", "qlb"}


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.sequence_length=64"], ConfigError, "data.sequence_length: 32 -> 64"),
        (["training.seed=1"], ConfigError, "training.seed: 0 -> 1"),
        (["data.frac_validation=0.5"], ConfigError, "data.frac_validation"),
        (["data.windows=documents"], ConfigError, "data.windows: 'packed' -> 'documents'"),
        (["data.reset_attention=true"], ConfigError, "data.reset_attention: False -> True"),
        (["training.total_steps=30"], ConfigError, "training.total_steps: 20 -> 30"),
    ],
)
def test_what_would_lose_places_is_refused(
    made_tokens: Path, tmp_path: Path, overrides: list[str], error: type[XlmegaError], words: str
) -> None:
    begun(made_tokens, tmp_path / "run")
    with pytest.raises(error, match=words):
        going_on(made_tokens, tmp_path / "run", 5, *overrides)


def test_a_change_is_checked_before_anything_is_touched(made_tokens: Path, tmp_path: Path) -> None:
    begun(made_tokens, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(LayoutError, match="batch_windows=9 with micro_batch_windows=2 on dp=1"):
        going_on(made_tokens, tmp_path / "run", 5, "training.batch_windows=9")
    with pytest.raises(ConfigError, match="data.max_epochs=0.01 is passed by"):
        going_on(made_tokens, tmp_path / "run", 5, "data.max_epochs=0.01")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    # Batch sizes of the past need not suit the layout of now.
    begun(made_tokens, tmp_path / "other", "training.batch_windows=[[0, 8], [10, 12]]")
    run = resolved(made_tokens, "training.batch_windows=12", output=tmp_path / "other", world=3)
    recorded = check_output(run, resume=True)
    assert recorded and continued(run, recorded, 10).micro_batches == 2


def test_documents_told_apart_and_models_that_cannot(made_tokens: Path) -> None:
    run = resolved(made_tokens, "data.reset_attention=true")
    documents = [run.batches(0).at(step).documents for step in range(20)]
    assert max(one.max() for one in documents if one is not None) >= 1
    with pytest.raises(ConfigError, match="attention_dropout is drawn over whole windows"):
        resolved(made_tokens, "data.reset_attention=true", "model.attention_dropout=0.1")
