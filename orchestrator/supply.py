"""What studies ask for: promotions and proposals ahead of demand, and an end once all of theirs have been tried."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy.exc import IntegrityError, OperationalError

from orchestrator import seeds, store
from orchestrator.database import Database
from orchestrator.errors import IllegalMove
from orchestrator.history import History
from orchestrator.lifecycle import StudyState
from orchestrator.proposer import Proposer
from orchestrator.replicates import contenders_needed, earned
from orchestrator.rungs import Ladder, promote, tell_of_low
from orchestrator.shortening import Rung
from orchestrator.study import ReplicationConfig, Study
from worker.spec import GangConfig

log = logging.getLogger(__name__)


class Supply:
    """The proposers of every study that runs, with the histories that they have read. All of it is cache."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.searches: dict[int, tuple[Proposer, History]] = {}
        self.ladders: dict[int, Ladder] = {}
        self._decided: dict[int, tuple[tuple[int, int], bool]] = {}
        """What each study's runs had come to, and whether all were done, when its further seeds were last decided."""

    def shapes(self, study: Study) -> tuple[GangConfig, ...]:
        """Every shape of gang that runs of the study may wait for."""
        ladder = self._ladder(study)
        return study.definition.shapes if ladder is None else ladder.shapes()

    def add(self, study: Study, gang: GangConfig, now: datetime) -> tuple[bool, str | None]:
        """Queue one run for a gang of this shape: that of a trial to promote, or else of a proposal; whether one was,
        and the reason where there is none to propose."""
        added = False
        why: str | None = "the proposer failed"
        with self._alone(study, "the proposer", now):
            added, why = self._add(study, gang, now)
        return added, why

    def _add(self, study: Study, gang: GangConfig, now: datetime) -> tuple[bool, str | None]:
        ladder = self._ladder(study)
        if ladder is None:
            return self.propose(study, gang, None, now)
        if self._promote(study, ladder, gang, now):
            return True, None
        # By turns, since several shapes of gang may start on one.
        count = len(study.definition.shapes)
        turns = [study.definition.shapes[(study.proposed + turn) % count] for turn in range(count)]
        reasons = []
        for asked in turns:
            rung = ladder.start(asked)
            if rung.gang != gang:
                continue
            added, why = self.propose(study, asked, rung, now)
            if added or why is None:
                return added, None
            reasons.append(why)
        return False, "; ".join(dict.fromkeys(reasons))

    def _promote(
        self, study: Study, ladder: Ladder, gang: GangConfig | None, now: datetime, *, last: bool = False
    ) -> bool:
        """Queue the trial that should go on next, if one should; whether one was."""
        with self.database.read() as session:
            ladder.read(session)
        lows = [(n, low) for n in ladder.numbers if n not in ladder.told and (low := ladder.low(n)) is not None]
        promotion = ladder.due(gang, last=last)
        if promotion is None and not lows:
            return False
        with self.database.write() as session:
            promoted = promotion is not None and promote(session, study.id, promotion, now)
            for number, low in lows:
                tell_of_low(session, study.id, number, low, now)
        ladder.told.update(number for number, _ in lows)
        return promoted

    def _ladder(self, study: Study) -> Ladder | None:
        promotion = study.definition.promotion
        if promotion is None:
            return None
        if study.id not in self.ladders:
            self.ladders[study.id] = Ladder(study, promotion)
        return self.ladders[study.id]

    def propose(self, study: Study, gang: GangConfig, rung: Rung | None, now: datetime) -> tuple[bool, str | None]:
        """Add one proposal to the queue, at this rung, if the study wants more; whether it was added, and the reason
        where there is none to make."""
        if study.proposed >= study.definition.max_trials or not study.definition.space:
            return False, None
        if study.id not in self.searches:
            self.searches[study.id] = (Proposer(study), History(study.id))
        proposer, history = self.searches[study.id]
        with self.database.read() as session:
            trials = history.read(session)
        proposed = proposer.propose(trials, gang)
        added = None
        try:
            with self.database.write() as session:
                if proposed.trial is not None:
                    added = store.add_trial(session, study.id, proposed.trial, now, rung)
                if proposed.refused:
                    store.count_refused(session, study.id, proposed.refused)
        except IntegrityError:  # another orchestrator proposed the same spec first; the next tick sees it
            log.info("a proposal of study %s was made elsewhere too; dropped", study.name)
            return False, None
        return added is not None, proposed.reason

    def replicate(self, study: Study, gave_up: str | None, now: datetime) -> bool:
        """Queue the seeds that the study's trials have earned since the last look; whether there were any."""
        terms = study.definition.replication
        if terms is None:
            return False
        settled = False  # nor is it where the choice fails
        with self._alone(study, "the choice of seeds", now):
            settled = not self._replicate(study, terms, gave_up, now)
        return not settled

    def _replicate(self, study: Study, terms: ReplicationConfig, gave_up: str | None, now: datetime) -> bool:
        ladder = self._ladder(study)
        with self.database.read() as session:
            mark = seeds.progress_mark(session, study.id)
            idle = mark[1] == 0 and (study.proposed >= study.definition.max_trials or gave_up is not None)
            if idle and ladder is not None:  # promotions come before what is done because nothing else is left
                ladder.read(session)
                idle = ladder.due(last=True) is None
            if self._decided.get(study.id) == (mark, idle):
                return False
            standings = seeds.list_standings(session, study.id)
        added = False
        for due in earned(standings, terms, idle, contenders_needed(study.definition.max_trials)):
            with self.database.write() as session:
                run = seeds.add_seed(session, study.id, due.trial_id, due.seed, now, origin="earned", why=due.why)
            added = added or run is not None
        self._decided[study.id] = mark, idle
        return added

    def complete(self, study: Study, gave_up: str | None, now: datetime) -> None:
        """Complete a study whose proposals are made (or exhausted), and whose trials are all finished and promoted as
        far as they should be. `study` may be as it was a moment ago."""
        if not study.definition.space or (study.proposed < study.definition.max_trials and gave_up is None):
            return
        with self.database.read() as session:
            open_runs = store.count_open_runs(session, study.id)
            study = store.get_study(session, study.name)
        done = study.proposed >= study.definition.max_trials or gave_up is not None
        if study.state is not StudyState.RUNNING or not done or open_runs:
            return
        ladder = self._ladder(study)
        if ladder is not None and self._promote(study, ladder, None, now, last=True):
            return
        self._move(study, StudyState.COMPLETE, gave_up or "all proposed trials are finished", now)

    def stop(self, study: Study, why: str, now: datetime) -> None:
        """Stop a study that has spent or found enough; what runs goes on to its end."""
        self._move(study, StudyState.STOPPED, why, now)

    @contextmanager
    def _alone(self, study: Study, what: str, now: datetime) -> Iterator[None]:
        """Pause the study where this fails: one must not stop the others."""
        try:
            yield
        except OperationalError:
            raise
        except Exception as error:
            log.exception("%s of study %s failed", what, study.name)
            self._move(study, StudyState.PAUSED, f"{what} failed: {type(error).__name__}: {error}", now)

    def _move(self, study: Study, to: StudyState, why: str, now: datetime) -> None:
        try:
            with self.database.write() as session:
                store.move_study(session, study.id, to, now, why)
        except IllegalMove as error:  # someone moved it first
            log.info("%s", error)
        else:
            self.searches.pop(study.id, None)
            self.ladders.pop(study.id, None)
            log.info("study %s is %s: %s", study.name, to, why)
