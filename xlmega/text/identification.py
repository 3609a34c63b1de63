"""Texts in, whether each is in the language it is said to be: the door of py3langid, which is optional.

The library chooses among all languages that it knows. One that it does not know is refused before anything is read:
every text would be found to be in another language.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from xlmega.errors import ConfigError, DataError
from xlmega.text.languages import names_of

WITHOUT = "or add --skip_language_id to go without language identification"


class Identifier:
    """Tells the language of a text."""

    def __init__(self) -> None:
        try:
            from py3langid import langid
        except ImportError:
            raise DataError(
                f"telling languages apart needs the package py3langid: pip install py3langid; {WITHOUT}."
            ) from None
        identifier = _loaded(langid)
        self.labels = frozenset(identifier.labels)
        self._classify: Callable[[str], tuple[str, float]] = identifier.classify

    def label_of(self, language: str) -> str:
        """What the library calls a language; a ConfigError when it does not know it."""
        for name in names_of(language):
            if name in self.labels:
                return name
        raise ConfigError(
            f"py3langid does not know '{language}' among its {len(self.labels)} languages, so it cannot tell whether "
            f"a sentence is in it. Choose another language, {WITHOUT}."
        )

    def language(self, text: str) -> str:
        """The library's label for the text."""
        return self._classify(text)[0]


@cache
def _loaded(langid: Any) -> Any:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
