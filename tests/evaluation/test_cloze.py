"""The cloze test: items from text, and a beam that finds what a known model says."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.evaluation import cloze, scoring
from xlmega.evaluation.cloze import Item, Result, evaluate_cloze, make_items, read_items, write_items
from xlmega.models.config import model_config
from xlmega.text.corpus import Document
from xlmega.text.vocabulary import Vocabulary, load_vocabulary, train_vocabulary
from xlmega.weights.directory import write_logical
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
TEXT = "The small cat sat on the old mat near the warm red house. Then it slept, quietly, all through the long night!"


@pytest.fixture(scope="module", params=["sentencepiece_unigram", "byte_level_bpe"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("cloze") / request.param
    return train_vocabulary([TEXT, "house night cat mat"] * 20, 290, folder, kind=request.param)


class Told:
    """A Scorer that goes on with known tokens after a prompt, with the second and third best as given."""

    max_positions = 200

    def __init__(self, vocabulary: Vocabulary, ways: dict[int, list[tuple[list[int], float]]]) -> None:
        """`ways`: for a prompt's length the continuations with the probability of their first token."""
        self.vocab_size, self.ways, self.eod = vocabulary.size, ways, vocabulary.eod_id
        self.seen: list[list[int]] = []

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        out = torch.full((len(lengths_B), self.vocab_size), 1e-6)
        for row, length in enumerate(lengths_B.tolist()):
            ids = inputs_BL[row, :length].tolist()
            self.seen.append(ids)
            for prompt, ways in self.ways.items():
                tail = ids[prompt:]
                for way, probability in ways:
                    if 0 <= len(tail) < len(way) and way[: len(tail)] == tail and length >= prompt:
                        out[row, way[len(tail)]] = probability if not tail else 0.9
        return (out / out.sum(1, keepdim=True)).log()


def test_items_are_ends_of_sentences() -> None:
    items = make_items([Document(TEXT, "en", "1"), Document("Zu kurz. " * 9, "de", "2")], 5, seed=1)
    assert [item.language for item in items].count("en") == 1
    known = {"house": "The small cat sat on the old mat near the warm red", "night": TEXT.removesuffix(" night!")}
    english = next(item for item in items if item.language == "en")
    assert known[english.answer] == english.prompt
    assert make_items([Document(TEXT, "en", str(k)) for k in range(30)], 7) == make_items(
        [Document(TEXT, "en", str(k)) for k in range(30)], 7
    )
    assert {item.answer for item in make_items([Document(TEXT, "en", str(k)) for k in range(30)], 30)} == {
        "house",
        "night",
    }
    assert all(len(item.prompt.split()) == 60 for item in make_items([Document("word " * 99 + "end.", "en", "1")], 1))
    with pytest.raises(DataError, match="nothing to take"):
        make_items([Document("No.", "en", "1")], 1)
    with pytest.raises(ConfigError, match="at least 1"):
        make_items([], 0)
    with pytest.raises(ConfigError, match="seed at least 0, but they are 1 and -1"):
        make_items([], 1, seed=-1)


def test_a_book_is_gone_through_once() -> None:
    marks = Document("one " * 70 + "(two) three - . . . ) end4. Four five.", "en", "1")  # "end4" is no word
    three, five = cloze._candidates(marks)
    assert (three.prompt, three.answer) == ("one " * 59 + "(two)", "three")
    assert five.prompt.endswith("three - . . . ) end4. Four") and five.answer == "five"
    begun = time.process_time()
    assert len(list(cloze._candidates(Document(TEXT * 10_000, "en", "1")))) == 20_000
    assert time.process_time() - begun < 3.0  # 1 MB; it took minutes when each sentence read all before it


def test_the_beam_finds_the_word_best_or_third(vocabulary: Vocabulary) -> None:
    items = [Item("The small cat sat on the old", "mat", "en"), Item("Then it slept through the long", "night", "xx")]
    answers = [cloze.answer_ids(vocabulary, item) for item in items]
    prompts = [len(vocabulary.encode(item.prompt)) + 1 for item in items]
    ways = {
        prompts[0]: [(answers[0], 0.8)],
        # Two likelier first tokens: the word is in the third beam.
        prompts[1]: [(answers[1], 0.2), *(([id] * 9, 0.35) for id in vocabulary.encode("a cat")[:1])],
    }
    scorer = Told(vocabulary, ways)
    found = evaluate_cloze(scorer, vocabulary, items)
    assert found == {"en": Result(1, 1, 1), "xx": Result(1, 0, 1), "all": Result(2, 1, 2)}
    # The model reads all of the prompt, after an end-of-document.
    assert any(ids == [vocabulary.eod_id, *vocabulary.encode(items[0].prompt)] for ids in scorer.seen)
    assert found["all"].describe() == "top-1 50.0%, top-3 100.0% of 2 items"


def test_punctuation_is_no_candidate(vocabulary: Vocabulary) -> None:
    allowed = cloze._allowed(vocabulary, vocabulary.size)
    for id in range(vocabulary.size):
        text = vocabulary.text_of(id).decode(errors="replace").strip()
        if text in (".", ",", "!"):
            assert not allowed[id]
        if text.isalpha():
            assert allowed[id]
    assert not allowed[vocabulary.eod_id]


def test_long_prompts_lose_their_beginning(vocabulary: Vocabulary) -> None:
    scorer = Told(vocabulary, {})
    scorer.max_positions = 12
    evaluate_cloze(scorer, vocabulary, [Item("The cat sat " * 20, "mat", "en")])
    assert max(map(len, scorer.seen)) <= 12
    with pytest.raises(DataError, match=r"tokens, and the model 12 positions"):
        evaluate_cloze(scorer, vocabulary, [Item("The cat", "zqzqzqzqzqzqzqzqzqzqzqzqzq", "en")])


def test_probabilities_that_are_no_numbers_are_no_score(vocabulary: Vocabulary) -> None:
    with pytest.raises(CheckpointError, match="are not numbers"):
        scoring._numbers(torch.tensor([-1.0, float("nan")]))


def test_items_go_to_a_file_and_back(tmp_path: Path) -> None:
    items = [Item("où est la", "forêt", "fr")]
    write_items(items, tmp_path / "items.jsonl")
    assert read_items(tmp_path / "items.jsonl") == items and "forêt" in (tmp_path / "items.jsonl").read_text()
    for text in ('{"prompt": "a"}', "no json", '{"prompt": "", "answer": "b", "language": "en"}', "[1]"):
        (tmp_path / "bad.jsonl").write_text(text + "\n")
        with pytest.raises(DataError, match=r"bad\.jsonl:1 is no item"):
            read_items(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no items"):
        read_items(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        read_items(tmp_path)
    (tmp_path / "bom.jsonl").write_bytes('\ufeff{"prompt":"a\u2028b","answer":"c","language":"en"}\r\n'.encode())
    assert read_items(tmp_path / "bom.jsonl") == [Item("a\u2028b", "c", "en")]


def test_the_tool(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    size = load_vocabulary(made_vocabulary).size
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 16, "max_positions": 64}
    config = model_config(preset="nano_gpt_mini", vocab_size=size, **sizes)
    shapes = logical_shapes(config)

    class Model(InitialWeights):
        def names(self) -> list[str]:
            return list(shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return shapes[name]

        def read(self, name: str) -> torch.Tensor:
            return self.read_slice(name, (slice(None),) * len(shapes[name]))

    model = Model(config, 0, shapes)
    model.config = config
    write_logical(model, tmp_path / "model", vocabulary_folder=made_vocabulary, dtype="float32", overwrite=False)
    command = [sys.executable, str(ROOT / "tools/evaluate_cloze.py"), str(tmp_path / "model")]
    items = ["--corpus", str(made_corpus / "valid"), "--count", "3", "--keep_items", str(tmp_path / "items.jsonl")]
    output = ["--output", str(tmp_path / "found.json")]
    told = subprocess.run([*command, *items, *output], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1] == f"wrote {tmp_path / 'found.json'}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["all"]["items"] == sum(one["items"] for code, one in found.items() if code != "all")
    again = [*command, "--items", str(tmp_path / "items.jsonl")]
    assert subprocess.run(again, capture_output=True, text=True, check=True).stdout == "".join(
        line + "\n" for line in told.stdout.splitlines()[:-1]
    )
    refused = subprocess.run([*command, *items, *output], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "exists" in refused.stderr


def test_the_tool_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, main = str(tmp_path / "items.jsonl"), runpy.run_path(str(ROOT / "tools/evaluate_cloze.py"))["main"]
    for line, says in (
        ([], "either --items"),
        (["--corpus", "a", "--keep_items", kept, "--output", kept], "--output and --keep_items are both"),
        (["--items", kept, "--count", "3"], "--count and --seed are of --corpus"),
        (["--items", kept, "--output", str(tmp_path), "--overwrite"], "is a folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate_cloze.py", "model", *line])
        with pytest.raises(ConfigError, match=says):
            main()
