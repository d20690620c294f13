"""Claims and what they report: words that the tests of attempts share."""

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy.orm import Session

from orchestrator.leases import claim
from orchestrator.study import Claim, NewStudy, NewTrial
from worker.report import Measurement, TrialResult
from worker.spec import GangConfig

NewStudies = Callable[..., NewStudy]
NewTrials = Callable[..., NewTrial]
Results = Callable[..., TrialResult]

TTL = timedelta(seconds=60)
ONE_CPU = GangConfig()


def claimed(session: Session, now: datetime, gang: GangConfig = ONE_CPU) -> Claim:
    """The run that is next for such a gang."""
    won = claim(session, gang, "a", now, TTL)
    assert won is not None
    return won


def measured(*numbers: int) -> list[Measurement]:
    """Measurements with these numbers."""
    return [
        Measurement(number=n, step=10 * n, elapsed_seconds=float(n), metrics={"train_loss": 4 / n, "lr": 1.0})
        for n in numbers
    ]
