"""An executor for a machine without Ray: it asks a server for runs of a study, trains them here, and tells the end."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from api.client import ApiError, Caddie, ClientError, Unreachable
from api.desk import MOST_AT_ONCE, AskOut, LogLineIn, MeasurementIn, ReportIn, TellIn
from orchestrator.launcher import Assignment, Ending, Launcher
from orchestrator.lifecycle import Cause, Outcome
from worker.report import Directive
from worker.spec import GangConfig

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0
"""How long a server that does not answer is waited for beyond the lease: its clock may have stood still meanwhile."""
BAD_INPUT = (400, 413, 422)
"""Statuses of a server that would refuse the same again."""
Answer = TypeVar("Answer")


def work(
    caddie: Caddie, study: str, launcher: Launcher, name: str, gang: GangConfig | None, lease_seconds: float = 60.0
) -> int:
    """Execute runs of the study one after the other until there is nothing to do; how many there were."""
    count = 0
    while (asked := caddie.ask(study, name, gang=gang, lease_seconds=lease_seconds)) is not None:
        log.info("trial %d of %s, attempt %d", asked.trial, study, asked.attempt_id)
        execute(caddie, asked, launcher, name, lease_seconds)
        count += 1
    return count


def execute(caddie: Caddie, asked: AskOut, launcher: Launcher, name: str, lease_seconds: float) -> None:
    """Train one run to its end and tell it. One whose lease is lost is dropped; an interrupted one is handed back.

    Raises ClientError where the server cannot take what we say now: the run is handed back if that much is heard.
    """
    end = TellIn(outcome="preempted", reason=f"executor {name} was interrupted")
    try:
        launcher.start(Assignment(asked.attempt_id, asked.spec), name)
        ending, seconds = _follow(caddie, asked, launcher, lease_seconds)
        if ending.result is not None:
            model = launcher.artifact(asked.attempt_id)
            _patiently(partial(caddie.put_artifact, asked, model), lease_seconds)
        outcome = "preempted" if ending.outcome is Outcome.LOST else ending.outcome.value
        end = TellIn.model_validate(
            {**vars(ending), "outcome": outcome, "reason": ending.reason[:2000], "seconds": seconds}
        )
        told = _patiently(partial(caddie.tell, asked, end), lease_seconds)
        log.info("trial %d ended as %s %s", asked.trial, told.outcome, told.reason)
    except BaseException as error:
        lost = isinstance(error, ApiError) and error.kind == "lease-lost"
        refused = isinstance(error, ApiError) and error.status in BAD_INPUT
        if refused:
            end = TellIn(outcome="failed", reason=f"the server refused it: {error}"[:2000], cause=Cause.BAD_INPUT)
        if not lost:
            with suppress(ClientError):  # one that cannot be handed back runs out by itself
                caddie.tell(asked, end)
        if not lost and not refused:
            raise
        log.warning("trial %d: %s", asked.trial, error)
    finally:
        launcher.release(asked.attempt_id)


def _follow(caddie: Caddie, asked: AskOut, launcher: Launcher, lease_seconds: float) -> tuple[Ending, dict[str, float]]:
    """Report what the gang says until it has ended; how it did, and its seconds by phase."""
    attempt_id, after, logged, said_at = asked.attempt_id, 0, 0, time.monotonic()
    while True:
        launcher.wait(POLL_SECONDS)
        update = launcher.poll({attempt_id: after}, {attempt_id: logged})[attempt_id]
        measurements, lines = update.measurements[:MOST_AT_ONCE], update.lines[:MOST_AT_ONCE]
        if measurements or lines or time.monotonic() - said_at > lease_seconds / 3:
            said = ReportIn(
                lease_seconds=lease_seconds, phase=update.phase,
                measurements=[MeasurementIn(**each.model_dump()) for each in measurements],
                lines=[LogLineIn(**each.model_dump()) for each in lines],
            )  # fmt: skip
            if _patiently(partial(caddie.report, asked, said), lease_seconds).directive is Directive.STOP:
                launcher.stop(attempt_id)
            after = measurements[-1].number if measurements else after
            logged = lines[-1].number if lines else logged
            said_at = time.monotonic()
        elif update.ending is not None:
            return update.ending, dict(update.seconds)


def _patiently(call: Callable[[], Answer], lease_seconds: float) -> Answer:
    """The answer, once the server gives one. Raises ClientError where by the end of the lease it has not."""
    deadline = time.monotonic() + lease_seconds + GRACE_SECONDS
    while True:
        try:
            return call()
        except (ApiError, Unreachable) as error:
            passing = isinstance(error, Unreachable) or error.status == 429 or error.status >= 500
            if not passing or time.monotonic() > deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(POLL_SECONDS)
