"""A study's trials as the proposer needs them: all, by number, each read again only when it may have changed."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.lifecycle import OPEN_TRIALS
from orchestrator.reopening import list_reopened
from orchestrator.study import Trial

CHUNK = 500  # numbers in one query; databases bound how many parameters a statement takes


class History:
    """A cache of one study. What a finished trial says changes only where it goes on; no trial's spec ever does.

    A trial that has not changed is the same object as before.
    """

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._trials: dict[int, Trial] = {}  # by number, in order
        self._reopened_until = 0  # the last event that was followed

    def read(self, session: Session) -> tuple[Trial, ...]:
        """Every trial by number, in its state as of this session's snapshot."""
        reopened, self._reopened_until = list_reopened(session, self._study_id, self._reopened_until)
        known = self._trials
        stale = [number for number, trial in known.items() if number in reopened or trial.state in OPEN_TRIALS]
        states = store.list_states(session, self._study_id, after=max(known, default=-1))
        for numbers in _chunks(stale):
            states |= store.list_states(session, self._study_id, numbers=numbers)
        same = {
            number for number, trial in known.items() if number not in reopened and trial.state == states.get(number)
        }
        changed = [number for number in sorted(states) if number not in same]
        specs = {number: trial.spec for number, trial in known.items() if number in states}
        with _uncollected():
            for numbers in _chunks(changed):
                for trial in store.list_trials(session, self._study_id, numbers=numbers, specs=specs):
                    known[trial.number] = trial
        return tuple(known.values())


@contextmanager
def _uncollected() -> Iterator[None]:
    """All that is built meanwhile is kept: the garbage collector would only go through it again and again, which at
    10,000 trials takes longer than building them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _chunks(numbers: list[int]) -> list[list[int]]:
    return [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
