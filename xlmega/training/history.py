"""What a run directory records of a run's data, and how a run goes on with it: the same, or with another mix.

In: RUN/run.json and the run as its recipe now says it. Out: the same run with the recorded plan, continued; or one
error. A new recipe may change shares, languages, sampling, stages and batch size; that holds from the resumed step on,
and every language goes on from its own place. What would make recorded places mean other windows is refused: other
tokens, another seed, sequence length or vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmega import config
from xlmega.data.languages import Language, open_roots, training_languages
from xlmega.data.plan import Plan, plan_from_table
from xlmega.data.planning import plan_of
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.training.recipe import CHANGES_THE_DATA, differences

if TYPE_CHECKING:
    from xlmega.training.run import Run


@dataclass(frozen=True)
class Recorded:
    """A run.json, as far as it concerns going on."""

    recipe: dict[str, Any]
    plan: Plan
    vocabulary: str
    data: dict[str, str]
    """Language -> sha256 of its tokens, for every language that the run has served."""
    changes: tuple[dict[str, Any], ...]


def read_recorded(run: Path) -> Recorded:
    """What RUN/run.json records."""
    path = run / "run.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Recorded(
            dict(told["recipe"]),
            plan_from_table(told["plan"]),
            str(told["vocabulary"]),
            dict(told["data"]),
            tuple(dict(change) for change in told["changes"]),
        )
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, CheckpointError) as error:
        raise CheckpointError(
            f"'{path}' is damaged, so what this run was cannot be known ({type(error).__name__}: {error}). Restore it."
        ) from None


def data_hashes(run: Run) -> dict[str, str]:
    """Language -> sha256 of its training tokens; a clone's are its original's."""
    return {
        name: language.windows.tokens.manifest.bin_sha256
        for name, language in run.data.items()
        if not language.original
    }


def check_same_run(run: Run, recorded: Recorded) -> None:
    """Refuse to go on with a run that is another one, whatever the step; nothing is touched."""
    changed = differences(recorded.recipe, config.to_table(run.recipe))
    moved = "data.data_root_2" if recorded.recipe["data"].get("data_root_2") and run.recipe.data.data_root_2 else ""
    refused = [f"{key}: {words}" for key, words in changed.items() if key not in {*CHANGES_THE_DATA, moved}]
    if refused:
        raise ConfigError(
            f"--resume: '{run.output}' was started with another recipe:\n  "
            + "\n  ".join(refused)
            + "\n  Give the same recipe and --set, or start a new run with init.weights set to this one. (Shares, "
            "languages, sampling, stages and batch size may change.)"
        )
    if recorded.vocabulary != run.vocabulary_hash:
        raise DataError(
            f"--resume: '{run.output}' was trained with vocabulary {recorded.vocabulary[:12]}, but "
            f"'{run.recipe.data.root}' has {run.vocabulary_hash[:12]}. Point data.root at the tokens of the first."
        )
    now = data_hashes(run)
    other = sorted(name for name, told in recorded.data.items() if now.get(name, told) != told)
    if other:
        raise DataError(
            f"--resume: '{run.output}' was trained on other tokens of {', '.join(other[:10])} than those of "
            f"'{run.recipe.data.root}', so it cannot go on where it stood. Point data.root at the tokens of the first."
        )
    gone = sorted(set(recorded.plan.mixes[-1].weights) - set(run.data))
    if gone and "data.languages" not in changed:
        raise DataError(
            f"--resume: '{run.output}' was trained on {', '.join(gone[:10])}, which '{run.recipe.data.root}' does not "
            "have. Put the tokens back, or name the languages to go on with in data.languages."
        )


def continuation(run: Run, recorded: Recorded, step: int) -> tuple[Plan, tuple[dict[str, Any], ...]]:
    """(plan, changes) of the run as it goes on from `step`; what is recorded where nothing of the data changes."""
    changed = {
        key: words
        for key, words in differences(recorded.recipe, config.to_table(run.recipe)).items()
        if key in CHANGES_THE_DATA
    }
    added = sorted(set(run.data) - set(recorded.plan.windows))
    if not changed and not added:
        return recorded.plan, recorded.changes
    plan = plan_of(
        run.recipe.data,
        {name: language.size for name, language in run.data.items()},
        run.recipe.training.batch,
        total_steps=run.recipe.training.total_steps,
        seed=run.recipe.training.seed,
        before=recorded.plan,
        at_step=step,
    )
    kept = tuple(change for change in recorded.changes if change["at_step"] < step)
    return plan, (*kept, {"at_step": step, "keys": changed, "added": added})


def languages_of(run: Run, plan: Plan, step: int) -> dict[str, Language]:
    """Every language that the plan serves from `step` on, opened: an earlier recipe's, too, before its end."""
    ends = [*(mix.from_step for mix in plan.mixes[1:]), run.recipe.training.total_steps]
    coming = {name for mix, end in zip(plan.mixes, ends, strict=True) if end > step for name in mix.weights}
    missing = coming - set(run.data)
    if not missing:
        return run.data
    found = training_languages(run.recipe.data, open_roots(run.recipe.data), also=missing)
    if missing - set(found):
        raise DataError(
            f"--resume: until its mix changes, the run goes on with {', '.join(sorted(missing - set(found))[:10])}, "
            f"which '{run.recipe.data.root}' does not have. Put the tokens back."
        )
    return {**run.data, **{name: found[name] for name in missing}}
