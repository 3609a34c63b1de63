"""One sentence pair in, the normalised pair or the reason why it is dropped out.

The filters of SENSIA's corpus, in its order: punctuation, lengths, ratio of lengths either way round, languages.
Lengths are words (`tally.count_words`, so that scripts without spaces have some) and, where asked for, characters.
Every reason is counted under its own name; none of the filters passes a pair because it cannot be applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xlmega.errors import ConfigError
from xlmega.text.identification import Identifier
from xlmega.text.punctuation import normaliser
from xlmega.text.tally import count_words

BLANK, SHORT, LONG = "a side is blank", "too few words", "too many words"
FEW_CHARACTERS, MANY_CHARACTERS, RATIO = "too few characters", "too many characters", "ratio of lengths"


@dataclass(frozen=True)
class Filters:
    """What a pair must fulfil; the defaults are those of the published corpus."""

    min_words: int = 3
    max_words: int = 256
    min_ratio: float = 0.45
    max_ratio: float = 2.0
    """Words of one side over words of the other, or the inverse, must lie between the two."""
    min_characters: int = 1
    max_characters: int = 0
    """0: any number."""
    normalise_punctuation: bool = True
    identify_language: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ConfigError(
                f"min_words must be from 1 to max_words, but they are {self.min_words} and {self.max_words}."
            )
        if self.min_characters < 0 or self.max_characters < 0 or 0 < self.max_characters < self.min_characters:
            raise ConfigError(
                "min_characters must be from 0 to max_characters (0: any number), but they are "
                f"{self.min_characters} and {self.max_characters}."
            )
        if not 0 < self.min_ratio <= self.max_ratio or not math.isfinite(self.max_ratio):
            raise ConfigError(
                f"min_ratio must be above 0 and at most max_ratio, but they are {self.min_ratio} and {self.max_ratio}."
            )


class Sieve:
    """The filters made ready for two languages."""

    def __init__(self, filters: Filters, source: str, target: str) -> None:
        self._filters = filters
        self._normalisers: tuple[Callable[[str], str], ...] = ()
        if filters.normalise_punctuation:
            self._normalisers = (normaliser(source), normaliser(target))
        self._identifier: Identifier | None = None
        if filters.identify_language:
            self._identifier = Identifier()
            self._labels = [(code, self._identifier.label_of(code)) for code in (source, target)]
            if self._labels[0][1] == self._labels[1][1]:
                raise ConfigError(
                    f"'{source}' and '{target}' are one language, '{self._labels[0][1]}', to language identification. "
                    "Add --skip_language_id to go without it."
                )

    def judge(self, source: str, target: str) -> tuple[str, str, str]:
        """(source, target, ''), normalised; or (source, target, why the pair is dropped)."""
        if self._normalisers:
            source, target = self._normalisers[0](source), self._normalisers[1](target)
        return source, target, self._reason(source, target)

    def _reason(self, source: str, target: str) -> str:
        limits = self._filters
        if not source.strip() or not target.strip():
            return BLANK
        words, other = count_words(source), count_words(target)
        if min(words, other) < limits.min_words:
            return SHORT
        if max(words, other) > limits.max_words:
            return LONG
        if min(len(source), len(target)) < limits.min_characters:
            return FEW_CHARACTERS
        if limits.max_characters and max(len(source), len(target)) > limits.max_characters:
            return MANY_CHARACTERS
        low, high = limits.min_ratio, limits.max_ratio
        if not (low <= words / other <= high or low <= other / words <= high):
            return RATIO
        if self._identifier:
            for text, (code, label) in zip((source, target), self._labels, strict=True):
                if self._identifier.language(text) != label:
                    return f"not in {code}"
        return ""
