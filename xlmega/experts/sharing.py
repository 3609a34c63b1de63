"""The mix of languages that an expert is trained on: the dense model's, as far as it is in the expert's cluster.

The dense model draws language l with share s_l. An expert draws it with s_l times the part of its tokens that the
cluster holds: within a cluster, documents are seen in the proportions in which the dense model sees them, and of whole
languages that is the dense mix among them. A language of which the cluster holds less than one window cannot be
packed, and is left out. Mixes that change along the run, or are no function of sizes, cannot be scaled so: there the
recipe's rules hold within the cluster, and only the languages are picked.
"""

from __future__ import annotations

from collections.abc import Mapping

from xlmega.data.settings import DataSettings
from xlmega.data.shares import Size, weights


def expert_mix(settings: DataSettings, whole: Mapping[str, Size], part: Mapping[str, Size]) -> dict[str, float]:
    """`data.languages` of an expert: weights, or zeros where the recipe's sampling gives them, or nothing where that is
    the dense mix already, since the cluster holds whole languages.

    `whole` has the sizes of the dense model's languages, `part` of those in the cluster."""
    kept = [code for code, size in part.items() if size.windows >= 1]
    scalable = (
        settings.sampling == "temperature"
        and settings.unit == "window"
        and not (settings.stages or settings.language_schedule or settings.token_budgets)
        and not (settings.num_cloned_languages or settings.data_root_2)
    )
    if not settings.languages and all(size == whole[code] and size.windows for code, size in part.items()):
        return {}
    shares = weights(settings, whole) if scalable else settings.languages
    if kept and all(shares.get(code) for code in kept):
        return {code: shares[code] * part[code].tokens / whole[code].tokens for code in kept}
    return {} if len(kept) == len(part) and not settings.languages else dict.fromkeys(kept, 0.0)
