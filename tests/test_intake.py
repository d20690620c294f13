"""Submissions that are taken in together: each has the answer that it would have alone."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from claims import NewStudies

from api.bodies import TrialIn
from api.context import Context, Writer
from api.intake import Submission, Taken, take
from orchestrator import store
from orchestrator.database import Database
from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.lifecycle import StudyState
from worker.spec import InvalidSpec

Send = Callable[..., Submission]


@pytest.fixture
def context(database: Database, new_study: NewStudies, now: datetime) -> Context:
    with database.write() as session:
        for name in ("one", "two"):
            store.create_study(session, new_study(name), now)
    return Context(database, None)


@pytest.fixture
def send(database: Database, now: datetime) -> Send:
    def build(rank: int, study: str = "one", key: str | None = None, **fields: Any) -> Submission:
        body = TrialIn.model_validate({"overrides": {"sharing.lora.rank": rank}, **fields})
        return Submission(study, body, key, Writer(database, "ann", now))

    return build


def told(answers: list[Taken | Exception]) -> list[object]:
    """The number of each, with whether it is a replay; or the kind of its refusal."""
    return [(one.number, one.replayed) if isinstance(one, Taken) else type(one) for one in answers]


def test_a_group_of_studies_keys_and_duplicates_has_each_its_own_answer(context: Context, send: Send) -> None:
    group = [
        send(1), send(2, "two", "k"), send(1), send(3, key="k"), send(3, key="k"), send(4, key="k"), send(-1),
        send(1, "none"), send(1, "two"), send(2, "two", "k"), send(5),
    ]  # fmt: skip
    new, again = [(0, False), (0, False), (1, False), (1, False), (2, False)], [(1, True), (0, True)]
    assert told(take(context, group)) == [
        new[0], new[1], Conflict, new[2], again[0], Conflict, InvalidSpec, NotFound, new[3], again[1], new[4]
    ]  # fmt: skip
    replayed = told(take(context, [group[3], group[1]]))
    assert replayed == again


def test_a_replay_is_answered_beside_what_a_stopped_study_refuses(
    context: Context, send: Send, database: Database, now: datetime
) -> None:
    assert told(take(context, [send(1, key="k")])) == [(0, False)]
    with database.write() as session:
        store.move_study(session, store.get_study(session, "one").id, StudyState.STOPPED, now)
    group = [send(2), send(1, key="k"), send(3), send(1, "two")]
    assert told(take(context, group)) == [IllegalMove, (0, True), IllegalMove, (0, False)]
