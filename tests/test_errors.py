"""What a user sees when a command fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from xlmega import errors
from xlmega.errors import (
    ConfigError,
    HangError,
    LostRankError,
    NumericsError,
    RendezvousError,
    ReplicaError,
    StoppedError,
    XlmegaError,
    nearest,
    run_main,
)


def test_nearest_name_or_all_names() -> None:
    assert nearest("p_clon", ["p_clone", "seed"]) == " Did you mean 'p_clone'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b."
    assert nearest("zzz", []) == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (NumericsError("no"), 3),
        (RendezvousError("no"), 4),
        (LostRankError("no"), 5),
        (HangError("no"), 6),
        (ReplicaError("no"), 7),
        (StoppedError("no"), 75),
    ],
)
def test_an_error_of_ours_is_one_message_and_its_exit_code(
    error: XlmegaError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        run_main(fails)
    assert left.value.code == code
    assert capsys.readouterr() == ("", f"{type(error).__name__}: no\n")


def test_a_process_that_does_not_speak_still_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ConfigError("told by another rank")

    with pytest.raises(SystemExit) as left:
        run_main(fails, speaks=lambda error: False)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_success_interruption_and_a_closed_pipe() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def closed() -> None:
        raise BrokenPipeError

    for main, code in ((lambda: None, 0), (lambda: 7, 7), (interrupted, 130), (closed, 0)):
        with pytest.raises(SystemExit) as left:
            run_main(main)
        assert left.value.code == code


def test_a_bug_of_ours_keeps_its_trace() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(broken)


def test_a_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/there")

    with pytest.raises(SystemExit) as left:
        run_main(full)
    assert left.value.code == 2 and capsys.readouterr().err.startswith(
        "OSError: '/there': No space left on device. Make"
    )
    with pytest.raises(FileNotFoundError):
        run_main(lambda: Path("/there/is/none").stat().st_size)


def test_every_error_is_of_the_family_and_who_speaks() -> None:
    family = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(family) == 11 and all(issubclass(one, XlmegaError) and one.exit_code for one in family)
    alone = [one.__name__ for one in family if one.of_one_rank]
    assert alone == ["RendezvousError", "LostRankError", "HangError"]
