"""Step -> this data-parallel rank's micro-batches, and the validation sets beside them.

In: languages with their windows, the model's ids, a plan and the rank's place. Out: `Batch`es of whole windows.
Guaranteed: `Batches.at(step)` is a function of its arguments alone, so resume and read-ahead need an integer; a step
holds the same slots whatever the data-parallel size and the micro-batch; an id that its vocabulary does not have never
reaches the model. Validation windows are the first of each language in file order, the same for every layout, and
every rank gets the same number of batches, as collective calls need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from xlmega.data.documents import document_numbers
from xlmega.data.languages import Language
from xlmega.data.plan import Plan
from xlmega.data.windows import Windows
from xlmega.errors import DataError, LayoutError
from xlmega.text.remapping import IdSpace


@dataclass(frozen=True, eq=False)
class Batch:
    """M micro-batches of b windows for one data-parallel rank; S targets a window."""

    tokens: NDArray[np.int64]
    """[M, b, S + 1]: inputs are all but the last id, targets all but the first."""
    weights: NDArray[np.float32]
    """[M, b, S]: 1 for a target that counts, 0 for padding."""
    languages: NDArray[np.int32]
    """[M, b]: index into the `languages` of what served the batch."""
    slots: NDArray[np.int64]
    """[M, b]: slot of the run, or place in the validation set; -1 for a window of padding."""
    windows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """[M, b]: which window of its language each is; -1 for padding."""
    served: int = 0
    """Sum of the plan's hashes of these windows, for the record."""
    documents: NDArray[np.int32] | None = None
    """[M, b, S]: which document of its window each input belongs to, where attention is kept within documents."""


@dataclass(frozen=True)
class Reading:
    """How windows become tokens."""

    ids: IdSpace
    by_documents: bool = False
    """Whether batches tell documents apart (`data.reset_attention`)."""


class Batches:
    """The training stream of one data-parallel rank, see the module."""

    def __init__(
        self,
        languages: Mapping[str, Language],
        plan: Plan,
        reading: Reading,
        *,
        micro_batch_windows: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self.plan = plan
        self.languages = plan.languages
        self._reader = _Reader([languages.get(name) for name in plan.languages], reading)
        self._place = (micro_batch_windows, dp_rank, dp_size)

    def at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0; any step, in any order."""
        assert step >= 0, step
        micro_batch_windows, dp_rank, dp_size = self._place
        count = num_micro_batches(self.plan.batch.at(step), micro_batch_windows, dp_size)
        slots = self.plan.first_slot(step) + slots_of_rank(count, micro_batch_windows, dp_rank, dp_size)
        languages, windows = self.plan.slots(slots.ravel())
        batch = self._reader.read(slots, languages, windows)
        # Of what was read, not of what should have been: an audit compares it with the plan.
        hashes = self.plan.hashes(batch.slots.ravel(), batch.languages.ravel(), batch.windows.ravel())
        return replace(batch, served=int(hashes.sum()))


def num_micro_batches(batch_windows: int, micro_batch_windows: int, dp_size: int) -> int:
    """Micro-batches that each data-parallel rank runs in a step; a LayoutError unless they divide it evenly."""
    assert dp_size >= 1, dp_size
    if batch_windows >= 1 and micro_batch_windows >= 1 and batch_windows % (dp_size * micro_batch_windows) == 0:
        return batch_windows // (dp_size * micro_batch_windows)
    asked = f"batch_windows={batch_windows} with micro_batch_windows={micro_batch_windows} on dp={dp_size}"
    rule = "batch_windows must be a multiple of dp x micro_batch_windows"
    if batch_windows < 1 or batch_windows % dp_size:
        below = max(1, batch_windows // dp_size) * dp_size
        raise LayoutError(
            f"{asked}: {rule}, and no micro-batch divides it.\n  Try batch_windows={below} or {below + dp_size}."
        )
    a_rank = batch_windows // dp_size
    fitting = [size for size in range(1, a_rank + 1) if a_rank % size == 0]
    closest = sorted(sorted(fitting, key=lambda size: abs(size - micro_batch_windows))[:2])
    raise LayoutError(f"{asked}: {rule}.\n  Try micro_batch_windows={' or '.join(map(str, closest))}.")


class ValidationBatches:
    """One validation set in batches: the languages in `languages`, one after the other, padded to whole batches.

    Iterate, or ask `at(index)`. Every data-parallel rank has the same `len`; the sets' windows are dealt to the ranks
    as a training step's slots are, so sums over ranks do not depend on dp_size.
    """

    def __init__(
        self,
        languages: Mapping[str, Language],
        reading: Reading,
        *,
        micro_batch_windows: int,
        dp_rank: int,
        dp_size: int,
        micro_batches: int = 1,
    ) -> None:
        assert languages and 0 <= dp_rank < dp_size and micro_batch_windows >= 1 and micro_batches >= 1
        self.languages: tuple[str, ...] = tuple(sorted(languages))
        self._reader = _Reader([languages[name] for name in self.languages], reading)
        self._ends = np.cumsum([languages[name].windows.count for name in self.languages])
        self._a_batch = micro_batches * micro_batch_windows * dp_size
        self._first_slots = slots_of_rank(micro_batches, micro_batch_windows, dp_rank, dp_size)

    def __len__(self) -> int:
        return int(-(-self._ends[-1] // self._a_batch))

    def __iter__(self) -> Iterator[Batch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> Batch:
        """Batch `index` of this rank."""
        assert 0 <= index < len(self), (index, len(self))
        slots = index * self._a_batch + self._first_slots
        slots = np.where(slots < self._ends[-1], slots, -1)
        flat = slots.ravel()
        languages = np.searchsorted(self._ends, flat, side="right").astype(np.int32)
        starts = np.concatenate([[0], self._ends])[languages]
        windows = np.where(flat >= 0, flat - starts, -1)
        return self._reader.read(slots, np.where(flat >= 0, languages, 0), windows)


def validation_batches(
    sets: Mapping[str, Mapping[str, Language]],
    reading: Reading,
    micro_batch_windows: int,
    dp_rank: int,
    dp_size: int,
    micro_batches: int = 1,
) -> dict[str, ValidationBatches]:
    """`ValidationBatches` of each set, under its name; a pipeline keeps busier with several micro-batches a batch."""
    return {
        name: ValidationBatches(
            languages,
            reading,
            micro_batch_windows=micro_batch_windows,
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batches=micro_batches,
        )
        for name, languages in sets.items()
    }


T = TypeVar("T")
Served = TypeVar("Served", covariant=True)


class ServesSteps(Protocol[Served]):
    """Anything with a pure `at(step)`."""

    def at(self, step: int) -> Served: ...


class _Now(Future[T]):
    """What a thread would have read, read by whoever asks for it."""

    def __init__(self, batches: ServesSteps[T], step: int) -> None:
        super().__init__()
        self._batches, self._step = batches, step

    def result(self, timeout: float | None = None) -> T:
        return self._batches.at(self._step)


class Prefetched(Generic[T]):
    """The same batches, read ahead by a thread: at most `ahead` steps are kept.

    A step that was not foreseen is read when it is asked for; an error is raised to whoever asks for its step, and to
    nobody else. One caller at a time; `close` when done.
    """

    def __init__(self, batches: ServesSteps[T], start_step: int, *, ahead: int = 2) -> None:
        assert ahead >= 1, ahead
        self._batches = batches
        self._ahead = ahead
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xlmega-batches")
        self._pending: dict[int, Future[T]] = {}
        self._expect(start_step)

    def at(self, step: int) -> T:
        """The batch of `step`; the steps after it are then read in the background."""
        if step not in self._pending:
            self._expect(step)
        batch = self._pending.pop(step)
        self._expect(step + 1)
        return batch.result()

    def close(self) -> None:
        """Stop the thread."""
        self._drop(list(self._pending))
        self._reader.shutdown(wait=True)

    def _expect(self, step: int) -> None:
        wanted = range(step, step + self._ahead)
        self._drop([other for other in self._pending if other not in wanted])
        for coming in wanted:
            if coming not in self._pending:
                self._pending[coming] = self._submit(coming)

    def _submit(self, step: int) -> Future[T]:
        try:
            return self._reader.submit(self._batches.at, step)
        except RuntimeError:  # no thread can be started: out of threads, or the interpreter is ending
            return _Now(self._batches, step)

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._pending.pop(step).cancel()


def slots_of_rank(micro_batches: int, micro_batch_windows: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """[M, b]: this rank's slots in the first step. A micro-batch of all ranks is consecutive, rank after rank."""
    micro = np.arange(micro_batches, dtype=np.int64)[:, None] * (dp_size * micro_batch_windows)
    return micro + dp_rank * micro_batch_windows + np.arange(micro_batch_windows, dtype=np.int64)


class _Reader:
    """Windows of languages, by index, to batches."""

    def __init__(self, languages: Sequence[Language | None], reading: Reading) -> None:
        self._languages = languages
        self._reading = reading
        opened = [one for one in languages if one is not None]
        self._length = opened[0].windows.sequence_length
        manifests = [one.windows.tokens.manifest if one else None for one in languages]
        self._limits = np.array([one.vocabulary_size if one else 0 for one in manifests], dtype=np.int64)
        self._numberings = np.array([one.numbering if one else 0 for one in languages], dtype=np.int64)

    def read(self, slots: NDArray[np.int64], languages: NDArray[np.int32], windows: NDArray[np.int64]) -> Batch:
        """Windows [M*b] of languages [M*b] for slots [M, b]; where the slot is -1, padding of language 0."""
        length, shape = self._length, slots.shape
        present = slots.ravel() >= 0
        # 0 is an id of every vocabulary, so padding can be embedded, and its weight says that it is nothing.
        tokens = np.zeros((slots.size, length + 1), dtype=np.int64)
        sizes = np.zeros(slots.size, dtype=np.int64)
        for row in np.flatnonzero(present).tolist():
            language = self._languages[languages[row]]
            assert language is not None, (int(languages[row]), "is not open")
            ids = language.windows.ids(int(windows[row]))
            sizes[row] = len(ids)
            tokens[row, : len(ids)] = ids
        self._check_ids(tokens, languages, windows)
        documents = None
        if self._reading.by_documents:
            documents = document_numbers(length, self._document_starts(present, languages, windows))
            documents = documents.reshape(*shape, length)
        numberings = self._numberings[languages]
        for numbering in np.unique(numberings[numberings > 0]):
            rows = present & (numberings == numbering)
            tokens[rows] = self._reading.ids.tables[numbering][tokens[rows]]
        counted = np.arange(length) < (sizes[:, None] - 1)
        if (sizes <= length).any():
            tokens[:, 1:][~counted] = 0
        return Batch(
            tokens=tokens.reshape(*shape, length + 1),
            weights=counted.astype(np.float32).reshape(*shape, length),
            languages=languages.astype(np.int32).reshape(shape),
            slots=slots,
            windows=np.where(present, windows, -1).reshape(shape),
            documents=documents,
        )

    def _document_starts(
        self, present: NDArray[np.bool_], languages: NDArray[np.int32], windows: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        found = [np.empty(0, dtype=np.int64)] * len(present)
        for row in np.flatnonzero(present).tolist():
            language = self._languages[languages[row]]
            if language is not None and isinstance(language.windows, Windows):
                found[row] = language.windows.document_starts(int(windows[row]))
        return found

    def _check_ids(self, tokens: NDArray[np.int64], languages: NDArray[np.int32], windows: NDArray[np.int64]) -> None:
        # An id out of range would end as an illegal memory access on the GPU, far from its cause.
        limits = self._limits[languages]
        if tokens.size == 0 or (tokens.min() >= 0 and (tokens.max(axis=1) < limits).all()):
            return
        row, position = (int(i) for i in np.argwhere((tokens < 0) | (tokens >= limits[:, None]))[0])
        language = self._languages[languages[row]]
        assert language is not None
        raise DataError(
            f"language '{language.name}', window {language.windows.first + int(windows[row])}, position {position} of "
            f"'{language.windows.tokens.path}' has id {tokens[row, position]}, but the vocabulary has {limits[row]} "
            "ids. The file is damaged or of another vocabulary: run tools/tokenize_corpus again."
        )
