"""What launchers leave behind in other circumstances than a clean end: each in a driver process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent


PREAMBLE = """
import json, sys, time
from pathlib import Path
from orchestrator.launcher import Assignment
from orchestrator.local_launcher import LocalLauncher
from orchestrator.ray_launcher import RayLauncher
from worker.recipes import load_recipe
from worker.spec import GangConfig, override, parse_spec

folder, tests = Path(sys.argv[1]), Path(sys.argv[2])

def make(kind, address=None):
    if kind == "local":
        return LocalLauncher(folder, folder, 2, "trainers:run", import_path=[tests])
    return RayLauncher(address, folder, 2, "trainers:run", import_path=[tests])

def assignment(number, trainer, ranks=1):
    changes = {"data.dataset": trainer, "gang.ranks": ranks, "seed": number, "budget.steps": 3}
    return Assignment(number, parse_spec(override(load_recipe("laptop"), changes)))

def until(launcher, number, holds):
    while not holds(update := launcher.poll({number: 0})[number]):
        pass
    return update

def start(launcher, attempt):
    return launcher.start(attempt, launcher.offer(attempt.spec.gang).gang)

def tell(**values):
    print(json.dumps(values), flush=True)
"""


@contextmanager
def driver(folder: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the code after the preamble, outside the source tree. Killed at the end, with its tree."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PREAMBLE}\n{code}"
    command = [sys.executable, "-c", program, str(folder), str(HERE)]
    with (folder / "driver.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    with process:
        tree = psutil.Process(process.pid)
        try:
            yield process
        finally:
            for child in [*tree.children(recursive=True), tree] if tree.is_running() else []:
                child.kill()


def heard(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """The next thing that the driver tells; what else is printed on its output is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            values: dict[str, Any] = json.loads(line)
            return values
    raise AssertionError((folder / "driver.log").read_text()[-3000:])


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.soak)])
def test_a_killed_driver_takes_its_ranks_and_whatever_they_started_with_it(tmp_path: Path, kind: str) -> None:
    code = f"""
launcher = make({kind!r})
start(launcher, assignment(1, "hang", ranks=2))
update = until(launcher, 1, lambda update: update.measurements)
tell(child=int(update.measurements[0].metrics["child"]))
sys.stdin.read()
"""
    with driver(tmp_path, code) as process:
        child = heard(process, tmp_path)["child"]
        tree = psutil.Process(process.pid).children(recursive=True)
        names = {process.pid: process.name() for process in tree}
        gang = {child, *(int(path.read_text()) for path in tmp_path.glob("1-*.pid"))}
        assert len(gang & set(names)) == 3
        process.kill()
        left = psutil.wait_procs(tree, timeout=10)[1]
        assert not gang & {process.pid for process in left}
        # Ray's node agents spend 60 s trying to tell the dead driver that its node is gone; they hold no rank.
        assert {names[process.pid] for process in left} <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_a_package_in_the_drivers_folder_does_not_hide_ours(tmp_path: Path, kind: str) -> None:
    for name in ("orchestrator", "worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    code = f"""
launcher = make({kind!r})
start(launcher, assignment(1, "count"))
ending = until(launcher, 1, lambda update: update.ending).ending
launcher.close()
tell(outcome=ending.outcome, reason=ending.reason)
"""
    with driver(tmp_path, code) as process:
        assert heard(process, tmp_path) == {"outcome": "succeeded", "reason": "trained to the end of its budget"}


@pytest.mark.soak
def test_one_ray_launcher_can_follow_another(tmp_path: Path) -> None:
    code = """
import psutil
for number in (1, 2):
    launcher = make("ray")
    start(launcher, assignment(number, "count"))
    ending = until(launcher, number, lambda update: update.ending).ending
    launcher.close()
    tell(outcome=ending.outcome, reason=ending.reason, left=len(psutil.Process().children()))
"""
    with driver(tmp_path, code) as process:
        for _ in range(2):
            told = heard(process, tmp_path)
            assert told == {"outcome": "succeeded", "reason": "trained to the end of its budget", "left": 0}


@pytest.mark.soak  # half a minute
def test_a_local_ray_that_lost_its_node_is_started_again(tmp_path: Path) -> None:
    code = """
import psutil
launcher = make("ray")

def raylets():
    return [child for child in psutil.Process().children() if child.name() == "raylet"]

launcher.free(GangConfig())
(first,) = raylets()
first.kill()
while not raylets() or first in raylets():
    launcher.free(GangConfig())
start(launcher, assignment(1, "count"))
tell(outcome=until(launcher, 1, lambda update: update.ending).ending.outcome)
launcher.close()
"""
    with driver(tmp_path, code) as process:
        assert heard(process, tmp_path) == {"outcome": "succeeded"}


@pytest.mark.soak  # as long
def test_a_cluster_is_joined_by_address_and_a_node_that_goes_loses_its_attempts(tmp_path: Path) -> None:
    code = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
launcher = make("ray", cluster.address)
tell(one=launcher.free(GangConfig(ranks=1)), two=launcher.free(GangConfig(ranks=2)))
for number in (1, 2):
    start(launcher, assignment(number, "hang"))
    until(launcher, number, lambda update: update.measurements)
tell(one=launcher.free(GangConfig(ranks=1)))
cluster.remove_node(nodes[0], allow_graceful=False)
ended = {}
while not ended:
    ended = {number: ending for number in (1, 2) if (ending := launcher.poll({number: 0})[number].ending)}
tell(outcomes=[ending.outcome for ending in ended.values()], reasons=[ending.reason for ending in ended.values()])
(number,) = ended
launcher.release(number)
tell(one=launcher.free(GangConfig(ranks=1)), other=launcher.poll({3 - number: 0})[3 - number].ending)
launcher.close()
cluster.shutdown()
"""
    with driver(tmp_path, code) as process:
        assert heard(process, tmp_path) == {"one": 2, "two": 0}
        assert heard(process, tmp_path) == {"one": 0}
        lost = heard(process, tmp_path)
        assert lost["outcomes"] == ["lost"]
        assert "node" in lost["reasons"][0]
        assert heard(process, tmp_path) == {"one": 0, "other": None}


def test_a_gang_on_a_cluster_outlives_its_launcher_and_the_next_one_adopts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)  # the same for the cluster and whoever joins it
    cluster = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
tell(address=cluster.address)
sys.stdin.read()
"""
    first = """
launcher = make("ray", sys.stdin.readline().strip())
gangs = [start(launcher, assignment(1, "until-stopped")), start(launcher, assignment(2, "hang", ranks=2))]
for number in (1, 2):
    until(launcher, number, lambda update: update.measurements)
launcher.start(assignment(5, "count"), gangs[0])
until(launcher, 5, lambda update: update.phase == "queue")
tell(gangs=gangs)
sys.stdin.read()
"""
    second = """
launcher = make("ray", sys.stdin.readline().strip())
gang = sys.stdin.readline().strip()
adopted = [launcher.adopt(1, gang), launcher.adopt(5, gang)]
adopted += [launcher.adopt(9, "caddie-000000-cpu1-00000000"), launcher.adopt(9, "nonsense")]
reaped = [launcher.reap(), launcher.reap()]
tell(adopted=adopted, reaped=reaped, measured=len(until(launcher, 1, lambda update: update.measurements).measurements))
launcher.stop(1)
ending = until(launcher, 1, lambda update: update.ending).ending
artifact = len(launcher.artifact(1))
launcher.release(1)
followed = until(launcher, 5, lambda update: update.ending).ending.outcome
launcher.release(5)
again = start(launcher, assignment(3, "count"))
succeeded = until(launcher, 3, lambda update: update.ending).ending.outcome
launcher.release(3)
from orchestrator import ray_gang
room = launcher.free(GangConfig(ranks=1))
warm = ray_gang.names("caddie")
launcher.adopt(4, gang)
untold = until(launcher, 4, lambda update: update.ending).ending.outcome
lone = ray_gang.new_name(GangConfig(), "nobody")
ray_gang.create(lone, next(iter(ray_gang.nodes())), "trainers:run", orphan_seconds=1.0)
while ray_gang.names("nobody") != {lone}:
    time.sleep(0.1)
while ray_gang.names("nobody"):  # until it has removed itself
    time.sleep(0.1)
launcher.close()
outcomes = [ending.outcome, followed, succeeded, untold]
tell(outcomes=outcomes, artifact=artifact, again=again, room=room, warm=sorted(warm))
"""
    folders = [tmp_path / name for name in ("cluster", "first", "second")]
    for folder in folders:
        folder.mkdir()
    with driver(folders[0], cluster) as ray:
        address = heard(ray, folders[0])["address"]
        with driver(folders[1], first) as process:
            print(address, file=process.stdin, flush=True)
            gang, other = heard(process, folders[1])["gangs"]
            process.kill()
        with driver(folders[2], second) as process:
            print(address, gang, sep="\n", file=process.stdin, flush=True)
            told = heard(process, folders[2])
            assert told == {"adopted": [True, True, False, False], "reaped": [1, 0], "measured": 1}
            told = heard(process, folders[2])
            assert told["outcomes"] == ["stopped", "succeeded", "succeeded", "lost"], "the last never reached its gang"
            assert told["artifact"] == 32_000
            assert told["again"] == gang != other, "an adopted gang is warm"
            assert (told["room"], told["warm"]) == (3, [gang])
