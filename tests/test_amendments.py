"""What may change of a study over HTTP after it was created: state, budget, priority, archive; and clones of it."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from track import Track

from api.client import ApiError, Caddie
from orchestrator import store
from orchestrator.database import Database
from orchestrator.errors import OverBudget
from orchestrator.lifecycle import StudyState


@pytest.fixture
def track(database: Database, new_study: NewStudies, trial_result: Results, now: datetime) -> Track:
    return Track(database, new_study("sweep", max_trials=3), now, trial_result)


@pytest.fixture
def caddie(track: Track, serve: Callable[..., str]) -> Iterator[Caddie]:
    with Caddie(serve(track.database, dashboard=False), page_size=2) as caddie:
        yield caddie


def refused(caddie: Caddie, body: dict[str, Any], name: str = "sweep") -> tuple[int, list[str]]:
    with pytest.raises(ApiError) as refusal:
        caddie.change_study(name, body)
    return refusal.value.status, [problem.field for problem in refusal.value.problem.problems]


def test_a_study_is_changed_as_a_whole_or_not_at_all(caddie: Caddie, track: Track, new_trial: NewTrials) -> None:
    for _ in range(2):
        track.submit(new_trial())  # proposals
    before = caddie.study("sweep")
    wrong: list[tuple[dict[str, Any], tuple[int, list[str]]]] = [
        ({"priority": 5, "max_trials": 1}, (409, ["max_trials"])),
        ({"priority": 5, "state": "complete"}, (422, ["state"])),
        ({"priority": 1001}, (422, ["priority"])),
        ({"spending": {"gpu_hours": -1}}, (422, ["spending.gpu_hours"])),
        ({"spending": {"dollars": True}}, (422, ["spending.dollars"])),
        ({"spending": {"gpu_hour_dollars": 1e-9}}, (422, ["spending.gpu_hour_dollars"])),
        ({"name": "other"}, (422, ["name"])),
    ]
    for body, expected in wrong:
        assert refused(caddie, body) == expected, body
    assert caddie.study("sweep") == before
    body = {"state": "paused", "max_trials": 2, "priority": 7, "spending": {"gpu_hours": 4}}
    for _ in range(2):
        changed = caddie.change_study("sweep", body)
        assert (changed.state, changed.max_trials, changed.priority) == ("paused", 2, 7)
        assert changed.spending is not None and changed.spending.limit_gpu_hours == 4
    changed = caddie.change_study("sweep", {"state": "running", "spending": {"gpu_hours": None, "target_bpb": 1.1}})
    assert (changed.spending, changed.definition.spending.target_bpb) == (None, 1.1)
    assert caddie.study("sweep") == changed


def test_a_complete_study_that_may_propose_more_runs_again(caddie: Caddie, track: Track) -> None:
    with track.database.write() as session:
        store.move_study(session, track.study.id, StudyState.COMPLETE, track.now)
    caddie.move_study("sweep", "archive")
    assert caddie.studies() == [] and [study.name for study in caddie.studies(archived=True)] == ["sweep"]
    changed = caddie.change_study("sweep", {"max_trials": 10})
    assert (changed.state, changed.max_trials, changed.archived_at) == ("running", 10, None)
    assert track.add()


def test_a_stopped_study_gets_no_other_budget_and_can_be_archived(caddie: Caddie) -> None:
    with pytest.raises(ApiError, match="cannot be archived; only one that is stopped or complete can"):
        caddie.move_study("sweep", "archive")
    caddie.move_study("sweep", "stop")
    assert refused(caddie, {"max_trials": 10}) == (409, ["state"])
    at = caddie.move_study("sweep", "archive").archived_at
    assert at is not None and caddie.move_study("sweep", "archive").archived_at == at
    assert caddie.move_study("sweep", "unarchive").archived_at is None
    assert [study.name for study in caddie.studies(state=[StudyState.STOPPED])] == ["sweep"]
    assert caddie.studies(state=[StudyState.RUNNING]) == []
    assert refused(caddie, {"priority": 1}, "none") == (404, [])


def test_a_study_that_its_budget_stopped_runs_again_where_another_gives_room(
    caddie: Caddie, track: Track, new_trial: NewTrials
) -> None:
    for _ in range(2):
        track.submit(new_trial(origin="submitted"))
    caddie.change_study("sweep", {"spending": {"gpu_hours": 1}})
    track.end(track.claimed(), seconds=3600)
    track.supply.stop(track.current(), "the budget of 1 GPU-hours is spent", track.now)
    still = caddie.change_study("sweep", {"spending": {"gpu_hours": 0.5}})
    assert (still.state, still.reason) == ("stopped", "the budget of 1 GPU-hours is spent")
    assert refused(caddie, {"state": "running"}) == (409, ["state"])
    again = caddie.change_study("sweep", {"spending": {"gpu_hours": 3}})
    assert (again.state, again.reason, again.counts) == ("running", None, {"complete": 1, "cancelled": 1})
    caddie.retry("sweep", 1)
    track.claimed()


def _at_once(*calls: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


def test_changes_at_once_lose_none_of_each_other(caddie: Caddie) -> None:
    for hours in (2, 3, 4):
        _at_once(
            partial(caddie.change_study, "sweep", {"spending": {"gpu_hours": hours}}),
            partial(caddie.change_study, "sweep", {"spending": {"wall_hours": 10 + hours}}),
            partial(caddie.change_study, "sweep", {"spending": {"target_bpb": 1 + hours}}),
        )
        spending = caddie.study("sweep").definition.spending
        assert (spending.gpu_hours, spending.wall_hours, spending.target_bpb) == (hours, 10 + hours, 1 + hours)


def test_a_change_and_what_happens_to_trials_do_not_wait_for_one_another(
    caddie: Caddie, track: Track, new_trial: NewTrials
) -> None:
    changes: tuple[dict[str, Any], ...] = ({"priority": 3}, {"priority": 4}, {"priority": 5, "state": "stopped"})
    for change in changes:
        numbers = [track.submit(new_trial(origin="submitted")).number for _ in range(8)]

        def cancel(number: int) -> None:
            try:
                caddie.cancel("sweep", number)
            except ApiError as error:
                if error.status != 409:  # it was stopped first
                    raise

        _at_once(
            *[partial(cancel, number) for number in numbers[2:5]],
            partial(caddie.change_study, "sweep", change),
            *[partial(cancel, number) for number in numbers[5:]],
        )
    assert caddie.study("sweep").state == "stopped"


def test_what_keeps_budgets_sees_another_one(caddie: Caddie, track: Track, new_trial: NewTrials) -> None:
    for _ in range(3):
        track.submit(new_trial(origin="submitted"))
    track.end(track.claimed(), seconds=3600)
    for hours, allowed in ((1, False), (3, True)):
        study = caddie.change_study("sweep", {"spending": {"gpu_hours": hours}})
        assert study.spending is not None and study.spending.limit_gpu_hours == hours
        if allowed:
            track.claimed()
        else:
            with pytest.raises(OverBudget):
                track.claim()
    assert caddie.change_study("sweep", {"spending": {"gpu_hours": None}}).spending is None
    track.claimed()


def test_runs_of_a_study_with_a_higher_priority_start_first(caddie: Caddie, track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial(origin="submitted"))
    for name, priority in (("low", -1), ("high", 1)):
        caddie.clone_study("sweep", {"name": name})
        caddie.change_study(name, {"priority": priority})
        caddie.submit(name, {"overrides": {"sharing.lora.rank": 1}})
    names = {study.id: study.name for study in caddie.studies()}
    assert [names[track.claimed().study_id] for _ in range(3)] == ["high", "sweep", "low"]


def test_a_clone_has_the_same_search_with_its_changes_and_none_of_the_trials(caddie: Caddie) -> None:
    caddie.submit("sweep", {"overrides": {"sharing.lora.rank": 1}})
    source = caddie.study("sweep").definition
    same = caddie.clone_study("sweep", {"name": "same"})
    assert same.definition == source.model_copy(update={"name": "same"}) and not same.counts
    changes = {
        "sampler": "random",
        "max_trials": 5,
        "overrides": {"optimizer.matrix_lr": 0.03},
        "spending": {"dollars": 3},
    }
    other = caddie.clone_study("sweep", {"name": "other", **changes}).definition
    assert (other.sampler, other.max_trials, other.base["optimizer"]["matrix_lr"], other.spending.dollars) == (
        "random", 5, 0.03, 3,
    )  # fmt: skip
    assert other.space == source.space
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"name": "same"}, 409, "name"), ({"name": "A"}, 422, "name"), ({}, 422, "name"),
        ({"name": "new", "overrides": {"model.widht": 1}}, 422, "overrides.model.widht"),
        ({"name": "new", "base": {}}, 422, "base"), ({"name": "new", "max_trials": -1}, 422, "max_trials"),
    ]  # fmt: skip
    for body, status, field in wrong:
        with pytest.raises(ApiError) as refusal:
            caddie.clone_study("sweep", body)
        assert (refusal.value.status, refusal.value.problem.problems[0].field) == (status, field), body
    assert [study.name for study in caddie.studies()] == ["sweep", "same", "other"]
