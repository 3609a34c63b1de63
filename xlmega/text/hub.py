"""Parquet files and Hugging Face data sets in, rows out: the door of `datasets` and `pyarrow`, which are optional.

Rows are streamed in the order of the data set. What a missing package, the network, the hub or a damaged file does ends
in a DataError that names the data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlmega.errors import DataError

ROWS = 1024
"""Rows of a parquet file in memory at once."""


def parquet_rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, its values of those of `columns` that the file has; of all for None)."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"reading '{file}' needs the package pyarrow: pip install pyarrow.") from None
    number = 0
    with _named(str(file)), parquet.ParquetFile(file) as opened:
        names = opened.schema_arrow.names
        known = [column for column in names if columns is None or column in columns]
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


def hub_rows(name: str, split: str, choose: Callable[[list[str]], str | None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a data set of the hub, or of a folder that `load_dataset` reads, streamed.

    `choose` picks one of its configurations, or none by None.
    """
    package = _datasets(name)
    with _named(name):
        config = choose(list(package.get_dataset_config_names(name)))
        yield from enumerate(package.load_dataset(name, config, split=split, streaming=True), start=1)


def one_config(name: str, wanted: str | None) -> Callable[[list[str]], str | None]:
    """The choice of a configuration by its name, or of the only one there is."""

    def choose(known: list[str]) -> str | None:
        if wanted in known:
            return wanted
        if wanted is None and (len(known) < 2 or "default" in known):
            return None
        asked = f"no configuration '{wanted}'" if wanted else "several configurations"
        raise DataError(f"'{name}' has {asked}. Name one of: {', '.join(known[:40])}.")

    return choose


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
