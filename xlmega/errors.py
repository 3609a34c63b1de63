"""Everything that a person or a file can cause, as one family of exceptions.

Each message says what was asked (with its values), the rule it broke and the nearest thing that works.
They are raised before anything is allocated wherever that is possible. Entry scripts print one of these as
a single message on stderr and exit with `exit_code`, and so they do for a full or forbidden disk that no module gave
words of its own; any other exception is a bug of ours and keeps its trace.
"""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""What a disk or a folder refuses to a program that does nothing wrong."""


class XlmegaError(Exception):
    """Root of the family."""

    exit_code = 2
    of_one_rank = False
    """Only the process that raises it knows of it, so it speaks whichever rank it is."""


class ConfigError(XlmegaError):
    """A recipe, a DeepSpeed file or a command line that cannot be obeyed as it stands."""


class LayoutError(XlmegaError):
    """A tensor-, pipeline- or data-parallel layout that the ranks or the model do not allow."""


class DataError(XlmegaError):
    """Text, tokens, manifests or vocabularies that are missing, damaged or do not belong together."""


class CheckpointError(XlmegaError):
    """A checkpoint or run directory that is missing, damaged, occupied or of another model."""


class NumericsError(XlmegaError):
    """A loss or gradient that is not finite; the weights were left as they were."""

    exit_code = 3


class RendezvousError(XlmegaError):
    """The ranks of a run did not come together in time."""

    exit_code = 4
    of_one_rank = True


class LostRankError(XlmegaError):
    """A rank of a running run ended or went silent, so the others cannot go on."""

    exit_code = 5
    of_one_rank = True


class HangError(XlmegaError):
    """No rank ended, and yet nothing moves."""

    exit_code = 6
    of_one_rank = True


class ReplicaError(XlmegaError):
    """Parameters that must be the same on several ranks are not."""

    exit_code = 7


class StoppedError(XlmegaError):
    """The run was asked to stop before its end and has saved: starting it again with --resume goes on."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest known name, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""


def run_main(main: Callable[[], int | None], speaks: Callable[[XlmegaError], bool] = lambda error: True) -> None:
    """Run a command's `main` and exit: a user's error becomes one message on stderr, never a trace.

    `speaks` says whether this process is the one to print it, where several see the same error.
    """
    try:
        sys.exit(main() or 0)
    except XlmegaError as error:
        if speaks(error):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `tool | head` is not an error
        sys.exit(0)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f"'{error.filename}': " if error.filename else ""
        print(
            f"OSError: {where}{error.strerror}. Make room or give leave, and start again.", file=sys.stderr, flush=True
        )
        sys.exit(XlmegaError.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
