"""Recency and sessions: worked by hand, the same from every format and in either way of reading."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gpu_init
from gpu_init.cli import main
from gpu_init.errors import InputError
from tests.support.interactions import frame, matrix, take, write

DAY = 86_400
START = 1_700_000_000  # 2023-11-14 22:13:20 UTC
# User 0: newest at day 30; the same item at day 20 and 30. User 1: alone. User 2: a newer one of weight 0.
ROWS = frame(
    [0, 0, 0, 1, 2, 2],
    [0, 1, 1, 2, 0, 3],
    w=[1.0, 1, 2, 5, 1, 0],
    timestamp=START + DAY * np.array([0, 20, 30, 7, 3, 99]),
)
WEIGHTED = [[1 / 8, 2 + 1 / 2, 0, 0], [0, 0, 5, 0], [1, 0, 0, 0]]
PLAIN = [[1 / 8, 1 + 1 / 2, 0, 0], [0, 0, 1, 0], [2 ** -(96 / 10), 0, 0, 1]]

WRITTEN = {
    "numbers": lambda times: times,
    "floats": lambda times: times.astype(float),
    "times": lambda times: pd.to_datetime(times, unit="s"),
    "times in ms with a zone": lambda times: (
        pd.to_datetime(times, unit="s", utc=True).astype("datetime64[ms, UTC]").dt.tz_convert("Asia/Tokyo")
    ),
    "text": lambda times: pd.to_datetime(times, unit="s").astype(str),
    "text with a zone": lambda times: pd.to_datetime(times, unit="s", utc=True).astype(str),
}
PLACES = ["a.parquet", "ids.parquet", "a.csv", "a.inter", "folder"]


def rows(path, half_life="10d", **columns):
    return take(path, half_life=half_life, **columns)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("written", WRITTEN)
def test_weights_by_hand(tmp_path, place, written):
    table = ROWS.assign(timestamp=WRITTEN[written](ROWS["timestamp"]))
    if place == "folder":
        write(tmp_path / "folder" / "1.parquet", table.iloc[::2])
        path = write(tmp_path / "folder" / "2.csv", table.iloc[1::2])
        path = str(tmp_path / "folder")
    else:
        table = table.assign(user_id="u" + table["user_id"].astype(str)) if place == "ids.parquet" else table
        path = write(tmp_path / place, table)
    np.testing.assert_allclose(matrix(rows(path)), PLAIN, rtol=1e-6)
    np.testing.assert_allclose(matrix(rows(path, weight="w")), WEIGHTED, rtol=1e-6)


def test_dates_are_days(tmp_path):
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(days=day) for day in (0, 20, 30, 7, 3, 99)]
    table = pa.table({"user_id": ROWS["user_id"], "item_id": ROWS["item_id"], "date": pa.array(days)})
    pq.write_table(table, tmp_path / "a.parquet")
    np.testing.assert_allclose(matrix(rows(str(tmp_path / "a.parquet"), time="date")), PLAIN, rtol=1e-6)


def test_a_number_alone_is_in_the_unit_of_the_column(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS.assign(timestamp=ROWS["timestamp"] * 1000))
    np.testing.assert_allclose(matrix(rows(path, 10.0 * DAY * 1000)), PLAIN, rtol=1e-6)


@pytest.mark.parametrize("text", ["240h", "14400m", "864000s", "10d", " 10 d ", "1.428571429w"])
def test_units(tmp_path, text):
    np.testing.assert_allclose(matrix(rows(write(tmp_path / "a.csv", ROWS), text)), PLAIN, rtol=1e-6)


def test_only_rows_that_are_taken_count(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS.assign(fold=[0, 0, 1, 0, 0, 1]))
    found = matrix(rows(path, where="fold == 0"))
    np.testing.assert_allclose(found[0], [1 / 4, 1, 0, 0], rtol=1e-6)


def test_what_is_too_old_is_no_interaction(tmp_path):
    path = write(tmp_path / "a.parquet", frame([0, 0], [0, 1], timestamp=[0, 101 * DAY]))
    np.testing.assert_array_equal(matrix(rows(path, "1d")), [[0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("times", "half_life", "words"),
    [
        ([START * 1000, START * 1000], "30d", r"row 0.*1700000000000.*not in seconds.*own unit"),
        (pd.to_datetime([0, 1]), 30.0, r"dates and times.*no unit.*30d"),
        ([1.0, np.nan], "30d", r"row 1.*no time"),
        ([1.0, np.inf], 30.0, r"row 1.*inf"),
        (["2024-01-31", "yesterday"], "30d", r"row 1 is 'yesterday'.*2024-01-31"),
        (["2024-01-31", None], "30d", r"row 1.*no time"),
        ([True, False], "30d", "boolean"),
    ],
)
def test_times_that_are_none(tmp_path, times, half_life, words):
    path = write(tmp_path / "a.parquet", frame([0, 1], [0, 1], timestamp=times))
    with pytest.raises(InputError, match=words):
        rows(path, half_life)


SESSIONS = pd.DataFrame(
    {
        "user_id": [0, 0, 0, 1],
        "session_id": [70, 71, 71, 72],
        "item_id": [0, 1, 2, 3],
        "timestamp": START + DAY * np.array([0, 10, 20, 5]),
    }
)


def job(tmp_path, *flags):
    np.save(tmp_path / "image.npy", np.eye(4, dtype=np.float32))
    base = [f"--features=image={tmp_path}/image.npy", f"--out={tmp_path}/out", "--clusters=1", "--overwrite"]
    code = main(["run", f"--interactions={tmp_path}/log.parquet", *base, *flags])
    return gpu_init.load(tmp_path / "out") if code == 0 else code


def test_rows_can_be_sessions(tmp_path, capsys):
    write(tmp_path / "log.parquet", SESSIONS)
    made = job(tmp_path, "--session-column=session_id", "--half-life=10d", "--lambda=1")
    np.testing.assert_allclose(made["image"].users, [[1, 0, 0, 0], [0, 1 / 3, 2 / 3, 0], [0, 0, 0, 1]], rtol=1e-6)
    assert made.user_ids.tolist() == [70, 71, 72]
    assert made.manifest["users"]["are"] == "sessions"
    assert made.manifest["job"]["half_life"] == "10d"
    assert "sessions" in capsys.readouterr().out
    assert len(job(tmp_path)["image"].users) == 2


def test_what_does_not_go_together(tmp_path, capsys):
    write(tmp_path / "log.parquet", SESSIONS)
    for flags, words in {
        ("--time-column=timestamp",): "half_life",
        ("--session-column=session_id", "--user-column=user_id"): "users or sessions",
        ("--session-column=session",): "--session-column",
        ("--half-life=1d", "--time-column=when"): "--time-column",
    }.items():
        assert job(tmp_path, *flags) == 2
        assert words in capsys.readouterr().err


def test_a_run_with_another_half_life_is_another_run(tmp_path, capsys):
    write(tmp_path / "log.parquet", SESSIONS)
    job(tmp_path, "--half-life=10d")
    assert job(tmp_path, "--half-life=20d", "--no-overwrite", "--resume") == 2
    assert "half_life: 10d -> 20d" in capsys.readouterr().err
