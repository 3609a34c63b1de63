"""Logical checkpoints: written by all ranks, published whole, read by any layout or by none.

In comes an Engine at a step; out goes `RUN/checkpoints/step-00000100/` with the fp32 weights and both moments under
logical names, in safetensors with a manifest of checksums. A tensor is stored in the pieces that ranks hold, each
named `kind/logical.name[rows,columns]`, so any slice can be read by whatever layout asks, with no offline step.
Guaranteed: a checkpoint is in place complete or not at all (`*.part`, fsync, rename); one that fails its checksums is
passed over by name; nothing is unpickled; reading needs neither deepspeed nor a process group.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from xlmega import config as tables
from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig
from xlmega.parallel.groups import words_of_all
from xlmega.weights.directory import MODEL_NAME, open_logical_directory, safetensors_header, sync_folder, write_json
from xlmega.weights.names import logical_shapes

if TYPE_CHECKING:
    from xlmega.training.engine import Engine
    from xlmega.weights.shards import Shard

FORMAT_VERSION = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_HASH_BLOCK_BYTES = 1 << 22


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


# -------------------------------------------------------------------- writing


def save(engine: Engine, run: Path, step: int, facts: Mapping[str, Any]) -> Path:
    """Write and publish the checkpoint of `step` (updates done); every rank calls it. `facts` goes into the manifest.

    A CheckpointError on every rank when any rank could not write; what is published already stays as it is.
    """
    final = folder_of(run, step)
    part = final.with_name(final.name + ".part")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        part.mkdir(parents=True)
    dist.barrier()
    problem = ""
    try:
        entry = _write_rank(engine, part / f"rank-{rank:05d}.safetensors")
        write_json(part / f"rank-{rank:05d}.json", entry)
    except OSError as error:
        problem = f"rank {rank}: {error}"
    _agree_or_raise(problem, f"checkpoint of step {step} could not be written to '{part}'")
    try:
        if rank == 0:
            _publish(engine, part, final, step, facts)
    except OSError as error:
        problem = f"rank 0: {error}"
    _agree_or_raise(problem, f"checkpoint of step {step} could not be published as '{final}'")
    return final


def _write_rank(engine: Engine, path: Path) -> dict[str, Any]:
    """This rank's pieces, one tensor in memory at a time; the checksum is taken in the write stream."""
    owned = _owned(engine)
    shapes = {
        piece_name(kind, shard.name, shard.shape, shard.slices): _piece_shape(shard)
        for kind in KINDS
        for shard, _, mine in owned
        if mine
    }
    digest = hashlib.sha256()
    failure: OSError | None = None
    with path.open("wb") as file:

        def write(data: Any) -> None:
            nonlocal failure
            digest.update(data)
            try:
                if failure is None:
                    file.write(data)
            except OSError as error:  # the reads below are collective: go on with them, then say so
                failure = error

        write(safetensors_header(shapes, torch.float32))
        for kind in KINDS:
            for shard, parameter, mine in owned:
                value = engine.read_state(shard, parameter, kind)  # collective over the data-parallel group
                if mine:
                    write(value.view(torch.uint8).numpy().data)
        if failure is not None:
            raise failure
        file.flush()
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest(), "pieces": list(shapes)}


def _owned(engine: Engine) -> list[tuple[Shard, torch.nn.Parameter, bool]]:
    """Every shard, and whether this rank is the one that stores it: replicas take turns."""
    layout = engine.layout
    tp_rank, dp_rank, _ = layout.coordinates(dist.get_rank())
    return [
        (
            shard,
            parameter,
            not shard.is_copy and index % layout.dp == dp_rank and (shard.axis is not None or tp_rank == 0),
        )
        for index, (shard, parameter) in enumerate(engine.shards)
    ]


def _publish(engine: Engine, part: Path, final: Path, step: int, facts: Mapping[str, Any]) -> None:
    entries = [json.loads(path.read_text()) for path in sorted(part.glob("rank-*.json"))]
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "layout": engine.layout.describe(),
        "precision": engine.runtime.precision,
        "zero_stage": engine.runtime.zero_stage,
        "loss_scale": engine.loss_scale,
        "model": tables.to_table(engine.model),
        "facts": dict(facts),
        "files": entries,
    }
    manifest["sha256"] = _manifest_digest(manifest)
    write_json(part / "manifest.json", manifest)
    for path in part.glob("rank-*.json"):
        path.unlink()
    sync_folder(part)
    if final.exists():  # the same step again, after a resume that passed a damaged one over
        shutil.rmtree(final)
    part.rename(final)
    sync_folder(final.parent)


def _agree_or_raise(problem: str, what: str) -> None:
    """Raise on every rank when any has a problem; the first one's words are told everywhere."""
    found = [one for one in words_of_all(problem) if one]
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found[:4])}. The checkpoints before it are untouched.")


def prune(run: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, just saved (0 keeps all); one process calls it.

    Later ones are damaged: the run was resumed before them and will write them again. They are not counted, or a
    damaged one would be kept in place of the good one.
    """
    found = [one for one in list_checkpoints(run) if one <= step]
    for step in found[: max(0, len(found) - keep)] if keep else ():
        shutil.rmtree(folder_of(run, step), ignore_errors=True)


# -------------------------------------------------------------------- reading


def piece_name(kind: str, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> str:
    """'weight/decoder.final_layernorm.bias[0:64]': what a piece is, readable by eye and by `_parse`."""
    spans = ",".join(f"{s.indices(n)[0]}:{s.indices(n)[1]}" for s, n in zip(slices, shape, strict=True))
    return f"{kind}/{name}[{spans}]"


def _piece_shape(shard: Shard) -> tuple[int, ...]:
    return tuple(s.indices(n)[1] - s.indices(n)[0] for s, n in zip(shard.slices, shard.shape, strict=True))


def _parse(piece: str) -> tuple[str, str, tuple[tuple[int, int], ...]]:
    match = re.fullmatch(r"(\w+)/([\w.]+)\[([\d:,]+)\]", piece)
    if not match:
        raise CheckpointError(f"'{piece}' is not the name of a piece.")
    spans = tuple((int(a), int(b)) for a, b in (span.split(":") for span in match[3].split(",")))
    return match[1], match[2], spans


class Checkpoint:
    """A published checkpoint: logical tensors in fp32, whole or in slices."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.step: int = self.manifest["step"]
        self.config: ModelConfig = tables.build(ModelConfig, self.manifest["model"], what=str(folder))
        self._shapes = logical_shapes(self.config)
        self._pieces: dict[tuple[str, str], list[tuple[tuple[tuple[int, int], ...], Path, str]]] = {}
        for entry in self.manifest["files"]:
            for piece in entry["pieces"]:
                kind, name, spans = _parse(piece)
                self._pieces.setdefault((kind, name), []).append((spans, folder / entry["file"], piece))
        missing = [name for name in self._shapes if ("weight", name) not in self._pieces]
        if missing:
            raise CheckpointError(f"'{folder}' lacks {missing[0]} and {len(missing) - 1} more. It is incomplete.")

    @property
    def vocabulary_folder(self) -> Path | None:
        """The vocabulary that the run keeps beside its checkpoints."""
        folder = self.folder.parent.parent / "vocabulary"
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        """Every logical name, in the order in which the model computes."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole weight in fp32."""
        return self.read_slice(name, tuple(slice(None) for _ in self._shapes[name]))

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the weight in fp32."""
        return self._read("weight", name, slices)

    def moment(self, kind: str) -> Moment:
        """'exp_avg' or 'exp_avg_sq', as a LogicalSource."""
        return Moment(self, kind)

    def _read(self, kind: str, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        shape = self._shapes[name]
        wanted = [s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)]
        out = torch.empty([b - a for a, b in wanted])
        filled = 0
        for spans, path, piece in self._pieces[kind, name]:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, spans, strict=True)]
            if any(a >= b for a, b in common):
                continue
            there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, spans, strict=True))
            here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, wanted, strict=True))
            try:
                with safe_open(path, framework="pt") as file:
                    out[here] = file.get_slice(piece)[there]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{path}' cannot be read: {error}.") from None
            filled += out[here].numel()
        if filled != out.numel():
            raise CheckpointError(f"'{self.folder}' has only {filled} of {out.numel()} values of {kind}/{name}.")
        return out


@dataclasses.dataclass(frozen=True)
class Moment:
    """One of Adam's moments in a checkpoint."""

    checkpoint: Checkpoint
    kind: str

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the moment in fp32."""
        return self.checkpoint._read(self.kind, name, slices)


def list_checkpoints(run: Path) -> list[int]:
    """Steps that have a published checkpoint, ascending."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def damage(folder: Path, share: int = 0, shares: int = 1) -> Iterator[str]:
    """What is wrong with a checkpoint, in words; `share` of `shares` divides the hashing among processes."""
    try:
        manifest = _read_manifest(folder)
    except CheckpointError as error:
        yield str(error)
        return
    told = re.fullmatch(r"step-(\d{8,})", folder.name)
    if told and int(told[1]) != manifest["step"]:
        yield f"'{folder}' holds the checkpoint of step {manifest['step']}: it was renamed or exchanged."
    for entry in manifest["files"][share::shares]:
        path = folder / entry["file"]
        if not path.is_file():
            yield f"'{path}' is missing."
        elif path.stat().st_size != entry["bytes"]:
            yield f"'{path}' has {path.stat().st_size} bytes, not the {entry['bytes']} that were written."
        elif _digest(path) != entry["sha256"]:
            yield f"'{path}' is not what was written: its sha256 differs."


def newest(run: Path, say: Any = print) -> Checkpoint | None:
    """The newest checkpoint that verifies, saying which it passed over and why; every rank of a run calls it.

    None where there is no checkpoint at all; a CheckpointError where there are some and none verifies.
    With a process group the files are hashed by all ranks together; without, by this process.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    steps = list_checkpoints(run)
    for step in reversed(steps):
        problem = next(damage(folder_of(run, step), rank, size), "")
        problems = [words for words in (words_of_all(problem) if grouped else [problem]) if words]
        if not problems:
            return Checkpoint(folder_of(run, step))
        say(f"passing over the checkpoint of step {step}: {problems[0]}")
    if steps:
        raise CheckpointError(
            f"every checkpoint of '{run}' is damaged (steps {', '.join(map(str, steps))}). Restore one from a copy, or "
            "start again in another directory: going on from step 0 would overwrite what this run has told so far."
        )
    return None


def open_run(path: Path) -> Checkpoint:
    """The newest good checkpoint of a run directory, or the checkpoint that `path` is."""
    if (path / "manifest.json").is_file():
        problems = list(damage(path))
        if problems:
            raise CheckpointError(problems[0])
        return Checkpoint(path)
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"'{path}' holds no checkpoint. A run directory has checkpoints/step-*/manifest.json; one is written at "
            "training.save_every_steps and at the end."
        )
    return found


def open_source(path: Path, config_folder: Path | None = None) -> Any:
    """LogicalTensors with `vocabulary_folder` and `read_slice`, whatever kind of directory or file `path` is.

    `config_folder` has the config.json of another trainer's files that lie without one.
    """
    if (path / MODEL_NAME).is_file():
        return open_logical_directory(path)
    # transformers takes seconds to import, and the files of a run need none of it.
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        from xlmega.weights.huggingface import open_huggingface

        return open_huggingface(path)
    if (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return open_run(path)
    from xlmega.weights.foreign import is_foreign, open_foreign

    if is_foreign(path):
        return open_foreign(path, config_folder)
    if not path.is_dir():
        raise CheckpointError(
            f"there is no directory '{path}', and no file of torch.save either (.pt, .bin). Give a run, checkpoint, "
            "Hugging Face or logical directory, or another trainer's files."
        )
    if (path / "config.json").is_file():
        from xlmega.weights.huggingface import open_huggingface

        return open_huggingface(path)
    return open_run(path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"'{path}' is not a checkpoint's manifest.") from None
    if told != _manifest_digest(manifest):
        raise CheckpointError(f"'{path}' is not what was written: its own checksum differs.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' has format {manifest['format_version']}; this xlmega reads {FORMAT_VERSION}.")
    return manifest


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
