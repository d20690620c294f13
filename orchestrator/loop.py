"""The loop: poll gangs, record what they say, propose ahead of demand, give runs to free gangs.

Every step can be repeated.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.exc import OperationalError

from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.errors import LeaseLost, OverBudget
from orchestrator.launcher import Assignment, Ending, Launcher, NoRoom, Update
from orchestrator.lifecycle import Cause, Outcome, StudyState
from orchestrator.queue import Queue, Waiting, by_shape
from orchestrator.spending import Purses
from orchestrator.stopping import Stopping
from orchestrator.study import AttemptResult, Claim, Study
from orchestrator.supply import Supply
from orchestrator.watch import Watch
from worker.spec import GangConfig

log = logging.getLogger(__name__)

EXPIRY_SECONDS = 1.0
"""How often overdue leases are looked for."""
SHARE = timedelta(seconds=1)
"""So long an attempt waits at least before it is moved to a gang that is free."""


@dataclass
class Held:
    """An attempt of ours: its claim, the last messages recorded, and when its lease was last renewed."""

    claim: Claim
    renewed_at: datetime
    after: int = 0
    logged: int = 0
    phase: str = "queue"
    unstored: bool = False
    """Whether its artifact could not be written so far."""
    stopped: str | None = None
    """Why it was told to stop, if it was."""
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.claim.spec.limits, self.claim.started_at)

    @property
    def attempt_id(self) -> int:
        return self.claim.lease.attempt_id


@dataclass
class Loop:
    """One orchestrator. It may be killed between any two statements: leases and the database hold all that matters."""

    database: Database
    launcher: Launcher
    artifacts: ArtifactStore
    owner: str
    ttl: timedelta
    held: dict[int, Held] = field(default_factory=dict)
    draining: bool = False
    """Whether nothing is claimed or proposed any more."""
    supply: Supply = field(init=False)
    queue: Queue = field(init=False)
    stopping: Stopping = field(init=False)
    purses: Purses = field(init=False, default_factory=Purses)
    _ticked_at: datetime | None = field(init=False, default=None)
    _expires_at: datetime | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.supply = Supply(self.database)
        self.queue = Queue(self.database, self.launcher, self.owner)
        self.stopping = Stopping(self.database)

    def resume(self, now: datetime) -> None:
        """Take over what an orchestrator of our name left: attempts whose gang still lives train on and never notice,
        the others are queued again at once, and gangs that nobody owns are removed. Before the first tick."""
        with self.database.write() as session:
            left = leases.resume(session, self.owner, now, self.ttl)
        for resumed in left:
            attempt_id = resumed.claim.lease.attempt_id
            held = self.held[attempt_id] = Held(resumed.claim, now, resumed.after, resumed.logged, resumed.phase)
            if resumed.gang is not None and self.launcher.adopt(attempt_id, resumed.gang):
                log.info("trial %d goes on, on %s", resumed.claim.trial_number, resumed.gang)
            else:
                self._finish(held, AttemptResult(Outcome.LOST, "its orchestrator died, and its gang with it"), now)
        if removed := self.launcher.reap():
            log.warning("%d gangs that nobody owned were removed", removed)

    def tick(self, now: datetime) -> None:
        """Everything that is due at `now`, once."""
        # Before the database, which may be away: gangs that are polled know that they are wanted.
        updates = self._poll()
        self._drop_lost()
        self._record(updates, now)
        self._stop(updates, now)
        for held in list(self.held.values()):
            if held.attempt_id in updates:
                self._settle(held, updates[held.attempt_id], now)
        self._expire(now)
        if self.draining:
            return
        with self.database.read() as session:
            studies = store.list_studies(session, (StudyState.RUNNING,))
            waiting = Counter(store.count_queued(session))
            enough = self.purses.enough(session, studies, now)
        for study in studies:
            if study.id in enough:
                self.supply.stop(study, enough[study.id], now)
        studies = tuple(study for study in studies if study.id not in enough)
        gave_up = self._feed(studies, waiting, now)
        shapes = by_shape(waiting)
        self.queue.look(shapes, now)
        if not any(update.ending for update in updates.values()):  # else what waited may have begun since the poll
            self._share(shapes, updates, now)
        for study in studies:
            self.queue.tell_of_no_room(study, [gang for (study_id, gang) in waiting if study_id == study.id], now)
            if not self.supply.replicate(study, gave_up.get(study.id), now):
                self.supply.complete(study, gave_up.get(study.id), now)

    def leave(self, now: datetime) -> None:
        """Go without the attempts whose gangs live on; their leases stay open for the next orchestrator of our name."""
        # A database that is away changes nothing: a lease that runs out is its holder's until somebody takes it.
        with suppress(OperationalError), self.database.write() as session:
            for held in self.held.values():
                with suppress(LeaseLost):
                    leases.renew(session, held.claim.lease, now, self.ttl)
        if self.launcher.leave():
            log.info("left %d attempts to the next orchestrator", len(self.held))
            self.held.clear()

    def hand_back(self, now: datetime) -> None:
        """Record what has ended, queue the rest again without charge, and free every gang."""
        updates = self._poll()
        for held in list(self.held.values()):
            try:
                self._record({held.attempt_id: updates[held.attempt_id]}, now)
                self._settle(held, updates[held.attempt_id], now)
            except Exception:
                log.exception("attempt %d could not be recorded a last time", held.attempt_id)
            if held.attempt_id in self.held:
                self._finish(held, AttemptResult(Outcome.PREEMPTED, "the orchestrator was stopped"), now)

    def _poll(self) -> dict[int, Update]:
        held = self.held.values()
        return self.launcher.poll(
            {one.attempt_id: one.after for one in held}, {one.attempt_id: one.logged for one in held}
        )

    def _drop_lost(self) -> None:
        """Kill the gangs whose attempt is no longer ours: cancelled, or expired while we were away."""
        with self.database.read() as session:
            ours = leases.still_held(session, [held.claim.lease for held in self.held.values()])
        for attempt_id in set(self.held) - ours:
            self._release(attempt_id, "is no longer ours")

    def _record(self, updates: Mapping[int, Update], now: datetime) -> None:
        """Write down what running attempts have said, and renew their leases, in one transaction."""
        due = [held for _, held in sorted(self.held.items()) if self._is_due(held, updates.get(held.attempt_id), now)]
        if not due:
            return
        lost = set()
        with self.database.write() as session:
            for held in due:
                said = updates[held.attempt_id]
                try:
                    leases.record(session, held.claim.lease, said.phase, said.measurements, now, self.ttl, said.lines)
                except LeaseLost:
                    lost.add(held.attempt_id)
        for held in due:
            update = updates[held.attempt_id]
            held.after = update.measurements[-1].number if update.measurements else held.after
            held.logged = update.lines[-1].number if update.lines else held.logged
            held.phase, held.renewed_at = update.phase, now
            if held.attempt_id in lost:
                self._release(held.attempt_id, "lost its lease")

    def _stop(self, updates: Mapping[int, Update], now: datetime) -> None:
        """Tell those to end early whose new scores are hopeless."""
        running = [held for held in self.held.values() if held.attempt_id in updates and not held.stopped]
        news = [(held.claim, updates[held.attempt_id].measurements) for held in running]
        for attempt_id, why in self.stopping.look(news, now).items():
            self.held[attempt_id].stopped = why
            self.launcher.stop(attempt_id)

    def _is_due(self, held: Held, update: Update | None, now: datetime) -> bool:
        if update is None:
            return False
        news = update.measurements or update.lines or update.phase != held.phase
        return bool(news and update.ending is None) or now - held.renewed_at > self.ttl / 3

    def _settle(self, held: Held, update: Update, now: datetime) -> None:
        """End the attempt if it has ended, or should."""
        ending = update.ending or held.watch.look(update, now)
        if ending is None:
            return
        try:
            self._finish(held, self._keep(held, ending, update), now, update)
        except OSError as error:  # a full disk, say: the gang has the only copy and keeps it until there is room
            if not held.unstored:
                log.error("the artifact of attempt %d cannot be stored, trying again: %s", held.attempt_id, error)
            held.unstored = True
        except OperationalError:  # the database is away: nothing is lost, the gang keeps what it measured
            raise
        except KeyError as error:  # its gang is gone, and the artifact with it
            self._finish(held, AttemptResult(Outcome.LOST, str(error)), now)
        except Exception as error:  # one gang must not stop the others
            log.exception("attempt %d could not be ended", held.attempt_id)
            self._finish(held, _failed(error), now)

    def _keep(self, held: Held, ending: Ending, update: Update) -> AttemptResult:
        """The ending with its artifact stored: on disk first, so that no row ever names a file that is not there."""
        artifact = None
        if ending.result is not None:
            artifact = self.artifacts.put(self.launcher.artifact(held.attempt_id))
        reason = (held.stopped if ending.outcome is Outcome.STOPPED else None) or ending.reason
        return AttemptResult(
            ending.outcome, reason, ending.result, artifact, ending.cause, update.seconds or None, update.phase,
            ending.traceback,
        )  # fmt: skip

    def _finish(self, held: Held, result: AttemptResult, now: datetime, update: Update | None = None) -> None:
        try:
            with self.database.write() as session:
                if update is not None and (update.measurements or update.lines):
                    said = (update.phase, update.measurements, now, self.ttl, update.lines)
                    leases.record(session, held.claim.lease, *said)
                result = leases.finish(session, held.claim.lease, result, now)
            log.info("trial %d ended as %s %s", held.claim.trial_number, result.outcome, result.reason)
        except LeaseLost:
            log.warning("trial %d ended as %s without its lease; dropped", held.claim.trial_number, result.outcome)
        self._release(held.attempt_id, None)

    def _release(self, attempt_id: int, why: str | None) -> None:
        if why:
            log.warning("attempt %d %s; its gang is released", attempt_id, why)
        self.launcher.release(attempt_id)
        self.held.pop(attempt_id, None)

    def _expire(self, now: datetime) -> None:
        """End what others have left, after our own were renewed: a lease that ran out while nobody could write is its
        holder's until someone takes it, so after such a time everyone gets a lease's length to renew."""
        if self._ticked_at is not None and now - self._ticked_at > self.ttl / 2:
            self._expires_at = now + self.ttl
        self._ticked_at = now
        if self._expires_at is not None and now < self._expires_at:
            return
        self._expires_at = now + min(timedelta(seconds=EXPIRY_SECONDS), self.ttl / 4)
        with self.database.write() as session:
            lost = leases.expire(session, now)
        if lost:
            log.warning("%d attempts lost their lease and were queued again", lost)

    def _feed(self, studies: Sequence[Study], waiting: Counter[Waiting], now: datetime) -> dict[int, str]:
        """Give what waits to the gangs that would take it, and keep one run of each study waiting for each of its
        shapes. Why none is left to propose, by study. `waiting` is brought up to date. A study whose next run is over
        its budget has no turn; once nothing of it runs any more, it stops."""
        gave_up: dict[int, dict[GangConfig, str]] = {study.id: {} for study in studies}
        over: dict[int, OverBudget] = {}
        moved = True
        while moved:
            moved = False
            for gang in sorted(by_shape(waiting), key=lambda gang: -gang.ranks):
                moved = self._start(gang, waiting, over, now) or moved
            # Only now, and for next time: a free gang does not wait for the sampler.
            for study in studies:
                for gang in () if study.id in over else self.supply.shapes(study):
                    if waiting[study.id, gang] or gang in gave_up[study.id]:
                        continue
                    added, why = self.supply.add(study, gang, now)
                    waiting[study.id, gang] += added
                    moved = moved or added
                    if why is not None:
                        gave_up[study.id][gang] = why
        for study in studies:
            if study.id in over and over[study.id].final:
                self.supply.stop(study, str(over[study.id]), now)
        exhausted = [study for study in studies if len(gave_up[study.id]) == len(self.supply.shapes(study))]
        return {study.id: "; ".join(filter(None, dict.fromkeys(gave_up[study.id].values()))) for study in exhausted}

    def _share(self, waiting: Mapping[GangConfig, int], updates: Mapping[int, Update], now: datetime) -> None:
        """Queue an attempt again that waits behind another while a gang of its shape is free and has nothing to do."""
        for held in list(self.held.values()):
            gang, update = held.claim.spec.gang, updates.get(held.attempt_id)
            waits = update is not None and update.phase == "queue" and now - held.claim.started_at > SHARE
            offer = self.launcher.offer(gang) if waits and not waiting.get(gang) else None
            if offer is not None and not offer.behind:
                self._finish(held, AttemptResult(Outcome.PREEMPTED, "another gang is free for it"), now)
                return

    def _start(self, gang: GangConfig, waiting: Counter[Waiting], over: dict[int, OverBudget], now: datetime) -> bool:
        """Claim a run of this shape for a gang that would take it, if there is both."""
        offer = self.launcher.offer(gang)
        if offer is None:
            return False
        try:
            with self.database.write() as session:
                claim = leases.claim(
                    session, gang, self.owner, now, self.ttl, name=offer.gang, warm=offer.behind, purses=self.purses,
                    without=tuple(over),
                )  # fmt: skip
        except OverBudget as error:
            over[error.study_id] = error
            for key in [key for key in waiting if key[0] == error.study_id]:
                del waiting[key]
            return True
        if claim is None:  # another orchestrator was faster, or what waits is to start cold
            for key in [key for key in waiting if key[1] == gang and not offer.behind]:
                del waiting[key]
            return False
        waiting[claim.study_id, gang] -= 1
        held = self.held[claim.lease.attempt_id] = Held(claim, now)
        try:
            name = self.launcher.start(Assignment(held.attempt_id, claim.spec), offer.gang)
            if name != offer.gang:  # that has died meanwhile, or was not cold enough
                with self.database.write() as session:
                    leases.renew(session, claim.lease, now, self.ttl, gang=name)
        except LeaseLost:  # cancelled between the claim and now
            self._release(held.attempt_id, "lost its lease before it began")
            return True
        except NoRoom as error:
            self._finish(held, AttemptResult(Outcome.PREEMPTED, str(error)), now)
            return False
        except OperationalError:
            raise
        except Exception as error:  # one gang must not stop the others
            log.exception("attempt %d could not be started", held.attempt_id)
            self._finish(held, _failed(error), now)
            return False
        self.queue.started(gang)
        log.info("trial %d started %s %s", claim.trial_number, "behind another on" if offer.behind else "on", name)
        return True


def _failed(error: Exception) -> AttemptResult:
    return AttemptResult(Outcome.FAILED, f"{type(error).__name__}: {error}", cause=Cause.ERROR)


def run(
    loop: Loop,
    clock: Callable[[], datetime],
    wait: Callable[[float], bool],
    drain: Callable[[], bool],
    grace: timedelta,
    tick_seconds: float = 0.2,
) -> None:
    """Resume, then tick until `wait(seconds)` says to stop; then hand the running attempts back.

    Once `drain()` says so, nothing is claimed any more, and what still runs after `grace` is left to the next
    orchestrator of our name where gangs live on. A tick is due every `tick_seconds`, and whenever an attempt ends. The
    database may be away for a while.
    """
    failures, resumed = 0, False
    leave_at: datetime | None = None
    try:
        while True:
            try:
                if not resumed:
                    loop.resume(clock())
                    resumed = True
                loop.tick(clock())
                failures = 0
                if leave_at is not None and (not loop.held or clock() >= leave_at):
                    loop.leave(clock())
                    break
            except OperationalError as error:
                failures += 1
                log.warning("the database does not answer, trying again: %s", error.orig)
            if failures:
                longest = loop.ttl.total_seconds() / 6  # gangs that are not polled for long remove themselves
                stopped = wait(min(tick_seconds * 2 ** min(failures, 6), longest))
            else:
                loop.launcher.wait(tick_seconds)  # a gang that is done waits for the next run, not for the next tick
                stopped = wait(0)
            if stopped:
                break
            if leave_at is None and drain():
                loop.draining, leave_at = True, clock() + grace
                log.info("no new attempts; the %d that run have until %s", len(loop.held), leave_at)
    except Exception:  # a mistake of ours must not cost more than SIGKILL would
        loop.leave(clock())
        raise
    finally:
        loop.hand_back(clock())
