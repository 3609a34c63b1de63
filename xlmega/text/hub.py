"""Parquet files and Hugging Face data sets in, rows out: the door of `datasets` and `pyarrow`, which are optional.

Rows are streamed in the order of the data set. What a missing package, the network, the hub or a damaged file does ends
in a DataError that names the data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlmega.errors import DataError

ROWS = 1024
"""Rows of a parquet file in memory at once."""


def parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, its values of those of `columns` that the file has)."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"reading '{file}' needs the package pyarrow: pip install pyarrow.") from None
    number = 0
    with _named(str(file)), parquet.ParquetFile(file) as opened:
        known = [column for column in columns if column in opened.schema_arrow.names]
        for batch in opened.iter_batches(ROWS, columns=known):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def saved_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of a folder written by `save_to_disk` (the name '' for a single one) with their files, or nothing."""
    if (folder / "dataset_dict.json").is_file():
        return {path.name: sorted(path.iterdir()) for path in sorted(folder.iterdir()) if path.is_dir()}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {"": sorted(folder.iterdir())}
    return {}


def saved_rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of one split written by `save_to_disk`."""
    package = _datasets(str(folder))
    with _named(str(folder)):
        yield from enumerate(package.load_from_disk(str(folder)), start=1)


def hub_rows(name: str, configs: Sequence[str | None], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a data set of the hub, or of a folder that `load_dataset` reads, streamed.

    The first of `configs` (None: no configuration) that the data set has is taken.
    """
    package = _datasets(name)
    with _named(name):
        config = _first_config(package, name, configs)
        yield from enumerate(package.load_dataset(name, config, split=split, streaming=True), start=1)


def _first_config(package: Any, name: str, configs: Sequence[str | None]) -> str | None:
    known = package.get_dataset_config_names(name)
    for config in configs:
        if config in known or (config is None and (len(known) < 2 or "default" in known)):
            return config
    asked = ", ".join(str(config) for config in configs)
    raise DataError(f"'{name}' has none of the configurations {asked}. It has: {', '.join(known[:40])}.")


def translation_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The column `translation`, or the row itself where the languages are columns."""
    inner = row.get("translation")
    return inner if isinstance(inner, Mapping) else row


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"reading '{what}' needs the package datasets: pip install datasets.") from None
    datasets.disable_progress_bars()
    return datasets


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Third parties raise what they like here: everything but our own errors becomes a DataError about `what`."""
    try:
        yield
    except (DataError, GeneratorExit, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read '{what}': {lines[0]}") from None
