"""What a run trains and validates on: every language by name, with its windows and the numbering of its ids.

In: the [data] table and the token folders it names. Out: for training, one `Language` each, clones and the second
folder's among them; for validation, sets of windows by name. A clone is nothing special: its windows are another's,
and its ids are looked up in another table. Guaranteed: what is validated on is never trained on, clones included,
unless the folder has the same text in two splits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xlmega.data.documents import DocumentWindows, document_windows
from xlmega.data.indexed import IndexedTokens, open_corpus, splits
from xlmega.data.planning import clone_name
from xlmega.data.settings import DataSettings
from xlmega.data.shares import Size
from xlmega.data.windows import Windows, num_held_out, num_windows
from xlmega.errors import ConfigError, DataError, nearest
from xlmega.text.remapping import IdSpace, cloned, plain, second
from xlmega.text.vocabulary import Vocabulary

HELD_OUT = "held_out"
"""Name of the validation set that is cut from 'train' when a root has no other split."""

AnyWindows = Windows | DocumentWindows


@dataclass(frozen=True, eq=False)
class Language:
    """A language as training or validation meets it."""

    name: str
    windows: AnyWindows
    numbering: int = 0
    """Which of the model's numberings its ids are of: 0 the first vocabulary, k clone k, 1 the second vocabulary."""
    root: int = 1
    original: str = ""
    """Of a clone: the language whose windows these are."""

    @property
    def size(self) -> Size:
        """What the shares are made of."""
        tokens = self.windows.tokens
        return Size(
            tokens=tokens.num_tokens,
            documents=tokens.num_documents,
            windows=self.windows.count,
            windows_per_document=self.windows.total / max(1, tokens.num_documents),
            root=self.root,
            original=self.original,
        )


def roots_of(settings: DataSettings) -> list[Path]:
    """The token folders of a recipe, in the order of their numberings."""
    return [Path(root) for root in (settings.root, settings.data_root_2) if root]


def open_roots(settings: DataSettings) -> list[dict[str, IndexedTokens]]:
    """The training split of each root; a ConfigError where two roots have a language of one name."""
    corpora = [open_corpus(root, "train") for root in roots_of(settings)]
    if len(corpora) == 2 and (both := sorted(set(corpora[0]) & set(corpora[1]))):
        raise ConfigError(
            f"data.root and data_root_2 both have a language '{both[0]}', so its losses could not be told apart. "
            "Tokenise one of them under another code."
        )
    return corpora


def training_languages(
    settings: DataSettings, corpora: list[dict[str, IndexedTokens]], also: Collection[str] = ()
) -> dict[str, Language]:
    """Every language that some stage of the recipe may serve (and those in `also`), by name, sorted.

    All whole windows but those held out. One DataError names every language that is too small.
    """
    wanted = _wanted(settings, corpora)
    by_name: dict[str, Language] = {}
    small: list[str] = []
    for root, corpus in enumerate(corpora, start=1):
        holds_out = _holds_out(_root(settings, root), settings)
        for name in sorted(corpus):
            copies = _copies(settings, name, root)
            if wanted is not None and not (wanted | set(also)) & set(copies):
                continue
            if corpus[name].num_tokens < 1:
                raise DataError(f"language '{name}' has 0 tokens. Give it text, or leave it out of data.languages.")
            windows = _windows(corpus[name], settings)
            if windows.count < 1 + holds_out:
                small.append(_too_small(name, windows, settings, holds_out))
                continue
            held_out = num_held_out(windows.count, settings.frac_validation) if holds_out else 0
            windows = replace(windows, count=windows.count - held_out)
            for clone, copy in enumerate(copies):
                by_name[copy] = Language(
                    copy,
                    windows,
                    numbering=clone if root == 1 else 1,
                    root=root,
                    original=name if clone else "",
                )
    _refuse_small(small, settings)
    return dict(sorted(by_name.items()))


def _copies(settings: DataSettings, name: str, root: int) -> list[str]:
    """The language and its clones."""
    clones = settings.num_cloned_languages if root == 1 else 0
    return [name, *(clone_name(name, clone) for clone in range(1, clones + 1))]


def _wanted(settings: DataSettings, corpora: Sequence[Collection[str]]) -> set[str] | None:
    """The languages that the recipe names, and all of a root of which it names none; None where it means every one."""
    by_root = [{copy for name in names for copy in _copies(settings, name, k)} for k, names in enumerate(corpora, 1)]
    if sum(map(len, by_root)) < sum(
        len(_copies(settings, name, k)) for k, names in enumerate(corpora, 1) for name in names
    ):
        raise ConfigError("a language of the corpus has the name of another's clone. Tokenise it under another code.")
    known = set().union(*by_root)
    named: set[str] = set()
    for one in (settings.token_budgets or settings.languages, *(stage.languages for stage in settings.stages)):
        for name in one or {}:
            if name not in known:
                raise ConfigError(
                    f"data.languages names '{name}', which the corpus does not have.{nearest(name, known)}"
                )
            named.add(name)
    if not (settings.token_budgets or settings.languages):
        return None
    for names in by_root:
        named |= names if not named & names else set()
    return named


def _root(settings: DataSettings, root: int) -> Path | None:
    path = settings.root if root == 1 else settings.data_root_2
    return Path(path) if path else None


def _windows(tokens: IndexedTokens, settings: DataSettings, *, partial: bool = False) -> AnyWindows:
    """All windows of a file; with `partial`, packed ones count the short window at the end."""
    length = settings.sequence_length
    if settings.windows == "documents":
        return document_windows(tokens, length, split=settings.long_documents == "split")
    return Windows(tokens, length, 0, num_windows(tokens.num_tokens, length, partial=partial))


def _too_small(name: str, windows: AnyWindows, settings: DataSettings, holds_out: bool) -> str:
    tokens = windows.tokens.num_tokens
    if settings.windows == "documents":
        return f"'{name}' makes {windows.count} windows of documents: give it more documents"
    longest = (tokens - 1) // (1 + holds_out)
    remedy = f"sequence_length={longest} would work" if longest > 0 else "no sequence_length works"
    return f"'{name}' has {tokens} tokens: {remedy}"


def _refuse_small(small: list[str], settings: DataSettings) -> None:
    if not small:
        return
    length = settings.sequence_length
    roots = [_root(settings, 1), *([_root(settings, 2)] if settings.data_root_2 else [])]
    holds_out = any(_holds_out(root, settings) for root in roots)
    needs = f"{(1 + holds_out) * length + 1} tokens for " + (
        "a window to train on and one to hold out" if holds_out else "one window"
    )
    more = f"\n  and {len(small) - 10} more" if len(small) > 10 else ""
    raise DataError(
        f"with sequence_length={length} a language needs {needs}. Too small:\n  "
        + "\n  ".join(small[:10])
        + f"{more}\n  Lower data.sequence_length, or leave them out of data.languages."
    )


def id_space(settings: DataSettings, vocabularies: Sequence[Vocabulary]) -> IdSpace:
    """The model's ids, from the vocabulary of each root."""
    first = vocabularies[0]
    if settings.num_cloned_languages:
        return cloned(first.size, settings.num_cloned_languages, settings.frac_clone, first.pad_id)
    if len(vocabularies) == 1:
        return plain(first.size)
    pieces = [[one.piece(id) for id in range(one.size)] for one in vocabularies]
    return second(*pieces, merge=settings.merge_vocab, first_pad_id=first.pad_id, second_pad_id=vocabularies[1].pad_id)


# -------------------------------------------------------------------- validation


def validation_sets(settings: DataSettings, max_windows: int) -> dict[str, dict[str, Language]]:
    """Set name -> language -> at most `max_windows` windows, in file order, sorted by name and by language.

    Every split but 'train' is a set, with those of the recipe's languages that it has, or all of its own where
    validated_languages says so; a file's short last window counts. A root without such a split gives the set
    'held_out', windows that training never serves, unless frac_validation is 0. Each language stands there with its
    clones.
    """
    if max_windows < 1:
        raise ConfigError(f"a validation set takes at least 1 window of each language, but max_windows={max_windows}.")
    sets: dict[str, dict[str, Language]] = {}
    narrowed = settings.validated_languages == "trained" and _any_named(settings)
    wanted = _wanted(settings, open_roots(settings)) if narrowed else None
    for root in range(1, 1 + len(roots_of(settings))):
        for split, languages in _sets_of_root(settings, root, max_windows, wanted).items():
            sets.setdefault(split, {}).update(languages)
    return {split: dict(sorted(languages.items())) for split, languages in sorted(sets.items()) if languages}


def _any_named(settings: DataSettings) -> bool:
    return bool(settings.languages or settings.token_budgets or any(stage.languages for stage in settings.stages))


def _sets_of_root(
    settings: DataSettings, root: int, max_windows: int, wanted: set[str] | None
) -> dict[str, dict[str, Language]]:
    folder = _root(settings, root)
    assert folder is not None
    result: dict[str, dict[str, Language]] = {}
    if _holds_out(folder, settings):
        for name, tokens in open_corpus(folder, "train").items():
            windows = _windows(tokens, settings)
            held_out = num_held_out(windows.count, settings.frac_validation)
            if held_out:
                first = windows.count - held_out
                kept = replace(windows, first=first, count=min(held_out, max_windows))
                _add(result, HELD_OUT, settings, name, kept, root, wanted)
        return result
    due = _vocabulary(open_corpus(folder, "train")) if "train" in splits(folder) else ""
    for split in _other_splits(folder):
        corpus = open_corpus(folder, split)
        due = due or _vocabulary(corpus)
        if _vocabulary(corpus) != due:
            raise DataError(
                f"split '{split}' of '{folder}' is of vocabulary {_vocabulary(corpus)[:12]}, the others of {due[:12]}. "
                "The same id would mean different things: tokenise that split again."
            )
        for name, tokens in corpus.items():
            if wanted is not None and not wanted & set(_copies(settings, name, root)):
                continue
            if tokens.num_tokens < 2:
                raise DataError(
                    f"language '{name}' has {tokens.num_tokens} tokens in split '{split}' of '{folder}', and the "
                    "fewest that can be scored are 2. Give it text, or remove its files from that split."
                )
            windows = _windows(tokens, settings, partial=True)
            kept = replace(windows, count=min(max_windows, windows.count))
            _add(result, split, settings, name, kept, root, wanted)
    return result


def _add(
    sets: dict[str, dict[str, Language]],
    split: str,
    settings: DataSettings,
    name: str,
    windows: AnyWindows,
    root: int,
    wanted: set[str] | None,
) -> None:
    copies = _copies(settings, name, root)
    if (wanted is not None and not wanted & set(copies)) or not windows.count:
        return
    for clone, copy in enumerate(copies):
        numbering = clone if root == 1 else 1
        sets.setdefault(split, {})[copy] = Language(copy, windows, numbering, root, name if clone else "")


def _other_splits(root: Path) -> list[str]:
    return sorted(split for split in splits(root) if split != "train")


def _holds_out(root: Path | None, settings: DataSettings) -> bool:
    return settings.frac_validation > 0.0 and (root is None or not _other_splits(root))


def _vocabulary(corpus: Mapping[str, IndexedTokens]) -> str:
    return next(iter(corpus.values())).manifest.vocabulary_hash
