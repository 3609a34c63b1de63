import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError
from xlmega.text import corpus, synthetic


def content(folder: Path) -> str:
    """sha256 over the names and the uncompressed bytes (zlib's own bytes differ between its versions)."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        if file.suffix == ".gz":
            for _, record in corpus.read_records(file):
                digest.update(json.dumps(record).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def test_golden_bytes(tmp_path: Path) -> None:
    languages = tuple(synthetic.GRAMMARS)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthetic.make_corpus(tmp_path / name, seed=seed, languages=languages, megabytes=0.05, parallel_pairs=20)
    assert content(tmp_path / "a") == "5c89ee7901b314c47cb3dd03392f3895727aac39ba3958784087b4b56f8099db"
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert content(tmp_path / "c") != content(tmp_path / "a")


def test_sizes_follow_the_shares_and_documents_differ(made_corpus: Path) -> None:
    sizes: Counter[str] = Counter()
    ids, texts = set(), set()
    for split in ("train", "valid"):
        for document in corpus.read_corpus(made_corpus / split):
            sizes[f"{split} {document.language}"] += len(document.text.encode())
            ids.add(document.id)
            texts.add(document.text)
    for language, share in zip(synthetic.LANGUAGES, synthetic.SHARES, strict=True):
        assert sizes[f"train {language}"] == pytest.approx(400_000 * share / 16, rel=0.1)
    assert len(ids) == len(texts) == sum(1 for s in ("train", "valid") for _ in corpus.read_corpus(made_corpus / s))


def test_one_meaning_in_several_languages() -> None:
    world = synthetic.make_world(0)
    meaning = synthetic.Meaning(
        subject=synthetic.Thing("noun.003", plural=True, adjective="adjective.002"),
        verb="verb.001",
        object=synthetic.Thing("noun.100", plural=False, adjective=None),
        place="place.004",
        adverb=None,
        past=True,
        negated=True,
    )
    said = {code: synthetic.Speaker(code, world, 0) for code in ("qla", "qlb", "qgr", "qhn")}
    for code, speaker in said.items():
        words, sentence = speaker.words, speaker.say(meaning)
        places = [sentence.find(words[sense]) for sense in ("noun.003", "verb.001", "noun.100")]
        assert min(places) >= 0, (code, sentence)
        s, v, o = places
        assert {"SVO": s < v < o, "SOV": s < o < v, "VSO": v < s < o}[synthetic.GRAMMARS[code].order]
        assert sentence.endswith(synthetic.GRAMMARS[code].stop)
        assert (" " in sentence) == synthetic.GRAMMARS[code].spaced


def test_parallel_sentences_and_lexicon_agree(made_corpus: Path) -> None:
    lexicon = json.loads((made_corpus / "lexicon.json").read_text())
    files = sorted((made_corpus / "parallel").glob("*.train.jsonl.gz"))
    assert [file.name.split(".")[0] for file in files] == ["qla-qcy", "qla-qgr", "qla-qhn", "qla-qlb"]
    for file in files:
        records = [record for _, record in corpus.read_records(file)]
        assert len(records) == 200
        for record in records:
            for code, sentence in record["translation"].items():
                words = lexicon["languages"][code]["words"]
                for sense in (record["meaning"]["verb"], record["meaning"]["subject"]["noun"]):
                    assert any(sense in senses and word in sentence for word, senses in words.items())


def test_lexica_have_cognates_ambiguity_and_every_sense(made_corpus: Path) -> None:
    lexicon = json.loads((made_corpus / "lexicon.json").read_text())
    for code, language in lexicon["languages"].items():
        said = Counter(sense for senses in language["words"].values() for sense in senses)
        assert set(said) == set(lexicon["senses"]) and set(said.values()) == {1}
        assert 5 <= len(language["ambiguous"]) <= 150, code
        share = len(language["cognates"]) / len(said)
        assert share == pytest.approx(synthetic.GRAMMARS[code].kin_share, abs=0.08), code


def test_sequences_are_predictable(made_corpus: Path) -> None:
    """A bigram of words beats a unigram by more than half a bit: there is grammar to learn."""
    text = " ".join(d.text for d in corpus.read_corpus(made_corpus / "train") if d.language == "qla").split()
    names, ids = np.unique(text, return_inverse=True)
    held = len(ids) * 9 // 10
    unigram = np.bincount(ids[:held], minlength=len(names)) + 0.5
    unigram /= unigram.sum()
    pairs = Counter(zip(ids[: held - 1].tolist(), ids[1:held].tolist(), strict=True))
    firsts = np.bincount(ids[: held - 1], minlength=len(names))
    bigram = [
        (pairs[(a, b)] + 5.0 * unigram[b]) / (firsts[a] + 5.0)
        for a, b in zip(ids[held:-1].tolist(), ids[held + 1 :].tolist(), strict=True)
    ]
    assert -np.log2(bigram).mean() < -np.log2(unigram[ids[held + 1 :]]).mean() - 0.5


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'qia' is not a made language. Did you mean 'qla'"):
        synthetic.make_corpus(tmp_path / "x", languages=("qia",))
    with pytest.raises(ConfigError, match="one or more different codes, but are none"):
        synthetic.make_corpus(tmp_path / "x", languages=())
    with pytest.raises(ConfigError, match="2 languages need as many shares"):
        synthetic.make_corpus(tmp_path / "x", languages=("qla", "qgr"), shares=(1.0,))
    with pytest.raises(ConfigError, match="megabytes must be above 0"):
        synthetic.make_corpus(tmp_path / "x", megabytes=0)
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="exists.*--overwrite"):
        synthetic.make_corpus(tmp_path / "x")
    with pytest.raises(ConfigError, match="it is no made corpus and is not removed"):
        synthetic.make_corpus(tmp_path / "x", overwrite=True)
