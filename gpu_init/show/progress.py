"""Progress of a run: a bar on a terminal, one line per step elsewhere, or JSON lines for machines.

A stream that is closed, full or gone never ends a job: the output is lost, and the job continues.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, cast

from gpu_init.errors import Stopped

if TYPE_CHECKING:
    import rich.progress


class Step:
    """One step of a run, made by `Progress.step`.

    Attributes
    ----------
    done : int
        Units done so far.
    notes : dict
        Results of the step, such as ``{"users": 9308}``.
    costs : dict
        Costs of the step other than time and memory, such as ``{"carried_bytes": 98304}``.
    """

    def __init__(self, name: str, total: int | None, unit: str, view: _View) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0
        self.notes: dict[str, Any] = {}
        self.costs: dict[str, float] = {}
        self._view = view

    def advance(self, count: int = 1) -> None:
        """Add `count` to the units that are done."""
        self.done += int(count)
        self._view.advanced(self)

    def note(self, **notes: Any) -> None:
        """Store results for the line that ends the step; values are JSON types or numpy numbers."""
        self.notes.update({key: _plain(value) for key, value in notes.items()})

    def cost(self, **costs: float) -> None:
        """Store costs for the line that ends the step and for `Progress.timings`."""
        self.costs.update(costs)
        self.note(**costs)


class Progress:
    """Report what a run does, and measure its steps.

    Parameters
    ----------
    log_format : {"auto", "text", "json"} or None
        ``auto``: a bar on a terminal, else text, one line per step. None: no output.
    stream : text file, optional
        Output stream; by default standard error.

    Attributes
    ----------
    timings : list of dict
        One entry for each finished step, in order of finishing: ``step``, ``seconds``, ``memory_bytes`` (resident
        memory of the process at the end, where the system reports it) and the step's other costs.

    Examples
    --------
    >>> with Progress("text") as progress, progress.step("cluster image", total=4, unit="block") as step:
    ...     for _ in range(4):
    ...         step.advance()
    ...     step.note(clusters=8)
    """

    def __init__(self, log_format: str | None = "auto", stream: IO[str] | None = None) -> None:
        self.timings: list[dict[str, str | float]] = []
        self._view = _view(log_format, sys.stderr if stream is None else stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar and show the cursor again."""
        self._view.close()

    @contextmanager
    def step(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Step]:
        """Show a step while the block runs; after an exception it is shown as failed or stopped.

        Parameters
        ----------
        name : str
            Name of the step, such as "cluster image".
        total : int, optional
            Number of units, where it is known.
        unit : str, optional
            Noun for what `Step.advance` counts, in the singular.
        """
        step = Step(name, total, unit, self._view)
        self._view.started(step)
        start = time.perf_counter()
        outcome = "failed"
        try:
            yield step
            outcome = "finished"
        except (KeyboardInterrupt, Stopped):
            outcome = "stopped"
            raise
        finally:
            seconds = round(time.perf_counter() - start, 6)
            if outcome == "finished":
                self.timings.append({"step": name, "seconds": seconds, **_resident(), **step.costs})
            self._view.ended(step, outcome, seconds)

    def say(self, line: str) -> None:
        """Print one line."""
        self._view.message("message", line)

    def warn(self, line: str) -> None:
        """Print a warning on one line."""
        self._view.message("warning", line)

    def error(self, line: str) -> None:
        """Print on one line the error that ends the job."""
        self._view.message("error", line)


def _resident() -> dict[str, int]:
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as counts:
        return {"memory_bytes": int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    return {}


class _View(Protocol):
    def started(self, step: Step) -> None: ...
    def advanced(self, step: Step) -> None: ...
    def ended(self, step: Step, outcome: str, seconds: float) -> None: ...
    def message(self, event: str, line: str) -> None: ...
    def close(self) -> None: ...


def _view(log_format: str | None, stream: IO[str] | None) -> _View:
    if log_format is None or stream is None:  # sys.stderr is None where the process has no standard error.
        return _Quiet()
    if log_format == "json":
        return _Json(stream)
    if log_format == "auto" and _is_terminal(stream):
        return _Bar(stream)
    return _Text(stream)


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False


class _Quiet:
    """A view without output; the other views override what they show."""

    def started(self, step: Step) -> None:
        pass

    def advanced(self, step: Step) -> None:
        pass

    def ended(self, step: Step, outcome: str, seconds: float) -> None:
        pass

    def message(self, event: str, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Text(_Quiet):
    """One line per step that ended, and one per message."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def ended(self, step: Step, outcome: str, seconds: float) -> None:
        self.line(_summary(step, outcome, seconds))

    def message(self, event: str, line: str) -> None:
        self.line(f"warning: {line}" if event == "warning" else line)

    def line(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self.stream.write(_one_line(text) + "\n")
            self.stream.flush()


_LEVELS = {
    "warning": "warning",
    "step_stopped": "warning",
    "step_failed": "error",
    "error": "error",
}  # All other events have level info.


class _Json(_Quiet):
    """One JSON object per line."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def started(self, step: Step) -> None:
        self.event("step_started", step=step.name, total=step.total, unit=step.unit or None)

    def ended(self, step: Step, outcome: str, seconds: float) -> None:
        counted = {"done": step.done, "total": step.total, "unit": step.unit} if step.unit else {}
        self.event(f"step_{outcome}", step=step.name, seconds=seconds, **counted, notes=step.notes)

    def message(self, event: str, line: str) -> None:
        self.event(event, message=line)

    def event(self, event: str, **content: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        level = _LEVELS.get(event, "info")
        kept = {key: value for key, value in content.items() if value is not None}
        with suppress(OSError, ValueError):
            self.stream.write(json.dumps({"time": now, "level": level, "event": event, **kept}) + "\n")
            self.stream.flush()


class _Bar(_Text):
    """A bar while a step runs; when it has ended, the line of `_Text` remains."""

    def __init__(self, stream: IO[str]) -> None:
        import rich.console
        import rich.progress

        super().__init__(stream)
        self.console = rich.console.Console(file=cast("IO[str]", _Unbreakable(stream)), force_terminal=True)
        self.bars = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.TextColumn("{task.fields[counts]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            redirect_stdout=False,
        )
        self.tasks: dict[Step, rich.progress.TaskID] = {}

    def started(self, step: Step) -> None:
        if not self.tasks:
            self.bars.start()
        self.tasks[step] = self.bars.add_task(_one_line(step.name), total=step.total, counts="")

    def advanced(self, step: Step) -> None:
        task = self.tasks.get(step)
        if task is not None:
            self.bars.update(task, completed=step.done)
            speed = self.bars.tasks[self.bars.task_ids.index(task)].speed
            self.bars.update(task, counts=_counts(step, speed))

    def ended(self, step: Step, outcome: str, seconds: float) -> None:
        task = self.tasks.pop(step, None)
        if task is not None:
            self.bars.remove_task(task)
        if not self.tasks:
            self.bars.stop()
        super().ended(step, outcome, seconds)

    def line(self, text: str) -> None:
        self.console.print(_one_line(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.bars.stop()


class _Unbreakable(io.TextIOBase):
    """A stream that ignores write errors; rich would end the process when its stream is gone."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        return _is_terminal(self.stream)

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"


def _summary(step: Step, outcome: str, seconds: float) -> str:
    """Describe a step that ended: name, what it counted and found, outcome, seconds."""
    counted = [_amount(step.unit + "s", step.done)] if step.unit and step.done else []
    found = ", ".join(counted + [_amount(key, value) for key, value in step.notes.items()])
    ending = f"{seconds:.2f} s" if outcome == "finished" else f"{outcome} after {seconds:.2f} s"
    return "  ".join(filter(None, (f"{step.name:<24}", found, ending)))


def _amount(key: str, value: Any) -> str:
    """Value with its name: "9,308 users", "1 user", "width 64"."""
    name = key.replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int) or not name.endswith("s"):
        return f"{name} {_number(value)}"
    return f"{value:,} {name[:-1] if value == 1 else name}"


def _number(value: Any) -> str:
    if isinstance(value, bool | None):
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _counts(step: Step, speed: float | None) -> str:
    """Say how far a step is, and how fast: "1,024/9,308 users, 512/s"."""
    total = f"/{step.total:,}" if step.total is not None else ""
    rate = f", {speed:,.0f}/s" if speed and speed >= 10 else f", {speed:.2g}/s" if speed else ""
    return f"{step.done:,}{total} {step.unit + 's' if step.unit else ''}".rstrip() + rate


def _one_line(text: str) -> str:
    """Text without what would break the line, or steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _plain(value: Any) -> Any:
    """Value as JSON has it: numpy's numbers as Python's, infinities and NaN as None."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
