"""Token files in memory, and the languages, plan and batches made of them, for tests that need no folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from xlmega.data.batches import Batches, Reading
from xlmega.data.languages import Language, training_languages
from xlmega.data.plan import Plan
from xlmega.data.planning import plan_of
from xlmega.data.settings import DataSettings
from xlmega.schedules import Stages, constant
from xlmega.text.remapping import IdSpace, cloned, plain

VOCABULARY = 30_000
EOD = 2


def in_memory(
    num_tokens: int, first: int = 3, path: str = "tokens/train/xx", vocabulary: str = "v", documents: Any = None
) -> Any:
    """Ids first, first + 1, ... with what the data layer asks of an IndexedTokens; `documents` are lengths."""
    lengths = np.array([num_tokens] if documents is None else documents, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = ((np.arange(num_tokens) + first) % VOCABULARY).astype(np.int32)
    if documents is not None:
        tokens[starts[1:] - 1] = EOD
    return SimpleNamespace(
        tokens=tokens,
        num_tokens=num_tokens,
        num_documents=len(lengths),
        document_lengths=lengths,
        document_span=lambda index: (int(starts[index]), int(starts[index + 1])),
        document_starts_within=lambda start, end: starts[:-1][(starts[:-1] >= start) & (starts[:-1] < end)],
        manifest=SimpleNamespace(vocabulary_size=VOCABULARY, vocabulary_hash=vocabulary, eod_id=EOD),
        path=Path(path),
    )


def three_languages() -> dict[str, Any]:
    return {"en": in_memory(4000, 3), "fr": in_memory(1500, 10_003), "sw": in_memory(333, 20_003)}


def settings_of(table: Mapping[str, Any] | None = None) -> DataSettings:
    return DataSettings(**{"sequence_length": 8, **(table or {})})


def languages_of(settings: DataSettings, *corpora: Any) -> dict[str, Language]:
    return training_languages(settings, list(corpora) or [three_languages()])


def plan_for(
    settings: DataSettings,
    languages: Mapping[str, Language],
    *,
    batch: int | Stages[int] = 24,
    total_steps: int = 1000,
    seed: int = 1,
    **rest: Any,
) -> Plan:
    sizes = {name: language.size for name, language in languages.items()}
    stages = constant(batch) if isinstance(batch, int) else batch
    return plan_of(settings, sizes, stages, total_steps=total_steps, seed=seed, **rest)


def ids_of(settings: DataSettings) -> IdSpace:
    if settings.num_cloned_languages:
        return cloned(VOCABULARY, settings.num_cloned_languages, settings.frac_clone)
    return plain(VOCABULARY)


def batches_of(
    corpus: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
    *,
    micro: int = 3,
    dp_rank: int = 0,
    dp_size: int = 1,
    **plan: Any,
) -> Batches:
    settings = settings_of(table)
    languages = languages_of(settings, corpus or three_languages())
    return Batches(
        languages,
        plan_for(settings, languages, **plan),
        Reading(ids_of(settings), settings.reset_attention),
        micro_batch_windows=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
