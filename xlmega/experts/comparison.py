"""Experts, rules and baselines against each other: perplexity per language, and the expert-by-language matrix.

Perplexities are micro-averaged over documents (METHODS §2.8, `evaluation.perplexity`), with their sums. The matrix has
every expert alone on every language; a rule is the ensemble; `routing` sends each language to its own expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.evaluation.documents import LanguageDocuments
from xlmega.evaluation.perplexity import Definition, Perplexity, Spelling, perplexity, total
from xlmega.evaluation.scoring import Scorer
from xlmega.experts.collection import Ensemble
from xlmega.experts.ensemble import EnsembleScorer, ExpertPool
from xlmega.experts.weighing import WeighingSettings

Scores = dict[str, Perplexity]
ROUTING = "routing"


class Comparison:
    """Scores of several models on one set of documents."""

    def __init__(
        self,
        languages: Mapping[str, LanguageDocuments],
        definition: Definition,
        spelling: Spelling,
        eod_id: int,
        batch_tokens: int = 8192,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._languages, self._say, self._batch_tokens = languages, say, batch_tokens
        self._definition, self._spelling, self._eod_id = definition, spelling, eod_id
        self.rows: dict[str, Scores] = {}

    def score(self, name: str, scorer_for: Callable[[str], Scorer]) -> Scores:
        """The row `name`; `scorer_for` gives the model of each language."""
        begun = time.monotonic()
        found: Scores = {}
        for code, documents in self._languages.items():
            found[code] = perplexity(
                scorer_for(code),
                documents.read(),
                self._definition,
                self._spelling,
                self._eod_id,
                batch_tokens=self._batch_tokens,
            )
        self.rows[name] = found
        whole = total(found.values())
        self._say(
            f"{name}: perplexity {whole.perplexity:.4f}, {whole.tokens:,} tokens, {time.monotonic() - begun:.1f} s"
        )
        return found

    def score_ensemble(
        self,
        ensemble: Ensemble,
        pool: ExpertPool,
        rules: Mapping[str, WeighingSettings],
        *,
        routing: bool,
        matrix: bool,
    ) -> None:
        """A row for each rule, one for routing, and one for each expert alone."""
        for name, settings in rules.items():
            scorer = ensemble.scorer(pool, settings)
            self.score(name, lambda code, scorer=scorer: scorer)  # type: ignore[misc]
        alone: list[EnsembleScorer] = []
        if routing or matrix:
            uniform = ensemble.scorer(pool, WeighingSettings("uniform"))
            alone = [uniform.routed(number) for number in range(len(ensemble))]
        if matrix:
            for number, name in enumerate(ensemble.names):
                self.score(name, lambda code, number=number: alone[number])  # type: ignore[misc]
        if routing:
            homes = {code: ensemble.route(code) for code in self._languages}
            if matrix:  # the same figures as in the matrix
                self.rows[ROUTING] = {code: self.rows[ensemble.names[home]][code] for code, home in homes.items()}
            else:
                self.score(ROUTING, lambda code: alone[homes[code]])

    def perplexities(self, names: list[str]) -> npt.NDArray[np.float64]:
        """[names, languages]"""
        return np.array([[self.rows[name][code].perplexity for code in self._languages] for name in names])

    def result(self) -> dict[str, Any]:
        """Every row with its sums, and the two means that are in use."""
        return {
            name: {
                "languages": {code: one.table() for code, one in scores.items()},
                "all": total(scores.values()).table(),
                "mean_perplexity": mean_perplexity(scores),
            }
            for name, scores in self.rows.items()
        }

    def table(self, names: list[str] | None = None) -> list[str]:
        """Perplexity of each row by language, their mean (as X-ELM's tables have it), and over all tokens."""
        names = list(self.rows) if names is None else names
        codes = list(self._languages)
        width = max(8, *(len(name) for name in names))
        lines = ["".ljust(width) + "".join(code.rjust(9) for code in codes) + "     mean      all"]
        for name in names:
            scores = self.rows[name]
            cells = [scores[code].perplexity for code in codes]
            cells += [mean_perplexity(scores), total(scores.values()).perplexity]
            lines.append(name.ljust(width) + "".join(f"{value:9.3f}" for value in cells))
        return lines


def mean_perplexity(scores: Scores) -> float:
    """The mean over languages, each counted alike."""
    return sum(one.perplexity for one in scores.values()) / len(scores)
