"""The command line: words in, words out."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from . import config
from .errors import GpuInitError, InputError, ResourceError, Stopped
from .version import __version__


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong on one line, and takes flags by their full names only."""

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
        given = _parser().parse_args(arguments)
        with _signals():
            code: int = given.command(given)
        return code
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _complain(Stopped(signal.SIGINT))
    except MemoryError as error:
        return _complain(ResourceError(f"not enough memory: {error or 'an allocation failed'}."))
    except GpuInitError as error:
        return _complain(error)


def _complain(error: GpuInitError) -> int:
    text = str(error)
    if isinstance(error, Stopped):
        text += "; --resume goes on from the last whole block."
    print(f"gpu-init: {text}", file=sys.stderr)
    return error.exit_code


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the job as an exception, so that everything opened is closed."""

    def stop(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise Stopped(signum)

    before = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpu-init", description="Initial user embeddings for multimodal recommenders, without training."
    )
    parser.add_argument("--version", action="version", version=f"gpu-init {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="make initial user vectors from interactions and item features")
    run.add_argument("job", nargs="?", metavar="JOB.toml", help="settings; flags and GPU_INIT_* variables win over it")
    config.add_flags(run)
    run.set_defaults(command=_run)

    inspect = commands.add_parser("inspect", help="show what an artifact holds")
    inspect.add_argument("artifact", metavar="ARTIFACT")
    inspect.add_argument("--verify", action="store_true", help="check every file against its hash")
    inspect.add_argument("--json", action="store_true", help="print the manifest as JSON")
    inspect.set_defaults(command=_inspect)

    demo = commands.add_parser("demo", help="make a data set, run the job on it, show the result")
    demo.add_argument("--folder", default="demo", help="where the data and the result go (default: demo)")
    demo.add_argument("--users", type=int, default=20_000, help="number of users (default: 20000)")
    demo.add_argument("--items", type=int, default=4_000, help="number of items (default: 4000)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the data (default: 0)")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser("doctor", help="show device, libraries and versions; what is missing, and the fix")
    doctor.add_argument("--json", action="store_true", help="print as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _run(given: argparse.Namespace) -> int:
    flags = {key: value for key, value in vars(given).items() if key not in ("command", "job")}
    job = config.load(given.job, os.environ, flags)
    path = _run_job(job)
    _print_summary(path)
    return 0


def _run_job(job: config.JobConfig) -> str:
    from .job import run
    from .progress import Progress

    with Progress(job.log_format) as progress:
        return run(job, progress)


def _print_summary(path: str) -> None:
    from rich.console import Console

    from . import artifact, summary

    summary.table(artifact.load(path).manifest, Console())


def _inspect(given: argparse.Namespace) -> int:
    from . import artifact

    problems = artifact.verify(given.artifact) if given.verify else []
    if problems:
        raise InputError(f"{given.artifact}: " + "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else ""))
    if given.json:
        print(json.dumps(artifact.load(given.artifact).manifest, indent=2, ensure_ascii=False))
    else:
        _print_summary(given.artifact)
        if given.verify:
            print("every file matches its hash")
    return 0


def _demo(given: argparse.Namespace) -> int:
    from . import artifact, demo, features

    data = demo.make(given.folder, users=given.users, items=given.items, seed=given.seed)
    print(
        f"made {given.users} users and {given.items} items in {given.folder}/ ({data.interactions.name},"
        f" {data.image.name}, {data.text.name}); the job is {data.job}"
    )
    job = config.load(str(data.job), {}, {"overwrite": True})
    path = _run_job(job)
    _print_summary(path)
    made = artifact.load(path)
    vectors = {
        name: (made[name].users, features.read_rows(name, source, given.items)) for name, source in job.features.items()
    }
    print("\nHeld-out interactions ranked by X F^T, without training (Recall@20):")
    for name, recall in demo.evaluate(vectors, data.seen, data.unseen).items():
        print(f"  {name:<20}{recall:.4f}")
    print(f'\nNext: gpu-init inspect {path} --verify; in Python: gpu_init.load({path!r})["image"].users')
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from .backend import facts

    lines = facts()
    if given.json:
        print(json.dumps([vars(line) for line in lines], indent=2))
        return 0
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:<{width}}  {line.found}")
        if line.fix:
            print(f"{'':<{width}}  -> {line.fix}")
    return 0
