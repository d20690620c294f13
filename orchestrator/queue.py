"""What waits in the queue, and what the launcher has to know of it: whom to keep room for, what to ask nodes for."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from orchestrator import store
from orchestrator.database import Database
from orchestrator.launcher import Launcher
from orchestrator.study import Study
from worker.spec import GangConfig

log = logging.getLogger(__name__)

Waiting = tuple[int, GangConfig]
"""A study, by its id, and a shape of gang that its runs wait for."""
BACKFILL = timedelta(minutes=2)
"""How long runs of other shapes may be started past one that has no room. Then room is kept for it."""


class Queue:
    """The queued runs by the shape of gang that they wait for, and since when one of them has had no room."""

    def __init__(self, database: Database, launcher: Launcher, owner: str) -> None:
        self._database, self._launcher, self._owner = database, launcher, owner
        self._since: dict[GangConfig, datetime] = {}
        self._told: set[tuple[int, GangConfig]] = set()

    def look(self, waiting: Mapping[GangConfig, int], now: datetime) -> None:
        """Tell the launcher what waits, by shape, and for whom to keep room: the shape that has waited longest, beyond
        BACKFILL, without any."""
        self._launcher.want(waiting)
        without = [gang for gang in waiting if not self._launcher.free(gang) and self._launcher.capacity(gang)]
        self._since = {gang: self._since.get(gang, now) for gang in without}
        overdue = [gang for gang, since in self._since.items() if now - since >= BACKFILL]
        self._launcher.reserve(min(overdue, key=lambda gang: self._since[gang]) if overdue else None)

    def started(self, gang: GangConfig) -> None:
        """One of the shape has had its turn."""
        self._since.pop(gang, None)

    def tell_of_no_room(self, study: Study, shapes: Iterable[GangConfig], now: datetime) -> None:
        """Say once, as an event of the study, that runs wait for a shape that nothing here can ever hold."""
        for gang in shapes:
            if (study.id, gang) in self._told or self._launcher.capacity(gang):
                continue
            self._told.add((study.id, gang))
            shape = f"{gang.ranks} {gang.device} ranks"
            why = f"Runs wait for a gang of {shape}: {self._owner} has no node that could hold one"
            log.warning("study %s: %s", study.name, why)
            with self._database.write() as session:
                store.add_event(session, study.id, None, "study.waiting", why, now)


def by_shape(waiting: Mapping[Waiting, int]) -> dict[GangConfig, int]:
    """How many runs wait for a gang of each shape."""
    shapes: Counter[GangConfig] = Counter()
    for (_study, gang), count in waiting.items():
        shapes[gang] += count
    return {gang: count for gang, count in shapes.items() if count > 0}
