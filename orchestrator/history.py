"""A study's trials as the proposer needs them: all, by number, each read again only when its state has changed."""

from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.lifecycle import OPEN_TRIALS
from orchestrator.study import Trial

CHUNK = 500  # numbers in one query; databases bound how many parameters a statement takes


class History:
    """A cache of one study. What a finished trial says never changes again, and no trial's spec ever does."""

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._trials: dict[int, Trial] = {}  # by number, in order

    def read(self, session: Session) -> tuple[Trial, ...]:
        """Every trial by number, in its state as of this session's snapshot."""
        known = self._trials
        still_open = [number for number, trial in known.items() if trial.state in OPEN_TRIALS]
        states = store.list_states(session, self._study_id, after=max(known, default=-1))
        for numbers in _chunks(still_open):
            states |= store.list_states(session, self._study_id, numbers=numbers)
        changed = [number for number in sorted(states) if number not in known or known[number].state != states[number]]
        specs = {number: trial.spec for number, trial in known.items() if number in states}
        for numbers in _chunks(changed):
            for trial in store.list_trials(session, self._study_id, numbers=numbers, specs=specs):
                known[trial.number] = trial
        return tuple(known.values())


def _chunks(numbers: list[int]) -> list[list[int]]:
    return [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
