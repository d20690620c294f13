"""A gang on Ray: a placement group on one node and an actor a rank. Made, found again by its name, and removed."""

import re
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.ray_rank import RayRank
from worker.spec import GangConfig

NODE_LABEL = "ray.io/node-id"
_NAME = re.compile(r"caddie-(?P<device>cpu|gpu)(?P<ranks>\d+)-[0-9a-f]{8}")


@dataclass(eq=False)
class Gang:
    """A placement group on one node and its actors, by rank. `port` is the call that opens rank 0's rendezvous."""

    name: str
    shape: GangConfig
    node: str
    group: PlacementGroup
    actors: list[Any]
    port: Any


def create(shape: GangConfig, node: str, trainer: str, *, detached: bool) -> Gang:
    """Ask Ray for a gang, without waiting for it. A detached one outlives this process, until it is removed."""
    name = f"caddie-{shape.device}{shape.ranks}-{uuid.uuid4().hex[:8]}"
    gpus = 1 if shape.device == "gpu" else 0
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    selector = [{NODE_LABEL: node}] * shape.ranks
    lifetime = "detached" if detached else None
    group = placement_group([bundle] * shape.ranks, "STRICT_PACK", name, lifetime, bundle_label_selector=selector)
    actor_class: Any = ray.remote(RayRank)
    actors = [
        actor_class.options(
            name=_actor(name, rank),
            lifetime=lifetime,
            num_cpus=1,
            num_gpus=gpus,
            max_restarts=0,
            # `serve` waits for torch and `ended` for an attempt while others answer; the job has a thread of its own.
            max_concurrency=16,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote(rank, shape, trainer)
        for rank in range(shape.ranks)
    ]
    return Gang(name, shape, node, group, actors, _port(shape, actors))


def find(name: str) -> Gang | None:
    """The gang of this name that another process made; None where any part of it is gone."""
    shape = _shape(name)
    if shape is None:
        return None
    try:
        group = get_placement_group(name)
        actors = [ray.get_actor(_actor(name, rank)) for rank in range(shape.ranks)]
    except ValueError:  # there is none of this name
        return None
    nodes = set(placement_group_table(group).get("bundles_to_node_id", {}).values())
    if len(nodes) != 1 or "" in nodes:  # never placed
        return None
    return Gang(name, shape, nodes.pop(), group, actors, _port(shape, actors))


def names() -> set[str]:
    """The gangs that this cluster has anything of: a rank or a reservation."""
    tables: dict[str, Any] = placement_group_table()
    groups = {table["name"] for table in tables.values() if table["state"] != "REMOVED"}
    actors = {name.rpartition("-")[0] for name in ray.util.list_named_actors()}
    return {name for name in groups | actors if _shape(name) is not None}


def remove(gang: Gang) -> None:
    """Kill the gang's processes and give its room back. Repeatable."""
    for actor in gang.actors:
        ray.kill(actor, no_restart=True)
    remove_placement_group(gang.group)


def remove_named(name: str) -> None:
    """The same for whatever is left of a gang of another process. Repeatable."""
    shape = _shape(name)
    assert shape is not None, name
    for rank in range(shape.ranks):
        with suppress(ValueError):  # there is none
            ray.kill(ray.get_actor(_actor(name, rank)), no_restart=True)
    with suppress(ValueError):
        remove_placement_group(get_placement_group(name))


def spare(gangs: Sequence[Gang]) -> dict[str, tuple[int, int]]:
    """CPUs and GPUs of each living node, by its id, that are not taken by these gangs."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    cpus: Counter[str] = Counter()
    gpus: Counter[str] = Counter()
    for gang in gangs:
        cpus[gang.node] += gang.shape.ranks
        gpus[gang.node] += gang.shape.ranks if gang.shape.device == "gpu" else 0
    return {
        node["NodeID"]: (
            int(node["Resources"].get("CPU", 0)) - cpus[node["NodeID"]],
            int(node["Resources"].get("GPU", 0)) - gpus[node["NodeID"]],
        )
        for node in nodes
        if node["Alive"]
    }


def fit(shape: GangConfig, cpus: int, gpus: int) -> int:
    """How many gangs of the shape fit in so many CPUs and GPUs."""
    return max(0, min(cpus, gpus) if shape.device == "gpu" else cpus) // shape.ranks


def _actor(name: str, rank: int) -> str:
    return f"{name}-{rank}"


def _port(shape: GangConfig, actors: list[Any]) -> Any:
    return actors[0].serve.remote() if shape.ranks > 1 else None


def _shape(name: str) -> GangConfig | None:
    """The shape that a gang's name says; None for a name that is no gang's."""
    said = _NAME.fullmatch(name)
    if said is None:
        return None
    return GangConfig.model_validate({"ranks": int(said["ranks"]), "device": said["device"]})
