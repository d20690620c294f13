"""One attempt on a gang on Ray: what its ranks say of it, until it has ended."""

import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from orchestrator.ending import ending_of
from orchestrator.launcher import Assignment, Ending, Update
from orchestrator.lifecycle import Outcome
from orchestrator.ray_gang import Gang
from orchestrator.ray_rooms import Rooms
from worker.mailbox import Mail
from worker.report import LogLine, Measurement

PEERS_SECONDS = 2.0
"""How often the ranks that say little are listened to. A failure of theirs shows on rank 0 too, mostly at once."""
DEATH_SECONDS = 5.0
"""How long the other ranks of a failed gang have to turn out dead, the better explanation. Live ones answer at once."""


class RayAttempt:
    """An attempt that a gang was given, or that a launcher before this one gave it."""

    def __init__(self, attempt_id: int, gang: Gang) -> None:
        self.attempt_id = attempt_id
        self.gang = gang
        self.phase = "start"
        self.ending: Ending | None = None
        self.neglected = False
        """Whether its gang may have ended itself, since nobody asked for it."""
        self._known_at = time.monotonic()
        self._given_at: float | None = None
        self.accepted: dict[int, Any] = {}
        """The calls that gave it to the ranks, by rank; none where it was adopted."""
        self._measurements: list[Measurement] = []
        self._lines: list[LogLine] = []
        self._mails = [Mail() for _ in gang.actors]
        self._opening_seconds = 0.0
        self._reads: dict[int, Any] = {}
        self._ends: dict[int, Any] = {}
        self._peers_at = 0.0
        self._unknown = False
        self.undelivered = False
        """Whether rank 0 never got it: whoever claimed it died before."""
        self.shares = False
        """Whether its gang has been given another attempt meanwhile."""

    def give(self, assignment: Assignment, data_root: str, *, waits: bool) -> None:
        """Send the attempt to the gang's ranks, where it may wait for the one before it."""
        spec = assignment.spec.model_dump_json()
        gang = self.gang
        calls = [actor.assign.remote(self.attempt_id, spec, data_root, gang.port) for actor in gang.actors]
        self.accepted = dict(enumerate(calls))
        if waits:
            gang.actors[0].check.remote(self.attempt_id, spec, data_root, calls[0])
        self._given_at = time.monotonic()
        self.phase = "queue" if waits else "start"
        gang.attempts += 1

    def is_accepted(self, seconds: float) -> bool:
        """Whether all ranks have taken the attempt, or do so within so many seconds. False where one has died."""
        if self._given_at is not None:
            if len(answers_of(self.accepted, seconds)[0]) < len(self.accepted):
                return False
            self._began()
        return True

    @property
    def age_seconds(self) -> float:
        """Since it was given to its gang, or adopted."""
        return time.monotonic() - self._known_at

    @property
    def update(self) -> Update:
        """All that was said so far."""
        seconds = dict(self._mails[0].seconds)
        if self._opening_seconds:
            seconds["start"] = seconds.get("start", 0.0) + self._opening_seconds
        said = (tuple(self._measurements), self.ending, self._mails[0].beats, seconds, tuple(self._lines))
        return Update(self.phase, *said)

    def ask(self) -> list[Any]:
        """The calls whose answers `listen` takes in. Rank 0 is asked each time; its peers now and then, or where it
        has said its last."""
        if self._given_at is not None:
            return [*self.accepted.values()]
        now = time.monotonic()
        if self._mails[0].closing is not None or now - self._peers_at >= PEERS_SECONDS:
            ranks, self._peers_at = range(len(self._mails)), now
        else:
            ranks = range(1)
        for rank in ranks:
            if rank not in self._reads:
                known = (len(self._measurements), len(self._lines)) if rank == 0 else (0, 0)
                self._reads[rank] = self.gang.actors[rank].read.remote(self.attempt_id, *known)
        return list(self._reads.values())

    def listen(self, rooms: Rooms) -> None:
        """Take in what has been answered. `rooms` tells whether the gang's node lives, where its ranks do not."""
        if self._given_at is not None:
            answers, deaths = answers_of(self.accepted)
            if len(answers) == len(self.accepted):
                self._began()
            elif not deaths and self.gang.node not in rooms.living():  # a gang that never came to be does not die
                self.ending = Ending(Outcome.LOST, f"the node of gang {self.gang.name} is gone")
                return
        else:
            deaths = self._take()
        if self._unknown:
            self.ending = Ending(Outcome.LOST, f"its orchestrator died before gang {self.gang.name} had it")
            return
        failed = any(mail.closing is not None and mail.closing.outcome == "failed" for mail in self._mails)
        if failed and len(self._mails) > 1 and not deaths and self.phase != "queue":
            # A rank whose peer died fails too, and says so before Ray knows of the death.
            ray.wait(asked := self.ask(), num_returns=len(asked), timeout=DEATH_SECONDS)
            deaths = self._take()
        self.ending = self._end(deaths, rooms)

    def neglect(self) -> None:
        """Nobody has listened for so long that its gang may have ended itself. What was asked before tells nothing."""
        self.neglected = True
        self._reads.clear()

    def news(self) -> list[Any]:
        """Calls of which each returns when its rank has something new to say. A rank may answer them out of order, and
        knows of no attempt that it has not accepted."""
        if self._given_at is not None:
            return [*self.accepted.values()]
        silent = [rank for rank, mail in enumerate(self._mails) if mail.closing is None]
        for rank in silent[:1]:
            if rank not in self._ends:
                self._ends[rank] = self.gang.actors[rank].ended.remote(self.attempt_id)
        return list(self._ends.values())

    def heard(self, done: Collection[Any]) -> None:
        """Forget the calls of `news` that have returned: a rank that has ended is news once."""
        self._ends = {rank: call for rank, call in self._ends.items() if call not in done}

    def _began(self) -> None:
        assert self._given_at is not None
        if self.phase == "start":  # else it waits, and costs nothing
            self._opening_seconds = time.monotonic() - self._given_at
        self._given_at = None

    def _take(self) -> dict[int, RayError]:
        """The answers to what was asked; the ranks that are dead."""
        answers, errors = answers_of(self._reads)
        self._reads = {rank: call for rank, call in self._reads.items() if rank not in answers and rank not in errors}
        for rank, answer in answers.items():
            self._unknown = self._unknown or not answer
            if rank == 0 and not answer:  # its gang may well be at another
                self.phase, self.undelivered = "queue", True
            if answer:
                self._mails[rank] = Mail.model_validate_json(answer)
        if answers.get(0):
            self.neglected = False
            self.phase = self._mails[0].phase
            count = len(self._measurements)
            self._measurements += [said for said in self._mails[0].measurements if said.number > count]
            logged = len(self._lines)
            self._lines += [said for said in self._mails[0].lines if said.number > logged]
        # A rank that Ray has lost sight of is asked again; Ray decides in the end whether it lives.
        return {rank: error for rank, error in errors.items() if not isinstance(error, ActorUnavailableError)}

    def _end(self, deaths: Mapping[int, RayError], rooms: Rooms) -> Ending | None:
        """The attempt's ending. What befell its node, or another attempt of its gang, is not held against it."""
        name = self.gang.name
        deaths = {rank: error for rank, error in deaths.items() if self._mails[rank].closing is None}
        if deaths and self.gang.node not in rooms.look():
            return Ending(Outcome.LOST, f"the node of gang {name} is gone")
        if any(isinstance(error, RayActorError) and error.preempted for error in deaths.values()):
            return Ending(Outcome.PREEMPTED, f"the node of gang {name} was preempted")
        if deaths and self.neglected:
            return Ending(Outcome.LOST, f"nobody asked for gang {name} for too long")
        if deaths and (self.phase == "queue" or (self.phase == "store" and self.shares)):
            return Ending(Outcome.LOST, f"gang {name} died while it ran another attempt")
        said = {rank: f"died: {one_line(error)}" for rank, error in deaths.items()}
        return ending_of(self.attempt_id, self._mails, said)


def answers_of(calls: Mapping[int, Any], seconds: float = 0.0) -> tuple[dict[int, Any], dict[int, RayError]]:
    """The answers that are there within so many seconds, and errors instead of the others, by rank."""
    done, _ = ray.wait([*calls.values()], num_returns=len(calls), timeout=seconds) if calls else ([], [])
    answers: dict[int, Any] = {}
    errors: dict[int, RayError] = {}
    for rank, call in calls.items():
        if call not in done:
            continue
        try:
            answers[rank] = ray.get(call)
        except RayError as error:
            errors[rank] = error
    return answers, errors


def one_line(error: RayError) -> str:
    """The gist of Ray's explanation: the exception where one was raised, else the sentences without the identifiers."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "Traceback" in str(error) or not lines:
        return (lines or [type(error).__name__])[-1].strip()[:300]
    return " ".join(line.strip() for line in lines if not line.startswith("\t"))[:300]
