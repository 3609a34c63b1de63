"""Weights of every language in one stage of a run, from what the recipe says and how much of each there is.

In: the [data] table as it holds in the stage, each language's size, and how many windows the stage serves. Out:
relative weights in windows, all positive; a language that the stage does not serve is left out. A function of its
arguments.

Explicit weights stand as they are. Else a language's weight is its size to the power of 1 / temperature (size in
tokens, or in documents where the unit is a document), or what UniMax gives it. Weights of documents become weights of
windows by each language's windows per document. Clones share p_clone, taken from each language's own weight; the
languages of a second root share p_l2.
Source: METHODS §1.3 to §1.5; UniMax: Chung et al. 2023, arXiv 2304.09151, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xlmega.data.blend import Blend, quantise
from xlmega.data.settings import DataSettings
from xlmega.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class Size:
    """How much there is of a language that can be trained on."""

    tokens: int
    documents: int
    windows: int
    """To train on: an epoch."""
    windows_per_document: float = 1.0
    root: int = 1
    original: str = ""
    """Of a clone: the language whose windows these are."""


def weights(
    settings: DataSettings,
    sizes: Mapping[str, Size],
    *,
    stage_windows: int = 0,
    served: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """The weights of a stage of `stage_windows` windows, before which `served` windows of each language were served."""
    for name in (*settings.languages, *settings.token_budgets):
        if name not in sizes:
            hint = nearest(name, sizes)
            raise ConfigError(f"data.languages names '{name}', which the corpus does not have.{hint}")
    if not sizes:
        raise DataError("the corpus has no language to train on. Write one with tools/tokenize_corpus.")
    if settings.token_budgets:
        found = dict(settings.token_budgets)
    elif settings.sampling == "unimax":
        found = _unimax(settings, sizes, stage_windows, served or {})
    else:
        found = _by_group(settings, sizes)
    if settings.unit == "document":
        found = {name: weight * sizes[name].windows_per_document for name, weight in found.items()}
    total = math.fsum(found.values())
    return {name: weight / total for name, weight in sorted(found.items()) if weight > 0.0}


def _by_group(settings: DataSettings, sizes: Mapping[str, Size]) -> dict[str, float]:
    clones = [name for name in settings.languages if sizes[name].original]
    if clones and settings.p_clone:
        raise ConfigError(
            f"data.languages gives the clone '{clones[0]}' a weight of its own, and p_clone={settings.p_clone} gives "
            "it another. Drop p_clone, or leave clones out of data.languages."
        )
    originals = [name for name in sizes if not sizes[name].original]
    if not settings.p_l2:
        chosen = list(settings.languages) or [name for name in originals if sizes[name].root == 1]
        found = _weigh(settings, sizes, chosen)
    else:
        found = {}
        for root, share in ((1, 1.0 - settings.p_l2), (2, settings.p_l2)):
            named = [name for name in settings.languages if sizes[name].root == root]
            group = _weigh(settings, sizes, named or [name for name in originals if sizes[name].root == root])
            whole = math.fsum(group.values())
            found |= {name: share * weight / whole for name, weight in group.items() if share}
    if not settings.p_clone:
        return found
    with_clones = {}
    for name, weight in found.items():
        copies = [clone for clone in sizes if sizes[clone].original == name]
        with_clones[name] = weight * (1.0 - settings.p_clone)
        with_clones |= {clone: weight * settings.p_clone / len(copies) for clone in copies}
    return with_clones


def _weigh(settings: DataSettings, sizes: Mapping[str, Size], names: Iterable[str]) -> dict[str, float]:
    found = {name: settings.languages.get(name, 0.0) for name in names}
    if all(found.values()):
        return found
    amounts = {name: sizes[name].documents if settings.unit == "document" else sizes[name].tokens for name in found}
    for name, amount in amounts.items():
        if amount < 1:
            raise DataError(f"language '{name}' has 0 tokens. Give it text, or leave it out of data.languages.")
    # Logarithms, for a low temperature would overflow a power; the largest is 1.
    most = math.log(max(amounts.values()))
    return {name: math.exp((math.log(amount) - most) / settings.temperature) for name, amount in amounts.items()}


def _unimax(
    settings: DataSettings, sizes: Mapping[str, Size], stage_windows: int, served: Mapping[str, int]
) -> dict[str, float]:
    chosen = settings.languages or [name for name in sizes if not sizes[name].original and sizes[name].root == 1]
    budget = settings.budget_tokens / settings.sequence_length or float(stage_windows)
    left = {name: math.floor(settings.max_epochs * sizes[name].windows) - served.get(name, 0) for name in chosen}
    if not any(room > 0 for room in left.values()):
        return {name: float(sizes[name].windows) for name in chosen}  # all beyond the cap, which the plan then says
    targets = unimax({name: float(room) for name, room in left.items() if room > 0}, budget)
    # Apportionment rounds: take what would pass a cap away from that language, so that none ever does.
    for _ in range(50):
        found = quantise(targets)
        counts = Blend(found, dict.fromkeys(found, 1), 0).counts(stage_windows)
        over = {name: counts[name] - left[name] for name in found if counts[name] > left[name]}
        if not over or stage_windows > sum(room for room in left.values() if room > 0):
            break
        targets = {name: max(value - over.get(name, 0) * 0.75, value / 2) for name, value in targets.items()}
    return targets


def unimax(capacities: Mapping[str, float], budget: float) -> dict[str, float]:
    """How a budget is spread as evenly as the capacities allow: the smallest first, each an equal part of what is left.

    Where the budget is beyond all capacities together, every language has its capacity.
    """
    result, remaining = {}, budget
    in_order = sorted(capacities, key=lambda name: (capacities[name], name))
    for done, name in enumerate(in_order):
        result[name] = min(remaining / (len(in_order) - done), capacities[name])
        remaining -= result[name]
    return result
