"""Dask: joining a cluster or starting one on this machine, and telling its failures as the job's own."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from gpu_init.backend.interface import one_line
from gpu_init.backend.select import select
from gpu_init.config import JobConfig
from gpu_init.errors import InputError, ResourceError
from gpu_init.show.progress import Progress


@contextmanager
def needed() -> Iterator[None]:
    """Inside, Dask is imported; an `InputError` says where it is not installed."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"--scheduler needs Dask ({one_line(error)}): pip install 'gpu-init[dask]'") from None


class Dask:
    """What is used of Dask, of which little has types.

    Raises
    ------
    InputError
        It is not installed.
    """

    def __init__(self) -> None:
        with needed():
            import dask
            import distributed
            from dask.sizeof import sizeof
            from distributed.comm.core import CommClosedError
            from distributed.scheduler import KilledWorker
        self.options: Any = dask.config.set
        self.sizeof: Callable[[Any], int] = sizeof
        self.as_completed: Any = distributed.as_completed
        self.Client: Any = distributed.Client
        self.CommClosedError: Any = CommClosedError
        self.KilledWorker: Any = KilledWorker

    @functools.cached_property
    def frames(self) -> Any:
        """Dask's data frames, which are loaded while workers are busy."""
        with needed():
            import dask.dataframe
        return dask.dataframe


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, Dask does not log in this process: what matters is told as the job's own errors are."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def connected(config: JobConfig, progress: Progress) -> Iterator[tuple[Dask, Any]]:
    """Join the scheduler, or start one here; gives Dask and the client.

    Raises
    ------
    InputError
        No scheduler answers, or Dask is not installed.
    ResourceError
        Workers died of a task, or the scheduler was lost.
    """
    dask = Dask()
    address, cluster = config.scheduler, None
    options = {
        "distributed.scheduler.work-stealing": False,  # parts stay where they are kept
        "distributed.comm.timeouts.connect": "10s",
        "dataframe.shuffle.method": "tasks",
        "dataframe.convert-string": False,  # a frame's objects are arrays
        # In a cluster that is started here: otherwise all that is freed goes back at once, and is faulted in anew.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    }
    with _silence(), dask.options(options):
        try:
            if address == "local":
                cluster = select(config.backend).local_cluster(dashboard_address="127.0.0.1:0", silence_logs=50)
            client = dask.Client(cluster if address == "local" else address, timeout="10s", set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--scheduler {address}: no scheduler answers there ({one_line(error)}).") from None
        there = client.scheduler.address
        try:
            where = "started here" if cluster is not None else "joined"
            progress.say(f"scheduler {there} {where}; dashboard {client.dashboard_link}")
            yield dask, client
        except dask.KilledWorker as error:
            raise ResourceError(
                f"workers died of a task, one after another ({one_line(error)}), for want of memory most often:"
                " give them more, or more of them, and run again with --resume."
            ) from None
        except (CancelledError, dask.CommClosedError, OSError) as error:  # a TimeoutError is an OSError
            of_connection = (CancelledError, TimeoutError, dask.CommClosedError)
            if not isinstance(error, of_connection) and there not in str(error):  # It is not about the scheduler.
                raise
            raise ResourceError(
                f"the scheduler at {there} is lost ({one_line(error)}); run again with --resume."
            ) from None
        finally:
            client.close(timeout=5)
            if cluster is not None:
                cluster.close(timeout=5)
