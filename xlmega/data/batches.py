"""Step -> this data-parallel rank's micro-batches, and the validation sets beside them.

In: a corpus of token files, the recipe's [data] table, the step's size in windows and the rank's place. Out: `Batch`es
of whole windows. Guaranteed: `Batches.at(step)` is a function of its arguments alone, so resume and read-ahead need an
integer; a step holds the same slots whatever the data-parallel size and the micro-batch; an id that the vocabulary
does not have never reaches the model. Validation windows are the first of each language in file order, the same for
every layout, and every rank gets the same number of batches, as collective calls need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xlmega.data.blend import Blend, DataSettings, shares
from xlmega.data.indexed import IndexedTokens, open_corpus, splits
from xlmega.data.windows import Windows, num_held_out, num_windows
from xlmega.errors import ConfigError, DataError, LayoutError

HELD_OUT = "held_out"
"""Name of the validation set that is cut from 'train' when the root has no other split."""


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


class Batches:
    """The training stream of one data-parallel rank, see the module."""

    def __init__(
        self,
        corpus: Mapping[str, IndexedTokens],
        settings: DataSettings,
        *,
        batch_windows: int,
        micro_batch_windows: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        self.micro_batches = num_micro_batches(batch_windows, micro_batch_windows, dp_size)
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        share = shares(settings, {name: tokens.num_tokens for name, tokens in corpus.items()})
        self.windows = training_windows({name: corpus[name] for name in share}, settings)
        self.blend = Blend(share, {name: windows.count for name, windows in self.windows.items()}, seed)
        self.languages = self.blend.languages
        self._batch_windows = batch_windows
        self._by_index = [self.windows[name] for name in self.languages]
        self._first_slots = _slots(self.micro_batches, micro_batch_windows, dp_rank, dp_size)

    def at(self, step: int) -> Batch:
        """The batch of `step`, counted from 0; any step, in any order."""
        assert step >= 0, step
        slots = step * self._batch_windows + self._first_slots
        languages, windows = self.blend.slots(slots.ravel())
        return _serve(self.languages, self._by_index, slots, languages, windows)

    def counts(self, total_steps: int) -> dict[str, int]:
        """Windows of each language in `total_steps` steps, over all ranks."""
        return self.blend.counts(total_steps * self._batch_windows)

    def epochs(self, total_steps: int) -> dict[str, float]:
        """Passes over each language in `total_steps` steps; above 1, windows repeat."""
        return self.blend.epochs(total_steps * self._batch_windows)


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


def training_windows(corpus: Mapping[str, IndexedTokens], settings: DataSettings) -> dict[str, Windows]:
    """What may be trained on of each language: all whole windows but those held out, sorted by language.

    One DataError names every language that is too small.
    """
    length = settings.sequence_length
    holds_out = _holds_out(Path(settings.root) if settings.root else None, settings)
    small = []
    for name in sorted(corpus):
        tokens = corpus[name].num_tokens
        if num_windows(tokens, length) < 1 + holds_out:
            longest = (tokens - 1) // (1 + holds_out)
            remedy = f"sequence_length={longest} would work" if longest > 0 else "no sequence_length works"
            small.append(f"'{name}' has {tokens} tokens: {remedy}")
    if small:
        needs = f"{(1 + holds_out) * length + 1} tokens for " + (
            "a window to train on and one to hold out" if holds_out else "one window"
        )
        more = f"\n  and {len(small) - 10} more" if len(small) > 10 else ""
        raise DataError(
            f"with sequence_length={length} a language needs {needs}. Too small:\n  "
            + "\n  ".join(small[:10])
            + f"{more}\n  Lower data.sequence_length, or leave them out of data.languages."
        )
    result = {}
    for name in sorted(corpus):
        count = num_windows(corpus[name].num_tokens, length)
        held_out = num_held_out(count, settings.frac_validation) if holds_out else 0
        result[name] = Windows(corpus[name], length, 0, count - held_out)
    return result


def validation_sets(root: Path, settings: DataSettings, max_windows: int) -> dict[str, dict[str, Windows]]:
    """Set name -> language -> at most `max_windows` windows, in file order, sorted by name and by language.

    Every split but 'train' is a set, with those of the recipe's languages that it has; a file's short last window
    counts. A root without such a split gives the set 'held_out', windows that `Batches` of the same settings never
    serves, unless frac_validation is 0.
    """
    if max_windows < 1:
        raise ConfigError(f"a validation set takes at least 1 window of each language, but max_windows={max_windows}.")
    if settings.root and Path(settings.root).resolve() != root.resolve():
        raise ConfigError(
            f"validation data in '{root}' and data.root='{settings.root}' differ, so training could not know what is "
            "held out. Put the validation text under data.root as a split of its own."
        )
    length = settings.sequence_length
    if _holds_out(root, settings):
        sets = {}
        for name, tokens in _chosen(open_corpus(root, "train"), settings).items():
            count = num_windows(tokens.num_tokens, length)
            held_out = num_held_out(count, settings.frac_validation)
            if held_out:
                sets[name] = Windows(tokens, length, count - held_out, min(held_out, max_windows))
        return {HELD_OUT: sets} if sets else {}
    result = {}
    due = _vocabulary(open_corpus(root, "train")) if "train" in splits(root) else ""
    for split in _other_splits(root):
        corpus = open_corpus(root, split)
        due = due or _vocabulary(corpus)
        if _vocabulary(corpus) != due:
            raise DataError(
                f"split '{split}' of '{root}' is of vocabulary {_vocabulary(corpus)[:12]}, the others of {due[:12]}. "
                "The same id would mean different things: tokenise that split again."
            )
        corpus = _chosen(corpus, settings)
        for name, tokens in corpus.items():
            if tokens.num_tokens < 2:
                raise DataError(
                    f"language '{name}' has {tokens.num_tokens} tokens in split '{split}' of '{root}', and the fewest "
                    "that can be scored are 2. Give it text, or remove its files from that split."
                )
        if corpus:
            result[split] = {
                name: Windows(tokens, length, 0, min(max_windows, num_windows(tokens.num_tokens, length, partial=True)))
                for name, tokens in corpus.items()
            }
    return result


class ValidationBatches:
    """One validation set in batches: the languages in `languages`, one after the other, padded to whole batches.

    Iterate, or ask `at(index)`. Every data-parallel rank has the same `len`; the sets' windows are dealt to the ranks
    as a training step's slots are, so sums over ranks do not depend on dp_size.
    """

    def __init__(
        self,
        windows: Mapping[str, Windows],
        *,
        micro_batch_windows: int,
        dp_rank: int,
        dp_size: int,
        micro_batches: int = 1,
    ) -> None:
        assert windows and 0 <= dp_rank < dp_size and micro_batch_windows >= 1 and micro_batches >= 1
        self.languages: tuple[str, ...] = tuple(sorted(windows))
        self._by_index = [windows[name] for name in self.languages]
        self._ends = np.cumsum([one.count for one in self._by_index])
        self._a_batch = micro_batches * micro_batch_windows * dp_size
        self._first_slots = _slots(micro_batches, micro_batch_windows, dp_rank, dp_size)

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
        return _serve(self.languages, self._by_index, slots, languages, np.where(flat >= 0, flat - starts, -1))


def validation_batches(
    sets: Mapping[str, Mapping[str, Windows]],
    micro_batch_windows: int,
    dp_rank: int,
    dp_size: int,
    micro_batches: int = 1,
) -> dict[str, ValidationBatches]:
    """`ValidationBatches` of each set, under its name; a pipeline keeps busier with several micro-batches a batch."""
    return {
        name: ValidationBatches(
            windows,
            micro_batch_windows=micro_batch_windows,
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batches=micro_batches,
        )
        for name, windows in sets.items()
    }


class ServesSteps(Protocol):
    """Anything with a pure `at(step)`."""

    def at(self, step: int) -> Batch: ...


class Prefetched:
    """The same batches, read ahead by a thread: at most `ahead` steps are kept.

    A step that was not foreseen is read when it is asked for; an error is raised to whoever asks for its step, and to
    nobody else. One caller at a time; `close` when done.
    """

    def __init__(self, batches: ServesSteps, start_step: int, *, ahead: int = 2) -> None:
        assert ahead >= 1, ahead
        self._batches = batches
        self._ahead = ahead
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xlmega-batches")
        self._pending: dict[int, Future[Batch]] = {}
        self._expect(start_step)

    def at(self, step: int) -> Batch:
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
                self._pending[coming] = self._reader.submit(self._batches.at, coming)

    def _drop(self, steps: Sequence[int]) -> None:
        for step in steps:
            self._pending.pop(step).cancel()


def _slots(micro_batches: int, micro_batch_windows: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """[M, b]: this rank's slots in the first step. A micro-batch of all ranks is consecutive, rank after rank."""
    micro = np.arange(micro_batches, dtype=np.int64)[:, None] * (dp_size * micro_batch_windows)
    return micro + dp_rank * micro_batch_windows + np.arange(micro_batch_windows, dtype=np.int64)


def _serve(
    names: Sequence[str],
    by_index: Sequence[Windows],
    slots: NDArray[np.int64],
    languages: NDArray[np.int32],
    windows: NDArray[np.int64],
) -> Batch:
    """Read windows [M*b] of languages [M*b] for slots [M, b]; where the slot is -1, padding of language 0."""
    length = by_index[0].sequence_length
    present = slots.ravel() >= 0
    # 0 is <pad>; it is an id of every vocabulary, so padding can be embedded, and its weight says that it is nothing.
    tokens = np.zeros((slots.size, length + 1), dtype=np.int64)
    weights = np.zeros((slots.size, length), dtype=np.float32)
    languages = np.where(present, languages, 0).astype(np.int32)
    for row in np.flatnonzero(present):
        ids = by_index[languages[row]].ids(int(windows[row]))
        tokens[row, : len(ids)] = ids
        weights[row, : len(ids) - 1] = 1.0
    _check_ids(names, by_index, tokens, languages, windows)
    return Batch(
        tokens.reshape(*slots.shape, length + 1),
        weights.reshape(*slots.shape, length),
        languages.reshape(slots.shape),
        slots,
    )


def _check_ids(
    names: Sequence[str],
    by_index: Sequence[Windows],
    tokens: NDArray[np.int64],
    languages: NDArray[np.int32],
    windows: NDArray[np.int64],
) -> None:
    # An id out of range would end as an illegal memory access on the GPU, far from its cause.
    limit = min(one.tokens.manifest.vocabulary_size for one in by_index)
    if tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < limit):
        return
    row, position = (int(i) for i in np.argwhere((tokens < 0) | (tokens >= limit))[0])
    one = by_index[languages[row]]
    raise DataError(
        f"language '{names[languages[row]]}', window {one.first + int(windows[row])}, position {position} of "
        f"'{one.tokens.path}' has id {tokens[row, position]}, but the vocabulary has {limit} ids. "
        "The file is damaged or of another vocabulary: run tools/tokenize_corpus again."
    )


def _other_splits(root: Path) -> list[str]:
    return sorted(split for split in splits(root) if split != "train")


def _holds_out(root: Path | None, settings: DataSettings) -> bool:
    return settings.frac_validation > 0.0 and (root is None or not _other_splits(root))


def _vocabulary(corpus: Mapping[str, IndexedTokens]) -> str:
    return next(iter(corpus.values())).manifest.vocabulary_hash


def _chosen(corpus: Mapping[str, IndexedTokens], settings: DataSettings) -> dict[str, IndexedTokens]:
    """The recipe's languages (all when it names none) that the corpus has, sorted."""
    return {name: corpus[name] for name in sorted(corpus) if not settings.languages or name in settings.languages}
