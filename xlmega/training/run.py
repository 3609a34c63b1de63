"""A run resolved: everything that can be known, checked and refused before a process group or a GPU is touched.

In come a recipe, a DeepSpeed file, a layout and a run directory; out goes a frozen `Run` that the loop executes, or one
error. `--dry_run` prints `summary(run)` and stops here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from xlmega import __version__, config
from xlmega.data.batches import Batches, validation_sets
from xlmega.data.indexed import IndexedTokens, damage, open_corpus, splits
from xlmega.data.windows import MAX_SIZE
from xlmega.errors import CheckpointError, ConfigError, DataError, nearest
from xlmega.models.config import check_layout
from xlmega.parallel.groups import words_of_all
from xlmega.parallel.layout import Layout, check_interleaving
from xlmega.parallel.preflight import code_hash
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.training.checkpoint import list_checkpoints, open_source
from xlmega.training.locking import LOCK_NAME, held
from xlmega.training.recipe import Recipe, differences
from xlmega.training.runtime import Runtime, check_pair
from xlmega.weights.directory import check_shapes, copy_folder, write_json
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes
from xlmega.weights.shards import LogicalSource

PACKAGES = ("torch", "megatron-core", "deepspeed", "sentencepiece", "numpy", "transformer-engine", "apex")


@dataclass(frozen=True)
class Run:
    """A recipe on a layout, with its data opened."""

    recipe: Recipe
    runtime: Runtime
    layout: Layout
    output: Path
    recompute: str
    corpus: dict[str, IndexedTokens]
    vocabulary: Vocabulary
    vocabulary_folder: Path
    micro_batches: int
    """Of each data-parallel rank in a step."""
    stop_at: int
    """Updates after which to save and end."""
    save_asynchronously: bool = False
    """Train on while a checkpoint is written from a copy."""

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages, in the order of a batch's indices."""
        return self.batches(0).languages

    def identity(self) -> dict[str, str]:
        """What must be the same on every rank of the run, in short."""
        told = {"recipe": config.to_table(self.recipe), "ds_config": dict(self.runtime.settings), "data": _hashes(self)}
        hashes = {key: hashlib.sha256(json.dumps(told[key], sort_keys=True).encode()).hexdigest()[:16] for key in told}
        return {"xlmega's code": code_hash(), **hashes, **versions()}

    def batches(self, dp_rank: int) -> Batches:
        """The training stream of one data-parallel rank."""
        return Batches(
            self.corpus,
            self.recipe.data,
            batch_windows=self.recipe.training.batch_windows,
            micro_batch_windows=self.runtime.micro_batch_windows,
            dp_rank=dp_rank,
            dp_size=self.layout.dp,
            seed=self.recipe.training.seed,
        )


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
    root = Path(recipe.data.root)
    corpus = open_corpus(root, "train")
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
    recipe = replace(recipe, model=_sized(recipe, vocabulary))
    check_layout(layout, recipe.model, recipe.data.sequence_length)
    total_steps = recipe.training.total_steps
    if not 0 <= stop_at <= total_steps:
        raise ConfigError(f"--stop_at {stop_at} is not a step of this run: training.total_steps is {total_steps}.")
    if total_steps * recipe.training.batch_windows > MAX_SIZE:
        raise ConfigError(
            f"training.total_steps={total_steps} x batch_windows={recipe.training.batch_windows} is more windows than "
            f"can be numbered ({MAX_SIZE}). Lower either."
        )
    stop_at = stop_at or total_steps
    run = Run(recipe, runtime, layout, output, recompute, corpus, vocabulary, folder, 0, stop_at, save_asynchronously)
    batches = run.batches(0)
    check_interleaving(layout, batches.micro_batches)
    sets = validation_sets(
        root, recipe.data, recipe.training.validation_windows
    )  # that they open, before anything starts
    best = recipe.training.keep_best.partition("/")[0]
    if best and best not in sets:
        raise ConfigError(f"training.keep_best names the validation set '{best}'.{nearest(best, sets)}")
    return replace(run, micro_batches=batches.micro_batches)


def _sized(recipe: Recipe, vocabulary: Vocabulary) -> Any:
    """The model with its number of ids: the vocabulary's, or more where the recipe says so."""
    asked = recipe.model.vocab_size
    if asked and asked < vocabulary.size:
        raise DataError(
            f"model.vocab_size={asked}, but the vocabulary of '{recipe.data.root}' has {vocabulary.size} ids. "
            "Leave model.vocab_size at 0 to take the vocabulary's size, or tokenise with a smaller vocabulary."
        )
    return replace(recipe.model, vocab_size=asked or vocabulary.size)


def data_damage(run: Run, share: int = 0, shares: int = 1) -> str:
    """What the checksums say is wrong with the token files ('' if nothing); `share` of `shares` divides the hashing."""
    root = Path(run.recipe.data.root)
    files = [
        root / split / name for split in splits(root) for name in open_corpus(root, split) if name in run.languages
    ]
    return damage(files, share, shares)


def first_weights(recipe: Recipe) -> LogicalSource:
    """Where the weights of step 0 come from: `init.weights`, which must have the recipe's shapes, or the seed."""
    shapes = logical_shapes(recipe.model)
    if not recipe.init.weights:
        return InitialWeights(recipe.model, recipe.training.seed, shapes)
    source = open_source(Path(recipe.init.weights))
    check_shapes(recipe.init.weights, {name: source.shape(name) for name in source.names()}, shapes)
    return cast(LogicalSource, source)


# -------------------------------------------------------------------- run directory

# What lies in a run directory before run.json does.
_BEGINNINGS = {LOCK_NAME, "checkpoints", "vocabulary", "vocabulary.part", "run.json.part"}


def check_output(run: Run, *, resume: bool) -> None:
    """Refuse a run directory that is occupied, unwritable or of another run; nothing is created."""
    try:
        _check_output(run, run.output, resume)
    except OSError as error:
        raise CheckpointError(f"--output '{run.output}' cannot be used: {error.strerror}.") from None


def _check_output(run: Run, output: Path, resume: bool) -> None:
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
    if names <= _BEGINNINGS and not list_checkpoints(output):  # new, or killed before it had begun
        return
    if not resume:
        state = f"checkpoints of steps {list_checkpoints(output)}" if list_checkpoints(output) else "files"
        raise CheckpointError(
            f"--output '{output}' is occupied: it has {state}. Go on with --resume, or choose another."
        )
    told = output / "run.json"
    if not told.is_file():
        raise CheckpointError(
            f"--resume: '{output}' is not empty and not a run (no run.json). Choose another --output."
        )
    try:
        before = json.loads(told.read_text(encoding="utf-8"))
        old, vocabulary, data = dict(before["recipe"]), str(before["vocabulary"]), dict(before["data"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"'{told}' is damaged, so what this run was cannot be known. Restore it.") from None
    changed = list(differences(old, config.to_table(run.recipe)))
    if changed:
        raise ConfigError(
            f"--resume: '{output}' was started with another recipe:\n  "
            + "\n  ".join(changed)
            + "\n  Give the same recipe and --set, or start a new run with init.weights set to this one."
        )
    if vocabulary != run.vocabulary.hash:
        raise DataError(
            f"--resume: '{output}' was trained with vocabulary {vocabulary[:12]}, but '{run.recipe.data.root}' has "
            f"{run.vocabulary.hash[:12]}. Point data.root at the tokens of the first."
        )
    known = set(run.languages) if run.recipe.data.languages else {*run.corpus, *data}
    now = facts(run)["data"]
    other = sorted(name for name in known if data.get(name) != now.get(name))
    if other:
        raise DataError(
            f"--resume: '{output}' was trained on other tokens of {', '.join(other[:10])} than those of "
            f"'{run.recipe.data.root}', so it cannot go on where it stood. Point data.root at the tokens of the first."
        )


def occupy(run: Run, stack: contextlib.ExitStack, *, resume: bool) -> None:
    """Have rank 0 hold the run directory until `stack` closes, or learn who does; every rank calls it."""
    problem = ""
    if dist.get_rank() == 0:
        try:
            stack.enter_context(held(run.output))
            check_output(run, resume=resume)  # again: another run may have come in between
        except CheckpointError as error:
            problem = str(error)
    told = words_of_all(problem)[0]
    if told:
        raise CheckpointError(told)


def create_output(run: Run) -> None:
    """Make the run directory and write what the run is; one process calls it."""
    try:
        (run.output / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not (run.output / "vocabulary").is_dir():
            part = run.output / "vocabulary.part"
            shutil.rmtree(part, ignore_errors=True)
            copy_folder(run.vocabulary_folder, part)
            part.rename(run.output / "vocabulary")
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
        "vocabulary": run.vocabulary.hash,
        "data": _hashes(run),
        "versions": {"python": platform.python_version(), **versions()},
    }


def _hashes(run: Run) -> dict[str, str]:
    return {name: tokens.manifest.bin_sha256 for name, tokens in run.corpus.items()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -------------------------------------------------------------------- what it will be


def summary(run: Run) -> str:
    """The resolved recipe, layout, memory and data of a run, for `--dry_run` and the start of a log."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    recipe, model = run.recipe, run.recipe.model
    yield "recipe"
    for name, table in config.to_table(recipe).items():
        yield f"  [{name}] " + ", ".join(f"{key}={value}" for key, value in table.items())
    how = f"{run.layout.describe()}, {run.layout.world_size} ranks, {run.runtime.describe()}"
    step = f"{run.micro_batches} micro-batches of {run.runtime.micro_batch_windows} windows"
    yield f"layout: {how}, {step}, recompute {run.recompute}"
    yield f"model: {model.num_parameters():,} parameters ({model.preset or model.family}, {model.vocab_size:,} ids)"
    yield "memory of the fullest rank, estimated:"
    parts = memory(run)
    by_part = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
    yield f"  {by_part}; together {sum(parts.values()) / 2**20:,.0f} MiB, without what Python and its libraries take"
    batches = run.batches(0)
    steps, length = recipe.training.total_steps, recipe.data.sequence_length
    counts, epochs = batches.counts(steps), batches.epochs(steps)
    windows = sum(counts.values())
    yield f"data: {windows:,} windows of {length} tokens, {windows * length:,} tokens in one stage (steps 0 to {steps})"
    for name in batches.languages:
        available = run.corpus[name].num_tokens
        repeated = "  REPEATS" if epochs[name] > 1 else ""
        yield (
            f"  {name}: {counts[name] * length:,} tokens ({100 * counts[name] / windows:.2f} %), {epochs[name]:.3f} "
            f"epochs of {available:,}{repeated}"
        )
    sets = validation_sets(Path(recipe.data.root), recipe.data, recipe.training.validation_windows)
    for name, languages in sets.items():
        yield f"validation '{name}', windows: " + ", ".join(f"{code} {one.count}" for code, one in languages.items())


def memory(run: Run) -> dict[str, float]:
    """Bytes of the rank that holds most, by part: arithmetic on shapes, not a measurement."""
    model, layout, runtime = run.recipe.model, run.layout, run.runtime
    from xlmega.models.decoder import shard_axis
    from xlmega.models.head import CHUNK_BYTES

    def held_by_rank(shapes: dict[str, tuple[int, ...]]) -> float:
        return sum(math.prod(shape) / (1 if shard_axis(name) is None else layout.tp) for name, shape in shapes.items())

    layers = -(-model.num_layers // layout.pp)
    d, w, f = model.hidden_size, model.attention_width, model.ffn_hidden_size
    layer = held_by_rank(model.layer_shapes())
    words = model.vocab_size * d / layout.tp
    ends = words * (1 if model.tied or layout.pp > 1 else 2)
    ends += held_by_rank(model.sense_shapes())
    held = layers * layer + ends + (model.max_positions * d if model.positions == "learned" else 0)
    width = 4 if runtime.precision == "fp32" else 2
    shared = layout.dp if runtime.zero_stage else 1
    tokens = runtime.micro_batch_windows * run.recipe.data.sequence_length
    in_flight = min(layout.pp, run.micro_batches)
    # Kept for the backward pass, in values per token of a layer: norms, q k v, attention and the two MLP widths.
    attention, mlp = w + model.qkv_width, (4 if model.gated_mlp else 2) * f
    kept = {
        "none": 6 * d + (attention + mlp) / layout.tp,
        "selective": 5 * d + attention / layout.tp,
        "full": d,
    }
    # A Backpack's senses, were all tokens distinct: the vectors and, in the backward pass, their fp32 gradient; and one
    # window of both. Alpha is never held.
    vectors = model.num_senses * d / layout.tp * (tokens + run.recipe.data.sequence_length) * (width + 4)
    return {
        "weights": held * width / (layout.dp if runtime.zero_stage == 3 else 1),
        "master weights": 0.0 if width == 4 and runtime.zero_stage == 0 else held * 4 / shared,
        "gradients": held * 4 / (layout.dp if runtime.zero_stage >= 2 else 1),
        "moments": held * 8 / shared,
        "activations": in_flight * tokens * width * layers * kept[run.recompute] + vectors,
        "logits": min(CHUNK_BYTES, tokens * model.vocab_size / layout.tp * width) + words * 4,
    }
