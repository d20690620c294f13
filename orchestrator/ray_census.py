"""The doctor's look at a Ray cluster: gangs without leases, and leases without gangs."""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias

import ray
from ray.exceptions import RayError
from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from orchestrator import leases
from orchestrator.database import Database
from orchestrator.doctor import ENDS_AS_LOST, SETTLED, Finding, Kind, moment, place
from orchestrator.local_launcher import source_roots
from orchestrator.ray_gang import driver_options, is_of, names, remove_named, silences
from orchestrator.tables import AttemptRow, RunRow, StudyRow, TrialRow

ANSWER_SECONDS = 10.0
"""How long a gang has to say when it was asked last: twice what its launcher gives a warm gang to take an attempt."""
QUIET_SECONDS = 30.0
"""A live launcher asks its gangs something every three, also those that do nothing."""
CLAIMED = timedelta(minutes=1)
"""The name of an attempt's gang is written with the claim: what is younger may be on its way."""
REACH_SECONDS = 5.0
GONE_SECONDS = 10.0
"""How long Ray may take to remove a gang."""

_Attempt: TypeAlias = Row[int, str, str | None, datetime, datetime | None, int, str]


class NoCluster(RuntimeError):
    """No cluster could be joined. The message says why, on one line."""


@dataclass(frozen=True)
class Census:
    """What does not belong, with what clearing needs: the gangs by finding, and the attempts."""

    gangs: Mapping[Finding, str]
    attempts: Mapping[Finding, int]

    def findings(self) -> list[Finding]:
        return [*self.gangs, *self.attempts]


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be connected to the cluster. Raises NoCluster."""
    try:
        _reach(address)
        ray.init(address, **driver_options("caddie", source_roots()))
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise NoCluster(f"{address}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def present() -> dict[str, float | None]:
    """The gangs of the cluster, of all owners, and for how many seconds nobody has asked them anything: None where
    rank 0 does not say so, for it is gone or hangs."""
    gangs = names()
    said = silences(gangs, ANSWER_SECONDS)
    return {name: said.get(name) for name in sorted(gangs)}


def examine(database: Database, gangs: Mapping[str, float | None], owner: str, now: datetime) -> Census:
    """What does not belong, given the gangs that are `present`; changes nothing.

    `owner` is the orchestrator that has its gangs on this cluster, whether there are any or not.
    """
    with database.read() as session:  # after the cluster: a gang is named by its attempt before it is made
        attempts = _open_attempts(session)
        owners = session.scalars(select(AttemptRow.owner).distinct()).all()
    named = {attempt.gang for attempt in attempts}
    lost = {}
    for name, silence in gangs.items():
        if name not in named and (silence is None or silence > QUIET_SECONDS):
            lost[_gang(name, silence, known=any(is_of(name, each) for each in owners))] = name
    here = {each for each in owners if each == owner or any(is_of(name, each) for name in gangs)}
    missing = [row for row in attempts if row.owner in here and is_of(row.gang, row.owner) and row.gang not in gangs]
    return Census(lost, {_lease(row): row.id for row in missing if _ran_out(row, now)})


def clear(database: Database, census: Census, now: datetime) -> tuple[list[Finding], list[Finding]]:
    """Apply the remedies, each safe to repeat; what was cleared, and what remains."""
    with database.write() as session:
        leases.expire(session, now, among=[*census.attempts.values()])
    removed = {name for finding, name in census.gangs.items() if finding.remedy is not None}
    for name in removed:
        remove_named(name)
    until = time.monotonic() + GONE_SECONDS
    while removed & (left := names()) and time.monotonic() < until:
        time.sleep(0.1)
    remaining = [finding for finding, name in census.gangs.items() if finding.remedy is None or name in left]
    return [finding for finding in census.findings() if finding not in remaining], remaining


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at host:port: Ray itself would try for three minutes, and say so all along."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), REACH_SECONDS).close()


def _open_attempts(session: Session) -> Sequence[_Attempt]:
    return session.execute(
        select(AttemptRow.id, AttemptRow.owner, AttemptRow.gang, AttemptRow.started_at, AttemptRow.lease_expires_at,
               TrialRow.number, StudyRow.name.label("study"))
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(AttemptRow.outcome.is_(None), AttemptRow.gang.is_not(None)).order_by(AttemptRow.id)
    ).all()  # fmt: skip


def _ran_out(row: _Attempt, now: datetime) -> bool:
    """Whether the attempt was claimed a while ago and its lease has run out, since when orchestrators may end it. Those
    that ran out an hour ago are found without asking Ray."""
    assert row.lease_expires_at is not None, "an open attempt has a lease"
    expired: bool = now - SETTLED < row.lease_expires_at <= now
    return expired and row.started_at <= now - CLAIMED


def _gang(name: str, silence: float | None, *, known: bool) -> Finding:
    what = "its rank 0 is gone or hangs" if silence is None else f"nobody has asked for it for {silence:.0f} s"
    if not known:
        what += "; none of this database's orchestrators made it"  # another's may yet come back for what it trains
    return Finding(Kind.GANG_WITHOUT_LEASE, what, name, "removes it" if known else None)


def _lease(row: _Attempt) -> Finding:
    what = f"held by {row.owner} until {moment(row.lease_expires_at)}, for gang {row.gang}, which is gone"
    return Finding(Kind.LEASE_WITHOUT_GANG, what, place(row.id, row.number, row.study), ENDS_AS_LOST)
