import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import records, stages
from xlmega.text.tally import Statistics


def build(output: Path, source: Path, power: int = 1, **options: Any) -> tuple[list[str], int]:
    """Two stages: numbers of `source` to a power, then their doubles. What was said, and how many were made now."""
    said: list[str] = []

    def numbers(statistics: Statistics) -> stages.Records:
        for _, record in records.read_records(source):
            statistics.keep("n", str(record["n"]))
            yield "", {"n": record["n"] ** power}

    with stages.workshop(output, "test", {"power": power}, [source], say=said.append, **options) as shop:
        powers = shop.make("powers", {"": "stages/powers.jsonl"}, {"power": power}, [source], numbers)[""]

        def halves(statistics: Statistics) -> stages.Records:
            for _, record in records.read_records(shop.path(powers)):
                yield ("even" if record["n"] % 2 == 0 else "odd"), record

        files = {"even": "train/even.jsonl.gz", "odd": "train/odd.jsonl.zst"}
        shop.make("halves", files, {}, [powers], halves)
    return said, shop.made_now


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "in" / "numbers.jsonl"
    records.write_records(file, [{"n": n} for n in range(5)])
    return file


def test_a_second_run_keeps_every_stage_and_every_byte(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    assert build(output, source) == ([], 2)
    first = contents(output)
    assert set(first) == {
        "corpus.json", "stages/powers.jsonl", "stages/powers.jsonl.done.json", "train/even.jsonl.gz",
        "train/even.jsonl.gz.done.json", "train/odd.jsonl.zst", "train/odd.jsonl.zst.done.json",
    }  # fmt: skip
    told = json.loads(first["stages/powers.jsonl.done.json"])
    assert (told["lines"], told["bytes"]) == (5, len(first["stages/powers.jsonl"]))
    assert told["sha256"] == stages.hash_file(output / "stages" / "powers.jsonl")
    assert told["statistics"]["n"]["kept"] == 5
    assert build(output, source) == (["powers: made before, kept", "halves: made before, kept"], 0)
    assert contents(output) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("harm", "made_now"),
    [
        (lambda folder: (folder / "train" / "odd.jsonl.zst").write_bytes(b"x"), 1),
        (lambda folder: (folder / "train" / "odd.jsonl.zst.done.json").unlink(), 1),
        (lambda folder: (folder / "train" / "even.jsonl.gz.done.json").write_text("[]"), 1),
        (lambda folder: (folder / "train" / "even.jsonl.gz.done.json").write_text('{"lines": '), 1),
        # The second stage was made from the same bytes as are made again, so it stands.
        (lambda folder: (folder / "stages" / "powers.jsonl").write_bytes(b'{"n": 7}\n'), 1),
        (lambda folder: (folder / "stages" / "powers.jsonl").unlink(), 1),
    ],
)
def test_what_is_damaged_or_gone_is_made_anew(
    tmp_path: Path, source: Path, harm: Callable[[Path], Any], made_now: int
) -> None:
    output = tmp_path / "out"
    build(output, source)
    first = contents(output)
    harm(output)
    assert build(output, source)[1] == made_now
    assert contents(output) == first


def test_other_settings_need_overwrite_and_other_sources_are_seen(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    build(output, source)
    with pytest.raises(ConfigError, match=r"built with other settings \(power: 1 then, 2 now\).*--overwrite"):
        build(output, source, power=2)
    (output / "notes.txt").write_text("mine")
    assert build(output, source, power=2, overwrite=True)[1] == 2
    assert records.read_lines(output / "stages" / "powers.jsonl").__next__() == b'{"n": 0}'
    assert (output / "notes.txt").read_text() == "mine"
    records.write_records(source, [{"n": 3}])
    assert build(output, source, power=2)[1] == 2
    assert (output / "stages" / "powers.jsonl").read_bytes() == b'{"n": 9}\n'


def test_what_no_stage_makes_any_more_is_removed(tmp_path: Path) -> None:
    def make(names: str) -> None:
        with stages.workshop(tmp_path / "out", "test", {"names": names}, [], overwrite=True) as shop:
            for name in names:
                shop.make(name, {"": f"{name}/x.jsonl"}, {}, [], lambda statistics: iter([("", {})]))

    make("abc")
    (tmp_path / "out" / "b" / "x.jsonl.part").write_text("left by a kill")
    make("ac")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "c", "corpus.json"]


def test_a_folder_that_is_not_complete_never_bears_the_name(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    build(output, source)
    first = contents(output)
    good = source.read_bytes()
    source.write_bytes(good + b"{")
    with pytest.raises(DataError, match=r"numbers\.jsonl:6: not JSON"):
        build(output, source)
    assert not output.exists()
    source.write_bytes(good)
    build(output, source)
    changed = {"stages/powers.jsonl.done.json"}  # the source's time of change
    assert {name: body for name, body in contents(output).items() if name not in changed} == {
        name: body for name, body in first.items() if name not in changed
    }
    source.unlink()
    with pytest.raises(DataError, match=r"cannot read '.*numbers\.jsonl': No such file"):
        build(output, source)
    assert output.exists()  # nothing had to be made anew before the refusal


def test_an_output_that_is_or_holds_the_input_or_a_strangers_folder_is_refused(tmp_path: Path, source: Path) -> None:
    for output, word in ((source, "is"), (source.parent, "holds"), (source / "x", "lies in")):
        with pytest.raises(ConfigError, match=f"the output '{output}' {word} the input"):
            build(output, source)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"holds no corpus\.json, so it is no output of this tool"):
        build(tmp_path / "out", source, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write .*: Not a directory|File exists"):
        build(tmp_path / "file" / "out", source)


def hold(output: Path, ready: Any) -> None:
    with stages.workshop(output, "test", {}, []):
        ready.set()
        signal.pause()


def test_one_writer_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(DataError, match=rf"out' is being written by another process \(pid {process.pid}\)"):
        with stages.workshop(tmp_path / "out", "test", {}, []):
            pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with stages.workshop(tmp_path / "out", "test", {}, []):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(tmp_path: Path) -> None:
    def lines(statistics: Statistics) -> Iterator[tuple[str, dict[str, int]]]:
        yield from (("", {"n": n}) for n in range(30_000))

    def run() -> None:
        with stages.workshop(tmp_path / "out", "test", {}, []) as shop:
            shop.make("a", {"": "a.jsonl"}, {}, [], lines)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write '.*a\.jsonl': File too large\. What was whole before"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    run()
    assert (tmp_path / "out" / "a.jsonl").read_text().count("\n") == 30_000
