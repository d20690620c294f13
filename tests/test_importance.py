"""What a study's trials say of its space: parameter importance, families compared, and the Pareto set."""

import random
from collections.abc import Callable
from datetime import datetime
from time import process_time
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from crowds import crowd_of

from api.client import Caddie
from orchestrator.database import Database
from orchestrator.families import FAMILY
from orchestrator.importance import importance
from orchestrator.pareto import Point, front, scored

Rows = list[dict[str, Any]]
Crowd = Callable[[Rows], int]


@pytest.fixture
def crowd(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> Crowd:
    """Builds a study of these complete trials, and one more; its id."""

    def build(rows: Rows) -> int:
        return crowd_of(database, new_study("sweep"), new_trial(), trial_result(), now, rows).id

    return build


def drawn(count: int, seed: int = 0) -> Rows:
    """Trials whose score depends on the rank most, on the family less, on the passes of one family, and on no noise
    parameter."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        rank, family = rng.choice([0, 2, 4, 8]), rng.choice(["cycle", "core"])
        params: dict[str, Any] = {
            "rank": rank,
            "noise": rng.random(),
            "odd": rng.choice(["a", "b", None]),
            FAMILY: family,
        }
        bpb = 1.2 + 0.02 * (rank == 0) + 0.01 * (family == "cycle") + rng.gauss(0, 0.002)
        if family == "core":
            passes = params["passes"] = rng.randint(2, 4)
            bpb += 0.002 * passes
        rows.append({"params": params, "val_bpb": 40.0 if number == 7 else bpb, "feasible": number % 10 > 0})
    return rows


def test_what_moves_the_score_is_important_and_what_does_not_is_not(database: Database, crowd: Crowd) -> None:
    study = crowd(drawn(300))
    with database.read() as session:
        found = importance(session, study)
    shares = {each.name: each.importance or 0.0 for each in found.parameters}
    assert list(shares)[:3] == ["rank", FAMILY, "passes"] and found.trials == 301
    assert shares["rank"] > shares[FAMILY] > 0.1 > shares["passes"] > 0.01 > max(shares["noise"], shares["odd"])
    assert sum(shares.values()) < 1


def test_a_parameter_that_some_trials_have_takes_no_credit_for_what_made_it_apply(
    database: Database, crowd: Crowd
) -> None:
    rng = random.Random(1)
    rows: Rows = []
    for number in range(200):
        on = number % 2 == 0
        params = {"on": on, **({"depth": rng.randint(1, 3)} if on else {})}
        rows.append({"params": params, "val_bpb": 1.2 + 0.1 * on + rng.gauss(0, 0.001)})
    study = crowd(rows)
    with database.read() as session:
        found = {each.name: each for each in importance(session, study).parameters}
    shares = {name: each.importance or 0.0 for name, each in found.items()}
    assert shares["on"] > 0.7 and shares["depth"] < 0.02
    assert (found["on"].trials, found["depth"].trials) == (200, 100)


def test_nothing_is_said_of_a_few_trials_or_of_equal_ones(database: Database, crowd: Crowd) -> None:
    few = crowd(drawn(8))
    with database.read() as session:
        assert importance(session, few).parameters == ()


def test_equal_scores_have_no_important_parameter(database: Database, crowd: Crowd) -> None:
    study = crowd([{"params": {"a": n % 2}, "val_bpb": 2.5} for n in range(20)])
    with database.read() as session:
        assert [each.importance for each in importance(session, study).parameters] == [0.0]


def test_nothing_is_known_of_a_parameter_whose_values_are_all_one_or_all_different(
    database: Database, crowd: Crowd
) -> None:
    rng = random.Random(2)
    rows: Rows = [
        {"params": {"a": n % 2, "one": 3, "each": f"v{n}"}, "val_bpb": 2 + n % 2 + rng.random()} for n in range(20)
    ]
    study = crowd(rows)
    with database.read() as session:
        found = [(each.name, each.importance is None) for each in importance(session, study).parameters]
    assert found == [("a", False), ("each", True), ("one", True)]


def test_families_are_compared_by_what_keeps_the_caps(
    crowd: Crowd, database: Database, serve: Callable[..., str]
) -> None:
    rows: Rows = [{"params": {FAMILY: "core"}, "val_bpb": bpb} for bpb in (1.3, 1.1, 1.2)]
    rows += [{"params": {"sharing.tying": tying}, "val_bpb": 1.0, "feasible": False} for tying in ("cycle", [0, 1])]
    crowd(rows)
    with Caddie(serve(database, dashboard=False)) as caddie:
        found = caddie.importance("sweep")
        assert found.trials == 6 and found.parameters == []
        assert [(each.family, each.trials, each.best_bpb, each.median_bpb) for each in found.families] == [
            ("core", 3, 1.1, 1.2), ("cycle", 1, None, None), ("explicit", 1, None, None),
        ]  # fmt: skip
        pareto = caddie.pareto("sweep")
    assert [(point.number, point.val_bpb) for point in pareto.points] == [(2, 1.1)]


def test_the_front_is_whoever_no_other_beats_in_both() -> None:
    points = [
        Point(n, bpb, 1, size) for n, (bpb, size) in enumerate([(3, 1), (2, 2), (2.5, 2), (2, 3), (1, 9), (2, 2)])
    ]
    assert [point.number for point in front(points)] == [0, 1, 4]
    assert front([]) == []


@pytest.mark.soak
def test_importance_and_the_pareto_set_of_10_000_trials_are_quick(database: Database, crowd: Crowd) -> None:
    rng = random.Random(0)
    rows = [{**row, "artifact_bytes": rng.randrange(10**6, 10**7)} for row in drawn(10_000)]
    study, taken = crowd(rows), []
    with database.read() as session:
        for _ in range(3):
            began = process_time()
            importance(session, study)
            middle = process_time()
            assert 1 < len(front(scored(session, study))) < 100
            taken.append((middle - began, process_time() - middle))
    assert min(first for first, _ in taken) < 0.5 and min(second for _, second in taken) < 0.5, taken
