"""The errors that end a command with a message and an exit code, and no traceback."""

from __future__ import annotations


class GpuInitError(Exception):
    """Base of every error that the command line turns into one or two lines and an exit code."""

    exit_code = 1


class InputError(GpuInitError, ValueError):
    """The input or the settings are wrong; the message says which file, row or key, what was found, what to do."""

    exit_code = 2


class ResourceError(GpuInitError):
    """Memory, disk or device do not suffice; the message gives the figure that was needed."""

    exit_code = 3


class Stopped(BaseException):
    """A signal asked the job to end; what is written so far can be resumed.

    Like `KeyboardInterrupt`, it is no `Exception`, so code that catches all errors of a library lets it through.

    Parameters
    ----------
    signum : int
        Number of the signal; the exit code is 128 + signum, as in a shell.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; --resume goes on from the last whole block.")
        self.exit_code = 128 + signum
