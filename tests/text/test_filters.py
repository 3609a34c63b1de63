import sys
from typing import Any

import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import filters, languages
from xlmega.text.filters import Filters, Sieve

PLAIN = {"normalise_punctuation": False, "identify_language": False}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("one two three", "un deux trois", ""),
        ("one two", "un deux trois", filters.SHORT),
        ("one two three", " \t", filters.BLANK),
        ("one two three four five six", "un deux trois quatre cinq six sept", filters.LONG),
        ("a b c d e f", "un deux trois", ""),  # ratio 2
        ("a b c d e f", "un deux trois,", filters.MANY_CHARACTERS),
        ("abc def ghi", "a b c", filters.FEW_CHARACTERS),
    ],
)
def test_each_reason(source: str, target: str, reason: str) -> None:
    sieve = Sieve(Filters(max_words=6, min_characters=6, max_characters=13, **PLAIN), "en", "fr")
    assert sieve.judge(source, target) == (source, target, reason)


@pytest.mark.parametrize(
    ("words", "other", "passes"), [(9, 20, True), (20, 9, True), (9, 21, False), (21, 9, False), (10, 20, True)]
)
def test_the_ratio_holds_either_way_round(words: int, other: int, passes: bool) -> None:
    sieve = Sieve(Filters(**PLAIN), "en", "fr")
    reason = sieve.judge("w " * words, "w " * other)[2]
    assert (reason == "") is passes and (passes or reason == filters.RATIO)


def test_a_language_without_spaces_has_words() -> None:
    sieve = Sieve(Filters(**PLAIN), "en", "ja")
    assert sieve.judge("The C structure used for cell objects.", "セルオブジェクトに使われる C 構造体です。")[2] == ""
    assert sieve.judge("The C structure used for cell objects.", "はい")[2] == filters.SHORT
    assert sieve.judge("Yes, that is so.", "セルオブジェクトに使われる C 構造体です。" * 3)[2] == filters.RATIO


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_words": 0}, "min_words must be from 1 to max_words, but they are 0 and 256"),
        ({"min_words": 9, "max_words": 8}, "but they are 9 and 8"),
        ({"min_ratio": float("nan")}, "min_ratio must be above 0 and at most max_ratio"),
        ({"max_ratio": float("inf")}, "min_ratio must be above 0"),
        ({"min_ratio": -1.0}, "min_ratio must be above 0"),
        ({"max_characters": -1}, r"max_characters \(0: any number\), but they are 1 and -1"),
        ({"min_characters": 5, "max_characters": 4}, "but they are 5 and 4"),
    ],
)
def test_limits_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Filters(**values)


def test_languages_are_told_apart_under_any_of_their_codes() -> None:
    pytest.importorskip("py3langid")
    english, swahili = "The weather in this town is very good today.", "Hali ya hewa katika mji huu ni nzuri sana leo."
    for source, target in (("en", "sw"), ("eng", "swh"), ("eng_Latn", "swh_Latn"), ("eng", "swa")):
        sieve = Sieve(Filters(), source, target)
        assert sieve.judge(english, swahili)[2] == ""
        assert sieve.judge(swahili, swahili)[2] == f"not in {source}"
        assert sieve.judge(english, english)[2] == f"not in {target}"


def test_a_language_that_is_not_known_is_refused_and_never_passed() -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ConfigError, match=r"py3langid does not know 'xyz' among its \d+ .* --skip_language_id"):
        Sieve(Filters(), "eng", "xyz")
    with pytest.raises(ConfigError, match="'en' and 'eng' are one language, 'en', to language identification"):
        Sieve(Filters(), "en", "eng")
    assert Sieve(Filters(identify_language=False), "eng", "xyz").judge("a b c", "d e f")[2] == ""


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(DataError, match="needs the package py3langid: pip install py3langid; or add"):
        Sieve(Filters(), "en", "fr")


def test_codes() -> None:
    assert languages.names_of("swh_Latn")[:3] == ("swh_Latn", "swh", "sw")
    assert set(languages.names_of("sw")) == {"sw", "swa", "swh"}
    assert languages.two_letters("ekk") == languages.two_letters("est") == "et"
    assert languages.two_letters("iw") == "he" and languages.two_letters("kab") == "kab"
    assert "no" in languages.names_of("nob") and languages.names_of("qla") == ("qla",)
    assert len(languages.TWO_LETTERS) > 200
    for three, two in languages.TWO_LETTERS.items():
        assert len(three) == 3 and len(two) == 2
