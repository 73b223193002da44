"""The two ways in which work ends badly: the user can mend it (exit code 2), or it failed (exit code 1)."""

import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL = "the disk is full; make room and run again, finished shards are kept"


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, what to do."""

    exit_code = 2


class StageFailure(Exception):
    """A stage could not finish although its input was right. The message is one line."""

    exit_code = 1


class TransientFailure(StageFailure):
    """A failure that may pass by itself (a time-out, a lost server): the stage is tried again."""


def says_disk_full(error: BaseException) -> bool:
    """Whether an error means that there is no room left; libraries say so in their own ways."""
    told = str(error).lower()
    return getattr(error, "errno", None) in _NO_ROOM or "disk is full" in told or "no space left" in told


def reason_of(error: BaseException) -> str:
    """The first line that an error says, or its name when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def as_failure(error: Exception) -> UserError | StageFailure:
    """One line for any error; the traceback of one that nobody foresaw belongs in the log."""
    if isinstance(error, UserError | StageFailure):
        return error
    if says_disk_full(error):
        return StageFailure(DISK_FULL)
    line = (str(error).strip().splitlines() or [""])[0]
    passing = isinstance(error, ConnectionError | TimeoutError)
    return (TransientFailure if passing else StageFailure)(f"{type(error).__name__}: {line}")
