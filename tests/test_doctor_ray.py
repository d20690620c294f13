"""Gangs and leases that have lost each other: by the rules on both databases, and on a real Ray cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from claims import NewTrials

from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.doctor import SETTLED, Kind
from orchestrator.lifecycle import Outcome, TrialState
from orchestrator.ray_census import CLAIMED, QUIET_SECONDS, examine
from orchestrator.ray_gang import new_name
from orchestrator.study import AttemptResult, Claim, Study
from worker.spec import GangConfig

HERE = Path(__file__).parent
TTL = timedelta(seconds=20)
LONG_AGO = timedelta(minutes=10)


@pytest.fixture
def claim(database: Database, study: Study, new_trial: NewTrials) -> Callable[..., Claim]:
    """Adds a trial, and claims it at a moment, as an owner, for a gang."""

    def run(at: datetime, owner: str, gang: str) -> Claim:
        with database.write() as session:
            store.add_trial(session, study.id, new_trial(), at)
            claimed = leases.claim(session, GangConfig(), owner, at, TTL, name=gang)
        assert claimed is not None
        return claimed

    return run


def name(owner: str) -> str:
    return new_name(GangConfig(), owner)


def outcomes(database: Database, claims: list[Claim]) -> list[Outcome | None]:
    with database.read() as session:
        return [store.list_attempts(session, claimed.trial_id)[-1].outcome for claimed in claims]


def test_a_gang_is_without_a_lease_once_no_open_attempt_names_it_and_nobody_asks_for_it(
    database: Database, claim: Callable[..., Claim], now: datetime
) -> None:
    held, done, hung = name("a"), name("a"), name("a")
    claim(now - LONG_AGO, "a", held)
    ended = claim(now, "a", done)
    with database.write() as session:
        leases.finish(session, ended.lease, AttemptResult(Outcome.PREEMPTED), now)
    warm, long = QUIET_SECONDS - 1, QUIET_SECONDS + 1
    assert examine(database, {held: long, done: warm}, "a", now).findings() == []
    assert examine(database, {held: None}, "a", now).findings() == []
    found = examine(database, {held: long, done: long, hung: None}, "a", now).findings()
    assert [(finding.kind, finding.where, finding.remedy) for finding in found] == [
        (Kind.GANG_WITHOUT_LEASE, done, "removes it"),
        (Kind.GANG_WITHOUT_LEASE, hung, "removes it"),
    ]


def test_a_gang_that_none_of_the_databases_orchestrators_made_is_listed_and_kept(
    database: Database, claim: Callable[..., Claim], now: datetime
) -> None:
    claim(now, "a", name("a"))
    (finding,) = examine(database, {name("another database's"): None}, "a", now).findings()
    assert (finding.kind, finding.remedy) == (Kind.GANG_WITHOUT_LEASE, None)


def test_a_lease_without_its_gang_is_ended_once_it_has_run_out(
    database: Database, study: Study, claim: Callable[..., Claim], now: datetime
) -> None:
    lost = claim(now - LONG_AGO, "a", name("a"))
    census = examine(database, {}, "a", now)
    (finding,) = census.findings()
    assert (finding.kind, finding.where) == (Kind.LEASE_WITHOUT_GANG, "attempt 1, trial 0 of sharing")
    with database.write() as session:
        leases.expire(session, now, among=[])
    assert outcomes(database, [lost]) == [None]
    with database.write() as session:
        leases.expire(session, now, among=[*census.attempts.values()])
        assert store.get_trial(session, study.id, 0).state is TrialState.QUEUED
    assert outcomes(database, [lost]) == [Outcome.LOST]
    assert examine(database, {}, "a", now).findings() == []


def test_a_lease_is_left_alone_where_its_gang_may_be_elsewhere_or_on_its_way_or_its_owner_alive(
    database: Database, claim: Callable[..., Claim], now: datetime
) -> None:
    here = name("a")
    claim(now - LONG_AGO, "a", here)
    claim(now - LONG_AGO, "a", "local-17-1")
    claim(now - CLAIMED + timedelta(seconds=1), "a", name("a"))
    renewed = claim(now - LONG_AGO, "a", name("a"))
    with database.write() as session:
        leases.renew(session, renewed.lease, now, TTL)
    claim(now - SETTLED - LONG_AGO, "a", name("a"))  # found without asking Ray
    elsewhere = claim(now - LONG_AGO, "b", name("b"))
    assert examine(database, {here: 1.0}, "a", now).findings() == []
    found = examine(database, {here: 1.0, name("b"): 1.0}, "a", now)  # so b's gangs are on this cluster
    assert [*found.attempts.values()] == [elsewhere.lease.attempt_id]


# On a cluster

PREAMBLE = """
import json, sys
from pathlib import Path
from orchestrator.launcher import Assignment
from orchestrator.ray_launcher import RayLauncher
from worker.recipes import load_recipe
from worker.spec import override, parse_spec

def tell(**values):
    print(json.dumps(values), flush=True)

def launched(address, owner, number, trainer, ranks):
    launcher = RayLauncher(address, Path.cwd(), 4, "trainers:run", owner=owner, import_path=[Path(sys.argv[1])])
    changes = {"data.dataset": trainer, "gang.ranks": ranks, "seed": number, "budget.steps": 3}
    attempt = Assignment(number, parse_spec(override(load_recipe("laptop"), changes)))
    return launcher, launcher.start(attempt, launcher.offer(attempt.spec.gang).gang)
"""
CLUSTER = """
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
tell(address=cluster.address)
sys.stdin.read()
"""
KILLED = """
launcher, gang = launched(sys.argv[2], "killed", 1, "hang", 2)
while not launcher.poll({1: 0})[1].measurements:
    pass
tell(gang=gang)
sys.stdin.read()
"""
LIVE = """
import select
launcher, gang = launched(sys.argv[2], "live", 2, "count", 1)
while not launcher.poll({2: 0})[2].ending:
    pass
launcher.release(2)
tell(gang=gang)
while not select.select([sys.stdin], [], [], 0.2)[0]:
    launcher.poll({})
import ray
from orchestrator import ray_gang
tell(gangs=sorted(ray_gang.names()), free=ray.available_resources()["CPU"])
launcher.close()
"""


@contextmanager
def program(code: str, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the code after the preamble. Asked to end, then killed, at the end."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n{PREAMBLE}\n{code}"]
    with (
        (folder / "programs.log").open("a") as log,
        subprocess.Popen(
            [*command, str(HERE), *arguments], cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as process,
    ):  # fmt: skip
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def heard(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """The next thing that the program tells."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            values: dict[str, Any] = json.loads(line)
            return values
    raise AssertionError((folder / "programs.log").read_text()[-3000:])


@pytest.fixture
def doctor(database: Database, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs `caddie doctor` against a cluster, as one types it; what it answers, and its exit code."""
    url = database.url.render_as_string(hide_password=False)
    settings = {"CADDIE_HOME": str(tmp_path), "CADDIE_DATABASE_URL": url, "CADDIE_OWNER": "killed"}

    def run(address: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-c", "from api.cli import main; main()", "doctor", "--json", *options]
        # As of now: the test has set the cluster's token by then, in place of any that an earlier one left.
        kept = {each: value for each, value in os.environ.items() if not each.startswith("CADDIE_")}
        environment = {**kept, **settings, "CADDIE_RAY_ADDRESS": address, "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        return {**json.loads(done.stdout), "code": done.returncode}

    return run


@pytest.mark.soak
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_doctor_removes_the_gang_of_a_killed_orchestrator_and_leaves_a_warm_one(
    database: Database, claim: Callable[..., Claim], doctor: Callable[..., dict[str, Any]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)  # the same for the cluster and whoever joins it
    with ExitStack() as stack:
        address = heard(stack.enter_context(program(CLUSTER, tmp_path)), tmp_path)["address"]
        with program(KILLED, tmp_path, address) as killed:
            left = heard(killed, tmp_path)["gang"]
            killed.kill()
        live = stack.enter_context(program(LIVE, tmp_path, address))
        warm = heard(live, tmp_path)["gang"]
        at = datetime.now(UTC)
        lost = claim(at - LONG_AGO, "killed", name("killed"))

        until = time.monotonic() + 120
        while len((found := doctor(address))["remaining"]) < 2:
            assert time.monotonic() < until, found
        assert {(each["kind"], each["where"]) for each in found["remaining"]} == {
            ("gang without a lease", left), ("lease without a gang", "attempt 1, trial 0 of sharing")
        }  # fmt: skip
        assert (found["code"], found["ray"], warm != left) == (1, None, True)

        cleared = doctor(address, "--clear")
        assert [each["where"] for each in cleared["cleared"]] == [each["where"] for each in found["remaining"]]
        assert (cleared["remaining"], cleared["code"]) == ([], 0)
        assert outcomes(database, [lost]) == [Outcome.LOST]
        assert doctor(address)["remaining"] == []

        print("end", file=live.stdin, flush=True)
        assert heard(live, tmp_path) == {"gangs": [warm], "free": 3}, "what was removed holds no CPU"
