"""Which ids of a model a text's own ids are: a vocabulary as it is, its clones, or a second vocabulary.

In: a run (its recipe says), or the same settings by hand. Out: for each language of a data set the table from the ids
of its documents to the model's, and its clones as languages of their own (`en-clone1`). Evaluation counts text by the
documents' ids and scores the model's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlmega import config
from xlmega.data.languages import id_space
from xlmega.data.planning import clone_name
from xlmega.data.settings import DataSettings
from xlmega.errors import CheckpointError, ConfigError, DataError, nearest
from xlmega.evaluation.documents import LanguageDocuments
from xlmega.text.remapping import IdSpace
from xlmega.text.vocabulary import Vocabulary, load_vocabulary


@dataclass(frozen=True)
class Numberings:
    """The ids of a model."""

    space: IdSpace
    vocabularies: tuple[Vocabulary, ...]
    """The first, and the second where there is one."""
    num_clones: int = 0

    def names(self, languages: Sequence[str], vocabulary: Vocabulary) -> dict[str, tuple[str, int]]:
        """Name -> (language of the data, numbering): the languages, and their clones where these ids have clones."""
        second = len(self.vocabularies) > 1 and vocabulary.hash == self.vocabularies[1].hash
        if not second and vocabulary.hash != self.vocabularies[0].hash:
            known = " and ".join(one.hash[:12] for one in self.vocabularies)
            raise DataError(f"the data are of vocabulary {vocabulary.hash[:12]}, and the model knows {known}.")
        if second:
            return {name: (name, 1) for name in languages}
        clones = range(1, 1 + self.num_clones)
        return {
            copy: (name, number)
            for name in languages
            for number, copy in enumerate([name, *(clone_name(name, clone) for clone in clones)])
        }


def numberings_of_run(source: Any) -> Numberings | None:
    """What the run of a checkpoint says in its run.json; None for a model that is not of a run."""
    folder: Path | None = getattr(source, "folder", None)
    if folder is None or folder.parent.name != "checkpoints":
        return None
    run = folder.parent.parent
    if not (run / "run.json").is_file():
        return None
    try:
        table = json.loads((run / "run.json").read_text(encoding="utf-8"))["recipe"]["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{run / 'run.json'}' cannot be read ({error!r}). Restore it.") from None
    settings = config.build(DataSettings, table, what=f"{run / 'run.json'}, data")
    folders = [run / "vocabulary", *([run / "vocabulary_2"] if settings.data_root_2 else [])]
    return _numberings(settings, [load_vocabulary(folder) for folder in folders])


def numberings_by_hand(
    vocabularies: Sequence[Vocabulary], *, num_clones: int = 0, frac_clone: float = 1.0, merge: bool = False
) -> Numberings:
    """The ids of a model that was trained so."""
    if num_clones and len(vocabularies) > 1:
        raise ConfigError("a model has clones or a second vocabulary, not both.")
    if merge and len(vocabularies) < 2:
        raise ConfigError("there is no second vocabulary to merge.")
    settings = replace(DataSettings(), num_cloned_languages=num_clones, frac_clone=frac_clone, merge_vocab=merge)
    return _numberings(settings, vocabularies)


def _numberings(settings: DataSettings, vocabularies: Sequence[Vocabulary]) -> Numberings:
    return Numberings(id_space(settings, vocabularies), tuple(vocabularies), settings.num_cloned_languages)


def numbered(
    languages: dict[str, LanguageDocuments], vocabulary: Vocabulary, numberings: Numberings, wanted: Sequence[str] = ()
) -> dict[str, LanguageDocuments]:
    """The languages and their clones, or those of them that are `wanted`, each with its table of ids."""
    known = numberings.names(list(languages), vocabulary)
    for name in wanted:
        if name not in known:
            raise DataError(f"there is no language '{name}'.{nearest(name, known)}")
    plain = numberings.space.is_plain
    return {
        name: replace(
            languages[known[name][0]], name=name, numbering=None if plain else numberings.space.tables[known[name][1]]
        )
        for name in (dict.fromkeys(wanted) if wanted else known)
    }
