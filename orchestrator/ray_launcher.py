"""Gangs on Ray: a placement group on one node, an actor a rank, one process group, all kept warm between attempts."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from orchestrator.ending import lost
from orchestrator.launcher import Assignment, Ending, NoRoom, Offer, Update
from orchestrator.lifecycle import Outcome
from orchestrator.local_launcher import source_roots
from orchestrator.ray_attempt import RayAttempt, answers_of, one_line
from orchestrator.ray_folder import RayFolder
from orchestrator.ray_gang import (
    Gang,
    ask_for,
    create,
    driver_options,
    find,
    fit,
    names,
    new_name,
    remove,
    remove_named,
    spare,
)
from orchestrator.ray_local import own_sigterm, start_local
from orchestrator.ray_rooms import Rooms
from worker.source import code_digest
from worker.spec import GangConfig

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.25
"""How long a poll waits for ranks that are busy; what they say later is taken by the next poll."""
WARM_SECONDS = 5.0
"""How long a warm gang may take to accept an attempt before it is replaced. It takes 1 ms, on a busy machine more."""
TEND_SECONDS = 3.0
"""How often gangs are told that they are wanted, whatever they do."""
QUICK_SECONDS = 2.0
"""An attempt that takes less is followed at once; after longer ones the next is chosen when training is over."""
RECYCLE_ATTEMPTS = 200
"""So many attempts a gang is given before it is replaced: what leaks slowly gets no time to."""
ARTIFACT_SECONDS = 10.0


class RayLauncher:
    """A Launcher on Ray, for one thread. Its first call connects, which takes a local Ray 5 to 15 s.

    It places its gangs itself, each on one node of its choosing, and counts on having the cluster's nodes to itself. A
    gang that ended an attempt well waits, warm, for the next of its shape, and gives way to other shapes; one that
    failed in any way is removed. While an attempt is scored and packed the next one waits on its gang already.

    On a cluster that was joined gangs are detached: they outlive this process, and its successor of the same `owner`
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
        owner: str = "caddie",
        orphan_seconds: float = 3600.0,
        namespace: str = "caddie",
        import_path: Sequence[Path] = (),
    ) -> None:
        """Join the cluster at `address`, or with None start a Ray on this machine with room for `ranks` ranks.

        `trainer` is `module:function`, found by the ranks on `import_path` or in their own environment. Detached gangs
        remove themselves once nobody has polled them for `orphan_seconds`.
        """
        self._address = address
        self._data_root = data_root
        self._ranks = ranks
        self._trainer = trainer
        self._owner = owner
        self._orphan_seconds = None if address is None else orphan_seconds
        self._namespace = namespace
        self._import_path = tuple(import_path)
        self._connected = False
        self._folder: RayFolder | None = None
        self._held: dict[int, RayAttempt] = {}
        self._gangs: dict[str, Gang] = {}
        self._pings: dict[str, dict[int, Any]] = {}
        self._rooms = Rooms()
        self._wanted: Counter[GangConfig] | None = None
        self._tended_at = 0.0
        self._polled_at = time.monotonic()

    def free(self, gang: GangConfig) -> int:
        self._connect()
        idle = self._idle(gang)
        return len(idle) + self._rooms.room(gang, {*self._needed(), *idle})

    def capacity(self, gang: GangConfig) -> int:
        self._connect()
        return self._rooms.room(gang)

    def offer(self, gang: GangConfig) -> Offer | None:
        self._connect()
        if idle := [each for each in self._idle(gang) if self._rooms.is_open(each.node, gang)]:
            return Offer(idle[0].name, behind=False)
        if self._node_for(gang) is not None:
            return Offer(new_name(gang, self._owner), behind=False)
        open_gangs = [each for each in self._gangs.values() if self._rooms.is_open(each.node, gang)]
        ending = [each for each in open_gangs if each.shape == gang and self._about_to_end(each)]
        return Offer(ending[0].name, behind=True) if ending else None

    def reserve(self, gang: GangConfig | None) -> None:
        self._rooms.keep(gang, self._busy())

    def want(self, gangs: Mapping[GangConfig, int]) -> None:
        wanted = Counter(gangs) + Counter(gang.shape for gang in self._busy())
        if self._address is not None and wanted != self._wanted:
            self._wanted = wanted
            ask_for(wanted)

    def start(self, assignment: Assignment, gang: str) -> str:
        attempt_id, shape = assignment.attempt_id, assignment.spec.gang
        if attempt_id in self._held:
            return self._held[attempt_id].gang.name
        self._connect()
        known, cold = self._gangs.get(gang), assignment.spec.limits.cold
        if known is not None and self._on(known):
            if cold or known.condemned or len(self._on(known)) > 1:
                raise NoRoom(f"gang {gang} takes no other attempt now")
            return self._give(assignment, known, waits=True).gang.name
        if known is not None and cold:
            self._retire(known)  # in its place
        elif known is not None:
            given = self._give(assignment, known, waits=False)
            if given.is_accepted(WARM_SECONDS):
                return known.name
            del self._held[attempt_id]
            self._retire(known)  # it has lost a rank or its node while it was idle
        name = gang if known is None else new_name(shape, self._owner)
        return self._give(assignment, self._open(name, shape), waits=False).gang.name

    def adopt(self, attempt_id: int, gang: str) -> bool:
        self._connect()
        found = None if attempt_id in self._held else self._gangs.get(gang) or find(gang)
        if found is not None:
            self._gangs[gang] = found
            self._held[attempt_id] = RayAttempt(attempt_id, found)
        return attempt_id in self._held

    def reap(self) -> int:
        self._connect()
        orphans = names(self._owner) - set(self._gangs)
        for name in orphans:
            remove_named(name)
        for gang in list(self._gangs.values()):
            self._examine(gang)
        return len(orphans)

    def poll(self, cursors: Mapping[int, int], logged: Mapping[int, int] | None = None) -> dict[int, Update]:
        self._note_silence()
        running = [held for held in map(self._held.get, cursors) if held is not None and held.ending is None]
        if calls := [call for held in running for call in held.ask()]:
            ray.wait(calls, num_returns=len(calls), timeout=ANSWER_SECONDS)
        for held in running:
            if not held.gang.condemned or held.phase == "store":
                held.listen(self._rooms)
            if held.ending is not None and held.ending.result is None and held.phase != "queue":
                held.gang.condemned = True
            if held.phase == "store" and held.gang.attempts >= RECYCLE_ATTEMPTS and not self._on(held.gang):
                held.gang.condemned = True
        for held in running:
            if held.ending is None and held.gang.condemned and held.phase != "store":
                held.ending = Ending(Outcome.PREEMPTED, f"its gang {held.gang.name} is replaced")
        self._remove_condemned()
        self._tend()
        known = logged or {}
        return {each: self._update(each, after, known.get(each, 0)) for each, after in cursors.items()}

    def wait(self, seconds: float) -> None:
        running = [held for held in self._held.values() if held.ending is None]
        if not (news := [call for held in running for call in held.news()]):
            time.sleep(seconds)
            return
        done, _ = ray.wait(news, num_returns=1, timeout=seconds)
        for held in running:
            held.heard(done)

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
        except GetTimeoutError as error:
            raise TimeoutError(f"the artifact of attempt {attempt_id} takes over {ARTIFACT_SECONDS:g} s") from error
        except RayError as error:
            raise KeyError(f"the artifact of attempt {attempt_id} is gone: {one_line(error)}") from error
        if not isinstance(artifact, bytes):
            raise KeyError(f"attempt {attempt_id} left no artifact")
        return artifact

    def release(self, attempt_id: int) -> None:
        held = self._held.pop(attempt_id, None)
        if held is None:
            return
        gang, ended_well = held.gang, held.ending is not None and held.ending.result is not None
        if ended_well:
            spent = held.update.seconds
            gang.quick = sum(spent[phase] for phase in spent if phase not in ("queue", "idle")) < QUICK_SECONDS
            gang.condemned = gang.condemned or (gang.attempts >= RECYCLE_ATTEMPTS and not self._on(gang))
        elif not gang.condemned and held.phase != "store":  # its ranks are at another attempt by then
            gang.condemned = held.phase != "queue" or not (held.undelivered or self._withdraw(held))
        if not gang.condemned:
            for rank, actor in enumerate(gang.actors):
                actor.forget.remote(attempt_id, held.accepted.get(rank))
        self._remove_condemned()

    def leave(self) -> bool:
        if self._address is None:
            return False
        for held in self._held.values():
            self._gangs.pop(held.gang.name, None)
        self.close()
        return True

    def close(self) -> None:
        if not self._connected:
            return
        for gang in list(self._gangs.values()):
            self._remove(gang)
        self._held.clear()
        if self._address is not None:
            ask_for({})  # what is asked for outlives whoever asked
        ray.shutdown()
        self._connected = False
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _connect(self) -> None:
        """Be connected. A local Ray that has lost its node is started again, once no attempt is held on it."""
        if self._connected and self._folder is not None and not self._held and not self._rooms.living():
            log.warning("the local Ray has lost its node and is started again")
            self.close()
        if self._connected:
            return
        options = driver_options(self._namespace, [*self._import_path, *source_roots()])
        # Ray puts the folder that we stand in on its workers' path: a `worker` in the user's would hide ours.
        with own_sigterm(), chdir("/"):
            if self._address is None:
                self._folder = start_local(self._ranks, options)
            else:
                ray.init(self._address, **options)
        self._connected = True
        self._rooms = Rooms()

    def _update(self, attempt_id: int, after: int, logged: int) -> Update:
        held = self._held.get(attempt_id)
        if held is None:
            return Update("lost", (), lost(attempt_id))
        update = held.update
        return replace(update, measurements=update.measurements[after:], lines=update.lines[logged:])

    def _on(self, gang: Gang) -> list[RayAttempt]:
        """The attempts that the gang's ranks are at, or that wait there."""
        at = [held for held in self._held.values() if held.gang is gang]
        return [held for held in at if held.ending is None and held.phase != "store"]

    def _busy(self) -> list[Gang]:
        return [gang for gang in self._gangs.values() if gang.condemned or self._on(gang)]

    def _needed(self) -> list[Gang]:
        """The gangs that cannot make room: busy ones, and those that have what was not stored yet."""
        held = [attempt.gang for attempt in self._held.values()]
        return [gang for gang in self._gangs.values() if gang.condemned or gang in held]

    def _retire(self, gang: Gang) -> None:
        """Give it nothing more, and remove it once nothing on it is still to be stored."""
        gang.condemned = True
        self._remove_condemned()

    def _idle(self, shape: GangConfig | None = None) -> list[Gang]:
        """The gangs, of this shape or any, that could start an attempt at once."""
        idle = [gang for gang in self._gangs.values() if not gang.condemned and not self._on(gang)]
        return [gang for gang in idle if gang.node in self._rooms.living() and shape in (None, gang.shape)]

    def _examine(self, gang: Gang) -> None:
        """Condemn an adopted gang that is at an attempt which is nobody's any more, and give one that runs other code
        than ours no more than it has."""
        asked: dict[int, Any] = {0: gang.actors[0].about.remote()}
        at, code = answers_of(asked, WARM_SECONDS)[0].get(0, (None, code_digest()))
        gang.condemned = gang.condemned or (at is not None and at not in self._held)
        if code != code_digest():
            gang.attempts = RECYCLE_ATTEMPTS

    def _about_to_end(self, gang: Gang) -> bool:
        """Whether the gang may be given an attempt that waits for the one it runs."""
        at = self._on(gang)
        if gang.condemned or gang.attempts >= RECYCLE_ATTEMPTS or len(at) != 1 or gang.node not in self._rooms.living():
            return False
        return at[0].phase in ("evaluate", "pack") or (gang.quick and at[0].age_seconds < QUICK_SECONDS)

    def _give(self, assignment: Assignment, gang: Gang, *, waits: bool) -> RayAttempt:
        """Send the attempt to the gang's ranks."""
        held = self._held[assignment.attempt_id] = RayAttempt(assignment.attempt_id, gang)
        held.give(assignment, str(self._data_root), waits=waits)
        for other in self._held.values():
            other.shares = other.shares or (other is not held and other.gang is gang)
        return held

    def _node_for(self, shape: GangConfig) -> str | None:
        """Where a new gang of the shape goes, idle gangs in its way retired only where they must be."""
        return self._rooms.node_for(shape, [*self._gangs.values()]) or self._rooms.node_for(shape, self._needed())

    def _open(self, name: str, shape: GangConfig) -> Gang:
        """A new gang of this name, after retiring the idle gangs that are in its way."""
        node = self._node_for(shape)
        if node is None:
            raise NoRoom(f"no node has room for {shape.ranks} {shape.device} ranks")
        for idle in self._idle():
            if fit(shape, *spare(self._rooms.living(), self._gangs.values())[node]):
                break
            if idle.node == node and idle not in self._needed():
                self._remove(idle)
        gang = self._gangs[name] = create(name, node, self._trainer, orphan_seconds=self._orphan_seconds)
        return gang

    def _withdraw(self, held: RayAttempt) -> bool:
        """Take from its gang an attempt that waits there; False where it has begun, or the gang does not say."""
        withdrawn, _ = answers_of(
            {0: held.gang.actors[0].withdraw.remote(held.attempt_id, held.accepted.get(0))}, WARM_SECONDS
        )
        return withdrawn.get(0) is True

    def _remove_condemned(self) -> None:
        """Remove the condemned gangs, except where a result is still to be fetched."""
        kept = [held.gang for held in self._held.values() if held.ending is None and held.phase == "store"]
        kept += [
            held.gang for held in self._held.values() if held.ending is not None and held.ending.result is not None
        ]
        for gang in list(self._gangs.values()):
            if gang.condemned and gang not in kept:
                self._remove(gang)

    def _remove(self, gang: Gang) -> None:
        gang.condemned = True
        self._gangs.pop(gang.name, None)
        self._pings.pop(gang.name, None)
        remove(gang)

    def _note_silence(self) -> None:
        """Where nobody has polled for so long that gangs took it that nobody wants them, their end is no crash."""
        before, self._polled_at = self._polled_at, time.monotonic()
        if self._orphan_seconds is not None and self._polled_at - before > self._orphan_seconds / 2:
            for held in self._held.values():
                held.neglect()

    def _tend(self) -> None:
        """Tell gangs that they are wanted, also those that do nothing, or still load what they need; idle ones that
        have lost a rank since the last time are removed."""
        if time.monotonic() - self._tended_at < TEND_SECONDS:
            return
        self._tended_at = time.monotonic()
        for gang in list(self._gangs.values()):
            if answers_of(self._pings.get(gang.name, {}))[1] and not self._on(gang):
                self._retire(gang)
            else:
                self._pings[gang.name] = {rank: actor.ping.remote() for rank, actor in enumerate(gang.actors)}
