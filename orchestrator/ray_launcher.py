"""Gangs on Ray: a placement group on one node, an actor a rank, one process group, all kept warm between attempts."""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.job_config import JobConfig

from orchestrator.ending import ending_of, lost
from orchestrator.launcher import Assignment, Ending, NoRoom, Update
from orchestrator.lifecycle import Outcome
from orchestrator.local_launcher import source_roots
from orchestrator.ray_folder import RayFolder
from orchestrator.ray_gang import Gang, create, find, fit, names, remove, remove_named, spare
from worker.mailbox import Mail
from worker.report import Measurement
from worker.spec import GangConfig

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.25
"""How long a poll waits for ranks that are busy; what they say later is taken by the next poll."""
WARM_SECONDS = 5.0
"""How long a warm gang may take to accept an attempt before it is replaced. It takes 1 ms, on a busy machine more."""
DEATH_SECONDS = 5.0
"""How long the other ranks of a failed gang have to turn out dead, the better explanation. Live ones answer at once."""
ARTIFACT_SECONDS = 60.0
OBJECT_STORE_BYTES = 80 * 1024**2
"""Of a local Ray. Only artifacts travel through it."""


@dataclass(eq=False)
class _Held:
    """An attempt on its gang, until it is released: what was said, and the calls that are still unanswered."""

    attempt_id: int
    gang: Gang
    accepted: list[Any]
    reads: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    began: bool = False
    unknown: bool = False
    """Whether a rank does not know of it: whoever started it died before the gang was there to be told."""
    phase: str = "start"
    beats: int = 0
    measurements: list[Measurement] = field(default_factory=list)
    ending: Ending | None = None


class RayLauncher:
    """A Launcher on Ray, one a process, for one thread. Its first call connects, which takes a local Ray 5 to 15 s.

    It places its gangs itself, each on one node of its choosing, and counts on having the cluster to itself. A gang
    that ended an attempt well waits, warm, for the next of its shape, and gives way to other shapes; one that failed in
    any way is removed. On a cluster that was joined gangs are detached: they outlive this process, and its successor
    adopts them by name. Those of a local Ray die with the process that made it. (Two idle agents live on for the 60 s
    that they try to tell it.)
    """

    def __init__(
        self,
        address: str | None,
        data_root: Path,
        ranks: int,
        trainer: str = "worker.job:run",
        *,
        namespace: str = "caddie",
        import_path: Sequence[Path] = (),
    ) -> None:
        """Join the cluster at `address`, or with None start a Ray on this machine with room for `ranks` ranks.

        `trainer` is `module:function`, found by the ranks on `import_path` or in their own environment.
        """
        self._address = address
        self._data_root = data_root
        self._ranks = ranks
        self._trainer = trainer
        self._namespace = namespace
        self._import_path = tuple(import_path)
        self._connected = False
        self._folder: RayFolder | None = None
        self._held: dict[int, _Held] = {}
        self._idle: list[Gang] = []

    def free(self, gang: GangConfig) -> int:
        self._connect()
        alike = [idle for idle in self._idle if idle.shape == gang]
        rooms = spare([*self._busy(), *alike])
        return sum(idle.node in rooms for idle in alike) + sum(fit(gang, *room) for room in rooms.values())

    def capacity(self, gang: GangConfig) -> int:
        self._connect()
        return sum(fit(gang, *room) for room in spare(()).values())

    def start(self, assignment: Assignment) -> str:
        attempt_id, shape = assignment.attempt_id, assignment.spec.gang
        if attempt_id in self._held:
            return self._held[attempt_id].gang.name
        self._connect()
        for gang in [idle for idle in self._idle if idle.shape == shape]:
            held = self._assign(assignment, gang)
            answers, errors = _answers(held.accepted, WARM_SECONDS)
            if not errors and None not in answers:
                self._idle.remove(gang)
                held.began = True
                break
            self._retire(gang)  # it has lost a rank or its node while it was idle
        else:
            held = self._assign(assignment, self._open(shape))
        self._held[attempt_id] = held
        return held.gang.name

    def adopt(self, attempt_id: int, gang: str) -> bool:
        self._connect()
        found = None if attempt_id in self._held else find(gang)
        if found is not None:
            self._held[attempt_id] = _Held(attempt_id, found, accepted=[], began=True)
        return attempt_id in self._held

    def reap(self) -> int:
        self._connect()
        orphans = names() - {gang.name for gang in [*self._busy(), *self._idle]}
        for name in orphans:
            remove_named(name)
        return len(orphans)

    def poll(self, attempt_id: int, after: int) -> Update:
        held = self._held.get(attempt_id)
        if held is None:
            return Update("lost", (), lost(attempt_id))
        if held.ending is None:
            held.ending = _listen(held)
            if held.ending is not None and held.ending.result is None:
                remove(held.gang)
        return Update(held.phase, tuple(held.measurements[after:]), held.ending, held.beats)

    def wait(self, seconds: float) -> None:
        running = [held for held in self._held.values() if held.ending is None]
        for held in running:
            held.ends = held.ends or _news(held)
        ends = [call for held in running for call in held.ends]
        if not ends:
            time.sleep(seconds)
            return
        done, _ = ray.wait(ends, num_returns=1, timeout=seconds)
        for held in running:  # a rank that has ended is news once, while its peers go on
            held.ends = [call for call in held.ends if call not in done]

    def stop(self, attempt_id: int) -> None:
        held = self._held.get(attempt_id)
        if held is not None and held.ending is None:
            held.gang.actors[0].stop.remote(attempt_id)

    def artifact(self, attempt_id: int) -> bytes:
        held = self._held.get(attempt_id)
        if held is None or held.ending is None or held.ending.result is None:
            raise KeyError(f"attempt {attempt_id} has no result here")
        try:
            artifact = ray.get(held.gang.actors[0].artifact.remote(attempt_id), timeout=ARTIFACT_SECONDS)
        except RayError as error:
            raise KeyError(f"the artifact of attempt {attempt_id} is gone: {_one_line(error)}") from error
        if not isinstance(artifact, bytes):
            raise KeyError(f"attempt {attempt_id} left no artifact")
        return artifact

    def release(self, attempt_id: int) -> None:
        held = self._held.pop(attempt_id, None)
        if held is None:
            return
        if held.ending is not None and held.ending.result is not None:
            for actor in held.gang.actors:
                actor.forget.remote(attempt_id)
            self._idle.append(held.gang)
        else:
            remove(held.gang)

    def close(self) -> None:
        if not self._connected:
            return
        for gang in [*self._busy(), *self._idle]:
            remove(gang)
        self._held.clear()
        self._idle.clear()
        ray.shutdown()
        self._connected = False
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _connect(self) -> None:
        """Be connected. A local Ray that has lost its node is started again, once no attempt is held on it."""
        if self._connected and self._folder is not None and not self._held and not spare(()):
            log.warning("the local Ray has lost its node and is started again")
            self.close()
        if self._connected:
            return
        roots = [str(path) for path in (*self._import_path, *source_roots())]
        options: dict[str, Any] = {
            "namespace": self._namespace,
            "job_config": JobConfig(code_search_path=roots),
            "log_to_driver": False,
            "configure_logging": False,
            "logging_level": logging.WARNING,
        }
        # Ray puts the folder that we stand in on its workers' path: a `worker` in the user's would hide ours.
        with _own_sigterm(), chdir("/"):
            if self._address is None:
                self._folder = _start_local(self._ranks, options)
            else:
                ray.init(self._address, **options)
        self._connected = True

    def _busy(self) -> list[Gang]:
        return [held.gang for held in self._held.values()]

    def _assign(self, assignment: Assignment, gang: Gang) -> _Held:
        """Send the attempt to the gang's ranks."""
        attempt_id, spec = assignment.attempt_id, assignment.spec.model_dump_json()
        calls = [actor.assign.remote(attempt_id, spec, str(self._data_root), gang.port) for actor in gang.actors]
        return _Held(attempt_id, gang, calls)

    def _open(self, shape: GangConfig) -> Gang:
        """A new gang on the node that it fills best, after retiring the idle gangs there that are in its way."""
        for counted in ([*self._busy(), *self._idle], self._busy()):
            rooms = {node: room for node, room in spare(counted).items() if fit(shape, *room)}
            if rooms:
                node = min(rooms, key=lambda name: (rooms[name], name))
                break
        else:
            raise NoRoom(f"no node has room for {shape.ranks} {shape.device} ranks")
        for idle in [gang for gang in self._idle if gang.node == node]:
            if fit(shape, *spare([*self._busy(), *self._idle])[node]):
                break
            self._retire(idle)
        return create(shape, node, self._trainer, detached=self._address is not None)

    def _retire(self, gang: Gang) -> None:
        self._idle.remove(gang)
        remove(gang)


def _news(held: _Held) -> list[Any]:
    """Calls of which each returns when its rank has something new to say. A rank may answer them out of order, and
    knows of no attempt that it has not accepted."""
    if not held.began:
        return list(held.accepted)
    return [actor.ended.remote(held.attempt_id) for actor in held.gang.actors]


def _listen(held: _Held) -> Ending | None:
    """Take in what the ranks have said since the last time; the attempt's ending once there is one."""
    if not held.began:
        accepted, deaths = _answers(held.accepted, seconds=0)
        if deaths:
            return _ending(held, [Mail()] * len(accepted), deaths)
        if None in accepted:
            return None
        held.began = True
    mails, deaths = _read(held, ANSWER_SECONDS)
    if held.unknown:
        return Ending(Outcome.LOST, f"its orchestrator died before gang {held.gang.name} had it")
    failed = any(mail.closing is not None and mail.closing.outcome == "failed" for mail in mails)
    if failed and len(mails) > 1 and not deaths:
        # A rank whose peer died fails too, and says so before Ray knows of the death.
        again, deaths = _read(held, DEATH_SECONDS)
        mails = [new if new.closing is not None else old for old, new in zip(mails, again, strict=True)]
    return _ending(held, mails, deaths)


def _read(held: _Held, seconds: float) -> tuple[list[Mail], dict[int, RayError]]:
    """Each rank's mail, an empty one where it has not answered in time, and the ranks that are dead."""
    if not held.reads:
        seen = len(held.measurements)
        held.reads = [actor.read.remote(held.attempt_id, seen) for actor in held.gang.actors]
    answers, errors = _answers(held.reads, seconds)
    held.unknown = "" in answers
    mails = [Mail.model_validate_json(answer) if answer else Mail() for answer in answers]
    if answers[0]:
        held.phase, held.beats = mails[0].phase, mails[0].beats
        held.measurements += [mail for mail in mails[0].measurements if mail.number > len(held.measurements)]
    if errors or None not in answers:
        held.reads = []
    # A rank that Ray has lost sight of is asked again; Ray decides in the end whether it lives.
    return mails, {rank: error for rank, error in errors.items() if not isinstance(error, ActorUnavailableError)}


def _answers(calls: list[Any], seconds: float) -> tuple[list[Any], dict[int, RayError]]:
    """The answers of calls to a gang's ranks, None where there is none yet, and errors instead of the others."""
    done, _ = ray.wait(calls, num_returns=len(calls), timeout=seconds)
    answers: list[Any] = [None] * len(calls)
    errors: dict[int, RayError] = {}
    for rank, call in enumerate(calls):
        if call not in done:
            continue
        try:
            answers[rank] = ray.get(call)
        except RayError as error:
            errors[rank] = error
    return answers, errors


def _ending(held: _Held, mails: list[Mail], deaths: dict[int, RayError]) -> Ending | None:
    """The attempt's ending. What befell its node is not held against it."""
    if deaths and held.gang.node not in spare(()):
        return Ending(Outcome.LOST, f"the node of gang {held.gang.name} is gone")
    if any(isinstance(error, RayActorError) and error.preempted for error in deaths.values()):
        return Ending(Outcome.PREEMPTED, f"the node of gang {held.gang.name} was preempted")
    return ending_of(held.attempt_id, mails, {rank: f"died: {_one_line(error)}" for rank, error in deaths.items()})


def _one_line(error: RayError) -> str:
    """The gist of Ray's explanation: the exception where one was raised, else the sentences without the identifiers."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "Traceback" in str(error) or not lines:
        return (lines or [type(error).__name__])[-1].strip()[:300]
    return " ".join(line.strip() for line in lines if not line.startswith("\t"))[:300]


def _start_local(ranks: int, options: dict[str, Any]) -> RayFolder:
    """Start a Ray of our own on this machine, with the folder that is returned.

    Ray listens on every interface, and turns on the token that it asks of callers unless RAY_AUTH_MODE says otherwise.
    Given in the environment, that token is not written to the user's home.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it warns that this is on
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = RayFolder()
    try:
        ray.init(
            "local",
            num_cpus=ranks,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder.path),
            **options,
        )
    except BaseException:
        folder.remove()
        raise
    return folder


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this program's answer to SIGTERM, which ray.init would replace by an exit of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray leaves signals alone in other threads
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
