import json
from pathlib import Path

import pytest
import sentencepiece

from xlmega.errors import ConfigError, DataError
from xlmega.text import corpus, fertility, vocabulary
from xlmega.text.corpus import Document
from xlmega.text.records import write_records


def test_counts_are_those_of_the_text(made_vocabulary: Path) -> None:
    vocab = vocabulary.load_vocabulary(made_vocabulary)
    documents = [Document("tel tel\nx", "qla", "1"), Document("é日", "qzz", "2"), Document("", "qla", "3")]
    found = fertility.measure_fertility(documents, vocab)
    first = found["qla"]
    assert list(found) == ["qla", "qzz"]
    assert (first.documents, first.words, first.characters, first.utf8_bytes) == (2, 3, 9, 9)
    assert first.tokens == len(vocab.encode("tel tel\nx")) and first.byte_tokens == 0  # a newline is its own byte
    other = found["qzz"]
    assert (other.words, other.characters, other.utf8_bytes, other.byte_tokens, other.unk_tokens) == (1, 2, 5, 5, 0)
    assert other.ratios()["tokens_per_character"] == 2.5 and other.ratios()["frac_byte_tokens"] == 1.0
    table = fertility.fertility_table(found).splitlines()
    assert len(table) == 3 and "100.00 %" in table[2] and len(set(map(len, table))) == 1
    told = json.loads(json.dumps(fertility.fertility_json(found, vocab)))
    assert told["languages"]["qzz"]["tokens_per_byte"] == 1.0 and told["vocabulary"]["hash"] == vocab.hash


def test_parity_on_parallel_text(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    vocab = vocabulary.load_vocabulary(made_vocabulary)
    file = tmp_path / "pairs.jsonl"
    write_records(
        file, [{"translation": {"qla": "tel", "qlb": "日"}}, {"translation": {"qla": "tel tel", "qgr": "tel"}}]
    )
    parity = fertility.measure_parity([file], vocab, "qla")
    assert parity == {
        "qgr": len(vocab.encode("tel")) / len(vocab.encode("tel tel")),
        "qlb": 3 / len(vocab.encode("tel")),
    }
    real = fertility.measure_parity(sorted((made_corpus / "parallel").glob("*.valid.jsonl.gz")), vocab, "qla")
    assert set(real) == {"qlb", "qgr", "qcy", "qhn"} and all(0.3 < value < 3 for value in real.values())
    with pytest.raises(ConfigError, match="a pair of qla and qlb, without the reference 'en'"):
        fertility.measure_parity([file], vocab, "en")
    write_records(file, [{"text": "x"}])
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: no pair"):
        fertility.measure_parity([file], vocab, "qla")


def test_an_unknown_piece_is_counted(made_corpus: Path, tmp_path: Path) -> None:
    texts = (document.text for document in corpus.read_corpus(made_corpus / "valid"))
    with (tmp_path / "their.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=model, vocab_size=500, minloglevel=2
        )
    vocab = vocabulary.import_vocabulary(tmp_path / "their.model", tmp_path / "v")
    found = fertility.measure_fertility([Document("\U0001f680", "x", "1")], vocab)
    assert found["x"].unk_tokens == 1
