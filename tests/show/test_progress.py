"""What a run says: bars, lines, JSON, and a stream that breaks under it."""

import io
import json
import os
import pty
import re
from datetime import datetime, timedelta

import numpy as np
import pytest

from gpu_init.errors import InputError, Stopped
from gpu_init.show.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, error, terminal=False):
        super().__init__()
        self.error, self.terminal = error, terminal

    def write(self, text):
        raise self.error

    flush = isatty = lambda self, *_: self.terminal


def run(log_format, stream, error=None):
    with Progress(log_format, stream) as progress:
        progress.say("backend cpu: [asked] for")
        with progress.step("read interactions", unit="row") as step:
            step.advance(59_541)
            step.note(users=np.int64(9298), pairs=1, missing_items=0, width=64, share=np.float32(0.5))
        progress.warn("a split column")
        with progress.step("write image", total=4, unit="user") as step:
            for _ in range(4):
                step.advance()
            if error:
                raise error
    return progress


def test_text_is_one_line_per_step_and_message():
    stream = io.StringIO()
    run("text", stream)
    lines = [re.sub(r"[0-9.]+ s$", "0.00 s", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "backend cpu: [asked] for",
        "read interactions         59,541 rows, 9,298 users, 1 pair, 0 missing items, width 64, share 0.5  0.00 s",
        "warning: a split column",
        "write image               4 users  0.00 s",
    ]


def test_auto_is_text_where_there_is_no_terminal():
    stream = io.StringIO()
    run("auto", stream)
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 4


def test_json_is_one_object_per_line():
    stream = io.StringIO()
    run("json", stream)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        "message",
        "step_started",
        "step_finished",
        "warning",
        "step_started",
        "step_finished",
    ]
    assert [event["level"] for event in events] == ["info", "info", "info", "warning", "info", "info"]
    assert all(datetime.fromisoformat(event["time"]).utcoffset() == timedelta(0) for event in events)
    assert events[0]["message"] == "backend cpu: [asked] for"
    finished = events[2]
    assert finished["step"] == "read interactions"
    assert finished["seconds"] >= 0
    assert finished["done"] == 59_541
    assert finished["notes"] == {"users": 9298, "pairs": 1, "missing_items": 0, "width": 64, "share": 0.5}
    assert events[5]["total"] == 4


def test_json_stays_json_whatever_is_noted():
    stream = io.StringIO()
    with Progress("json", stream) as progress, progress.step("s") as step:
        step.note(a=float("nan"), b=np.inf, c=[np.float64(1), {"d": None}], e=object, f="\udc80\n")

    def refuse(constant):
        raise AssertionError(constant)

    notes = [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()][-1]["notes"]
    assert notes == {"a": None, "b": None, "c": [1.0, {"d": None}], "e": str(object), "f": "\udc80\n"}


def test_a_terminal_gets_a_bar_and_the_lines_stay():
    stream = Terminal()
    run("auto", stream)
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "━" in shown
    assert "write image" in shown
    plain = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]|\r", "", shown)
    assert "backend cpu: [asked] for\n" in plain
    assert re.search(r"read interactions {9}59,541 rows, 9,298 users, 1 pair, .*  [0-9.]+ s\n", plain)
    assert re.search(r"write image {15}4 users  [0-9.]+ s\n", plain)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is shown again


def test_a_terminal_that_was_asked_for_text_gets_text():
    stream = Terminal()
    run("text", stream)
    assert "\x1b" not in stream.getvalue()


def test_json_has_the_level_of_what_went_wrong():
    levels = {}
    for error in (InputError("x"), Stopped(15)):
        stream = io.StringIO()
        with pytest.raises(type(error)):
            run("json", stream, error)
        Progress("json", stream).error("why")
        levels |= {line["event"]: line["level"] for line in map(json.loads, stream.getvalue().splitlines())}
    assert {event: level for event, level in levels.items() if level != "info"} == {
        "warning": "warning",
        "step_failed": "error",
        "step_stopped": "warning",
        "error": "error",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("error", "outcome"), [(InputError("x"), "failed"), (Stopped(15), "stopped"), (KeyboardInterrupt(), "stopped")]
)
def test_a_step_left_by_an_exception_says_so(log_format, error, outcome):
    stream = io.StringIO()
    with pytest.raises(type(error)):
        run(log_format, stream, error)
    last = stream.getvalue().splitlines()[-1]
    assert (f"{outcome} after" if log_format == "text" else f'"step_{outcome}"') in last


def test_the_cursor_comes_back_after_an_exception():
    stream = Terminal()
    with pytest.raises(Stopped):
        run("auto", stream, Stopped(2))
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
    assert "stopped after" in stream.getvalue()


def test_timings_are_those_of_the_steps_that_ended():
    progress = run("text", io.StringIO())
    assert [timing["step"] for timing in progress.timings] == ["read interactions", "write image"]
    assert all(timing["seconds"] >= 0 for timing in progress.timings)
    stopped = Progress(None)
    with pytest.raises(ZeroDivisionError), stopped.step("s"):
        raise ZeroDivisionError
    assert stopped.timings == []


def test_none_says_nothing(capsys):
    assert len(run(None, None).timings) == 2
    assert capsys.readouterr() == ("", "")


def test_steps_inside_one_another():
    for stream in (io.StringIO(), Terminal()):
        with Progress("auto", stream) as progress, progress.step("outer"), progress.step("inner"):
            progress.say("within")
        assert [timing["step"] for timing in progress.timings] == ["inner", "outer"]


@pytest.mark.parametrize("log_format", ["auto", "text", "json"])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "no space"), ValueError("closed"), UnicodeEncodeError("a", "", 0, 0, "")]
)
def test_a_broken_stream_does_not_end_the_job(log_format, terminal, error):
    assert len(run(log_format, Broken(error, terminal)).timings) == 2


def test_a_closed_stream_does_not_end_the_job(monkeypatch):
    stream = io.StringIO()
    stream.close()
    assert len(run("auto", stream).timings) == 2
    monkeypatch.setattr("sys.stderr", None)
    assert len(run("auto", None).timings) == 2


def test_a_terminal_that_goes_away_does_not_end_the_job():
    ours, theirs = pty.openpty()
    stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
    progress = Progress("auto", stream)
    with progress.step("before", total=2, unit="block") as step:
        step.advance()
        os.close(ours)
        step.advance()
    progress.say("after")
    assert len(progress.timings) == 1
    with pytest.raises(OSError, match="Input/output"):  # what could not be written
        stream.close()


def test_a_line_stays_one_line():
    for stream in (io.StringIO(), Terminal()):
        Progress("auto", stream).say("file\n\x1b[2Jname\rlong " + "x" * 300)
        assert stream.getvalue().count("\n") == 1
        assert "\x1b[2J" not in stream.getvalue()
        assert "\r" not in stream.getvalue()
