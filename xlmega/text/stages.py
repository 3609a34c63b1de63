"""An output folder built in stages that survive interruption: every stage is made once, and made the same.

All is written under `OUTPUT.part`, which gets its name when the last stage is whole, so a folder called OUTPUT is
complete. A stage is one file of JSON lines, or several that one pass writes together. Beside each stands a side-car,
`FILE.done.json`: its lines, bytes and sha256, its statistics, and a hash of all that it was made from (the stage's
settings and the identity of its sources). Running again keeps a stage whose side-car still holds, and makes any other
anew; the bytes are those of an undisturbed run. One process at a time builds an output: the lock is the kernel's
(flock), so it ends with its process however that dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError, DataError
from xlmega.locking import locked
from xlmega.text.records import CHUNK_BYTES, RecordWriter, write_errors
from xlmega.text.tally import Statistics

FORMAT_VERSION = 1
SIDE_CAR = ".done.json"
SUMMARY = "corpus.json"
"""In a complete output: what built it, with which settings, and the statistics of every stage."""


@dataclass(frozen=True)
class Made:
    """One finished file."""

    name: str
    """Its path below the output."""
    lines: int
    bytes: int
    sha256: str
    made_from: str
    """Hash of the settings and sources."""
    statistics: Statistics


Records = Iterable[tuple[str, Mapping[str, Any]]]
"""(which file of the stage, record)."""


class Workshop:
    """An output folder under construction. Get one from `workshop`."""

    def __init__(self, output: Path, verb: str, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.output, self.say = output, say
        self.folder = output if output.exists() else output.with_name(output.name + ".part")
        self.statistics: dict[str, Statistics] = {}
        """By stage, in the order made."""
        self.made_now = 0
        """Stages that were not there already."""
        self._verb, self._settings = verb, dict(settings)
        self._names: set[str] = set()

    def path(self, made: Made) -> Path:
        """Where a file is now."""
        return self.folder / made.name

    def make(
        self,
        stage: str,
        files: Mapping[str, str],
        settings: Mapping[str, Any],
        sources: Sequence[Made | Path | str],
        records: Callable[[Statistics], Records],
        *,
        shown_as: str = "",
    ) -> dict[str, Made]:
        """The stage's files, made now by `records` unless they are whole and from the same settings and sources.

        `files` names them (key -> path below the output); `records` yields (key, record) and counts into the
        statistics it is given, which every file's side-car keeps. `shown_as` adds them up with those of other stages.
        """
        made_from = _hash([FORMAT_VERSION, stage, files, settings, [_identity(source) for source in sources]])
        self._names.update(files.values())
        kept = {key: read_side_car(self.folder, name, made_from) for key, name in files.items()}
        whole = {key: made for key, made in kept.items() if made is not None}
        if len(whole) == len(files):
            self.say(f"{stage}: made before, kept")
            self._show(shown_as or stage, next(iter(whole.values())).statistics)
            return whole
        self._unpublish()
        paths = {key: self.folder / name for key, name in files.items()}
        if any(side_car(path).exists() for path in paths.values()):
            self.say(f"{stage}: incomplete, damaged or made from something else, so made anew")
        for path in paths.values():
            with write_errors(path):
                side_car(path).unlink(missing_ok=True)
        statistics = Statistics()
        writers: dict[str, RecordWriter] = {}
        try:
            for key, path in paths.items():
                writers[key] = RecordWriter(path)
            for key, record in records(statistics):
                writers[key].write(record)
            for writer in writers.values():
                writer.finish()
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        made = {
            key: Made(
                files[key], writer.lines, writer.part.stat().st_size, hash_file(writer.part), made_from, statistics
            )
            for key, writer in writers.items()
        }
        # Side-cars first: then no file of ours ever stands without one, and none that lacks one is ours to remove.
        for one in made.values():
            _write_side_car(self.folder, one)
        for writer in writers.values():
            writer.publish()
        self._show(shown_as or stage, statistics)
        self.made_now += 1
        return made

    def _show(self, stage: str, statistics: Statistics) -> None:
        self.statistics.setdefault(stage, Statistics()).add(statistics)

    def publish(self) -> None:
        """Remove what an earlier attempt left, write the summary and give the folder its name."""
        self._remove_stale()
        summary = {
            "format_version": FORMAT_VERSION,
            "verb": self._verb,
            "settings": self._settings,
            "stages": {stage: statistics.as_json() for stage, statistics in self.statistics.items()},
        }
        _write_json(self.folder / SUMMARY, summary)
        if self.folder != self.output:
            with write_errors(self.output):
                self.folder.replace(self.output)
                sync_folder(self.output.parent)
            self.folder = self.output

    def _unpublish(self) -> None:
        """While something is made anew, the folder is not complete and must not be called so."""
        if self.folder == self.output:
            part = self.output.with_name(self.output.name + ".part")
            with write_errors(part):
                self.output.replace(part)
            self.folder = part

    def _remove_stale(self) -> None:
        before = self.folder
        known = {before / name for name in self._names}
        cars = [car for car in before.rglob("*" + SIDE_CAR) if _owner(car) not in known]
        if cars:
            self._unpublish()
        for name in [car.relative_to(before) for car in cars]:
            _owner(self.folder / name).unlink(missing_ok=True)
            (self.folder / name).unlink()
        for part in list(self.folder.rglob("*.part")):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        for folder in sorted((path for path in self.folder.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def workshop(
    output: Path,
    verb: str,
    settings: Mapping[str, Any],
    inputs: Sequence[Path],
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Workshop]:
    """Build `output` in the block and publish it at its end; `settings` are what the person asked for.

    A complete output of the same settings is gone through again (a kept stage costs one reading); one of other settings
    is refused unless `overwrite`, and then the stages that differ are made anew.
    """
    check_apart(output, inputs)
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        part = output.with_name(output.name + ".part")
        if output.exists():
            _check_replaceable(output, verb, settings, overwrite)
            if part.exists():
                raise ConfigError(f"both '{output}' and '{part}' exist, and one was to become the other. Remove one.")
        else:
            with write_errors(part):
                part.mkdir(exist_ok=True)
        shop = Workshop(output, verb, settings, say)
        yield shop
        shop.publish()


def check_apart(output: Path, inputs: Sequence[Path]) -> None:
    """A ConfigError when the output is an input, or one lies in the other."""
    whole = output.resolve()
    for path in inputs:
        source = path.resolve()
        if whole == source or whole in source.parents or source in whole.parents:
            where = "is" if whole == source else "holds" if whole in source.parents else "lies in"
            raise ConfigError(f"the output '{output}' {where} the input '{path}'. Choose an output apart from it.")


def read_side_car(folder: Path, name: str, made_from: str) -> Made | None:
    """What the file `name` holds, or None when it is not whole or not made from that."""
    file = folder / name
    try:
        told = json.loads(side_car(file).read_text(encoding="utf-8"))
        made = Made(
            name,
            int(told["lines"]),
            int(told["bytes"]),
            str(told["sha256"]),
            str(told["made_from"]),
            Statistics.from_json(told["statistics"]),
        )
        if made.made_from != made_from or file.stat().st_size != made.bytes or hash_file(file) != made.sha256:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return made


def side_car(file: Path) -> Path:
    """Where the side-car of a file stands."""
    return file.with_name(file.name + SIDE_CAR)


def _owner(car: Path) -> Path:
    return car.with_name(car.name.removesuffix(SIDE_CAR))


def hash_file(file: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """See a folder's new names onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_replaceable(output: Path, verb: str, settings: Mapping[str, Any], overwrite: bool) -> None:
    try:
        told = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        earlier_verb, earlier = told["verb"], dict(told["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"'{output}' exists and holds no {SUMMARY}, so it is no output of this tool. Choose another output."
        ) from None
    wanted = json.loads(json.dumps(dict(settings)))
    if (earlier_verb, earlier) == (verb, wanted) or overwrite:
        return
    keys = sorted(key for key in {*earlier, *wanted} if earlier.get(key) != wanted.get(key))
    changes = [f"{key}: {earlier.get(key)!r} then, {wanted.get(key)!r} now" for key in keys]
    what = f"by '{earlier_verb}'" if earlier_verb != verb else f"with other settings ({'; '.join(changes)})"
    raise ConfigError(f"'{output}' was built {what}. Choose another output, or add --overwrite to build it anew.")


def _identity(source: Made | Path | str) -> Any:
    """What makes a source the same one: its content where we made it, else its place, size and time of change."""
    if isinstance(source, str):
        return source
    if isinstance(source, Made):
        return source.sha256
    try:
        stat = source.stat()
    except OSError as error:
        raise DataError(f"cannot read '{source}': {error.strerror}.") from None
    return [str(source.resolve()), stat.st_size, stat.st_mtime_ns]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_side_car(folder: Path, made: Made) -> None:
    told = {
        "format_version": FORMAT_VERSION,
        "lines": made.lines,
        "bytes": made.bytes,
        "sha256": made.sha256,
        "made_from": made.made_from,
        "statistics": made.statistics.as_json(),
    }
    _write_json(side_car(folder / made.name), told)


def _write_json(file: Path, value: Any) -> None:
    part = file.with_name(file.name + ".part")
    with write_errors(file):
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
