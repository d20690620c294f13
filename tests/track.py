"""A study whose runs end as a test says, without gangs."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from claims import Results

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome, TrialState
from orchestrator.spending import Purses
from orchestrator.study import AttemptResult, Claim, NewStudy, NewTrial, Run, Study, Trial
from orchestrator.supply import Supply
from worker.report import Measurement
from worker.spec import GangConfig

TTL = timedelta(hours=10)
ONE_CPU = GangConfig()


class Track:
    def __init__(self, database: Database, new: NewStudy, now: datetime, result: Results) -> None:
        self.database, self.now, self.result = database, now, result
        self.supply, self.purses = Supply(database), Purses()
        with database.write() as session:
            self.study: Study = store.create_study(session, new, now)

    def submit(self, new: NewTrial) -> Trial:
        with self.database.write() as session:
            added = store.add_trial(session, self.study.id, new, self.now)
        assert added is not None
        return added

    def add(self, gang: GangConfig = ONE_CPU) -> bool:
        """What the loop does where nothing waits."""
        return self.supply.add(self.current(), gang, self.now)[0]

    def claim(self, gang: GangConfig = ONE_CPU) -> Claim | None:
        with self.database.write() as session:
            return leases.claim(session, gang, "host", self.now, TTL, purses=self.purses)

    def claimed(self, gang: GangConfig = ONE_CPU) -> Claim:
        claim = self.claim(gang)
        assert claim is not None
        return claim

    def measure(self, claim: Claim, curve: Mapping[float, float]) -> None:
        """A whole curve so far, BPB by share of the budget."""
        said = [
            Measurement(number=n, step=n, elapsed_seconds=n, metrics={"fraction": fraction, "val_bpb": bpb})
            for n, (fraction, bpb) in enumerate(curve.items(), 1)
        ]
        with self.database.write() as session:
            leases.record(session, claim.lease, "train", said, self.now, TTL)

    def end(
        self,
        claim: Claim,
        val_bpb: float = 2.5,
        outcome: Outcome = Outcome.SUCCEEDED,
        seconds: float = 10.0,
        **fields: Any,
    ) -> None:
        """Its ranks were held for so long."""
        scored = outcome in (Outcome.SUCCEEDED, Outcome.STOPPED)
        result = self.result(val_bpb=val_bpb, stopped=outcome is Outcome.STOPPED, **fields) if scored else None
        with self.database.write() as session:
            leases.finish(
                session, claim.lease, AttemptResult(outcome, "", result, seconds={"train": seconds}), self.now
            )
        self.now += timedelta(seconds=1)

    def current(self) -> Study:
        with self.database.read() as session:
            return store.get_study(session, self.study.name)

    def trials(self) -> tuple[Trial, ...]:
        with self.database.read() as session:
            return store.list_trials(session, self.study.id)

    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.trials()]

    def runs(self, number: int) -> tuple[Run, ...]:
        with self.database.read() as session:
            return store.list_runs(session, store.get_trial(session, self.study.id, number).id)

    def events(self, kind: str) -> list[str]:
        with self.database.read() as session:
            return [event.message for event in store.list_events(session) if event.kind == kind]
