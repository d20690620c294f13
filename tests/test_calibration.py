"""The byte predictor on the benchmark's real trainings: what its intervals promise is kept on trials held out."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest

SEARCH = Path(__file__).parents[1] / "benchmarks" / "search"


@pytest.fixture
def calibration() -> Iterator[ModuleType]:
    """benchmarks/search/calibration.py, which is a script: it finds what lies beside it."""
    sys.path.insert(0, str(SEARCH))
    yield importlib.import_module("calibration")
    sys.path.remove(str(SEARCH))


@pytest.mark.skipif(not (SEARCH / "table.jsonl").exists(), reason="benchmarks/search/table.py has not made its table")
@pytest.mark.parametrize("learned", [20, 50])
def test_the_interval_holds_85_to_95_percent_of_real_artifacts_within_2_percent(
    calibration: ModuleType, learned: int
) -> None:
    rows = [json.loads(line) for line in (SEARCH / "table.jsonl").read_text().splitlines()]
    trials = [calibration.trial_of(number, row) for number, row in enumerate(rows)]
    found = calibration.outcomes(trials, learned, "bytes")
    assert 0.85 <= mean(each.held for each in found) <= 0.95
    assert mean(each.half_width for each in found) < 0.02
