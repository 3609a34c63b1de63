"""Whatever the kind of a vocabulary, the tokenizer.json written for it gives the same ids."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from xlmega.text import corpus, vocabulary
from xlmega.text.vocabulary import Vocabulary
from xlmega.text.vocabulary_sentencepiece import SentencePieceVocabulary
from xlmega.weights.tokenizer_json import tokenizer_files

ASCII = "".join(map(chr, range(33, 127)))
ODD = [
    "",
    " ",
    "  lead  and   trail  ",
    "a\0b tab\tand\n\n lines\r\n",
    "\u2581 \u2581\u2581x\u2581",
    "\ufeff\u2028 \u200b\u00a0\u3000 e\u0301 \u00e9 \ufb01 \u212b",
    "\U0010ffff\ufffd \U0001f469\u200d\U0001f680 日本語 한국어",
    "<pad><unk><D><0x41></s><s><|endoftext|> <0x0A>",
]


def encoder(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    files = tokenizer_files(vocabulary, 512)
    made = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    made.encode_special_tokens = True  # what split_special_tokens is to transformers
    assert files["tokenizer_config.json"]["split_special_tokens"] is True
    assert files["tokenizer_config.json"]["eos_token"] == vocabulary.piece(vocabulary.eod_id)
    return made


@pytest.fixture(scope="module")
def texts(made_corpus: Path) -> list[str]:
    found = [document.text for document in corpus.read_corpus(made_corpus / "train")][:200]
    return [*found, *ODD, "".join(found)]


@pytest.mark.parametrize(("kind", "size"), [("sentencepiece_bpe", 600), ("byte_level_bpe", 1001)])
def test_of_vocabularies_that_we_trained(kind: str, size: int, texts: list[str], tmp_path: Path) -> None:
    one = vocabulary.train_vocabulary(texts[:200], size, tmp_path / "v", kind=kind)
    made = encoder(one)
    for text in texts:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == one.encode(text), text[:80]
        assert made.decode(ids) == text


@pytest.mark.parametrize(
    "settings",
    [{}, {"byte_fallback": True}, {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}],
    ids=["as trained by default", "byte fallback", "no normalisation"],
)
def test_of_sentencepiece_models_of_others(settings: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:200]),
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        required_chars=ASCII,
        **settings,
    )
    for one in (
        SentencePieceVocabulary(model.getvalue(), {"eod": 2, "unk": 0}),
        SentencePieceVocabulary(model.getvalue(), {"eod": 2, "unk": 3, "pad": 1}, xglm=True),
    ):
        made = encoder(one)
        for text in texts[:-1]:
            assert made.encode(text, add_special_tokens=False).ids == one.encode(text), text[:80]
