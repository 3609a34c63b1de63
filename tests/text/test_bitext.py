import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import bitext, duplicates, embedding
from xlmega.text.bitext import Selection, build_bitext
from xlmega.text.filters import Filters
from xlmega.text.parallel_sources import Opus, column_of, config_of, find_pairs
from xlmega.text.records import read_records, write_records

PARALLEL = Path(__file__).resolve().parents[3] / "shared" / "data" / "parallel"
NO_EMBEDDINGS = Selection(embedding_threshold=0)
NO_LANGUAGE_ID = Filters(identify_language=False)


def pairs_of(file: Path) -> list[tuple[str, str]]:
    return [tuple(record["translation"].values()) for _, record in read_records(file)]


def records(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"translation": {"en": first, "fr": second}} for first, second in pairs]


def sentences(count: int, word: str = "word") -> list[tuple[str, str]]:
    return [(f"{word} number {n} here", f"le {word} {n} ici") for n in range(count)]


@pytest.fixture
def corpora(tmp_path: Path) -> list[str]:
    write_records(tmp_path / "a.jsonl.gz", records([*sentences(30), ("short", "court"), *sentences(2)]))
    one, other = tmp_path / "b.en", tmp_path / "b.fr"
    pairs = [*sentences(4), *sentences(3, "other"), ("“a” b c", "« a » b c"), ('"a" b c', '"a" b c')]
    one.write_text("".join(first + "\n" for first, _ in pairs), encoding="utf-8")
    other.write_text("".join(second + "\n" for _, second in pairs), encoding="utf-8")
    return [str(tmp_path / "a.jsonl.gz"), f"{one},{other}"]


def build(corpora: list[str], output: Path, selection: Selection = NO_EMBEDDINGS, **options: Any) -> Any:
    return build_bitext(corpora, "en", "fr", output, filters=NO_LANGUAGE_ID, selection=selection, **options)


def test_the_stages_one_after_the_other(corpora: list[str], tmp_path: Path) -> None:
    statistics = build(corpora, tmp_path / "out")
    rows = {stage: of.as_json() for stage, of in statistics.items()}
    assert list(rows) == ["fetch", "filter", "merge", "select"]
    assert {name: row["kept"] for name, row in rows["fetch"].items()} == {"a": 33, "b": 9}
    assert rows["filter"]["a"]["dropped"] == {"too few words": 1}
    assert rows["merge"]["a"] | {"words": 0, "characters": 0, "utf8_bytes": 0} == {
        "read": 32, "kept": 30, "dropped": {"duplicate": 2}, "words": 0, "characters": 0, "utf8_bytes": 0,
    }  # fmt: skip
    # Punctuation is normalised before, so the two spellings of one pair are one; and four are in the first corpus.
    assert (rows["merge"]["b"]["kept"], rows["merge"]["b"]["dropped"]) == (4, {"duplicate": 5})
    found = pairs_of(tmp_path / "out" / "parallel" / "en-fr.train.jsonl.gz")
    expected = [*sentences(30), *sentences(3, "other"), ('"a" b c', '"a" b c')]
    assert found == [expected[place] for place in np.random.default_rng(13).permutation(34)]


def test_the_order_is_that_of_hugging_face(corpora: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    build(corpora, tmp_path / "out")
    merged = pairs_of(tmp_path / "out" / "stages" / "merged.jsonl.gz")
    shuffled = datasets.Dataset.from_dict({"pair": merged}).shuffle(seed=13)["pair"]
    assert pairs_of(tmp_path / "out" / "parallel" / "en-fr.train.jsonl.gz") == [tuple(pair) for pair in shuffled]


@pytest.mark.parametrize(
    ("target", "valid", "sizes"),
    [(10, 0, (10, 0)), (10, 5, (10, 5)), (0, 5, (29, 5)), (33, 5, (29, 5)), (5, 99, (0, 34))],
)
def test_target_size_and_validation(
    corpora: list[str], tmp_path: Path, target: int, valid: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    build(corpora, whole)
    every = pairs_of(whole / "parallel" / "en-fr.train.jsonl.gz")
    monkeypatch.setattr(bitext, "BUCKET_PAIRS", 7)  # several buckets
    statistics = build(
        corpora, tmp_path / "out", Selection(embedding_threshold=0, target_size=target, valid_pairs=valid)
    )
    train = pairs_of(tmp_path / "out" / "parallel" / "en-fr.train.jsonl.gz")
    assert train == every[: sizes[0]]
    if valid:
        held_out = pairs_of(tmp_path / "out" / "parallel" / "en-fr.valid.jsonl.gz")
        assert held_out == every[sizes[0] : sum(sizes)]
    dropped = sum(sum(row.dropped.values()) for row in statistics["select"].rows.values())
    assert dropped == 34 - sum(sizes)


def test_the_limit_holds_for_every_corpus(corpora: list[str], tmp_path: Path) -> None:
    statistics = build(corpora, tmp_path / "out", Selection(embedding_threshold=0, max_per_corpus=3))
    assert {name: row.read for name, row in statistics["fetch"].rows.items()} == {"a": 3, "b": 3}


def test_a_changed_setting_makes_only_what_follows_anew(corpora: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    build(corpora, output)
    with pytest.raises(ConfigError, match=r"built with other settings \(target_size: 100000 then, 5 now\)"):
        build(corpora, output, Selection(embedding_threshold=0, target_size=5))
    said: list[str] = []
    selection = Selection(embedding_threshold=0, target_size=5)
    build(corpora, output, selection, overwrite=True, say=said.append)
    assert said == [
        "fetch a: made before, kept", "fetch b: made before, kept", "filter a: made before, kept",
        "filter b: made before, kept", "merge: made before, kept",
        "select: incomplete, damaged or made from something else, so made anew",
    ]  # fmt: skip
    build(corpora[1:], output, overwrite=True)
    assert sorted(path.name for path in (output / "stages").glob("*.gz")) == [
        "fetch-b.jsonl.gz", "filter-b.jsonl.gz", "merged.jsonl.gz",
    ]  # fmt: skip


# ------------------------------------------------------------------ scores


class Scorer:
    """Alike is what ends in the same number; counts what it is asked."""

    asked = 0

    def __init__(self, model: str, batch_size: int) -> None:
        pass

    def scores(self, sources: list[str], targets: list[str]) -> list[float]:
        Scorer.asked += len(sources)
        return [0.5 + int(source.split()[-2]) % 50 / 100 for source in sources]


def test_scores_are_kept_by_pieces_and_another_threshold_scores_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "Similarity", Scorer)
    monkeypatch.setattr(bitext, "PIECE_PAIRS", 10)
    monkeypatch.setattr(Scorer, "asked", 0)
    write_records(tmp_path / "a.jsonl", records(sentences(45)))
    corpora, output = [str(tmp_path / "a.jsonl")], tmp_path / "out"
    statistics = build(corpora, output, Selection(embedding_threshold=0.75))
    assert Scorer.asked == 45
    assert statistics["select"].rows["a"].dropped == {"below the embedding threshold": 25}
    first = sorted(pairs_of(output / "parallel" / "en-fr.train.jsonl.gz"))
    assert first == sorted(sentences(45)[25:])
    # An interruption costs one piece: the others stay, and nothing is lost.
    (output / "stages" / "scored-00002.jsonl.gz.done.json").unlink()
    build(corpora, output, Selection(embedding_threshold=0.75))
    assert Scorer.asked == 55
    assert sorted(pairs_of(output / "parallel" / "en-fr.train.jsonl.gz")) == first
    build(corpora, output, Selection(embedding_threshold=0.9), overwrite=True)
    assert Scorer.asked == 55
    assert len(pairs_of(output / "parallel" / "en-fr.train.jsonl.gz")) == 5


def test_without_sentence_transformers_it_is_named_and_nothing_passes(
    corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match="need the package sentence-transformers: pip .*--embedding_threshold 0"):
        build(corpora, tmp_path / "out", Selection())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.torch
def test_a_real_model_of_sentences(tmp_path: Path) -> None:
    """A model made here and read as LaBSE would be: the same words in another order are alike, other words less so."""
    package = pytest.importorskip("sentence_transformers")
    import tokenizers
    import transformers
    from sentence_transformers.sentence_transformer import modules

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(60))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "bert"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(folder)
    transformer = modules.Transformer(str(folder))
    package.SentenceTransformer(modules=[transformer, modules.Pooling(32)]).save(str(tmp_path / "model"))
    scorer = embedding.Similarity(str(tmp_path / "model"), 2)
    same, moved, other = scorer.scores(["w1 w2 w3"] * 3, ["w1 w2 w3", "w3 w1 w2", "w50 w40 w30"])
    assert same == pytest.approx(1.0, abs=1e-5) and same >= moved > other
    write_records(tmp_path / "a.jsonl", records([("w1 w2 w3", "w1 w2 w3"), ("w1 w2 w3", "w50 w40 w30")]))
    selection = Selection(embedding_threshold=0.999, embedding_model=str(tmp_path / "model"))
    build([str(tmp_path / "a.jsonl")], tmp_path / "out", selection)
    assert pairs_of(tmp_path / "out" / "parallel" / "en-fr.train.jsonl.gz") == [("w1 w2 w3", "w1 w2 w3")]
    with pytest.raises(DataError, match=r"cannot load the sentence embeddings '.*absent'.*--embedding_threshold 0"):
        embedding.Similarity(str(tmp_path / "absent"))


# ------------------------------------------------------------------ sources


def read(where: str, scratch: Path, languages: tuple[str, str] = ("en", "fr"), **opus: Any) -> list[tuple[str, str]]:
    return list(find_pairs(where, *languages, Opus(**opus)).pairs(scratch / "scratch"))


def test_an_opus_archive_and_opustools_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "opus").mkdir()
    archive = tmp_path / "opus" / "TED_latest_moses_en-fr.txt.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("README", "no text")
        packed.writestr("TED.en-fr.en", "one\ntwo\n")
        packed.writestr("TED.en-fr.fr", "un\ndeux\n")
    assert read(str(archive), tmp_path) == [("one", "un"), ("two", "deux")]
    assert read(str(archive), tmp_path, ("fra", "eng")) == [("un", "one"), ("deux", "two")]
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(DataError, match="holds no file of 'sw': README, TED"):
        read(str(archive), tmp_path, ("en", "sw"))
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot read '.*zip'.*`unzip -t`"):
        read(str(archive), tmp_path)
    pytest.importorskip("opustools")
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("TED.en-fr.en", "one\ntwo\n")
        packed.writestr("TED.en-fr.fr", "un\ndeux\n")
    assert read("opus:TED", tmp_path, folder=tmp_path / "opus") == [("one", "un"), ("two", "deux")]
    assert read("opus:TED", tmp_path, ("fra", "eng"), folder=tmp_path / "opus") == [("un", "one"), ("deux", "two")]


def test_what_opustools_cannot_fetch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opustools = pytest.importorskip("opustools")

    class NoNetwork:
        def __init__(self, **options: Any) -> None:
            print("Unable to retrieve the data")

        def printPairs(self) -> None:
            raise FileNotFoundError("no archive")

    monkeypatch.setattr(opustools, "OpusRead", NoNetwork)
    with pytest.raises(DataError, match=r"could not fetch 'JW300' for en-sw: no archive \(Unable.*Leave this"):
        read("opus:JW300", tmp_path, ("eng", "swh"), folder=tmp_path / "opus")
    monkeypatch.setitem(sys.modules, "opustools", None)
    with pytest.raises(DataError, match="needs the package opustools: pip install opustools"):
        read("opus:JW300", tmp_path, folder=tmp_path / "opus")


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"swh_Latn": "habari", "eng_Latn": "news"}, {"swh_Latn": None, "eng_Latn": "x"}]
    datasets.Dataset.from_dict({"translation": rows}).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved"), tmp_path, ("eng", "swh")) == [("news", "habari"), ("x", "")]
    assert read(str(tmp_path / "saved"), tmp_path, ("en", "sw")) == [("news", "habari"), ("x", "")]
    write_records(tmp_path / "hub" / "train.jsonl", records([("a", "b")]))
    assert read(f"hf:{tmp_path / 'hub'}", tmp_path) == [("a", "b")]
    datasets.Dataset.from_dict({"en": ["a"], "fr": ["b"]}).to_parquet(tmp_path / "columns.parquet")
    assert read(str(tmp_path / "columns.parquet"), tmp_path) == [("a", "b")]
    with pytest.raises(DataError, match="no text of 'de'. It would be under one of de, deu .*there is en, fr"):
        read(str(tmp_path / "columns.parquet"), tmp_path, ("en", "de"))


@pytest.mark.parametrize(
    ("known", "config"),
    [
        (["eng_Latn-swh_Latn", "ace_Latn-eng_Latn"], "eng_Latn-swh_Latn"),
        (["swh_Latn-eng_Latn"], "swh_Latn-eng_Latn"),
        (["en-sw", "sw-fr"], "en-sw"),
        (["eng_Latn-sw"], "eng_Latn-sw"),
        (["eng-swa"], "eng-swa"),
        (["default"], None),
        ([], None),
    ],
)
def test_configurations_are_found_by_any_code(known: list[str], config: str | None) -> None:
    assert config_of(known, "eng", "swh", "x") == config


def test_no_configuration_is_an_error_and_columns_prefer_the_exact_code() -> None:
    with pytest.raises(DataError, match="'x' has no configuration of 'eng' and 'swh'. It has: en-fr, de-fr"):
        config_of(["en-fr", "de-fr"], "eng", "swh", "x")
    columns = ["zho_Hans", "zho_Hant", "zh"]
    assert [column_of(columns, code) for code in ("zho_Hant", "zho", "zh", "en")] == [
        "zho_Hant",
        "zho_Hans",
        "zh",
        None,
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "absent.en,absent.fr", r"cannot read 'absent\.en'"),
        (lambda folder: str(folder), "is no corpus of pairs. Give FILE_A,FILE_B"),
        (lambda folder: "hf:", "is no corpus of pairs"),
        (
            lambda folder: bad(folder, '{"translation": {"en": 3, "fr": ""}}'),
            "'en' is a number, not a string",
        ),
        (lambda folder: bad(folder, '{"en": "\\ud800", "fr": ""}'), "pair 1: half of a surrogate pair"),
        (
            lambda folder: bad(folder, '{"en": "x y z", "fr": "a"}'),
            "no pair passed .*\n  bad: 1 too few words",
        ),
    ],
)
def test_refusals(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build([make(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bad(folder: Path, line: str) -> str:
    (folder / "bad.jsonl").write_text(line)
    return str(folder / "bad.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embedding_threshold": float("nan")}, "embedding_threshold must be from 0 to 1, but is nan"),
        ({"embedding_threshold": 1.5}, "but is 1.5"),
        ({"target_size": -1}, "target_size must not be negative"),
        ({"embedding_batch_size": 0}, "embedding_batch_size must be at least 1"),
    ],
)
def test_selections_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Selection(**values)


def test_names_and_languages_differ(corpora: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corpora of different names, not a, a"):
        build([corpora[0], corpora[0]], tmp_path / "out")
    with pytest.raises(ConfigError, match="two languages are needed, but both are 'en'"):
        build_bitext(corpora, "en", "en", tmp_path / "out")


# -------------------------------------------------------------- duplicates


@pytest.mark.parametrize("count", [0, 1, 500])
def test_the_first_of_equal_ones_is_found(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BUFFERED_BYTES", 48)
    texts = [str(n) for n in np.random.default_rng(0).integers(0, 200, count)]
    first = duplicates.first_occurrences(map(duplicates.digest, texts), tmp_path / "scratch")
    assert first.tolist() == [text not in texts[:place] for place, text in enumerate(texts)]
    assert not (tmp_path / "scratch").exists()


def test_a_digest_knows_where_one_text_ends() -> None:
    assert len(duplicates.digest("a", "b")) == 16
    assert len({duplicates.digest(*texts) for texts in (("ab", ""), ("a", "b"), ("", "ab"), ("ab",), ("b", "a"))}) == 5


@pytest.mark.skipif(not PARALLEL.is_dir(), reason=f"real text: {PARALLEL} is not there")
def test_real_text(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    selection = Selection(embedding_threshold=0, target_size=500, valid_pairs=50, max_per_corpus=700)
    statistics = build_bitext(
        [str(PARALLEL / "en-ja.valid.jsonl.gz")], "en", "ja", tmp_path / "out", selection=selection
    )
    assert statistics["fetch"].rows["en-ja"].read == 700
    kept = statistics["filter"].rows["en-ja"]
    assert 0.9 < kept.kept / kept.read < 1
    assert set(kept.dropped) <= {"too few words", "too many words", "not in en", "not in ja", "ratio of lengths"}
    assert len(pairs_of(tmp_path / "out" / "parallel" / "en-ja.train.jsonl.gz")) == 500
    told = json.loads((tmp_path / "out" / "corpus.json").read_text(encoding="utf-8"))
    assert told["stages"]["select"]["en-ja"]["kept"] == 550
