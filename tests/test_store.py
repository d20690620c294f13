"""The store's contract for studies, events and sessions, on SQLite and PostgreSQL."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from threading import Barrier, Event

import pytest
from claims import ONE_CPU, TTL, NewStudies, NewTrials, Results
from sqlalchemy import text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from orchestrator.database import Database
from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.leases import claim, finish
from orchestrator.lifecycle import STUDY_MOVES, Outcome, RunState, StudyState, TrialState
from orchestrator.store import (
    add_event,
    add_trial,
    cancel_trial,
    count_refused,
    count_trials,
    create_study,
    get_study,
    get_trial,
    list_events,
    list_runs,
    list_studies,
    list_trials,
    move_study,
)
from orchestrator.study import AttemptResult, Study
from orchestrator.tables import StudyRow, TrialRow

MINUTE = timedelta(minutes=1)


@pytest.fixture
def impatient(database: Database) -> Iterator[Session]:
    """A session that raises OperationalError where it would have to wait for another's lock."""
    with database.engine.connect() as connection, Session(connection) as session:
        connection.execute(text("PRAGMA busy_timeout = 1" if database.is_sqlite else "SET lock_timeout = 1"))
        connection.commit()
        yield session


# Studies


def test_a_study_is_created_running_and_read_back_as_it_was_defined(
    database: Database, new_study: NewStudies, now: datetime
) -> None:
    space = {"sharing.tying": {"choice": ["cycle", [0, 1, 2, 2, 1, 0], {"pattern": "tail", "after": None}]}}
    new = new_study(space=space, gangs=[{"ranks": 1}, {"ranks": 2}])
    with database.write() as session:
        created = create_study(session, new, now)
    with database.read() as session:
        read = get_study(session, new.name)
    assert read == created
    assert read.definition == new
    assert (read.state, read.proposed, read.refused) == (StudyState.RUNNING, 0, 0)
    assert (read.created_at, read.changed_at) == (now, now)


def test_a_taken_name_is_a_conflict_that_names_it_and_adds_nothing(
    database: Database, study: Study, new_study: NewStudies, now: datetime
) -> None:
    with pytest.raises(Conflict, match="name: is taken") as refused, database.write() as session:
        create_study(session, new_study(study.name), now)
    assert refused.value.existing == study.name
    with database.read() as session:
        assert list_studies(session) == (study,)
        assert len(list_events(session)) == 1


def test_of_several_that_create_one_name_at_once_one_wins_and_the_others_meet_a_conflict(
    database: Database, new_study: NewStudies, now: datetime
) -> None:
    together = Barrier(4)

    def create(_: int) -> str:
        together.wait()
        try:
            with database.write() as session:
                create_study(session, new_study("same"), now)
        except Conflict:
            return "conflict"
        return "created"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(create, range(4))) == ["conflict", "conflict", "conflict", "created"]


def test_a_study_that_was_stored_with_truth_for_a_number_is_read_still(database: Database, study: Study) -> None:
    definition = study.definition.model_dump(mode="json")
    definition["base"]["sharing"]["unique_blocks"] = True
    definition["space"] = {"sharing.lora.rank": {"choice": [True, 4]}}
    with database.write() as session:
        session.execute(update(StudyRow).values(definition=definition))
    with database.read() as session:
        (read,) = list_studies(session)
    assert read.definition.space["sharing.lora.rank"].choice == (1, 4)


def test_a_study_that_does_not_exist_is_not_found(database: Database, new_trial: NewTrials, now: datetime) -> None:
    with database.read() as session, pytest.raises(NotFound, match="no study 'nope'"):
        get_study(session, "nope")
    with pytest.raises(NotFound), database.write() as session:
        move_study(session, 7, StudyState.PAUSED, now)
    with pytest.raises(NotFound), database.write() as session:
        add_trial(session, 7, new_trial(origin="submitted"), now)


@pytest.mark.parametrize("before", list(StudyState))
@pytest.mark.parametrize("after", list(StudyState))
def test_a_study_moves_only_along_the_table_of_moves(
    before: StudyState, after: StudyState, database: Database, study: Study, now: datetime
) -> None:
    with database.write() as session:
        session.execute(update(StudyRow).values(state=before, reason="as it was"))
    later = now + MINUTE
    if after in STUDY_MOVES[before]:
        with database.write() as session:
            moved = move_study(session, study.id, after, later, "because")
        assert (moved.state, moved.changed_at, moved.reason) == (after, later, "because")
    else:
        with pytest.raises(IllegalMove, match=before) as refused, database.write() as session:
            move_study(session, study.id, after, later, "because")
        assert refused.value.state == before
        assert after not in refused.value.allowed
        moved = replace(study, state=before, reason="as it was")
    with database.read() as session:
        assert get_study(session, study.name) == moved
        assert len(list_events(session)) == (2 if after in STUDY_MOVES[before] else 1)


def test_stopping_a_study_cancels_what_waits_and_leaves_what_runs(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        for _ in range(3):
            add_trial(session, study.id, new_trial(), now)
        running = claim(session, ONE_CPU, "a", now, TTL)
        move_study(session, study.id, StudyState.STOPPED, now, "enough")
    assert running is not None
    with database.read() as session:
        states = [trial.state for trial in list_trials(session, study.id)]
        runs = [run.state for trial in list_trials(session, study.id) for run in list_runs(session, trial.id)]
        told = [event.kind for event in list_events(session)][-3:]
    assert states == [TrialState.RUNNING, TrialState.CANCELLED, TrialState.CANCELLED]
    assert runs == [RunState.RUNNING, RunState.CANCELLED, RunState.CANCELLED]
    assert told == ["study.stopped", "trial.cancelled", "trial.cancelled"]


def test_a_study_with_open_runs_cannot_become_complete(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        add_trial(session, study.id, new_trial(), now)
    with pytest.raises(IllegalMove, match="open runs"), database.write() as session:
        move_study(session, study.id, StudyState.COMPLETE, now)
    with database.write() as session:
        assert get_study(session, study.name).state is StudyState.RUNNING
        cancel_trial(session, study.id, 0, now)
        assert move_study(session, study.id, StudyState.COMPLETE, now).state is StudyState.COMPLETE


def test_studies_are_listed_by_age_and_by_state(
    database: Database, study: Study, new_study: NewStudies, now: datetime
) -> None:
    with database.write() as session:
        second = create_study(session, new_study("another"), now)
        paused = move_study(session, second.id, StudyState.PAUSED, now)
        assert list_studies(session) == (study, paused)
        assert list_studies(session, [StudyState.PAUSED]) == (paused,)
        assert list_studies(session, [StudyState.STOPPED]) == ()


def test_refused_proposals_are_counted(database: Database, study: Study) -> None:
    for refused in (2, 3):
        with database.write() as session:
            count_refused(session, study.id, refused)
    with database.read() as session:
        assert get_study(session, study.name).refused == 5


# Events


def test_events_are_read_after_a_cursor_of_one_study_or_all(
    database: Database, study: Study, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        other = create_study(session, new_study("other"), now)
        add_trial(session, study.id, new_trial(), now)
    with database.read() as session:
        everything = list_events(session)
        assert [(event.study_id, event.kind) for event in everything] == [
            (study.id, "study.created"), (other.id, "study.created"), (study.id, "trial.queued")
        ]  # fmt: skip
        assert list_events(session, after=everything[0].id, limit=1) == everything[1:2]
        assert list_events(session, study_id=other.id) == everything[1:2]
    assert [event.trial_number for event in everything] == [None, None, 0]
    assert everything[2].at == now


def test_a_reader_that_follows_the_events_misses_none_of_concurrent_writers(
    database: Database, study: Study, now: datetime
) -> None:
    writers, each = 4, 8
    together = Barrier(writers + 1)
    done = Event()

    def write(writer: int) -> None:
        together.wait()
        for number in range(each):
            with database.write() as session:
                add_event(session, study.id, None, "said", f"{writer}.{number}", now)

    def follow() -> list[str]:
        together.wait()
        seen: list[str] = []
        cursor = 0
        while True:
            last_look = done.is_set()
            with database.read() as session:
                for event in list_events(session, after=cursor):
                    cursor = event.id
                    seen.append(event.message)
            if last_look:
                return seen

    with ThreadPoolExecutor(writers + 1) as pool:
        following = pool.submit(follow)
        list(pool.map(write, range(writers)))
        done.set()
        seen = following.result()
    assert sorted(seen[1:]) == sorted(f"{writer}.{number}" for writer in range(writers) for number in range(each))


def test_an_event_waits_for_the_commit_of_the_one_before_it(
    database: Database, study: Study, impatient: Session, now: datetime
) -> None:
    with database.write() as session:
        add_event(session, study.id, None, "said", "first", now)
        with pytest.raises(OperationalError, match="lock"):
            add_event(impatient, study.id, None, "said", "second", now)
    with database.read() as session:
        assert [event.message for event in list_events(session)][1:] == ["first"]


def test_a_stop_waits_for_an_ending_that_may_put_its_run_back_into_the_queue(
    database: Database, study: Study, new_trial: NewTrials, impatient: Session, now: datetime
) -> None:
    with database.write() as session:
        add_trial(session, study.id, new_trial(), now)
        held = claim(session, ONE_CPU, "a", now, TTL)
    assert held is not None
    with database.write() as session:
        finish(session, held.lease, AttemptResult(Outcome.FAILED), now)
        with pytest.raises(OperationalError, match=r'relation "studies"|database is locked'):
            move_study(impatient, study.id, StudyState.STOPPED, now)
    with database.write() as session:
        move_study(session, study.id, StudyState.STOPPED, now)
        assert count_trials(session, study.id) == {TrialState.CANCELLED: 1}


# Sessions


def test_a_write_that_raises_leaves_nothing(database: Database, new_study: NewStudies, now: datetime) -> None:
    with pytest.raises(Conflict), database.write() as session:  # noqa: PT012
        create_study(session, new_study("first"), now)
        create_study(session, new_study("first"), now)
    with database.read() as session:
        assert list_studies(session) == ()


def test_a_read_changes_nothing(database: Database, study: Study) -> None:
    with database.read() as session:
        try:
            session.execute(update(StudyRow).values(refused=9))
        except DBAPIError:
            session.rollback()
    with database.read() as session:
        assert get_study(session, study.name) == study


def test_a_read_sees_one_moment_whatever_is_committed_meanwhile(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.read() as session:
        assert list_trials(session, study.id) == ()
        with database.write() as writing:
            add_trial(writing, study.id, new_trial(), now)
        assert list_trials(session, study.id) == ()
        assert count_trials(session, study.id) == {}
    with database.read() as session:
        assert count_trials(session, study.id) == {TrialState.QUEUED: 1}


def test_what_is_read_again_in_one_session_is_what_the_session_has_written(
    database: Database, study: Study, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        added = add_trial(session, study.id, new_trial(), now)
        assert added is not None
        row = session.get_one(TrialRow, added.id)  # held, so that the session keeps it too
        held = claim(session, ONE_CPU, "a", now, TTL)
        assert held is not None
        finish(session, held.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
        trial = get_trial(session, study.id, 0)
        assert (trial.state, trial.result, row.state) == (TrialState.COMPLETE, trial_result(), TrialState.COMPLETE)


def test_moments_come_back_as_the_same_instant_in_utc(database: Database, new_study: NewStudies, now: datetime) -> None:
    elsewhere = now.astimezone(timezone(timedelta(hours=5, minutes=30)))
    with database.write() as session:
        create_study(session, new_study(), elsewhere)
    with database.read() as session:
        created = get_study(session, "sharing").created_at
    assert (created, created.tzinfo) == (now, UTC)
