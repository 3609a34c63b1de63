"""Multiple choice by likelihood: which of an item's answers does the model find most probable after its prompt?

In: a Scorer, a vocabulary, items from local files (one JSON object a line, as the data sets are published), and, for
few shots, other items to show first. Out: for each way of comparing answers, how many items were answered right.

Ways, all from the same scores; the answer with the highest wins, of equals the first:
- `sum`: log p(answer | prompt) (METHODS §5.10's default);
- `mean`: that per token (§2.9's, and §5.10's --use_mean_nll);
- `bytes`: that per byte of the answer, which no vocabulary's cutting changes;
- `pmi`: log p(answer | prompt) - weight * log p(answer), the prior after nothing but a <D>. The published one scores
  the same text again and is no prior; this one is.
Prompt and answer are encoded apart, so all answers follow the same ids (§2.9); a prompt that is too long loses its
beginning (§5.10). With `shots`, each run draws its own demonstrations, and figures are means over runs with their
standard error (§2.9).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xlmega.errors import ConfigError, DataError, nearest
from xlmega.evaluation.scoring import Scorer, token_scores
from xlmega.text.corpus import SUFFIXES, read_records
from xlmega.text.vocabulary import Vocabulary

WAYS = ("sum", "mean", "bytes", "pmi")
# Between demonstrations, and before the item.
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Item:
    """A question: answers continue the prompt, whatever stands between them included."""

    prompt: str
    answers: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Task:
    """How a data set's record becomes an item."""

    template: str
    """Of the prompt; {names} are keys of `fields`."""
    read: Callable[[Mapping[str, Any]], tuple[dict[str, str], tuple[str, ...], int]]
    """A record's fields, answers and label."""
    answer_template: str = "{answer}"


def _xcopa(record: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], int]:
    fields = {"premise": record["premise"], "question": record["question"]}
    return fields, (record["choice1"], record["choice2"]), record["label"]


def _xstorycloze(record: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], int]:
    sentences = " ".join(record[f"input_sentence_{k}"] for k in range(1, 5))
    endings = (record["sentence_quiz1"], record["sentence_quiz2"])
    return {"story": sentences}, endings, record["answer_right_ending"] - 1


def _xnli(record: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], int]:
    answers = tuple(f"{word}, {record['hypothesis']}" for word in ("Yes", "Also", "No"))
    return {"premise": record["premise"]}, answers, record["label"]


def _belebele(record: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], int]:
    fields = {"passage": record["flores_passage"], "question": record["question"]}
    return fields, tuple(record[f"mc_answer{k}"] for k in range(1, 5)), int(record["correct_answer_num"]) - 1


def _choices(record: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...], int]:
    return {"prompt": record["prompt"]}, tuple(record["choices"]), record["label"]


TASKS: dict[str, Task] = {
    "xcopa": Task("{premise}\n", _xcopa),
    "xstorycloze": Task("{story}\n", _xstorycloze),
    "xnli": Task("{premise}, right? ", _xnli),
    "belebele": Task("{passage}\n\nQ: {question}\nA: ", _belebele),
    "choices": Task("{prompt}", _choices),
}
"""Prompts of METHODS §2.9 and §5.10; `choices` is a format of our own: prompt, choices, label."""


def task_named(name: str, template: str = "") -> Task:
    """A task, with another template for its prompt if one is given."""
    if name not in TASKS:
        raise ConfigError(f"task '{name}' is not known.{nearest(name, TASKS)}")
    task = TASKS[name]
    return Task(template, task.read) if template else task


def read_items(path: Path, task: Task) -> list[Item]:
    """The items of one file."""
    items = []
    for number, record in read_records(path):
        try:
            fields, answers, label = task.read(record)
            if not all(isinstance(text, str) for text in (*fields.values(), *answers)):
                raise TypeError("its texts must be strings")
            if type(label) is not int or not 0 <= label < len(answers) or len(answers) < 2:
                raise ValueError(f"label {label!r} is not one of its {len(answers)} answers")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}:{number}: not an item of this task: {reason}.") from None
        try:
            prompt = string.Formatter().vformat(task.template, (), fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"the template {task.template!r} cannot be filled ({error}). Its fields: {', '.join(fields)}."
            ) from None
        items.append(Item(prompt, tuple(answers), label))
    if not items:
        raise DataError(f"'{path}' holds no item.")
    return items


def item_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Language to file: 'val.it.jsonl' and 'it.jsonl' are of 'it'; a folder stands for its files."""
    found: dict[str, Path] = {}
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            suffix = next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)
            if suffix is None:
                if path.is_dir():
                    continue
                raise DataError(f"'{file}' is not a file of items: its name ends in none of {', '.join(SUFFIXES)}.")
            language = file.name.removesuffix(suffix).rsplit(".", 1)[-1]
            if language in found:
                raise DataError(
                    f"'{found[language]}' and '{file}' are both of language '{language}'. Give one of them."
                )
            found[language] = file
    if not found:
        raise DataError(f"{', '.join(map(repr, map(str, paths)))}: there is no .jsonl file of items.")
    return found


@dataclass(frozen=True)
class Settings:
    """How items are put and answers compared."""

    shots: int = 0
    runs: int = 1
    """Each with demonstrations of its own; of use with shots only."""
    seed: int = 42
    max_items: int = 0
    """As many, drawn by the seed; 0 takes all."""
    pmi_weight: float = 1.0

    def problems(self) -> Iterator[str]:
        for name in ("shots", "max_items", "seed"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative."
        if self.runs < 1:
            yield f"runs={self.runs} must be at least 1."
        if self.runs > 1 and not self.shots:
            yield f"runs={self.runs} without shots would be the same each time."
        if not math.isfinite(self.pmi_weight):
            yield f"pmi_weight={self.pmi_weight} must be finite."


@dataclass
class Outcome:
    """Right answers of each run, for each way."""

    items: int
    correct: dict[str, list[int]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def accuracy(self, way: str) -> float:
        """Mean over runs."""
        counts = self.correct[way]
        return sum(counts) / len(counts) / self.items

    def standard_error(self, way: str) -> float:
        """Over runs where there are several, else that of a share of so many items."""
        shares = [count / self.items for count in self.correct[way]]
        if len(shares) > 1:
            return float(np.std(shares, ddof=1) / math.sqrt(len(shares)))
        return math.sqrt(shares[0] * (1.0 - shares[0]) / self.items)

    def table(self) -> dict[str, Any]:
        """For result.json."""
        ways = {
            way: {
                "accuracy": self.accuracy(way),
                "standard_error": self.standard_error(way),
                "correct": self.correct[way],
            }
            for way in WAYS
        }
        return {"items": self.items, **ways}


def evaluate(
    scorer: Scorer,
    vocabulary: Vocabulary,
    items: Sequence[Item],
    settings: Settings,
    *,
    demonstrations: Sequence[Item] = (),
    batch_tokens: int = 8192,
) -> Outcome:
    """Answer every item in every run."""
    problems = list(settings.problems())
    if settings.shots > len(demonstrations):
        problems.append(f"shots={settings.shots}, but there are {len(demonstrations)} demonstrations.")
    if problems:
        raise ConfigError(" ".join(problems))
    if settings.max_items and settings.max_items < len(items):
        order = np.random.default_rng((settings.seed, 0x4954454D)).permutation(len(items))[: settings.max_items]
        items = [items[index] for index in order]
    outcome = Outcome(len(items))
    priors = _sums(scorer, vocabulary, [("", answer) for item in items for answer in item.answers], batch_tokens)
    for run in range(settings.runs):
        shown = [_shown(demonstrations, settings, run) + item.prompt for item in items]
        pairs = [(prompt, answer) for prompt, item in zip(shown, items, strict=True) for answer in item.answers]
        sums = iter(zip(_sums(scorer, vocabulary, pairs, batch_tokens), priors, strict=True))
        counts = dict.fromkeys(WAYS, 0)
        for item in items:
            scores = [_by_way(*next(sums), answer, settings) for answer in item.answers]
            for way in WAYS:
                best = max(range(len(scores)), key=lambda index: scores[index][way])
                counts[way] += best == item.label
        for way in WAYS:
            outcome.correct[way].append(counts[way])
    return outcome


def _by_way(found: tuple[float, int], prior: tuple[float, int], answer: str, settings: Settings) -> dict[str, float]:
    total, tokens = found
    return {
        "sum": total,
        "mean": total / max(1, tokens),
        "bytes": total / max(1, len(answer.encode())),
        "pmi": total - settings.pmi_weight * prior[0],
    }


def _shown(demonstrations: Sequence[Item], settings: Settings, run: int) -> str:
    if not settings.shots:
        return ""
    order = np.random.default_rng((settings.seed + run, 0x53484F54)).permutation(len(demonstrations))[: settings.shots]
    shown = [demonstrations[index] for index in order]
    return "".join(f"{one.prompt}{one.answers[one.label]}{SEPARATOR}" for one in shown)


def _sums(
    scorer: Scorer, vocabulary: Vocabulary, pairs: Sequence[tuple[str, str]], batch_tokens: int
) -> list[tuple[float, int]]:
    """(log p(answer | prompt), tokens of the answer) of each pair."""
    prompts = vocabulary.encode_batch([prompt for prompt, _ in pairs])
    answers = vocabulary.encode_batch([answer for _, answer in pairs])
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(answer) >= scorer.max_positions:
            raise DataError(f"an answer has {len(answer)} tokens, and the model {scorer.max_positions} positions.")
        whole = np.concatenate([[vocabulary.eod_id], prompt, answer])
        # An answer of no tokens is certain; one id more keeps the sequence scoreable, and it is not counted.
        sequences.append(np.append(whole, vocabulary.eod_id)[-(scorer.max_positions + 1) :])
    scores = token_scores(scorer, sequences, batch_tokens)
    return [
        (float(found[len(found) - 1 - len(answer) : len(found) - 1].sum()), len(answer))
        for found, answer in zip(scores, answers, strict=True)
    ]


def report(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Accuracy with its standard error, a language a line, and the mean over languages."""
    width = max(8, *(len(name) for name in outcomes))
    lines = ["language".ljust(width) + "".join(way.rjust(18) for way in WAYS) + "items".rjust(8)]
    for name, one in outcomes.items():
        cells = (f"{one.accuracy(way):.4f} +- {one.standard_error(way):.4f}".rjust(18) for way in WAYS)
        lines.append(name.ljust(width) + "".join(cells) + f"{one.items}".rjust(8))
    if len(outcomes) > 1:
        means = (sum(one.accuracy(way) for one in outcomes.values()) / len(outcomes) for way in WAYS)
        lines.append("mean".ljust(width) + "".join(f"{mean:.4f}".ljust(9).rjust(18) for mean in means))
    return lines
