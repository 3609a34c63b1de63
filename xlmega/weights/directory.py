"""Folders of safetensors: written one tensor at a time, published whole, read lazily.

In: named tensors that are produced on demand, or a folder. Out: `model.safetensors`, or numbered shards with
`model.safetensors.index.json` where one file would be too large (the layout that the Hugging Face world reads).
A logical directory is such a folder with logical names and a `model.json` that holds the ModelConfig; a recipe can
start from it. Guaranteed: memory holds one tensor at a time; OUTPUT appears by a rename, complete, or not at all;
nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from xlmega import config as tables
from xlmega.errors import CheckpointError, ConfigError
from xlmega.locking import locked
from xlmega.models.config import ModelConfig
from xlmega.text.records import write_errors
from xlmega.weights.direct import DirectFile
from xlmega.weights.names import LogicalTensors, logical_shapes, parts_of

SHARD_BYTES = 2_000_000_000
INDEX_NAME = "model.safetensors.index.json"
MODEL_NAME = "model.json"
MODEL_FILES = (MODEL_NAME, "config.json")
"""One of them is in every folder of a model: of ours, or of transformers."""
FORMAT_VERSION = 1

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def dtype_named(name: str) -> torch.dtype:
    """One of DTYPES."""
    if name not in DTYPES:
        raise ConfigError(f"dtype '{name}' is not one that weights can be stored in. Known: {', '.join(DTYPES)}.")
    return DTYPES[name]


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in `dtype`; a CheckpointError if a value is not finite there (fp16 ends at 65504)."""
    result = tensor.to(dtype)
    # One pass without memory, a tenth of what isfinite takes; what is not a number is both the least and the largest.
    if result.numel() and not torch.isfinite(torch.stack(torch.aminmax(result))).all():
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"'{name}' has values that are not finite as {dtype}; its largest magnitude is {largest:.4g}."
            + ("\n  bfloat16 and float32 can hold it." if math.isfinite(largest) else "")
        )
    return result


@contextlib.contextmanager
def published(output: Path, *, overwrite: bool, replaces: Sequence[str] = MODEL_FILES) -> Iterator[Path]:
    """A fresh `OUTPUT.part` to write into, renamed to `output` at the end; removed if the writing fails.

    One process at a time; what a disk refuses is a CheckpointError. See `check_free` for what may be replaced.
    """
    check_free(output, overwrite=overwrite, replaces=replaces)
    with locked(output):
        check_free(output, overwrite=overwrite, replaces=replaces)  # another may have come in between
        part = output.with_name(output.name + ".part")
        try:
            remove_any(part)  # what a killed writer left
            part.mkdir()
            yield part
            sync_folder(part)
            _take_place(part, output)
        except OSError as error:
            where = f"'{error.filename}': " if error.filename else ""
            raise CheckpointError(
                f"'{output}' cannot be written: {where}{error.strerror or error}. Nothing of it is left, and what was "
                "there before still is."
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, output: Path) -> None:
    if output.exists():
        # A full directory cannot be renamed over: the old one steps aside first and goes last.
        old = output.with_name(output.name + ".old")
        remove_any(old)
        output.rename(old)
        try:
            part.rename(output)
        except OSError:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        part.rename(output)
    sync_folder(output.parent)


def remove_any(path: Path) -> None:
    """Take away a folder of ours, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def check_free(output: Path, *, overwrite: bool, replaces: Sequence[str] = MODEL_FILES) -> None:
    """Refuse an occupied `output`, so that a command can say so before it reads anything.

    With `overwrite` a folder that has one of the files `replaces` is free: what a command wrote, it may replace. Any
    other folder may hold what nobody can bring back.
    """
    if output.is_file():
        raise CheckpointError(f"'{output}' is a file; the output is a directory.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise CheckpointError(f"'{output}' exists and is not empty. Choose another --output, or add --overwrite.")
        if not any((output / name).is_file() for name in replaces):
            raise CheckpointError(
                f"'{output}' is not empty and has no {' or '.join(replaces)}: it was not written by this command, so "
                "--overwrite does not replace it. Choose another --output."
            )


def check_output(output: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """`check_free`, and refuse an output that is one of the `sources` or holds it."""
    for source in sources:
        if source.resolve() == output.resolve():
            raise CheckpointError(f"--output is the source itself, '{source}'. Choose another.")
        if source.resolve().is_relative_to(output.resolve()):
            raise CheckpointError(f"--output '{output}' holds the source '{source}'. Choose another.")
    check_free(output, overwrite=overwrite)


def write_text(path: Path, text: str) -> Path:
    """`text` in `path`, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def replace_text(path: Path, text: str) -> Path:
    """`text` in place of whatever the file `path` was, whole or not at all; folders on the way are made."""
    part = path.with_name(path.name + ".part")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return write_text(part, text).replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> Path:
    """`value` as indented JSON with non-ASCII text as it is."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Stream `tensors` into `model*.safetensors` in `folder`.

    They come in the order of `shapes`, whole or in consecutive parts of their first axis; the next one is made while
    one is written.
    """
    shards = _plan_shards(shapes, dtype, shard_bytes)
    files = [folder / shard_name(index, len(shards)) for index in range(len(shards))]
    made = _ahead((name, cast(part.detach().cpu(), dtype, name).contiguous()) for name, part in tensors)
    for path, names in zip(files, shards, strict=True):
        with DirectFile(path) as file:
            file.write(safetensors_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                missing = math.prod(shapes[name])
                while missing:
                    given, part = next(made)
                    assert given == name and part.shape[1:] == shapes[name][1:], (given, part.shape, name, shapes[name])
                    missing -= part.numel()
                    assert missing >= 0, (name, missing)
                    file.write(part.view(torch.uint8).numpy().data)
            file.finish()
    if len(files) == 1:
        return files
    total = sum(math.prod(shape) for shape in shapes.values())
    index = {
        "metadata": {"total_size": total * dtype.itemsize, "total_parameters": total},
        "weight_map": {name: path.name for path, names in zip(files, shards, strict=True) for name in names},
    }
    return [*files, write_json(folder / INDEX_NAME, index)]


def _ahead(items: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`items`, each made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def shard_name(index: int, num_shards: int) -> str:
    """The file name of shard `index`, as the Hugging Face world spells it."""
    return "model.safetensors" if num_shards == 1 else f"model-{index + 1:05}-of-{num_shards:05}.safetensors"


class TensorStore(Protocol):
    """Named tensors that are read when asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored."""
        ...

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the tensor as stored."""
        ...


class TensorFolder:
    """The tensors of every safetensors file of a folder; headers are read at once, values when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _tensor_files(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - the handle is not a dict
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._files[name] = path

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored."""
        with _opened(self._files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the tensor as stored; only that is read."""
        with _opened(self._files[name]) as file:
            tensor: torch.Tensor = file.get_slice(name)[slices]
        return tensor


def write_logical(
    source: LogicalTensors,
    output: Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    vocabulary_folder: Path | None = None,
) -> list[Path]:
    """Write a logical directory: `model.json`, the tensors under their logical names and, if given, `vocabulary/`.

    Returns the files written, under `output`.
    """
    stored = dtype_named(dtype)
    shapes = logical_shapes(source.config)
    check_complete(source)
    with published(output, overwrite=overwrite) as part:
        files = write_tensors(part, shapes, _logical_tensors(source), stored, shard_bytes)
        model = {"format_version": FORMAT_VERSION, "config": tables.to_table(source.config)}
        files.append(write_json(part / MODEL_NAME, model))
        if vocabulary_folder is not None:
            files.extend(copy_folder(vocabulary_folder, part / "vocabulary"))
    return [output / path.relative_to(part) for path in files]


def _logical_tensors(source: LogicalTensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name in logical_shapes(source.config):
        yield from ((name, part) for part in parts_of(source, name))


class LogicalDirectory:
    """What `write_logical` wrote; a LogicalTensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_model(folder)
        self._tensors = TensorFolder(folder)
        check_shapes(folder, self._tensors.shapes, logical_shapes(self.config))

    @property
    def vocabulary_folder(self) -> Path | None:
        """The copy of the vocabulary that was written with the model."""
        folder = self.folder / "vocabulary"
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        return list(logical_shapes(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shapes[name]

    def read(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the logical tensor in fp32."""
        return self._tensors.read_slice(name, slices).float()

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of the logical tensor, as stored."""
        return self._tensors.read_slice(name, (rows,))


def open_logical_directory(path: Path) -> LogicalDirectory:
    """A logical directory as LogicalTensors; a CheckpointError if it is not one or does not fit its config."""
    return LogicalDirectory(path)


def check_complete(source: LogicalTensors) -> None:
    """A CheckpointError unless `source` has the parameters of its config, all of them and with these shapes."""
    check_shapes(
        type(source).__name__, {name: source.shape(name) for name in source.names()}, logical_shapes(source.config)
    )


def check_shapes(
    where: Path | str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """A CheckpointError that names what `found` lacks, has beyond `wanted`, or has in another shape."""
    problems = [f"lacks {name} {wanted[name]}" for name in wanted if name not in found]
    problems += [f"has {name} {found[name]}, which the config has no place for" for name in found if name not in wanted]
    problems += [
        f"has {name} as {tuple(found[name])}, but the config says {tuple(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        more = [f"... and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise CheckpointError("\n  ".join([f"'{where}' does not fit its config:", *problems[:8], *more]))


def copy_folder(source: Path, target: Path) -> list[Path]:
    """Copy the files of a flat folder."""
    target.mkdir()
    return [Path(shutil.copyfile(path, target / path.name)) for path in sorted(source.iterdir()) if path.is_file()]


def _read_model(folder: Path) -> ModelConfig:
    path = folder / MODEL_NAME
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a logical directory: it has no {MODEL_NAME}.")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        version, table = model["format_version"], model["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not the description of a model: {error!r}.") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' has format version {version}; this xlmega reads {FORMAT_VERSION}.")
    return tables.build(ModelConfig, table, what=str(path))


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """What a safetensors file of these tensors, back to back in this order, begins with."""
    # The safetensors format: u64 length, JSON, data. Readers want the data aligned, so the JSON is padded to 8 bytes.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensor_files(folder: Path) -> Sequence[Path]:
    index, single = folder / INDEX_NAME, folder / "model.safetensors"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({Path(name) for name in listed})
            if any(len(name.parts) != 1 for name in names):
                raise ValueError("a shard that does not lie beside it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{index}' is not an index of safetensors shards: {error!r}.") from None
        files = [folder / name for name in names]
    elif single.is_file():
        files = [single]
    else:
        raise CheckpointError(
            f"'{folder}' has neither model.safetensors nor {INDEX_NAME}."
            + (
                "\n  Its pytorch_model.bin is a pickle, which only tools/convert_checkpoint.py and"
                " tools/consolidate_checkpoint.py open, as data."
                if any(folder.glob("pytorch_model*.bin"))
                else ""
            )
        )
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names {', '.join(missing)}, which is not there: fetch it again.")
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}.") from None


def sync_folder(folder: Path) -> None:
    """Names made or moved in `folder` are on disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
