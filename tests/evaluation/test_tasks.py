"""Multiple choice: scores by hand, the ways told apart, demonstrations drawn, files read and refused."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import Drawn

from xlmega.errors import ConfigError, DataError
from xlmega.evaluation.tasks import (
    SEPARATOR,
    WAYS,
    Item,
    Outcome,
    Settings,
    evaluate,
    item_files,
    read_items,
    report,
    task_named,
)
from xlmega.models.config import model_config
from xlmega.text.corpus import write_records
from xlmega.text.vocabulary import load_vocabulary
from xlmega.weights.directory import write_logical

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
XCOPA = ROOT.parent / "shared" / "data" / "xcopa"


class Letters:
    """A vocabulary of bytes: id = byte + 3, so that a score can be added up letter by letter."""

    eod_id = 2

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + 3 for text in texts]


class Favourites:
    """Each letter has its own probability, and 'u' after 'q' twice as much; remembers what it was given."""

    vocab_size = 259
    max_positions = 40

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        for row in inputs_BL:
            self.seen.append(bytes(id - 3 for id in row.tolist() if id >= 3))
        scores = -((targets_BL - 3) % 7 + 1).float()
        return scores + math.log(2) * ((inputs_BL == ord("q") + 3) & (targets_BL == ord("u") + 3))

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def cost(text: str) -> float:
    return -sum(byte % 7 + 1 for byte in text.encode())


def test_each_way_is_what_it_says() -> None:
    # 'a' costs 7, 'b' 1, 'c' 2: costs are byte % 7 + 1.
    assert (cost("a"), cost("b"), cost("c")) == (-7, -1, -2)
    items = [
        Item("", ("a", "bbbbbbbb"), 1),  # sum takes the shorter (-7 to -8), the mean the cheaper letters
        Item("q", ("u", "cc"), 0),
    ]
    outcome = evaluate(Favourites(), Letters(), items, Settings())  # type: ignore[arg-type]
    assert cost("u") + math.log(2) > cost("cc") - 3
    assert outcome.correct["sum"] == [1 - 1 + (cost("u") + math.log(2) > cost("cc"))]
    assert outcome.correct["mean"][0] == 1 + (cost("u") + math.log(2) > -2)
    # pmi sees only what the prompt adds: nothing for item 1 (of equals the first), log 2 for the 'u' of item 2.
    assert outcome.correct["pmi"] == [1]
    assert outcome.correct["bytes"] == outcome.correct["mean"]
    assert outcome.accuracy("pmi") == 0.5 and outcome.standard_error("pmi") == pytest.approx(math.sqrt(0.125))


def test_demonstrations_stand_before_the_item_and_the_beginning_gives_way() -> None:
    demonstrations = [Item(f"{k}?", (f"{k}!", "-"), 0) for k in "123456789"]
    scorer = Favourites()
    item = Item("ask: ", ("x", "y"), 0)
    outcome = evaluate(
        scorer,
        Letters(),
        [item],
        Settings(shots=3, runs=3),
        demonstrations=demonstrations,  # type: ignore[arg-type]
    )
    assert [len(outcome.correct[way]) for way in WAYS] == [3] * 4
    prompts = {text[: text.index(b"ask: ")] for text in scorer.seen if b"ask: " in text}
    assert len(prompts) == 3  # each run has drawn its own
    shown = {f"{k}?{k}!{SEPARATOR}" for k in "123456789"}
    for prompt in prompts:
        drawn = prompt.decode().split(SEPARATOR)[:-1]
        assert len(set(drawn)) == 3 and {one + SEPARATOR for one in drawn} <= shown
    again = Favourites()
    evaluate(again, Letters(), [item], Settings(shots=3, runs=3), demonstrations=demonstrations)  # type: ignore[arg-type]
    assert again.seen == scorer.seen
    long = Favourites()
    evaluate(long, Letters(), [Item("p" * 100, ("x", "y"), 0)], Settings())  # type: ignore[arg-type]
    assert b"p" * 39 + b"x" in long.seen
    with pytest.raises(DataError, match="an answer has 40 tokens, and the model 40 positions"):
        evaluate(long, Letters(), [Item("", ("x" * 40, "y"), 0)], Settings())  # type: ignore[arg-type]


def test_settings_that_mean_nothing_are_refused() -> None:
    items = [Item("p", ("x", "y"), 0)]
    for settings, message in (
        (Settings(shots=1), "shots=1, but there are 0 demonstrations"),
        (Settings(shots=-1), "shots=-1 must not be negative"),
        (Settings(runs=2), "runs=2 without shots"),
        (Settings(runs=0), "at least 1"),
        (Settings(pmi_weight=math.nan), "must be finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(Favourites(), Letters(), items, settings)  # type: ignore[arg-type]


RECORDS: dict[str, tuple[dict[str, Any], Item]] = {
    "xcopa": (
        {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0},
        Item("It rained.\n", ("Wet.", "Dry."), 0),
    ),
    "xstorycloze": (
        {**{f"input_sentence_{k}": f"S{k}." for k in range(1, 5)}, "sentence_quiz1": "A.", "sentence_quiz2": "B."}
        | {"answer_right_ending": 2},
        Item("S1. S2. S3. S4.\n", ("A.", "B."), 1),
    ),
    "xnli": (
        {"premise": "He runs", "hypothesis": "He moves", "label": 0},
        Item("He runs, right? ", ("Yes, He moves", "Also, He moves", "No, He moves"), 0),
    ),
    "belebele": (
        {"flores_passage": "P.", "question": "Q?", **{f"mc_answer{k}": str(k) for k in range(1, 5)}}
        | {"correct_answer_num": "3"},
        Item("P.\n\nQ: Q?\nA: ", ("1", "2", "3", "4"), 2),
    ),
    "choices": ({"prompt": "p ", "choices": ["x", "y"], "label": 1}, Item("p ", ("x", "y"), 1)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_become_items(name: str, tmp_path: Path) -> None:
    record, item = RECORDS[name]
    write_records(tmp_path / "xx.jsonl", [record])
    assert read_items(tmp_path / "xx.jsonl", task_named(name)) == [item]
    write_records(tmp_path / "xx.jsonl", [record, dict(list(record.items())[1:])])
    with pytest.raises(DataError, match=r"xx.jsonl:2: not an item of this task: it has no '"):
        read_items(tmp_path / "xx.jsonl", task_named(name))


def test_files_and_templates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    record = RECORDS["xcopa"][0]
    write_records(tmp_path / "val.it.jsonl", [record])
    write_records(tmp_path / "val.sw.jsonl.gz", [record])
    (tmp_path / "README.md").write_text("other files of a folder are passed over")
    assert item_files([tmp_path]) == {"it": tmp_path / "val.it.jsonl", "sw": tmp_path / "val.sw.jsonl.gz"}
    with pytest.raises(DataError, match="both of language 'it'"):
        item_files([tmp_path, tmp_path / "val.it.jsonl"])
    with pytest.raises(DataError, match="not a file of items"):
        item_files([tmp_path / "README.md"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .jsonl file of items"):
        item_files([tmp_path / "empty"])
    task = task_named("xcopa", "{premise} [{question}] ")
    assert read_items(tmp_path / "val.it.jsonl", task)[0].prompt == "It rained. [effect] "
    with pytest.raises(ConfigError, match=r"cannot be filled.*Its fields: premise, question"):
        read_items(tmp_path / "val.it.jsonl", task_named("xcopa", "{cause}"))
    with pytest.raises(ConfigError, match="Did you mean 'xcopa'"):
        task_named("xcoppa")
    for label in (2, -1, "0", True):
        write_records(tmp_path / "val.it.jsonl", [{**record, "label": label}])
        with pytest.raises(DataError, match="is not one of its 2 answers"):
            read_items(tmp_path / "val.it.jsonl", task_named("xcopa"))


def test_figures_over_runs_have_their_error() -> None:
    outcome = Outcome(10, {way: [6, 8] for way in WAYS})
    assert outcome.accuracy("sum") == pytest.approx(0.7) and outcome.standard_error("sum") == pytest.approx(0.1)
    lines = report({"it": outcome, "sw": outcome})
    assert "0.7000 +- 0.1000" in lines[1] and lines[-1].startswith("mean") and "0.7000" in lines[-1]


@pytest.mark.skipif(not XCOPA.is_dir(), reason="../shared/data is absent")
def test_the_tool_answers_xcopa(
    made_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 48, "max_positions": 128}
    config = model_config(preset="xglm_tiny", vocab_size=800, **sizes)
    write_logical(Drawn(config), tmp_path / "model", vocabulary_folder=made_vocabulary)
    files = [XCOPA / "val.it.jsonl", XCOPA / "val.zh.jsonl"]
    command = ["evaluate_tasks.py", tmp_path / "model", *files, "--task", "xcopa", "--max_items", 20, "--output"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), str(tmp_path / "scores")])
    main = runpy.run_path(str(ROOT / "tools" / "evaluate_tasks.py"))["main"]
    main()
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'scores' / 'result.json'}"
    result = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert set(result["languages"]) == {"it", "zh"} and result["languages"]["it"]["items"] == 20
    for table in result["languages"].values():
        assert all(0.0 <= table[way]["accuracy"] <= 1.0 for way in WAYS)
    assert result["vocabulary"] == load_vocabulary(made_vocabulary).hash
    monkeypatch.setattr(sys, "argv", [*map(str, command), str(tmp_path / "other"), "--shots", "1"])
    with pytest.raises(ConfigError, match="go together"):
        main()
