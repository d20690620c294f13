"""The nodes of a Ray cluster: what gangs leave of them, and for which shape room is kept."""

import time
from collections.abc import Collection, Iterable, Mapping

from orchestrator.ray_gang import Gang, fit, nodes, spare
from worker.spec import GangConfig

NODES_SECONDS = 1.0
"""How long it may go unnoticed that a node has come or gone."""


class Rooms:
    """CPUs and GPUs by node, as of a moment ago."""

    def __init__(self) -> None:
        self._nodes: Mapping[str, tuple[int, int]] = {}
        self._nodes_at: float | None = None
        self._kept: tuple[GangConfig, str] | None = None

    def living(self) -> Mapping[str, tuple[int, int]]:
        """CPUs and GPUs of each node, by its id."""
        if self._nodes_at is None or time.monotonic() - self._nodes_at > NODES_SECONDS:
            self._nodes, self._nodes_at = nodes(), time.monotonic()
        return self._nodes

    def look(self) -> Mapping[str, tuple[int, int]]:
        """The same as of now."""
        self._nodes_at = None
        return self.living()

    def room(self, shape: GangConfig, gangs: Iterable[Gang] = ()) -> int:
        """How many gangs of the shape fit beside these."""
        return sum(fit(shape, *room) for room in spare(self.living(), gangs).values())

    def keep(self, shape: GangConfig | None, busy: Collection[Gang]) -> None:
        """Keep the node where a gang of this shape can be had soonest from all other shapes; None keeps none. A node
        once chosen stays so while it lives."""
        if self._kept is not None and self._kept[0] == shape and self._kept[1] in self.living():
            return
        self._kept = None
        if shape is not None:
            left = spare(self.living(), busy)
            able = [node for node, room in self.living().items() if fit(shape, *room)]
            self._kept = (shape, max(able, key=lambda node: (left[node], node))) if able else None

    def is_open(self, node: str, shape: GangConfig) -> bool:
        """Whether the node lives, and is not kept for another shape."""
        return node in self.living() and (self._kept is None or self._kept[1] != node or self._kept[0] == shape)

    def node_for(self, shape: GangConfig, gangs: Collection[Gang]) -> str | None:
        """The node that a new gang of the shape fills best beside these; None where there is none."""
        left = {node: room for node, room in spare(self.living(), gangs).items() if fit(shape, *room)}
        return min((node for node in left if self.is_open(node, shape)), key=lambda n: (left[n], n), default=None)
