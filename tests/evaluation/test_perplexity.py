"""Perplexity by hand, against transformers, and under every definition."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from drawn import Drawn

from xlmega.data.indexed import open_corpus
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.evaluation.documents import open_documents
from xlmega.evaluation.numberings import numbered, numberings_by_hand, numberings_of_run
from xlmega.evaluation.perplexity import Definition, Perplexity, Spelling, perplexity, report, spans_of, total
from xlmega.models.config import model_config
from xlmega.text.corpus import Document, write_documents
from xlmega.text.vocabulary import load_vocabulary, train_vocabulary
from xlmega.weights.huggingface import export_huggingface

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
EOD = 2


class Bigrams:
    """p(next | last id) from a table: every figure can be added up by hand."""

    def __init__(self, size: int = 9, max_positions: int = 8) -> None:
        self.vocab_size, self.max_positions = size, max_positions
        self.table = torch.rand(size, size, generator=torch.Generator().manual_seed(0)).log_softmax(1)

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        return self.table[inputs_BL, targets_BL]

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        return self.table[inputs_BL[torch.arange(len(lengths_B)), lengths_B - 1]]

    def nats(self, ids: Sequence[int], first: int = 0) -> float:
        """Of the targets of `ids` from number `first` on."""
        return -sum(float(self.table[a, b]) for a, b in zip(ids[first:], ids[first + 1 :]))


DOCUMENTS = [np.array(ids) for ids in ([3, 4, 5, EOD], [6, EOD], [7, 8, 3, 3, 4, EOD])]
STREAM = [3, 4, 5, 2, 6, 2, 7, 8, 3, 3, 4, 2]
SPELLING = Spelling(np.array([0, 0, 0, 1, 2, 3, 4, 5, 6]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]))


def measured(definition: Definition, **more: Any) -> Perplexity:
    return perplexity(Bigrams(), iter(DOCUMENTS), definition, SPELLING, EOD, **more)


def test_documents_by_hand() -> None:
    model, found = Bigrams(), measured(Definition("documents"))
    due = model.nats([2, 3, 4, 5, 2]) + model.nats([2, 6, 2]) + model.nats([2, 7, 8, 3, 3, 4, 2])
    assert found.nats == pytest.approx(due, abs=1e-5) and (found.tokens, found.sequences) == (12, 3)
    assert (found.bytes, found.characters, found.cut_tokens) == (1 + 2 + 3 + 4 + 5 + 6 + 1 + 1 + 2, 3 + 2 + 4 + 3, 0)
    assert found.perplexity == pytest.approx(math.exp(due / 12)) and found.bits_per_byte == pytest.approx(
        due / math.log(2) / 25
    )
    assert found.nats_per_character == pytest.approx(due / 12)
    cut = measured(Definition("documents", length=2))
    due = model.nats([2, 3, 4]) + model.nats([2, 6, 2]) + model.nats([2, 7, 8])
    assert cut.nats == pytest.approx(due, abs=1e-5) and (cut.tokens, cut.cut_tokens) == (6, 6)


def test_sliding_by_hand() -> None:
    model, found = Bigrams(), measured(Definition("sliding", length=6, last_n=4))
    # Windows begin at ids 0, 4, ...; the first two targets of the stream are never scored.
    assert found.nats == pytest.approx(model.nats(STREAM, first=2), abs=1e-5)
    assert (found.tokens, found.cut_tokens, found.sequences) == (9, 2, 3)
    whole = measured(Definition("sliding", length=6, last_n=6))
    assert (whole.tokens, whole.cut_tokens) == (11, 0)
    short = perplexity(Bigrams(), [DOCUMENTS[1]], Definition("sliding", length=6, last_n=2), SPELLING, EOD)
    assert short.tokens == 0 and short.cut_tokens == 1 and math.isnan(short.perplexity)


def test_continuous_by_hand() -> None:
    model, found = Bigrams(), measured(Definition("continuous", length=4))
    assert found.nats == pytest.approx(model.nats(STREAM), abs=1e-5)
    assert (found.tokens, found.sequences, found.cut_tokens) == (11, 3, 0)


def test_the_mean_of_batch_exponentials_by_hand() -> None:
    model = Bigrams()
    found = measured(Definition("continuous", length=4, batch_windows=2))
    assert found.mean_of_batch_exponentials == pytest.approx(math.exp(model.nats(STREAM[:9]) / 8), abs=1e-5)
    found = measured(Definition("continuous", length=4, batch_windows=1))
    windows = [STREAM[0:5], STREAM[4:9], STREAM[8:12]]
    due = sum(math.exp(model.nats(ids) / (len(ids) - 1)) for ids in windows) / 3
    assert found.mean_of_batch_exponentials == pytest.approx(due, abs=1e-5)
    assert measured(Definition("continuous", length=4)).mean_of_batch_exponentials is None
    model.table *= 1e4  # beyond what exp can say
    found = perplexity(model, iter(DOCUMENTS), Definition("continuous", 4, batch_windows=2), SPELLING, EOD)
    assert found.mean_of_batch_exponentials == math.inf
    assert "mean_of_batch_exponentials" in found.table() and "mean exp" in report({"xx": found})[0]


@pytest.mark.parametrize(("length", "last_n"), [(8, 8), (8, 3), (8, 1), (5, 2)])
def test_every_target_of_a_stream_counts_once(length: int, last_n: int) -> None:
    draw = np.random.default_rng(0)
    for total_ids in range(2, 60):
        ids, documents = np.arange(total_ids), []
        while len(ids):
            cut = int(draw.integers(1, 25))
            documents.append(ids[:cut])
            ids = ids[cut:]
        for kind, step in (("sliding", last_n), ("continuous", length)):
            definition = Definition(kind, length, last_n).checked(8)
            counted = [
                int(t) for span in spans_of(iter(documents), definition, EOD) for t in span.ids[span.first + 1 :]
            ]
            assert counted == list(range(1 + length - step, total_ids)), (kind, total_ids)
            for span in spans_of(iter(documents), definition, EOD):
                assert span.ids[0] % step == 0 and 2 <= len(span.ids) <= length + 1


def test_a_clone_is_scored_by_its_own_ids_and_counted_by_the_originals() -> None:
    numbering = np.array([0, 1, 5, 6, 7, 8, 3, 4, 2])
    found, plain = measured(Definition("documents"), numbering=numbering), measured(Definition("documents"))
    mapped = [numbering[np.append(EOD, ids)].tolist() for ids in DOCUMENTS]
    assert found.nats == pytest.approx(sum(Bigrams().nats(ids) for ids in mapped), abs=1e-5)
    assert found.nats != plain.nats and found.bytes == plain.bytes and found.characters == plain.characters


def test_languages_together_are_weighted_by_tokens() -> None:
    both = total([Perplexity(nats=10.0, tokens=10, characters=5, bytes=8), Perplexity(nats=60.0, tokens=20, bytes=2)])
    assert both.perplexity == pytest.approx(math.exp(70 / 30)) and both.bits_per_byte == pytest.approx(7 / math.log(2))
    assert report({"a": both, "b": both})[-1].startswith("all ")


def test_what_cannot_be_measured_is_refused() -> None:
    for definition, message in (
        (Definition("documents", length=9), "length=9; the model has 1 to 8 positions"),
        (Definition("documents", length=-1), "length=-1"),
        (Definition("sliding", length=4, last_n=5), "can count 1 to 4 targets"),
        (Definition("sliding", length=4, last_n=0), "last_n=0"),
        (Definition("words"), "definition 'words' is not known"),
        (Definition("documents", batch_windows=-1), "must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            measured(definition)
    with pytest.raises(DataError, match="id 9 is not one of the vocabulary's 9"):
        perplexity(Bigrams(), [np.array([9, 2])], Definition("documents"), SPELLING, EOD)


def test_pieces_are_counted_in_bytes_and_in_characters(made_vocabulary: Path) -> None:
    vocabulary = load_vocabulary(made_vocabulary)
    spelling = Spelling.of(vocabulary)
    for text in ("the night", "Élève à 日本, 🤖 — ñ", "", "▁ \0\n"):
        ids = np.array([*vocabulary.encode(text), vocabulary.eod_id])
        assert (spelling.bytes[ids].sum(), spelling.characters[ids].sum()) == (len(text.encode()), len(text))


# -------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def exported(made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = model_config(
        preset="xglm_tiny",
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        ffn_hidden_size=96,
        max_positions=64,
        vocab_size=800,
    )
    output = tmp_path_factory.mktemp("model") / "hf"
    export_huggingface(Drawn(config, std=0.3), output, vocabulary_folder=made_vocabulary)
    return output


def measure(monkeypatch: pytest.MonkeyPatch, *args: object) -> dict[str, Any]:
    """The tool's result.json."""
    monkeypatch.setattr(sys, "argv", ["evaluate_perplexity.py", *map(str, args)])
    runpy.run_path(str(ROOT / "tools" / "evaluate_perplexity.py"))["main"]()
    output = Path(str(args[args.index("--output") + 1]))
    result: dict[str, Any] = json.loads((output / "result.json").read_text(encoding="utf-8"))
    return result


def test_figures_are_transformers(
    exported: Path,
    made_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()

    def their_nats(ids: np.ndarray, first: int = 0) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids[None, :-1].astype(np.int64))).logits[0].double()
        targets = torch.from_numpy(ids[1:].astype(np.int64))
        return float(torch.nn.functional.cross_entropy(logits, targets, reduction="none")[first:].sum())

    tokens = open_corpus(made_tokens, "valid")
    name = min(tokens, key=lambda language: tokens[language].num_tokens)
    some = {"--language": name, "--max_documents": 3, "--batch_tokens": 150}
    options = [word for pair in some.items() for word in pair]
    documents = [tokens[name].document(k) for k in range(3)]
    stream = np.concatenate(documents)

    found = measure(monkeypatch, exported, made_tokens, *options, "--output", tmp_path / "documents")
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'documents' / 'result.json'}"
    due = sum(their_nats(np.append(EOD, ids[:64])) for ids in documents)
    table = found["languages"][name]
    assert table["nats"] == pytest.approx(due, rel=1e-5)
    assert table["tokens"] == sum(min(64, len(ids)) for ids in documents)
    assert table["perplexity"] == pytest.approx(math.exp(due / table["tokens"]), rel=1e-4)
    vocabulary = load_vocabulary(exported / "vocabulary")
    spelt = [b"".join(vocabulary.text_of(int(id)) for id in ids[:64]) for ids in documents]  # may end within a letter
    assert table["bytes"] == sum(map(len, spelt))
    assert table["characters"] == sum(len(text.decode(errors="replace")) for text in spelt)
    assert found["definition"]["length"] == 64 and found["vocabulary"] == vocabulary.hash

    options += ["--length", 32]
    found = measure(
        monkeypatch,
        exported,
        made_tokens,
        *options,
        "--definition",
        "sliding",
        "--last_n",
        8,
        "--output",
        tmp_path / "s",
    )
    windows = [stream[at : at + 33] for at in range(0, len(stream) - 25, 8)]
    due = sum(their_nats(window, 24) for window in windows)
    assert found["all"]["nats"] == pytest.approx(due, rel=1e-5)
    assert found["all"]["tokens"] == len(stream) - 1 - 24 and found["all"]["cut_tokens"] == 24

    # The text itself gives what its tokens give, from a split, a file of lines and a document a line.
    vocabulary_documents = [vocabulary.decode(ids) for ids in documents]
    write_documents(
        tmp_path / "split" / "00000" / "0.jsonl.gz",
        [Document(text, name, str(k)) for k, text in enumerate(vocabulary_documents)],
    )
    continuous = [*options, "--definition", "continuous", "--mean_of_batch_exponentials", 2, "--output"]
    token_scores = measure(monkeypatch, exported, made_tokens, *continuous, tmp_path / "c1")
    text_scores = measure(monkeypatch, exported, tmp_path / "split", *continuous, tmp_path / "c2")
    assert token_scores["all"]["tokens"] == len(stream) - 1
    assert text_scores["languages"] == token_scores["languages"] and "mean_of_batch_exponentials" in text_scores["all"]
    with pytest.raises(DataError, match="holds a result"):
        measure(monkeypatch, exported, tmp_path / "split", *continuous, tmp_path / "c2")
    with pytest.raises(DataError, match="is a file; --output is the folder"):
        measure(monkeypatch, exported, tmp_path / "split", *continuous, tmp_path / "c2" / "result.json")
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        measure(monkeypatch, exported, made_tokens, "--device", "nowhere", "--output", tmp_path / "d")


def test_data_of_every_kind_and_what_is_none(made_tokens: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    vocabulary = load_vocabulary(made_vocabulary)
    lines = tmp_path / "fr.txt"
    lines.write_text("one line\n\nandra raden\n", encoding="utf-8")
    languages, _ = open_documents(lines, vocabulary)
    assert list(languages) == ["fr"]
    for _ in range(2):  # again and again
        assert [vocabulary.decode(ids[:-1]) for ids in languages["fr"].read()] == ["one line", "andra raden"]
    languages, own = open_documents(made_tokens, None, max_documents=2)
    assert own.hash == vocabulary.hash and all(len(list(one.read())) <= 2 for one in languages.values())
    for path, given, message in (
        (tmp_path / "nowhere", {}, "there is no"),
        (made_tokens / "vocabulary" / "vocabulary.json", {}, "is none of"),
        (made_tokens, {"split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(DataError, match=message):
            open_documents(path, vocabulary, **given)
    with pytest.raises(ConfigError, match="--vocabulary DIR"):
        open_documents(lines, None)
    with pytest.raises(ConfigError, match="max_documents=-1"):
        open_documents(lines, vocabulary, max_documents=-1)
    lines.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        open_documents(lines, vocabulary)
    lines.write_text("\n")
    with pytest.raises(DataError, match="holds no document"):
        open_documents(lines, vocabulary)


def test_clones_and_second_vocabularies_are_languages_of_their_own(made_tokens: Path, tmp_path: Path) -> None:
    languages, vocabulary = open_documents(made_tokens, None)
    size, name = vocabulary.size, next(iter(languages))
    clones = numberings_by_hand([vocabulary], num_clones=2)
    found = numbered(languages, vocabulary, clones)
    assert len(found) == 3 * len(languages) and clones.space.size == 3 * size
    table = found[f"{name}-clone2"].numbering
    assert table is not None and (table[0], table[EOD], table[7]) == (0, EOD + 2 * size, 7 + 2 * size)
    assert [ids.tolist() for ids in found[f"{name}-clone2"].read()] == [ids.tolist() for ids in languages[name].read()]
    plain = numbered(languages, vocabulary, numberings_by_hand([vocabulary]), [name])
    assert list(plain) == [name] and plain[name].numbering is None
    second = numberings_by_hand([vocabulary, other := _smaller(vocabulary, tmp_path)])
    assert numbered(languages, other, second)[name].numbering is second.space.tables[1]
    with pytest.raises(DataError, match=f"no language '{name}-clone3'. Did you mean"):
        numbered(languages, vocabulary, clones, [f"{name}-clone3"])
    with pytest.raises(DataError, match="the data are of vocabulary"):
        numbered(languages, other, clones)
    with pytest.raises(ConfigError, match="not both"):
        numberings_by_hand([vocabulary, other], num_clones=1)
    with pytest.raises(ConfigError, match="no second vocabulary to merge"):
        numberings_by_hand([vocabulary], merge=True)


def _smaller(vocabulary: Any, folder: Path) -> Any:
    texts = ["tel nor tel nor bim tel\n" * 20]
    return train_vocabulary(texts, 271, folder / "second")


def test_a_run_says_which_clones_it_has(made_tokens: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    shutil.copytree(made_vocabulary, tmp_path / "vocabulary")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"data": {"num_cloned_languages": 1, "p_clone": 0.5}}}))
    checkpoint = SimpleNamespace(folder=tmp_path / "checkpoints" / "step-00000003")
    found = numberings_of_run(checkpoint)
    assert found is not None and (found.num_clones, found.space.size) == (1, 1600)
    assert numberings_of_run(SimpleNamespace(folder=tmp_path / "models" / "first")) is None
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="Restore it"):
        numberings_of_run(checkpoint)
