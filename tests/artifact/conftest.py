"""The output folders that the tests of the artifact share."""

import pytest

from tests.support.small_runs import run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "out"


@pytest.fixture
def made(out):
    run(out)
    return out
