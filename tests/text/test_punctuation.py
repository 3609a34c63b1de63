import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.text.punctuation import normaliser

PARALLEL = Path(__file__).resolve().parents[3] / "shared" / "data" / "parallel"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "“Hello”,\u00a0he said – it’s…", '"Hello," he said - it\'s...'),
        ("en", 'a "word". Next', 'a "word." Next'),
        ("en", 'f("a","b")', 'f("a","b")'),  # code stays code
        ("en", "print( 'x' )  ;\t100 %", "print('x'); 100%"),
        ("en", "A—B ―ＡＢＣ！", "A - B -ABC!"),
        ("en", "``quoted''", '"quoted"'),
        ("fr", "« Bonjour », dit-il : « ça va ? »", '"Bonjour", dit-il: "ça va?"'),
        ("fr", "10 000 €", "10 000 €"),
        ("de", "„Ja,“ sagte er.", '"Ja", sagte er.'),
        ("de", "Er sagte „Ja.“", 'Er sagte "Ja."'),  # at the end the full stop stays
        ("es", "dijo “sí.” Y luego", 'dijo "sí". Y luego'),
        ("cs", "řekl „ano,“ a šel", 'řekl "ano," a šel'),
        ("uk", "комп’ютер", "комп'ютер"),
        ("zh", "“你好”，世界！——……", '"你好"，世界！——……'),
        ("jpn", "「はい」\u3000と\u00ad言った。", "「はい」 と言った。"),
        ("zho_Hans", "你 好！", "你 好！"),
        ("fa", "می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_each_language_its_own(language: str, text: str, expected: str) -> None:
    assert normaliser(language)(text) == expected


MARKS = st.text(alphabet="ab1 ,.;:!?%()[]\"'`“”«»—–…’\u00a0！，/\n", max_size=30)


@settings(deadline=None)
@given(st.one_of(MARKS, st.text()), st.sampled_from(["en", "cs", "fr", "zh"]))
def test_twice_is_once_and_no_line_ends_remain(text: str, language: str) -> None:
    once = normaliser(language)(text)
    assert normaliser(language)(once) == once
    assert len(once.splitlines()) <= 1 or set(once) & set("\x1c\x1d\x1e")


def test_long_runs_take_linear_time() -> None:
    for run in ('"', ',"', " :", "( ", "«", "''", ' "x.'):
        for language in ("en", "fr", "zh"):
            normaliser(language)("a" + run * 200_000 + "b")


@pytest.mark.skipif(not PARALLEL.is_dir(), reason=f"real text: {PARALLEL} is not there")
@pytest.mark.parametrize("language", ["fr", "es", "uk", "ja", "zh"])
def test_real_text_keeps_its_letters(language: str) -> None:
    with gzip.open(PARALLEL / f"en-{language}.valid.jsonl.gz") as stream:
        for line in stream:
            for code, text in json.loads(line)["translation"].items():
                new = normaliser(code)(text)
                assert [c for c in new if c.isalnum()] == [
                    chr(ord(c) - 0xFEE0) if "！" <= c <= "～" and code not in ("ja", "zh") else c
                    for c in text
                    if c.isalnum()
                ]
