"""A gang on Ray: a placement group on one node and an actor a rank. Made, found again by its name, and removed."""

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.job_config import JobConfig
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
ASK_SECONDS = 0.5
"""How often a rank that is not there is looked for."""
_NAME = re.compile(r"caddie-(?P<owner>[0-9a-f]{6})-(?P<device>cpu|gpu)(?P<ranks>\d+)-[0-9a-f]{8}")


@dataclass(eq=False)
class Gang:
    """A placement group on one node and its actors, by rank. `port` is the call that opens rank 0's rendezvous.

    `attempts` counts those that it was given through this object. `quick`: its last one took a moment. `condemned`: it
    takes no more, and goes as soon as nothing that is done is left on it.
    """

    name: str
    shape: GangConfig
    node: str
    group: PlacementGroup
    actors: list[Any]
    port: Any
    attempts: int = 0
    quick: bool = False
    condemned: bool = False


def driver_options(namespace: str, roots: Iterable[Path]) -> dict[str, Any]:
    """How a process connects to Ray that makes gangs or asks them anything. RayRank is found below one of the roots."""
    return {
        "namespace": namespace,
        "job_config": JobConfig(code_search_path=[str(root) for root in roots]),
        "log_to_driver": False,
        "configure_logging": False,
        "logging_level": logging.WARNING,
    }


def new_name(shape: GangConfig, owner: str) -> str:
    """A name that no gang has, and that says whose it is and of which shape."""
    return f"caddie-{_tag(owner)}-{shape.device}{shape.ranks}-{uuid.uuid4().hex[:8]}"


def create(name: str, node: str, trainer: str, *, orphan_seconds: float | None) -> Gang:
    """Ask Ray for the gang that the name says, without waiting for it. With `orphan_seconds` it is detached: it
    outlives this process, until it is removed or nobody has asked it anything for so long."""
    shape = _shape(name)
    assert shape is not None, name
    gpus = 1 if shape.device == "gpu" else 0
    bundle: dict[str, float] = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    selector = [{NODE_LABEL: node}] * shape.ranks
    lifetime = None if orphan_seconds is None else "detached"
    group = placement_group([bundle] * shape.ranks, "STRICT_PACK", name, lifetime, bundle_label_selector=selector)
    orphan = None if orphan_seconds is None else (orphan_seconds, partial(remove_named, name))
    actor_class: Any = ray.remote(RayRank)
    try:
        actors = [
            actor_class.options(
                name=_actor(name, rank),
                lifetime=lifetime,
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                # `serve` waits for torch and `ended` for an attempt while others answer; jobs have their own thread.
                max_concurrency=16,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(rank, shape, trainer, orphan)
            for rank in range(shape.ranks)
        ]
    except BaseException:
        remove_named(name)
        raise
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


def names(owner: str | None = None) -> set[str]:
    """The gangs, of this owner or of any, that the cluster has something of: a rank or a reservation."""
    tables: dict[str, Any] = placement_group_table()
    groups = {table["name"] for table in tables.values() if table["state"] != "REMOVED"}
    actors = {name.rpartition("-")[0] for name in ray.util.list_named_actors()}
    gangs = {name for name in groups | actors if _NAME.fullmatch(name)}
    return gangs if owner is None else {name for name in gangs if is_of(name, owner)}


def is_of(name: str, owner: str) -> bool:
    """Whether the gang of this name is the owner's."""
    return name.startswith(f"caddie-{_tag(owner)}-")


def silences(gangs: Iterable[str], seconds: float) -> dict[str, float]:
    """For how many seconds nobody has asked each gang anything. Those are left out whose rank 0 is not there, or does
    not answer, for so many `seconds`. The question makes no gang wanted."""
    heard: dict[str, float] = {}
    calls: dict[str, Any] = {}
    missing, until = set(gangs), time.monotonic() + seconds
    while missing and time.monotonic() < until:
        for name in missing - calls.keys():
            with suppress(ValueError):  # not there, or not yet
                calls[name] = ray.get_actor(_actor(name, 0)).unasked_seconds.remote()
        if not calls:
            time.sleep(ASK_SECONDS)
            continue
        done, _ = ray.wait([*calls.values()], num_returns=len(calls), timeout=ASK_SECONDS)
        for name in [name for name, call in calls.items() if call in done]:
            with suppress(RayError):  # it has just died
                heard[name] = ray.get(calls[name])
            del calls[name]
        missing -= heard.keys()
    return heard


def remove(gang: Gang) -> None:
    """Kill the gang's processes and give its room back. Repeatable."""
    for actor in gang.actors:
        ray.kill(actor, no_restart=True)
    remove_placement_group(gang.group)


def remove_named(name: str) -> None:
    """The same for whatever is left of a gang of another process. Repeatable."""
    shape = _shape(name)
    assert shape is not None, name
    with suppress(ValueError):  # there is none
        remove_placement_group(get_placement_group(name))  # first: it may be a rank of the gang that asks
    for rank in range(shape.ranks):
        with suppress(ValueError):
            ray.kill(ray.get_actor(_actor(name, rank)), no_restart=True)


def nodes() -> dict[str, tuple[int, int]]:
    """CPUs and GPUs of each living node, by its id."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {
        node["NodeID"]: (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in found
        if node["Alive"]
    }


def spare(rooms: Mapping[str, tuple[int, int]], gangs: Iterable[Gang]) -> dict[str, tuple[int, int]]:
    """What these gangs leave of the nodes' CPUs and GPUs."""
    left = dict(rooms)
    for gang in gangs:
        if gang.node in left:
            cpus, gpus = left[gang.node]
            left[gang.node] = cpus - gang.shape.ranks, gpus - (gang.shape.ranks if gang.shape.device == "gpu" else 0)
    return left


def ask_for(gangs: Mapping[GangConfig, int]) -> None:
    """Ask Ray's autoscaler, where there is one, for nodes that hold these gangs together; it keeps them until it is
    asked for less. A gang is one bundle, since it needs one node."""
    bundles = [
        {"CPU": shape.ranks, "GPU": shape.ranks} if shape.device == "gpu" else {"CPU": shape.ranks}
        for shape, count in gangs.items()
        for _ in range(count)
    ]
    request_resources(bundles=bundles)


def fit(shape: GangConfig, cpus: int, gpus: int) -> int:
    """How many gangs of the shape fit in so many CPUs and GPUs."""
    return max(0, min(cpus, gpus) if shape.device == "gpu" else cpus) // shape.ranks


def _tag(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:6]


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
