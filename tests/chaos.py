"""Kills at random seeded moments of a sweep, how long each took to be made good, and what must hold afterwards."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import httpx
import psutil
from cluster import RAYLETS, Books, Cluster
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from orchestrator.lifecycle import OPEN_TRIALS, UNCHARGED, Cause, RunState
from orchestrator.tables import ArtifactRow, AttemptRow, MeasurementRow, RunRow, StudyRow, TrialRow

LONGEST_DELAY_SECONDS = 2.0
LONGEST_AWAY_SECONDS = 5.0
OPEN_AHEAD = 8  # trials that wait or run at once: the rest is submitted while the kills fall
Item = TypeVar("Item")
SPARED = 2  # charged attempts after which a run is not aimed at any more: the third would fail it, rightly


REPRODUCIBLE = ("train_loss", "val_bpb")


class Victim(StrEnum):
    ORCHESTRATOR = "orchestrator"
    API = "api"
    RANK = "rank"
    GANG = "gang"
    RAYLET = "raylet"
    POSTGRESQL = "postgresql"


@dataclass(frozen=True)
class Kill:
    """One kill: once so many trials have ended, and then a little later. `choice` picks among those that there are."""

    victim: Victim
    after_trials: int
    delay_seconds: float
    choice: float
    away_seconds: float
    """How long PostgreSQL stays away."""


def plan(seed: int, trials: int, kills: int) -> tuple[Kill, ...]:
    """As many kills of each kind, in any order, over the first five sixths of the trials.

    The last is a raylet's: an orchestrator that starts anew also frees attempts that would have waited for ever, and
    would hide them.
    """
    dice = random.Random(seed)
    victims = [list(Victim)[number % len(Victim)] for number in range(kills)]
    victims.remove(Victim.RAYLET)
    dice.shuffle(victims)
    victims.append(Victim.RAYLET)
    return tuple(
        Kill(
            victim, number * trials * 5 // (6 * kills), dice.uniform(0, LONGEST_DELAY_SECONDS), dice.random(),
            dice.uniform(0, LONGEST_AWAY_SECONDS),
        )
        for number, victim in enumerate(victims)
    )  # fmt: skip


@dataclass(frozen=True)
class Open:
    """An attempt that has not ended, and how many of its run were charged."""

    attempt_id: int
    run_id: int
    gang: str | None
    charged: int


@dataclass(frozen=True)
class View:
    """A sweep at one moment. `pulse` changes with everything that an orchestrator records."""

    trials: int
    ended: int
    open: tuple[Open, ...]
    queued: frozenset[int]
    """Runs that wait for a gang."""
    heard: dict[int, int]
    """By run, the last of its attempts that measured anything."""
    pulse: tuple[int, ...]


@dataclass
class Blow:
    """A kill that was dealt: when, to what, and once it was made good, after how many seconds."""

    victim: Victim
    what: str
    at: float
    good: Callable[[View], bool]
    seconds: float | None = None


@dataclass
class Sweep:
    """A study of these trials, submitted over HTTP to its end, while the kills of a plan fall."""

    cluster: Cluster
    name: str
    bodies: Sequence[dict[str, Any]]
    kills: list[Kill]
    blows: list[Blow] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, patience_seconds: float) -> None:
        self._began = time.monotonic()
        study = {"name": self.name, "recipe": "laptop", "max_trials": 0}
        assert self.cluster.http.post("/v1/studies", json=study).status_code == 201
        submitted, due_at = 0, None
        while True:
            self.cluster.tend()
            view = look(self.cluster, self.name)
            if view is not None:
                self._watch(view)
                if view.ended == len(self.bodies):
                    break
                if submitted < len(self.bodies) and view.trials - view.ended < OPEN_AHEAD:
                    submitted += self._submit(submitted)
            if self.kills and view is not None and view.ended >= self.kills[0].after_trials:
                due_at = due_at or time.monotonic() + self.kills[0].delay_seconds
            if due_at is not None and time.monotonic() >= due_at and self._strike(self.kills[0]):
                self.kills, due_at = self.kills[1:], None
            assert time.monotonic() - self._began < patience_seconds, f"{view}\n{self.story()}\n{self.cluster.logs()}"
            time.sleep(0.05)
        self.seconds = time.monotonic() - self._began

    def story(self) -> str:
        """What was killed when, and how long each took to be made good."""
        return "\n".join(
            f"{blow.at - self._began:7.1f} s  {blow.victim:<13}{blow.what}: "
            + ("not made good" if blow.seconds is None else f"made good in {blow.seconds:.1f} s")
            for blow in self.blows
        )

    def _submit(self, number: int) -> bool:
        """Whether the trial is known to be in; where no good answer came, the same is sent again."""
        key = {"Idempotency-Key": f"{self.name}-{number}"}
        try:
            answer = self.cluster.http.post(f"/v1/studies/{self.name}/trials", json=self.bodies[number], headers=key)
        except httpx.TransportError:
            return False
        assert answer.status_code in (200, 201) or answer.status_code >= 500, answer.text
        return answer.status_code < 500

    def _watch(self, view: View) -> None:
        for blow in self.blows:
            if blow.seconds is None and blow.good(view):
                blow.seconds = time.monotonic() - blow.at

    def _strike(self, kill: Kill) -> bool:
        """Whether there was such a victim to kill now."""
        view, cluster = look(self.cluster, self.name), self.cluster
        if view is None:
            return False
        if kill.victim in (Victim.API, Victim.ORCHESTRATOR):
            return self._kill_member(kill, view)
        if kill.victim is Victim.POSTGRESQL:
            cluster.postgresql.kill(kill.away_seconds)
            return self._note(kill, f"away for {kill.away_seconds:.1f} s", _recorded_since(view))
        books = cluster.books()
        gangs = _gangs(view, books)
        if kill.victim is Victim.RAYLET:
            return self._kill_raylet(kill, view, books, gangs)
        if not gangs:
            return False
        # A rank that dies alone leaves peers in a collective: of a gang of one there is nothing to leave.
        widest = max(map(len, gangs.values()))
        gang = _chosen([name for name in sorted(gangs) if len(gangs[name]) == widest], kill.choice)
        ranks = gangs[gang] if kill.victim is Victim.GANG else [_chosen(gangs[gang], kill.choice * 7 % 1)]
        return self._kill_processes(kill, ranks, f"{gang}, {len(ranks)} of {len(gangs[gang])} ranks", view, {gang})

    def _kill_member(self, kill: Kill, view: View) -> bool:
        member, cluster = self.cluster.members[kill.victim], self.cluster
        if member.process is None:  # it has ended, and will be started again
            return False
        member.kill()
        if kill.victim is Victim.API:
            return self._note(kill, f"start {member.starts}", lambda _view: cluster.ready())
        return self._note(kill, f"start {member.starts}", _recorded_since(look(cluster, self.name) or view))

    def _kill_raylet(self, kill: Kill, view: View, books: Books, gangs: dict[str, list[int]]) -> bool:
        """One that runs something, all of which may be charged for it."""
        everything = _gangs(view, books, spare=False)
        below: dict[int, set[str]] = {}
        for gang, pids in everything.items():
            below.setdefault(_parent(pids[0]), set()).add(gang)
        raylets = [raylet for name in RAYLETS if (raylet := self.cluster.raylet(name)) is not None]
        fair = [raylet for raylet in raylets if below.get(raylet.pid) and below[raylet.pid] <= set(gangs)]
        if not fair:
            return False
        raylet = _chosen(fair, kill.choice)
        on_it = below[raylet.pid]
        return self._kill_processes(kill, [raylet.pid], f"with {', '.join(sorted(on_it))}", view, on_it)

    def _kill_processes(self, kill: Kill, pids: Sequence[int], what: str, view: View, gangs: set[str]) -> bool:
        """Good again once every run that was at these gangs trains again, in another attempt, or has ended."""
        if not sum(self.cluster.kill(pid) for pid in pids):
            return False
        hit = {attempt.run_id: attempt.attempt_id for attempt in view.open if attempt.gang in gangs}
        return self._note(kill, what, lambda now: all(_goes_on(now, *each) for each in hit.items()))

    def _note(self, kill: Kill, what: str, good: Callable[[View], bool]) -> bool:
        self.blows.append(Blow(kill.victim, what, time.monotonic(), good))
        return True


def look(cluster: Cluster, name: str) -> View | None:
    """The sweep now; None while the database is away."""
    charged = select(AttemptRow.run_id).where(AttemptRow.outcome.not_in(UNCHARGED))  # NULL is no outcome
    try:
        with cluster.database.read() as session:
            study = select(StudyRow.id).where(StudyRow.name == name).scalar_subquery()
            states = session.scalars(select(TrialRow.state).where(TrialRow.study_id == study)).all()
            counts = Counter(session.scalars(charged))
            running = session.execute(
                select(AttemptRow.id, AttemptRow.run_id, AttemptRow.gang).where(AttemptRow.outcome.is_(None))
            ).all()
            heard = select(AttemptRow.run_id, func.max(AttemptRow.id)).where(
                AttemptRow.id.in_(select(MeasurementRow.attempt_id))
            )
            latest = {row[0]: row[1] for row in session.execute(heard.group_by(AttemptRow.run_id))}
            queued = frozenset(session.scalars(select(RunRow.id).where(RunRow.state == RunState.QUEUED)))
            measured = session.scalar(select(func.count()).select_from(MeasurementRow)) or 0
            made = session.scalar(select(func.count()).select_from(AttemptRow)) or 0
    except OperationalError:
        return None
    open_ = tuple(Open(row.id, row.run_id, row.gang, counts[row.run_id]) for row in running)
    ended = sum(state not in OPEN_TRIALS for state in states)
    return View(len(states), ended, open_, queued, latest, (measured, made, len(running)))


def _gangs(view: View, books: Books, spare: bool = True) -> dict[str, list[int]]:
    """The processes by rank of gangs at work; without those that a run's last attempt depends on."""
    spared = {attempt.gang for attempt in view.open if spare and attempt.charged >= SPARED}
    found: dict[str, list[int]] = {}
    for gang in sorted({attempt.gang for attempt in view.open if attempt.gang is not None} - spared):
        pids = [pid for name, pid in sorted(books.pids.items()) if name.rpartition("-")[0] == gang]
        if pids and all(pids):
            found[gang] = pids
    return found


def _goes_on(now: View, run_id: int, hit: int) -> bool:
    running = {attempt.run_id: attempt.attempt_id for attempt in now.open}
    return (
        run_id not in now.queued
        and running.get(run_id) != hit
        and (run_id not in running or now.heard.get(run_id, 0) > hit)
    )


def _recorded_since(before: View) -> Callable[[View], bool]:
    """Good again once an orchestrator has recorded something."""
    return lambda now: now.pulse != before.pulse


def _chosen(items: Sequence[Item], choice: float) -> Item:
    return items[int(choice * len(items))]


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return 0


# What must hold afterwards


def check(cluster: Cluster, name: str, trials: int) -> None:
    """Every run of the study has one outcome, under no lease, with whole measurements and a whole artifact."""
    with cluster.database.read() as session:
        rows = session.execute(_attempts(name)).all()
        numbers = session.execute(
            select(MeasurementRow.attempt_id, MeasurementRow.number, MeasurementRow.step, MeasurementRow.name)
        ).all()
        held = session.scalar(select(func.count()).select_from(AttemptRow).where(AttemptRow.lease_token.is_not(None)))
    runs = {row.run_id for row in rows}
    assert len(runs) == trials
    assert {row.trial_state for row in rows} == {"complete"}
    assert {row.run_state for row in rows} == {"succeeded"}
    assert held == 0
    assert all(row.outcome is not None and row.finished_at is not None for row in rows)
    succeeded = {row.run_id: row.attempt_id for row in rows if row.outcome == "succeeded"}
    assert Counter(row.run_id for row in rows if row.outcome == "succeeded") == dict.fromkeys(runs, 1)
    steps = Counter((row.attempt_id, row.step, row.name) for row in numbers)
    assert max(steps.values()) == 1, "a measurement came twice"
    for attempt_id in succeeded.values():
        said = sorted({row.number for row in numbers if row.attempt_id == attempt_id})
        assert said == list(range(1, len(said) + 1)) != [], "measurements are missing"
    assert cluster.doctor() == []
    answers = [cluster.http.get(f"/v1/studies/{name}/trials/{number}/artifact") for number in range(trials)]
    digests = [hashlib.sha256(answer.content).hexdigest() for answer in answers if answer.status_code == 200]
    assert sorted(digests) == sorted(row.sha256 for row in rows if row.outcome == "succeeded")


def results(cluster: Cluster, name: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What the study found, by configuration and seed: score, artifact, and what was measured at which step."""
    with cluster.database.read() as session:
        rows = session.execute(_attempts(name).where(AttemptRow.outcome == "succeeded")).all()
        said = session.execute(
            select(MeasurementRow.attempt_id, MeasurementRow.step, MeasurementRow.name, MeasurementRow.value)
            .where(MeasurementRow.name.in_(REPRODUCIBLE))
            .order_by(MeasurementRow.attempt_id, MeasurementRow.number, MeasurementRow.name)
        ).all()  # fmt: skip
    return {
        (row.spec_hash, row.seed): (
            row.val_bpb, row.sha256, [tuple(each)[1:] for each in said if each.attempt_id == row.attempt_id]
        )
        for row in rows
    }  # fmt: skip


def endings(cluster: Cluster, name: str) -> Counter[str]:
    """How the study's attempts ended: by outcome, and by cause where they failed; where no process died, why."""
    with cluster.database.read() as session:
        rows = session.execute(_attempts(name)).all()
    said = {None: "{0.outcome}", Cause.CRASH: "{0.outcome} ({0.cause})"}
    return Counter(said.get(row.cause, "{0.outcome} ({0.cause}: {0.reason})").format(row) for row in rows)


def table(sweep: Sweep, calm_seconds: float, ended: Counter[str]) -> str:
    """What the kills cost, for people."""
    lines = [f"{sweep.seconds:.0f} s with {len(sweep.blows)} kills, {calm_seconds:.0f} s without"]
    lines += [f"attempts: {', '.join(f'{count} {how}' for how, count in ended.most_common())}"]
    lines += [f"{'killed':<14}{'times':>5}{'longest until good':>20}"]
    for victim in Victim:
        took = [blow.seconds or 0.0 for blow in sweep.blows if blow.victim is victim]
        lines += [f"{victim:<14}{len(took):>5}{max(took, default=0.0):>18.1f} s"]
    return "\n".join(lines)


def _attempts(name: str) -> Any:
    return (
        select(
            TrialRow.state.label("trial_state"), TrialRow.spec_hash, TrialRow.val_bpb, RunRow.id.label("run_id"),
            RunRow.seed, RunRow.state.label("run_state"), AttemptRow.id.label("attempt_id"), AttemptRow.outcome,
            AttemptRow.cause, AttemptRow.reason, AttemptRow.finished_at, ArtifactRow.sha256,
        )
        .join(StudyRow, StudyRow.id == TrialRow.study_id).join(RunRow, RunRow.trial_id == TrialRow.id)
        .join(AttemptRow, AttemptRow.run_id == RunRow.id, isouter=True)
        .join(ArtifactRow, ArtifactRow.attempt_id == AttemptRow.id, isouter=True)
        .where(StudyRow.name == name)
    )  # fmt: skip
