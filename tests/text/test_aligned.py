import math
from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import aligned, corpus
from xlmega.text.aligned import Pair, split_aligned, split_of_lines
from xlmega.text.records import read_records

SPLITS = ("train", "valid", "test")


def write(folder: Path, count: int) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    files = folder / "ep.en", folder / "ep.fr"
    for file in files:
        file.write_text("".join(f"{file.suffix[1:]} {n}\n" for n in range(1, count + 1)), encoding="utf-8")
    return files


def pairs_of(file: Path) -> list[tuple[str, str]]:
    return [tuple(record["translation"].values()) for _, record in read_records(file)]


@pytest.mark.parametrize(("lines", "held_out", "valid"), [(0, 0, 0), (1, 1, 1), (250, 3, 2), (200_001, 2001, 1001)])
def test_sizes_of_the_splits(lines: int, held_out: int, valid: int) -> None:
    counts = np.bincount(split_of_lines(lines, 2357), minlength=3).tolist()
    assert counts == [lines - held_out, valid, held_out - valid]


def test_the_lines_are_those_that_hugging_face_holds_out() -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"n": range(1230)}).train_test_split(test_size=0.01, seed=2357)
    held_out = whole["test"].train_test_split(test_size=0.5, seed=2357)
    splits = split_of_lines(1230, 2357)
    assert set(whole["train"]["n"]) == set(np.flatnonzero(splits == 0))
    assert set(held_out["test"]["n"]) == set(np.flatnonzero(splits == 1))
    assert set(held_out["train"]["n"]) == set(np.flatnonzero(splits == 2))


def test_a_shard_of_ten_million_lines_holds_out_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "UNSHUFFLED_LINES", 1000)
    splits = split_of_lines(1000, 2357)
    assert not splits[:990].any() and splits[990:].all()
    assert split_of_lines(999, 2357)[:989].any()


def test_pairs_and_both_languages_are_the_same_lines(tmp_path: Path) -> None:
    files = write(tmp_path / "in", 1000)
    statistics = split_aligned([aligned.europarl(*files)], ("en", "fr"), tmp_path / "out")
    out = tmp_path / "out"
    seen: list[int] = []
    for split, count in zip(SPLITS, (990, 5, 5), strict=True):
        pairs = pairs_of(out / "parallel" / f"en-fr.europarl.{split}.jsonl.gz")
        assert len(pairs) == count == statistics["europarl"].rows[split].kept
        assert all(first.removeprefix("en ") == second.removeprefix("fr ") for first, second in pairs)
        for side, code in enumerate(("en", "fr")):
            documents = list(corpus.read_documents(out / split / code / "europarl.jsonl.gz"))
            assert [line for doc in documents for line in doc.text.split("\n")] == [pair[side] for pair in pairs]
            assert len(documents) == math.ceil(count / 100)
        seen += [int(first.split()[1]) for first, _ in pairs]
    assert sorted(seen) == list(range(1, 1001))
    first = next(corpus.read_documents(out / "train" / "en" / "europarl.jsonl.gz"))
    assert first.id.startswith("europarl:1-10") and first.text.startswith("en 1\nen 2\n")


def test_multiun_is_its_first_lines_in_shards(tmp_path: Path) -> None:
    assert vars(aligned.multiun(Path("a"), Path("b"))) == {
        "name": "multiun", "first": Path("a"), "second": Path("b"),
        "max_lines": 4 * 2_007_723, "lines_per_shard": 2_007_723,
    }  # fmt: skip
    pair = Pair("multiun", *write(tmp_path / "in", 1000), max_lines=400, lines_per_shard=200)
    statistics = split_aligned([pair], ("en", "fr"), tmp_path / "out")
    rows = statistics["multiun"].rows
    assert [rows[split].kept for split in SPLITS] == [396, 2, 2]
    assert rows["unused"].dropped == {"beyond the first 400 lines": 600}
    held_out = {int(first.split()[1]) for first, _ in pairs_of(tmp_path / "out/parallel/en-fr.multiun.valid.jsonl.gz")}
    assert len({n for n in held_out if n <= 200}) == 1
    assert max(held_out) - 200 == min(held_out)  # the same place in each shard, as there


def test_odd_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffone\r\n\ntwo\u2028half\nlast".encode())
    (tmp_path / "b").write_bytes(b"un\n \n\nfin\n")
    split_aligned([Pair("x", tmp_path / "a", tmp_path / "b")], ("en", "fr"), tmp_path / "out")
    kept = [pair for split in SPLITS for pair in pairs_of(tmp_path / "out" / "parallel" / f"en-fr.x.{split}.jsonl.gz")]
    assert sorted(kept) == [("last", "fin"), ("one", "un")]


def test_refusals(tmp_path: Path) -> None:
    first, second = write(tmp_path, 10)
    with second.open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DataError, match=r"'.*ep\.en' has 10 lines, but '.*ep\.fr' has more: line n"):
        split_aligned([Pair("x", first, second)], ("en", "fr"), tmp_path / "out")
    second.write_bytes(b"caf\xe9\n" * 10)
    with pytest.raises(DataError, match=r"ep\.fr:1: not UTF-8 \(byte 3"):
        split_aligned([Pair("x", first, second)], ("en", "fr"), tmp_path / "out")
    second.write_bytes("x\n".encode("utf-16-le") * 10)
    with pytest.raises(DataError, match=r"ep\.fr:1: a NUL byte\. Is this UTF-16"):
        split_aligned([Pair("x", first, second)], ("en", "fr"), tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read '.*absent'"):
        split_aligned([Pair("x", first, tmp_path / "absent")], ("en", "fr"), tmp_path / "out")
    with pytest.raises(DataError, match=r"ep\.en' was given for both languages"):
        split_aligned([Pair("x", first, first)], ("en", "fr"), tmp_path / "out")
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    with pytest.raises(DataError, match="hold no lines"):
        split_aligned([Pair("x", tmp_path / "a", tmp_path / "b")], ("en", "fr"), tmp_path / "empty")
    with pytest.raises(ConfigError, match="two languages are needed, but both are 'en'"):
        split_aligned([Pair("x", first, second)], ("en", "en"), tmp_path / "out")
    with pytest.raises(ConfigError, match="corpora of different names, not x, x"):
        split_aligned([Pair("x", first, second)] * 2, ("en", "fr"), tmp_path / "out")
