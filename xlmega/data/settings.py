"""A recipe's [data] table: what is served, in which shares, cut how, and what changes along the run.

Only what the table says stands here, and the rules between its own keys; `shares` turns it into weights when the corpus
is known, and `plan` into a run. Keys keep the names of the five systems where they had one (METHODS §1.3 to §1.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

Sampling = Literal["temperature", "unimax"]


@dataclass(frozen=True)
class StageSettings:
    """One of [[data.stages]]: from where on it holds, and what it changes. What it leaves out stays as [data] says."""

    name: str
    from_step: int | None = None
    """First step of the stage; give this or from_tokens."""
    from_tokens: float | None = None
    """The stage begins with the first step before which at least so many tokens were served."""
    languages: dict[str, float] | None = None
    temperature: float | None = None
    sampling: Sampling | None = None
    p_clone: float | None = None
    p_l2: float | None = None

    def problems(self) -> Iterator[str]:
        if not self.name:
            yield "name must not be empty."
        if (self.from_step is None) == (self.from_tokens is None):
            yield f"from_step or from_tokens: stage '{self.name}' needs one of them, and only one."
        if self.from_step is not None and self.from_step < 0:
            yield f"from_step must not be negative, but is {self.from_step}."
        if self.from_tokens is not None and self.from_tokens < 0:
            yield f"from_tokens must not be negative, but is {self.from_tokens}."
        yield from _problems_of_a_mix(self.languages or {}, self.temperature, self.p_clone, self.p_l2)


@dataclass(frozen=True)
class DataSettings:
    """A recipe's [data] table."""

    root: str = ""
    """Folder that tools/tokenize_corpus wrote."""
    sequence_length: int = 256
    """Targets of a window, in tokens."""
    windows: Literal["packed", "documents"] = "packed"
    """packed: documents back to back, cut every sequence_length tokens. documents: a window begins with a document and
    holds no other, padded where it is shorter."""
    long_documents: Literal["split", "cut"] = "split"
    """With windows = "documents", of a document longer than a window: all parts, or its beginning alone."""
    reset_attention: bool = False
    """With packed windows: no token sees another document, and positions begin anew with each."""

    languages: dict[str, float] = field(default_factory=dict)
    """Relative weights, all positive; all 0 picks the languages and leaves the weights to `sampling`; empty picks
    every language. May name clones ('en-clone1') and languages of data_root_2."""
    sampling: Sampling = "temperature"
    """temperature: sizes ** (1 / temperature). unimax: as equal as max_epochs allows (arXiv 2304.09151)."""
    temperature: float = 1.0
    """1 is in proportion to the sizes, large is uniform."""
    unit: Literal["window", "document", "batch"] = "window"
    """What a share counts: windows; documents; or whole steps, each of one language."""
    max_epochs: float = 0.0
    """Most passes over a language's windows: what unimax spreads under, and what `beyond_cap` watches. 0: no limit."""
    beyond_cap: Literal["refuse", "warn"] = "refuse"
    """What to do before step 0 about a language that the plan takes beyond max_epochs."""
    budget_tokens: float = 0.0
    """Tokens that unimax distributes; 0: as many as the stage serves."""
    token_budgets: dict[str, float] = field(default_factory=dict)
    """Tokens of each language over the run, in place of shares; they must add up to the run."""

    num_cloned_languages: int = 0
    """Clones of every language of `root`: the same windows under ids of their own."""
    p_clone: float = 0.0
    """Share of all clones together; each language gives up that part of its own share, clones are equal."""
    frac_clone: float = 1.0
    """Part of the ids that a clone has of its own; the rest it shares."""
    data_root_2: str = ""
    """A second token folder with its own vocabulary."""
    p_l2: float = 0.0
    """Share of the second folder's languages together."""
    merge_vocab: bool = False
    """Pieces that both vocabularies have become one id."""
    language_schedule: str = ""
    """'0.05_0.65_0.65_0.65': p_l2 (with data_root_2) or p_clone in stages of equal length; begins with that p."""
    stages: tuple[StageSettings, ...] = ()
    """Named changes at any step or token count."""

    frac_validation: float = 0.01
    """Part of every language's windows, the last ones, held out when a root has no split but 'train'."""
    validated_languages: Literal["trained", "all"] = "trained"
    """Those that the recipe names, or all that the validation splits have."""

    def problems(self) -> Iterator[str]:
        if self.sequence_length < 1:
            yield f"sequence_length must be at least 1, but is {self.sequence_length}."
        if not 0.0 <= self.frac_validation < 1.0:
            yield f"frac_validation must be in [0, 1), but is {self.frac_validation}."
        yield from _problems_of_a_mix(self.languages, self.temperature, self.p_clone, self.p_l2)
        weighted = self.languages and all(self.languages.values())
        if weighted and self.temperature != 1.0:
            yield (
                f"temperature={self.temperature} would be ignored, for every language has a weight. "
                "Set every weight to 0 to weight these languages by temperature."
            )
        yield from self._problems_of_sampling(bool(weighted))
        yield from self._problems_of_clones()
        yield from self._problems_of_stages()
        yield from self._problems_of_windows()

    def during(self, stage: StageSettings) -> DataSettings:
        """The table as it holds in a stage, which has no stages of its own."""
        given = {
            one.name: getattr(stage, one.name)
            for one in fields(stage)
            if one.name not in ("name", "from_step", "from_tokens") and getattr(stage, one.name) is not None
        }
        return replace(self, **given, stages=(), language_schedule="")

    def _problems_of_sampling(self, weighted: bool) -> Iterator[str]:
        for name in ("max_epochs", "budget_tokens"):
            if getattr(self, name) < 0.0:
                yield f"{name} must not be negative, but is {getattr(self, name)}."
        if self.sampling == "unimax":
            if self.max_epochs == 0.0:
                yield "sampling='unimax' needs a cap: set max_epochs (the paper tries 1, 5 and 10)."
            if self.unit != "window":
                yield f"sampling='unimax' spreads windows, so unit='{self.unit}' would mean two things. Drop one."
            if self.num_cloned_languages or self.data_root_2:
                yield "sampling='unimax' knows neither clones nor a second root. Give their shares in languages."
        elif self.budget_tokens:
            yield f"budget_tokens={self.budget_tokens:g} would be ignored: it is what sampling='unimax' distributes."
        if self.sampling == "unimax" and (weighted or self.temperature != 1.0):
            yield "sampling='unimax' would be ignored: leave out temperature and the languages' weights, or it."
        bad = [name for name, budget in self.token_budgets.items() if not budget > 0.0]
        if bad:
            yield f"token_budgets.{bad[0]} must be positive, but is {self.token_budgets[bad[0]]}."
        ignored = [
            name
            for name in ("languages", "stages", "language_schedule", "p_clone", "p_l2")
            if self.token_budgets and getattr(self, name)
        ]
        if self.token_budgets and (self.sampling != "temperature" or self.temperature != 1.0 or self.unit != "window"):
            ignored.append("sampling, temperature and unit")
        if ignored:
            yield f"token_budgets say what every language gets, so {', '.join(ignored)} would be ignored. Drop either."

    def _problems_of_clones(self) -> Iterator[str]:
        if self.num_cloned_languages < 0:
            yield f"num_cloned_languages must not be negative, but is {self.num_cloned_languages}."
        if not 0.0 < self.frac_clone <= 1.0:
            yield f"frac_clone must be in (0, 1], but is {self.frac_clone}."
        elif self.frac_clone < 1.0 and self.num_cloned_languages != 1:
            yield (
                f"frac_clone={self.frac_clone} needs num_cloned_languages=1, but that is {self.num_cloned_languages}: "
                "ids are shared between two languages only."
            )
        if self.p_clone and not self.num_cloned_languages:
            yield f"p_clone={self.p_clone} would be ignored: set num_cloned_languages, too."
        if (self.p_l2 or self.merge_vocab) and not self.data_root_2:
            yield "p_l2 and merge_vocab would be ignored: set data_root_2, too."
        if self.num_cloned_languages and self.data_root_2:
            yield "num_cloned_languages and data_root_2 exclude each other: clones are of one root's languages."

    def _problems_of_stages(self) -> Iterator[str]:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            yield f"stages have names of their own, but these are {', '.join(names)}."
        if self.token_budgets or not self.language_schedule:
            known = set(replace(self, stages=()).problems()) if self.stages else set()
            for stage in self.stages:
                for problem in self.during(stage).problems():
                    if problem not in known:
                        yield f"stages, '{stage.name}': {problem}"
            return
        if self.stages:
            yield "language_schedule and stages exclude each other: write the schedule's parts as stages."
        if not (self.num_cloned_languages or self.data_root_2):
            yield (
                f"language_schedule='{self.language_schedule}' schedules p_clone or p_l2, but there is neither a clone "
                "nor a second root: set num_cloned_languages or data_root_2."
            )
            return
        shares = schedule_shares(self.language_schedule)
        key = "p_l2" if self.data_root_2 else "p_clone"
        if shares is None:
            yield (
                f"language_schedule='{self.language_schedule}' must be two or more shares from 0 to 1 joined by '_', "
                "such as '0.05_0.65_0.65_0.65'."
            )
        elif getattr(self, key) != shares[0]:
            yield (
                f"language_schedule='{self.language_schedule}' begins with {shares[0]}, but {key} is "
                f"{getattr(self, key)}. "
                f"The first stage must be the configured share: set {key}={shares[0]}."
            )

    def _problems_of_windows(self) -> Iterator[str]:
        if self.windows == "documents" and self.reset_attention:
            yield "reset_attention would be ignored: with windows='documents' no window holds two documents."
        if self.windows == "packed" and self.long_documents != "split":
            yield f"long_documents='{self.long_documents}' would be ignored: windows='packed' cuts everywhere."


def schedule_shares(text: str) -> list[float] | None:
    """The stages' shares of a language_schedule; None where it is none."""
    try:
        shares = [float(part) for part in text.split("_")]
    except ValueError:
        return None
    return shares if len(shares) > 1 and all(0.0 <= share <= 1.0 for share in shares) else None


def _problems_of_a_mix(
    languages: Mapping[str, float], temperature: float | None, p_clone: float | None, p_l2: float | None
) -> Iterator[str]:
    if temperature is not None and temperature <= 0.0:
        yield f"temperature must be positive, but is {temperature}."
    for name, share in (("p_clone", p_clone), ("p_l2", p_l2)):
        if share is not None and not 0.0 <= share <= 1.0:
            yield f"{name} must be from 0 to 1, but is {share}."
    negative = [name for name, weight in languages.items() if not weight >= 0.0 or math.isinf(weight)]
    zero = [name for name, weight in languages.items() if weight == 0.0]
    if negative:
        yield f"languages.{negative[0]} must be positive, but is {languages[negative[0]]}."
    elif zero and len(zero) < len(languages):
        yield (
            f"languages.{zero[0]} is 0 while other weights are not. Leave it out to train without it, "
            "or set every weight to 0 to weight all by data.temperature."
        )


# What a run may change when it goes on, from the resumed step on; every language keeps its place.
CHANGEABLE = frozenset(
    {"languages", "sampling", "temperature", "unit", "max_epochs", "beyond_cap", "budget_tokens", "token_budgets"}
    | {"p_clone", "p_l2", "language_schedule", "stages"}
)
assert {one.name for one in fields(DataSettings)} >= CHANGEABLE
