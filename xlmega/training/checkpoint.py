"""Logical checkpoints as they lie on the disk: what is in one, whether it is whole, and any slice of it for any layout.

`RUN/checkpoints/step-00000100/` holds the fp32 weights and both moments under logical names, in safetensors, and a
manifest with every file's checksum and all that is not a tensor. A tensor is stored in the pieces that ranks held, each
named `kind/logical.name[rows,columns]`, so any slice can be read by whatever layout asks, with no offline step.
`training.saving` writes them. Guaranteed: one that fails its checksums is passed over by name; nothing is unpickled; no
more is read than was asked for; reading needs neither deepspeed nor a process group.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from xlmega import config as tables
from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig
from xlmega.parallel.groups import words_of_all
from xlmega.weights import storage
from xlmega.weights.directory import MODEL_NAME, open_logical_directory
from xlmega.weights.names import logical_shapes
from xlmega.weights.storage import TensorReader, sha256_of

if TYPE_CHECKING:
    from xlmega.training.engine import Engine

FORMAT_VERSION = 2
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
LATEST = "latest"
"""Beside the checkpoints: the name of the last one published, for people and scripts. A resume looks for itself."""


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:08d}"


# -------------------------------------------------------------------- reading


def piece_name(kind: str, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> str:
    """'weight/decoder.final_layernorm.bias[0:64]': what a piece is, readable by eye and by `_parse`."""
    spans = ",".join(f"{s.indices(n)[0]}:{s.indices(n)[1]}" for s, n in zip(slices, shape, strict=True))
    return f"{kind}/{name}[{spans}]"


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
        self.manifest = read_manifest(folder)
        self.step: int = self.manifest["step"]
        self.config: ModelConfig = tables.build(ModelConfig, self.manifest["model"], what=str(folder))
        self._shapes = logical_shapes(self.config)
        self._pieces: dict[tuple[str, str], list[tuple[tuple[tuple[int, int], ...], Path, str]]] = {}
        self._open = functools.lru_cache(maxsize=64)(TensorReader)  # a world of thousands wrote as many files
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
        return self.read_kind("weight", name, slices)

    @property
    def optimizer_steps(self) -> int:
        """Updates that the moments have seen: fewer than `step` where fp16 skipped some."""
        return int(self.manifest["optimizer_steps"])

    def moment(self, kind: str) -> Moment:
        """'exp_avg' or 'exp_avg_sq', as a LogicalSource."""
        return Moment(self, kind)

    def read_kind(self, kind: str, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the weight or of a moment in fp32."""
        shape = self._shapes[name]
        wanted = [s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)]
        out = torch.empty([max(0, b - a) for a, b in wanted])
        filled = 0
        for spans, path, piece in self._pieces[kind, name]:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, spans, strict=True)]
            if any(a >= b for a, b in common):
                continue
            there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, spans, strict=True))
            here = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, wanted, strict=True))
            part = self._open(path).read(piece, there)
            if part.shape == out.shape:
                out = part  # the piece is all that was asked for: no second copy
            else:
                out[here] = part
            filled += part.numel()
        if filled != out.numel():
            raise CheckpointError(f"'{self.folder}' has only {filled} of {out.numel()} values of {kind}/{name}.")
        return out


@dataclasses.dataclass(frozen=True)
class Moment:
    """One of Adam's moments in a checkpoint."""

    checkpoint: Checkpoint
    kind: str

    def names(self) -> list[str]:
        """Every logical name."""
        return self.checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self.checkpoint.shape(name)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the moment in fp32."""
        return self.checkpoint.read_kind(self.kind, name, slices)


def list_checkpoints(run: Path) -> list[int]:
    """Steps that have a published checkpoint, ascending."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def damage(folder: Path, share: int = 0, shares: int = 1) -> Iterator[str]:
    """What is wrong with a checkpoint, in words; `share` of `shares` divides the hashing among processes."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        yield str(error)
        return
    told = re.fullmatch(r"step-(\d{8,})", folder.name)
    if told and int(told[1]) != manifest["step"]:
        yield f"'{folder}' holds the checkpoint of step {manifest['step']}: it was renamed or exchanged."
    for entry in manifest["files"][share::shares]:
        path = folder / entry["file"]
        try:
            if not path.is_file():
                yield f"'{path}' is missing."
            elif path.stat().st_size != entry["bytes"]:
                yield f"'{path}' has {path.stat().st_size} bytes, not the {entry['bytes']} that were written."
            elif sha256_of(path) != entry["sha256"]:
                yield f"'{path}' is not what was written: its sha256 differs."
        except OSError as error:
            yield f"'{path}' cannot be read: {error.strerror}."


def figure_of(folder: Path, name: str) -> float | None:
    """The figure 'SET/FIGURE' of the validation that came just before this checkpoint; None where there was none."""
    one, _, figure = name.partition("/")
    try:
        value = float(read_manifest(folder)["facts"]["validation"][one][figure])
    except (CheckpointError, KeyError, TypeError):
        return None
    return value if math.isfinite(value) else None


def newest(run: Path, say: Callable[[str], Any] = print) -> Checkpoint | None:
    """The newest checkpoint that verifies, saying which it passed over and why; every rank of a run calls it.

    None where none was ever published; a CheckpointError where some were and none verifies.
    With a process group the files are hashed by all ranks together; without, by this process.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    steps, pointed = list_checkpoints(run), latest(run)
    if pointed is not None and pointed > max(steps, default=-1):
        say(f"passing over the checkpoint of step {pointed}: '{folder_of(run, pointed)}' was published and is gone")
    for step in reversed(steps):
        problem = next(damage(folder_of(run, step), rank, size), "")
        problems = [words for words in (words_of_all(problem) if grouped else [problem]) if words]
        if not problems:
            return Checkpoint(folder_of(run, step))
        say(f"passing over the checkpoint of step {step}: {problems[0]}")
    if steps or pointed is not None:
        state = f"is damaged (steps {', '.join(map(str, steps))})" if steps else "is gone"
        raise CheckpointError(
            f"every checkpoint of '{run}' {state}. Restore one from a copy, or start again in another directory: going "
            "on from step 0 would overwrite what this run has told so far."
        )
    return None


def latest(run: Path) -> int | None:
    """The step that `checkpoints/latest` names; None where there is none or it cannot be understood."""
    try:
        return int(json.loads((run / "checkpoints" / LATEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def restore(engine: Engine, found: Checkpoint) -> None:
    """Give an engine of any layout, ZeRO stage and precision the state of a checkpoint; every rank calls it."""
    engine.write_state(found, {kind: found.moment(kind) for kind in MOMENTS}, found.optimizer_steps)
    engine.loss_scaler = found.manifest["loss_scaler"]


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
    if path.name == "checkpoints" and list_checkpoints(path.parent):
        raise CheckpointError(f"'{path}' holds the checkpoints of a run. Give '{path.parent}', or one of them.")
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is not a tensor in a checkpoint; a CheckpointError if it is not what was written."""
    path = folder / "manifest.json"
    try:
        text = path.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        same = text == storage.json_text(manifest)  # 1e-5 and 1E-5 are the same number, but not the same file
        told = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"'{path}' is not a checkpoint's manifest.") from None
    if told != manifest_digest(manifest) or not same:
        raise CheckpointError(f"'{path}' is not what was written: its own checksum differs.")
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' has format {manifest['format_version']}; this xlmega reads {FORMAT_VERSION}.")
    return manifest


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The sha256 that a manifest has of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
