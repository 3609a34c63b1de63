"""Senses told by tokens, compared across languages and with people, measured in use, and steered."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backpack_reference import reference_parts, reference_senses
from drawn import Held
from one_rank import uneven_weights

from xlmega.analysis import sense_reports, senses
from xlmega.analysis.sense_reports import Wishes, read_table
from xlmega.analysis.senses import SenseBook
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.models.config import model_config
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.weights.directory import write_logical

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def source() -> Held:
    """A tiny nanoBackpack over the vocabulary of the made corpus."""
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "vocab_size": 803}
    config = model_config(preset="nano_backpack_mini_4", max_positions=32, init_std=0.15, **sizes)
    return Held(config, uneven_weights(config))


@pytest.fixture(scope="module")
def vocabulary(made_vocabulary: Path) -> Vocabulary:
    return load_vocabulary(made_vocabulary)


@pytest.fixture(scope="module")
def book(vocabulary: Vocabulary) -> SenseBook:
    return SenseBook(source(), vocabulary)


@pytest.fixture(scope="module")
def words(made_corpus: Path) -> list[tuple[str, str]]:
    """Translations: (word, word)."""
    languages = json.loads((made_corpus / "lexicon.json").read_text())["languages"]
    first, second = sorted(languages)[:2]
    by_sense = {of[0]: word for word, of in languages[second]["words"].items()}
    return [(word, by_sense[of[0]]) for word, of in languages[first]["words"].items() if of[0] in by_sense][:5]


def test_a_word_is_the_mean_of_its_sub_words(book: SenseBook, words: list[tuple[str, str]]) -> None:
    word = next(word for pair in words for word in pair if len(book.ids_of(word)) > 1)
    ids = book.ids_of(word)
    assert book.vocabulary.decode(ids).strip() == word
    each = reference_senses(source().config, source().tensors, torch.tensor([ids]))[0]  # [K, sub-words, D]
    torch.testing.assert_close(book.senses_of(word), each.mean(1), rtol=1e-5, atol=1e-5)


def test_top_tokens_are_those_with_the_largest_logits(book: SenseBook, words: list[tuple[str, str]]) -> None:
    size = book.vocabulary.size
    counts = {"aa": np.zeros(size, np.int64), "bb": np.zeros(size, np.int64)}
    counts["aa"][300:320] = 5  # ids 310 to 319 are of both
    counts["bb"][310:330] = 5
    masks = senses.token_languages(counts)
    assert masks["aa"].nonzero()[0].tolist() == list(range(300, 320))
    found = senses.top_tokens(book, words[0][0], "aa", masks, count=3)
    logits = book.senses_of(words[0][0]) @ book.words_VD.T
    for k, by_language in enumerate(found.senses):
        best = 310 + logits[k, 310:330].argsort(descending=True)[:3]
        due = [(book.vocabulary.text_of(id).decode(errors="replace"), logits[k, id].item()) for id in best.tolist()]
        assert [text for text, _ in by_language["bb"]] == [text for text, _ in due]
        assert [value for _, value in by_language["bb"]] == pytest.approx([value for _, value in due], abs=1e-4)


def test_tokens_of_languages_by_rates_not_counts() -> None:
    counts = {"big": np.array([9000, 900, 100, 0]), "small": np.array([0, 10, 40, 0])}
    masks = senses.token_languages(counts)
    assert masks["big"].tolist() == [True, False, False, False]  # 0.09 against 0.2; 0.01 against 0.8
    assert masks["small"].tolist() == [False, True, True, False]


def test_distribution_is_the_mean_cosine(book: SenseBook, words: list[tuple[str, str]]) -> None:
    matrix = senses.sense_distribution(book, words)
    due = np.mean(
        [
            [[F.cosine_similarity(a, b, dim=0).item() for b in book.senses_of(two)] for a in book.senses_of(one)]
            for one, two in words
        ],
        axis=0,
    )
    np.testing.assert_allclose(matrix, due, atol=1e-5)
    with pytest.raises(DataError, match="no pairs"):
        senses.sense_distribution(book, [])


def test_ranks_and_correlations_by_eye(book: SenseBook, words: list[tuple[str, str]]) -> None:
    assert senses.ranks(np.array([10.0, 30.0, 20.0, 20.0])).tolist() == [1.0, 4.0, 2.5, 2.5]
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert senses.correlation(senses.ranks(a**3), senses.ranks(a)) == pytest.approx(1.0)
    assert senses.correlation(a**3, a) == pytest.approx(0.9514, abs=1e-4)  # Pearson's is another
    assert np.isnan(senses.correlation(a, np.ones(4)))
    rows = [(one, two, float(k)) for k, (one, two) in enumerate(words)]
    found = senses.lexical_similarity(book, rows)
    cosines = [F.cosine_similarity(book.senses_of(one)[2], book.senses_of(two)[2], dim=0).item() for one, two in words]
    expected = np.corrcoef(np.argsort(np.argsort(cosines)), np.arange(len(words)))[0, 1]
    assert found.spearman["sense 2"] == pytest.approx(expected, abs=1e-6) and set(found.spearman) == set(found.pearson)
    with pytest.raises(DataError, match="3 pairs"):
        senses.lexical_similarity(book, rows[:2])
    with pytest.raises(DataError, match="scores that differ, but all 5 are 2"):
        senses.lexical_similarity(book, [(one, two, 2.0) for one, two in words])


def test_usage_is_of_the_reference(book: SenseBook) -> None:
    ids = torch.randint(book.vocabulary.size, (13,), generator=torch.Generator().manual_seed(2))
    found = senses.usage(book, [ids[:13].numpy()])
    parts = reference_parts(source().config, source().tensors, ids[None, :-1])
    each = (parts.alpha @ parts.senses)[0]  # [K, L, D]
    words = source().tensors["embedding.word_embeddings.weight"]

    def loss(mix: torch.Tensor) -> float:
        return F.cross_entropy(mix @ words.T, ids[1:]).item()

    share = each.norm(dim=-1) / each.norm(dim=-1).sum(0)
    largest = torch.stack([each[share[:, i].argmax(), i] for i in range(12)])
    levelled = (parts.alpha @ parts.senses.mean(1, keepdim=True))[0].sum(0)
    assert found.tokens == 12 and found.loss == pytest.approx(loss(parts.hidden[0]), abs=1e-4)
    assert found.loss_largest_sense == pytest.approx(loss(largest), abs=1e-4)
    assert found.loss_levelled == pytest.approx(loss(levelled), abs=1e-4)
    assert found.loss_without[1] == pytest.approx(loss(each.sum(0) - each[1]), abs=1e-4)
    assert found.entropy == pytest.approx((-(share * share.log()).sum(0).mean() / np.log(4)).item(), abs=1e-5)
    unit = F.normalize(parts.senses[0], dim=-1)
    cosines = [(unit[a] * unit[b]).sum(-1).mean().item() for a in range(4) for b in range(4) if a != b]
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert len(found.describe()) == 3


def test_steering_multiplies_senses(book: SenseBook, words: list[tuple[str, str]]) -> None:
    word = words[0][0]
    factors = senses.steering_factors(book, [(word, 1, 0.0), (word, 1, 2.0), (word, 3, 3.0)])
    assert factors[book.ids_of(word)[0]].tolist() == [1.0, 0.0, 1.0, 3.0] and (factors != 1).any(1).sum() >= 1
    plain = senses.next_tokens(book, word)
    assert senses.next_tokens(book, word, torch.ones_like(factors)) == plain
    assert senses.next_tokens(book, word, factors) != plain
    for wish, says in (
        ((word, 4, 1.0), "senses 0 to 3, not 4"),
        ((word, 0, float("nan")), "finite"),
        ((word, 0, 1e300), "take smaller"),
    ):
        with pytest.raises(DataError, match=says):
            senses.steering_factors(book, [wish])


def test_weights_that_are_no_numbers_are_refused(vocabulary: Vocabulary, words: list[tuple[str, str]]) -> None:
    tensors = {**source().tensors, "senses.output.weight": torch.full((128, 128), float("nan"))}
    damaged = Held(source().config, tensors)
    with pytest.raises(CheckpointError, match=r"'senses\.output\.weight' has values that are not finite"):
        senses.sense_distribution(SenseBook(damaged, vocabulary), words)


def test_a_model_without_senses_is_refused(vocabulary: Vocabulary) -> None:
    other = Held(model_config(preset="nano_gpt_mini", vocab_size=803), {})
    with pytest.raises(ConfigError, match="has no senses: its family is 'gpt'"):
        SenseBook(other, vocabulary)


def test_the_tool_writes_tables_and_pictures(
    made_tokens: Path, made_vocabulary: Path, words: list[tuple[str, str]], tmp_path: Path
) -> None:
    write_logical(source(), tmp_path / "model", vocabulary_folder=made_vocabulary, dtype="float32", overwrite=False)
    lists = {
        "words": "".join(f"aa\t{word}\n" for pair in words for word in pair),
        "pairs": "".join(f"{one}\t{two}\n" for one, two in words),
        "similarity": "# scores\n" + "".join(f"{one}\t{two}\t{k}\n" for k, (one, two) in enumerate(words)),
        "steer": f"{words[0][0]}\t0\t0.0\n",
    }
    line: list[str] = []
    for name, text in lists.items():
        (tmp_path / f"{name}.tsv").write_text(text)
        line += [f"--{name}", str(tmp_path / f"{name}.tsv")]
    line += ["--tokens", str(made_tokens), "--split", "train", "--usage_windows", "1", "--prompt", words[0][0]]
    command = [sys.executable, str(ROOT / "tools/inspect_senses.py"), str(tmp_path / "model"), *line]
    told = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1].startswith(f"wrote {tmp_path / 'out'}: words.txt")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("words.txt", "words.html", "words.png", "distribution.tsv", "distribution.png"),
        *("similarity.tsv", "usage.txt", "steering.txt"),
    }
    for picture in ("words.png", "distribution.png"):
        assert (tmp_path / "out" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.loadtxt(tmp_path / "out" / "distribution.tsv").shape == (4, 4)
    assert "sense 3" in (tmp_path / "out" / "words.txt").read_text()


def test_html_shows_text_as_text() -> None:
    found = senses.WordSenses("<b>", "en", ({"": (("&amp", 1.0), ("\x00", 0.5))},))
    page = sense_reports.words_as_html([found])
    assert "&lt;b&gt;" in page and "&amp;amp" in page and "<b>" not in page and "\x00" not in page


def test_lists_are_checked(tmp_path: Path, book: SenseBook) -> None:
    path = tmp_path / "list.tsv"
    for text, says in (("a\tb\tc\n", "2 columns"), ("a\t\n", "2 columns"), ("# only\n", "no rows")):
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            read_table(path, 2)
    path.write_text("a\tb\tnan\n")
    with pytest.raises(DataError, match="1 number at the end"):
        read_table(path, 3, numbers=1)
    with pytest.raises(DataError, match=r"cannot read '.*none\.tsv'"):
        read_table(tmp_path / "none.tsv", 2)
    path.write_bytes("\ufeff# from a spreadsheet\r\na\tb\u2028c\r\n".encode())
    assert read_table(path, 2) == [("a", "b\u2028c")]
    with pytest.raises(ConfigError, match="nothing to look at"):
        sense_reports.inspect(book, Wishes(), tmp_path / "out")
    with pytest.raises(ConfigError, match="give a prompt"):
        sense_reports.inspect(book, Wishes(words=(("aa", "a"),), steer=(("a", 0, 1.0),)), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        sense_reports.inspect(book, Wishes(words=(("aa", "a"),)), tmp_path / "full")
    with pytest.raises(ConfigError, match="give a token folder"):
        sense_reports.inspect(book, Wishes(usage_windows=2), tmp_path / "out")
    with pytest.raises(ConfigError, match="words and usage windows alone"):
        sense_reports.inspect(book, Wishes(prompt="a", tokens=tmp_path), tmp_path / "out")
    (tmp_path / "full" / "words.txt").touch()  # a name that others use as well
    with pytest.raises(CheckpointError, match="has file, which this command did not write"):
        sense_reports.inspect(book, Wishes(words=(("aa", "a"),)), tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "file").is_file()
