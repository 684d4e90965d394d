"""What can go wrong, and the exit code of each (design, section 4)."""

from __future__ import annotations


class GpuInitError(Exception):
    """Base of every error that the command line turns into one or two lines and an exit code."""

    exit_code = 1


class InputError(GpuInitError, ValueError):
    """The input or the settings are wrong: which file, which row or key, what was found, what to do."""

    exit_code = 2


class ResourceError(GpuInitError):
    """Not enough memory, disk or device; the message carries the figure that was needed."""

    exit_code = 3


class Stopped(BaseException):
    """A signal asked the job to end; what is written so far can be resumed.

    No `Exception`, as KeyboardInterrupt is none: whoever catches everything a library raises lets it through.

    Parameters
    ----------
    signum : int
        The signal's number; the exit code is 128 + signum, as shells report it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; --resume goes on from the last whole block.")
        self.exit_code = 128 + signum
