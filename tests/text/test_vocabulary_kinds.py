import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.errors import ConfigError, DataError
from xlmega.text import corpus, vocabulary
from xlmega.text.vocabulary import Vocabulary
from xlmega.text.vocabulary_sentencepiece import SCORE_STEPS, SEGMENT_CHARACTERS, SentencePieceVocabulary
from xlmega.text.vocabulary_tokenizers import TokenizersVocabulary

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "pydocs" / "valid"
ODD = [
    "",
    " ",
    "  lead and trail  ",
    "a\0b\0",
    "tab\tand\n\n lines\r\n \n",
    "\u2581 \u2581\u2581x\u2581",
    "\ufeffbom \u2028 \u200b\u00a0\u3000",
    "e\u0301 \u00e9 \ufb01 \u212b",
    "\U0010ffff\uffff\ufffd \U0001f469\u200d\U0001f680",
    "<pad><unk><D><0x41></s><s><|endoftext|> <0x0A> \u2047",
    "it's we'll 12 345,6 日本語 한국어 Привіт",
]


def trained(texts: list[str], size: int, **settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=size, minloglevel=2, num_threads=1, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def texts(made_corpus: Path) -> list[str]:
    return [document.text for document in corpus.read_corpus(made_corpus / "train")][:300]


@pytest.fixture(scope="module")
def lossless(
    texts: list[str], made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Vocabulary]:
    folder = tmp_path_factory.mktemp("kinds")
    made = {"sentencepiece_unigram": vocabulary.load_vocabulary(made_vocabulary)}
    for kind, size in (("sentencepiece_bpe", 600), ("byte_level_bpe", 1001)):
        vocabulary.train_vocabulary(texts, size, folder / kind, kind=kind)
        made[kind] = vocabulary.load_vocabulary(folder / kind)
    return made


@pytest.fixture(scope="module")
def model_of_theirs(texts: list[str]) -> bytes:
    """As SentencePiece trains by default: normalising, with a space in front, <unk> <s> </s> first."""
    return trained([*texts, "ﬁ Å 日本語"], 700, character_coverage=0.9995)


def test_kinds_sizes_and_specials(lossless: dict[str, Vocabulary]) -> None:
    found = {kind: (one.kind, one.size, one.lossless, dict(one.specials)) for kind, one in lossless.items()}
    own = {"pad": 0, "unk": 1, "eod": 2}
    assert found == {
        "sentencepiece_unigram": ("sentencepiece_unigram", 800, True, own),
        "sentencepiece_bpe": ("sentencepiece_bpe", 600, True, own),
        "byte_level_bpe": ("byte_level_bpe", 1001, True, {"eod": 0}),
    }
    bpe = lossless["byte_level_bpe"]
    assert (bpe.pad_id, bpe.piece(0), bpe.text_of(0), bpe.id_of("<|endoftext|>")) == (None, "<|endoftext|>", b"", 0)
    assert sorted(bpe.text_of(id) for id in bpe.byte_ids) == [bytes([k]) for k in range(256)]
    for one in lossless.values():
        with pytest.raises(DataError, match=f"id {one.size} is not in the vocabulary"):
            one.decode([one.size])
        with pytest.raises(DataError, match="whole Unicode characters"):
            one.encode("\ud83d")
        with pytest.raises(ConfigError, match="has no piece '<nope>'"):
            one.id_of("<nope>")


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), odd=st.lists(st.sampled_from(ODD), max_size=3))
def test_every_text_comes_back(lossless: dict[str, Vocabulary], text: str, odd: list[str]) -> None:
    text = text.join(odd) if odd else text
    for one in lossless.values():
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert int(one.piece_bytes[ids].sum()) == len(text.encode())
        assert not set(one.specials.values()) & set(ids)


def real_texts(texts: list[str]) -> list[str]:
    if SHARED.is_dir():
        texts = texts + [document.text for document in corpus.read_corpus(SHARED)][::10]
    return [*texts, "\n".join(texts), " ".join(texts).replace("\n", ""), "ab" * 3000 + "日本" * 3000]


def test_ids_are_the_librarys_own(lossless: dict[str, Vocabulary], texts: list[str]) -> None:
    """Long texts, which are encoded in segments, included."""
    texts = real_texts(texts)
    assert max(map(len, texts)) > 20 * SEGMENT_CHARACTERS
    for kind in ("sentencepiece_unigram", "sentencepiece_bpe"):
        processor = sentencepiece.SentencePieceProcessor(model_proto=lossless[kind]._model)
        for text, ids in zip(texts, lossless[kind].encode_batch(texts, 2), strict=True):
            assert ids.dtype == np.int32 and ids.tolist() == processor.encode(text), text[:100]
    library = tokenizers.Tokenizer.from_str(lossless["byte_level_bpe"]._model.decode())
    for text, ids in zip(texts, lossless["byte_level_bpe"].encode_batch(texts), strict=True):
        assert ids.dtype == np.int32 and ids.tolist() == library.encode(text, add_special_tokens=False).ids, text[:100]


def test_long_words_are_cut_between_pieces_only(lossless: dict[str, Vocabulary], texts: list[str]) -> None:
    for kind in ("sentencepiece_unigram", "sentencepiece_bpe"):
        one = lossless[kind]
        assert isinstance(one, SentencePieceVocabulary)
        processor = sentencepiece.SentencePieceProcessor(model_proto=one._model)
        text = re.sub(r"\s", "", "".join(texts))[: 20 * SEGMENT_CHARACTERS]
        assert len(list(one._segments(text))) > 10 and one.encode(text) == processor.encode(text)
        pair = next(pair for pair in sorted(one._neighbours) if pair[0] == pair[1])
        assert len(list(one._segments(pair * 5 * SEGMENT_CHARACTERS))) == 1


def test_unigram_scores_are_exact_in_single_precision(lossless: dict[str, Vocabulary]) -> None:
    one = lossless["sentencepiece_unigram"]
    assert isinstance(one, SentencePieceVocabulary)
    scores = [one.score(id) for id in range(259, one.size)]
    assert all(score * SCORE_STEPS == round(score * SCORE_STEPS) for score in scores)
    assert min(scores) * SEGMENT_CHARACTERS > -(2**16)


def test_training_repeats_and_refuses(texts: list[str], lossless: dict[str, Vocabulary], tmp_path: Path) -> None:
    for kind, size in (("sentencepiece_bpe", 600), ("byte_level_bpe", 1001)):
        again = vocabulary.train_vocabulary(texts, size, tmp_path / kind, kind=kind)
        assert again.hash == lossless[kind].hash
        with pytest.raises(ConfigError, match=r"size 90000 .*more than this text has pieces for.* size \d+ works"):
            vocabulary.train_vocabulary(texts[:5], 90_000, tmp_path / "x", kind=kind)
    with pytest.raises(ConfigError, match="'spm_bpe' cannot be trained.*sentencepiece_bpe"):
        vocabulary.train_vocabulary(texts, 600, tmp_path / "x", kind="spm_bpe")
    assert not (tmp_path / "x").exists()


# -------------------------------------------------------------------- imported


def test_a_sentencepiece_model_of_others(model_of_theirs: bytes, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "their.model").write_bytes(model_of_theirs)
    vocabulary.import_vocabulary(tmp_path / "their.model", tmp_path / "v")
    one = vocabulary.load_vocabulary(tmp_path / "v")
    assert (one.kind, one.lossless, one.size, dict(one.specials)) == ("sentencepiece", False, 700, {"unk": 0, "eod": 2})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_of_theirs)
    texts = [*texts, *ODD, "日本語 ﬁ \U0001f680\U0001f680"]
    assert [ids.tolist() for ids in one.encode_batch(texts, 2)] == processor.encode(texts)
    for text in texts:
        assert one.decode(one.encode(text)) == processor.decode(processor.encode(text))
    with pytest.raises(ConfigError, match="no piece '<end>' for --eod"):
        vocabulary.import_vocabulary(tmp_path / "their.model", tmp_path / "w", eod="<end>")
    with pytest.raises(DataError, match="begins with .* or normalises"):
        SentencePieceVocabulary(model_of_theirs)


def test_our_layout_with_another_normalisation_is_not_taken_for_ours(texts: list[str], tmp_path: Path) -> None:
    first = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": 2, "pad_piece": "<pad>", "eos_piece": "<D>"}
    model = trained(texts, 700, byte_fallback=True, **first)
    (tmp_path / "books.model").write_bytes(model)
    one = vocabulary.import_vocabulary(tmp_path / "books.model", tmp_path / "v", eod="<D>")
    assert (one.kind, one.lossless, dict(one.specials)) == ("sentencepiece", False, {"pad": 0, "unk": 1, "eod": 2})
    assert len(one.byte_ids) == 256 and one.text_of(one.byte_ids[10]) == b"\n"
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert one.encode(" ﬁ  x\n") == processor.encode(" ﬁ  x\n")


def xglm_folder(model: bytes, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "xglm"}))
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    return folder


def test_xglm_has_fairseqs_numbering(model_of_theirs: bytes, texts: list[str], tmp_path: Path) -> None:
    vocabulary.import_vocabulary(xglm_folder(model_of_theirs, tmp_path / "hf"), tmp_path / "v")
    one = vocabulary.load_vocabulary(tmp_path / "v")
    # 256,000 pieces of XGLM give 256,008 ids in the same way.
    assert (one.kind, one.size, one.lossless) == ("xglm", 700 + 8, False)
    assert dict(one.specials) == {"pad": 1, "unk": 3, "eod": 2}
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_of_theirs)
    assert [one.piece(k) for k in (0, 1, 2, 3)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert [one.piece(k) for k in (4, 700, 701, 707)] == [
        *map(processor.id_to_piece, (3, 699)),
        "<madeupword0>",
        "<madeupword6>",
    ]
    assert [one.text_of(k) for k in (0, 1, 2, 3, 701)] == [b""] * 5
    for text in [*texts[:50], *ODD, "日本語 \U0001f680\U0001f680 x"]:
        inner = processor.encode(text)
        assert one.encode(text) == [{0: 3, 1: 0, 2: 2}.get(id, id + 1) for id in inner]
        assert one.decode([2, *one.encode(text), 1, 705]) == processor.decode(inner)
    with pytest.raises(DataError, match="XGLM's begins with <unk>, <s>, </s>"):
        vocabulary.import_vocabulary(xglm_folder(trained(texts, 600, pad_id=0, unk_id=1, bos_id=2, eos_id=3),
                                                 tmp_path / "bad"), tmp_path / "w")  # fmt: skip


@pytest.mark.torch
def test_xglm_ids_are_those_of_transformers(model_of_theirs: bytes, texts: list[str], tmp_path: Path) -> None:
    """As far as its fast tokenizer agrees with SentencePiece: on single spaces."""
    transformers = pytest.importorskip("transformers")
    one = vocabulary.import_vocabulary(xglm_folder(model_of_theirs, tmp_path / "hf"), tmp_path / "v")
    assert isinstance(one, SentencePieceVocabulary)
    pieces = [(one.piece(id), one.score(id)) for id in range(one.size)]
    theirs = transformers.XGLMTokenizer(vocab=pieces)
    for text in (" ".join(text.split()) for text in texts[:100]):
        assert theirs(text)["input_ids"] == [2, *one.encode(text)]
    theirs.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "xglm"}))
    file = vocabulary.import_vocabulary(tmp_path / "saved", tmp_path / "f")
    assert (file.kind, file.size, file.eod_id, file.pad_id) == ("tokenizer_json", one.size, 2, 1)
    assert [file.encode(text) for text in texts[:50]] == [theirs(text)["input_ids"][1:] for text in texts[:50]]


def test_any_tokenizer_json(texts: list[str], tmp_path: Path) -> None:
    made: Any = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[SEP]"])
    made.train_from_iterator(texts, trainer)
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="does not say which piece ends a document. Give --eod"):
        vocabulary.import_vocabulary(tmp_path / "tokenizer.json", tmp_path / "v")
    vocabulary.import_vocabulary(tmp_path / "tokenizer.json", tmp_path / "v", eod="[SEP]", pad="[PAD]")
    one = vocabulary.load_vocabulary(tmp_path / "v")
    assert (one.kind, one.lossless, one.eod_id, one.pad_id) == ("tokenizer_json", False, 2, 0)
    made.no_truncation()
    for text in texts[:50]:
        assert one.encode(text) == made.encode(text, add_special_tokens=False).ids
        assert one.decode(one.encode(text)) == made.decode(made.encode(text).ids)


def test_what_makes_a_byte_level_bpe_lossless(lossless: dict[str, Vocabulary]) -> None:
    table = json.loads(lossless["byte_level_bpe"]._model)

    def kind(**changes: Any) -> str:
        return TokenizersVocabulary(json.dumps({**table, **changes}).encode(), {"eod": 0}).kind

    assert kind() == "byte_level_bpe"
    spaced = {**table["pre_tokenizer"], "add_prefix_space": True}
    assert kind(normalizer={"type": "NFC"}) == kind(pre_tokenizer=spaced) == "tokenizer_json"
    split = {"type": "Split", "pattern": {"Regex": " "}, "invert": False}
    steps = [{**split, "behavior": "Isolated"}, {**table["pre_tokenizer"], "use_regex": False}]
    assert kind(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}) == "byte_level_bpe"
    steps[0]["behavior"] = "Removed"
    assert kind(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}) == "tokenizer_json"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "\0"])
def test_what_is_no_tokenizer(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        vocabulary.import_vocabulary(tmp_path / "tokenizer.json", tmp_path / "v")
    (tmp_path / "x.model").write_text(content)
    with pytest.raises(DataError, match="not a SentencePiece model"):
        vocabulary.import_vocabulary(tmp_path / "x.model", tmp_path / "v")
    with pytest.raises(DataError, match="cannot read"):
        vocabulary.import_vocabulary(tmp_path / "none.model", tmp_path / "v")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no vocabulary"):
        vocabulary.import_vocabulary(tmp_path / "empty", tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_a_folder_of_another_kind(lossless: dict[str, Vocabulary], tmp_path: Path) -> None:
    lossless["byte_level_bpe"].save(tmp_path / "v")
    told = tmp_path / "v" / "vocabulary.json"
    whole = told.read_text()
    for damaged, message in (
        (whole.replace("byte_level_bpe", "magic"), "of kind 'magic', which this xlmega does not know"),
        (whole.replace('"id": 0', '"id": 5'), "do not belong together"),
        (whole.replace('"id": 0', '"id": "x"'), "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
    ):
        told.write_text(damaged)
        with pytest.raises(DataError, match=message):
            vocabulary.load_vocabulary(tmp_path / "v")
