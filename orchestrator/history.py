"""A study's trials as the proposer needs them: all, by number, without reading the finished ones again."""

from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.lifecycle import OPEN_TRIALS
from orchestrator.study import Trial

CHUNK = 500  # numbers in one query; databases bound how many parameters a statement takes


class History:
    """A cache of one study. What a finished trial says never changes again."""

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._finished: dict[int, Trial] = {}

    def read(self, session: Session) -> tuple[Trial, ...]:
        """Every trial by number, as of this session's snapshot."""
        numbers = list(store.list_states(session, self._study_id))
        wanted = [number for number in numbers if number not in self._finished]
        trials = dict(self._finished)
        for start in range(0, len(wanted), CHUNK):
            for trial in store.list_trials(session, self._study_id, numbers=wanted[start : start + CHUNK]):
                trials[trial.number] = trial
                if trial.state not in OPEN_TRIALS:
                    self._finished[trial.number] = trial
        return tuple(trials[number] for number in numbers)
