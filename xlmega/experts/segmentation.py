"""Text in, the terms that a clusterer counts out; and the same for a text that is still growing.

Three ways to cut:
- `words`: runs of two or more letters, digits and '_', lower case (METHODS §2.3, scikit-learn's default). A sentence of
  Chinese, Japanese or Thai is then one term, and Indic words break at their vowel signs.
- `scripts` (the default): the same, with combining marks as parts of words, and the pairs of neighbouring characters
  where a script puts no spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar, Tibetan).
- `characters`: those pairs, and the character triples of every other word with a space before and behind it.
A term that begins with a digit becomes `#NUMBER` in all three.

Guaranteed: the terms of a text that grows piece by piece are at every moment those of the text so far, as a multiset.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator

NUMBER = "#NUMBER"
SEGMENTATIONS = ("scripts", "words", "characters")
_LONG_TAIL = 64
"""A growing text without spaces is settled up to its last character when it is longer than this."""


def _ranges(codes: Iterator[int]) -> str:
    """Character classes are given as ranges, which the regular expression engine keeps as a table."""
    spans: list[list[int]] = []
    for code in codes:
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in spans)


_UNSPACED_BLOCKS = (
    (0x0E00, 0x0E3A), (0x0E40, 0x0EFF), (0x0F00, 0x109F), (0x1780, 0x17D3), (0x3005, 0x3006), (0x3041, 0x309F),
    (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F), (0x20000, 0x323AF),
)  # fmt: skip
_UNSPACED_CLASS = "".join(f"{chr(a)}-{chr(b)}" for a, b in _UNSPACED_BLOCKS)
_MARKS_CLASS = _ranges(code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
_UNSPACED = re.compile(f"[{_UNSPACED_CLASS}]+")
_PLAIN_WORD = re.compile(r"\w\w+")
_MARKED_WORD = re.compile(rf"[\w{_MARKS_CLASS}]{{2,}}")


def terms(text: str, segmentation: str = "scripts") -> list[str]:
    """Every term of `text`, in no particular order."""
    text = text.lower()
    if segmentation == "words":
        found = _PLAIN_WORD.findall(text)
    else:
        found, pairs = [], []
        if text.isascii():
            found = _PLAIN_WORD.findall(text)
        else:
            for run in _UNSPACED.findall(text):
                pairs += [run[k : k + 2] for k in range(len(run) - 1)]
            found = _MARKED_WORD.findall(_UNSPACED.sub(" ", text) if pairs or _UNSPACED.search(text) else text)
        if segmentation == "characters":
            found = [NUMBER if word[0].isdigit() else word for word in found]
            found = [part for word in found for part in ([word] if word is NUMBER else _triples(f" {word} "))]
        found += pairs
    return [NUMBER if term[0].isdigit() else term for term in found]


def _triples(word: str) -> list[str]:
    return [word[k : k + 3] for k in range(len(word) - 2)]


class GrowingText:
    """A text that grows at its end. `add` answers with terms that have become certain; `open_terms` with the others.

    What all calls of `add` gave, and `open_terms` now, are together the terms of the whole text: only what follows the
    last place where no term can cross is cut again, so a piece costs what its own length costs.
    """

    def __init__(self, segmentation: str = "scripts") -> None:
        self._segmentation = segmentation
        self._tail = ""

    def add(self, piece: str) -> list[str]:
        """Append `piece`; the terms that no later piece can change."""
        self._tail += piece
        cut = self._cut()
        if not cut:
            return []
        head, rest = self._tail[:cut], self._tail[cut:]
        # Where the cut is inside a run without spaces, its last character begins the next pair.
        self._tail = rest if head[-1].isspace() else head[-1]
        return terms(head, self._segmentation)

    def open_terms(self) -> list[str]:
        """The terms of what may still change."""
        return terms(self._tail, self._segmentation)

    def _cut(self) -> int:
        """Where the settled part ends; 0 where nothing is settled."""
        tail = self._tail
        for k in range(len(tail) - 1, -1, -1):
            if tail[k].isspace():
                return k + 1
        if self._segmentation != "words" and len(tail) > _LONG_TAIL and _UNSPACED.fullmatch(tail[-2:]):
            return len(tail)
        return 0
