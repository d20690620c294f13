from datetime import datetime

from claims import NewStudies, NewTrials

from orchestrator import store
from orchestrator.database import Database
from orchestrator.history import History
from orchestrator.lifecycle import TrialState


def test_a_history_follows_the_table_though_it_reads_finished_trials_once(
    database: Database, now: datetime, new_study: NewStudies, new_trial: NewTrials
) -> None:
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
        for _ in range(3):
            store.add_trial(session, study.id, new_trial(), now)
        store.cancel_trial(session, study.id, 1, now)
    history = History(study.id)
    for number in (0, 2):
        with database.read() as session:
            first, again = history.read(session), history.read(session)
            assert first == again == store.list_trials(session, study.id)
            assert first[1].state is TrialState.CANCELLED
            assert first[1] is again[1]
        with database.write() as session:
            store.cancel_trial(session, study.id, number, now)
            store.add_trial(session, study.id, new_trial(), now)
    with database.read() as session:
        assert history.read(session) == store.list_trials(session, study.id)
