"""What went into a stage and what came out: counted while it is made, kept beside it, shown as a table.

A row is a language or a corpus. All units are in the names: `read`, `kept` and the reasons for dropping count documents
or pairs; `words` are those of `count_words`, and characters are code points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TextIO

PROGRESS_SECONDS = 5.0
REDRAW_SECONDS = 0.2
BAR_WIDTH = 24

# Characters of the scripts that put no space between words.
SCRIPTS = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff",
)
HAN, KANA, SOUTH_EAST = (re.compile(f"[{ranges}]+") for ranges in SCRIPTS)
UNSPACED = re.compile(f"[{''.join(SCRIPTS)}]+")
TIBETAN_STOP = "\u0f0b"
TIBETAN_STOPS = str.maketrans({TIBETAN_STOP: " ", "\u0f0d": " "})


def count_words(text: str) -> int:
    """Words between spaces, and for scripts without spaces as many words as their characters stand for.

    A Han character counts 0.6, a kana 0.3, one of Thai, Lao, Burmese or Khmer (vowel signs included) 0.25, the sum
    rounded up; a Tibetan syllable counts 1. The first two make a Chinese or Japanese sentence about as long as its
    English translation (median ratio 1.0 and 1.1 on the Python documentation), so that one ratio serves every pair.
    """
    if text.isascii():
        return len(text.split())
    if TIBETAN_STOP in text:
        text = text.translate(TIBETAN_STOPS)
    if not UNSPACED.search(text):
        return len(text.split())
    han, kana, south_east = (sum(map(len, script.findall(text))) for script in (HAN, KANA, SOUTH_EAST))
    # Punctuation left alone between characters of such a script is no word.
    words = sum(any(map(str.isalnum, word)) for word in UNSPACED.sub(" ", text).split())
    return words + -(-(12 * han + 6 * kana + 5 * south_east) // 20)


@dataclass
class Row:
    """The counts of one language or corpus."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason."""
    characters: int = 0
    words: int = 0
    utf8_bytes: int = 0


class Statistics:
    """Rows by name."""

    def __init__(self, rows: Mapping[str, Row] | None = None) -> None:
        self.rows: dict[str, Row] = dict(rows or {})

    def keep(self, name: str, *texts: str) -> int:
        """Count one document or pair as read and kept, with its texts; returns their bytes in UTF-8."""
        row = self._row(name)
        row.read += 1
        row.kept += 1
        utf8_bytes = 0
        for text in texts:
            utf8_bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            row.characters += len(text)
            row.words += count_words(text)
        row.utf8_bytes += utf8_bytes
        return utf8_bytes

    def drop(self, name: str, reason: str, number: int = 1) -> None:
        """Count documents or pairs as read and dropped."""
        row = self._row(name)
        row.read += number
        row.dropped[reason] = row.dropped.get(reason, 0) + number

    def add(self, other: Statistics) -> None:
        """Count what `other` has counted too."""
        for name, row in other.rows.items():
            mine = self._row(name)
            for count in ("read", "kept", "characters", "words", "utf8_bytes"):
                setattr(mine, count, getattr(mine, count) + getattr(row, count))
            for reason, number in row.dropped.items():
                mine.dropped[reason] = mine.dropped.get(reason, 0) + number

    def _row(self, name: str) -> Row:
        if name not in self.rows:
            self.rows[name] = Row()
        return self.rows[name]

    def as_json(self) -> dict[str, Any]:
        """For a side-car: rows and reasons by name, so that the same counts give the same bytes."""
        return {
            name: {**vars(row), "dropped": dict(sorted(row.dropped.items()))} for name, row in sorted(self.rows.items())
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Statistics:
        """The inverse of `as_json`."""
        return Statistics({name: Row(**row) for name, row in value.items()})


def table(stages: Mapping[str, Statistics]) -> str:
    """The statistics of every stage, aligned for reading; the reasons for dropping stand under their row."""
    head = ("stage", "of", "read", "kept", "words", "characters", "MB")
    lines = [head]
    for stage, statistics in stages.items():
        for name, row in sorted(statistics.rows.items()):
            megabytes = f"{row.utf8_bytes / 1e6:,.2f}"
            lines.append(
                (stage, name, f"{row.read:,}", f"{row.kept:,}", f"{row.words:,}", f"{row.characters:,}", megabytes)
            )
            lines += [("", f"  - {reason}", f"{count:,}", "", "", "", "") for reason, count in row.dropped.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


class Console:
    """Where a tool speaks: lines, and on a terminal one line that is drawn again and again below them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.redraws = stream, stream.isatty()
        self._drawn = False

    def __call__(self, line: str) -> None:
        """Print a line that stays."""
        self._stream.write(f"\r\x1b[K{line}\n" if self._drawn else f"{line}\n")
        self._stream.flush()
        self._drawn = False

    def close(self) -> None:
        """Leave the drawn line as it is and go on below it."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
        self._drawn = False

    def draw(self, line: str) -> None:
        """Draw the line over the one drawn before."""
        self._stream.write(f"\r\x1b[K{line}")
        self._stream.flush()
        self._drawn = True


class Progress:
    """How much is done, how fast, and the time left where the whole is known: a line every few seconds, or a bar."""

    def __init__(self, say: Callable[[str], None], what: str, unit: str, total: int | None = None) -> None:
        redraws = isinstance(say, Console) and say.redraws
        self._say = say.draw if isinstance(say, Console) and redraws else say
        self._seconds = REDRAW_SECONDS if redraws else PROGRESS_SECONDS
        self._what, self._unit, self._total, self._bar = what, unit, total, redraws
        self._begun = self._told = monotonic()
        self._done = self._bytes = self._due = 0

    def step(self, utf8_bytes: int = 0) -> None:
        """One more document or pair is done."""
        self._done += 1
        self._bytes += utf8_bytes
        # The clock is looked at after 256 steps or 64 KiB, whichever comes first.
        self._due += 1 + (utf8_bytes >> 8)
        if self._due >= 256:
            self._due = 0
            if (now := monotonic()) - self._told > self._seconds:
                self._told = now
                self._say(self._line(now - self._begun))

    def _line(self, seconds: float) -> str:
        line = f"{self._what}: {self._done:,} {self._unit}"
        if self._bytes:
            line += f", {self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:.1f} MB/s"
        if self._total:
            left = seconds * (self._total - self._done) / self._done
            line += f", {100 * self._done // self._total} %, {left:,.0f} s left"
            if self._bar:
                filled = BAR_WIDTH * self._done // self._total
                line = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}"
        return line
