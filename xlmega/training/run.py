"""A run resolved: everything that can be known, checked and refused before a process group or a GPU is touched.

In come a recipe, a DeepSpeed file, a layout and a run directory; out goes a frozen `Run` that the loop executes, or one
error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from xlmega import __version__, config
from xlmega.data.batches import Batches, Reading, num_micro_batches
from xlmega.data.indexed import IndexedTokens, damage, open_corpus, splits
from xlmega.data.languages import Language, id_space, open_roots, roots_of, training_languages, validation_sets
from xlmega.data.plan import Plan, first_slot
from xlmega.data.planning import check_cap, plan_of
from xlmega.data.windows import MAX_SIZE
from xlmega.errors import CheckpointError, ConfigError, DataError, XlmegaError, nearest
from xlmega.locking import LOCK_NAME, held
from xlmega.models.config import check_layout, differences
from xlmega.parallel.groups import words_of_all
from xlmega.parallel.layout import Layout, check_interleaving
from xlmega.parallel.preflight import TOKEN, code_hash
from xlmega.text.remapping import IdSpace
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.training.checkpoint import list_checkpoints, open_source
from xlmega.training.history import (
    Recorded,
    check_same_run,
    continuation,
    data_hashes,
    languages_of,
    read_recorded,
)
from xlmega.training.recipe import Recipe
from xlmega.training.runtime import Runtime, check_pair
from xlmega.weights.directory import check_shapes, copy_folder, write_json
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import LogicalSource

VOCABULARIES = ("vocabulary", "vocabulary_2")
"""Folders of a run directory: the vocabulary of each root."""
PACKAGES = ("torch", "megatron-core", "deepspeed", "sentencepiece", "numpy", "transformer-engine", "apex")


@dataclass(frozen=True)
class Run:
    """A recipe on a layout, with its data opened."""

    recipe: Recipe
    runtime: Runtime
    layout: Layout
    output: Path
    recompute: str
    data: dict[str, Language]
    """Every language that the recipe may serve, by name, opened; clones and the second root's among them."""
    vocabularies: tuple[Vocabulary, ...]
    """Of each root."""
    ids: IdSpace
    """The model's ids."""
    plan: Plan
    micro_batches: int
    """Most of each data-parallel rank in a step."""
    stop_at: int
    """Updates after which to save and end."""
    save_asynchronously: bool = False
    """Train on while a checkpoint is written from a copy."""
    changes: tuple[dict[str, Any], ...] = ()
    """What resumes have changed of the recipe: each with `at_step` and the keys."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages, in the order of a batch's indices."""
        return self.plan.languages

    @property
    def vocabulary(self) -> Vocabulary:
        """The first root's."""
        return self.vocabularies[0]

    @cached_property
    def vocabulary_hash(self) -> str:
        """What an id means: the vocabulary's hash, or that of all vocabularies and how their ids are combined."""
        if self.ids.is_plain:
            return self.vocabulary.hash
        parts = [*(vocabulary.hash for vocabulary in self.vocabularies), self.ids.hash]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @cached_property
    def piece_bytes(self) -> npt.NDArray[np.int32]:
        """[ids]: how many UTF-8 bytes of text each of the model's ids stands for."""
        return self.ids.gather([vocabulary.piece_bytes for vocabulary in self.vocabularies])

    @property
    def reading(self) -> Reading:
        """How windows become batches."""
        return Reading(self.ids, self.recipe.data.reset_attention)

    def identity(self) -> dict[str, str]:
        """What must be the same on every rank of the run, in short."""
        told = {
            "recipe": config.to_table(self.recipe),
            "ds_config": dict(self.runtime.settings),
            "data": data_hashes(self),
            "plan": self.plan.to_table(),
        }
        hashes = {key: hashlib.sha256(json.dumps(told[key], sort_keys=True).encode()).hexdigest()[:16] for key in told}
        return {"xlmega's code": code_hash(), **hashes, **versions()}

    def batches(self, dp_rank: int) -> Batches:
        """The training stream of one data-parallel rank."""
        return Batches(
            self.data,
            self.plan,
            self.reading,
            micro_batch_windows=self.runtime.micro_batch_windows,
            dp_rank=dp_rank,
            dp_size=self.layout.dp,
        )

    def tokens(self, step: int) -> int:
        """Targets that the steps before `step` serve, padding of short documents among them."""
        return self.plan.first_slot(step) * self.recipe.data.sequence_length


def resolve(
    recipe: Recipe,
    runtime: Runtime,
    layout: Layout,
    output: Path,
    *,
    recompute: str = "none",
    stop_at: int = 0,
    save_asynchronously: bool = False,
) -> Run:
    """Check recipe, data, model, layout and precision against one another and open the data."""
    if not recipe.data.root:
        raise ConfigError("the recipe has no data: give --set data.root=FOLDER, as tools/tokenize_corpus.py writes it.")
    check_pair(runtime, layout)
    _check_documents(recipe)
    corpora = open_roots(recipe.data)
    vocabularies = tuple(map(_vocabulary_of, roots_of(recipe.data), corpora))
    ids = id_space(recipe.data, vocabularies)
    recipe = replace(recipe, model=_sized(recipe, ids))
    check_layout(layout, recipe.model, recipe.data.sequence_length)
    training = recipe.training
    if not 0 <= stop_at <= training.total_steps:
        raise ConfigError(
            f"--stop_at {stop_at} is not a step of this run: training.total_steps is {training.total_steps}."
        )
    if first_slot(training.batch, training.total_steps) > MAX_SIZE:
        raise ConfigError(
            f"training.total_steps={training.total_steps} x batch_windows={training.batch_windows} is more windows "
            f"than can be numbered ({MAX_SIZE}). Lower either."
        )
    data = training_languages(recipe.data, corpora)
    sizes = {name: language.size for name, language in data.items()}
    plan = plan_of(recipe.data, sizes, training.batch, total_steps=training.total_steps, seed=training.seed)
    stop_at = stop_at or training.total_steps
    run = Run(
        recipe, runtime, layout, output, recompute, data, vocabularies, ids, plan, 0, stop_at, save_asynchronously
    )
    sets = validation_sets(recipe.data, training.validation_windows)  # that they open, before anything starts
    best = training.keep_best.partition("/")[0]
    if best and best not in sets:
        raise ConfigError(f"training.keep_best names the validation set '{best}'.{nearest(best, sets)}")
    return planned(run, plan)


def planned(run: Run, plan: Plan, first_step: int = 0) -> Run:
    """The run with that plan, once its steps from `first_step` on suit layout, micro-batches and the cap on epochs."""
    starts = [start for start in plan.batch.starts if start > first_step]
    micro_batches = []
    for size in sorted({plan.batch.at(step) for step in (first_step, *starts)}):
        micro_batches.append(num_micro_batches(size, run.runtime.micro_batch_windows, run.layout.dp))
        check_interleaving(run.layout, micro_batches[-1])
    check_cap(run.recipe.data, plan, run.recipe.training.total_steps)
    return replace(run, plan=plan, micro_batches=max(micro_batches))


def continued(run: Run, recorded: Recorded, step: int) -> Run:
    """The run as it goes on from `step`, with what its directory records of it."""
    plan, changes = continuation(run, recorded, step)
    return planned(replace(run, data=languages_of(run, plan, step), changes=changes), plan, step)


def _vocabulary_of(root: Path, corpus: dict[str, IndexedTokens]) -> Vocabulary:
    """The vocabulary in a token folder, once its tokens are of it."""
    folder = root / "vocabulary"
    vocabulary = load_vocabulary(folder)
    told = next(iter(corpus.values())).manifest.vocabulary_hash
    if vocabulary.hash != told:
        raise DataError(
            f"the tokens of '{root}' were made with vocabulary {told[:12]}, but '{folder}' is {vocabulary.hash[:12]}. "
            "The same id would mean different things: run tools/tokenize_corpus.py again."
        )
    for name, tokens in corpus.items():
        if tokens.manifest.max_id >= vocabulary.size or tokens.manifest.vocabulary_size != vocabulary.size:
            raise DataError(
                f"the manifest '{tokens.path}.json' tells of ids to {tokens.manifest.max_id} in a vocabulary of "
                f"{tokens.manifest.vocabulary_size}, but '{folder}' has {vocabulary.size} ids. Tokenise '{name}' again."
            )
    return vocabulary


def _check_documents(recipe: Recipe) -> None:
    """Refuse to tell documents apart in a model whose attention cannot."""
    model = recipe.model
    if recipe.data.reset_attention and (model.attention_dropout or model.backpack_variant):
        what = "attention_dropout is drawn" if model.attention_dropout else "a Backpack's senses are mixed"
        raise ConfigError(
            f"data.reset_attention=true: {what} over whole windows. "
            "Set model.attention_dropout=0, use another family, or data.windows=documents."
        )


def _sized(recipe: Recipe, ids: IdSpace) -> Any:
    """The model with its number of ids: the vocabulary's, or more where the recipe says so."""
    asked = recipe.model.vocab_size
    if asked and asked < ids.size:
        whose = "the vocabulary" if ids.is_plain else "the combined vocabulary"
        raise DataError(
            f"model.vocab_size={asked}, but {whose} of '{recipe.data.root}' has {ids.size} ids. "
            "Leave model.vocab_size at 0 to take the vocabulary's size, or tokenise with a smaller vocabulary."
        )
    return replace(recipe.model, vocab_size=asked or ids.size)


def data_damage(run: Run, share: int = 0, shares: int = 1) -> str:
    """What the checksums say is wrong with the token files ('' if nothing); `share` of `shares` divides the hashing."""
    served = {language.original or name for name, language in run.data.items()}
    files = [
        root / split / name
        for root in roots_of(run.recipe.data)
        for split in splits(root)
        for name in open_corpus(root, split)
        if name in served
    ]
    return damage(files, share, shares)


def first_weights(recipe: Recipe) -> LogicalSource:
    """Where the weights of step 0 come from: `init.weights`, which must have the recipe's shapes, or the seed."""
    shapes = logical_shapes(recipe.model)
    if not recipe.init.weights:
        return InitialWeights(recipe.model, recipe.training.seed, shapes)
    source = open_source(Path(recipe.init.weights))
    if different := differences(source.config, recipe.model):
        raise ConfigError(
            f"init.weights='{recipe.init.weights}' is another model than the recipe's: {'; '.join(different)} (there "
            "and here). Its weights would mean something else: set these keys of [model] to its values."
        )
    check_shapes(recipe.init.weights, {name: source.shape(name) for name in source.names()}, shapes)
    return cast(LogicalSource, source)


# -------------------------------------------------------------------- run directory

# What lies in a run directory before run.json does; what watches over it may have written of ranks lost by then.
_BEGINNINGS = {
    LOCK_NAME, "hang", "stop", "checkpoints", "run.json.part", *VOCABULARIES, *(f"{name}.part" for name in VOCABULARIES)
}  # fmt: skip


_ORPHAN_SECONDS = 240.0
"""In which ranks that lost the others have ended: their watchdogs see to it."""


def check_output(run: Run, *, resume: bool) -> Recorded | None:
    """Refuse a run directory that is occupied, unwritable or of another run; nothing is created.

    What is recorded there of the run that goes on, for `continued`; None where one begins.
    """
    try:
        return _check_output(run, run.output, resume)
    except OSError as error:
        raise CheckpointError(f"--output '{run.output}' cannot be used: {error.strerror}.") from None


def _check_output(run: Run, output: Path, resume: bool) -> Recorded | None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"--output '{output}' is a file; a run needs a directory.")
    above = output
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise CheckpointError(f"--output '{output}' cannot be made: '{above}' is a file. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(f"--output '{output}' cannot be written: no permission in '{above}'.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    names = {name for name in names if not name.startswith(TOKEN)}  # of a start that was killed while ranks met
    if names <= _BEGINNINGS and not list_checkpoints(output):  # new, or killed before it had begun
        return None
    if not resume:
        state = f"checkpoints of steps {list_checkpoints(output)}" if list_checkpoints(output) else "files"
        way = "Go on with --resume, or choose another." if names & {"run.json", "checkpoints"} else "Choose another."
        raise CheckpointError(f"--output '{output}' is occupied: it has {state}. {way}")
    if not (output / "run.json").is_file():
        raise CheckpointError(
            f"--resume: '{output}' is not empty and not a run (no run.json). Choose another --output."
        )
    recorded = read_recorded(output)
    check_same_run(run, recorded)
    return recorded


def occupy(run: Run, stack: contextlib.ExitStack, *, resume: bool, recorded: Recorded | None = None) -> None:
    """Have rank 0 hold the run directory until `stack` closes, or learn who does; every rank calls it."""
    problem = ""
    if dist.get_rank() == 0:
        try:
            stack.enter_context(held(run.output, wait_seconds=_ORPHAN_SECONDS if _is_requeued() else 0.0))
            if check_output(run, resume=resume) != recorded:  # another run may have come in between
                problem = f"'{run.output}' was changed by another run just now. Start again with --resume."
        except XlmegaError as error:
            problem = str(error)
    told = words_of_all(problem)[0]
    if told:
        raise CheckpointError(told)


def _is_requeued() -> bool:
    """Whether Slurm started this job again: ranks of the time before may live on a node that was cut off."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def create_output(run: Run) -> None:
    """Make the run directory and write what the run is; one process calls it."""
    try:
        (run.output / "checkpoints").mkdir(parents=True, exist_ok=True)
        for root, name in zip(roots_of(run.recipe.data), VOCABULARIES, strict=False):
            if not (run.output / name).is_dir():
                part = run.output / f"{name}.part"
                shutil.rmtree(part, ignore_errors=True)
                copy_folder(root / "vocabulary", part)
                part.rename(run.output / name)
        part = write_json(run.output / "run.json.part", facts(run))
        part.replace(run.output / "run.json")
    except OSError as error:
        error_of_ours = CheckpointError(f"--output '{run.output}' cannot be written: {error.strerror}.")
        error_of_ours.of_one_rank = True
        raise error_of_ours from None


def facts(run: Run) -> dict[str, Any]:
    """What a run directory says of its run: the resolved recipe, how it is executed, and every version."""
    return {
        "xlmega": __version__,
        "command": sys.argv,
        "recipe": config.to_table(run.recipe),
        "ds_config": dict(run.runtime.settings),
        "layout": run.layout.describe(),
        "recompute": run.recompute,
        "vocabulary": run.vocabulary_hash,
        "data": data_hashes(run),
        "plan": run.plan.to_table(),
        "changes": list(run.changes),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
