"""The loop: poll gangs, record what they say, propose ahead of demand, give runs to free gangs.

Every step can be repeated.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.exc import OperationalError

from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.errors import LeaseLost
from orchestrator.launcher import Assignment, Ending, Launcher, NoRoom
from orchestrator.lifecycle import Cause, Outcome, StudyState
from orchestrator.study import AttemptResult, Claim, Study
from orchestrator.supply import Supply
from orchestrator.watch import Watch
from worker.spec import GangConfig

log = logging.getLogger(__name__)


@dataclass
class Held:
    """An attempt of ours: its claim, the last message recorded, and when its lease was last renewed."""

    claim: Claim
    renewed_at: datetime
    after: int = 0
    phase: str = "queue"
    unstored: bool = False
    """Whether its artifact could not be written so far."""
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.claim.spec.limits, self.claim.started_at)


@dataclass
class Loop:
    """One orchestrator. It may be killed between any two statements: leases and the database hold all that matters."""

    database: Database
    launcher: Launcher
    artifacts: ArtifactStore
    owner: str
    ttl: timedelta
    held: dict[int, Held] = field(default_factory=dict)
    told: set[tuple[int, GangConfig]] = field(default_factory=set)
    """Studies and shapes of which it was said that nothing here can hold them."""
    supply: Supply = field(init=False)

    def __post_init__(self) -> None:
        self.supply = Supply(self.database)

    def resume(self, now: datetime) -> None:
        """Take over what an orchestrator of our name left: attempts whose gang still lives train on and never notice,
        the others are queued again at once, and gangs that nobody owns are removed. Before the first tick."""
        with self.database.write() as session:
            left = leases.resume(session, self.owner, now, self.ttl)
        for resumed in left:
            attempt_id = resumed.claim.lease.attempt_id
            held = self.held[attempt_id] = Held(resumed.claim, now, resumed.after, resumed.phase)
            if resumed.gang is not None and self.launcher.adopt(attempt_id, resumed.gang):
                log.info("trial %d goes on, on %s", resumed.claim.trial_number, resumed.gang)
            else:
                self._finish(held, AttemptResult(Outcome.LOST, "its orchestrator died, and its gang with it"), now)
        if removed := self.launcher.reap():
            log.warning("%d gangs that nobody owned were removed", removed)

    def tick(self, now: datetime) -> None:
        """Everything that is due at `now`, once."""
        self._drop_lost()
        for held in list(self.held.values()):
            try:
                self._poll(held, now)
            except OperationalError:  # the database is away: nothing is lost, the gang keeps what it measured
                raise
            except Exception as error:  # one gang must not stop the others
                log.exception("attempt %d could not be polled", held.claim.lease.attempt_id)
                self._finish(held, _failed(error), now)
        # After our own were renewed: a lease that ran out while we could not write is ours until someone takes it.
        with self.database.write() as session:
            lost = leases.expire(session, now)
        if lost:
            log.warning("%d attempts lost their lease and were queued again", lost)
        with self.database.read() as session:
            studies = store.list_studies(session, (StudyState.RUNNING,))
        gave_up = {study.id: self._feed(study, now) for study in studies}
        for study in studies:
            self.supply.complete(study, gave_up[study.id], now)

    def hand_back(self, now: datetime) -> None:
        """Record what has ended, queue the rest again without charge, and free every gang."""
        for attempt_id, held in list(self.held.items()):
            try:
                self._poll(held, now)
            except Exception:
                log.exception("attempt %d could not be polled a last time", attempt_id)
            if attempt_id in self.held:
                self._finish(held, AttemptResult(Outcome.PREEMPTED, "the orchestrator was stopped"), now)

    def _drop_lost(self) -> None:
        """Kill the gangs whose attempt is no longer ours: cancelled, or expired while we were away."""
        with self.database.read() as session:
            ours = leases.still_held(session, [held.claim.lease for held in self.held.values()])
        for attempt_id in set(self.held) - ours:
            self._release(attempt_id, "is no longer ours")

    def _poll(self, held: Held, now: datetime) -> None:
        lease = held.claim.lease
        update = self.launcher.poll(lease.attempt_id, held.after)
        if update.measurements or update.phase != held.phase or now - held.renewed_at > self.ttl / 3:
            try:
                with self.database.write() as session:
                    leases.record(session, lease, update.phase, update.measurements, now, self.ttl)
            except LeaseLost:
                self._release(lease.attempt_id, "lost its lease")
                return
            held.after = update.measurements[-1].number if update.measurements else held.after
            held.phase, held.renewed_at = update.phase, now
        ending = update.ending or held.watch.look(update, now)
        if ending is None:
            return
        try:
            result = self._keep(lease.attempt_id, ending)
        except OSError as error:  # a full disk, say: the gang has the only copy and keeps it until there is room
            if not held.unstored:
                log.error("the artifact of attempt %d cannot be stored, trying again: %s", lease.attempt_id, error)
            held.unstored = True
            return
        self._finish(held, result, now)

    def _keep(self, attempt_id: int, ending: Ending) -> AttemptResult:
        """The ending with its artifact stored: on disk first, so that no row ever names a file that is not there."""
        artifact = self.artifacts.put(self.launcher.artifact(attempt_id)) if ending.result is not None else None
        return AttemptResult(ending.outcome, ending.reason, ending.result, artifact, ending.cause)

    def _finish(self, held: Held, result: AttemptResult, now: datetime) -> None:
        try:
            with self.database.write() as session:
                leases.finish(session, held.claim.lease, result, now)
            log.info("trial %d ended as %s %s", held.claim.trial_number, result.outcome, result.reason)
        except LeaseLost:
            log.warning("trial %d ended as %s without its lease; dropped", held.claim.trial_number, result.outcome)
        self._release(held.claim.lease.attempt_id, None)

    def _release(self, attempt_id: int, why: str | None) -> None:
        if why:
            log.warning("attempt %d %s; its gang is released", attempt_id, why)
        self.launcher.release(attempt_id)
        self.held.pop(attempt_id, None)

    def _feed(self, study: Study, now: datetime) -> str | None:
        """Keep a proposal waiting for each shape while free gangs take runs, widest first; why none is left to make."""
        shapes = sorted(study.definition.shapes, key=lambda gang: -gang.ranks)
        gave_up: dict[GangConfig, str] = {}
        moved = True
        while moved:
            before = self._queued(study)
            waiting = sorted({*shapes, *before}, key=lambda gang: -gang.ranks)
            started = sum(self._start(gang, now) for gang in waiting)
            # Only now, and for next time: a free gang does not wait for the sampler.
            queued = self._queued(study) if started else before
            for gang in shapes:
                if not queued.get(gang) and gang not in gave_up and (why := self.supply.propose(study, gang, now)):
                    gave_up[gang] = why
            moved = started > 0 or self._queued(study) != before
        self._tell_of_no_room(study, queued, now)
        return "; ".join(dict.fromkeys(gave_up.values())) if len(gave_up) == len(shapes) else None

    def _queued(self, study: Study) -> Mapping[GangConfig, int]:
        with self.database.read() as session:
            return store.count_queued(session, study.id)

    def _start(self, gang: GangConfig, now: datetime) -> bool:
        """Claim a run of this shape for a free gang, if there is both."""
        if not self.launcher.free(gang):
            return False
        with self.database.write() as session:
            claim = leases.claim(session, gang, self.owner, now, self.ttl)
        if claim is None:
            return False
        held = self.held[claim.lease.attempt_id] = Held(claim, now, phase="start")
        try:
            name = self.launcher.start(Assignment(claim.lease.attempt_id, claim.spec))
        except NoRoom as error:
            self._finish(held, AttemptResult(Outcome.PREEMPTED, str(error)), now)
            return False
        except Exception as error:  # one gang must not stop the others
            log.exception("attempt %d could not be started", claim.lease.attempt_id)
            self._finish(held, _failed(error), now)
            return False
        try:
            with self.database.write() as session:
                leases.renew(session, claim.lease, now, self.ttl, gang=name, phase=held.phase)
        except LeaseLost:  # cancelled between the claim and now
            self._release(claim.lease.attempt_id, "lost its lease before it began")
        log.info("trial %d started on %s", claim.trial_number, name)
        return True

    def _tell_of_no_room(self, study: Study, queued: Mapping[GangConfig, int], now: datetime) -> None:
        """Say once, as an event of the study, that runs wait for a shape that nothing here can ever hold."""
        for gang in queued:
            if (study.id, gang) in self.told or self.launcher.capacity(gang):
                continue
            self.told.add((study.id, gang))
            shape = f"{gang.ranks} {gang.device} ranks"
            why = f"Runs wait for a gang of {shape}: {self.owner} has no node that could hold one"
            log.warning("study %s: %s", study.name, why)
            with self.database.write() as session:
                store.add_event(session, study.id, None, "study.waiting", why, now)


def _failed(error: Exception) -> AttemptResult:
    return AttemptResult(Outcome.FAILED, f"{type(error).__name__}: {error}", cause=Cause.ERROR)


def run(loop: Loop, clock: Callable[[], datetime], wait: Callable[[float], bool], tick_seconds: float = 0.2) -> None:
    """Resume, then tick until `wait(seconds)` says to stop; then hand the running attempts back.

    At least every `tick_seconds`, and whenever an attempt ends. The database may be away for a while.
    """
    failures, resumed = 0, False
    try:
        while True:
            try:
                if not resumed:
                    loop.resume(clock())
                    resumed = True
                loop.tick(clock())
                failures = 0
            except OperationalError as error:
                failures += 1
                log.warning("the database does not answer, trying again: %s", error.orig)
            if failures:
                stopped = wait(min(tick_seconds * 2 ** min(failures, 6), 10.0))
            else:
                loop.launcher.wait(tick_seconds)  # a gang that is done waits for the next run, not for the next tick
                stopped = wait(0)
            if stopped:
                break
    finally:
        loop.hand_back(clock())
