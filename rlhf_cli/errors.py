"""What can go wrong, by what the caller can do about it. Everything else is a bug and keeps its traceback.

RlhfError
├── UsageError              2   the command does not fit the state of things
├── RecipeError             3   the recipe, or what it points to, is invalid; carries every problem found
├── DataError               3   a data file is missing, empty or malformed; names file and line
├── MissingStage            3   an earlier stage has not been run
├── FlowRefused             3   the flow service refused a request; repeating will not help
├── CredentialsError        4   missing or refused
├── GateFailed              5   finished, but a gate was not met
├── BudgetReached           6   votes, money or time are used up; checkpoint saved
├── Diverged                7   NaN or the hard KL limit; last good checkpoint kept
├── RunLocked, RunDamaged   8   the run folder is in use, or its journal or checkpoint is damaged
├── FlowUnavailable        75   not reachable past the retry deadline; resume later
├── DiskFull               75   the disk does not take what must be kept; free some and resume
└── Stopped           130, 143  asked to stop by a signal; checkpoint saved
"""

from __future__ import annotations

import errno


class RlhfError(Exception):
    """A problem that the user can act on; its text says what to do next."""

    exit_code = 1


class UsageError(RlhfError):
    exit_code = 2


class RecipeError(RlhfError):
    """The recipe is invalid. `problems` holds one printable line each, already with its place."""

    exit_code = 3

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(RlhfError):
    exit_code = 3


class MissingStage(RlhfError):
    exit_code = 3


class FlowRefused(RlhfError):
    exit_code = 3


class CredentialsError(RlhfError):
    exit_code = 4


class GateFailed(RlhfError):
    exit_code = 5


class BudgetReached(RlhfError):
    exit_code = 6


class Diverged(RlhfError):
    exit_code = 7


class RunLocked(RlhfError):
    exit_code = 8


class RunDamaged(RlhfError):
    exit_code = 8


class FlowUnavailable(RlhfError):
    exit_code = 75


class DiskFull(RlhfError):
    exit_code = 75


class Stopped(RlhfError):
    """A signal asked the run to stop; `exit_code` is 128 plus the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def disk_full(error: BaseException) -> BaseException:
    """`error`, or DiskFull where it says that a disk takes no more: full, over quota, read-only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return DiskFull(
            f"{error.filename or 'A file'} cannot be written: {error.strerror}. Everything recorded before is kept; "
            "make room on the disk and resume."
        )
    return error
