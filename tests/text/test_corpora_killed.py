"""Every verb, killed at every kind of moment: the next run gives the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xlmega.text import aligned, bitext, conversion, mc4, stages
from xlmega.text.filters import Filters
from xlmega.text.records import RecordWriter, write_records

KILLS = 6


def build_text(folder: Path, output: Path) -> None:
    conversion.convert_text(str(folder / "texts"), output)


def build_mc4(folder: Path, output: Path) -> None:
    mc4.shard_languages(folder / "texts", output, pieces=3)


def build_oscar(folder: Path, output: Path) -> None:
    conversion.take_megabytes(str(folder / "texts/train/{language}"), output, ["en", "fr"], megabytes=0.001)


def build_europarl(folder: Path, output: Path) -> None:
    pair = aligned.Pair("x", folder / "lines.en", folder / "lines.fr", lines_per_shard=100)
    aligned.split_aligned([pair, aligned.europarl(pair.first, pair.second)], ("en", "fr"), output)


def build_bitext(folder: Path, output: Path) -> None:
    bitext.build_bitext(
        [f"{folder / 'lines.en'},{folder / 'lines.fr'}", str(folder / "more.jsonl")],
        "en",
        "fr",
        output,
        filters=Filters(identify_language=False),
        selection=bitext.Selection(embedding_threshold=0, valid_pairs=5),
    )


BUILDS = [build_text, build_mc4, build_oscar, build_europarl, build_bitext]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    for code in ("en", "fr"):
        write_records(folder / "texts/train" / code / "a.jsonl", [{"text": f"{code} {n} x"} for n in range(300)])
        write_records(folder / "texts/valid" / code / "a.jsonl", [{"text": f"{code} valid {n}"} for n in range(9)])
        (folder / f"lines.{code}").write_text("".join(f"{code} {n} x\n" for n in range(300)))
    write_records(folder / "more.jsonl", [{"en": f"en {n} x", "fr": f"fr {n} x"} for n in range(250, 350)])
    return folder


def in_child(build: Callable[[Path, Path], None], folder: Path, output: Path, last: int) -> int:
    """Run `build` in a child that kills itself at its event number `last`; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            kill_at(last)
            build(folder, output)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_at(last: int) -> None:
    """An event is a record written, a file finished, published or told of, or the folder renamed."""
    seen = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("write", "finish", "publish"):
        setattr(RecordWriter, name, counted(getattr(RecordWriter, name)))
    stages._write_json = counted(stages._write_json)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]


def events(build: Callable[[Path, Path], None], folder: Path, output: Path) -> int:
    """How many events an undisturbed run has."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                return function(*args, **options)

            return call

        for name in ("write", "finish", "publish"):
            patch.setattr(RecordWriter, name, counted(getattr(RecordWriter, name)))
        patch.setattr(stages, "_write_json", counted(stages._write_json))
        patch.setattr(Path, "replace", counted(Path.replace))
        build(folder, output)
    return count


@pytest.mark.parametrize("build", BUILDS)
def test_killed_and_run_again(build: Callable[[Path, Path], None], folder: Path, tmp_path: Path) -> None:
    total = events(build, folder, tmp_path / "whole")
    expected = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.*")}
    moments = [1 + (total - 1) * k // (KILLS - 1) for k in range(KILLS)] + [total - 2]
    for moment in moments:
        output = tmp_path / f"at{moment}" / "out"
        assert os.WTERMSIG(in_child(build, folder, output, moment)) == signal.SIGKILL
        assert not output.exists()
        again = in_child(build, folder, output, max(1, moment // 3))  # may finish first: there is less left to do
        assert os.WTERMSIG(again) == signal.SIGKILL or again == 0
        build(folder, output)
        found = {p.relative_to(output): p.read_bytes() for p in output.rglob("*.*")}
        assert found == expected
        assert [path.name for path in output.parent.iterdir()] == ["out"]
