"""Predictions calibrated on a study's complete trials, which are followed rather than read again for each."""

import threading

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.feasibility import Predictor
from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial
from orchestrator.tables import EVENTS, TRIALS
from worker.inventory import TensorClass
from worker.spec import TrialSpec

RECENT_TRIALS = 500  # complete ones, that a prediction starts from
COMPLETED = "trial.complete"
_NEWS = (
    select(EVENTS.c.id, EVENTS.c.trial_number, EVENTS.c.kind).order_by(EVENTS.c.id)
    .where(EVENTS.c.study_id == bindparam("study_id"), EVENTS.c.id > bindparam("after"))
)  # fmt: skip


class Calibration:
    """What one study's trials say of the next one's bytes and seconds. Safe to share between threads."""

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._predictor: Predictor | None = None
        self._after = 0  # the last event that was followed
        self._lock = threading.Lock()

    def follow(self, session: Session) -> None:
        """Learn every trial that is complete in this session's snapshot. A complete trial never changes again."""
        with self._lock:
            if self._predictor is None:
                last = select(func.max(EVENTS.c.id)).where(EVENTS.c.study_id == self._study_id)
                self._after = session.scalar(last) or 0
                self._predictor = Predictor.of(_latest(session, self._study_id))
                return
            news = session.connection().execute(_NEWS, {"study_id": self._study_id, "after": self._after}).all()
            done = [number for _, number, kind in news if kind == COMPLETED]
            for trial in store.list_trials(session, self._study_id, numbers=done) if done else ():
                self._predictor.learn(trial)
            self._after = news[-1].id if news else self._after

    def predict(self, spec: TrialSpec, spec_hash: str | None = None) -> Prediction:
        """What the spec will cost, by the trials that were followed. Whoever has its canonical hash saves time."""
        with self._lock:
            assert self._predictor is not None, "a calibration follows its study first"
            return self._predictor.predict(spec, spec_hash)

    def shares(self, spec: TrialSpec) -> dict[TensorClass, float]:
        """Each tensor class's share of the spec's artifact without code, by the same trials."""
        with self._lock:
            assert self._predictor is not None, "a calibration follows its study first"
            return self._predictor.shares(spec)


class Calibrations:
    """Those of all studies that were asked for, by id: an application has one."""

    def __init__(self) -> None:
        self._lock, self._known = threading.Lock(), dict[int, Calibration]()

    def read(self, session: Session, study_id: int) -> Calibration:
        """The study's, as of this session's snapshot at least."""
        with self._lock:
            calibration = self._known.setdefault(study_id, Calibration(study_id))
        calibration.follow(session)
        return calibration


def _latest(session: Session, study_id: int) -> tuple[Trial, ...]:
    complete = select(TRIALS.c.number).where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE)
    numbers = session.scalars(complete.order_by(TRIALS.c.number.desc()).limit(RECENT_TRIALS)).all()
    return store.list_trials(session, study_id, numbers=numbers)
