"""The command line: it parses arguments, calls the library and prints results and errors."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread, Timer
from types import FrameType
from typing import Any, NoReturn

from gpu_init import config
from gpu_init.errors import GpuInitError, InputError, ResourceError, Stopped
from gpu_init.show.progress import Progress
from gpu_init.version import __version__

GRACE_SECONDS = 3.0  # After a signal, a call that is under way has this long to end by itself.


class _Errors:
    """The format in which errors are printed: that of the settings, as far as they have been read."""

    log_format = "auto"


def program() -> NoReturn:
    """Run the command of this process and exit with its code."""
    for one in (signal.SIGTERM, signal.SIGINT):  # These hold before and after the handlers of `_Signals`.
        signal.signal(one, _end)
    ctypes.CDLL(None).signal(signal.SIGBUS, _cut_short)
    code = main()
    if code > 128:  # A thread may wait for an import that the signal interrupted: do not join threads.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _end(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    os._exit(_complain(Stopped(signum)))


@ctypes.CFUNCTYPE(None, ctypes.c_int)  # type: ignore[untyped-decorator]
def _cut_short(signum: int) -> None:  # noqa: ARG001
    """End the process at once: a Python handler would return to the memory access that failed, and repeat it."""
    os._exit(_complain(InputError("an input became shorter while it was read; run again when it is complete.")))


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`, and accepts flags by their full names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.prog} --help lists what there is.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code: 0 done, 2 wrong input, 3 too little memory or disk, 128 + signal.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name; by default the process's own.
    """
    try:
        _Errors.log_format = config.log_format(None, os.environ, {})
        given = _parser().parse_args(arguments)
        _Errors.log_format = config.log_format(None, os.environ, _flags(given))
        with _Signals() as given.signals:
            code: int = given.command(given)
            if sys.stdout is not None:  # It is None where the process has no standard output.
                sys.stdout.flush()
        return code
    except BrokenPipeError:  # The reader of our output has closed it.
        _mute()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _mute()
        return _complain(ResourceError(f"{error.filename or 'standard output'}: {error.strerror or error}."))
    except KeyboardInterrupt:
        return _complain(Stopped(signal.SIGINT))
    except (MemoryError, GpuInitError, Stopped) as error:
        return _complain(error)


def _mute() -> None:
    """Redirect standard output to /dev/null, so that Python's flush at exit does not fail as well."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: MemoryError | GpuInitError | Stopped, progress: Progress | None = None) -> int:
    """Print why the program ends, through `progress` or as JSON where that is the format; return the exit code."""
    if isinstance(error, MemoryError):
        error = ResourceError(f"not enough memory: {error or 'an allocation failed'}.")
    if _Errors.log_format == "json":
        progress = Progress("json")
    if progress is not None:
        progress.error(str(error))
    else:
        lines = [
            "".join(letter if letter.isprintable() else "?" for letter in line[:1500])
            for line in str(error).split("\n")
        ]
        with suppress(OSError, ValueError):  # Standard error is closed.
            print("gpu-init:", "\n".join(lines), file=sys.stderr, flush=True)
    return error.exit_code


class _Signals:
    """SIGTERM and SIGINT end the job as an exception, so that everything opened is closed.

    Python raises the exception when the main thread returns from native code. A destructor or a callback swallows
    exceptions, so the signal is sent again after it. Where the job does not end within `GRACE_SECONDS`, a watching
    thread ends the process; the job can be resumed from the files on disk, as after a kill.
    """

    def __init__(self) -> None:
        self.progress: Progress | None = None  # The progress of the job, once it has one.
        self._ended = Event()
        self._told, self._tell = os.pipe()

    def __enter__(self) -> _Signals:
        os.set_blocking(self._tell, False)
        self._fd_before = signal.set_wakeup_fd(
            self._tell, warn_on_full_buffer=False
        )  # Python writes to it when a signal arrives.
        self._before = {one: signal.signal(one, self._stop) for one in (signal.SIGTERM, signal.SIGINT)}
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._swallowed
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one, handler in self._before.items():
            signal.signal(one, handler)
        sys.unraisablehook = self._hook_before
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._tell)

    def _stop(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        for one in self._before:  # A second signal would interrupt the cleanup.
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(signum)

    def _swallowed(self, what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Stopped):
            self._hook_before(what)
            return
        signum = what.exc_value.exit_code - 128
        signal.signal(signum, self._stop)
        Timer(
            0.01, os.kill, (os.getpid(), signum)
        ).start()  # Sent at once, it would be raised in this hook and swallowed.

    def _watch(self) -> None:
        with os.fdopen(self._told, "rb", buffering=0) as told:
            while signum := told.read(1):
                if signum[0] in self._before and not self._ended.wait(GRACE_SECONDS):
                    code = _complain(Stopped(signum[0]), self.progress)
                    if self.progress is not None:
                        self.progress.close()
                    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpu-init", description="Initial user embeddings for multimodal recommenders, without training."
    )
    parser.add_argument("--version", action="version", version=f"gpu-init {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="make initial user vectors from interactions and item features")
    run.add_argument("job", nargs="?", metavar="JOB.toml", help="settings; flags and GPU_INIT_* variables win over it")
    config.add_flags(run, config.NAMES - config.TUNED)
    run.set_defaults(command=_run)

    assign = commands.add_parser("assign", help="make vectors of new users, or of new interactions, as a job did")
    assign.add_argument("artifact", metavar="ARTIFACT", help="of the job, whose clusters and settings are taken")
    config.add_flags(assign, config.ASSIGNED)
    assign.set_defaults(command=_assign)

    tune = commands.add_parser("tune", help="rank settings without training, by held-out interactions")
    tune.add_argument("job", nargs="?", metavar="JOB.toml", help="as of run; what it sets is a candidate too")
    tune.add_argument("--metric", default="recall@20", metavar="METRIC", help="what to order by (default: recall@20)")
    tune.add_argument("--folder", default="tuned", metavar="DIR", help="where best.toml, scores.csv and a plot go")
    config.add_flags(tune, config.NAMES - {"scheduler", "resume", "overwrite"})
    tune.add_argument("--scheduler", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # It is refused with a reason.
    tune.set_defaults(command=_tune)

    inspect = commands.add_parser("inspect", help="show what an artifact holds")
    inspect.add_argument("artifact", metavar="ARTIFACT")
    inspect.add_argument("--verify", action="store_true", help="check every file against its hash")
    inspect.add_argument("--json", action="store_true", help="print the manifest as JSON")
    inspect.set_defaults(command=_inspect)

    report = commands.add_parser("report", help="write a page with charts of an artifact, for a browser")
    report.add_argument("artifact", metavar="ARTIFACT")
    report.add_argument("--out", metavar="PATH", help="where (default: report.html in the artifact)")
    report.add_argument("--item-names", metavar="PATH", help="table of item ids and names: Parquet, CSV or TSV")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="write an artifact as safetensors, .pt or Parquet")
    export.add_argument("artifact", metavar="ARTIFACT")
    export.add_argument("--format", required=True, metavar="FORMAT", help="safetensors, pt or parquet")
    export.add_argument("--out", metavar="PATH", help="where (default: the artifact's path and the format's ending)")
    export.add_argument("--overwrite", action="store_true", help="replace what stands there")
    export.set_defaults(command=_export)

    demo = commands.add_parser("demo", help="make a data set, run the job on it, show the result")
    demo.add_argument("--folder", default="demo", help="where the data and the result go (default: demo)")
    demo.add_argument("--users", type=int, default=20_000, help="number of users (default: 20000)")
    demo.add_argument("--items", type=int, default=4_000, help="number of items (default: 4000)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser("doctor", help="show device, libraries and versions; what is missing, and the fix")
    doctor.add_argument("--json", action="store_true", help="print as JSON")
    doctor.add_argument("--compile", action="store_true", help="compile all kernels now, so that no job has to")
    doctor.set_defaults(command=_doctor)
    return parser


def _run(given: argparse.Namespace) -> int:
    job = _load(given)
    return _make(given, job, lambda progress: _run_job(job, progress))


def _assign(given: argparse.Namespace) -> int:
    from gpu_init.artifact import read

    source = read.load(given.artifact)
    environ = {key: os.environ[key] for name in config.ASSIGNED if (key := config.variable(name)) in os.environ}
    job, modalities = config.assigned(source.manifest, environ, _flags(given))

    def make(progress: Progress) -> str:
        if job.scheduler is None:
            from gpu_init.assign import assign
        else:
            from gpu_init.cluster.site import assign

        return assign(source, job, modalities, progress)

    return _make(given, job, make)


def _tune(given: argparse.Namespace) -> int:
    from gpu_init.tune import METRICS, tune

    if given.metric not in METRICS:
        raise InputError(f"--metric: found {given.metric!r}; wanted is {', '.join(METRICS)}.")
    asked = _load(given)
    if "scheduler" in given or os.environ.get(config.variable("scheduler"), "").strip():
        place = "--scheduler" if "scheduler" in given else config.variable("scheduler")
        raise InputError(f"tune runs on one machine; leave {place} out.")
    with Progress(asked.log_format) as progress:
        given.signals.progress = progress
        if asked.scheduler is not None:
            progress.say(f"tune runs on one machine; the scheduler in {given.job} is for run")
        frame, paths = tune(asked, given.metric, given.folder, progress)
    from rich.console import Console

    from gpu_init.show import summary

    summary.candidates(frame, given.metric, Console())
    print("\n".join(paths))
    return 0


def _load(given: argparse.Namespace) -> config.JobConfig:
    """Read the job that a command names; its errors are printed in the log format that the job file sets."""
    try:
        job = config.load(given.job, os.environ, _flags(given))
    except InputError:
        _Errors.log_format = config.log_format(given.job, os.environ, _flags(given))
        raise
    _Errors.log_format = job.log_format
    return job


def _flags(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line."""
    return {key: value for key, value in vars(given).items() if key in config.NAMES}


def _make(given: argparse.Namespace, job: config.JobConfig, make: Callable[[Progress], str]) -> int:
    """Make an artifact, report progress in the job's log format, and print the summary."""
    with Progress(job.log_format) as progress:
        given.signals.progress = progress
        path = make(progress)
    _print_summary(path)
    return 0


def _run_job(job: config.JobConfig, progress: Progress) -> str:
    from gpu_init import memory

    memory.require_libraries()
    if job.scheduler is None:
        from gpu_init.run import run
    else:
        from gpu_init.cluster.site import run

    return run(job, progress)


def _print_summary(path: str) -> None:
    from rich.console import Console

    from gpu_init.artifact import read
    from gpu_init.show import summary

    summary.table(read.manifest_of(path), Console())


def _inspect(given: argparse.Namespace) -> int:
    from gpu_init.artifact import read

    problems = read.verify(given.artifact) if given.verify else []
    if problems:
        raise InputError(f"{given.artifact}: " + "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else ""))
    if given.json:
        print(json.dumps(read.manifest_of(given.artifact), indent=2, ensure_ascii=False))
    else:
        _print_summary(given.artifact)
        if given.verify:
            print("every file matches its hash")
    return 0


def _report(given: argparse.Namespace) -> int:
    from gpu_init.artifact import read
    from gpu_init.show.report import report

    print(report(read.load(given.artifact), given.out, given.item_names))
    return 0


def _export(given: argparse.Namespace) -> int:
    from gpu_init.artifact.export import export

    print(export(given.artifact, given.format, given.out, overwrite=given.overwrite))
    return 0


def _demo(given: argparse.Namespace) -> int:
    from gpu_init import demo
    from gpu_init.artifact import read
    from gpu_init.files import storage
    from gpu_init.inputs import features

    if given.seed < 0:
        raise InputError(f"--seed: found {given.seed}; wanted is a whole number, 0 or more.")
    storage.require_local(given.folder)
    data = demo.make(given.folder, users=given.users, items=given.items, seed=given.seed)
    print(
        f"made {given.users} users and {given.items} items in {given.folder}/ ({data.interactions.name},"
        f" {data.image.name}, {data.text.name}); the job is {data.job}"
    )
    job = config.load(str(data.job), {}, {"overwrite": True})
    with Progress(job.log_format) as progress:
        path = _run_job(job, progress)
    _print_summary(path)
    made = read.load(path)
    vectors = {
        name: (made[name].users, features.read_rows(name, source, given.items)) for name, source in job.features.items()
    }
    print("\nHeld-out interactions ranked by X F^T, without training (Recall@20):")
    for name, recall in demo.evaluate(vectors, data.seen, data.unseen).items():
        print(f"  {name:<20}{recall:.4f}")
    print(f'\nNext: gpu-init inspect {path} --verify; in Python: gpu_init.load({path!r})["image"].users')
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from gpu_init.backend.doctor import compiled_facts, facts

    lines = facts() + (compiled_facts() if given.compile else [])
    if given.json:
        print(json.dumps([vars(line) for line in lines], indent=2))
        return 0
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:<{width}}  {line.found}")
        if line.fix:
            print(f"{'':<{width}}  -> {line.fix}")
    return 0
