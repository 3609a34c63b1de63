"""Experts that belong together as a directory, and back: what an ensemble is loaded from.

    FOLDER/ensemble.json     kinds and names; which expert is whose; the rule that was chosen
    FOLDER/expert-0/ ...     each a Hugging Face directory (or a logical one)
    FOLDER/clusterer/        where clusters are by text or by language
    FOLDER/vocabulary/

`Ensemble.open` reads such a folder, or the output of tools/train_experts.py as it stands, with nothing copied. An
`Ensemble` is a list of experts that are loaded when asked for, and makes Scorers of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from xlmega import config
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.evaluation.scoring import LogicalScorer, Scorer
from xlmega.experts.clusterer import Clusterer, LanguageClusterer, TextClusterer, load_clusterer, save_clusterer
from xlmega.experts.ensemble import EnsembleScorer, ExpertPool
from xlmega.experts.features import read_json, write_json
from xlmega.experts.weighing import Weighing, WeighingSettings
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import copy_folder, published, write_logical
from xlmega.weights.names import LogicalTensors

FORMAT_VERSION = 1
NAME = "ensemble.json"


@dataclass(frozen=True)
class Ensemble:
    """Experts, what divides text among them, and the vocabulary they share."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    vocabulary: Vocabulary
    vocabulary_folder: Path
    clusterer: Clusterer | None = None
    documents: tuple[Mapping[str, int], ...] = ()
    """For each expert the training documents of each language in its cluster; empty where that is not known."""
    weighing: WeighingSettings = field(default_factory=WeighingSettings)

    @classmethod
    def open(cls, folder: Path, *, round_number: int = 0, clusterer: Path | None = None) -> Ensemble:
        """An exported ensemble, or a round of the experts that train_experts.py made (0: the last)."""
        found = cls._exported(folder) if (folder / NAME).is_file() else cls._trained(folder, round_number)
        return replace(found, clusterer=load_clusterer(clusterer)) if clusterer else found

    @classmethod
    def of(cls, folders: Sequence[Path], *, clusterer: Path | None = None) -> Ensemble:
        """Models in the order of their clusters."""
        if not folders:
            raise ConfigError("an ensemble needs at least one expert.")
        vocabulary, where = _shared_vocabulary(folders)
        names = [f"expert-{k}" for k in range(len(folders))]
        divides = load_clusterer(clusterer) if clusterer else None
        return cls(tuple(names), tuple(folders), vocabulary, where, divides)

    @classmethod
    def _exported(cls, folder: Path) -> Ensemble:
        table = read_json(folder / NAME, FORMAT_VERSION)
        try:
            names = tuple(str(name) for name in table["experts"])
            documents = tuple(dict(one) for one in table["documents"])
            weighing = config.build(WeighingSettings, table["weighing"], what=str(folder / NAME))
        except (KeyError, TypeError) as error:
            raise DataError(f"'{folder / NAME}' is damaged: {error!r}.") from None
        where = folder / "vocabulary"
        divides = load_clusterer(folder / "clusterer") if (folder / "clusterer").is_dir() else None
        folders = tuple(folder / name for name in names)
        return cls(names, folders, load_vocabulary(where), where, divides, documents, weighing)

    @classmethod
    def _trained(cls, folder: Path, round_number: int) -> Ensemble:
        path = folder / "plan.json"
        if not path.is_file():
            raise CheckpointError(
                f"'{folder}' is neither an ensemble ({NAME}) nor experts of tools/train_experts.py (plan.json)."
            )
        table = json.loads(path.read_text(encoding="utf-8"))
        rounds = {one["name"].partition("/")[0] for one in table["experts"]} - {"dense"}
        chosen = f"round-{round_number or max(int(name.partition('-')[2]) for name in rounds)}"
        mine = [one for one in table["experts"] if one["name"].startswith(f"{chosen}/")]
        if not mine:
            raise ConfigError(f"'{folder}' has no {chosen}; it has {', '.join(sorted(rounds))}.")
        folders = tuple(folder / one["name"] for one in mine)
        vocabulary, where = _shared_vocabulary(folders)
        names = tuple(one["name"].partition("/")[2] for one in mine)
        return cls(names, folders, vocabulary, where, None, tuple(one["languages"] for one in mine))

    def __len__(self) -> int:
        return len(self.folders)

    def source(self, number: int) -> LogicalTensors:
        """An expert's weights."""
        found: LogicalTensors = open_source(self.folders[number])
        return found

    def pool(
        self, *, resident: int = 0, devices: Sequence[str] = ("cpu",), dtype: torch.dtype = torch.float32
    ) -> ExpertPool:
        """The experts as Scorers, loaded when needed; at most `resident` at once, expert e on device e mod them."""

        def maker(number: int) -> Any:
            device = devices[number % len(devices)]
            return lambda: LogicalScorer(self.source(number), dtype=dtype, device=device)

        return ExpertPool([maker(number) for number in range(len(self))], resident, len(devices))

    def scorer(self, pool: ExpertPool | None = None, settings: WeighingSettings | None = None) -> EnsembleScorer:
        """The ensemble by a rule; by the one it was exported with, if none is given."""
        return EnsembleScorer(pool or self.pool(), self.weighing_of(settings or self.weighing))

    def weighing_of(self, settings: WeighingSettings) -> Weighing:
        """The rule over these experts; a ConfigError where it cannot be."""
        divides = self.clusterer if isinstance(self.clusterer, TextClusterer) else None
        return Weighing(settings, len(self), divides, self.vocabulary)

    def route(self, language: str) -> int:
        """The expert of a language: by its clusterer, else the one with most of the language's training documents."""
        if isinstance(self.clusterer, LanguageClusterer):
            if language not in self.clusterer.clusters:
                raise ConfigError(
                    f"no cluster has '{language}': they have {', '.join(sorted(self.clusterer.clusters))}."
                )
            return self.clusterer.clusters[language]
        counts = [one.get(language, 0) for one in self.documents]
        if not any(counts):
            raise ConfigError(f"no expert was trained on '{language}', so it cannot be routed by language.")
        return max(range(len(counts)), key=lambda k: (counts[k], -k))

    def export(
        self,
        output: Path,
        *,
        to: str = "hf",
        dtype: str = "float32",
        settings: WeighingSettings | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the ensemble to a directory that needs nothing else; every expert in it is a model of its own."""
        from xlmega.weights.huggingface import export_huggingface  # transformers takes seconds to import

        chosen = settings or self.weighing
        self.weighing_of(chosen)  # refused before anything is written
        names = tuple(f"expert-{k}" for k in range(len(self)))
        with published(output, overwrite=overwrite, replaces=[NAME]) as part:
            for number, name in enumerate(names):
                values: dict[str, Any] = {"dtype": dtype, "vocabulary_folder": self.vocabulary_folder}
                if to == "hf":
                    export_huggingface(self.source(number), part / name, card={"name": name}, **values)
                else:
                    write_logical(self.source(number), part / name, **values)
            copy_folder(self.vocabulary_folder, part / "vocabulary")
            if self.clusterer is not None:
                save_clusterer(self.clusterer, part / "clusterer")
            table = {
                "format_version": FORMAT_VERSION,
                "experts": list(names),
                "documents": [dict(one) for one in self.documents],
                "weighing": config.to_table(chosen),
            }
            write_json(part / NAME, table)


def _shared_vocabulary(folders: Sequence[Path]) -> tuple[Vocabulary, Path]:
    """The vocabulary of all the models; a DataError when they were trained with different ones."""
    found: list[tuple[Vocabulary, Path]] = []
    for folder in folders:
        where = open_source(folder).vocabulary_folder
        if where is None:
            raise DataError(f"'{folder}' has no vocabulary beside its weights, so its text cannot be read.")
        found.append((load_vocabulary(where), where))
    for (vocabulary, _), folder in zip(found, folders, strict=True):
        if vocabulary.hash != found[0][0].hash:
            raise DataError(
                f"'{folder}' has vocabulary {vocabulary.hash[:12]}, but '{folders[0]}' has {found[0][0].hash[:12]}. "
                "Probabilities can be mixed only over the same ids."
            )
    return found[0]


def scorer_of(path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Scorer:
    """One model as a Scorer."""
    return LogicalScorer(open_source(path), dtype=dtype, device=device)
