"""Punctuation of one language made uniform, so that the same sentence is the same string: after Moses' normaliser.

Everywhere: invisible characters go, every kind of space becomes one space, curly, low and angled quotation marks become
straight ones. Where words are separated by spaces also: dashes become '-' (an em dash ' - '), the ellipsis three dots,
full-width forms their ASCII, and no space stays before ':;!?%' at a word's end or inside brackets. English puts
a comma or full stop before a closing quotation mark, Czech leaves it, the others put it after (a full stop at the end
of the text stays where it is).

Unlike Moses' script: numbers with a space between their digits are left alone, no space is put before or after brackets
(code in text would break), and scripts without spaces keep their own stops, dashes and ellipses. Normalising twice is
normalising once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

SPACES = "\t\n\v\f\r\u0085\u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
INVISIBLE = "\u00ad\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\ufeff"
"""Soft hyphen and marks of direction; the zero-width joiners and spaces that scripts need stay."""
DOUBLE = "“”„‟«»″〝〞＂"
SINGLE = "‘’‚‛´`′＇"
EVERYWHERE = {
    **dict.fromkeys(SPACES, " "),
    **dict.fromkeys(INVISIBLE, ""),
    **dict.fromkeys(DOUBLE, '"'),
    **dict.fromkeys(SINGLE, "'"),
}
SPACED = {
    **EVERYWHERE,
    **dict.fromkeys("‐‑‒–―−", "-"),
    "—": " - ",
    "…": "...",
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in DOUBLE + SINGLE},
}
UNSPACED_LANGUAGES = {
    *("zh", "cmn", "zho", "yue", "wuu", "nan", "lzh", "ja", "jpn", "th", "tha", "lo", "lao", "km", "khm"),
    *("my", "mya", "bo", "bod", "dz", "dzo"),
}
TABLES = str.maketrans(EVERYWHERE), str.maketrans(SPACED)
JUST_SPACES = str.maketrans(dict.fromkeys(SPACES, " "))
FRENCH_QUOTES = re.compile("« *| *»")
TWO_SINGLE = re.compile("''+")
INNER_SPACE = re.compile(r"(?<=[(\[]) +| +(?=[)\]])")
SPACE_BEFORE = re.compile(r""" +(?=[:;!?%]+(?:[\s"')\]]|$))""")
MANY_SPACES = re.compile("  +")
CLOSING = re.compile(r"""(?<=[^\s",.])[",.]+(?=\s|$)""")


def normaliser(language: str) -> Callable[[str], str]:
    """The function that normalises texts of a language; the code may be followed by a script, as in 'zho_Hans'."""
    code = re.split("[-_]", language.lower())[0]
    if code in UNSPACED_LANGUAGES:
        return _unspaced
    if code in ("en", "eng"):
        return partial(_spaced, stops_first=True)
    return partial(_spaced, stops_first=None if code in ("cs", "ces") else False)


def _unspaced(text: str) -> str:
    return MANY_SPACES.sub(" ", text.translate(TABLES[0])).strip(" ")


def _spaced(text: str, stops_first: bool | None) -> str:
    if not text.isascii():
        if "«" in text or "»" in text:
            text = FRENCH_QUOTES.sub('"', text.translate(JUST_SPACES))
        text = text.translate(TABLES[1])
    else:
        text = text.translate(TABLES[0])
    if "''" in text:
        text = TWO_SINGLE.sub('"', text)
    text = MANY_SPACES.sub(" ", text).strip(" ")
    text = SPACE_BEFORE.sub("", INNER_SPACE.sub("", text))
    if '"' in text and stops_first is not None:
        text = CLOSING.sub(partial(_order, stops_first=stops_first), text)
    return text


def _order(run: re.Match[str], stops_first: bool) -> str:
    """A run of quotation marks, commas and full stops, with those on the side that the language has them."""
    marks = run[0]
    stops = marks.replace('"', "")
    if not stops or len(stops) == len(marks):
        return marks
    quotes = '"' * (len(marks) - len(stops))
    if stops_first:
        return stops + quotes
    if run.end() == len(run.string) and "," not in stops:
        return marks
    return quotes + stops
