import io

import pytest

from xlmega.text import tally
from xlmega.text.tally import Statistics, count_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("three short words.", 3),
        ("à la carte", 3),
        ("- ! ?", 3),  # as any split would
        ("日本語", 2),  # 1.8
        ("本", 1),
        ("ドキュメント", 2),  # 1.8
        ("Python のドキュメントです。", 4),  # 1 and 9 kana, 2.7
        ("你好，世界！", 3),  # 2.4; its punctuation is no word
        ("ภาษาไทยง่าย", 3),  # 11 characters, 2.75
        ("བོད་སྐད", 2),
        ("한국어 문서", 2),
    ],
)
def test_words_of_any_script(text: str, words: int) -> None:
    assert count_words(text) == words


def test_statistics_count_add_and_come_back() -> None:
    one, other = Statistics(), Statistics()
    assert one.keep("fr", "été", "a b") == 8
    one.drop("fr", "blank")
    other.drop("fr", "blank", 2)
    other.keep("de", "x")
    one.add(other)
    assert one.as_json() == {
        "de": {"read": 1, "kept": 1, "dropped": {}, "characters": 1, "words": 1, "utf8_bytes": 1},
        "fr": {"read": 4, "kept": 1, "dropped": {"blank": 3}, "characters": 6, "words": 3, "utf8_bytes": 8},
    }
    assert Statistics.from_json(one.as_json()).as_json() == one.as_json()
    assert tally.table({"train": one}).splitlines() == [
        "stage  of         read  kept  words  characters    MB",
        "train  de            1     1      1           1  0.00",
        "train  fr            4     1      3           6  0.00",
        "         - blank     3",
    ]


def test_progress_speaks_seldom_and_knows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(tally, "monotonic", lambda: now)
    said: list[str] = []
    progress = tally.Progress(said.append, "x", "pairs", total=1024)
    for _ in range(512):
        now += 0.02
        progress.step(100)
    assert said == [
        "x: 256 pairs, 0 MB, 0.0 MB/s, 25 %, 15 s left",
        "x: 512 pairs, 0 MB, 0.0 MB/s, 50 %, 10 s left",
    ]


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(tally, "monotonic", lambda: now)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in (
        (
            Terminal(),
            "begun\n\r\x1b[K[############............] x: 1 files, 3 MB, 1.0 MB/s, 50 %, 3 s left\r\x1b[Kdone\n",
        ),
        (io.StringIO(), "begun\ndone\n"),
    ):
        say = tally.Console(stream)
        say("begun")
        progress = tally.Progress(say, "x", "files", total=2)
        now += 3.0
        progress.step(3_000_000)
        say("done")
        say.close()  # nothing is drawn now, so it adds nothing
        assert stream.getvalue() == expected
