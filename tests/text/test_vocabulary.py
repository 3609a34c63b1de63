import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.errors import ConfigError, DataError
from xlmega.text import corpus, vocabulary
from xlmega.text.vocabulary import Vocabulary

ODD = [
    "",
    " ",
    "   leading and trailing  ",
    "a\0b\0\0",
    "tab\tand\ttabs\t\t",
    "\n\n line\r\nline\r \n",
    "\u2581 \u2581\u2581x\u2581",
    "\ufeffbom \u2028 \u200b\u00a0\u3000",
    "e\u0301 \u00e9 \ufb01 \u212b",  # NFC and NFKC would change these
    "\U0010ffff\uffff\ufffd \U0001f469\u200d\U0001f680",
    "<pad><unk><D><0x41></s> \u2047 \u2585",
    "x" * 5000 + " " * 5000 + "\n" * 5000,
]


@pytest.fixture(scope="module")
def made(made_vocabulary: Path) -> Vocabulary:
    return vocabulary.load_vocabulary(made_vocabulary)


def assert_lossless(made: Vocabulary, text: str) -> None:
    ids = made.encode(text)
    assert made.decode(ids) == text
    assert int(made.piece_bytes[ids].sum()) == len(text.encode())
    assert not {made.pad_id, made.eod_id, made.unk_id} & set(ids)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts_come_back(made: Vocabulary, text: str) -> None:
    assert_lossless(made, text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(), joined=st.lists(st.sampled_from([" ", "\n", "\u2581", "\0", "\t", "tel ", "仞", "é"]), max_size=40)
)
def test_any_text_comes_back(made: Vocabulary, text: str, joined: list[str]) -> None:
    assert_lossless(made, text + "".join(joined))


def test_known_ids(made: Vocabulary) -> None:
    assert (made.size, made.pad_id, made.eod_id) == (800, 0, 2)
    assert made.encode("\n\t\0") == [3 + 10, 3 + 9, 3]
    assert made.encode("\u2581") == [3 + 0xE2, 3 + 0x96, 3 + 0x81]
    assert [made.text_of(k) for k in (0, 1, 2, 3, 258)] == [b"", b"", b"", b"\0", b"\xff"]
    assert made.piece_bytes[:5].tolist() == [0, 0, 0, 1, 1] and made.piece_bytes.dtype == np.int32
    assert made.decode([2, *made.encode("tel"), 0, 3 + 0xFF]) == "tel\ufffd"
    with pytest.raises(DataError, match="id 800 is not in the vocabulary of 800 ids, 0 to 799"):
        made.decode([5, 800])


def test_ids_depend_on_the_text_alone(made: Vocabulary, made_corpus: Path) -> None:
    texts = [document.text for document in corpus.read_corpus(made_corpus / "valid")][:40] + ODD
    one, many = made.encode_batch(texts), made.encode_batch(texts[::-1], num_threads=4)[::-1]
    for text, a, b in zip(texts, one, many, strict=True):
        assert a.dtype == np.int32 and a.tolist() == b.tolist() == made.encode(text)


def test_half_a_surrogate_pair_is_refused(made: Vocabulary) -> None:
    with pytest.raises(DataError, match="whole Unicode characters"):
        made.encode("\ud83d")


def test_segments_join_to_the_text_and_end_at_lines_or_words() -> None:
    assert list(vocabulary.segments_of("aa\nbb cc", 5)) == ["aa\n", "bb cc"]
    assert list(vocabulary.segments_of("aa bb cc", 5)) == ["aa", " bb", " cc"]
    assert list(vocabulary.segments_of("abcdefg", 3)) == ["abc", "def", "g"]
    assert list(vocabulary.segments_of("   ", 1)) == [" ", " ", " "]
    assert list(vocabulary.segments_of("", 3)) == []


def test_training_repeats_and_the_folder_is_checked(made_corpus: Path, made: Vocabulary, tmp_path: Path) -> None:
    texts = [document.text for document in corpus.read_corpus(made_corpus / "train")]
    again = vocabulary.train_vocabulary(texts, 800, tmp_path / "a")
    assert again.hash == made.hash == vocabulary.load_vocabulary(tmp_path / "a").hash
    described = json.loads((tmp_path / "a" / "vocabulary.json").read_text())
    assert described["hash"] == made.hash and described["specials"]["eod"] == {"id": 2, "piece": "<D>"}
    assert np.load(tmp_path / "a" / "piece_bytes.npy").tolist() == made.piece_bytes.tolist()

    other = vocabulary.train_vocabulary(texts, 700, tmp_path / "b")
    assert other.hash != made.hash
    shutil.copy(tmp_path / "b" / "tokenizer.model", tmp_path / "a")
    with pytest.raises(DataError, match="do not belong together"):
        vocabulary.load_vocabulary(tmp_path / "a")
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        vocabulary.load_vocabulary(tmp_path / "b")
    with pytest.raises(DataError, match="there is no '.*vocabulary.json'"):
        vocabulary.load_vocabulary(tmp_path / "none")


def test_a_text_without_spaces_or_of_one_line(tmp_path: Path) -> None:
    one = vocabulary.train_vocabulary(["漢字仮名交漢字" * 3000, "仮漢名字交"], 266, tmp_path / "v")
    for text in ("漢字 仮名 \u2581交", "a b"):
        assert_lossless(one, text)


def test_sizes_that_do_not_fit_suggest_ones_that_do(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "the dog sat on the log"] * 50
    for size, rule, remedy in (
        (5000, "more than this text has pieces for", r"size (\d+) works"),
        (265, "does not hold the 13 different characters", r"Take size (\d+) or more"),
    ):
        with pytest.raises(ConfigError, match=rule) as refused:
            vocabulary.train_vocabulary(texts, size, tmp_path / "v")
        assert not (tmp_path / "v").exists()
        works = int(re.search(remedy, str(refused.value))[1])
        assert vocabulary.train_vocabulary(texts, works, tmp_path / str(size)).size == works
    with pytest.raises(ConfigError, match="so size 100 is too small"):
        vocabulary.train_vocabulary(texts, 100, tmp_path / "w")
    with pytest.raises(ConfigError, match="character_coverage must be above 0.5"):
        vocabulary.train_vocabulary(texts, 300, tmp_path / "w", character_coverage=0.0)
    with pytest.raises(DataError, match="every document was empty"):
        vocabulary.train_vocabulary(["", "\n"], 300, tmp_path / "w")
    with pytest.raises(ConfigError, match="exists.*--overwrite"):
        vocabulary.train_vocabulary(texts, works, tmp_path / "265")
    assert vocabulary.train_vocabulary(texts, works, tmp_path / "265", overwrite=True).size == works


def test_lines_are_drawn_uniformly_and_repeatably() -> None:
    texts = ["\n".join(str(10 * k + j) for j in range(10)) for k in range(10)]
    assert vocabulary.sample_lines(texts, 100, 0) == [str(k) for k in range(100)]
    assert vocabulary.sample_lines(texts, 20, 5) == vocabulary.sample_lines(texts, 20, 5)
    drawn = Counter(line for seed in range(500) for line in vocabulary.sample_lines(texts, 20, seed))
    assert sum(drawn.values()) == 500 * 20 and len(drawn) == 100
    # Each line is in a sample with probability 0.2: 100 times of 500, with a standard deviation of 9.
    assert 60 < min(drawn.values()) and max(drawn.values()) < 140
    assert np.mean([drawn[str(k)] for k in range(20)]) == pytest.approx(100, abs=10)
    assert np.mean([drawn[str(k)] for k in range(80, 100)]) == pytest.approx(100, abs=10)


def test_real_text_comes_back(made: Vocabulary) -> None:
    data = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "pydocs" / "valid"
    if not data.is_dir():
        pytest.skip("real text: ../shared/data/pydocs is not here")
    for count, document in enumerate(corpus.read_corpus(data)):
        if count % 20 == 0:
            assert_lossless(made, document.text)
